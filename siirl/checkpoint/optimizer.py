"""The tensors of an optimiser by the names of the parameters they belong to."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State tensors as ``PARAMETER.KEY``: the live ones, so that filling them restores the optimiser.

    An optimiser that has not stepped yet has no state; it is made to hold zeros first.
    """
    _materialize(optimizer)
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _materialize(optimizer: torch.optim.Optimizer) -> None:
    """Step once with zero gradients and learning rate 0, which changes no weight, and take back the count."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
