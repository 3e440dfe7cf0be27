"""An advantage of one's own: each response against the mean of the others (RLOO, arXiv 2402.14740)."""

from __future__ import annotations

import torch

from siirl.config.schema import AlgorithmConfig
from siirl.data.batch import Batch, Ragged
from siirl.device import Collectives


def leave_one_out(batch: Batch, config: AlgorithmConfig, collectives: Collectives) -> dict[str, Ragged]:
    """Read reward, failed, group_id and response_ids; write advantages, ragged float32 like response_ids."""
    valid_N = ~batch.dense("failed")
    reward_N = torch.where(valid_N, batch.dense("reward"), 0.0)
    _, group_N = batch.dense("group_id").unique(return_inverse=True)
    total_N = torch.zeros(len(batch)).index_add_(0, group_N, reward_N)[group_N]
    count_N = torch.zeros(len(batch)).index_add_(0, group_N, valid_N.float())[group_N]
    others_N = (total_N - reward_N) / (count_N - 1).clamp(min=1)
    advantage_N = torch.where(valid_N & (count_N > 1), reward_N - others_N, 0.0)
    offsets = batch.ragged("response_ids").offsets
    return {"advantages": Ragged(advantage_N.repeat_interleave(offsets.diff()), offsets)}
