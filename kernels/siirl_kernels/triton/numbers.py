"""bfloat16 as a GPU computes it, under Triton's interpreter too, which multiplies its bits and cuts numbers off."""

from __future__ import annotations

import triton
import triton.language as tl

from siirl_kernels.triton.support import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def product(a, b):
    """float32 a · b; float32 factors are not rounded to TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 ``x`` rounded to the nearest of ``dtype``, to even ones halfway."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + (((bits >> 16) & 1) + 0x7FFF)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
