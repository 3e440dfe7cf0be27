"""Sampling draws from the distribution it says it draws from, and its randomness belongs to a sample alone."""

from __future__ import annotations

import pytest
import torch

from siirl.rollout.sampling import Sampling, draw, uniforms

# 99.9th percentile of chi-square: 7 and 4 degrees of freedom (NIST/SEMATECH e-Handbook, table 1.3.6.7.4)
CHI_SQUARE_7, CHI_SQUARE_4 = 24.322, 18.467


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    seen = expected > 0
    assert counts[~seen].sum() == 0, "a token of probability 0 was drawn"
    return float(((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum())


def draws(logits: torch.Tensor, sampling: Sampling, count: int = 20_000, allowed: torch.Tensor | None = None):
    noise = uniforms(7, torch.arange(count), 1)[:, 0]
    allowed = None if allowed is None else allowed.expand(count, -1)
    return draw(logits.expand(count, -1), sampling, noise, allowed)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.1])
    tokens, log_probs = draws(logits, Sampling(1, temperature))
    exact = torch.softmax(logits / temperature, -1)
    assert chi_square(tokens, exact) < CHI_SQUARE_7
    torch.testing.assert_close(log_probs, exact.log()[tokens])


def test_the_test_above_can_fail() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.1])
    tokens, _ = draws(logits, Sampling(1, 1.1))
    assert chi_square(tokens, torch.softmax(logits, -1)) > CHI_SQUARE_7


PROBABILITIES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1, top_k=2), [0, 1]),
        (Sampling(1, top_p=0.7), [0, 1]),  # 0.4 + 0.3 reaches it
        (Sampling(1, top_p=0.71), [0, 1, 2]),
        (Sampling(1, min_p=0.3), [0, 1, 2]),  # at least 0.3 · 0.4 = 0.12
        (Sampling(1, top_k=4, min_p=0.26), [0, 1, 2]),
        (Sampling(1, top_p=1e-6), [0]),
        (Sampling(1), [0, 1, 2, 3, 4]),
    ],
)
def test_filters_keep_exactly_the_tokens_of_their_definition(sampling: Sampling, kept: list[int]) -> None:
    tokens, log_probs = draws(PROBABILITIES.log(), sampling)
    truncated = torch.zeros(5)
    truncated[kept] = PROBABILITIES[kept]
    assert chi_square(tokens, truncated / truncated.sum()) < CHI_SQUARE_4
    torch.testing.assert_close(log_probs, PROBABILITIES.log()[tokens])  # of the whole distribution


def test_a_forbidden_token_is_never_drawn_and_log_probs_stay_those_of_the_model() -> None:
    tokens, log_probs = draws(
        PROBABILITIES.log(), Sampling(1), allowed=PROBABILITIES.log().index_fill(0, torch.tensor([0]), -torch.inf)
    )
    expected = torch.tensor([0.0, 0.5, 0.25, 1 / 6, 1 / 12])
    assert chi_square(tokens, expected) < CHI_SQUARE_4
    torch.testing.assert_close(log_probs, PROBABILITIES.log()[tokens])


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    tokens, _ = draw(logits, Sampling(1, temperature=0.0), torch.zeros(50))
    assert torch.equal(tokens, logits.argmax(-1))


def test_the_last_token_is_reachable_and_nothing_lies_beyond_it() -> None:
    almost_one = torch.tensor([1 - 2**-24])
    for size in (2, 1000, 50_000):
        tokens, _ = draw(torch.zeros(1, size), Sampling(1), almost_one)
        assert size * 0.999 - 1 <= int(tokens) < size


def test_uniforms_are_uniform_independent_and_reproducible() -> None:
    noise = uniforms(3, torch.arange(200), 500)
    assert noise.min() >= 0 and noise.max() < 1
    counts = torch.histc(noise, bins=8, min=0, max=1).double()
    assert float(((counts - 12_500) ** 2 / 12_500).sum()) < CHI_SQUARE_7
    # neighbours along both axes: correlation of n uniform pairs has standard deviation 1/sqrt(n)
    for a, b in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:])):
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 4 / a.numel() ** 0.5
    assert torch.equal(uniforms(3, torch.tensor([5, 199]), 500), noise[[5, 199]])
    assert torch.equal(uniforms(3, torch.arange(200), 10), noise[:, :10])
    assert not torch.equal(uniforms(4, torch.arange(200), 500), noise)
