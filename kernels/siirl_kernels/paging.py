"""Sequences in a paged cache: which blocks hold each one, and which of its tokens are new.

The convention is that of block tables and packed queries (FlashAttention's ``block_table`` and ``cu_seqlens_q``), so
the kernels of devices map onto it. Shapes: T new tokens, B sequences, M blocks a sequence has at most, S slots a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedSequences:
    """One call's sequences. The new tokens of a sequence are its last ones and lie together among the packed T tokens.

    Attributes:
        tables: int32 [B, M], the cache blocks of each sequence; what stands behind its last block is any block.
        lengths: int32 [B], tokens of each sequence in the cache, the new ones included.
        starts: int32 [B + 1], where each sequence's new tokens begin among the packed ones; the last is T.
        slots: int64 [T], where each new token is cached: block * S + offset.
        longest: the largest of the lengths.
        longest_query: the largest number of new tokens of a sequence.
    """

    tables: Tensor
    lengths: Tensor
    starts: Tensor
    slots: Tensor
    longest: int
    longest_query: int

    @classmethod
    def of(
        cls,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        counts: Sequence[int],
        block_size: int,
        device: torch.device | str,
    ) -> PagedSequences:
        """From each sequence's blocks (at least as many as its tokens fill), its length and how many tokens are new.

        Args:
            tables: block numbers, as long as each sequence needs, not padded.
            lengths: tokens in the cache, the new ones included.
            counts: new tokens, each at most the length.
            block_size: slots of a block.
            device: where the tensors go.
        """
        width = max(map(len, tables), default=0)
        padded = torch.tensor([[*table, *(0,) * (width - len(table))] for table in tables], dtype=torch.int64)
        padded = padded.view(len(tables), width)
        lengths_B = torch.tensor(lengths, dtype=torch.int64)
        starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int64)
        row_T, position_T = _places(lengths_B, starts)
        slots = padded[row_T, position_T // block_size] * block_size + position_T % block_size
        paged = cls(
            padded.to(device, torch.int32),
            lengths_B.to(device, torch.int32),
            starts.to(device, torch.int32),
            slots.to(device),
            max(lengths, default=0),
            max(counts, default=0),
        )
        paged.__dict__["positions"] = position_T.to(device)
        return paged

    @cached_property
    def positions(self) -> Tensor:
        """Position of each new token within its sequence, int64 [T]."""
        return _places(self.lengths, self.starts)[1]

    @cached_property
    def alike(self) -> list[Tensor]:
        """The sequences in groups of about as many new tokens, int64 each: a rectangle of each wastes little."""
        counts = self.starts.diff().tolist()
        groups: list[list[int]] = []
        for row in sorted(range(len(counts)), key=counts.__getitem__, reverse=True):
            most = counts[groups[-1][0]] if groups else 0
            if not groups or most > 1.5 * counts[row]:
                groups.append([])
            groups[-1].append(row)
        return [torch.tensor(rows, dtype=torch.int64, device=self.lengths.device) for rows in groups]

    def to(self, device: torch.device | str) -> PagedSequences:
        """The same sequences elsewhere."""
        tables, lengths, starts, slots = (x.to(device) for x in (self.tables, self.lengths, self.starts, self.slots))
        return PagedSequences(tables, lengths, starts, slots, self.longest, self.longest_query)


def _places(lengths_B: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence of each new token and its position there, int64 [T] each."""
    starts = starts.long()
    row_T = torch.arange(len(lengths_B), device=starts.device).repeat_interleave(starts.diff())
    first_B = lengths_B.long() - starts[1:]  # position of the token that packed index 0 would be
    return row_T, torch.arange(len(row_T), device=starts.device) + first_B[row_T]
