"""PyTorch references of a mixture of experts: tokens dealt out to their experts, one matrix product each, and back.

Shapes: T tokens, H hidden, K experts of a token, E experts, R = T · K rows, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from siirl_kernels.registry import kernels, op


def sort_by_expert(chosen_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Where each token's copies go when rows are sorted by expert, tokens of one expert in their own order.

    Plain integers, no op: there is nothing to choose an implementation for.

    Args:
        chosen_TK: int64, the experts of each token.
        experts: E.

    Returns:
        places_TK int64, a permutation of 0 … R-1, and offsets int64 [E+1]: expert e has the rows offsets[e] …
        offsets[e+1]-1. Both are on the device of ``chosen_TK`` and cost it no wait.
    """
    sorted_R, order_R = chosen_TK.flatten().sort(stable=True)
    places_R = torch.empty_like(order_R)
    places_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    bounds = torch.arange(experts + 1, device=order_R.device)
    return places_R.view_as(chosen_TK), torch.searchsorted(sorted_R, bounds)


@op
def permute_tokens(x_TH: Tensor, places_TK: Tensor) -> Tensor:
    """A copy of token t at each row of places_TK[t], [R, H]; the places are a permutation of 0 … R-1."""
    return _Permute.apply(x_TH, places_TK)


@op
def unpermute_tokens(x_RH: Tensor, places_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Each token's copies added up by their weights, Σ_k weights_TK[t, k] · x_RH[places_TK[t, k]].

    Args:
        weights_TK: in the dtype of ``x_RH`` or a wider one.

    Returns:
        [T, H] in the dtype of ``x_RH``, added up in float32 (float64 of such) in the order of k.
    """
    return _Unpermute.apply(x_RH, places_TK, weights_TK)


@op
def grouped_linear(x_RH: Tensor, offsets: Tensor, weight_EOH: Tensor) -> Tensor:
    """x · weight[e]ᵀ for the rows of each expert e, [R, O].

    The reference calls ``linear``, as it is bound, for each expert that has rows; reading where these begin waits for a
    device.

    Args:
        x_RH: rows sorted by expert.
        offsets: int64 [E+1], expert e has the rows offsets[e] … offsets[e+1]-1; offsets[0] = 0, offsets[E] = R.
    """
    bounds = offsets.tolist()
    pieces = [
        kernels.linear(x_RH[start:end], weight_OH, None)
        # one node of the graph for all experts: a gradient is written once, not once an expert
        for weight_OH, start, end in zip(weight_EOH.unbind(0), bounds, bounds[1:], strict=False)
        if end > start
    ]
    return torch.cat(pieces) if pieces else kernels.linear(x_RH, weight_EOH[0], None)


def _tokens(places_TK: Tensor) -> Tensor:
    """The token of each row, int64 [R]."""
    count, each = places_TK.shape
    tokens = torch.empty(count * each, dtype=torch.int64, device=places_TK.device)
    tokens[places_TK.flatten()] = torch.arange(count, device=places_TK.device).repeat_interleave(each)
    return tokens


def _sum(x_RH: Tensor, places_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    wide = torch.float64 if x_RH.dtype == torch.float64 else torch.float32
    out_TH = x_RH.new_zeros(len(places_TK), x_RH.shape[1], dtype=wide)
    for k in range(places_TK.shape[1]):
        copy_TH = x_RH.index_select(0, places_TK[:, k]).to(wide)
        out_TH += copy_TH if weights_TK is None else copy_TH * weights_TK[:, k, None].to(wide)
    return out_TH.to(x_RH.dtype)


class _Permute(torch.autograd.Function):
    """Its gradient is a sum over each token's copies: gathered, so that the order of additions is one."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(places_TK)
        return x_TH.index_select(0, _tokens(places_TK))

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_RH, ctx.saved_tensors[0], None), None


class _Unpermute(torch.autograd.Function):
    """Keeps the rows, not their weighted copies."""

    @staticmethod
    def forward(ctx: Any, x_RH: Tensor, places_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(x_RH, places_TK, weights_TK)
        return _sum(x_RH, places_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, Tensor]:
        x_RH, places_TK, weights_TK = ctx.saved_tensors
        wide = torch.float64 if x_RH.dtype == torch.float64 else torch.float32
        grad_RH, grad_TK = torch.empty_like(x_RH), torch.empty_like(weights_TK)
        for k in range(places_TK.shape[1]):
            at_T = places_TK[:, k]
            grad_RH[at_T] = (grad_TH.to(wide) * weights_TK[:, k, None].to(wide)).to(x_RH.dtype)
            grad_TK[:, k] = (grad_TH.to(wide) * x_RH.index_select(0, at_T).to(wide)).sum(-1).to(weights_TK.dtype)
        return grad_RH, None, grad_TK
