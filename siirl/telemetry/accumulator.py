"""A step's metrics: each worker adds what it saw, one small reduction makes them global."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from siirl.errors import SiirlError

if TYPE_CHECKING:
    from siirl.device.collectives import Collectives

# Numbers a kind adds up over workers; extremes travel in the second vector, one number each.
_SUMMED = {"mean": 2, "sum": 1, "std": 3, "max": 0, "min": 0}


class StepMetrics:
    """Accumulates one worker's share of a step's metrics.

    A name may be added to many times, always as the same kind. Every worker names the same metrics in a step; one that
    saw nothing of a metric adds it with weight 0, count 0 or None. Only workers with different roles may name different
    ones.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}
        self._numbers: dict[str, list[float]] = {}

    def mean(self, name: str, total: float, weight: float) -> None:
        """Add to a weighted mean: `total` is the sum of value x weight, `weight` the sum of the weights."""
        self._add(name, "mean", total, weight)

    def sum(self, name: str, value: float) -> None:
        """Add to a sum."""
        self._add(name, "sum", value)

    def std(self, name: str, total: float, total_of_squares: float, count: float) -> None:
        """Add to a population standard deviation, sqrt(E[x^2] - E[x]^2): sums over `count` values.

        Deviations below about 1e-7 of the values' size are lost to rounding.
        """
        self._add(name, "std", total, total_of_squares, count)

    def max(self, name: str, value: float | None) -> None:
        """Add to a maximum."""
        self._extreme(name, "max", -math.inf if value is None else value)

    def min(self, name: str, value: float | None) -> None:
        """Add to a minimum."""
        self._extreme(name, "min", -math.inf if value is None else -value)

    def add(self, other: StepMetrics) -> None:
        """Add what another one of this worker holds."""
        for name, kind in other._kinds.items():
            theirs = other._numbers[name]
            if _SUMMED[kind]:
                self._add(name, kind, *theirs)
            else:
                self._extreme(name, kind, theirs[0])

    def name(self, other: StepMetrics) -> None:
        """Name what another has, without its values: they are another worker's to add."""
        for name, kind in other._kinds.items():
            self._held(name, kind, [0.0] * _SUMMED[kind] or [-math.inf])

    def state_dict(self) -> dict[str, Any]:
        """What was added so far, as JSON."""
        return {name: [kind, *self._numbers[name]] for name, kind in self._kinds.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StepMetrics:
        """The inverse of :meth:`state_dict`."""
        made = cls()
        for name, (kind, *numbers) in state.items():
            made._kinds[name], made._numbers[name] = kind, list(numbers)
        return made

    def reduce(self, collectives: Collectives, *, roles: bool = False) -> dict[str, float]:
        """Reduce over all workers and start the next step.

        Args:
            collectives: of all workers.
            roles: workers may name different metrics; a name counts where it is named.

        A metric that no worker has a value for is absent. A NaN of any worker makes its mean, sum or deviation NaN, and
        its maximum or minimum infinite.

        Raises:
            SiirlError: the workers name different metrics.
        """
        if roles:
            self._add_missing(collectives)
        names = sorted(self._kinds)
        _check_agreement([f"{name} ({self._kinds[name]})" for name in names], collectives)
        summed = [name for name in names if _SUMMED[self._kinds[name]]]
        extremes = [name for name in names if not _SUMMED[self._kinds[name]]]
        totals = _all_reduce([number for name in summed for number in self._numbers[name]], "sum", collectives)
        highest = _all_reduce([self._numbers[name][0] for name in extremes], "max", collectives)
        values: dict[str, float | None] = {}
        at = 0
        for name in summed:
            kind = self._kinds[name]
            values[name] = _finish(kind, totals[at : at + _SUMMED[kind]])
            at += _SUMMED[kind]
        for name, top in zip(extremes, highest, strict=True):
            sign = 1 if self._kinds[name] == "max" else -1
            values[name] = None if top == -math.inf else sign * top
        self._kinds.clear()
        self._numbers.clear()
        return {name: value for name in names if (value := values[name]) is not None}

    def _add_missing(self, collectives: Collectives) -> None:
        for theirs in collectives.all_gather_bytes(json.dumps(self._kinds).encode()):
            for name, kind in json.loads(theirs).items():
                self._held(name, kind, [0.0] * _SUMMED[kind] or [-math.inf])

    def _add(self, name: str, kind: str, *numbers: float) -> None:
        held = self._held(name, kind, [0.0] * len(numbers))
        for at, number in enumerate(numbers):
            held[at] += float(number)

    def _extreme(self, name: str, kind: str, value: float) -> None:
        held = self._held(name, kind, [-math.inf])
        # A maximum over workers may lose a NaN; infinity it cannot lose.
        held[0] = max(held[0], math.inf if math.isnan(value) else float(value))

    def _held(self, name: str, kind: str, start: list[float]) -> list[float]:
        known = self._kinds.setdefault(name, kind)
        if known != kind:
            raise ValueError(f"the metric {name} is a {known} and cannot also be a {kind}")
        return self._numbers.setdefault(name, start)


def _finish(kind: str, totals: list[float]) -> float | None:
    if kind == "sum":
        return totals[0]
    if kind == "mean":
        total, weight = totals
        return total / weight if weight else None
    total, squares, count = totals
    if not count:
        return None
    variance = squares / count - (total / count) ** 2
    return math.sqrt(variance) if not variance < 0 else 0.0  # below 0 only by rounding


def _all_reduce(numbers: list[float], op: Literal["sum", "max"], collectives: Collectives) -> list[float]:
    if not numbers:
        return []
    return collectives.all_reduce(torch.tensor(numbers, dtype=torch.float64), op).tolist()


def _check_agreement(names: list[str], collectives: Collectives) -> None:
    """Check that all workers hold these names before a vector's layout is relied on."""
    if collectives.size == 1:
        return
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).digest()
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True), len(names)], dtype=torch.int64)
    if all(torch.equal(theirs, mine) for theirs in collectives.all_gather_ints(mine)):
        return
    # All workers saw the same differing digests, so all of them come here.
    gathered = collectives.all_gather_bytes("\n".join(names).encode())
    held = [set(theirs.decode().split("\n")) - {""} for theirs in gathered]
    partial = sorted(set[str]().union(*held) - held[0].intersection(*held))
    clauses = [
        f"{name} is missing on worker {', '.join(str(rank) for rank, own in enumerate(held) if name not in own)}"
        for name in partial
    ]
    raise SiirlError(f"the workers name different metrics in one step: {'; '.join(clauses)}")
