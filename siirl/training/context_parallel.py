"""Context parallel: each worker of a group computes a contiguous part of a micro-batch's tokens.

Only attention looks beyond a worker's tokens. Ulysses (arXiv 2309.14509) gives every worker all tokens of some heads
for its time; the ring (arXiv 2310.01889, :mod:`siirl.training.ring`) sends keys and values round. What a pass ends in,
a few numbers per response token, is gathered, so that losses see whole responses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from siirl.device.collectives import Collectives
from siirl.model.decoder import Attention, PackedAttention
from siirl.training.exchange import exchange, gather, shares
from siirl.training.microbatch import MicroBatch
from siirl.training.ring import RingAttention
from siirl_kernels import kernels
from siirl_kernels.packing import PackedSequences


@dataclass(frozen=True)
class Part:
    """What one worker computes of a micro-batch.

    Attributes:
        tokens_T, positions_T: its tokens, and their positions in their sequences.
        attention: of its tokens to all.
        states_S, state_R, targets_R: see :class:`MicroBatch`; of its tokens, numbered anew.
        own: which of the micro-batch's tokens these are.
        gather: from a number for each of its response tokens, [R, ...], to those of all, in the micro-batch's order.
            The gradient is taken to be the same on all workers.
    """

    tokens_T: Tensor
    positions_T: Tensor
    attention: Attention
    states_S: Tensor
    state_R: Tensor
    targets_R: Tensor
    own: slice
    gather: Callable[[Tensor], Tensor]


def part_of(micro: MicroBatch, group: Collectives, mode: str) -> Part:
    """The part of the worker of ``group`` that asks; ``mode`` is ``ulysses`` or ``ring``."""
    sequences, tokens = micro.sequences, micro.tokens_T
    if group.size == 1:
        attention = PackedAttention(sequences)
        return Part(
            tokens,
            sequences.positions,
            attention,
            micro.states_S,
            micro.state_R,
            micro.targets_R,
            slice(None),
            lambda x: x,
        )
    counts = shares(len(tokens), group.size)
    start = sum(counts[: group.rank])
    own = slice(start, start + counts[group.rank])
    bounds = torch.tensor(counts, device=tokens.device).cumsum(0)
    holder_S = torch.searchsorted(bounds, micro.states_S, right=True)  # ascending, as the states are
    holder_R = holder_S[micro.state_R]
    mine_R = (holder_R == group.rank).nonzero().squeeze(1)
    held = torch.bincount(holder_R, minlength=group.size).tolist()
    place_R = holder_R.argsort(stable=True).argsort()

    def gathered(x: Tensor) -> Tensor:
        return gather(x, held, group, partial=False)[place_R]

    kind = RingAttention if mode == "ring" else UlyssesAttention
    return Part(
        tokens[own],
        sequences.positions[own],
        kind(sequences, counts, group),
        micro.states_S[holder_S == group.rank] - start,
        micro.state_R[mine_R] - (holder_S < group.rank).sum(),
        micro.targets_R[mine_R],
        own,
        gathered,
    )


class UlyssesAttention:
    """Attention to all tokens by some of the heads: two exchanges a layer, one before and one after.

    Args:
        sequences: of the whole micro-batch.
        counts: tokens of each worker of the group.
        group: workers; their number divides query and key heads.
    """

    def __init__(self, sequences: PackedSequences, counts: list[int], group: Collectives) -> None:
        self.sequences, self._counts, self._group = sequences, counts, group
        self._own = [counts[group.rank]] * group.size

    def __call__(self, layer: int, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        size, (tokens, heads, width) = self._group.size, q_TND.shape
        parts = [x.reshape(tokens, size, x.shape[1] // size, width) for x in (q_TND, k_TKD, v_TKD)]
        mine = torch.cat(parts, 2).transpose(0, 1).flatten(0, 1)
        whole = exchange(mine, self._own, self._counts, self._group)
        q, k, v = (x.contiguous() for x in whole.split([part.shape[2] for part in parts], 1))
        out = kernels.packed_attention(q, k, v, self.sequences)
        back = exchange(out, self._counts, self._own, self._group)
        return back.view(size, tokens, heads // size, width).transpose(0, 1).reshape(tokens, heads, width)
