"""Rounds, the choice of a step's groups and what is left over: pure functions, and a pool that loses nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siirl.data.batch import Batch
from siirl.data.dynamic_sampling import GroupPool, choose, round_size
from siirl.device.collectives import Collectives
from siirl.errors import SiirlError
from siirl.training.microbatch import mini_batch_index
from tests.data.world import GROUP, make_rows

ALONE = Collectives.single()


def groups_of(rows: Batch) -> list[int]:
    return rows.dense("group_id").unique().tolist() if len(rows) else []


def rows_of(groups: list[int]) -> Batch:
    return make_rows([group * GROUP + i for group in groups for i in range(GROUP)])


@pytest.mark.parametrize(
    ("held", "wanted", "oversample", "prompts"),
    [(0, 8, 1.0, 8), (0, 8, 1.5, 12), (5, 8, 1.5, 5), (7, 8, 1.0, 1), (8, 8, 3.0, 0), (11, 8, 3.0, 0)],
)
def test_a_round_generates_what_is_missing_and_so_much_more(held, wanted, oversample, prompts) -> None:
    assert round_size(held, wanted, oversample) == prompts


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=40), st.integers(1, 24))
def test_the_oldest_groups_are_chosen_in_whatever_order_they_are_told(held: list[int], wanted: int) -> None:
    groups, slots = choose(np.array(held, np.int64), wanted)
    assert groups.tolist() == sorted(held)[:wanted]
    assert len(set(slots.tolist())) == len(slots)
    assert all(0 <= slot < wanted for slot in slots)
    if len(held) >= wanted:
        assert slots.tolist() == list(range(wanted))
    for minis in (n for n in range(1, wanted + 1) if wanted % n == 0 and n <= len(groups)):
        counts = np.bincount(mini_batch_index(torch.from_numpy(slots), wanted, minis).numpy(), minlength=minis)
        assert counts.max() - counts.min() <= 1, "a short step is short in every mini-batch"


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 6),
    st.sampled_from([1.0, 1.25, 2.0, 5.0]),
    st.integers(1, 3),
    st.lists(st.floats(0, 1), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_a_pool_trains_on_each_group_once_and_holds_no_more_than_a_rounds_surplus(
    wanted, oversample, max_rounds, rates, random
) -> None:
    pool, position = GroupPool(wanted, oversample, max_rounds), 0
    passed, trained = [], []
    for rate in rates:
        pool.begin()
        step = None
        while step is None:
            fresh = range(position, position + pool.next_prompts(ALONE))
            position = fresh.stop
            kept = [group for group in fresh if random.random() < rate]
            passed += kept
            step = pool.add(rows_of(kept), ALONE)
        assert len(groups_of(step)) == wanted or pool.rounds == max_rounds
        assert pool.rounds <= max_rounds
        trained += groups_of(step)
        content = rows_of(groups_of(step)).drop(["slot"])
        assert step.drop(["slot"]).equals(content), "whole groups, with their columns as they were"
        assert len(groups_of(pool.rows)) < wanted * oversample - wanted + 1
    assert Counter(trained) + Counter(groups_of(pool.rows)) == Counter(passed)
    assert trained == sorted(trained)


def test_a_state_goes_to_another_number_of_workers() -> None:
    pools = [GroupPool(4, 2.0, 1) for _ in range(3)]
    for pool, groups in zip(pools, ([3, 8], [], [5]), strict=True):
        pool.restore([], ALONE)
        pool.rows = rows_of(groups)
    assert pools[1].state() == {}
    alone = GroupPool(4, 2.0, 1)
    alone.restore([pool.state() for pool in (pools[2], pools[1], pools[0])], ALONE)
    assert alone.rows.equals(rows_of([3, 5, 8]))
    assert alone.next_prompts(ALONE) == 2, "one group is missing"


def test_leftovers_of_another_pipeline_are_refused_with_a_sentence() -> None:
    pool = GroupPool(4, 2.0, 1)
    pool.rows = rows_of([1]).drop(["reward"])
    with pytest.raises(SiirlError, match="differ in the column 'reward'.*start a new run"):
        pool.add(rows_of([2]), ALONE)
