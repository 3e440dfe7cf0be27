"""Acme's kernels. Importing this module registers them under the provider `acme`."""

from __future__ import annotations

import torch
from torch import Tensor

from siirl_kernels import implementation


def fits(gate: Tensor, up: Tensor) -> bool:
    """The device has units for these dtypes alone."""
    return gate.dtype in (torch.float32, torch.bfloat16)


@implementation("swiglu", "acme", supports=fits)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, computed in float32; differentiable as the reference is."""
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(gate.dtype)
