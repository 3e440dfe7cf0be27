"""Triton for GPUs, provider ``triton``: what a token's step consists of besides matrix products.

Only generation uses it: its ops have no gradients. Importing registers; Triton itself is imported by the first call.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from siirl_kernels.paging import PagedSequences
from siirl_kernels.registry import implementation, provider
from siirl_kernels.triton.support import alike, unavailable

provider("triton", unavailable)

_WIDEST_HEAD = 256
_LARGEST_GROUP = 128
_WIDEST_ROW = 16384  # that a program holds at once


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


def _draws(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> bool:
    return logits_BV.shape[1] > 0 and uniform_B.dtype == torch.float32 and alike(logits_BV)


@implementation("categorical", "triton", supports=_draws)
def categorical(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return _module("sampling").categorical(logits_BV, uniform_B, temperature)


def _looks_up(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> bool:
    return logits_BV.shape[1] > 0 and tokens_B.device == logits_BV.device and alike(logits_BV)


@implementation("token_log_prob", "triton", supports=_looks_up)
def token_log_prob(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
    return _module("sampling").token_log_prob(logits_BV, tokens_B, temperature)


def _normalises(x: Tensor, weight: Tensor, eps: float) -> bool:
    if not torch.is_inference_mode_enabled() or x.shape[-1] > _WIDEST_ROW:
        return False
    return x.is_contiguous() and alike(x, weight)


@implementation("rms_norm", "triton", supports=_normalises)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _module("pointwise").rms_norm(x, weight, eps)


def _rotates(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> bool:
    if not torch.is_inference_mode_enabled() or x_TND.shape[1] * x_TND.shape[2] > 2 * _WIDEST_ROW:
        return False
    return cos_TD.is_contiguous() and sin_TD.is_contiguous() and alike(x_TND, cos_TD, sin_TD)


@implementation("rope", "triton", supports=_rotates)
def rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    return _module("pointwise").rope(x_TND, cos_TD, sin_TD)


def _activates(gate: Tensor, up: Tensor) -> bool:
    if not torch.is_inference_mode_enabled() or gate.shape != up.shape:
        return False
    return alike(gate, up) and (gate.dim() == 2 or gate.is_contiguous() and up.is_contiguous())


@implementation("swiglu", "triton", supports=_activates)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _module("pointwise").swiglu(gate, up)
