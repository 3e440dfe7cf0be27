"""The ops of training in C++, with their gradients; results that need no gradient leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from siirl_kernels.linear_log_prob import chunks, keeps
from siirl_kernels.native import functions
from siirl_kernels.packing import PackedSequences
from siirl_kernels.registry import implementation

_DTYPES = (torch.float32, torch.bfloat16)


def _takes(*tensors: Tensor) -> bool:
    """Whether the tensors are of one dtype that the library has, on the host."""
    dtype = tensors[0].dtype
    if dtype not in _DTYPES:
        return False
    for x in tensors:  # noqa: SIM110 (asked thousands of times a step: all() takes twice as long)
        if x.dtype != dtype or not x.is_cpu:
            return False
    return True


def _recorded(*tensors: Tensor) -> bool:
    """Whether a gradient may be asked for."""
    if not torch.is_grad_enabled():
        return False
    return any(x.requires_grad for x in tensors)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return functions.rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return *functions.rms_norm_gradient(x, weight, ctx.eps, grad.contiguous()), None


def _normalises(x: Tensor, weight: Tensor, eps: float) -> bool:
    return _takes(x, weight)


@implementation("rms_norm", "native", supports=_normalises)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    return _RMSNorm.apply(x, weight, eps) if _recorded(x, weight) else functions.rms_norm(x, weight, eps)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return functions.rope(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return functions.rope_gradient(grad.contiguous(), *ctx.saved_tensors), None, None


def _rotates(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> bool:
    return _takes(x_TND, cos_TD, sin_TD)


@implementation("rope", "native", supports=_rotates)
def rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    x_TND, cos_TD, sin_TD = x_TND.contiguous(), cos_TD.contiguous(), sin_TD.contiguous()
    return _Rope.apply(x_TND, cos_TD, sin_TD) if _recorded(x_TND) else functions.rope(x_TND, cos_TD, sin_TD)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functions.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return functions.swiglu_gradient(gate, up, grad.contiguous())


def _activates(gate: Tensor, up: Tensor) -> bool:
    return _takes(gate, up)


@implementation("swiglu", "native", supports=_activates)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    return _SwiGLU.apply(gate, up) if _recorded(gate, up) else functions.swiglu(gate, up)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences) -> Tensor:
        out, sums = functions.training_attention(q, k, v, sequences)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.sequences = sequences
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, sums = ctx.saved_tensors
        found = functions.training_attention_gradient(q, k, v, ctx.sequences, out, sums, grad.contiguous())
        return *found, None


def _attends(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> bool:
    return _takes(q_TND, k_TKD, v_TKD)


@implementation("packed_attention", "native", supports=_attends)
def packed_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> Tensor:
    q_TND, k_TKD, v_TKD = q_TND.contiguous(), k_TKD.contiguous(), v_TKD.contiguous()
    if _recorded(q_TND, k_TKD, v_TKD):
        return _Attention.apply(q_TND, k_TKD, v_TKD, sequences)
    return functions.training_attention(q_TND, k_TKD, v_TKD, sequences)[0]


Product = Callable[[Tensor, Tensor], Tensor]
"""hidden [T, H], weight [V, H] -> logits [T, V]"""


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight.t()


class LinearLogProb(torch.autograd.Function):
    """As the reference; each pass over a chunk's logits, which ``product`` computes, does all that is asked of them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, product: Product
    ) -> tuple[Tensor, Tensor]:
        tokens, vocabulary = len(hidden), len(weight)
        log_prob = torch.empty(tokens, dtype=torch.float32)
        entropy, sums = torch.empty_like(log_prob), torch.empty(tokens, 2)
        kept: list[Tensor] = []
        for start, end in chunks(tokens, vocabulary):
            logits = product(hidden[start:end], weight)
            part = (x[start:end] for x in (log_prob, entropy, sums))
            functions.log_prob_of(logits, target[start:end], temperature, *part)
            if keeps(tokens, vocabulary):
                kept.append(logits)
        ctx.save_for_backward(hidden, weight, target, entropy, sums, *kept)
        ctx.temperature, ctx.product = temperature, product
        ctx.set_materialize_grads(False)
        return log_prob, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, target, entropy, sums, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # hundreds of chunks would round away in bfloat16
        grad_log_prob = torch.zeros_like(entropy) if grad_log_prob is None else grad_log_prob.contiguous()
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        for i, (start, end) in enumerate(chunks(len(hidden), len(weight))):
            logits = kept[i] if kept else ctx.product(hidden[start:end], weight)
            grad = torch.empty_like(logits) if kept else logits
            functions.log_prob_gradient(
                logits,
                target[start:end],
                ctx.temperature,
                sums[start:end],
                entropy[start:end],
                grad_log_prob[start:end],
                None if grad_entropy is None else grad_entropy[start:end],
                grad,
            )
            torch.mm(grad, weight, out=grad_hidden[start:end])
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), hidden[start:end])
            else:
                grad_weight += grad.t() @ hidden[start:end]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _scores(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float) -> bool:
    return _takes(hidden_TH, weight_VH)


@implementation("linear_log_prob", "native", supports=_scores)
def linear_log_prob(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    hidden_TH, target_T = hidden_TH.contiguous(), target_T.contiguous()
    return LinearLogProb.apply(hidden_TH, weight_VH, target_T, temperature, _product)
