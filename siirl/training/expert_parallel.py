"""Expert parallel: each worker of a group holds a part of every layer's experts, whole ones (GShard, arXiv 2006.16668).

Workers of a group train on different rows, as data parallel ones do. In each layer the copies of their tokens travel to
the workers that hold their experts and the results travel back, two exchanges forward and two backward; so every pass
is a collective. Nothing is dropped and nothing padded.
Shapes: R rows of this worker, S rows that its experts get, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from siirl.device.collectives import Collectives
from siirl.model.experts import Experts
from siirl.training.exchange import exchange, swap_rows
from siirl.training.tensor_parallel import distribute
from siirl_kernels import kernels
from siirl_kernels.experts import sort_by_expert

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def spread_experts(module: nn.Module, group: Collectives, devices: DeviceMesh | None) -> frozenset[str]:
    """Deal a module's experts out to a group, in place; parameters become DTensors, those of experts cut.

    Args:
        module: holds the same weights on all workers.
        group: of workers; their number divides that of the experts.
        devices: the same, as PyTorch sees it.

    Returns:
        Names of the parameters of experts: their gradients are of the whole group's tokens.
    """
    if group.size == 1:
        return frozenset()
    assert devices is not None
    layers = [found for found in module.modules() if isinstance(found, Experts)]
    cut = {id(parameter) for experts in layers for parameter in experts.parameters()}
    names = frozenset(name for name, parameter in module.named_parameters() if id(parameter) in cut)
    distribute(module, {id(p): 0 if id(p) in cut else None for p in module.parameters()}, group, devices)
    for experts in layers:
        experts.elsewhere = _Elsewhere(group, experts.count)
    return names


class _Elsewhere:
    """Has rows computed where their experts are."""

    def __init__(self, group: Collectives, experts: int) -> None:
        self._group, self._own = group, experts // group.size

    def __call__(self, x_RH: Tensor, offsets: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Results of rows sorted by expert, [R, H]; ``compute`` takes rows and offsets of this worker's experts."""
        size, own = self._group.size, self._own
        wanted = offsets.diff()
        asked = swap_rows(wanted, [own] * size, [own] * size, self._group)  # rows of each worker for each own expert
        send, receive = wanted.view(size, own).sum(1).tolist(), asked.view(size, own).sum(1).tolist()
        x_SH = exchange(x_RH, send, receive, self._group)
        numbers = torch.arange(own, device=asked.device).repeat(size).repeat_interleave(asked)
        places_S1, own_offsets = sort_by_expert(numbers[:, None], own)
        out_SH = compute(kernels.permute_tokens(x_SH, places_S1), own_offsets)
        return exchange(out_SH.index_select(0, places_S1[:, 0]), receive, send, self._group)
