"""Two ways to record on a host, for engines that record decode steps; both have the signature of `Backend.capture`.

`Tape` is what graphs of devices are: it keeps the operators of one call with their tensors and numbers and does them
again on the same memory, without the Python that called them. `call_again` only calls the work again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siirl.device.backend import Captured

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class Tape(TorchDispatchMode):
    """Records while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        assert func.name().split(".")[0] not in WAITS, f"the host waits for the device: {func.name()}"
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, tree_leaves(out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, held in self._calls:
            for old, new in zip(held, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def on_tape(work: Callable[[], Any], warm_ups: int = 3, beside: Captured[Any] | None = None) -> Captured[Any]:
    for _ in range(warm_ups):
        work()
    tape = Tape()
    with tape:
        result = work()
    return Captured(tape.replay, result)


def call_again(work: Callable[[], Any], warm_ups: int = 3, beside: Captured[Any] | None = None) -> Captured[Any]:
    result = work()

    def replay() -> None:
        result.copy_(work())

    return Captured(replay, result)


class Counting:
    """Counts what `capture` records and how often it is replayed; `beside` those that share another's memory.

    With `exact`, results have to equal those of launched operators bit for bit.
    """

    def __init__(self, capture: Callable[..., Captured[Any]], exact: bool = False) -> None:
        self.recorded = self.replayed = self.beside = 0
        self.exact = exact
        self._capture = capture

    def __call__(
        self, work: Callable[[], Any], warm_ups: int = 3, beside: Captured[Any] | None = None
    ) -> Captured[Any]:
        made = self._capture(work, warm_ups, beside)
        self.recorded += 1
        self.beside += beside is not None

        def replay() -> None:
            self.replayed += 1
            made.replay()

        return Captured(replay, made.result, made.pool)


def broken(work: Callable[[], Any], warm_ups: int = 3, beside: Captured[Any] | None = None) -> Captured[Any]:
    """Replays nothing, which tests must notice."""
    return Captured(lambda: None, work())
