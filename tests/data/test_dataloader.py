"""Prompts come in one global order that depends on the seed and the epoch, never on the number of workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from siirl.data.dataloader import (
    RESPONSES,
    DistributedDataloader,
    Item,
    permutation,
    prompt_id,
    sample_id,
    split_sample_id,
)
from siirl.errors import RequestError


def steps(count: int, workers: int = 1, **kwargs) -> list[list[list[Item]]]:
    """Return the items by step and worker."""
    arguments = {"indices": range(10, 33), "prompts_per_step": 8, "seed": 5, **kwargs}
    loaders = [DistributedDataloader(rank=rank, workers=workers, **arguments) for rank in range(workers)]
    return [[loader.next_indices() for loader in loaders] for _ in range(count)]


def flat(step: list[list[Item]]) -> list[Item]:
    return [item for part in step for item in part]


@pytest.mark.parametrize("workers", [2, 3, 4, 7, 8, 11])
@pytest.mark.parametrize("prompts", [1, 8, 50])
def test_every_number_of_workers_reads_the_same_prompts_in_the_same_order(workers, prompts):
    one = [flat(step) for step in steps(7, prompts_per_step=prompts)]
    many = steps(7, workers, prompts_per_step=prompts)
    assert [flat(step) for step in many] == one
    sizes = [len(part) for step in many for part in step]
    assert max(sizes) - min(sizes) <= 1


def test_slots_number_the_prompts_of_a_step_and_positions_those_of_the_run():
    for number, step in enumerate(steps(6, workers=3)):
        assert [item.slot for item in flat(step)] == list(range(8))
        assert [item.position for item in flat(step)] == list(range(8 * number, 8 * number + 8))


@pytest.mark.parametrize("prompts", [8, 23, 50])  # fewer than, as many as, more than the 23 rows
def test_an_epoch_is_every_row_once_wherever_steps_end(prompts):
    items = [item for step in steps(23, prompts_per_step=prompts) for item in flat(step)]
    assert all(item.epoch == item.position // 23 for item in items)
    complete = len(items) // 23
    for epoch in range(complete):
        assert sorted(item.row for item in items if item.epoch == epoch) == list(range(10, 33))
    assert max(Counter((item.epoch, item.row) for item in items).values()) == 1


@pytest.mark.parametrize("workers", [1, 2, 3, 11])
def test_prompts_asked_for_in_other_numbers_are_the_same_stream(workers):
    loaders = [DistributedDataloader(range(10, 33), 8, rank, workers, seed=5) for rank in range(workers)]
    parts = [[loader.next_indices(count) for loader in loaders] for count in (5, 0, 1, 26, 8)]
    assert [len(flat(part)) for part in parts] == [5, 0, 1, 26, 8]
    assert [item.slot for item in flat(parts[3])] == list(range(26))
    found = [item._replace(slot=0) for part in parts for item in flat(part)]
    assert found == [item._replace(slot=0) for step in steps(5) for item in flat(step)]


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed: int, epoch: int) -> list[int]:
        return permutation(100, seed, epoch).tolist()

    orders = [order(seed, epoch) for seed in (0, 1, 2**32, 2**33) for epoch in range(3)]
    assert len({tuple(o) for o in orders}) == len(orders)
    assert all(sorted(o) == list(range(100)) for o in orders)
    assert order(3, 4) == order(3, 4)


def test_orders_are_even_over_places():
    # Chi-squared of "row 0 is at place p" over 2,000 epochs; 9 degrees of freedom, 99.9 % quantile 27.9.
    places = Counter(int(np.flatnonzero(permutation(10, 7, epoch) == 0)[0]) for epoch in range(2000))
    assert sum((places[place] - 200) ** 2 / 200 for place in range(10)) < 27.9


def test_without_shuffling_rows_come_in_the_order_of_the_source():
    rows = [item.row for step in steps(4, shuffle=False) for item in flat(step)]
    assert rows == [*range(10, 33), *range(10, 19)]


def test_a_run_goes_on_from_its_state_with_another_number_of_workers():
    whole = [flat(step) for step in steps(9, workers=2)]
    loader = DistributedDataloader(range(10, 33), 8, rank=1, workers=2, seed=5)
    for _ in range(4):
        loader.next_indices()
    state = json.loads(json.dumps(loader.state_dict()))
    assert state == loader.state_dict() and state["position"] == 32
    resumed = [DistributedDataloader(np.arange(10, 33), 8, rank=rank, workers=3, seed=5) for rank in range(3)]
    for other in resumed:
        other.load_state_dict(state)
    for step in whole[4:]:
        assert [item for other in resumed for item in other.next_indices()] == step


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"indices": range(10, 32)}, "rows = 23 and this run has 22"),
        ({"indices": range(11, 34)}, "other rows of data.source"),
        ({"seed": 6}, "seed = 5 and this run has 6"),
        ({"shuffle": False}, "data.shuffle = True and this run has False"),
    ],
)
def test_a_state_of_other_data_is_refused_with_a_sentence(change, names):
    arguments = {"indices": range(10, 33), "prompts_per_step": 8, "seed": 5}
    state = DistributedDataloader(**arguments).state_dict()
    with pytest.raises(RequestError, match=names):
        DistributedDataloader(**{**arguments, **change}).load_state_dict(state)


def test_a_source_without_rows_is_refused():
    with pytest.raises(RequestError, match="no rows"):
        DistributedDataloader([], 8)


def test_sample_ids_are_unique_and_lead_back_to_prompt_and_response():
    ids = {sample_id(prompt_id(p), k) for p in range(50) for k in range(16)} | {sample_id(0, RESPONSES - 1)}
    assert len(ids) == 50 * 16 + 1
    assert split_sample_id(sample_id(123_456_789_012, 1023)) == (123_456_789_012, 1023)
    prompts = torch.tensor([3, 3, 2**42])
    responses = torch.tensor([0, 1, RESPONSES - 1])
    back = split_sample_id(sample_id(prompts, responses))
    assert torch.equal(back[0], prompts) and torch.equal(back[1], responses)


def test_planning_data_needs_no_torch():
    code = "import sys, siirl.data, siirl.data.dataloader, siirl.data.balance; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
