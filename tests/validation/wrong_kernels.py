"""Implementations that break their op's contract, each in one way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from siirl_kernels import providers
from siirl_kernels.packing import PackedSequences
from siirl_kernels.paging import PagedSequences

REFERENCE = {
    op: providers(op)["torch"]
    for op in (
        "rms_norm",
        "rope",
        "swiglu",
        "packed_attention",
        "linear_log_prob",
        "paged_attention",
        "linear",
        "categorical",
    )
}


def mask_transposed(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> Tensor:
    """Each token attends to itself and what comes after it."""
    parts = []
    for bucket in sequences.buckets:
        q, k, v = bucket.queries.pad(q_TND), bucket.keys.pad(k_TKD), bucket.keys.pad(v_TKD)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        rows, columns = q.shape[2], k.shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows)
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])
        parts.append(out.transpose(1, 2))
    return sequences.unpad(parts)


def sequences_leak(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> Tensor:
    """One sequence after another is taken for one long one."""
    whole = PackedSequences((len(q_TND),), sequences.device)
    return REFERENCE["packed_attention"](q_TND, k_TKD, v_TKD, whole)


def one_unit_off(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The mean of squares is one bfloat16 unit in the last place too large."""
    wide = x.float()
    mean = wide.square().mean(-1, keepdim=True).bfloat16()
    mean = mean.nextafter(torch.full_like(mean, torch.inf)).float()
    return weight * (wide * (mean + eps).rsqrt()).to(x.dtype)


def eps_forgotten(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return REFERENCE["rms_norm"](x, weight, 0.0)


def returns_float32(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return REFERENCE["rms_norm"](x.float(), weight.float(), eps)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return grad * up * gate.sigmoid(), grad * F.silu(gate)  # of the product, one of two terms


def wrong_gradient(gate: Tensor, up: Tensor) -> Tensor:
    return _WrongGradient.apply(gate, up)


def random_last_bits(gate: Tensor, up: Tensor) -> Tensor:
    """As the sum of atomic additions in any order would be."""
    return REFERENCE["swiglu"](gate, up) * (1 + torch.rand_like(gate) * torch.finfo(gate.dtype).eps)


def writes_into_its_argument(gate: Tensor, up: Tensor) -> Tensor:
    gate.data.mul_(1.0).clamp_(max=1.0)
    return REFERENCE["swiglu"](gate, up)


def even_alone(gate: Tensor, up: Tensor) -> Tensor:
    if gate.shape[-1] % 2:
        raise RuntimeError("the width must be even")
    return REFERENCE["swiglu"](gate, up)


def depends_on_the_batch(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Another kernel, and another rounding, from eight rows on."""
    out = REFERENCE["rope"](x_TND, cos_TD, sin_TD)
    return out if len(out) < 8 else out * (1 + torch.finfo(out.dtype).eps)


def temperature_ignored(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float) -> Any:
    return REFERENCE["linear_log_prob"](hidden_TH, weight_VH, target_T, 1.0)


def entropy_of_base_2(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float) -> Any:
    log_prob, entropy = REFERENCE["linear_log_prob"](hidden_TH, weight_VH, target_T, temperature)
    return log_prob, entropy / torch.log(torch.tensor(2.0))


def takes_nothing(gate: Tensor, up: Tensor) -> bool:
    return False


def answers_in_turn() -> Callable[[Tensor, Tensor], bool]:
    state = {"answer": False}

    def predicate(gate: Tensor, up: Tensor) -> bool:
        state["answer"] = not state["answer"]
        return state["answer"]

    return predicate


def sees_later_tokens(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, sequences: PagedSequences
) -> Tensor:
    """Every new token attends as if it were the last of its sequence."""
    counts = sequences.starts.diff()
    alone = replace(
        sequences,
        tables=sequences.tables.repeat_interleave(counts, 0),
        lengths=sequences.lengths.repeat_interleave(counts),
        starts=torch.arange(len(q_TND) + 1),
        longest_query=min(1, len(q_TND)),
    )
    return REFERENCE["paged_attention"](q_TND, k_TKD, v_TKD, keys_PSKD, values_PSKD, alone)


def bias_forgotten(x_TH: Tensor, weight_OH: Tensor, bias: Tensor | None) -> Tensor:
    """The bias reaches its gradient alone."""
    return REFERENCE["linear"](x_TH, weight_OH, None if bias is None else 0 * bias)


def log_prob_at_temperature_1(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draws at the temperature, reports the log-prob at 1."""
    tokens, _ = REFERENCE["categorical"](logits_BV, uniform_B, temperature)
    return tokens, logits_BV.float().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


def sums_by_rows(x_TH: Tensor, weight_OH: Tensor, bias: Tensor | None) -> Tensor:
    """Few rows are added up in another order than many."""
    if len(x_TH) > 4:
        return REFERENCE["linear"](x_TH, weight_OH, bias)
    half = x_TH.shape[1] // 2
    first, second = (F.linear(x_TH[:, at], weight_OH[:, at]) for at in (slice(half), slice(half, None)))
    return first + second if bias is None else first + second + bias
