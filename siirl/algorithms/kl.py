"""Per-token estimates of the KL divergence to a reference, and the controllers of its coefficient."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from siirl.config.schema import AlgorithmConfig
from siirl.errors import RequestError

MAX_LOG_RATIO = 20.0
"""Largest log-ratio that is exponentiated: exp(20) is 5e8, while exp(89) overflows float32."""


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str) -> Tensor:
    """Estimate KL(policy || reference) at every token sampled from the policy.

    With d = log_probs - ref_log_probs: ``k1`` = d, ``k2`` = d² / 2, ``k3`` = exp(-d) - 1 + d.
    k1 and k3 are unbiased, k3 is never negative; k2 is biased, with little variance near the reference.
    Source: J. Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html (2020).

    In k3, d is bounded below by -20, so a token the reference finds e²⁰ times likelier than the policy does costs 5e8
    and no gradient, instead of an overflow. The bound changes nothing above it.

    Args:
        log_probs, ref_log_probs: floating, any one shape; gradients flow to both.
        kind: one of ``k1``, ``k2``, ``k3``; RequestError otherwise.
    """
    d = log_probs - ref_log_probs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        d = d.clamp(min=-MAX_LOG_RATIO)
        # expm1 keeps the digits of small d, where exp(-d) - 1 would cancel.
        return torch.expm1(-d) + d
    raise RequestError(f"there is no KL estimator '{kind}'; known: k1, k2, k3")


class KLController(Protocol):
    """The coefficient of the KL penalty over a run. `coef` is what the next step uses."""

    coef: float

    def update(self, kl: float, samples: int) -> None:
        """Take in a step's mean KL per sequence, in nats, over `samples` sequences of all workers."""

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


class FixedKL:
    """A coefficient that stays as it is."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, samples: int) -> None:
        """Nothing follows from the KL."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class AdaptiveKL(FixedKL):
    """Steer the KL to a target: e = clip((KL - target) / target, ±0.2), coef ← coef · (1 + K·e).

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2, with K = samples / horizon, as in their published code: the
    speed per sample is then the same whatever the batch.

    Every worker keeps its own copy, equal on all because `kl` and `samples` are of the global batch.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        super().__init__(coef)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * samples / self.horizon


def kl_controller(config: AlgorithmConfig) -> KLController:
    """Return the controller of ``algorithm.kl_reward_coef`` that ``algorithm.kl_controller`` asks for."""
    if config.kl_controller == "adaptive":
        return AdaptiveKL(config.kl_reward_coef, config.kl_target, config.kl_horizon)
    return FixedKL(config.kl_reward_coef)
