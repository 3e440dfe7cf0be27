"""The decode step recorded once per size and replayed, where the back end records work (:meth:`Backend.capture`).

A step in which every sequence has one new token is little work in many operators, and launching them takes the host
longer than the device computes. A recording is launched as a whole. It repeats the addresses and shapes of the call
that was recorded (PyTorch's notes on device graphs, 2.13), therefore

- inputs are copied into tensors that stay, with rows added up to a size that was recorded: each of these writes to a
  block of the cache that no sequence has, and nobody reads what it computes;
- numbers of the host that shape the work, the longest context and the new tokens of a sequence, are those of the size;
- recordings last while weights, cache and inputs lie where they lay. New weights copied over the old ones are read.

The head and the draw follow on the device's queue, launched while the recorded part still computes; so no recording
keeps logits. Shapes: B rows of a size, M blocks of its longest context, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siirl.device.backend import Backend, Captured, Unsupported
from siirl.model.decoder import Decoder
from siirl.rollout.blocks import BLOCK, Ints
from siirl.rollout.scheduler import Work
from siirl.rollout.sequences import Sequences
from siirl.rollout.state import PagedState, Tables
from siirl_kernels import kernels, table_hash
from siirl_kernels.paging import PagedSequences

log = logging.getLogger(__name__)

Capture = Callable[..., Captured[Any]]  # Backend.capture
WARM_UPS = 1  # what is tuned or compiled for a size is when it runs first; another run finds nothing new


def recorder(backend: Backend, wanted: bool) -> Capture | None:
    """What records the decode step; None where it is not wanted or the device records nothing."""
    return backend.capture if wanted and backend.capabilities().graph_capture != "none" else None


def padded_rows(rows: int) -> int:
    """The size that ``rows`` rows are recorded for: 1, 2, 4, then multiples of 8, from 256 on of 16."""
    if rows <= 4:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 256 else 16
    return -(-rows // step) * step


def padded_blocks(tokens: int) -> int:
    """The blocks that contexts of up to ``tokens`` tokens are recorded for: a power of two."""
    return 1 << (-(-max(tokens, 1) // BLOCK) - 1).bit_length()


@dataclass(frozen=True)
class Inputs:
    """Inputs and output of every recording: each uses the beginning, as much as its size needs.

    Attributes:
        numbers: int64 [3 · rows], tokens, positions and slots, one after the other.
        places: int32 [rows · (1 + blocks)], lengths, then block tables.
        starts: int32 [rows + 1], 0, 1, 2, …: every row has one new token.
        hidden: [rows, H].
    """

    rows: int
    blocks: int
    numbers: Tensor
    places: Tensor
    starts: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, rows: int, blocks: int, like: Tensor) -> Inputs:
        """For so many rows and blocks at most; ``like``: a weight [·, H], for device and dtype."""
        device = like.device
        return cls(
            rows,
            blocks,
            torch.zeros(3 * rows, dtype=torch.int64, device=device),
            torch.zeros(rows * (1 + blocks), dtype=torch.int32, device=device),
            torch.arange(rows + 1, dtype=torch.int32, device=device),
            like.new_zeros(rows, like.shape[1]),
        )


class Step:
    """The decode step of one size. Making it records it, on rows that no sequence has.

    Args:
        inputs: of all recordings.
        size: rows and blocks.
        beside: a recording whose memory this one may use too.

    Raises:
        Unsupported: the device records no more.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: Tensor,
        inputs: Inputs,
        size: tuple[int, int],
        capture: Capture,
        beside: Captured[Any] | None,
    ) -> None:
        self._rows, self._blocks = rows, blocks = size
        self._scratch = cache.shape[2] - 1
        self._numbers, self._places = inputs.numbers[: 3 * rows], inputs.places[: rows * (1 + blocks)]
        self._starts, self._hidden = inputs.starts[: rows + 1], inputs.hidden[:rows]
        nothing = np.empty(0, np.int64)
        self._fill(nothing, nothing, np.empty((0, blocks), np.int32))
        self.captured = capture(lambda: self._hidden.copy_(self._compute(decoder, cache)), WARM_UPS, beside)

    def __call__(self, sequences: Sequences, work: Work, tables: Tables) -> Tensor:
        """Hidden states [rows of ``work``, H], which last until the next step."""
        self._fill(sequences.tokens[work.rows, work.first], work.first, tables[work.rows, : self._blocks])
        self.captured.replay()
        return self._hidden[: len(work.rows)]

    def _compute(self, decoder: Decoder, cache: Tensor) -> Tensor:
        tokens_B, positions_B, slots_B = self._numbers.view(3, self._rows)
        paged = PagedSequences(
            tables=self._places[self._rows :].view(self._rows, self._blocks),
            lengths=self._places[: self._rows],
            starts=self._starts,
            slots=slots_B,
            longest=self._blocks * BLOCK,
            longest_query=1,
        )
        return decoder(tokens_B, positions_B, PagedAttention(cache, paged))

    def _fill(self, tokens: Ints, positions: Ints, tables: Tables) -> None:
        """The sequences' new tokens and where they are, int64 [n] each, and their blocks [n, M or fewer]; then rows of
        one token in the scratch block."""
        count, width = tables.shape
        numbers = np.zeros((3, self._rows), np.int64)
        numbers[2] = self._scratch * BLOCK
        numbers[0, :count], numbers[1, :count] = tokens, positions
        numbers[2, :count] = tables[np.arange(count), positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
        places = np.full(self._rows * (1 + self._blocks), self._scratch, np.int32)
        places[: self._rows] = 1
        places[:count] = positions + 1
        places[self._rows :].reshape(self._rows, self._blocks)[:count, :width] = tables
        self._numbers.copy_(torch.from_numpy(numbers.reshape(-1)))
        self._places.copy_(torch.from_numpy(places))


class Graphs:
    """The recordings of an engine.

    Args:
        capture: records; None: nothing is recorded.
    """

    def __init__(self, capture: Capture | None) -> None:
        self.spare_blocks = 0 if capture is None else 1  # at the end of the cache, for rows that no sequence has
        self._capture, self._told = capture, False
        self._lies: tuple[object, ...] = ()  # where weights and cache do
        self._inputs: Inputs | None = None
        self._steps: dict[tuple[int, int], Step] = {}

    def forget(self) -> None:
        """Give the memory of all recordings back."""
        self._steps.clear()
        self._inputs = None

    def state(self, decoder: Decoder, cache: Tensor, rows: int, longest: int) -> PagedState:
        """The state of a call with at most ``rows`` rows at once, of at most ``longest`` tokens each."""
        if not self.spare_blocks:
            return PagedState(decoder, cache)
        rows, blocks = padded_rows(rows), padded_blocks(longest)
        lies = (table_hash(), cache.shape, cache.data_ptr(), *(p.data_ptr() for p in decoder.parameters()))
        held = self._inputs
        if held is None or lies != self._lies or rows > held.rows or blocks > held.blocks:
            if held is not None:
                rows, blocks = max(rows, held.rows), max(blocks, held.blocks)
            self.forget()
            self._lies, self._inputs = lies, Inputs.of(rows, blocks, decoder.head_weight)
        return RecordedState(decoder, cache, self)

    def step(self, decoder: Decoder, cache: Tensor, rows: int, longest: int) -> Step | None:
        """The recording for ``rows`` rows of at most ``longest`` tokens; None where there can be none (any more)."""
        size = padded_rows(rows), padded_blocks(longest)
        if size not in self._steps and self._capture is not None:
            self._record(decoder, cache, size)
        return self._steps.get(size)

    def _record(self, decoder: Decoder, cache: Tensor, size: tuple[int, int]) -> None:
        assert self._capture is not None and self._inputs is not None
        other = next(iter(self._steps.values()), None)
        beside = None if other is None else other.captured
        try:
            self._steps[size] = Step(decoder, cache, self._inputs, size, self._capture, beside)
        except Unsupported as reason:
            log.warning("from here on no decode step is recorded any more: %s", reason)
            self._capture = None
            return
        if not self._told:
            log.info("decode steps are recorded and replayed, first that of %d rows and %d blocks of context", *size)
            self._told = True


class PagedAttention:
    """Attention of new tokens, which are written to the cache first."""

    def __init__(self, cache: Tensor, sequences: PagedSequences) -> None:
        self._cache, self._sequences = cache, sequences

    def __call__(self, layer: int, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        keys_PSKD, values_PSKD = self._cache[layer]
        return kernels.paged_attention(q_TND, k_TKD, v_TKD, keys_PSKD, values_PSKD, self._sequences)


class RecordedState(PagedState):
    """As :class:`PagedState`; what is pure decoding is replayed. The cache ends with a block of no sequence."""

    def __init__(self, decoder: Decoder, cache: Tensor, graphs: Graphs) -> None:
        super().__init__(decoder, cache)
        self._graphs = graphs

    def forward(self, sequences: Sequences, work: Work, tables: Tables) -> Tensor:
        if (work.counts == 1).all():
            longest = int(work.first.max()) + 1
            step = self._graphs.step(self._decoder, self._cache, len(work.rows), longest)
            if step is not None:
                return step(sequences, work, tables)
        return super().forward(sequences, work, tables)
