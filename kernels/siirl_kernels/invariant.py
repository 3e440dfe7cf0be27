"""Provider ``invariant``: float32 on a host, where no bit of a token depends on what is computed beside it.

Every sum has one order of additions (``native/``), so a token's numbers are the same alone or in any batch, with
any number of threads, in a prompt cut anywhere, and in generation (:func:`paged_attention`) as in training
(:func:`packed_attention`): the log-prob that :func:`categorical` reports is the one :func:`linear_log_prob` finds.
Gradients are those of ``native`` or of the references. In other dtypes the references run, which promise none of
this. The order never asks for these implementations; :func:`invariant_pins` pins them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from siirl_kernels import reference
from siirl_kernels.native import functions, takes_layer, training
from siirl_kernels.native.build import unavailable
from siirl_kernels.packing import PackedSequences
from siirl_kernels.paging import PagedSequences
from siirl_kernels.registry import implementation, obstacle, provider
from siirl_kernels.weights import LayerWeights, LinearWeights

PROVIDER = "invariant"
OPS = (
    "rms_norm",
    "rope",
    "swiglu",
    "linear",
    "inference_linear",
    "inference_layer",
    "packed_attention",
    "paged_attention",
    "linear_log_prob",
    "categorical",
    "token_log_prob",
)

provider(PROVIDER, unavailable)


def invariant_pins() -> dict[str, str]:
    """Pins for :func:`siirl_kernels.bind` that bind every op of generation and training to this provider.

    Raises:
        ValueError: the C++ cannot be compiled here.
    """
    if why := obstacle(PROVIDER):
        raise ValueError(f"batch-invariant kernels need a C++ compiler on this machine: {why}")
    return dict.fromkeys(OPS, PROVIDER)


class _AsReference(torch.autograd.Function):
    """``function`` forward; backward the gradients of ``formula``, which is computed again."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], formula: Callable[..., Tensor], *arguments: Any) -> Tensor:
        ctx.formula = formula
        ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
        ctx.at = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(arguments[i] for i in ctx.at))
        return function(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        arguments, needed = list(ctx.others), []
        for i, x in zip(ctx.at, ctx.saved_tensors, strict=True):
            arguments[i] = x.detach().requires_grad_(ctx.needs_input_grad[2 + i])
            if ctx.needs_input_grad[2 + i]:
                needed.append(i)
        with torch.enable_grad():
            out = ctx.formula(*arguments)
        found = torch.autograd.grad(out, [arguments[i] for i in needed], gradients)
        by_place = dict(zip(needed, found, strict=True))
        return (None, None, *(by_place.get(i) for i in range(len(arguments))))


def _differentiable(function: Callable[..., Tensor], formula: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function`` of the arguments, tensors made contiguous; recorded only where a gradient may be asked for."""
    arguments = tuple(x.contiguous() if isinstance(x, Tensor) else x for x in arguments)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return _AsReference.apply(function, formula, *arguments)
    return function(*arguments)


def _single(*tensors: Tensor) -> bool:
    return all(x.dtype == torch.float32 and x.is_cpu for x in tensors)


def _normalises(x: Tensor, weight: Tensor, eps: float) -> bool:
    return _single(x, weight)


def _rotates(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> bool:
    return _single(x_TND, cos_TD, sin_TD)


def _activates(gate: Tensor, up: Tensor) -> bool:
    return _single(gate, up)


implementation("rms_norm", PROVIDER, supports=_normalises)(training.rms_norm)
implementation("rope", PROVIDER, supports=_rotates)(training.rope)
implementation("swiglu", PROVIDER, supports=_activates)(training.swiglu)


def _multiplies(x_TH: Tensor, weight_OH: Tensor, bias: Tensor | None) -> bool:
    return _single(x_TH, weight_OH) and (bias is None or _single(bias))


@implementation("linear", PROVIDER, supports=_multiplies)
def linear(x_TH: Tensor, weight_OH: Tensor, bias: Tensor | None) -> Tensor:
    return _differentiable(functions.linear, reference.linear, x_TH, weight_OH, bias)


def _generates(x_TH: Tensor, weights: LinearWeights) -> bool:
    return _multiplies(x_TH, weights.weight, weights.bias)


@implementation("inference_linear", PROVIDER, supports=_generates)
def inference_linear(x_TH: Tensor, weights: LinearWeights) -> Tensor:
    return functions.inference_linear(x_TH.contiguous(), weights)


def _generates_layer(
    x_TH: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    weights: LayerWeights,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    sequences: PagedSequences,
) -> bool:
    single = x_TH.dtype == torch.float32
    return single and takes_layer(x_TH, cos_TD, sin_TD, weights, keys_PSKD, values_PSKD, sequences)


implementation("inference_layer", PROVIDER, supports=_generates_layer)(functions.inference_layer)


def _attends_packed(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> bool:
    return _single(q_TND, k_TKD, v_TKD)


@implementation("packed_attention", PROVIDER, supports=_attends_packed)
def packed_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> Tensor:
    return _differentiable(functions.packed_attention, reference.packed_attention, q_TND, k_TKD, v_TKD, sequences)


def _attends_paged(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, sequences: PagedSequences
) -> bool:
    caches = keys_PSKD.is_contiguous() and values_PSKD.is_contiguous()
    return caches and _single(q_TND, k_TKD, v_TKD, keys_PSKD, values_PSKD)


@implementation("paged_attention", PROVIDER, supports=_attends_paged)
def paged_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, sequences: PagedSequences
) -> Tensor:
    q_TND, k_TKD, v_TKD = (x.contiguous() for x in (q_TND, k_TKD, v_TKD))
    return functions.paged_attention(q_TND, k_TKD, v_TKD, keys_PSKD, values_PSKD, sequences)


def _scores(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float) -> bool:
    return _single(hidden_TH, weight_VH)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return functions.linear(hidden, weight, None)


@implementation("linear_log_prob", PROVIDER, supports=_scores)
def linear_log_prob(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logits by :func:`linear`; log-probs by the code that draws tokens."""
    tensors = (x.contiguous() for x in (hidden_TH, weight_VH, target_T))
    return training.LinearLogProb.apply(*tensors, temperature, _logits)


def _draws(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> bool:
    return _single(logits_BV, uniform_B)


@implementation("categorical", PROVIDER, supports=_draws)
def categorical(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return functions.categorical(logits_BV.contiguous(), uniform_B.contiguous(), temperature)


def _judges(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> bool:
    return _single(logits_BV)


@implementation("token_log_prob", PROVIDER, supports=_judges)
def token_log_prob(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
    return functions.token_log_prob(logits_BV.contiguous(), tokens_B.contiguous(), temperature)
