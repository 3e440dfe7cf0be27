"""What a forward pass of generation runs on: a paged key/value cache, or, for models without one, whole sequences.

Shapes: T new tokens, B sequences, H hidden, N query heads, K key/value heads, D head size, P blocks, S slots of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siirl.model.config import DecoderConfig
from siirl.model.decoder import Decoder, PackedAttention
from siirl.model.experts import Routing
from siirl.model.inference import InferenceDecoder
from siirl.rollout.blocks import BLOCK, Ints
from siirl.rollout.choices import RouterChoices
from siirl.rollout.scheduler import Work
from siirl.rollout.sequences import Sequences
from siirl_kernels.packing import PackedSequences
from siirl_kernels.paging import PagedSequences

if TYPE_CHECKING:
    from siirl.model.fallback import AnyDecoder


Tables = NDArray[np.int32]


class State(Protocol):
    """What is kept of sequences between tokens."""

    def forward(self, sequences: Sequences, work: Work, tables: Tables) -> Tensor:
        """Hidden states of the new tokens of ``work``, [T, H]; ``tables``: int32 [rows, M], blocks of each row."""
        ...

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Of hidden states, [T, V]; they may last until the next call only."""
        ...

    def copy(self, source: Ints, target: Ints) -> None:
        """Copy what blocks hold to other blocks."""
        ...


def cache_bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def cache_shape(config: DecoderConfig, blocks: int) -> tuple[int, ...]:
    """Of keys and values: [layers, 2, P, S, K, D]."""
    return config.num_layers, 2, blocks, BLOCK, config.num_kv_heads, config.head_dim


class PagedState:
    """Keys and values in a ``cache`` of :func:`cache_shape`; what is not written yet may be anything.

    Weights stay as they are while the state lives: one call to the engine. ``choices`` takes note of routers' choices.
    """

    def __init__(self, decoder: Decoder, cache: Tensor, choices: RouterChoices | None = None) -> None:
        self._decoder, self._cache, self._choices = decoder, cache, choices
        self._inference = InferenceDecoder(decoder)
        self._caches = [(keys, values) for keys, values in cache]

    def forward(self, sequences: Sequences, work: Work, tables: Tables) -> Tensor:
        device = self._cache.device
        tokens_T, positions_T, paged = arrange(sequences, work, tables, device)
        if self._choices is None:
            return self._inference(tokens_T, positions_T, self._caches, paged)
        routing = Routing()
        hidden_TH = self._inference(tokens_T, positions_T, self._caches, paged, routing)
        self._choices.write(paged.slots, routing)
        return hidden_TH

    def logits(self, hidden_TH: Tensor) -> Tensor:
        return self._inference.logits(hidden_TH)

    def copy(self, source: Ints, target: Ints) -> None:
        device = self._cache.device
        self._cache[:, :, torch.from_numpy(target).to(device)] = self._cache[:, :, torch.from_numpy(source).to(device)]
        if self._choices is not None:
            self._choices.copy(source, target)


def arrange(
    sequences: Sequences, work: Work, tables: Tables, device: torch.device
) -> tuple[Tensor, Tensor, PagedSequences]:
    """The new tokens, their positions, int64 [T] each, and where their sequences lie in the cache."""
    longest = int((work.first + work.counts).max())
    blocks = tables[work.rows, : -(-longest // BLOCK)]
    if (work.counts == 1).all():
        rows, positions, at = work.rows, work.first, np.arange(len(work.rows))
    else:
        at = np.arange(len(work.rows)).repeat(work.counts)
        rows = work.rows[at]
        positions = np.arange(len(at)) - (work.last + 1 - work.counts - work.first)[at]
    slots = blocks[at, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
    starts = np.concatenate((np.zeros(1, np.int64), work.counts.cumsum()))
    paged = PagedSequences(
        tables=torch.from_numpy(blocks).to(device),
        lengths=torch.from_numpy((work.first + work.counts).astype(np.int32)).to(device),
        starts=torch.from_numpy(starts.astype(np.int32)).to(device),
        slots=torch.from_numpy(slots).to(device),
        longest=longest,
        longest_query=int(work.counts.max()),
    )
    tokens = torch.from_numpy(sequences.tokens[rows, positions]).to(device)
    return tokens, torch.from_numpy(positions).to(device), paged


class UncachedState:
    """Whole sequences computed again for every token: for decoders that cannot be given a cache."""

    def __init__(self, decoder: AnyDecoder) -> None:
        self._decoder = decoder

    def forward(self, sequences: Sequences, work: Work, tables: Tables) -> Tensor:
        device = self._decoder.head_weight.device
        ends = work.first + work.counts
        packed = PackedSequences(tuple(ends.tolist()), device)
        tokens = np.concatenate([sequences.tokens[row, :end] for row, end in zip(work.rows, ends, strict=True)])
        hidden_TH = self._decoder(torch.from_numpy(tokens).to(device), packed.positions, PackedAttention(packed))
        last = ends.cumsum()
        new = [np.arange(stop - count, stop) for stop, count in zip(last, work.counts, strict=True)]
        return hidden_TH[torch.from_numpy(np.concatenate(new)).to(device)]

    def logits(self, hidden_TH: Tensor) -> Tensor:
        return self._decoder.logits(hidden_TH)

    def copy(self, source: Ints, target: Ints) -> None:
        pass
