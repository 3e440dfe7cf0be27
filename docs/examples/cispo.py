"""A policy loss of one's own: CISPO clips the weight of a token's gradient, not the objective (arXiv 2506.13585)."""

from __future__ import annotations

from torch import Tensor

from siirl.algorithms.policy_losses import PolicyLossInput
from siirl.config.schema import AlgorithmConfig


def cispo(inputs: PolicyLossInput, config: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """-clip(ratio) · advantage · log-prob of each token [T], the clipped ratio taken as a constant."""
    ratio_T = (inputs.log_probs_T - inputs.old_log_probs_T).detach().exp()
    weight_T = ratio_T.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss_T = -weight_T * inputs.advantages_T * inputs.log_probs_T
    return loss_T, {"ratio": ratio_T, "clipped": (weight_T != ratio_T).float()}
