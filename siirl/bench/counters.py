"""Exact counters of a piece of work: what it asked of PyTorch, whatever the machine was doing meanwhile.

    op_calls          calls of PyTorch's operators, backward passes included
    collectives       those of them that are collectives
    collective_bytes  bytes of the tensors given to collectives, sent or received
    allocations       tensors' memories that operators made
    allocated_bytes   their bytes
    peak_bytes        the most of those bytes alive between two operators; an operator's own scratch is not seen
    device_peak_bytes, device_allocations
                      the device's own count, scratch included, where it keeps one

The same code on the same version of PyTorch counts the same, run after run.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siirl.device.backend import Backend

COLLECTIVES = ("c10d", "_c10d_functional")
# Counter; PyTorch's statistic after the work; the one before it that is taken away.
DEVICE_COUNTERS = (
    ("device_allocations", "allocation.all.allocated", "allocation.all.allocated"),
    ("device_peak_bytes", "allocated_bytes.all.peak", "allocated_bytes.all.current"),
)


@dataclass(frozen=True)
class Counted:
    """Counters by name, and the calls of each operator."""

    counters: dict[str, int] = field(default_factory=dict)
    ops: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Counted) -> Counted:
        """The sum over workers."""
        return Counted(
            dict(Counter(self.counters) + Counter(other.counters)), dict(Counter(self.ops) + Counter(other.ops))
        )


def count(work: Callable[[], Any], backend: Backend) -> Counted:
    """Run ``work`` once and count. What it does only the first time has to be done before."""
    backend.synchronize()
    gc.collect()
    unified = backend.memory().unified
    before = {} if unified else torch.accelerator.memory_stats()
    backend.reset_peak_memory()
    gc.disable()  # when cycles are collected depends on what else the process has done
    try:
        with _Counting() as counting:
            work()
    finally:
        gc.enable()
    backend.synchronize()
    counters = counting.counters()
    after = {} if unified else torch.accelerator.memory_stats()
    for name, end, start in DEVICE_COUNTERS:
        if end in after:
            counters[name] = after[end] - before.get(start, 0)
    return Counted(counters, dict(sorted(counting.ops.items())))


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self._collective_bytes = self._allocations = self._allocated = self._alive = self._peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t.__torch_dispatch__ is not Tensor.__torch_dispatch__ for t in types):
            return NotImplemented  # a tensor made of tensors: its own operators follow, and are counted
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for tensor in given:
            self._notice(tensor, made=False)
        result = func(*args, **(kwargs or {}))
        self.ops[str(func)] += 1
        if func.namespace in COLLECTIVES:
            self._collective_bytes += sum(x.nbytes for x in given)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._notice(tensor, made=True)
        return result

    def counters(self) -> dict[str, int]:
        return {
            "op_calls": self.ops.total(),
            "collectives": sum(n for name, n in self.ops.items() if name.partition(".")[0] in COLLECTIVES),
            "collective_bytes": self._collective_bytes,
            "allocations": self._allocations,
            "allocated_bytes": self._allocated,
            "peak_bytes": self._peak,
        }

    def _notice(self, tensor: Tensor, made: bool) -> None:
        """Remember the tensor's memory; what no earlier operator has given or taken was made by this one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made else 0

        def forget(_: Any) -> None:
            self._alive -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        if made:
            self._allocations += 1
            self._allocated += size
            self._alive += size
            self._peak = max(self._peak, self._alive)


def total(parts: Iterable[Counted]) -> Counted:
    """The sum of what several workers counted."""
    return sum(parts, Counted())
