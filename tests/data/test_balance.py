"""Samples are dealt evenly, in whole groups and in every mini-batch, alike on all workers, and mostly left at home."""

from __future__ import annotations

import heapq
import time
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siirl.data.balance import assign

cost_lists = st.lists(st.integers(0, 40), min_size=1, max_size=40)


def ints(values) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)


def loads(costs, targets, workers: int) -> list[int]:
    return [sum(c for c, t in zip(costs, targets, strict=True) if t == worker) for worker in range(workers)]


def best(costs, workers: int) -> int:
    """The smallest possible largest share, by trying every assignment."""
    return min(max(loads(costs, targets, workers)) for targets in product(range(workers), repeat=len(costs)))


def greedy(costs, workers: int) -> int:
    """The largest share of longest-first, written the slow way."""
    shares = [0] * workers
    for cost in sorted(costs, reverse=True):
        shares[shares.index(min(shares))] += cost
    return max(shares)


def response_lengths(samples: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(6, 1, samples), 1, 8192).astype(np.int64)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=7), st.integers(1, 3), st.booleans())
def test_the_largest_share_keeps_grahams_bound(costs, workers, at_home):
    """R. L. Graham 1969, theorem 2: longest first is within 4/3 - 1/(3 m) of the best."""
    home = ints(range(len(costs))) % workers if at_home else None
    largest = max(loads(costs, assign(ints(costs), workers, home=home), workers))
    bound = (Fraction(4, 3) - Fraction(1, 3 * workers)) * best(costs, workers)
    assert largest <= max(bound, Fraction(101, 100) * best(costs, workers))


@pytest.mark.parametrize(
    ("costs", "workers", "optimum", "reached"),
    [
        ([5, 5, 4, 4, 3, 3, 3], 3, 9, 10),  # Graham's worst case of longest first, which ends at 11
        ([8, 7, 6, 5, 4], 2, 15, 16),  # Karmarkar and Karp's example; longest first ends at 17
        ([10, 1, 1, 1], 2, 10, 10),
        ([7], 3, 7, 7),
        ([4] * 9, 4, 12, 12),
    ],
)
def test_cases_worked_by_hand(costs, workers, optimum, reached):
    assert best(costs, workers) == optimum
    assert max(loads(costs, assign(ints(costs), workers), workers)) == reached <= greedy(costs, workers)


@settings(deadline=None)
@given(cost_lists, st.integers(1, 6))
def test_no_result_is_worse_than_longest_first(costs, workers):
    assert max(loads(costs, assign(ints(costs), workers), workers)) <= greedy(costs, workers)


@pytest.mark.parametrize("workers", [2, 8, 64])
def test_shares_of_a_real_step_are_even_and_most_rows_stay(workers):
    costs = response_lengths(4096)
    home = np.arange(4096) * workers // 4096
    before = loads(costs, home, workers)
    targets = assign(costs, workers, home=home)
    mean = costs.sum() / workers
    assert max(loads(costs, targets, workers)) <= 1.01 * mean
    # Only the excess over the mean has to leave a worker; one row each may be cut off on top of it.
    excess = sum(max(0, load - mean) for load in before)
    assert costs[targets != home].sum() <= excess + workers * costs.max()
    assert (targets == home).mean() > 0.75


def test_rows_that_are_even_already_stay():
    home = ints([0, 1, 2, 3] * 16)
    assert assign(np.full(64, 500), 4, home=home).tolist() == home.tolist()


def test_everything_on_one_worker_is_spread():
    costs = response_lengths(512)
    shares = loads(costs, assign(costs, 4, home=np.zeros(512, np.int64)), 4)
    assert max(shares) <= 1.01 * costs.sum() / 4


def test_a_partition_found_anew_lands_near_its_rows():
    """Two rows cannot be balanced by leaving rows at home; the shares still go where their rows are."""
    costs, home = ints([100, 3, 90, 2, 80, 1]), ints([2, 2, 0, 0, 1, 1])
    targets = assign(costs, 3, home=home)
    assert targets[[0, 2, 4]].tolist() == [2, 0, 1]


