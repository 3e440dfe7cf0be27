"""Checks: plain functions that are silent when a promise holds and raise `Broken` when it does not."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from siirl.validation.subject import Subject

Level = Literal["L0", "L1", "L2", "L3", "L4", "L5"]
LEVELS: tuple[Level, ...] = get_args(Level)
TITLES: dict[Level, str] = {
    "L0": "hygiene",
    "L1": "device semantics",
    "L2": "kernels",
    "L3": "collectives",
    "L4": "rollout engine",
    "L5": "end to end",
}
_MODULES: tuple[str, ...] = (
    "hygiene",
    "device_state",
    "device_training",
    "kernels",
    "collectives",
    "distributed_training",
    "rollout",
    "recorded_decoding",
    "weight_sync",
    "end_to_end",
)

Function = Callable[..., None]
Cases = Callable[["Subject"], Iterable[tuple[Any, ...]]]


class Broken(Exception):
    """A promise does not hold; the message says what was seen."""


class NotApplicable(Exception):
    """The device does not have what the check is about; the message says what."""


@dataclass(frozen=True)
class Check:
    """One promise.

    Attributes:
        name: of its function.
        level: where it belongs.
        title: the promise, as a statement.
        function: called with the subject and with one of the cases' values.
        cases: what else it is asked for, one result each; None where there is one case.
        full: too slow for a smoke run.
    """

    name: str
    level: Level
    title: str
    function: Function
    cases: Cases | None
    full: bool

    def expand(self, subject: Subject) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Ids, such as `L2.accuracy[rope-torch-float32]`, each with the values its function takes."""
        if self.cases is None:
            yield f"{self.level}.{self.name}", ()
            return
        for values in self.cases(subject):
            yield f"{self.level}.{self.name}[{'-'.join(map(str, values))}]", values


_checks: list[Check] = []


def check(level: Level, title: str, cases: Cases | None = None, full: bool = False) -> Callable[[Function], Function]:
    """Register a function as a check; see :class:`Check`."""

    def register(function: Function) -> Function:
        name = getattr(function, "__name__")  # noqa: B009 (a Callable has no name to the type checker)
        _checks.append(Check(name, level, title, function, cases, full))
        return function

    return register


def all_checks() -> list[Check]:
    """Every check, by level, within a level in the order of the files."""
    for module in _MODULES:
        importlib.import_module(f"siirl.validation.{module}")
    return sorted(_checks, key=lambda check: check.level)


def require(condition: bool, sentence: str) -> None:
    """Raise `Broken` unless the condition holds."""
    if not condition:
        raise Broken(sentence)
