"""C++ for a host, provider ``native``: generation, where few rows make PyTorch's calls dear, and training, where
memory is read and written once instead of once for each step of a formula.

Importing registers; nothing is compiled until a table is bound. The ops of training are in :mod:`.training`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siirl_kernels.native import functions, training
from siirl_kernels.native.build import unavailable
from siirl_kernels.paging import PagedSequences
from siirl_kernels.registry import implementation, provider
from siirl_kernels.weights import LayerWeights, LinearWeights

provider("native", unavailable)

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


def _packs(weights: LinearWeights) -> bool:
    weight, bias = weights.weight, weights.bias
    if not weight.is_cpu or weight.dtype not in _DTYPES or not (bias is None or bias.dtype == weight.dtype):
        return False
    return weight.dtype == torch.float32 or (weight.shape[1] % _TILE == 0 and functions.has_tiles())


def _multiplies(x_TH: Tensor, weights: LinearWeights) -> bool:
    return x_TH.dtype == weights.weight.dtype and _takes(x_TH) and _packs(weights)


@implementation("inference_linear", "native", supports=_multiplies)
def inference_linear(x_TH: Tensor, weights: LinearWeights) -> Tensor:
    return functions.inference_linear(x_TH, weights)


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
    return _takes(logits_BV) and tokens_B.is_contiguous()


@implementation("token_log_prob", "native", supports=_judges)
def token_log_prob(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
    return functions.token_log_prob(logits_BV, tokens_B, temperature)


def takes_layer(
    x_TH: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    weights: LayerWeights,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    sequences: PagedSequences,
) -> bool:
    """Whether the library computes this layer."""
    return (
        x_TH.dtype == weights.input_norm.dtype
        and _attends(x_TH, cos_TD, sin_TD, keys_PSKD, values_PSKD, sequences)
        and weights.form("native takes it", lambda: _takes_all(weights))
    )


def _takes_all(weights: LayerWeights) -> bool:
    norms = (weights.input_norm, weights.post_norm, weights.q_norm, weights.k_norm)
    linears = (weights.q, weights.k, weights.v, weights.o, weights.gate, weights.up, weights.down)
    return _takes(*(x for x in norms if x is not None)) and all(map(_packs, linears))


implementation("inference_layer", "native", supports=takes_layer)(functions.inference_layer)
