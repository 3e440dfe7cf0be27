"""Packing keeps every token and asks each response token's predecessor for it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from siirl.training.microbatch import input_lengths, mini_batch_index, pack, split
from tests.training.batches import PROMPTS_PER_STEP, batch

CPU = torch.device("cpu")


# tokens of the response's input, and which prompt: that has 3 tokens for each unit of its number, and one more
ROWS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=40)


def columns(rows: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    own, prompts = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (0, 1))
    prompt_lengths = 3 * prompts + 1
    return prompt_lengths + own, prompts, prompt_lengths


@given(ROWS, st.integers(1, 80))
def test_micro_batches_hold_every_row_once_within_the_budget(rows: list[tuple[int, int]], budget: int) -> None:
    lengths, prompts, prompt_lengths = columns(rows)
    parts = split(lengths, prompts, prompt_lengths, budget)
    assert sorted(int(row) for part in parts for row in part) == list(range(len(rows)))
    for part in parts:
        distinct = {int(p): int(n) for p, n in zip(prompts[part], prompt_lengths[part], strict=True)}
        tokens = sum(distinct.values()) + int((lengths - prompt_lengths)[part].sum())
        assert tokens <= budget or len(part) == 1


def test_a_prompt_that_several_rows_answer_counts_once() -> None:
    lengths, prompts = torch.tensor([14, 13, 12, 11]), torch.tensor([5, 5, 5, 5])
    parts = split(lengths, prompts, torch.full((4,), 10), budget=20)  # 10 + 4 + 3 + 2 + 1
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3]]
    assert [part.tolist() for part in split(lengths, prompts, torch.full((4,), 10), budget=19)] == [[0, 1, 2], [3]]


@given(ROWS, st.integers(1, 80))
def test_rows_of_one_prompt_lie_in_neighbouring_micro_batches(rows: list[tuple[int, int]], budget: int) -> None:
    lengths, prompts, prompt_lengths = columns(rows)
    parts = split(lengths, prompts, prompt_lengths, budget)
    for prompt in range(9):
        having = [i for i, part in enumerate(parts) if bool((prompts[part] == prompt).any())]
        assert not having or having == list(range(having[0], having[-1] + 1))


def test_a_response_token_is_predicted_by_the_token_before_it() -> None:
    samples = batch()
    rows = torch.tensor([0, 3, 4, 5, 11])  # 4 and 5 answer the same prompt
    micro = pack(samples, rows, CPU)
    prompts, responses = samples.ragged("prompt_ids").rows(), samples.ragged("response_ids").rows()
    pieces = [torch.cat((prompts[r], responses[r][:-1])) for r in rows]
    pieces[3] = responses[5][:-1]
    assert micro.tokens_T.tolist() == [int(t) for piece in pieces for t in piece]
    assert micro.sequences.lengths == tuple(len(piece) for piece in pieces)
    assert micro.sequences.parents == (0, 1, 2, 2, 4)
    assert micro.sequences.prefixes == (0, 0, 0, len(prompts[5]), 0)
    assert micro.targets_R.tolist() == [int(t) for r in rows for t in responses[r]]
    before = [int(t) for r in rows for t in torch.cat((prompts[r][-1:], responses[r][:-1]))]
    assert micro.tokens_T[micro.states_S[micro.state_R]].tolist() == before
    assert micro.offsets.diff().tolist() == [len(responses[r]) for r in rows]
    whole = torch.tensor(micro.sequences.lengths) + torch.tensor(micro.sequences.prefixes)
    assert input_lengths(samples)[rows].tolist() == whole.tolist()


def test_mini_batches_are_blocks_of_the_global_order_of_prompts() -> None:
    index = mini_batch_index(torch.arange(PROMPTS_PER_STEP), PROMPTS_PER_STEP, 3)
    assert index.tolist() == [0, 0, 1, 1, 2, 2]
