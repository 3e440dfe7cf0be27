"""References of the ops that an algorithm consists of between rollout and update.

Shapes: N responses, T their tokens, packed one response after another; response i owns tokens
offsets[i]:offsets[i+1]; G groups of responses to one prompt.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from siirl_kernels.registry import op

# An infinite ratio would turn an advantage of 0 into NaN.
MAX_LOG_RATIO = 20.0


@op
def group_advantages(reward_N: Tensor, group_id_N: Tensor, valid_N: Tensor, norm_std: bool, eps: float) -> Tensor:
    """Compare each response with the others to its prompt: A = r - mean(group), over (std(group) + eps) if `norm_std`.

    With the standard deviation it is GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2), without it Dr.GRPO
    (arXiv 2503.20783). The deviation is the unbiased one, as other implementations have it. Rows that are not valid
    get 0 and are in no mean and no deviation. A group with one valid row, or with equal rewards, gets exactly 0: there
    is nothing to compare.

    Args:
        reward_N: floating; anything where not valid, NaN too.
        group_id_N: int64, equal for responses to one prompt, in any order; whole groups are here.
        valid_N: bool.

    Returns:
        advantages [N] in the dtype of `reward_N`, computed in float64.
    """
    _, group_N = torch.unique(group_id_N, return_inverse=True)
    groups = int(group_N.max()) + 1 if len(group_N) else 0

    def group_sum(x_N: Tensor) -> Tensor:
        return x_N.new_zeros(groups).index_add_(0, group_N, x_N)

    # In float64 the mean of equal float32 rewards is exact; a rounding error there would be blown up by 1 / eps.
    count_G = group_sum(valid_N.double())
    mean_G = group_sum(torch.where(valid_N, reward_N.double(), 0.0)) / count_G.clamp(min=1)
    advantage_N = torch.where(valid_N, reward_N.double() - mean_G[group_N], 0.0)
    if norm_std:
        std_G = (group_sum(advantage_N.square()) / (count_G - 1).clamp(min=1)).sqrt()
        advantage_N = advantage_N / (std_G[group_N] + eps)
    return advantage_N.to(reward_N.dtype)


@op
def gae(token_rewards_T: Tensor, values_T: Tensor, offsets: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) of packed responses.

    δ_t = r_t + γ·V_{t+1} - V_t, with V = 0 after a response's last token; A_t = δ_t + γλ·A_{t+1}; returns A_t + V_t.

    Runs over time, from the end, for all responses at once. Nothing is padded, so a long response costs itself; its
    numbers do not depend, to the bit, on what else is in the batch.

    Args:
        token_rewards_T, values_T: floating; computed in float32, in float64 where they are.
        offsets: int64 [N+1].

    Returns:
        advantages [T], returns [T], float32 (float64 of such).
    """
    wide = torch.float64 if values_T.dtype == torch.float64 else torch.float32
    token_rewards_T, values_T = token_rewards_T.to(wide), values_T.to(wide)
    lengths_N = offsets.diff()
    next_values_T = values_T.roll(-1)
    next_values_T[offsets[1:][lengths_N > 0] - 1] = 0.0
    delta_T = token_rewards_T + gamma * next_values_T - values_T

    # Order tokens by their distance from the end, then by rank of length, the longest response first: those that are
    # still running at a distance are then the first ones of the distance before.
    rank_N = torch.empty_like(lengths_N)
    rank_N[torch.argsort(lengths_N, descending=True, stable=True)] = _count(lengths_N)
    from_end_T = torch.repeat_interleave(offsets[1:], lengths_N) - 1 - _count(values_T)
    running_L = torch.bincount(from_end_T)
    place_T = (running_L.cumsum(0) - running_L)[from_end_T] + torch.repeat_interleave(rank_N, lengths_N)
    by_time_T = torch.empty_like(delta_T)
    by_time_T[place_T] = delta_T
    for after, now in pairwise(by_time_T.split(running_L.tolist())):
        # Not add_(alpha=), which rounds once or twice, by where in memory an element lies.
        now.add_(gamma * lam * after[: len(now)])
    advantages_T = by_time_T[place_T]
    return advantages_T, advantages_T + values_T


def _count(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


@op
def policy_loss(
    log_probs_T: Tensor,
    old_log_probs_T: Tensor,
    advantages_T: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), negated: -min(r·A, clip(r, 1 - low, 1 + high)·A).

    r = exp(log_probs - old_log_probs), of a log-ratio bounded to ±20. With `dual_clip` = c the objective of a negative
    advantage is at least c·A (arXiv 1912.09729). The gradient is found with the loss, in one pass: -r·A where no bound
    decides (the bounds themselves included), else 0.

    Args:
        log_probs_T: the only one that a gradient reaches.
        old_log_probs_T: of the policy that the samples are from.

    Returns:
        loss; ratio; clipped, 1 where the clip decides; kl_old, old - new log-prob; dual_clipped, 1 where the dual clip
        decides: float32 [T] each (float64 of such), the last four without gradients.
    """
    return _PolicyLoss.apply(log_probs_T, old_log_probs_T, advantages_T, clip_low, clip_high, dual_clip)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, log_probs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float, dual: float | None
    ) -> tuple[Tensor, ...]:
        wide = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
        kl_old = old.to(wide) - log_probs.to(wide)
        ratio = kl_old.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).neg_().exp_()
        negated = -advantages.to(wide)
        unclipped = negated * ratio
        bounded = ratio.clamp(1.0 - low, 1.0 + high).mul_(negated)
        clipped, loss = bounded > unclipped, torch.maximum(unclipped, bounded)
        decides = torch.zeros_like(clipped)
        if dual is not None:
            ceiling = torch.where(negated > 0, dual * negated, torch.inf)
            decides, loss = loss > ceiling, torch.minimum(loss, ceiling)
        statistics = (ratio, clipped.to(wide), kl_old, decides.to(wide))
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        if ctx.needs_input_grad[0]:
            fixed = (kl_old.abs() > MAX_LOG_RATIO).logical_or_(clipped).logical_or_(decides)
            ctx.save_for_backward(unclipped.masked_fill_(fixed, 0.0).to(log_probs.dtype))
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        gradient = None if grad is None else (grad * ctx.saved_tensors[0]).to(ctx.saved_tensors[0].dtype)
        return gradient, None, None, None, None, None
