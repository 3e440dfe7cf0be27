"""The KL penalty as a part of the reward."""

from __future__ import annotations

import torch
from torch import Tensor

from siirl.algorithms.advantages import last_token_rewards
from siirl.algorithms.kl import kl_estimate
from siirl.data.batch import Ragged


def kl_token_rewards(
    reward_N: Tensor,
    failed_N: Tensor,
    old_log_probs: Ragged,
    ref_log_probs: Ragged,
    coef: float,
    estimator: str,
) -> tuple[Ragged, Tensor]:
    """Give each token -coef · KL(policy || reference), and the last one the response's reward too.

    Ziegler et al. 2019, arXiv 1909.08593, equation 2, spread over the tokens.

    Args:
        reward_N: floating; anything where failed, NaN too.
        failed_N: bool; such rows get 0 throughout.
        old_log_probs, ref_log_probs: ragged float32 with the same offsets; an empty row keeps no reward.
        coef: the penalty's coefficient, what a KL controller holds.
        estimator: a kind of `kl_estimate`.

    Returns: token_rewards (ragged float32), and the KL of each response, float32 [N], in nats, summed over its tokens
        (0 where failed). Its `global_mean` over rows that have not failed is what a KL controller takes in.
    """
    offsets = old_log_probs.offsets
    assert torch.equal(offsets, ref_log_probs.offsets), "log-probs of policy and reference are of different tokens"
    lengths_N = offsets.diff()
    valid_T = torch.repeat_interleave(~failed_N, lengths_N)
    kl_T = torch.where(valid_T, kl_estimate(old_log_probs.values, ref_log_probs.values, estimator), 0.0)
    rewards_T = torch.where(valid_T, last_token_rewards(reward_N, offsets) - coef * kl_T, 0.0)
    row_T = torch.repeat_interleave(torch.arange(len(lengths_N)), lengths_N)
    kl_N = kl_T.new_zeros(len(lengths_N)).index_add_(0, row_T, kl_T)
    return Ragged(rewards_T, offsets), kl_N
