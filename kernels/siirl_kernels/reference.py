"""PyTorch references of the ops. They run on any device and define what the other providers must compute.

Shapes: T packed tokens, H hidden, N query heads, K key/value heads, D head size, V vocabulary, B sequences, O outputs,
P blocks of a cache, S slots of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from siirl_kernels.linear_log_prob import LinearLogProb
from siirl_kernels.packing import PackedSequences
from siirl_kernels.paging import PagedSequences
from siirl_kernels.registry import kernels, op
from siirl_kernels.weights import LayerWeights, LinearWeights


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
def paged_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, sequences: PagedSequences
) -> Tensor:
    """Put new keys and values into the cache, in place, then attend causally to what the cache holds of each sequence.

    The j-th of a sequence's n new tokens is at position length - n + j and sees every position up to its own, scale
    1/sqrt(D). No gradient. Slots that no token was written to may hold anything, NaN too.

    Returns:
        [T, N, D] in q's dtype.
    """
    size = keys_PSKD.shape[1]
    column = torch.arange(sequences.longest, device=q_TND.device)
    for cache_PSKD, new_TKD in ((keys_PSKD, k_TKD), (values_PSKD, v_TKD)):
        cache_PSKD[sequences.slots // size, sequences.slots % size] = new_TKD
    if sequences.longest_query == 1 and len(q_TND) == len(sequences.lengths):
        # one new token each: nothing depends on numbers that only the device has, so it can be recorded as a graph
        written_BL = column < sequences.lengths[:, None]
        k_BLKD, v_BLKD = (_cached(x, sequences.tables, written_BL) for x in (keys_PSKD, values_PSKD))
        return _attend(q_TND[:, None], k_BLKD, v_BLKD, written_BL[:, None])[:, 0]
    out_TND = torch.empty_like(q_TND)
    for rows in sequences.alike if len(q_TND) else ():
        starts_B, lengths_B = sequences.starts[rows].long(), sequences.lengths[rows]
        counts_B = sequences.starts[rows + 1] - starts_B
        # longest first, so that the first has the group's number of new tokens
        within = torch.arange(int(counts_B[0]), device=q_TND.device)
        position_BQ = (lengths_B - counts_B)[:, None] + within
        written_BL = column < lengths_B[:, None]
        k_BLKD, v_BLKD = (_cached(x, sequences.tables[rows], written_BL) for x in (keys_PSKD, values_PSKD))
        index_BQ = (starts_B[:, None] + within).clamp(max=len(q_TND) - 1)
        out_BQND = _attend(q_TND[index_BQ], k_BLKD, v_BLKD, column <= position_BQ[..., None])
        there_BQ = within < counts_B[:, None]
        out_TND[index_BQ[there_BQ]] = out_BQND[there_BQ]
    return out_TND


def _cached(cache_PSKD: Tensor, tables_BM: Tensor, written_BL: Tensor) -> Tensor:
    """What the cache holds of each sequence, [B, L, K, D], and zeros where nothing is written."""
    longest = written_BL.shape[1]
    found_BLKD = cache_PSKD[tables_BM[:, : -(-longest // cache_PSKD.shape[1])].long()].flatten(1, 2)[:, :longest]
    return found_BLKD.masked_fill(~written_BL[..., None, None], 0.0)


def _attend(q_BQND: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, mask_BQL: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BQND, k_BLKD, v_BLKD))
    grouped = q.shape[1] != k.shape[1]
    if q.shape[2] > 1:
        out = F.scaled_dot_product_attention(q, k, v, mask_BQL[:, None], enable_gqa=grouped)
        return out.transpose(1, 2)
    # one query is too little work for a fused kernel on a CPU: two batched products are faster, most on a long cache
    batch, heads, _, size = q.shape
    scores_BKGL = (q * size**-0.5).reshape(batch, k.shape[1], -1, size) @ k.transpose(2, 3)
    weights_BKGL = scores_BKGL.masked_fill_(~mask_BQL[:, None], -torch.inf).softmax(-1, dtype=_wide(q))
    return (weights_BKGL.to(q.dtype) @ v).reshape(batch, 1, heads, size)


@op
def linear(x_TH: Tensor, weight_OH: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias, [T, O]: what training computes with, so a token's bits must not depend on T."""
    return F.linear(x_TH, weight_OH, bias)


