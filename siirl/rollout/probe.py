"""The parity probe: after new weights, the rollout engine must answer fixed prompts as training does.

Training continues the prompts greedily by a few tokens, with the log-probs of its own forward pass; the engine
generates greedily too, by `generate` alone, so that the probe works with any engine and wherever it is. Up to the first
token that differs both have seen the same text, and there too the log-probs are comparable: the largest log-prob of a
distribution moves by no more than the distribution does. So a tie that rounding decides is no difference.

Its cost is `TOKENS` forward passes of about `PROMPTS` · 6 tokens in training and one call of `generate` for `PROMPTS`
responses of `TOKENS` tokens. Shapes: P prompts, K tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from siirl.errors import SiirlError
from siirl.rollout.contract import Completions
from siirl.rollout.sampling import Sampling, uniforms

PROMPTS, TOKENS = 4, 2
_LONGEST = 8

BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""Largest difference of a log-prob in nats, by the engine's dtype.

In small models on the CPU rounding makes 5e-7 to 2e-5 of it in float32 and 0.004 to 0.1 in bfloat16, more where weights
are large: 8 bits of a logit leave no room for a tight bound.
"""


@dataclass(frozen=True)
class Answers:
    """Greedy continuations: tokens int64 [P, K] and their log-probs at temperature 1, float64 [P, K], on the host."""

    tokens: Tensor
    log_probs: Tensor

    def to_integers(self) -> Tensor:
        """As int64 [2 · P · K], bit by bit."""
        return torch.cat((self.tokens.reshape(-1), self.log_probs.double().reshape(-1).view(torch.int64)))

    @classmethod
    def from_integers(cls, integers: Tensor, prompts: int) -> Answers:
        """The inverse of :meth:`to_integers`."""
        tokens, bits = integers.chunk(2)
        return cls(tokens.view(prompts, -1), bits.contiguous().view(torch.float64).view(prompts, -1))


@dataclass(frozen=True)
class Probe:
    """Prompts of random tokens, of different lengths, and how many tokens continue each."""

    prompts: Sequence[Sequence[int]]
    tokens: int

    @classmethod
    def of(cls, vocabulary: int, seed: int, longest_prompt: int, longest_response: int) -> Probe:
        """The same on every worker of a run; no longer than a run's own prompts and responses."""
        longest = min(_LONGEST, longest_prompt)
        numbers = uniforms(seed, torch.arange(PROMPTS), _LONGEST).double()
        ids = (numbers * vocabulary).long().clamp(max=vocabulary - 1)
        lengths = [max(1, longest * (i + 1) // PROMPTS) for i in range(PROMPTS)]
        return cls([row[:n].tolist() for row, n in zip(ids, lengths, strict=True)], min(TOKENS, longest_response))

    @property
    def sample_ids(self) -> Tensor:
        return torch.arange(len(self.prompts))

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.tokens, temperature=0.0)

    @property
    def integers(self) -> int:
        """How many :meth:`Answers.to_integers` gives."""
        return 2 * len(self.prompts) * self.tokens


def compare(expected: Answers, done: Completions, bound: float) -> float:
    """The largest difference between training's log-probs and those of an engine, in nats.

    Args:
        expected: of training.
        done: the engine's greedy responses to the probe's prompts; an end token may end one early.
        bound: largest difference that passes.

    Raises:
        SiirlError: a difference is larger, or is no number.
    """
    worst = 0.0
    for row, (ids, log_probs) in enumerate(zip(done.response_ids.rows(), done.log_probs.rows(), strict=True)):
        for place, (token, found) in enumerate(zip(ids.tolist(), log_probs.tolist(), strict=True)):
            wanted = float(expected.log_probs[row, place])
            difference = abs(found - wanted)
            if not difference <= bound:
                raise SiirlError(
                    f"the rollout engine does not compute with the weights of version {done.version} as training does: "
                    f"the log-prob of token {place + 1} after probe prompt {row + 1} is {found:.6g} there and "
                    f"{wanted:.6g} in training, and rollout.probe_bound is {bound:g}"
                )
            worst = max(worst, difference)
            if token != int(expected.tokens[row, place]):
                break
    return worst
