"""Statistics over the global batch, with rows or tokens left out."""

from __future__ import annotations

import torch
from torch import Tensor

from siirl.device.collectives import Collectives


def global_mean(x: Tensor, mask: Tensor, collectives: Collectives) -> tuple[float, int]:
    """Return the mean of `x` where `mask`, over all workers, and how many elements it is of; (0.0, 0) when of none.

    Every worker calls it, one without rows too. Sums are float64, so the split over workers moves only the last digits.

    Args:
        x: floating, any shape, on the host; what lies outside the mask may be anything, NaN too.
        mask: bool, the shape of `x`.
    """
    kept = x[mask].double()
    total, count = collectives.all_reduce(torch.stack([kept.sum(), kept.new_tensor(kept.numel())])).tolist()
    return (total / count if count else 0.0), int(count)


def masked_whiten(x: Tensor, mask: Tensor, collectives: Collectives, eps: float = 1e-8) -> Tensor:
    """Return (x - mean) / sqrt(var + eps), mean and unbiased variance over the elements of all workers in the mask.

    Outside the mask the result is 0. A single element, or elements that are all equal, become 0. The variance is taken
    from deviations in a second reduction, not from a sum of squares, which loses it where the mean is large.

    Args: as in `global_mean`. Returns: the shape and dtype of `x`.
    """
    mean, count = global_mean(x, mask, collectives)
    deviation = torch.where(mask, x.double() - mean, 0.0)
    squares = collectives.all_reduce(deviation.square().sum().reshape(1)).item()
    return (deviation / (squares / max(count - 1, 1) + eps) ** 0.5).to(x.dtype)
