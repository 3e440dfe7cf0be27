"""A step's metrics: the numbers of all samples, however they are spread over workers."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siirl.device.collectives import Collectives
from siirl.errors import SiirlError
from siirl.telemetry.accumulator import StepMetrics
from tests.device.world import run_world

# A variance is exact to about count x 2**-52 of the values' squares, its root to about 1e-7 of the values.
VALUES = [0.5, 1.25, -3.0, 8.0, 0.0, 2.5, 7.75]


def add_all(metrics: StepMetrics, values: list[float]) -> None:
    metrics.mean("mean", sum(values), len(values))
    metrics.std("std", sum(values), sum(value**2 for value in values), len(values))
    metrics.sum("sum", sum(values))
    metrics.max("max", max(values, default=None))
    metrics.min("min", min(values, default=None))


def expected(values: list[float]) -> dict[str, Any]:
    return {
        "mean": pytest.approx(statistics.fmean(values)),
        "std": pytest.approx(statistics.pstdev(values), abs=1e-7 * max(map(abs, values))),
        "sum": pytest.approx(sum(values)),
        "max": max(values),
        "min": min(values),
    }


# millionths: the squares of the smallest floats are 0, and with them the deviation
@given(parts=st.lists(st.lists(st.integers(-(10**9), 10**9).map(lambda n: n / 1e6)), min_size=1, max_size=5))
def test_adding_in_parts_gives_the_numbers_of_the_whole(parts: list[list[float]]) -> None:
    metrics = StepMetrics()
    for part in parts:
        add_all(metrics, part)
    whole = [value for part in parts for value in part]
    reduced = metrics.reduce(Collectives.single())
    assert reduced == (expected(whole) if whole else {"sum": 0.0})


def three_steps(rank: int, size: int) -> list[Any]:
    """A step of which worker 1 sees nothing, one that both share, and one in which the workers disagree on a name."""
    from siirl.device import current

    collectives = Collectives.init(current(), rank, size, timeout_s=60)
    metrics = StepMetrics()
    results: list[Any] = []
    for share in ((VALUES, []), (VALUES[:5], VALUES[5:])):
        if rank == 0:  # workers may name their metrics in any order
            metrics.sum("workers", 1)
        add_all(metrics, share[rank])
        metrics.mean("nobody", 0.0, 0)
        metrics.max("nothing", None)
        if rank == 1:
            metrics.sum("workers", 1)
        results.append(metrics.reduce(collectives))
    metrics.sum("both", 1)
    metrics.sum("reward/mean" if rank == 0 else "eval/reward_mean", 1)
    try:
        metrics.reduce(collectives)
    except SiirlError as error:
        results.append(str(error))
    collectives.close()
    return results


@pytest.fixture(scope="module")
def world() -> list[list[Any]]:
    return run_world(three_steps, 2)


def test_workers_agree_on_the_numbers_of_all_samples_however_they_are_shared(world: list[list[Any]]) -> None:
    for results in world:
        assert results[0] == results[1] == expected(VALUES) | {"workers": 2.0}


def test_workers_that_name_as_many_but_different_metrics_are_told_which(world: list[list[Any]]) -> None:
    for *_, message in world:
        assert "eval/reward_mean (sum) is missing on worker 0" in message
        assert "reward/mean (sum) is missing on worker 1" in message
        assert "both" not in message


def test_equal_values_have_no_deviation_in_spite_of_rounding() -> None:
    metrics = StepMetrics()
    for _ in range(1000):
        metrics.std("std", 0.1, 0.1**2, 1)
    assert metrics.reduce(Collectives.single())["std"] == pytest.approx(0.0, abs=1e-7)


def test_a_nan_is_not_hidden_by_a_maximum() -> None:
    for values in ([math.nan, 1.0], [1.0, math.nan]):
        metrics = StepMetrics()
        for value in values:
            metrics.max("max", value)
            metrics.min("min", value)
            metrics.mean("mean", value, 1)
        reduced = metrics.reduce(Collectives.single())
        assert math.isinf(reduced["max"])
        assert math.isinf(reduced["min"])
        assert math.isnan(reduced["mean"])


def test_a_name_has_one_kind() -> None:
    metrics = StepMetrics()
    metrics.mean("reward/mean", 1.0, 1)
    with pytest.raises(ValueError, match=r"reward/mean is a mean and cannot also be a max"):
        metrics.max("reward/mean", 1.0)


def test_what_one_holds_can_be_added_to_another() -> None:
    metrics, attempt = StepMetrics(), StepMetrics()
    for held, values in ((metrics, (1.0, 2.0)), (attempt, (6.0,))):
        for value in values:
            held.mean("mean", value, 1)
            held.sum("sum", value)
            held.std("std", value, value**2, 1)
            held.max("max", value)
            held.min("min", value)
    attempt.max("new", None)
    metrics.add(attempt)
    reduced = metrics.reduce(Collectives.single())
    assert reduced == pytest.approx({"mean": 3.0, "sum": 9.0, "std": (14 / 3) ** 0.5, "max": 6.0, "min": 1.0})
