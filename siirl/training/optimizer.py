"""The optimiser and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from siirl.config.schema import TrainingConfig
from siirl.training.adamw import AdamW
from siirl.training.adamw8bit import adamw8bit


def make_optimizer(module: nn.Module, config: TrainingConfig, lr: float) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), perhaps with states of 8 bits, or plain SGD.

    Weight decay reaches matrices only, not norms and biases.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    if config.optimizer == "adamw8bit":
        return adamw8bit(groups, config, lr)
    return AdamW(groups, lr=lr, betas=config.betas, eps=config.eps)


def set_rate(group: dict[str, Any], lr: float) -> None:
    """Set a parameter group's learning rate, in place where it is a tensor."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def lr_factor(step: int, config: TrainingConfig) -> float:
    """The learning rate of ``step`` (from 1) as a share of ``training.lr``.

    Linear warm-up over ``lr_warmup_steps`` reaches 1 at its last step; then constant, or linear or cosine
    (arXiv 1608.03983) decay that reaches ``lr_min_ratio`` at the last step.
    """
    if step <= config.lr_warmup_steps:
        return step / config.lr_warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    span = max(1, config.steps - max(1, config.lr_warmup_steps))
    progress = min(1.0, (step - max(1, config.lr_warmup_steps)) / span)
    share = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr_min_ratio + (1 - config.lr_min_ratio) * share