@op
def inference_linear(x_TH: Tensor, weights: LinearWeights) -> Tensor:
    """As :func:`linear`, without gradients: what generation computes with, where T is small.

    ``weights.one_result`` allows the result to be overwritten by that of the next call with these weights.
    """
    return kernels.linear(x_TH, weights.weight, weights.bias)


@op
def inference_layer(
    x_TH: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    weights: LayerWeights,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    sequences: PagedSequences,
) -> Tensor:
    """A decoder layer on the new tokens of sequences in a paged cache (:func:`paged_attention`), without gradients.

    The reference is made of the other ops, as they are bound.

    Args:
        x_TH: the residual stream, in the weights' dtype.
        cos_TD: and ``sin_TD``, of the new tokens' angles (:func:`rope`).

    Returns:
        The residual stream behind the layer, [T, H].
    """
    tokens, size = cos_TD.shape
    normed_TH = kernels.rms_norm(x_TH, weights.input_norm, weights.eps)
    projections = (weights.q, weights.k, weights.v)
    q, k, v = (kernels.inference_linear(normed_TH, w).view(tokens, len(w.weight) // size, size) for w in projections)
    q = q if weights.q_norm is None else kernels.rms_norm(q, weights.q_norm, weights.eps)
    k = k if weights.k_norm is None else kernels.rms_norm(k, weights.k_norm, weights.eps)
    q, k = kernels.rope(q, cos_TD, sin_TD), kernels.rope(k, cos_TD, sin_TD)
    mixed_TND = kernels.paged_attention(q, k, v, keys_PSKD, values_PSKD, sequences)
    x_TH = x_TH + kernels.inference_linear(mixed_TND.flatten(1), weights.o)
    normed_TH = kernels.rms_norm(x_TH, weights.post_norm, weights.eps)
    gate, up = (kernels.inference_linear(normed_TH, w) for w in (weights.gate, weights.up))
    return x_TH + kernels.inference_linear(kernels.swiglu(gate, up), weights.down)


@op
def categorical(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row from softmax(logits / temperature), inverting the distribution at a uniform number.

    Args:
        uniform_B: in [0, 1), on the host or where the logits are.
        temperature: 0 takes the likeliest token, the first of equals, and its log-prob at temperature 1.

    Returns:
        tokens int64 [B], the first at which the cumulated probability exceeds the uniform number, and their log-probs
        float32 [B]. All is computed in float32 (float64 for such logits).
    """
    scaled_BV = logits_BV.to(_wide(logits_BV))
    if temperature not in (0.0, 1.0):
        scaled_BV = scaled_BV / temperature
    log_p_BV = torch.log_softmax(scaled_BV, dim=-1)
    tokens_B = scaled_BV.argmax(-1) if temperature == 0 else _invert(log_p_BV, uniform_B.to(log_p_BV.device))
    return tokens_B, log_p_BV.gather(1, tokens_B[:, None]).squeeze(1)


@op
def token_log_prob(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
    """Log-probs of given tokens under softmax(logits / temperature), float32 [B]; 0 counts as temperature 1.

    Of the same bits as those of :func:`categorical` for the tokens that it draws.
    """
    scaled_BV = logits_BV.to(_wide(logits_BV))
    if temperature not in (0.0, 1.0):
        scaled_BV = scaled_BV / temperature
    return torch.log_softmax(scaled_BV, dim=-1).gather(1, tokens_B[:, None]).squeeze(1)


def _invert(log_p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    cdf_BV = log_p_BV.exp().cumsum(-1)
    total_B1 = cdf_BV[:, -1:]
    # rounding must not put the product at the total itself, past the last token
    wanted_B1 = torch.minimum(uniform_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(cdf_BV, wanted_B1, right=True).squeeze(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
