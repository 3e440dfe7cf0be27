"""Back ends that compute on the host and break one promise of the second stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from siirl.device import Capabilities, CommSpec, MemoryInfo, RngState
from siirl.device.backend import Determinism
from siirl_cpu import CpuBackend


class StateNotRestored(CpuBackend):
    def set_rng_state(self, state: RngState) -> None:
        if state.backend != self.name:
            super().set_rng_state(state)


class ForeignStateTaken(CpuBackend):
    def set_rng_state(self, state: RngState) -> None:
        super().set_rng_state(replace(state, backend=self.name))


class GeneratorSharedWithTheHost(CpuBackend):
    """Says that the device has a generator of its own, and draws from the host's."""

    def _generator_states(self) -> dict[str, Tensor]:
        return {"host": torch.get_rng_state(), "device": torch.get_rng_state()}


class SeedIgnored(CpuBackend):
    def seed(self, n: int) -> None:
        pass


class MemoryNeverFalls(CpuBackend):
    highest = 0

    def memory(self) -> MemoryInfo:
        found = super().memory()
        self.highest = max(self.highest, found.allocated)
        return replace(found, allocated=self.highest)


class PeakIsOfNow(CpuBackend):
    def memory(self) -> MemoryInfo:
        found = super().memory()
        return replace(found, peak=found.allocated)


class EventsInDisorder(CpuBackend):
    def event(self, timing: bool = False) -> Any:
        event = super().event(timing)
        event.elapsed_time = lambda end: -type(event).elapsed_time(event, end)
        return event


class HalfNotClaimed(CpuBackend):
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), compute_dtypes=("float64", "float32", "bfloat16"))


class GraphsClaimed(CpuBackend):
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), graph_capture="training")

    def capture(self, work: Callable[[], Any], warm_ups: int = 3, beside: Any = None) -> Any:
        from siirl.device.backend import Captured

        result = work()
        return Captured(lambda: None, result)


class DeterminismNotSwitched(CpuBackend):
    def deterministic(self, level: Determinism) -> list[str]:
        return []


class CanonicalTransposes(CpuBackend):
    def to_canonical(self, t: Tensor) -> Tensor:
        return t.t().contiguous().view(t.shape) if t.dim() == 2 else t


class AutocastOfEverything(CpuBackend):
    def autocast(self, dtype: torch.dtype) -> Any:
        return super().autocast(dtype if dtype.is_floating_point else torch.float32)


class MoreDtypesMoved(CpuBackend):
    def communication(self) -> CommSpec:
        spec = super().communication()
        return replace(spec, dtypes={**spec.dtypes, "all_reduce": spec.dtypes["all_reduce"] | {"int16"}})


class _RefusesBfloat16(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.strip("_") == "matmul" and args[0].dtype == torch.bfloat16:
            raise RuntimeError("no kernel for bfloat16")
        return function(*args, **(kwargs or {}))


class _LosesBits(TorchFunctionMode):
    """Sums products in half precision."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.__name__.strip("_") == "matmul" and result.dtype == torch.float32:
            return result.bfloat16().float()
        return result


@contextmanager
def without_bfloat16() -> Iterator[None]:
    with _RefusesBfloat16():
        yield


@contextmanager
def products_in_half() -> Iterator[None]:
    with _LosesBits():
        yield
