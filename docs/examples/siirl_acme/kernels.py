"""Acme's kernels. Importing this module registers them under the provider `acme`."""

from __future__ import annotations

import torch
from torch import Tensor

from siirl_kernels import implementation


@implementation("swiglu", "acme")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, written out; differentiable as the reference is."""
    return gate * torch.sigmoid(gate) * up
