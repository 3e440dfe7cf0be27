"""Packing keeps every token and asks each response token's predecessor for it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from siirl.training.microbatch import input_lengths, mini_batch_index, pack, split
from tests.training.batches import PROMPTS_PER_STEP, batch

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 50), min_size=0, max_size=40), st.integers(1, 80))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    parts = split(torch.tensor(lengths, dtype=torch.int64), budget)
    assert sorted(int(row) for part in parts for row in part) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in part) <= budget or len(part) == 1 for part in parts)


def test_a_response_token_is_predicted_by_the_token_before_it() -> None:
    samples = batch()
    rows = torch.tensor([0, 3, 4, 11])
    micro = pack(samples, rows, CPU)
    prompts, responses = samples.ragged("prompt_ids").rows(), samples.ragged("response_ids").rows()
    whole = [torch.cat((prompts[r], responses[r])) for r in rows]
    assert micro.tokens_T.tolist() == [int(t) for sequence in whole for t in sequence[:-1]]
    assert micro.sequences.lengths == tuple(len(sequence) - 1 for sequence in whole)
    assert micro.targets_R.tolist() == [int(t) for r in rows for t in responses[r]]
    before = [
        int(sequence[len(prompts[r]) - 1 + i])
        for r, sequence in zip(rows, whole, strict=True)
        for i in range(len(responses[r]))
    ]
    assert micro.tokens_T[micro.predict_R].tolist() == before
    assert micro.offsets.diff().tolist() == [len(responses[r]) for r in rows]
    assert input_lengths(samples)[rows].tolist() == list(micro.sequences.lengths)


def test_mini_batches_are_blocks_of_the_global_order_of_prompts() -> None:
    index = mini_batch_index(torch.arange(PROMPTS_PER_STEP), PROMPTS_PER_STEP, 3)
    assert index.tolist() == [0, 0, 1, 1, 2, 2]
