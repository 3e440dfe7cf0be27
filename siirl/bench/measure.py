"""The measurement: candidate and reference in turns, so that both meet the same load.

On a shared machine the time of one piece of work varies by factors, and so does the ratio of medians. The ratio of
minima over pairs that alternate stays within a few per cent, most of all in the thread's own time.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from siirl.bench.counters import Counted, count
from siirl.device.backend import Backend

Work = Callable[[], Any]
Clock = Callable[[], float]

PAIRS = 60
# A round is made of as many calls as take this long: far above the clock's resolution, short enough to run undisturbed.
ROUND_SECONDS = 1e-3
PARTS = 3


@dataclass(frozen=True)
class Effort:
    """Rounds of each side: as many as the benchmark asks for, or ``pairs`` where given, times ``factor``."""

    pairs: int | None = None
    factor: int = 1

    def rounds(self, asked: int) -> int:
        return (self.pairs or asked) * self.factor


@dataclass(frozen=True)
class Rate:
    """What one call of the work gets done: ``Rate(4096, "tokens")`` is shown as tokens/s, ``bytes`` as GB/s."""

    amount: float
    unit: str


class Measure:
    """Measures one benchmark; pytest's fixture ``measure`` makes it.

    Args:
        benchmark: times the candidate's rounds and keeps their statistics.
        backend: the device is waited for at the end of each round.
        clock: seconds; the benchmark's as well.
        effort: how many rounds.
        done: called with the benchmark when it has been measured.
    """

    def __init__(
        self,
        benchmark: BenchmarkFixture,
        backend: Backend,
        clock: Clock,
        effort: Effort,
        done: Callable[[BenchmarkFixture], None],
    ) -> None:
        self._benchmark, self._backend, self._clock = benchmark, backend, clock
        self._effort, self._done = effort, done

    def __call__(
        self,
        candidate: Work,
        reference: Work,
        rate: Rate,
        *,
        against: str,
        pairs: int = PAIRS,
        counted: Callable[[], Counted] | None = None,
        crowded: bool = False,
    ) -> None:
        """Count the candidate's work, then time it in turns with the reference.

        Args:
            candidate, reference: do the same work, with all they need made before; both are called once to warm up.
            rate: of one call of the candidate.
            against: what the reference is, in a few words.
            pairs: rounds of each side.
            counted: counts in place of a call of the candidate in this process.
            crowded: more processes compute than there are cores, so that the times are the scheduler's too: shown only.
        """
        candidate()
        reference()
        found = counted() if counted else count(candidate, self._backend)
        calls = self._calls(candidate)
        other = _Other(self._round(reference, calls), self._clock)
        self._benchmark.pedantic(
            self._round(candidate, calls), setup=other.before, teardown=other.after, rounds=self._effort.rounds(pairs)
        )
        assert self._benchmark.stats is not None
        parts = _ratios(self._benchmark.stats.stats.data, other.seconds)
        self._benchmark.extra_info |= {
            "clock": self._clock.__name__,
            "calls_per_round": calls,
            "amount": rate.amount,
            "unit": rate.unit,
            "reference": {"what": against, "min": min(other.seconds), "rounds": len(other.seconds)},
            "ratio": self._benchmark.stats.stats.min / min(other.seconds),
            "ratio_low": min(parts),
            "ratio_high": max(parts),
            "crowded": crowded,
            "counters": found.counters,
            "ops": found.ops,
        }
        self._done(self._benchmark)

    def _round(self, work: Work, calls: int) -> Work:
        def run() -> None:
            for _ in range(calls):
                work()
            self._backend.synchronize()

        return run

    def _calls(self, work: Work) -> int:
        once = min(_seconds(self._round(work, 1), self._clock) for _ in range(3))
        return max(1, math.ceil(ROUND_SECONDS / once))


class _Other:
    """The reference's rounds: before every second round of the candidate, after the others."""

    def __init__(self, work: Work, clock: Clock) -> None:
        self._work, self._clock = work, clock
        self.seconds: list[float] = []
        self._turn = 0

    def before(self) -> None:
        self._turn += 1
        if self._turn % 2:
            self.seconds.append(_seconds(self._work, self._clock))

    def after(self) -> None:
        if self._turn % 2 == 0:
            self.seconds.append(_seconds(self._work, self._clock))


def _ratios(candidate: Sequence[float], reference: Sequence[float]) -> list[float]:
    """The ratio of minima of every third pair, three times: how far they differ is how far the ratio can be trusted."""
    parts = min(PARTS, len(candidate))
    return [min(candidate[i::parts]) / min(reference[i::parts]) for i in range(parts)]


def _seconds(work: Work, clock: Clock) -> float:
    gc.disable()  # as for the candidate
    try:
        start = clock()
        work()
        return clock() - start
    finally:
        gc.enable()
