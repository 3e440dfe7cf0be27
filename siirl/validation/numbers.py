"""Comparisons that checks share."""

from __future__ import annotations

import torch
from torch import Tensor

from siirl.validation.checks import Broken, require


def same(found: Tensor, expected: Tensor, what: str) -> None:
    """Require equal shapes, dtypes and bits; NaN equals NaN."""
    found, expected = found.detach().cpu(), expected.detach().cpu()
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    require(found.dtype == expected.dtype, f"{what}: {found.dtype} instead of {expected.dtype}")
    width = found.element_size()
    a, b = (x.contiguous().reshape(-1).view(torch.uint8).view(-1, width) for x in (found, expected))
    different = int((a != b).any(1).sum()) if a.numel() else 0
    if different:
        raise Broken(f"{what}: {different} of {found.numel()} elements differ, {_first(found, expected)}")


def _first(found: Tensor, expected: Tensor) -> str:
    a, b = found.reshape(-1), expected.reshape(-1)
    if a.dtype.itemsize == 1 and a.is_floating_point():
        a, b = a.float(), b.float()
    index = int((a != b).nonzero()[0]) if bool((a != b).any()) else 0
    return f"number {index} is {a[index].item()} instead of {b[index].item()}"


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖, in float64 on the host; NaN where there is one."""
    a, b = found.detach().cpu().double(), expected.detach().cpu().double()
    require(a.shape == b.shape, f"shape {tuple(a.shape)} instead of {tuple(b.shape)}")
    return float((a - b).norm() / b.norm().clamp(min=torch.finfo(torch.float64).tiny))
