"""Policy losses, per token. How tokens are weighted into one number is `aggregation`.

Legend of shapes: T response tokens of a micro-batch, packed one response after another; N responses.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from siirl.algorithms.registry import policy_loss
from siirl.config.schema import AlgorithmConfig
from siirl_kernels import kernels


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
    loss_T, ratio_T, clipped_T, kl_old_T, dual_clipped_T = kernels.policy_loss(
        inputs.log_probs_T,
        inputs.old_log_probs_T,
        inputs.advantages_T,
        config.clip_low,
        config.clip_high,
        config.dual_clip,
    )
    stats = {"ratio": ratio_T, "clipped": clipped_T, "kl_old": kl_old_T}
    if config.dual_clip is not None:
        stats["dual_clipped"] = dual_clipped_T
    return loss_T, {name: x_T.float() for name, x_T in stats.items()}
