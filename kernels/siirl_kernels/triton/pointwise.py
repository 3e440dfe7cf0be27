"""Norm, rotary embedding and gated activation, computed in float32 and rounded as the references round or less.

Shapes: T tokens, N heads, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from siirl_kernels.triton.numbers import narrow
from siirl_kernels.triton.support import FUSED

TILE = 1024  # numbers of a program, where rows are shorter


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    out_ptr, x_ptr, weight_ptr, rows, eps, SIZE: tl.constexpr, SIZE_TILE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE_TILE)
    at = row.to(tl.int64)[:, None] * SIZE + column[None, :]
    inside = (row < rows)[:, None] & (column < SIZE)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
    normal = x / tl.sqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None]
    normal = narrow(normal, out_ptr.dtype.element_ty).to(tl.float32)  # halves are rounded before the weight
    tl.store(out_ptr + at, narrow(normal * weight[None, :], out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope(
    out_ptr, x_ptr, cos_ptr, sin_ptr, x_t, x_h,
    HEADS: tl.constexpr, HEADS_TILE: tl.constexpr, HALF: tl.constexpr, HALF_TILE: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_TILE)[:, None]
    column = tl.arange(0, HALF_TILE)[None, :]
    inside = (head < HEADS) & (column < HALF)
    x_at = x_ptr + token * x_t + head.to(tl.int64) * x_h + column
    first = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_at + HALF, mask=inside, other=0.0).to(tl.float32)
    at = token * 2 * HALF + column
    cos, cos_too = tl.load(cos_ptr + at, mask=column < HALF), tl.load(cos_ptr + at + HALF, mask=column < HALF)
    sin, sin_too = tl.load(sin_ptr + at, mask=column < HALF), tl.load(sin_ptr + at + HALF, mask=column < HALF)
    out_at = out_ptr + (token * HEADS + head) * 2 * HALF + column
    turned = first * cos.to(tl.float32) - second * sin.to(tl.float32)
    turned_too = second * cos_too.to(tl.float32) + first * sin_too.to(tl.float32)
    tl.store(out_at, narrow(turned, out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_at + HALF, narrow(turned_too, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(out_ptr, gate_ptr, up_ptr, columns, gate_r, up_r, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    gate = tl.load(gate_ptr + row * gate_r + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_r + column, mask=inside, other=0.0).to(tl.float32)
    active = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * columns + column, narrow(active, out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Contiguous tensors."""
    out, size = torch.empty_like(x), x.shape[-1]
    if rows := x.numel() // size:
        size_tile = triton.next_power_of_2(size)
        together = max(1, TILE // size_tile)
        _rms_norm[(triton.cdiv(rows, together),)](
            out, x, weight, rows, eps, SIZE=size, SIZE_TILE=size_tile, ROWS=together,
            num_warps=8 if size_tile > 2048 else 4, **FUSED,
        )  # fmt: skip
    return out


def rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """``x_TND`` without gaps in the last dimension, the others contiguous."""
    tokens, heads, size = x_TND.shape
    out_TND = x_TND.new_empty(x_TND.shape)
    if tokens:
        _rope[(tokens,)](
            out_TND, x_TND, cos_TD, sin_TD, x_TND.stride(0), x_TND.stride(1),
            HEADS=heads, HEADS_TILE=triton.next_power_of_2(heads),
            HALF=size // 2, HALF_TILE=triton.next_power_of_2(size // 2), num_warps=4, **FUSED,
        )  # fmt: skip
    return out_TND


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Two dimensions without gaps in the last one, or contiguous tensors."""
    out = gate.new_empty(gate.shape)
    if out.numel():
        columns = gate.shape[-1]
        gate, up = gate.reshape(-1, columns), up.reshape(-1, columns)
        _swiglu[(len(gate), triton.cdiv(columns, TILE))](
            out, gate, up, columns, gate.stride(0), up.stride(0), TILE=TILE, num_warps=4, **FUSED
        )
    return out
