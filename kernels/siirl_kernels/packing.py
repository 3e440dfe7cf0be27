"""Packed sequences: where each begins, and padded buckets of like lengths for ops that want a rectangle.

Sequences that begin with the same prompt share its tokens: these are packed, and computed by every layer, once; only as
keys and values of attention are they repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# A bucket ends where a sequence would be padded to more than this multiple of its own length.
_MAX_PADDING = 1.5
# Elements of a bucket's mask; where it would be larger, queries of the shared tokens are computed again instead.
_MAX_MASK = 16 * 2**20


@dataclass(frozen=True)
class Rectangle:
    """Parts of sequences padded to one length; what stands behind a part's end is some token.

    Attributes:
        real: bool [rows, length], False where padded.
        index: int64 [rows · length], the packed token at each place; None where the rectangle is a plain view.
    """

    real: Tensor
    index: Tensor | None

    @property
    def length(self) -> int:
        return self.real.shape[1]

    def pad(self, x: Tensor) -> Tensor:
        """``x`` [T, ...] as [rows, length, ...]."""
        chosen = x if self.index is None else x.index_select(0, self.index)
        return chosen.reshape(*self.real.shape, *x.shape[1:])


@dataclass(frozen=True)
class Bucket:
    """Sequences whose attention is one call.

    Attributes:
        queries: the tokens that attend.
        keys: the whole sequences.
        mask: bool [queries, keys], True where one may attend to the other; None where both are the same tokens and
            attention is plainly causal. A query never sees the padding behind it.
    """

    queries: Rectangle
    keys: Rectangle
    mask: Tensor | None


@dataclass(frozen=True)
class PackedSequences:
    """Boundaries of packed sequences.

    Args:
        lengths: packed tokens of each sequence, in packed order: those it does not share with an earlier one.
        device: where index tensors live.
        parents: for each sequence an earlier one that shares nothing itself, or its own index; empty: nothing shared.
        prefixes: how many of its parent's first tokens each sequence begins with; 0 where it is its own parent.
    """

    lengths: tuple[int, ...]
    device: torch.device
    parents: tuple[int, ...] = ()
    prefixes: tuple[int, ...] = ()

    @cached_property
    def positions(self) -> Tensor:
        """Position of each packed token within its sequence, int64 [T]."""
        return (_ranges(self._lengths) + self._prefixes.repeat_interleave(self._lengths)).to(self.device)

    @cached_property
    def starts(self) -> Tensor:
        """First packed token of each sequence, int64 [B], on the host."""
        return self._lengths.cumsum(0) - self._lengths

    @cached_property
    def ends(self) -> Tensor:
        """0 and where each sequence's own tokens end, int32 [B+1]: cumulated lengths, as devices' kernels take them."""
        return torch.cat((torch.zeros(1, dtype=torch.int64), self._lengths.cumsum(0))).to(self.device, torch.int32)

    @cached_property
    def whole(self) -> Tensor | None:
        """The packed tokens of the whole sequences, one sequence after another, int64; None where nothing is shared."""
        if not self.parents:
            return None
        whole = self._prefixes + self._lengths
        within, prefixes = _ranges(whole), self._prefixes.repeat_interleave(whole)
        shared = self.starts[list(self.parents)].repeat_interleave(whole) + within
        own = self.starts.repeat_interleave(whole) + within - prefixes
        return torch.where(within < prefixes, shared, own).to(self.device)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Rectangles that cover all sequences."""
        return tuple(self._bucket(rows) for rows in self._like_rows)

    def unpad(self, parts: list[Tensor]) -> Tensor:
        """From what each bucket's queries gave, [rows, queries, ...], to [T, ...] in packed order."""
        flat = [x.reshape(-1, *x.shape[2:]) for x in parts]
        if self.buckets[0].queries.index is None:
            return flat[0]
        return torch.cat(flat).index_select(0, self._places)

    @cached_property
    def _lengths(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int64)

    @cached_property
    def _prefixes(self) -> Tensor:
        return torch.tensor(self.prefixes or (0,) * len(self.lengths), dtype=torch.int64)

    @cached_property
    def _like_rows(self) -> list[list[int]]:
        """The rows of each bucket: equal prefixes, lengths that need little padding; longest first."""
        prefixes = self._prefixes.tolist()
        groups: list[list[int]] = []
        for i in sorted(range(len(prefixes)), key=lambda i: (prefixes[i], -self.lengths[i])):
            if not groups or prefixes[groups[-1][0]] != prefixes[i] or self._padded_too_much(groups[-1][0], i):
                groups.append([])
            groups[-1].append(i)
        return groups

    def _padded_too_much(self, longest: int, i: int) -> bool:
        prefix = int(self._prefixes[i])
        return prefix + self.lengths[longest] > _MAX_PADDING * (prefix + self.lengths[i])

    def _bucket(self, rows: list[int]) -> Bucket:
        prefix, longest = int(self._prefixes[rows[0]]), max(1, self.lengths[rows[0]])
        keys = self._rectangle(rows, 0, prefix + longest)
        if prefix == 0 or longest * (prefix + longest) > _MAX_MASK:
            return Bucket(keys, keys, None)
        mask = torch.ones(longest, prefix + longest, dtype=torch.bool, device=self.device).tril(prefix)
        return Bucket(self._rectangle(rows, prefix, prefix + longest), keys, mask)

    def _rectangle(self, rows: list[int], start: int, stop: int) -> Rectangle:
        """Columns ``start`` … ``stop`` of the whole sequences."""
        prefix, own = self._prefixes[rows][:, None], self._lengths[rows][:, None]
        column = torch.arange(start, stop)[None, :]
        real = column < prefix + own
        if start == 0 and not self.parents and rows == list(range(len(self.lengths))) and bool(real.all()):
            return Rectangle(real.to(self.device), None)
        shared = self.starts[[self.parents[i] for i in rows]][:, None] if self.parents else 0
        index = torch.where(column < prefix, shared + column, self.starts[rows][:, None] + column - prefix)
        return Rectangle(real.to(self.device), torch.where(real, index, 0).flatten().to(self.device))

    @cached_property
    def _places(self) -> Tensor:
        """Each packed token's place among the queries of all buckets, one after another."""
        places = torch.empty(sum(self.lengths), dtype=torch.int64)
        offset = 0
        for rows, bucket in zip(self._like_rows, self.buckets, strict=True):
            own, width = self._lengths[rows], bucket.queries.length
            first = torch.arange(len(rows)) * width + (self._prefixes[rows] if bucket.mask is None else 0)
            within = _ranges(own)
            places[self.starts[rows].repeat_interleave(own) + within] = offset + first.repeat_interleave(own) + within
            offset += len(rows) * width
        return places.to(self.device)


def _ranges(lengths: Tensor) -> Tensor:
    """0 … n-1 for each n of ``lengths``, concatenated."""
    return torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
