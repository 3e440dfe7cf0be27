"""AdamW by the kernel op ``adamw_step``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from siirl.training.sharding import own_parts
from siirl_kernels import kernels


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, whose arithmetic is the kernel op: one call for all parameters of a group.

    Its state has PyTorch's names (``step``, ``exp_avg``, ``exp_avg_sq``) and dtypes, in the parameters' own sharding,
    so a checkpoint of either is one of the other. A worker updates its shards without asking others.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have gradients; ``closure`` computes them anew first and gives the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            counts = [self._state(p)["step"] for p in parameters]
            if counts:
                torch._foreach_add_(counts, 1.0)
            alike: dict[Any, list[Tensor]] = {}  # an op's call is of one step, one dtype, one device
            for p, count in zip(parameters, counts, strict=True):
                alike.setdefault((int(count.item()), p.dtype, p.device), []).append(p)
            for (step, *_), some in alike.items():
                self._update(some, step, group)
        return loss

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        lists = (
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
        )
        kernels.adamw_step(
            *map(own_parts, lists), step, group["lr"], *group["betas"], group["eps"], group["weight_decay"]
        )
