"""The critic's loss, per token."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Return ½·max((V - R)², (V_clip - R)²), V_clip = clip(V, V_old ± clip).

    It is the value clipping of OpenAI baselines' PPO, which the PPO paper does not have and arXiv 2005.12729 describes:
    an update does not move a value further than `clip` from what the critic said at sampling time. With `clip` None it
    is the plain ½·(V - R)².

    Args:
        values_T, old_values_T, returns_T: float32, one value for each response token; gradients flow to `values_T`.

    Returns: the loss [T], and float32 [T], 1 where the clip decides, which stops the gradient.
    """
    loss_T = 0.5 * (values_T - returns_T).square()
    if clip is None:
        return loss_T, torch.zeros_like(loss_T).detach()
    bounded_T = values_T.clamp(old_values_T - clip, old_values_T + clip)
    bounded_loss_T = 0.5 * (bounded_T - returns_T).square()
    return torch.maximum(loss_T, bounded_loss_T), (bounded_loss_T > loss_T).float()
