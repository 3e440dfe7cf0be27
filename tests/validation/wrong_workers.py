"""What a worker of a world does to its collectives: `break_it(name)` patches this process, `mend()` takes it back."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from siirl.checkpoint import store
from siirl.device.collectives import Collectives
from siirl.training import spread

_before: list[tuple[Any, str, Any]] = []


def break_it(collectives: Collectives, name: str) -> None:
    for owner, attribute, replacement in BREAKS[name]:
        _before.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, replacement)


def mend(collectives: Collectives) -> None:
    while _before:
        setattr(*_before.pop())


_all_reduce, _all_to_all, _broadcast = dist.all_reduce, dist.all_to_all_single, dist.broadcast
_gather, _facade_reduce, _save = Collectives._all_gather, Collectives.all_reduce, store.save


def _maximum_is_minimum(t: Tensor, op: Any = dist.ReduceOp.SUM, **rest: Any) -> Any:
    return _all_reduce(t, op=dist.ReduceOp.MIN if op == dist.ReduceOp.MAX else op, **rest)


def _whatever_the_group(t: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    return _all_reduce(t, op=op, async_op=async_op)


def _forgets_to_divide(self: Collectives, t: Tensor, op: str = "sum") -> Tensor:
    return _facade_reduce(self, t, "sum" if op == "mean" and t.is_floating_point() else op)  # type: ignore[arg-type]


def _not_in_place(self: Collectives, t: Tensor, op: str = "sum") -> Tensor:
    return _facade_reduce(self, t.clone(), op)  # type: ignore[arg-type]


def _odd_sizes_lose_the_last(t: Tensor, op: Any = dist.ReduceOp.SUM, **rest: Any) -> Any:
    even = t.view(-1)[: t.numel() // 2 * 2]
    return _all_reduce(even, op=op, **rest) if even.numel() else None


def _neighbours_swapped(output: Tensor, source: Tensor, into: list[int], out: list[int], **rest: Any) -> Any:
    work = _all_to_all(output, source, into, out, **rest)
    output.copy_(torch.cat(output.split(into)[::-1]))
    return work


def _always_from_worker_0(t: Tensor, src: int = 0, **rest: Any) -> Any:
    return _broadcast(t, **(rest | {"group_src": 0}))


def _ranks_reversed(self: Collectives, t: Tensor) -> list[Tensor]:
    return _gather(self, t)[::-1]


def _save_in_half(run_dir: Any, name: str, tensors: dict[str, Tensor], *rest: Any) -> Any:
    return _save(run_dir, name, {key: x.bfloat16().to(x.dtype) for key, x in tensors.items()}, *rest)


def _dies(*arguments: Any, **rest: Any) -> None:
    import os

    os._exit(7)


def _hangs(*arguments: Any, **rest: Any) -> None:
    time.sleep(3600)


BREAKS: dict[str, list[tuple[Any, str, Any]]] = {
    "the maximum is the minimum": [(dist, "all_reduce", _maximum_is_minimum)],
    "a mean that forgets to divide": [(Collectives, "all_reduce", _forgets_to_divide)],
    "a reduction that is not in place": [(Collectives, "all_reduce", _not_in_place)],
    "the last of an odd number is lost": [(dist, "all_reduce", _odd_sizes_lose_the_last)],
    "the group is ignored": [(dist, "all_reduce", _whatever_the_group)],
    "segments in another order": [(dist, "all_to_all_single", _neighbours_swapped)],
    "always from worker 0": [(dist, "broadcast", _always_from_worker_0)],
    "ranks in reverse": [(Collectives, "_all_gather", _ranks_reversed)],
    "gradients are not summed": [(spread, "sum_gradients", lambda *_: None)],
    "a checkpoint in half precision": [(store, "save", _save_in_half)],
    "a worker dies": [(dist, "broadcast", _dies)],
    "a worker hangs": [(dist, "all_to_all_single", _hangs)],
}
