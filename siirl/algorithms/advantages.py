"""Advantages: the registered estimators, which read and write a batch. Their formulas are kernel ops.

Legend of shapes: N responses of this worker, T their tokens, packed one response after another; response i owns tokens
offsets[i]:offsets[i+1]. All tensors are on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siirl.algorithms.masking import masked_whiten
from siirl.algorithms.registry import advantage
from siirl.config.schema import AlgorithmConfig
from siirl.data.batch import Batch, Ragged
from siirl.device.collectives import Collectives
from siirl_kernels import kernels


def group_advantages(
    reward_N: Tensor, group_id_N: Tensor, valid_N: Tensor, norm_std: bool, eps: float = 1e-6
) -> Tensor:
    """The op of that name: each response against the others to its prompt [N], 0 where it is not valid."""
    return kernels.group_advantages(reward_N, group_id_N, valid_N, norm_std, eps)


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
    """GAE from the critic's values (the op `gae`); returns are taken before any whitening, failed rows are 0 in both.

    Reads failed, response_ids, values and token_rewards, or reward, which then falls to the last token; writes
    advantages and returns (ragged float32).
    """
    offsets = batch.ragged("response_ids").offsets
    if "token_rewards" in batch:
        rewards_T = batch.ragged("token_rewards").values
    else:
        rewards_T = last_token_rewards(batch.dense("reward"), offsets)
    values_T = batch.ragged("values").values
    advantages_T, returns_T = kernels.gae(rewards_T, values_T, offsets, config.gamma, config.lam)
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
