"""Huawei Ascend's fused ops, provider ``ascend``. Importing it imports torch_npu; the NPU's back end does.

What each op takes is on its page in Ascend/op-plugin, docs/zh/custom_APIs/torch_npu; the predicates hold to what is
listed there for Atlas A2, the smallest common set. Gradients are the ops' own.

Shapes: T packed tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import torch
import torch_npu
from torch import Tensor

from siirl_kernels.packing import PackedSequences
from siirl_kernels.registry import implementation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAUSAL_FROM_THE_END = 3  # sparse_mode: the last query sees all keys, one before it all but one, …
TRIANGLE = 2048  # rows of the mask that this mode wants, whatever the lengths
MOST_SEQUENCES = 1024


def _normalises(x: Tensor, weight: Tensor, eps: float) -> bool:
    return x.dtype in DTYPES and weight.dtype in (x.dtype, torch.float32) and 2 <= x.dim() <= 8


@implementation("rms_norm", "ascend", supports=_normalises)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch_npu.npu_rms_norm(x, weight, eps)[0]


def _rotates(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> bool:
    tokens, heads, size = x_TND.shape
    alike = x_TND.dtype == cos_TD.dtype == sin_TD.dtype
    return alike and x_TND.dtype in DTYPES and tokens > 0 and heads < 1000 and size < 896


@implementation("rope", "ascend", supports=_rotates)
def rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    return torch_npu.npu_rotary_mul(x_TND, cos_TD[:, None], sin_TD[:, None], "half")


def _activates(gate: Tensor, up: Tensor) -> bool:
    return gate.dtype == up.dtype and gate.dtype in DTYPES and gate.numel() > 0 and gate.dim() <= 8


@implementation("swiglu", "ascend", supports=_activates)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch_npu.npu_swiglu(torch.cat((gate, up), dim=-1), dim=-1)


def _attends(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> bool:
    tokens, heads, size = q_TND.shape
    alike = q_TND.dtype == k_TKD.dtype == v_TKD.dtype and q_TND.dtype in DTYPES
    return alike and tokens > 0 and heads <= 256 and size <= 768 and len(sequences.lengths) <= MOST_SEQUENCES


@implementation("packed_attention", "ascend", supports=_attends)
def packed_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> Tensor:
    """A sequence's queries are its own tokens; its keys begin with those it shares, so the last ones meet the last."""
    lengths, prefixes = sequences.lengths, sequences.prefixes or itertools.repeat(0)
    if sequences.whole is not None:
        k_TKD, v_TKD = k_TKD.index_select(0, sequences.whole), v_TKD.index_select(0, sequences.whole)
    return torch_npu.npu_fusion_attention(
        q_TND,
        k_TKD,
        v_TKD,
        q_TND.shape[1],
        "TND",
        atten_mask=_triangle(q_TND.device),
        scale=q_TND.shape[2] ** -0.5,
        actual_seq_qlen=_ends(lengths),
        actual_seq_kvlen=_ends(own + shared for own, shared in zip(lengths, prefixes, strict=False)),
        sparse_mode=CAUSAL_FROM_THE_END,
    )[0]


def _ends(lengths: Iterable[int]) -> list[int]:
    return list(itertools.accumulate(lengths))


@functools.cache
def _triangle(device: torch.device) -> Tensor:
    """True, which here means hidden, above the diagonal."""
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=device).triu(1)
