"""PyTorch references of the ops. They run on any device and define what the other providers must compute.

Shapes: T packed tokens, H hidden, N query heads, K key/value heads, D head size, V vocabulary, B sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from siirl_kernels.linear_log_prob import LinearLogProb
from siirl_kernels.packing import PackedSequences
from siirl_kernels.registry import op


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension (arXiv 1910.07467), result in x's dtype.

    Computed in float32, or in float64 where x is.
    """
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return weight * F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)


@op
def rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), halves layout: pairs are (i, i + D/2)."""
    first, second = x_TND.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_TND * cos_TD[:, None] + rotated * sin_TD[:, None]


@op
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate) * up


@op
def packed_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> Tensor:
    """Causal attention within each packed sequence, scale 1/sqrt(D); query heads share key heads in groups of N/K.

    Returns:
        [T, N, D] in q's dtype. Sequences of like lengths are padded together and computed in one call each, so the
        linear layers around never see a padding token.
    """
    grouped = q_TND.shape[1] != k_TKD.shape[1]
    parts = []
    for bucket in sequences.buckets:
        q, k, v = bucket.queries.pad(q_TND), bucket.keys.pad(k_TKD), bucket.keys.pad(v_TKD)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, bucket.mask, is_causal=bucket.mask is None, enable_gqa=grouped)
        parts.append(out.transpose(1, 2))
    return sequences.unpad(parts)


@op
def linear_log_prob(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of ``target`` under softmax(hidden · weightᵀ / temperature), and the distribution's entropy.

    Works through the tokens in chunks, so tokens × vocabulary is never in memory; the backward pass computes each
    chunk's logits again.

    Returns:
        log_prob [T] and entropy [T], float32; both differentiable in hidden and weight.
    """
    return LinearLogProb.apply(hidden_TH, weight_VH, target_T, temperature)


@op
def decode_attention(q_BND: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, keep_BL: Tensor) -> Tensor:
    """One new query per sequence against its cached keys and values, scale 1/sqrt(D).

    Args:
        keep_BL: bool, True where the cache holds a token of the sequence.

    Returns:
        [B, N, D] in q's dtype.
    """
    batch, heads, size = q_BND.shape
    keys = k_BKLD.shape[1]
    # one query is too little work for a fused kernel on a CPU: two batched products are faster, most on a long cache
    scores_BKGL = (q_BND * size**-0.5).view(batch, keys, heads // keys, size) @ k_BKLD.transpose(2, 3)
    weights_BKGL = scores_BKGL.masked_fill_(~keep_BL[:, None, None], -torch.inf).softmax(-1, dtype=torch.float32)
    return (weights_BKGL.to(q_BND.dtype) @ v_BKLD).view(batch, heads, size)
