"""Advantages: formulas over tensors, and the registered estimators that read and write a batch.

Legend of shapes: N responses of this worker, T their tokens, packed one response after another; response i owns tokens
offsets[i]:offsets[i+1]. All tensors are on the host.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from siirl.algorithms.masking import masked_whiten
from siirl.algorithms.registry import advantage
from siirl.config.schema import AlgorithmConfig
from siirl.data.batch import Batch, Ragged
from siirl.device.collectives import Collectives


def group_advantages(
    reward_N: Tensor, group_id_N: Tensor, valid_N: Tensor, norm_std: bool, eps: float = 1e-6
) -> Tensor:
    """Compare each response with the others to its prompt: A = r - mean(group), over (std(group) + eps) if `norm_std`.

    With the standard deviation it is GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2), without it Dr.GRPO
    (arXiv 2503.20783). The deviation is the unbiased one, as other implementations have it. Rows that are not valid
    get 0 and are in no mean and no deviation. A group with one valid row, or with equal rewards, gets exactly 0: there
    is nothing to compare.

    Args:
        reward_N: floating; anything where not valid, NaN too.
        group_id_N: int64, equal for responses to one prompt, in any order; whole groups are here.
        valid_N: bool.

    Returns: advantages [N] in the dtype of `reward_N`.
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


def gae(token_rewards_T: Tensor, values_T: Tensor, offsets: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) of packed responses.

    δ_t = r_t + γ·V_{t+1} - V_t, with V = 0 after a response's last token; A_t = δ_t + γλ·A_{t+1}; returns A_t + V_t.

    Runs over time, from the end, for all responses at once, in float32. Nothing is padded, so a long response costs
    itself; its numbers do not depend, to the bit, on what else is in the batch.

    Args:
        token_rewards_T, values_T: float32.
        offsets: int64 [N+1].

    Returns: advantages [T], returns [T], float32.
    """
    lengths_N = offsets.diff()
    next_values_T = values_T.roll(-1)
    next_values_T[offsets[1:][lengths_N > 0] - 1] = 0.0
    delta_T = token_rewards_T + gamma * next_values_T - values_T

    # Order tokens by their distance from the end, then by rank of length, the longest response first: those that are
    # still running at a distance are then the first ones of the distance before.
    rank_N = torch.empty_like(lengths_N)
    rank_N[torch.argsort(lengths_N, descending=True, stable=True)] = torch.arange(len(lengths_N))
    from_end_T = torch.repeat_interleave(offsets[1:], lengths_N) - 1 - torch.arange(len(values_T))
    running_L = torch.bincount(from_end_T)
    place_T = (running_L.cumsum(0) - running_L)[from_end_T] + torch.repeat_interleave(rank_N, lengths_N)
    by_time_T = torch.empty_like(delta_T)
    by_time_T[place_T] = delta_T
    for after, now in pairwise(by_time_T.split(running_L.tolist())):
        # Not add_(alpha=), which rounds once or twice, by where in memory an element lies.
        now.add_(gamma * lam * after[: len(now)])
    advantages_T = by_time_T[place_T]
    return advantages_T, advantages_T + values_T


@advantage("grpo")
def grpo(batch: Batch, config: AlgorithmConfig, collectives: Collectives) -> dict[str, Ragged]:
    """Group-relative advantages, the same for each token of a response (arXiv 2402.03300, outcome supervision).

    Reads reward, failed, group_id, response_ids; writes advantages (ragged float32).
    """
    offsets = batch.ragged("response_ids").offsets
    reward_N, group_id_N, failed_N = batch.dense("reward"), batch.dense("group_id"), batch.dense("failed")
    advantage_N = group_advantages(reward_N, group_id_N, ~failed_N, norm_std=config.norm_adv_by_std)
    advantages_T = torch.repeat_interleave(advantage_N, offsets.diff())
    return {"advantages": Ragged(_whiten(advantages_T, batch, config, collectives), offsets)}


@advantage("gae")
def gae_estimator(batch: Batch, config: AlgorithmConfig, collectives: Collectives) -> dict[str, Ragged]:
    """GAE from the critic's values (see `gae`); returns are taken before any whitening, failed rows are 0 in both.

    Reads failed, response_ids, values and token_rewards, or reward, which then falls to the last token; writes
    advantages and returns (ragged float32).
    """
    offsets = batch.ragged("response_ids").offsets
    if "token_rewards" in batch:
        rewards_T = batch.ragged("token_rewards").values
    else:
        rewards_T = last_token_rewards(batch.dense("reward"), offsets)
    advantages_T, returns_T = gae(rewards_T, batch.ragged("values").values, offsets, config.gamma, config.lam)
    valid_T = _valid_tokens(batch)
    advantages_T = _whiten(torch.where(valid_T, advantages_T, 0.0), batch, config, collectives)
    returns_T = torch.where(valid_T, returns_T, 0.0)
    return {"advantages": Ragged(advantages_T, offsets), "returns": Ragged(returns_T, offsets)}


def last_token_rewards(reward_N: Tensor, offsets: Tensor) -> Tensor:
    """Return float32 [T]: a response's reward at its last token, 0 before it; an empty response's is dropped."""
    rewards_T = torch.zeros(int(offsets[-1]))
    filled_N = offsets.diff() > 0
    rewards_T[offsets[1:][filled_N] - 1] = reward_N[filled_N].float()
    return rewards_T


def _valid_tokens(batch: Batch) -> Tensor:
    return torch.repeat_interleave(~batch.dense("failed"), batch.lengths("response_ids"))


def _whiten(advantages_T: Tensor, batch: Batch, config: AlgorithmConfig, collectives: Collectives) -> Tensor:
    if not config.whiten_advantages:
        return advantages_T
    return masked_whiten(advantages_T, _valid_tokens(batch), collectives)
