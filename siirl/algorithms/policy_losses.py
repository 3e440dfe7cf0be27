"""Policy losses, per token. How tokens are weighted into one number is `aggregation`.

Legend of shapes: T response tokens of a micro-batch, packed one response after another; N responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from siirl.algorithms.kl import MAX_LOG_RATIO
from siirl.algorithms.registry import policy_loss
from siirl.config.schema import AlgorithmConfig


@dataclass(frozen=True)
class PolicyLossInput:
    """What a policy loss sees of a micro-batch: float32 [T] each; offsets, int64 [N+1], say whose the tokens are.

    `old_log_probs_T` is of the policy that the samples are from; on the first update after a rollout it may be
    ``log_probs_T.detach()``, and the ratio is then 1 to the bit.
    """

    log_probs_T: Tensor
    old_log_probs_T: Tensor
    advantages_T: Tensor
    offsets: Tensor


@policy_loss("ppo_clip")
def ppo_clip(inputs: PolicyLossInput, config: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), negated: -min(r·A, clip(r, 1 - low, 1 + high)·A).

    r = exp(log_probs - old_log_probs). `clip_low` and `clip_high` are separate (DAPO, arXiv 2503.14476). With
    `dual_clip` = c the objective of a negative advantage is at least c·A (arXiv 1912.09729), so that a ratio far above
    1 cannot dominate. The log-ratio is bounded to ±20: an infinite ratio would turn an advantage of 0 into NaN.

    Returns: the loss [T], and ``ratio``, ``clipped`` (1 where the clip decides, which stops the gradient), ``kl_old``
    (k1 of KL(old || new): old - new log-prob) and, with dual clip, ``dual_clipped``; float32 [T], detached.
    """
    log_ratio_T = inputs.log_probs_T - inputs.old_log_probs_T
    ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped_T = -inputs.advantages_T * ratio_T
    bounded_T = -inputs.advantages_T * ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    loss_T = torch.maximum(unclipped_T, bounded_T)
    stats = {"ratio": ratio_T, "clipped": bounded_T > unclipped_T, "kl_old": -log_ratio_T}
    if config.dual_clip is not None:
        ceiling_T = torch.where(inputs.advantages_T < 0, -config.dual_clip * inputs.advantages_T, torch.inf)
        stats["dual_clipped"] = loss_T > ceiling_T
        loss_T = torch.minimum(loss_T, ceiling_T)
    return loss_T, {name: x_T.detach().float() for name, x_T in stats.items()}