@settings(deadline=None)
@given(cost_lists, st.integers(1, 6), st.data())
def test_home_costs_no_balance(costs, workers, data):
    home = ints(data.draw(st.lists(st.integers(0, workers - 1), min_size=len(costs), max_size=len(costs))))
    least = max(-(-sum(costs) // workers), max(costs))
    largest = max(loads(costs, assign(ints(costs), workers, home=home), workers))
    assert largest <= max(greedy(costs, workers), Fraction(101, 100) * max(least, best_of_crowd(costs, workers)))


def best_of_crowd(costs, workers: int) -> int:
    """By the pigeonhole principle one worker has ceil(n / m) rows, at least the cheapest ones."""
    return sum(sorted(costs)[: -(-len(costs) // workers)])


@settings(deadline=None)
@given(st.data(), st.integers(1, 5), st.booleans())
def test_groups_stay_whole_and_every_worker_gets_one(data, workers, at_home):
    groups = ints(data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=40)))
    costs = ints(data.draw(st.lists(st.integers(0, 9), min_size=len(groups), max_size=len(groups))))
    home = np.arange(len(groups)) % workers if at_home else None
    targets = assign(costs, workers, groups=groups, home=home)
    assert all(len(set(targets[groups == group].tolist())) == 1 for group in set(groups.tolist()))
    if len(set(groups.tolist())) >= workers:
        assert set(targets.tolist()) == set(range(workers))


@settings(deadline=None)
@given(st.data(), st.integers(1, 5), st.booleans())
def test_every_stratum_is_balanced_and_so_is_their_sum(data, workers, at_home):
    costs = data.draw(cost_lists)
    strata = ints(data.draw(st.lists(st.integers(0, 3), min_size=len(costs), max_size=len(costs))))
    home = np.arange(len(costs)) % workers if at_home else None
    targets = assign(ints(costs), workers, strata=strata, home=home)
    widest = 0
    for stratum in set(strata.tolist()):
        rows = np.flatnonzero(strata == stratum)
        inside = ints(costs)[rows].tolist()
        shares = loads(inside, targets[rows], workers)
        widest = max(widest, max(shares) - min(shares))
        least = max(-(-sum(inside) // workers), max(inside), best_of_crowd(inside, workers))
        assert max(shares) <= max(greedy(inside, workers), Fraction(101, 100) * least)
        if len(rows) >= workers:
            assert set(targets[rows].tolist()) == set(range(workers))
    total = loads(costs, targets, workers)
    # Adding heavy shares to light sums never spreads the sums wider than the widest stratum.
    assert max(total) - min(total) <= widest or max(total) <= Fraction(101, 100) * (sum(costs) // workers)


def test_the_extra_row_of_each_mini_batch_goes_to_another_worker():
    strata = np.repeat(np.arange(4), 5)
    for home in (None, np.arange(20) % 4):
        targets = assign(np.full(20, 10), 4, strata=strata, home=home)
        assert loads([10] * 20, targets, 4) == [50, 50, 50, 50]


def test_a_group_in_two_strata_is_refused():
    with pytest.raises(ValueError, match="two strata"):
        assign(ints([1, 1]), 2, groups=ints([7, 7]), strata=ints([0, 1]))


@settings(deadline=None)
@given(cost_lists, st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_order_of_contributions_does_not_matter_once_sorted_by_id(costs, workers, random):
    """As the databuffer uses it: workers contribute in any order, all sort by sample id."""
    rows = list(enumerate(costs))
    random.shuffle(rows)
    shuffled = [cost for _, cost in sorted(rows)]
    assert assign(ints(shuffled), workers).tolist() == assign(ints(costs), workers).tolist()


@settings(deadline=None)
@given(cost_lists, st.integers(1, 5), st.randoms(use_true_random=False))
def test_groups_are_told_apart_by_number_whatever_the_order_of_rows(costs, workers, random):
    groups = ints(index // 3 for index in range(len(costs)))
    order = list(range(len(costs)))
    random.shuffle(order)
    sorted_targets = assign(ints(costs), workers, groups=groups)
    shuffled_targets = assign(ints(costs)[order], workers, groups=groups[order])
    assert shuffled_targets.tolist() == sorted_targets[order].tolist()


def test_more_workers_than_rows_and_no_rows():
    assert sorted(assign(ints([5, 5]), 4).tolist()) == [0, 1]
    assert assign(ints([]), 4, home=ints([])).tolist() == []


def test_rows_of_no_cost_are_spread_too():
    assert sorted(assign(np.zeros(4, np.int64), 4).tolist()) == [0, 1, 2, 3]
    assert sorted(assign(np.zeros(4, np.int64), 4, home=np.zeros(4, np.int64)).tolist()) == [0, 1, 2, 3]


def test_differencing_leaves_no_worker_empty():
    for costs in product([0, 1, 5], repeat=5):
        assert set(assign(ints(costs), 4).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"workers": 0}, "at least one worker"),
        ({"costs": ints([1, -2])}, "cannot cost -2"),
        ({"home": ints([0, 2])}, "outside 0 .. 1"),
        ({"strata": ints([0])}, "strata has 1 samples, costs has 2"),
    ],
)
def test_wrong_arguments_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        assign(**{"costs": ints([1, 2]), "workers": 2, **arguments})


def test_one_giant_row_among_many_workers_is_alone():
    costs = np.concatenate([response_lengths(2048), ints([10**7])])
    targets = assign(costs, 1024)
    assert (targets == targets[-1]).sum() == 1


def karmarkar_karp(costs: list[int], workers: int) -> int:
    """The largest share by the differencing method (Karmarkar and Karp 1982), sums only."""
    heap = [(-cost, number, [cost] + [0] * (workers - 1)) for number, cost in enumerate(costs)]
    heapq.heapify(heap)
    for number in range(len(costs), 2 * len(costs) - 1):
        first, second = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        joined = sorted((a + b for a, b in zip(first, reversed(second), strict=True)), reverse=True)
        heapq.heappush(heap, (joined[-1] - joined[0], number, joined))
    return heap[0][2][0]


LARGE = {
    "log-normal": lambda n: response_lengths(n),
    "with a prompt": lambda n: 1024 + np.minimum(response_lengths(n), 1024),
    "heavy tail": lambda n: np.clip(np.random.default_rng(1).pareto(1.1, n) * 200, 1, 200_000).astype(np.int64),
    "quadratic": lambda n: response_lengths(n) ** 2,
    "alike": lambda n: np.full(n, 7),
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize(("samples", "workers"), [(4096, 64), (6000, 128)])
def test_many_samples_are_dealt_as_evenly_as_by_differencing(kind: str, samples: int, workers: int) -> None:
    costs = LARGE[kind](samples)
    largest = np.bincount(assign(costs, workers), costs).max()
    assert largest <= 1.001 * karmarkar_karp(costs.tolist(), workers)


@pytest.mark.parametrize("kind", LARGE)
def test_equal_counts_are_kept_and_still_balanced(kind: str) -> None:
    costs = LARGE[kind](5000)
    targets = assign(costs, 64, equal=True)
    counts = np.bincount(targets, minlength=64)
    assert counts.max() - counts.min() <= 1
    if kind in ("log-normal", "with a prompt"):
        assert np.bincount(targets, costs).max() <= 1.02 * costs.sum() / 64
    small = np.bincount(assign(costs[:37], 4, equal=True), minlength=4)
    assert sorted(small.tolist()) == [9, 9, 9, 10]


def test_a_hundred_thousand_samples_take_milliseconds() -> None:
    costs, home = response_lengths(100_000), np.arange(100_000) * 1024 // 100_000
    for keywords in ({}, {"home": home}):
        seconds = []
        for _ in range(10):
            begun = time.thread_time()
            targets = assign(costs, 1024, **keywords)
            seconds.append(time.thread_time() - begun)
        assert min(seconds) < 0.04  # 5 to 10 ms on an idle core; a loop over the samples takes 100
        assert np.bincount(targets, costs).max() <= 1.01 * costs.sum() / 1024


def test_samples_held_by_no_worker_go_where_there_is_room() -> None:
    costs = response_lengths(300)
    home = np.where(np.arange(300) % 3 == 0, -1, np.arange(300) % 4)
    targets = assign(costs, 4, home=home)
    assert max(loads(costs, targets, 4)) <= 1.01 * costs.sum() / 4
    assert (targets == home)[home >= 0].mean() > 0.9
    assert sorted(set(assign(costs, 4, home=np.full(300, -1)).tolist())) == [0, 1, 2, 3]
