"""Sampling: filters on the distribution, and randomness that belongs to a sample and not to a batch.

Each token is drawn by inverting the distribution at one uniform number that depends on the seed, the sample's id and
the token's position alone, so a response does not change with the batch or the worker it is generated in.
Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from siirl_kernels import kernels


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.

    Attributes:
        ignore_eos: end tokens are never drawn.
        stop: texts that end a response.
        stop_ids: tokens that end one, beside the model's end tokens.
        min_new_tokens: end tokens and ``stop_ids`` are not drawn before so many.
        repetition_penalty: above 1, logits of tokens in the prompt or the response are divided by it where positive,
            multiplied where negative (arXiv 1909.05858); 1 is off.
        presence_penalty: taken from the logits of tokens in the response.
        frequency_penalty: the same, times how often they are there.
        bad_words: token sequences of which the last is not drawn behind the others.
        top_log_probs: so many likeliest tokens are given with every token drawn.
        draft_tokens: tokens guessed ahead at most, see :mod:`siirl.rollout.drafts`; 0 is off.
        draft_match: last tokens that must have stood together before for a guess.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    top_log_probs: int = 0
    draft_tokens: int = 0
    draft_match: int = 3

    @property
    def filters(self) -> bool:
        """Whether any token that is allowed may still be left out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def uniforms(seed: int, sample_ids: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 [rows, count], a function of (seed, sample id, position) alone.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as a counter-based generator; 24 random bits each.

    Args:
        seed: any integer of 64 bits.
        sample_ids: int64 [rows].
        count: numbers per sample.
    """
    stream = _mix(_mix(torch.tensor(seed, dtype=torch.int64)) ^ sample_ids.cpu())
    counter = torch.arange(1, count + 1, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15)
    bits = _mix(stream[:, None] + counter[None, :])
    return _shift(bits, 40).to(torch.float32) / 2**24


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def draw(
    logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor, allowed_BV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per sequence.

    Args:
        logits_BV: of the next token.
        sampling: temperature and filters.
        uniform_B: one number in [0, 1) per sequence.
        allowed_BV: the logits to draw by, where they are not the model's own: penalised, or -inf for what is forbidden.

    Returns:
        tokens int64 [B], and their log-probs float32 [B] under softmax(logits / temperature), before any penalty or
        filter: the quantity that training computes (temperature 1 where it is 0).
    """
    if allowed_BV is None and not sampling.filters:
        return kernels.categorical(logits_BV, uniform_B, sampling.temperature)
    allowed_BV, heat = logits_BV if allowed_BV is None else allowed_BV, sampling.temperature
    if sampling.filters:
        allowed_BV, heat = _filter(torch.log_softmax(allowed_BV.float() / heat, dim=-1), sampling), 1.0
    tokens_B, _ = kernels.categorical(allowed_BV, uniform_B, heat)
    return tokens_B, kernels.token_log_prob(logits_BV, tokens_B, sampling.temperature)


def _filter(log_p: Tensor, sampling: Sampling) -> Tensor:
    """Remove tokens by top-k, then top-p (arXiv 1904.09751), then min-p (arXiv 2407.01082); not renormalised."""
    if 0 < sampling.top_k < log_p.shape[-1]:
        kth = log_p.topk(sampling.top_k, dim=-1).values[:, -1:]
        log_p = log_p.masked_fill(log_p < kth, -torch.inf)
    if sampling.top_p < 1.0:
        log_p = torch.log_softmax(log_p, dim=-1)
        ordered, index = log_p.sort(dim=-1, descending=True, stable=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        removed = torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before >= sampling.top_p)
        log_p = log_p.masked_fill(removed, -torch.inf)
    if sampling.min_p > 0.0:
        bound = log_p.max(dim=-1, keepdim=True).values + torch.tensor(sampling.min_p).log()
        log_p = log_p.masked_fill(log_p < bound, -torch.inf)
    return log_p
