"""What counts as a regression, on documents whose numbers are chosen for it."""

from __future__ import annotations

from typing import Any

import pytest

from siirl.bench.compare import Comparison, compare

KEY = {"backend": "cpu", "device": "a CPU", "driver": "none", "torch": "2.13.0", "python": "3.11", "commit": "0"}


def document(
    seconds: float = 1.0,
    reference: float = 1.0,
    spread: float = 0.0,
    counters: dict[str, int] | None = None,
    ops: dict[str, int] | None = None,
    calls: int = 1,
    **key: str,
) -> dict[str, Any]:
    """A run of one benchmark; ``spread``: how far the thirds of its pairs are from its ratio."""
    ratio = seconds / reference
    info = {
        "ratio": ratio,
        "ratio_low": ratio * (1 - spread),
        "ratio_high": ratio * (1 + spread),
        "calls_per_round": calls,
        "reference": {"min": reference * calls},
        "counters": {"op_calls": 5} if counters is None else counters,
        "ops": {"mm": 5} if ops is None else ops,
    }
    stats = {"min": seconds * calls, "median": 1.2 * seconds * calls}
    benchmark = {"group": "suite", "name": "work", "fullname": "suite: work", "extra_info": info, "stats": stats}
    return {"siirl": {"key": KEY | key}, "benchmarks": [benchmark]}


def judge(now: dict[str, Any], before: dict[str, Any]) -> Comparison:
    return compare(now, before, 0.10, lambda benchmark: True)


def test_a_ratio_may_grow_by_the_tolerance() -> None:
    assert judge(document(1.09, 1.0), document()).regressions == []
    (sentence,) = judge(document(1.11, 1.0), document()).regressions
    assert sentence == "suite: work takes 1.11x of the reference's time, 1.00x before: 11 % more"


def test_a_ratio_counts_only_beyond_what_its_own_pairs_differ_by() -> None:
    doubtful = judge(document(1.3, 1.0, spread=0.15), document(spread=0.15))
    assert doubtful.suspects == ["suite: work"]
    assert doubtful.regressions == []
    assert judge(document(1.3, 1.0, spread=0.05), document(spread=0.05)).regressions != []


@pytest.mark.parametrize("machine", [0.5, 0.94, 1.06, 3.0])
def test_on_a_machine_that_is_slower_or_faster_times_are_not_judged(machine: float) -> None:
    found = judge(document(machine * 1.08, machine), document())
    assert found.regressions == []
    assert found.unjudged == 1


def test_on_a_machine_as_fast_as_before_times_are_judged() -> None:
    """The ratio is within the tolerance, the time is not: the reference has become slower by what is in both."""
    (sentence,) = judge(document(1.12, 1.04), document()).regressions
    assert sentence == "suite: work takes 1.12 s, 1 s before: 12 % more, while its reference takes 1.04x of its time"


def test_times_are_those_of_one_call() -> None:
    assert judge(document(calls=7), document(calls=2)).regressions == []


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        ({"counters": {"op_calls": 6}, "ops": {"mm": 6}}, "suite: work: op_calls 5 → 6 (mm 5 → 6)"),
        ({"counters": {"op_calls": 4}, "ops": {"mm": 4}}, "suite: work: op_calls 5 → 4 (mm 5 → 4)"),
        ({"ops": {"mm": 4, "bmm": 1}}, "suite: work: other operators (mm 5 → 4, bmm 0 → 1)"),
        ({"counters": {"op_calls": 5, "moved_bytes": 8}}, "suite: work: moved_bytes 0 → 8"),
    ],
)
def test_every_difference_of_a_counter_is_a_regression(now: dict[str, Any], sentence: str) -> None:
    assert judge(document(**now), document()).regressions == [sentence]


def test_counters_are_compared_over_devices_and_builds_and_times_are_not() -> None:
    changed = {"counters": {"op_calls": 6}}
    found = judge(document(9.0, device="another", torch="2.13.0+cpu", **changed), document())
    assert found.regressions == ["suite: work: op_calls 5 → 6"]
    assert found.notes == [
        "only counters are compared, no times: torch is 2.13.0+cpu here and 2.13.0 there; "
        "device is another here and a CPU there"
    ]


def test_commits_are_what_is_compared() -> None:
    found = judge(document(2.0, commit="1"), document())
    assert found.notes == []
    assert len(found.regressions) == 1


@pytest.mark.parametrize("where", ["now", "before"])
def test_where_processes_take_turns_on_the_cores_counters_are_judged_and_no_times(where: str) -> None:
    slow, before = document(2.0, counters={"op_calls": 6}), document()
    (slow if where == "now" else before)["benchmarks"][0]["extra_info"]["crowded"] = True
    found = judge(slow, before)
    assert (found.crowded, found.times, found.suspects) == (1, [], [])
    assert found.counters == ["suite: work: op_calls 5 → 6"]
    assert judge(document(2.0), document()).times != []
