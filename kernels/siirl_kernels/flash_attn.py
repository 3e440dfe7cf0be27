"""Provider ``flash_attn``: the package of that name, where it is installed. Importing registers and asks for nothing.

It computes attention of plain packed sequences in half precision (arXiv 2307.08691); shared prefixes are for others.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from siirl_kernels.packing import PackedSequences
from siirl_kernels.registry import implementation, provider

_WIDEST_HEAD = 256
_DTYPES = (torch.float16, torch.bfloat16)


def unavailable() -> str | None:
    """Why it cannot run here, or None."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed, which is optional"
    return None if torch.cuda.is_available() else "flash-attn is installed, but PyTorch finds no CUDA device"


provider("flash_attn", unavailable, optional=True)


def takes(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> bool:
    alike = q_TND.dtype == k_TKD.dtype == v_TKD.dtype and q_TND.dtype in _DTYPES and q_TND.is_cuda
    return alike and not any(sequences.prefixes) and len(q_TND) > 0 and q_TND.shape[2] <= _WIDEST_HEAD


@implementation("packed_attention", "flash_attn", supports=takes)
def packed_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> Tensor:
    """Scale, causality and grouped heads are the op's; the gradients' sums have one order in deterministic mode."""
    ends, longest = sequences.ends, max(sequences.lengths)
    return importlib.import_module("flash_attn").flash_attn_varlen_func(
        q_TND,
        k_TKD,
        v_TKD,
        ends,
        ends,
        longest,
        longest,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
