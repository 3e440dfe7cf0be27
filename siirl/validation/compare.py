"""What changed between two runs: results, versions, kernels, and numbers that grew or shrank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from siirl.validation.report import Report, Result

# A measured error that changes by less says nothing: another order of the same sums does as much.
NOTABLE = 2.0


@dataclass(frozen=True)
class Comparison:
    """The differences of a second run from a first, as lines, and the checks that only the second fails."""

    lines: tuple[str, ...]
    regressions: tuple[Result, ...]


def compare(first: Report, second: Report) -> Comparison:
    """Compare two runs, of two devices or of two versions on one."""
    before, after = ({result.id: result for result in report.results} for report in (first, second))
    regressions = tuple(
        result
        for check_id, result in after.items()
        if result.status == "failed" and (check_id not in before or before[check_id].status != "failed")
    )
    lines = [
        *_facts("device", {"name": first.device, "depth": first.depth}, {"name": second.device, "depth": second.depth}),
        *_facts("version", first.versions, second.versions),
        *_facts("kernel", first.kernels["bound"], second.kernels["bound"]),
        *_facts("capability", first.facts, second.facts),
        *_statuses(before, after),
        *_measurements(before, after),
    ]
    return Comparison(tuple(lines), regressions)


def _facts(kind: str, first: Mapping[str, object], second: Mapping[str, object]) -> Iterator[str]:
    for name in sorted({*first, *second}):
        if first.get(name) != second.get(name):
            yield f"{kind} {name}: {_shown(first, name)} -> {_shown(second, name)}"


def _shown(values: Mapping[str, object], name: str) -> str:
    return str(values[name]) if name in values else "none"


def _statuses(before: dict[str, Result], after: dict[str, Result]) -> Iterator[str]:
    for check_id in sorted({*before, *after}):
        old = before[check_id].status if check_id in before else "not asked"
        new = after[check_id].status if check_id in after else "not asked"
        if old != new:
            sentence = after[check_id].sentence if check_id in after else ""
            yield f"{check_id}: {old} -> {new}" + (f" ({sentence})" if sentence else "")


def _measurements(before: dict[str, Result], after: dict[str, Result]) -> Iterator[str]:
    for check_id in sorted(before.keys() & after.keys()):
        old = {each.name: each.value for each in before[check_id].measurements}
        for each in after[check_id].measurements:
            if each.limit is not None and each.name in old and _notable(old[each.name], each.value, each.limit):
                yield f"{check_id}: {each.name}: {old[each.name]:.3g} -> {each.value:.3g} (limit {each.limit:.3g})"


def _notable(old: float, new: float, limit: float) -> bool:
    """By a factor of two, and by a share of the limit that matters."""
    if math.isnan(old) or math.isnan(new):
        return math.isnan(old) != math.isnan(new)
    low, high = sorted((old, new))
    return high > NOTABLE * low and high > 0.05 * limit
