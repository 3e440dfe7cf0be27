"""Paged attention and its bookkeeping, against attention over whole sequences and counting by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from siirl_kernels import bind, kernels, providers
from siirl_kernels.paging import PagedSequences
from tests.device_under_test import device
from tests.kernels.test_reference import attend_naively, random

assert device()  # whose back end brings implementations of its own


@pytest.fixture(params=[name for name in providers("categorical") if name != "ascend"], autouse=True)
def _bound(request: pytest.FixtureRequest) -> Iterator[None]:
    bind([], dict.fromkeys(("paged_attention", "categorical"), request.param))
    yield
    bind([])


def test_new_tokens_are_the_last_of_their_sequence() -> None:
    paged = PagedSequences.of([[7, 2], [4], [0, 9, 1]], [6, 3, 9], [2, 3, 1], block_size=4, device="cpu")
    assert paged.tables.tolist() == [[7, 2, 0], [4, 0, 0], [0, 9, 1]]
    assert paged.lengths.tolist() == [6, 3, 9]
    assert paged.starts.tolist() == [0, 2, 5, 6]
    assert paged.slots.tolist() == [8, 9, 16, 17, 18, 4]  # block 2 of positions 4, 5; block 4; block 1 of position 8
    assert paged.positions.tolist() == [4, 5, 0, 1, 2, 8]
    assert (paged.longest, paged.longest_query) == (9, 3)
    assert paged.tables.dtype == paged.lengths.dtype == paged.starts.dtype == torch.int32
    again = PagedSequences(paged.tables, paged.lengths, paged.starts, paged.slots, 9, 3)
    assert torch.equal(again.positions, paged.positions)


def test_a_block_too_few_is_an_error() -> None:
    with pytest.raises(IndexError):
        PagedSequences.of([[0, 1]], [9], [1], block_size=4, device="cpu")


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunk_by_chunk_is_the_whole_sequence(chunk: int) -> None:
    lengths, tables, slots = (11, 4, 8), [[5, 0, 8], [2], [6, 1]], 4
    q, k, v = (random(sum(lengths), heads, 6, seed=heads).float() for heads in (4, 2, 1))
    v = v.repeat(1, 2, 1)
    expected = attend_naively(q, k, v, lengths)
    caches = torch.full((2, 9, slots, 2, 6), torch.nan)
    starts, found = [0, 11, 15], torch.empty_like(q)
    for first in range(0, max(lengths), chunk):
        rows = [row for row in range(3) if first < lengths[row]]
        ends = [min(first + chunk, lengths[row]) for row in rows]
        paged = PagedSequences.of([tables[row] for row in rows], ends, [end - first for end in ends], slots, "cpu")
        at = torch.cat([torch.arange(starts[r] + first, starts[r] + end) for r, end in zip(rows, ends, strict=True)])
        found[at] = kernels.paged_attention(q[at], k[at], v[at], *caches, paged)
    torch.testing.assert_close(found, expected)
    assert torch.equal(caches[0, 5, 3], k[3])
    assert torch.equal(caches[1, 8, 2], v[10])
    assert caches[0, 8, 3].isnan().all()


def cumulated(logits: Tensor, temperature: float) -> Tensor:
    return (logits.double() / temperature).softmax(-1).cumsum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_tokens_are_where_the_cumulated_probability_passes_the_number(temperature: float) -> None:
    logits = random(500, 37).float()
    uniform = torch.rand(500, generator=torch.Generator().manual_seed(3))
    tokens, log_probs = kernels.categorical(logits, uniform, temperature)
    expected = torch.searchsorted(cumulated(logits, temperature), uniform.double()[:, None], right=True).squeeze(1)
    assert (tokens != expected).sum() <= 1  # the number may be a rounding away from a border
    p = torch.distributions.Categorical(logits=logits.double() / temperature)
    torch.testing.assert_close(log_probs, p.log_prob(tokens).float())


def test_the_ends_of_the_unit_interval_draw_tokens_that_may_be_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).repeat(2, 1)
    tokens, log_probs = kernels.categorical(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0)
    assert tokens.tolist() == [1, 2]
    assert log_probs.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_is_drawn_as_often_as_its_probability_says(dtype: torch.dtype) -> None:
    """At n equidistant numbers each token is drawn n p times, up to the two at its borders."""
    logits = (3 * random(700)).to(dtype)
    count = 4096
    uniform = (torch.arange(count) + 0.5) / count
    tokens, _ = kernels.categorical(logits.repeat(count, 1), uniform, 0.8)
    expected = (logits.double() / 0.8).softmax(-1) * count
    assert ((torch.bincount(tokens, minlength=700) - expected).abs() < 1.01).all()
    assert (tokens.diff() >= 0).all()


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0], [3.0, 3.0, 3.0, 3.0]])
    tokens, log_probs = kernels.categorical(logits, torch.tensor([0.9, 0.9]), 0.0)
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(log_probs, logits.log_softmax(-1)[torch.arange(2), tokens])
