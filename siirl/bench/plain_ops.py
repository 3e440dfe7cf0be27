"""The ops' formulas in plain PyTorch, step by step: what the provider ``torch`` is measured against.

They are written apart from the references, and slower, so that a reference that becomes slower shows. Arguments, shapes
and results are those of `siirl_kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from siirl_kernels.packing import PackedSequences
from siirl_kernels.paging import PagedSequences
from siirl_kernels.weights import LayerWeights, LinearWeights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Each half turned by itself."""
    half = x_TND.shape[-1] // 2
    first, second = x_TND[..., :half], x_TND[..., half:]
    cos, sin = cos_TD[:, None, :half], sin_TD[:, None, :half]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate · sigmoid(gate) · up."""
    return gate * torch.sigmoid(gate) * up


def packed_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> Tensor:
    """One call for each sequence, whose shared tokens are taken from its parent's."""
    starts, out = sequences.starts.tolist(), []
    for row, length in enumerate(sequences.lengths):
        own = slice(starts[row], starts[row] + length)
        shared = slice(0, 0)
        if sequences.prefixes and sequences.prefixes[row]:
            first = starts[sequences.parents[row]]
            shared = slice(first, first + sequences.prefixes[row])
        k, v = (torch.cat((x[shared], x[own])).transpose(0, 1) for x in (k_TKD, v_TKD))
        mask = torch.ones(length, k.shape[1], dtype=torch.bool, device=k.device).tril(k.shape[1] - length)
        q = q_TND[own].transpose(0, 1)
        out.append(F.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


def linear_log_prob(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """All logits at once."""
    log_p = ((hidden_TH @ weight_VH.t()).float() / temperature).log_softmax(-1)
    return log_p.gather(1, target_T[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def paged_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, sequences: PagedSequences
) -> Tensor:
    """One call for each sequence over its blocks, as in a loop over requests."""
    for cache, new in ((keys_PSKD, k_TKD), (values_PSKD, v_TKD)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, sequences.slots, new)
    out, starts, lengths = [], sequences.starts.tolist(), sequences.lengths.tolist()
    for row, length in enumerate(lengths):
        table = sequences.tables[row, : -(-length // keys_PSKD.shape[1])].long()
        k, v = (x[table].flatten(0, 1)[:length].transpose(0, 1) for x in (keys_PSKD, values_PSKD))
        q = q_TND[starts[row] : starts[row + 1]].transpose(0, 1)
        mask = torch.ones(q.shape[1], length, dtype=torch.bool, device=k.device).tril(length - q.shape[1])
        out.append(F.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


def linear(x_TH: Tensor, weight_OH: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias."""
    out = x_TH @ weight_OH.t()
    return out if bias is None else out + bias


def inference_linear(x_TH: Tensor, weights: LinearWeights) -> Tensor:
    """The same."""
    return linear(x_TH, weights.weight, weights.bias)


def inference_layer(
    x_TH: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    weights: LayerWeights,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    sequences: PagedSequences,
) -> Tensor:
    """Attention, then the MLP, each added to the residual stream."""
    x = rms_norm(x_TH, weights.input_norm, weights.eps)
    q, k, v = (
        inference_linear(x, w).unflatten(1, (len(w.weight) // cos_TD.shape[1], -1))
        for w in (weights.q, weights.k, weights.v)
    )
    if weights.q_norm is not None:
        q = rms_norm(q, weights.q_norm, weights.eps)
    if weights.k_norm is not None:
        k = rms_norm(k, weights.k_norm, weights.eps)
    q, k = rope(q, cos_TD, sin_TD), rope(k, cos_TD, sin_TD)
    mixed = paged_attention(q, k, v, keys_PSKD, values_PSKD, sequences)
    x_TH = x_TH + inference_linear(mixed.flatten(1), weights.o)
    x = rms_norm(x_TH, weights.post_norm, weights.eps)
    return x_TH + inference_linear(
        swiglu(inference_linear(x, weights.gate), inference_linear(x, weights.up)), weights.down
    )


def categorical(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The first token whose cumulated probability exceeds the uniform number, and its log-prob."""
    log_p = (logits_BV.float() / (temperature or 1.0)).log_softmax(-1)
    cdf = log_p.exp().cumsum(-1)
    tokens = (cdf <= uniform_B.to(cdf.device)[:, None]).sum(-1).clamp(max=cdf.shape[1] - 1)
    if temperature == 0:
        tokens = log_p.argmax(-1)
    return tokens, log_p.gather(1, tokens[:, None]).squeeze(1)


def token_log_prob(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
    """log softmax."""
    log_p = (logits_BV.float() / (temperature or 1.0)).log_softmax(-1)
    return log_p.gather(1, tokens_B[:, None]).squeeze(1)


def group_advantages(reward_N: Tensor, group_id_N: Tensor, valid_N: Tensor, norm_std: bool, eps: float) -> Tensor:
    """Group after group."""
    out = torch.zeros_like(reward_N)
    for group in group_id_N.unique():
        rows = (group_id_N == group) & valid_N
        if rows.sum() > 1:
            found = reward_N[rows].double()
            centred = found - found.mean()
            out[rows] = (centred / (found.std() + eps) if norm_std else centred).to(out.dtype)
    return out


def gae(token_rewards_T: Tensor, values_T: Tensor, offsets: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Token after token of the responses padded to one length, as most libraries do it."""
    lengths = offsets.diff()
    there = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    rewards, values = (
        torch.zeros(there.shape, device=lengths.device).masked_scatter(there, x.float())
        for x in (token_rewards_T, values_T)
    )
    columns, after, carried = [], torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(there.shape[1])):
        carried = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * carried
        after = values[:, t]
        columns.append(carried)
    advantages = torch.stack(columns[::-1], 1)[there]
    return advantages, advantages + values_T


def policy_loss(
    log_probs_T: Tensor,
    old_log_probs_T: Tensor,
    advantages_T: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Left to autograd."""
    log_ratio = log_probs_T.float() - old_log_probs_T.float()
    ratio = log_ratio.clamp(-20.0, 20.0).exp()
    unclipped = -advantages_T * ratio
    bounded = -advantages_T * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss, dual_clipped = torch.maximum(unclipped, bounded), torch.zeros_like(ratio)
    if dual_clip is not None:
        ceiling = torch.where(advantages_T < 0, -dual_clip * advantages_T, torch.inf)
        dual_clipped, loss = (loss > ceiling).float(), torch.minimum(loss, ceiling)
    return loss, ratio.detach(), (bounded > unclipped).float(), -log_ratio.detach(), dual_clipped.detach()


def gradient_norm(tensors: list[Tensor]) -> Tensor:
    """The root of the sum of all squares."""
    return torch.stack([x.float().square().sum() for x in tensors]).sum().sqrt()


def adamw_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Parameter after parameter."""
    for p, g, m, v in zip(parameters, gradients, exp_avgs, exp_avg_sqs, strict=True):
        p.mul_(1 - lr * weight_decay)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - beta2**step)).sqrt_().add_(eps)
        p.addcdiv_(m, root, value=-lr / (1 - beta1**step))


def cast_pack(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Each cast, then put together."""
    return torch.cat([x.reshape(-1).to(dtype) for x in tensors])


def permute_tokens(x_TH: Tensor, places_TK: Tensor) -> Tensor:
    """Every token K times, sorted by place."""
    return x_TH.repeat_interleave(places_TK.shape[1], 0)[places_TK.flatten().argsort()]


def unpermute_tokens(x_RH: Tensor, places_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """All copies at once, weighed and added up."""
    return (x_RH[places_TK] * weights_TK[..., None].to(x_RH.dtype)).sum(1)


def grouped_linear(x_RH: Tensor, offsets: Tensor, weight_EOH: Tensor) -> Tensor:
    """A product for every expert, rows or not."""
    parts = x_RH.split(offsets.diff().tolist())
    return torch.cat([part @ weight.t() for part, weight in zip(parts, weight_EOH, strict=True)])


_FORMULAS = (
    rms_norm,
    rope,
    swiglu,
    packed_attention,
    linear_log_prob,
    paged_attention,
    linear,
    inference_linear,
    inference_layer,
    categorical,
    token_log_prob,
    group_advantages,
    gae,
    policy_loss,
    gradient_norm,
    adamw_step,
    cast_pack,
    permute_tokens,
    unpermute_tokens,
    grouped_linear,
)
PLAIN: dict[str, Callable[..., Any]] = {f.__name__: f for f in _FORMULAS}
