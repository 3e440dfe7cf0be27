"""Dynamic sampling: rounds of generation until a step has enough groups worth training on.

DAPO (arXiv 2503.14476, section 3.2) leaves out the prompts whose responses are all right or all wrong, and samples more
of them than a step needs until the step is full. Here the groups of a round that a filter keeps join those held since
earlier rounds and steps. When all workers together hold a step's groups, the oldest are the step and the others stay
for the next one. Rows stay on the worker that made them; the workers tell each other the numbers of the groups they
hold, and each decides alone, by the same pure functions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from siirl.data.batch import Batch
from siirl.data.partition import Ints
from siirl.errors import SiirlError

if TYPE_CHECKING:
    from siirl.device.collectives import Collectives

log = logging.getLogger(__name__)


def round_size(held: int, wanted: int, oversample: float) -> int:
    """Prompts of the next round over all workers, for a step of ``wanted`` groups of which ``held`` are there."""
    return math.ceil(max(0, wanted - held) * oversample)


def choose(held: Ints, wanted: int) -> tuple[Ints, Ints]:
    """The groups of a step and their slots, from the numbers of all groups that the workers hold, in any order.

    A group's number is its prompt's global position, so the smallest ones are the oldest. Slots lie between 0 and
    ``wanted - 1``; where there are fewer groups they spread evenly, so that every mini-batch gets its part of them.

    Returns:
        int64 [n] each, n = min(len(held), wanted), both ascending.
    """
    groups = np.sort(held)[:wanted]
    return groups, np.arange(len(groups)) * wanted // max(1, len(groups))


class GroupPool:
    """The groups of this worker that passed the filter and have not been trained on.

    After a step the workers together hold fewer than ``wanted * oversample - wanted + 1`` groups, or what is left of a
    pool that was larger: a round asks for no more than `round_size`, and only while groups are missing.

    Args:
        wanted: groups of a step over all workers.
        oversample: prompts that a round generates for each group that is missing, at least 1.
        max_rounds: a step goes on with fewer groups after so many rounds.
    """

    def __init__(self, wanted: int, oversample: float, max_rounds: int) -> None:
        self._wanted, self._oversample, self._max_rounds = wanted, oversample, max_rounds
        self.rows = Batch({})
        self.rounds = 0
        self._held = 0  # groups, over all workers

    def next_prompts(self, collectives: Collectives) -> int:
        """Prompts of the round that comes next, over all workers; 0 when the groups held fill a step."""
        return self._missing()

    def begin(self) -> None:
        """Begin a step: no round has been generated for it."""
        self.rounds = 0

    def add(self, rows: Batch, collectives: Collectives) -> Batch | None:
        """Add what passed the filter in a round; every worker calls it.

        Args:
            rows: whole groups, younger than those held, in the order of their sample ids.

        Returns:
            This worker's rows of the step, with their slots; None while another round is due.
        """
        self.rounds += self._missing() > 0
        self.rows = _joined(self.rows, rows)
        everyone = self._everyone(collectives)
        self._held = len(everyone)
        if self._held < self._wanted and self.rounds < self._max_rounds:
            return None
        groups, slots = choose(everyone, self._wanted)
        if len(groups) < self._wanted and collectives.rank == 0:
            log.warning(
                "%d of %d groups passed the filter in %d rounds of generation (algorithm.max_rounds); "
                "the step goes on with them",
                len(groups), self._wanted, self.rounds,
            )  # fmt: skip
        self._held -= len(groups)
        return self._take(groups, slots)

    def state(self) -> dict[str, Tensor]:
        """The rows held here as tensors by name, for a checkpoint; none without rows."""
        return self.rows.to_tensors() if len(self.rows) else {}

    def restore(self, states: Sequence[Mapping[str, Tensor]], collectives: Collectives) -> None:
        """Hold the rows of some workers' states; every worker calls it, and each state goes to one of them."""
        if held := [Batch.from_tensors(state) for state in states if state]:
            rows = Batch.concat(held)
            self.rows = rows.take(rows.dense("sample_id").argsort())
        self._held = len(self._everyone(collectives))

    def _missing(self) -> int:
        return round_size(self._held, self._wanted, self._oversample)

    def _everyone(self, collectives: Collectives) -> Ints:
        """The numbers of all groups that the workers hold, int64 [groups]."""
        own = self.rows.dense("group_id").unique() if len(self.rows) else torch.empty(0, dtype=torch.int64)
        return torch.cat(collectives.all_gather_ints(own)).numpy()

    def _take(self, groups: Ints, slots: Ints) -> Batch:
        if not self.rows.names:
            return self.rows
        own = self.rows.dense("group_id").numpy()
        place = np.searchsorted(groups, own)
        chosen = np.isin(own, groups)
        step = self.rows.take(torch.from_numpy(np.flatnonzero(chosen)))
        self.rows = self.rows.take(torch.from_numpy(np.flatnonzero(~chosen)))
        return step.with_columns(slot=torch.from_numpy(slots[place[chosen]]))


def _joined(held: Batch, rows: Batch) -> Batch:
    if not len(held):
        return rows
    if rows.names and (different := set(held.names) ^ set(rows.names)):
        raise SiirlError(
            f"groups left over from an earlier step and those of this one differ in the column '{min(different)}': "
            "a run is resumed with the pipeline that it had; start a new run for another one"
        )
    return Batch.concat([held, rows]) if len(rows) else held
