"""Triton for GPUs, provider ``triton``: what a token's step consists of besides matrix products.

Only generation uses it: its ops have no gradients. Importing registers; Triton itself is imported by the first call.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import Tensor

from siirl_kernels.paging import PagedSequences
from siirl_kernels.registry import implementation, provider
from siirl_kernels.triton.support import alike, unavailable

provider("triton", unavailable)

_WIDEST_HEAD = 256
_LARGEST_GROUP = 128


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _attends(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, sequences: PagedSequences
) -> bool:
    if q_TND.shape[2] > _WIDEST_HEAD or q_TND.shape[1] > _LARGEST_GROUP * k_TKD.shape[1]:
        return False
    return sequences.lengths.device == q_TND.device and alike(q_TND, k_TKD, v_TKD, keys_PSKD, values_PSKD)


@implementation("paged_attention", "triton", supports=_attends)
def paged_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, sequences: PagedSequences
) -> Tensor:
    return _module("attention").paged_attention(q_TND, k_TKD, v_TKD, keys_PSKD, values_PSKD, sequences)
