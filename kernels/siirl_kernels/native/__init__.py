"""C++ for a host, provider ``native``: what a token's step consists of, where few rows make PyTorch's calls dear.

Only generation uses it: its ops have no gradients. Importing registers; nothing is compiled until a table is bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siirl_kernels.native import functions
from siirl_kernels.native.build import unavailable
from siirl_kernels.paging import PagedSequences
from siirl_kernels.registry import implementation, provider

provider("native", unavailable)

# Where PyTorch's matrix product does not have more rows to fill its blocks with: float32, bfloat16.
_FEW, _FEW_IN_TILES = 32, 128
# A weight of so many rows comes from memory each time, and the next rows while those before are multiplied.
_LARGE, _FEW_OF_LARGE = 2**14, 64
# A dot product of fewer numbers is sooner done than its lanes are added up.
_LONG = 256
_TILE = 32
# PyTorch's attention multiplies long chunks of a bfloat16 prompt in tiles too.
_PROMPT = 256
_DTYPES = (torch.float32, torch.bfloat16)


def _takes(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    if dtype not in _DTYPES:
        return False
    for x in tensors:  # noqa: SIM110 (asked thousands of times a step: all() takes twice as long)
        if x.dtype != dtype or not x.is_cpu or not x.is_contiguous():
            return False
    return True


def _multiplies(x_TH: Tensor, weight_OH: Tensor, bias: Tensor | None) -> bool:
    tokens, hidden = x_TH.shape
    if not 0 < tokens <= _FEW_IN_TILES or not _takes(x_TH, weight_OH) or not (bias is None or _takes(x_TH, bias)):
        return False
    if x_TH.dtype == torch.float32:
        return hidden >= _LONG and tokens <= (_FEW_OF_LARGE if len(weight_OH) >= _LARGE else _FEW)
    return hidden % _TILE == 0 == len(weight_OH) % _TILE and functions.has_tiles()


@implementation("inference_linear", "native", supports=_multiplies)
def inference_linear(x_TH: Tensor, weight_OH: Tensor, bias: Tensor | None) -> Tensor:
    return functions.linear(x_TH, weight_OH, bias)


def _attends(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, sequences: PagedSequences
) -> bool:
    if q_TND.dtype == torch.bfloat16 and sequences.longest_query >= _PROMPT:
        return False
    return len(q_TND) > 0 and _takes(q_TND, k_TKD, v_TKD, keys_PSKD, values_PSKD)


@implementation("paged_attention", "native", supports=_attends)
def paged_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, sequences: PagedSequences
) -> Tensor:
    return functions.paged_attention(q_TND, k_TKD, v_TKD, keys_PSKD, values_PSKD, sequences)


def _draws(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> bool:
    return _takes(logits_BV) and uniform_B.dtype == torch.float32 and uniform_B.is_cpu and uniform_B.is_contiguous()


@implementation("categorical", "native", supports=_draws)
def categorical(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return functions.categorical(logits_BV, uniform_B, temperature)


def _judges(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> bool:
    return logits_BV.dtype == torch.float32 and _takes(logits_BV) and tokens_B.is_contiguous()


@implementation("token_log_prob", "native", supports=_judges)
def token_log_prob(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
    return functions.token_log_prob(logits_BV, tokens_B, temperature)


def _normalises(x: Tensor, weight: Tensor, eps: float) -> bool:
    return torch.is_inference_mode_enabled() and _takes(x, weight)


@implementation("rms_norm", "native", supports=_normalises)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functions.rms_norm(x, weight, eps)


def _rotates(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> bool:
    return torch.is_inference_mode_enabled() and _takes(x_TND, cos_TD, sin_TD)


@implementation("rope", "native", supports=_rotates)
def rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    return functions.rope(x_TND, cos_TD, sin_TD)


def _activates(gate: Tensor, up: Tensor) -> bool:
    return torch.is_inference_mode_enabled() and _takes(gate, up)


@implementation("swiglu", "native", supports=_activates)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functions.swiglu(gate, up)
