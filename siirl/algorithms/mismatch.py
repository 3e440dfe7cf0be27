"""How far rollout and training are apart on the same tokens, and what a policy loss may do about it.

The engine that generates and the one that trains compute the same weights with other kernels, dtypes and batches, so
that a token drawn from μ (rollout) is trained on as if it were of π (training's policy with the very same weights). The
ratio ρ = π / μ of every token says by how much; it is not PPO's ratio of the updated to the old policy.

Legend of shapes: R response tokens, packed one response after another; N responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siirl.algorithms.kl import MAX_LOG_RATIO, kl_estimate
from siirl.config.schema import AlgorithmConfig

# differences are agreed upon between workers as whole numbers of these parts of a nat
_PARTS = 1_000_000
_NO_NUMBER = 2**62


def ratio_statistics(train_R: Tensor, rollout_R: Tensor) -> dict[str, Tensor]:
    """What each token, drawn from rollout's policy μ, contributes to the statistics of ρ = π / μ; float32 [R] each.

    ``ratio`` is ρ, whose mean is 1 but for noise; ``chi2`` = ρ² - 1, whose mean is χ²(π || μ), 0 where they agree: of n
    weighted samples about n / (1 + χ²) count (Kong 1992, "A note on importance sampling using standardized weights");
    ``kl_k1`` and ``kl_k3`` estimate KL(μ || π) (see `kl_estimate`). Liu et al. 2025, "When Speed Kills Stability", use
    the same ones to see a training collapse coming.

    Args:
        train_R, rollout_R: log-probs of the tokens under π and under μ.
    """
    ratio_R = (train_R - rollout_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return {
        "ratio": ratio_R,
        "chi2": ratio_R.square() - 1.0,
        "kl_k1": kl_estimate(rollout_R, train_R, "k1"),
        "kl_k3": kl_estimate(rollout_R, train_R, "k3"),
    }


def correction(train_R: Tensor, rollout_R: Tensor, offsets: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """The factor of each token's policy loss under ``algorithm.old_log_probs: correct``, and where a bound decides.

    The ratio r of a token is, by ``correction_level``,

        token       ρ_t
        sequence    Π ρ_t over its response: the exact importance weight of a response
        geometric   (Π ρ_t)^(1 / length): GSPO's ratio of a sequence (Zheng et al. 2025, arXiv 2507.18071)

    and the factor, by ``correction``,

        tis         min(r, high)            truncated importance sampling (Ionides 2008; for rollout and training Yao et
                                            al. 2025, "Your efficient RL framework secretly brings you off-policy RL
                                            training")
        mis         r where low <= r <= high, else 0: masked importance sampling; by token IcePop (Ling team 2025,
                                            arXiv 2510.18855), by sequence Liu et al. 2025, "When Speed Kills Stability"

    The normalisation of the loss stays as it is: what is masked counts in its denominator. The log of r is bounded to
    ±20. Of an empty response nothing is given.

    Args:
        train_R, rollout_R: log-probs under training's policy with the weights that drew the tokens, and of rollout.
        offsets: int64 [N+1]: whose the tokens are.

    Returns:
        The factors, float32 [R], without a gradient; and bool [R], True where a factor is truncated or masked.
    """
    log_R = (train_R - rollout_R).detach()
    if config.correction_level != "token":
        log_R = _by_sequence(log_R, offsets, mean=config.correction_level == "geometric")
    ratio_R = log_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    above_R = ratio_R > config.correction_high
    if config.correction == "tis":
        return ratio_R.clamp(max=config.correction_high), above_R
    outside_R = above_R | (ratio_R < (config.correction_low or 0.0))
    return ratio_R.masked_fill(outside_R, 0.0), outside_R


def _by_sequence(x_R: Tensor, offsets: Tensor, mean: bool) -> Tensor:
    """Each token's response's sum or mean, float32 [R]. In float64 on the host: the same whatever the micro-batch."""
    lengths_N = offsets.diff().cpu()
    sums_N = torch.stack([part.sum() for part in x_R.double().cpu().split(lengths_N.tolist())])
    if mean:
        sums_N = sums_N / lengths_N.clamp(min=1)
    return sums_N.repeat_interleave(lengths_N).float().to(x_R.device)


@dataclass
class Trust:
    """Whether rollout's log-probs may stand for training's, by the last measured difference of all workers.

    A step whose last measurement is within the bound and at most ``every`` - 1 steps old skips the pass; all others
    compute it and measure. Every worker holds the same numbers, so all of them decide alike.
    """

    bound: float
    every: int
    difference: float | None = None
    step: int = 0

    def applies(self, step: int) -> bool:
        """Whether ``step`` takes rollout's log-probs. The same however often a step asks."""
        return self.within and 0 < step - self.step < self.every

    @property
    def within(self) -> bool:
        """Whether the last measurement is within the bound; False before the first."""
        return self.difference is not None and self.difference <= self.bound

    def measured(self, parts: int, step: int) -> None:
        """Take in the largest difference of a step over all workers, see `parts_of`."""
        self.difference, self.step = parts / _PARTS, step

    def state_dict(self) -> dict[str, Any]:
        return {"difference": self.difference, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.difference, self.step = state["difference"], state["step"]


def parts_of(train_R: Tensor, rollout_R: Tensor) -> int:
    """The largest absolute difference in millionths of a nat, rounded up; 0 of no tokens, a huge one of no number."""
    worst = float((train_R - rollout_R).abs().max()) if len(train_R) else 0.0
    return math.ceil(worst * _PARTS) if math.isfinite(worst) else _NO_NUMBER
