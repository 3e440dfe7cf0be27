"""AdamW with states of 8 bits (Dettmers et al. 2021, arXiv 2110.02861), of torchao.

Blocks of 256 numbers share a scale: 2.03 bytes a parameter instead of 8. Tensors of fewer than 4096 numbers, and those
whose size 256 does not divide, keep float32 states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from siirl.config.schema import TrainingConfig


def adamw8bit(groups: list[dict[str, Any]], config: TrainingConfig, lr: float) -> Optimizer:
    """The optimiser over parameter groups; its learning rate is a tensor (see :func:`set_rate`).

    The library compiles its step; without ``training.compile`` it runs operator by operator, which needs no compiler.
    """
    from torchao.optim import AdamW8bit  # an extra, and seconds to import

    class AdamW(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("default" if config.compile else "force_eager"):
                return super().step(closure)

    return AdamW(groups, lr=lr, betas=config.betas, eps=config.eps)
