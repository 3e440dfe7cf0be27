"""A run against a record: counters exactly, ratios and times within a tolerance, each where the keys allow it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from siirl.bench.key import COUNTERS_NEED, TIMES_NEED, Key
from siirl.bench.table import per_call, time_text

Benchmark = Mapping[str, Any]

# So many of the operators whose calls changed are named.
NAMED_OPS = 3


@dataclass
class Comparison:
    """What changed.

    Attributes:
        counters, times: a sentence for each regression.
        suspects: full names of benchmarks whose ratio or time has grown, by its size beyond the tolerance; `times` has
            only those where the pairs agree on it.
        gone: full names of benchmarks that the record has and the run does not.
        new: full names of those that only the run has.
        compared: benchmarks that both have.
        crowded: those among them in which processes took turns on the cores, in the run or in the record: of them
            counters were compared, and no times.
        unjudged: those among them whose reference ran at another speed than in the record, so that the machine and not
            the code may have changed: their absolute times were left alone.
        notes: what was not compared, and why.
    """

    counters: list[str] = field(default_factory=list)
    times: list[str] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    compared: int = 0
    crowded: int = 0
    unjudged: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def regressions(self) -> list[str]:
        return [*self.counters, *self.times, *(f"{name} is no longer measured" for name in self.gone)]


def compare(
    run: Mapping[str, Any], record: Mapping[str, Any], tolerance: float, wanted: Callable[[Benchmark], bool]
) -> Comparison:
    """Compare two documents in pytest-benchmark's JSON.

    Args:
        run, record: now, and before.
        tolerance: by which share a ratio or a time may grow.
        wanted: says of a benchmark of the record whether the run was asked to measure it.
    """
    here, there = (Key(**document["siirl"]["key"]) for document in (run, record))
    found = Comparison()
    if different := here.differences(there, COUNTERS_NEED):
        found.notes.append(f"nothing is compared: {'; '.join(different)}")
        return found
    judge_times = not (different := here.differences(there, TIMES_NEED))
    if different:
        found.notes.append(f"only counters are compared, no times: {'; '.join(different)}")
    before, now = _by_name(filter(wanted, record["benchmarks"])), _by_name(run["benchmarks"])
    found.new = [name for name in now if name not in before]
    found.gone = [name for name in before if name not in now and judge_times]
    for name in (name for name in before if name in now):
        found.compared += 1
        if sentence := _counters(now[name], before[name]):
            found.counters.append(f"{name}: {sentence}")
        if judge_times:
            _times(found, name, now[name], before[name], tolerance)
    return found


def _by_name(benchmarks: Iterable[Benchmark]) -> dict[str, Benchmark]:
    return {benchmark["fullname"]: benchmark for benchmark in benchmarks}


def _counters(now: Benchmark, before: Benchmark) -> str:
    changes = _changes(now["extra_info"]["counters"], before["extra_info"]["counters"])
    ops = _changes(now["extra_info"]["ops"], before["extra_info"]["ops"])
    named = f" ({', '.join(ops[:NAMED_OPS])}{', …' if len(ops) > NAMED_OPS else ''})" if ops else ""
    return f"{', '.join(changes) or 'other operators'}{named}" if changes or ops else ""


def _changes(now: Mapping[str, int], before: Mapping[str, int]) -> list[str]:
    """``op_calls 12 → 14`` for each number that is not what it was."""
    names = [*before, *(name for name in now if name not in before)]
    return [f"{n} {before.get(n, 0)} → {now.get(n, 0)}" for n in names if before.get(n, 0) != now.get(n, 0)]


def _times(found: Comparison, name: str, now: Benchmark, before: Benchmark, tolerance: float) -> None:
    """Judge the ratio; where the reference shows that the machine is as fast as it was, the time as well.

    The ratio has grown if the least that a third of the pairs shows is above the most that a third showed before.
    """
    if now["extra_info"].get("crowded") or before["extra_info"].get("crowded"):
        found.crowded += 1
        return
    ratio, ratio_before = now["extra_info"]["ratio"], before["extra_info"]["ratio"]
    growth = now["extra_info"]["ratio_low"] / before["extra_info"]["ratio_high"]
    if ratio > ratio_before * (1 + tolerance):
        found.suspects.append(name)
        if growth > 1 + tolerance:
            share = f"{ratio:.2f}x of the reference's time, {ratio_before:.2f}x before"
            found.times.append(f"{name} takes {share}: {_percent(ratio, ratio_before)}")
        return
    machine = _reference(now) / _reference(before)
    if not 1 - tolerance / 2 <= machine <= 1 + tolerance / 2:
        found.unjudged += 1
        return
    fastest, fastest_before = per_call(now), per_call(before)
    if growth > 1 and all(per_call(now, s) > per_call(before, s) * (1 + tolerance) for s in ("min", "median")):
        found.suspects.append(name)
        change = f"{time_text(fastest)}, {time_text(fastest_before)} before: {_percent(fastest, fastest_before)}"
        found.times.append(f"{name} takes {change}, while its reference takes {machine:.2f}x of its time")


def _reference(benchmark: Benchmark) -> float:
    """Seconds of one call of the reference, at its fastest."""
    info = benchmark["extra_info"]
    return info["reference"]["min"] / info["calls_per_round"]


def _percent(now: float, before: float) -> str:
    return f"{100 * (now / before - 1):.0f} % more"
