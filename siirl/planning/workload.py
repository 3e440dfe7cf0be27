"""How long prompts and responses are, and which worker gets which of them.

A response's length is drawn from a log-normal distribution and clipped to `rollout.max_new_tokens`; prompts all have
their mean length. What is drawn depends on the seed alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from siirl.config.schema import Config
from siirl.data.balance import assign
from siirl.errors import RequestError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SPREAD = 0.5
"""Standard deviation of the logarithm of a response's length, unless the user says otherwise."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses.

    Attributes:
        prompt: mean prompt.
        response: mean response before clipping.
        spread: standard deviation of the logarithm of a response's length.
        longest: where responses are clipped.
    """

    prompt: float
    response: float
    spread: float
    longest: int

    @classmethod
    def of(
        cls, config: Config, prompt: float | None = None, response: float | None = None, spread: float | None = None
    ) -> Lengths:
        """What the user says, else half of what the configuration allows (all of it where end tokens are ignored).

        Raises:
            RequestError: a mean is longer than what the configuration allows.
        """
        longest, longest_prompt = config.rollout.max_new_tokens, config.data.max_prompt_tokens
        always = config.rollout.ignore_eos
        prompt = max(1.0, longest_prompt / 2) if prompt is None else prompt
        response = (longest if always else max(1.0, longest / 2)) if response is None else response
        spread = (0.0 if always else SPREAD) if spread is None else spread
        for name, mean, key, limit in (
            ("prompt", prompt, "data.max_prompt_tokens", longest_prompt),
            ("response", response, "rollout.max_new_tokens", longest),
        ):
            if mean > limit:
                raise RequestError(f"--{name}-tokens is {mean:g}, more than {key}={limit}; set {key}={math.ceil(mean)}")
        return cls(float(prompt), float(response), float(spread), longest)

    @property
    def _mu(self) -> float:
        return math.log(self.response) - self.spread**2 / 2

    @property
    def mean_response(self) -> float:
        """Mean after clipping at m: E[X; X < m] + m·P(X > m) of the log-normal distribution."""
        if self.spread == 0:
            return min(self.response, self.longest)
        z = (math.log(self.longest) - self._mu) / self.spread
        cdf = NormalDist().cdf
        return self.response * cdf(z - self.spread) + self.longest * (1 - cdf(z))

    def draw(self, count: int, seed: int) -> Ints:
        """Response lengths, int64 [count]."""
        drawn = np.random.default_rng(seed).lognormal(self._mu, self.spread, count)
        return np.clip(np.rint(drawn), 1, self.longest).astype(np.int64)


@dataclass(frozen=True)
class Rows:
    """The samples of a step on some data-parallel shares.

    Attributes:
        responses: tokens of each sample, int64 [N].
        group: prompt of each sample, int64 [N].
        home: share that generates it, int64 [N].
        target: share that trains on it, int64 [N].
        stratum: mini-batch of each sample, int64 [N].
        prompt: tokens of a prompt.
    """

    responses: Ints
    group: Ints
    home: Ints
    target: Ints
    stratum: Ints
    prompt: float

    @classmethod
    def draw(
        cls, lengths: Lengths, prompts: int, group: int, mini_batches: int, sources: int, targets: int, seed: int
    ) -> Rows:
        """Draw a step of ``prompts`` prompts with ``group`` samples each.

        ``sources`` shares generate, each a stretch of the step's order as the dataloader deals it, and ``targets``
        train; who trains on what is the databuffer's own assignment.
        """
        slot = np.repeat(np.arange(prompts), group)
        responses = lengths.draw(prompts * group, seed)
        first = prompts * np.arange(sources) // sources
        home = np.searchsorted(first, slot, side="right") - 1
        stratum = slot * mini_batches // prompts
        near = np.minimum(home * targets // sources, targets - 1)
        target = assign(responses + int(lengths.prompt), targets, strata=stratum, home=near)
        return cls(responses, slot, home, target, stratum, lengths.prompt)

    @property
    def near(self) -> Ints:
        """The training share that has, or is next to, each row's home."""
        sources, targets = int(self.home.max()) + 1, int(self.target.max()) + 1
        return np.minimum(self.home * targets // sources, targets - 1)

    @property
    def kept(self) -> float:
        """Share of the tokens whose row does not change share."""
        tokens = self.responses + self.prompt
        return float(tokens[self.near == self.target].sum() / tokens.sum())
