"""Provider ``liger``: norm, rotary embedding and gated activation of the package Liger-Kernel, where it is installed.

Importing registers and asks for nothing. Liger's kernels write gradients over what they are given; where an op promises
to leave its arguments alone, they get copies. Its fused linear layer with cross-entropy is not here: it has no entropy,
which ``linear_log_prob`` returns and differentiates.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from siirl_kernels.registry import implementation, provider
from siirl_kernels.triton import support

_WIDEST_ROW = 65536


def unavailable() -> str | None:
    """Why it cannot run here, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed, which is optional"
    if support.interpreted():
        return "liger-kernel is installed, but Triton's interpreter cannot run its kernels"
    return support.unavailable()


provider("liger", unavailable, optional=True)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"liger_kernel.ops.{name}")


def _fits(*tensors: Tensor) -> bool:
    """In training: generation's kernels are another provider's."""
    if torch.is_inference_mode_enabled() or not tensors[0].numel() or tensors[0].shape[-1] > _WIDEST_ROW:
        return False
    return all(x.is_contiguous() for x in tensors) and support.alike(*tensors)


def _normalises(x: Tensor, weight: Tensor, eps: float) -> bool:
    return _fits(x, weight)


@implementation("rms_norm", "liger", supports=_normalises)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rounds where the reference does, before the weight; the gradient gets memory of its own (``in_place`` False)."""
    return _module("rms_norm").LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _rotates(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> bool:
    return _fits(x_TND, cos_TD, sin_TD)


@implementation("rope", "liger", supports=_rotates)
def rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    return _Rope.apply(x_TND, cos_TD, sin_TD)


class _Rope(torch.autograd.Function):
    """Liger turns queries and keys in one call, in place: here a copy of ``x``, and one head that is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned("rope_forward", x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turned("rope_backward", grad, *ctx.saved_tensors), None, None


def _turned(function: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    queries = x.clone(memory_format=torch.contiguous_format)[None].transpose(1, 2)
    keys = x.new_zeros(1, 1, len(x), x.shape[2])
    return getattr(_module("rope"), function)(queries, keys, cos, sin)[0].transpose(1, 2)[0]


def _activates(gate: Tensor, up: Tensor) -> bool:
    return gate.shape == up.shape and _fits(gate, up)


@implementation("swiglu", "liger", supports=_activates)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _Swiglu.apply(gate, up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _module("swiglu").swiglu_forward(gate, up)[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (x.view(-1, x.shape[-1]).clone() for x in ctx.saved_tensors)  # the kernel writes over them
        return _module("swiglu").swiglu_backward(gate, up, grad.contiguous())
