"""The experts that routers chose while responses were generated, kept beside the cache until a response ends.

A token's choice lies where its keys and values do, so shared prompts, copied blocks and prefixes found again have
theirs.
Shapes: T new tokens, P blocks, S slots of each, L layers with experts, K experts of a token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from siirl.data.batch import Ragged, offsets_of
from siirl.model.config import DecoderConfig
from siirl.model.experts import UNKNOWN, Routing
from siirl.rollout.blocks import BLOCK, Ints
from siirl.rollout.contract import UNFINISHED
from siirl.rollout.scheduler import Scheduler
from siirl.rollout.sequences import Sequences


class RouterChoices:
    """Choices of the tokens in a cache, int16 [P, S, L, K], and of the responses of the call that have ended."""

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        self._each = len(config.sparse_layers), config.num_experts_per_tok
        self._table = torch.empty(0, BLOCK, *self._each, dtype=torch.int16, device=device)
        self._ended: dict[int, Tensor] = {}

    def begin(self, blocks: int) -> None:
        """A call begins, with a cache of so many blocks; what those before hold is kept."""
        self._ended = {}
        if blocks != len(self._table):
            table = self._table.new_full((blocks, *self._table.shape[1:]), UNKNOWN)
            kept = min(blocks, len(self._table))
            table[:kept] = self._table[:kept]
            self._table = table

    def free(self) -> None:
        """Give the memory back."""
        self._table = self._table[:0].clone()

    def write(self, slots_T: Tensor, routing: Routing) -> None:
        """Note the choices of new tokens at their slots of the cache, int64."""
        self._table.view(-1, *self._each)[slots_T] = routing.chosen_TLK.to(torch.int16)

    def copy(self, source: Ints, target: Ints) -> None:
        """Copy those of blocks to other blocks."""
        device = self._table.device
        self._table[torch.from_numpy(target).to(device)] = self._table[torch.from_numpy(source).to(device)]

    def collect(self, sequences: Sequences, scheduler: Scheduler) -> None:
        """Take down the choices of running rows that have ended, before their blocks are given back."""
        running = scheduler.running
        for row in running[sequences.finish[running] != UNFINISHED].tolist():
            count = int(scheduler.cached[row])
            blocks = torch.from_numpy(scheduler.tables[row, : -(-count // BLOCK)].astype(np.int64))
            self._ended[row] = self._table[blocks.to(self._table.device)].flatten(0, 1)[:count].cpu()

    def column(self, sequences: Sequences) -> Ragged:
        """Of each row the choices of its prompt and of all response tokens but the last, which no pass computed.

        int16, values [tokens, L, K]; -1 where nothing was computed, as of a row that was ended before it began.
        """
        lengths = torch.from_numpy(sequences.prompts + np.maximum(sequences.drawn - 1, 0))
        values = torch.full((int(lengths.sum()), *self._each), UNKNOWN, dtype=torch.int16)
        offsets = offsets_of(lengths)
        for row, found in self._ended.items():
            start, end = offsets[row : row + 2].tolist()
            values[start : start + len(found)] = found[: end - start]
        return Ragged(values, offsets)
