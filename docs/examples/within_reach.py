"""A filter of one's own: train on the prompts that are neither hopeless nor solved."""

from __future__ import annotations

import torch
from torch import Tensor

from siirl.config.schema import AlgorithmConfig
from siirl.data.batch import Batch


def within_reach(batch: Batch, config: AlgorithmConfig) -> Tensor:
    """Read reward, failed and group_id; bool [rows], True where the group's mean reward lies between 0.05 and 0.95."""
    valid_N = ~batch.dense("failed")
    _, group_N = batch.dense("group_id").unique(return_inverse=True)
    total_N = torch.zeros(len(batch)).index_add_(0, group_N[valid_N], batch.dense("reward")[valid_N])
    count_N = torch.zeros(len(batch)).index_add_(0, group_N[valid_N], torch.ones(int(valid_N.sum())))
    mean_N = (total_N / count_N.clamp(min=1))[group_N]
    return valid_N & (mean_N > 0.05) & (mean_N < 0.95)
