"""Packed sequences: where each begins, and padded buckets of like lengths for ops that want a rectangle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# A bucket ends where a sequence would be padded to more than this multiple of its own length.
_MAX_PADDING = 1.5


@dataclass(frozen=True)
class Bucket:
    """Sequences padded to one length: ``index`` [rows, length] points into the packed tokens, -1 where padded.

    ``whole`` marks the bucket that holds all tokens in order without padding: a plain view.
    """

    rows: int
    length: int
    source: Tensor  # [tokens of the bucket] positions in the packed order
    target: Tensor  # [tokens of the bucket] positions in the padded rectangle
    whole: bool


@dataclass(frozen=True)
class PackedSequences:
    """Boundaries of packed sequences.

    Args:
        lengths: tokens of each sequence, in packed order; all positive.
        device: where index tensors live.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def positions(self) -> Tensor:
        """Position of each packed token within its sequence, int64 [T]."""
        return _ranges(torch.tensor(self.lengths, dtype=torch.int64)).to(self.device)

    @cached_property
    def starts(self) -> Tensor:
        """First packed token of each sequence, int64 [B], on the host."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return lengths.cumsum(0) - lengths

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Rectangles that cover all sequences."""
        if len(set(self.lengths)) == 1:
            tokens = torch.arange(sum(self.lengths), device=self.device)
            return (Bucket(len(self.lengths), self.lengths[0], tokens, tokens, True),)
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        groups: list[list[int]] = []
        for i in order:
            if not groups or self.lengths[groups[-1][0]] > _MAX_PADDING * self.lengths[i]:
                groups.append([])
            groups[-1].append(i)
        return tuple(self._bucket(rows) for rows in groups)

    def _bucket(self, rows: list[int]) -> Bucket:
        lengths = torch.tensor([self.lengths[i] for i in rows], dtype=torch.int64)
        length = int(lengths[0])
        within = _ranges(lengths)
        source = torch.repeat_interleave(self.starts[rows], lengths) + within
        target = torch.repeat_interleave(torch.arange(len(rows)) * length, lengths) + within
        return Bucket(len(rows), length, source.to(self.device), target.to(self.device), False)


def _ranges(lengths: Tensor) -> Tensor:
    """0 … n-1 for each n of ``lengths``, concatenated."""
    total = int(lengths.sum())
    return torch.arange(total) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)


class _Scatter(torch.autograd.Function):
    """Rows ``source`` of x, written to rows ``target`` of zeros; both index sets are free of repeats."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, target: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(source, target)
        ctx.rows = x.shape[0]
        return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, target, x.index_select(0, source))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        source, target = ctx.saved_tensors
        out = grad.new_zeros((ctx.rows, *grad.shape[1:])).index_copy_(0, source, grad.index_select(0, target))
        return out, None, None, None


def pad(x: Tensor, bucket: Bucket) -> Tensor:
    """The bucket's tokens of ``x`` [T, ...] as a rectangle [rows, length, ...], zeros after each sequence's end."""
    shape = (bucket.rows, bucket.length, *x.shape[1:])
    if bucket.whole:
        return x.reshape(shape)
    return _Scatter.apply(x, bucket.source, bucket.target, bucket.rows * bucket.length).reshape(shape)


def unpad(parts: list[tuple[Tensor, Bucket]], tokens: int) -> Tensor:
    """The inverse of :func:`pad` over all buckets: [tokens, ...] in packed order."""
    total: Tensor | None = None
    for x, bucket in parts:
        flat = x.reshape(-1, *x.shape[2:])
        if not bucket.whole:
            flat = _Scatter.apply(flat, bucket.target, bucket.source, tokens)
        total = flat if total is None else total + flat
    assert total is not None, "no sequence was packed"
    return total
