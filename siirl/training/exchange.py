"""Collectives that gradients flow through: between the workers of a tensor or context group.

A tensor is *the same* on all workers of a group, or *partial*: the true one is the sum over them. Rows are slices of
the first dimension; `counts` says how many each worker has, in rank order, none included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from siirl.device.collectives import Collectives

Counts = Sequence[int]


def shares(total: int, parts: int) -> list[int]:
    """``total`` rows in contiguous parts that differ by one at most, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def copy(x: Tensor, collectives: Collectives) -> Tensor:
    """``x`` itself, the same on all workers; its gradient, partial on each of them, is summed."""
    return _Copy.apply(x, collectives)


def reduce(x: Tensor, collectives: Collectives) -> Tensor:
    """The sum of a partial ``x``, whose gradient is the same on all workers."""
    return _Reduce.apply(x, collectives)


def gather(x: Tensor, counts: Counts, collectives: Collectives, *, partial: bool) -> Tensor:
    """Everybody's rows, [sum(counts), ...].

    Args:
        x: [counts[rank], ...].
        counts: rows of each worker.
        collectives: of the group.
        partial: the result's gradient is partial, and summed; else it is the same on all workers.
    """
    return _Gather.apply(x, list(counts), collectives, partial)


def scatter(x: Tensor, counts: Counts, collectives: Collectives, *, partial: bool) -> Tensor:
    """This worker's rows, [counts[rank], ...], of an ``x`` [sum(counts), ...] that is partial, or the same everywhere.

    The gradients of the rows are gathered, so that of ``x`` is the same on all workers.
    """
    return _Scatter.apply(x, list(counts), collectives, partial)


def exchange(x: Tensor, send: Counts, receive: Counts, collectives: Collectives) -> Tensor:
    """Give every worker its rows of ``x`` [sum(send), ...], get [sum(receive), ...]; gradients travel back."""
    return _Exchange.apply(x, list(send), list(receive), collectives)


def swap_rows(x: Tensor, send: Counts, receive: Counts, collectives: Collectives) -> Tensor:
    """As :func:`exchange`, without gradients."""
    width = x[:1].numel() * x.itemsize if len(x) else x.new_empty(1, *x.shape[1:]).nbytes
    flat = x.detach().contiguous().reshape(-1).view(torch.uint8)
    moved = collectives.all_to_all_bytes(flat, [n * width for n in send], [n * width for n in receive])
    return moved.view(x.dtype).view(sum(receive), *x.shape[1:])


def _gathered(x: Tensor, counts: list[int], collectives: Collectives) -> Tensor:
    copies = torch.cat([x] * collectives.size)
    return swap_rows(copies, [len(x)] * collectives.size, counts, collectives)


def _summed_rows(x: Tensor, counts: list[int], collectives: Collectives) -> Tensor:
    own = counts[collectives.rank]
    parts = swap_rows(x, counts, [own] * collectives.size, collectives)
    return parts.view(collectives.size, own, *x.shape[1:]).sum(0)


def _own_rows(x: Tensor, counts: list[int], collectives: Collectives) -> Tensor:
    return x.split(counts)[collectives.rank].contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, collectives: Collectives) -> Tensor:
        ctx.collectives = collectives
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.collectives.all_reduce(grad.clone(memory_format=torch.contiguous_format)), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, collectives: Collectives) -> Tensor:
        return collectives.all_reduce(x.detach().clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], collectives: Collectives, partial: bool) -> Tensor:
        ctx.known = counts, collectives
        ctx.back = _summed_rows if partial else _own_rows
        return _gathered(x.detach(), counts, collectives)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, *ctx.known), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], collectives: Collectives, partial: bool) -> Tensor:
        ctx.known = counts, collectives
        return (_summed_rows if partial else _own_rows)(x.detach(), counts, collectives)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _gathered(grad, *ctx.known), None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], collectives: Collectives) -> Tensor:
        ctx.known = receive, send, collectives
        return swap_rows(x, send, receive, collectives)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return swap_rows(grad, *ctx.known), None, None, None
