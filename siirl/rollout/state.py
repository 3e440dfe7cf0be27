"""What generation keeps between tokens: a key/value cache, or, for models without one, the tokens themselves.

Shapes: B sequences, T packed tokens, H hidden, N query heads, K key/value heads, D head size, L cache length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from siirl.model.config import DecoderConfig
from siirl.model.decoder import Decoder, PackedAttention
from siirl_kernels import kernels
from siirl_kernels.packing import PackedSequences

if TYPE_CHECKING:
    from siirl.model.fallback import AnyDecoder


class SequenceState(Protocol):
    """Sequences in flight, as dense rows 0 … B-1."""

    rows: int

    def admit(self, prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        """Append ``copies`` rows per prompt, each prompt computed once; its last hidden state, [copies · P, H]."""
        ...

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append one token to every row; the hidden states, [B, H]."""
        ...

    def keep(self, order: Tensor) -> None:
        """Keep the rows ``order`` (int64, on the host), in that order; a row moves only to a lower place."""
        ...


def cache_bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def cache_shape(config: DecoderConfig, capacity: int, length: int) -> tuple[int, ...]:
    """Of keys and values of up to ``capacity`` sequences of up to ``length`` tokens."""
    return config.num_layers, 2, capacity, config.num_kv_heads, length, config.head_dim


class CachedState:
    """Keys and values of sequences, in a ``cache`` of :func:`cache_shape`.

    What is not yet written in it must be finite: masked keys still meet the softmax's zeros.
    """

    def __init__(self, decoder: Decoder, cache: Tensor) -> None:
        self.decoder, self.rows, self._longest, self._cache = decoder, 0, 0, cache
        capacity, length = cache.shape[2], cache.shape[4]
        self._lengths = torch.zeros(capacity, dtype=torch.int64, device=cache.device)
        self._slots = torch.arange(length, device=cache.device)

    def admit(self, prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        device = self._cache.device
        sequences = PackedSequences(tuple(len(p) for p in prompts), device)
        tokens = torch.tensor([t for p in prompts for t in p], dtype=torch.int64, device=device)
        attention = _PrefillAttention(self._cache, sequences, self.rows, copies)
        hidden_TH = self.decoder(tokens, sequences.positions, attention)
        lengths = torch.tensor(sequences.lengths, dtype=torch.int64)
        rows = len(prompts) * copies
        self._lengths[self.rows : self.rows + rows] = lengths.repeat_interleave(copies).to(device)
        self._longest = max(self._longest, *sequences.lengths)
        self.rows += rows
        last = (sequences.starts + lengths - 1).to(device)
        return hidden_TH[last].repeat_interleave(copies, 0)

    def step(self, tokens_B: Tensor) -> Tensor:
        lengths = self._lengths[: self.rows]
        self._longest += 1
        attention = _DecodeAttention(self._cache[:, :, : self.rows], lengths, self._slots[: self._longest])
        hidden_BH = self.decoder(tokens_B, lengths, attention)
        lengths += 1
        return hidden_BH

    def keep(self, order: Tensor) -> None:
        moved = (order != torch.arange(len(order))).nonzero().squeeze(1)
        source = order[moved].to(self._cache.device)
        target = moved.to(self._cache.device)
        self._cache[:, :, target, :, : self._longest] = self._cache[:, :, source, :, : self._longest]
        self._lengths[target] = self._lengths[source]
        self.rows = len(order)
        if self.rows:
            self._longest = int(self._lengths[: self.rows].max())
        else:
            self._longest = 0


class _PrefillAttention:
    """Packed attention over prompts that also writes their keys and values, once per copy, into the cache."""

    def __init__(self, cache: Tensor, sequences: PackedSequences, first_row: int, copies: int) -> None:
        lengths = torch.tensor(sequences.lengths, dtype=torch.int64)
        self.cache, self.sequences, self.copies = cache, sequences, copies
        self.rows = slice(first_row, first_row + len(lengths) * copies)
        self.longest = int(lengths.max())
        # a rectangle of packed positions; places past a prompt's end repeat its last token and stay masked
        within = torch.minimum(torch.arange(self.longest)[None, :], lengths[:, None] - 1)
        self.index = (sequences.starts[:, None] + within).to(cache.device)

    def __call__(self, layer: int, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        for half, x_TKD in enumerate((k_TKD, v_TKD)):
            x_PKLD = x_TKD[self.index].transpose(1, 2)
            self.cache[layer, half, self.rows, :, : self.longest] = x_PKLD.repeat_interleave(self.copies, 0)
        return kernels.packed_attention(q_TND, k_TKD, v_TKD, self.sequences)


class _DecodeAttention:
    """Attention of one new token per row, written at the end of the row's cache first."""

    def __init__(self, cache: Tensor, lengths_B: Tensor, slots_L: Tensor) -> None:
        self.cache, self.longest = cache, len(slots_L)
        self.keep_BL = slots_L[None, :] <= lengths_B[:, None]
        self.at = (torch.arange(len(lengths_B), device=cache.device), slice(None), lengths_B)

    def __call__(self, layer: int, q_BND: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        keys, values = self.cache[layer, 0], self.cache[layer, 1]
        keys[self.at], values[self.at] = k_BKD, v_BKD
        return kernels.decode_attention(q_BND, keys[:, :, : self.longest], values[:, :, : self.longest], self.keep_BL)


class UncachedState:
    """Whole sequences computed again for every token: for decoders that cannot be given a cache."""

    def __init__(self, decoder: AnyDecoder) -> None:
        self.decoder, self.rows = decoder, 0
        self._sequences: list[list[int]] = []

    def admit(self, prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        self._sequences += [list(p) for p in prompts for _ in range(copies)]
        self.rows = len(self._sequences)
        return self._last_hidden(prompts).repeat_interleave(copies, 0)

    def step(self, tokens_B: Tensor) -> Tensor:
        for sequence, token in zip(self._sequences, tokens_B.tolist(), strict=True):
            sequence.append(token)
        return self._last_hidden(self._sequences)

    def keep(self, order: Tensor) -> None:
        self._sequences = [self._sequences[i] for i in order.tolist()]
        self.rows = len(self._sequences)

    def _last_hidden(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        device = self.decoder.head_weight.device
        packed = PackedSequences(tuple(len(s) for s in sequences), device)
        tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int64, device=device)
        hidden_TH = self.decoder(tokens, packed.positions, PackedAttention(packed))
        last = packed.starts + torch.tensor(packed.lengths) - 1
        return hidden_TH[last.to(device)]
