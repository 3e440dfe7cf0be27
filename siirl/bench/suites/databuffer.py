"""Rows that change worker: `redistribute` against gathering every row on every worker and keeping one's own.

What a worker holds at first has lengths that grow with its rank, so that about a third of the rows has to move. Both
sides end with the same rows. GB/s counts the bytes that `redistribute` moves, by the collectives and by shared memory.
"""

from __future__ import annotations

import pickle
from typing import get_args

import pytest
import torch

from siirl.bench import setting
from siirl.bench.counters import Counted, count, total
from siirl.bench.measure import Measure, Rate
from siirl.bench.world import World
from siirl.dag.plan import TransportName
from siirl.data.balance import assign
from siirl.data.batch import Batch, Ragged, offsets_of
from siirl.data.databuffer import ID_COLUMNS, redistribute
from siirl.data.transport import open_transport
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives

ROWS, PROMPT = 64, 32
FIELDS = ("prompt_ids", "response_ids", "rollout_log_probs", "advantages", "reward")


class Redistribution:
    """One worker's rows, and both ways to redistribute them, the databuffer's over one of the transports."""

    def __init__(self, backend: Backend, collectives: Collectives, name: TransportName) -> None:
        self._backend, self._collectives = backend, collectives
        self._transport = open_transport(name, collectives)
        self._batch = rows_of(collectives.rank)

    def candidate(self) -> Batch:
        """By the databuffer."""
        return self._redistribute()[0]

    def reference(self) -> Batch:
        """Everything is sent to everyone."""
        parts = self._collectives.all_gather_bytes(pickle.dumps(self._columns()))
        whole = Batch.concat([Batch(pickle.loads(part)) for part in parts])
        tokens = (whole.lengths("prompt_ids") + whole.lengths("response_ids")).numpy()
        home = torch.arange(len(parts)).repeat_interleave(ROWS).numpy()
        mine = assign(tokens, len(parts), home=home) == self._collectives.rank
        return whole.take(torch.from_numpy(mine.nonzero()[0]))

    def counted(self) -> Counted:
        """The counters of one call, and the payload that this worker sent."""
        sent: list[int] = []
        found = count(lambda: sent.append(self._redistribute()[1].bytes_sent), self._backend)
        found.counters["moved_bytes"] = sent[0]
        return found

    def run_candidate(self) -> None:
        self.candidate()

    def run_reference(self) -> None:
        self.reference()

    def _redistribute(self):
        return redistribute(self._batch, self._collectives, fields=FIELDS, split="tokens", transport=self._transport)

    def _columns(self) -> dict[str, torch.Tensor | Ragged]:
        return {name: self._batch[name] for name in (*ID_COLUMNS, *FIELDS)}


def rows_of(rank: int) -> Batch:
    """A worker's rows: the higher its rank, the longer its responses, up to 512 tokens."""
    generator = torch.Generator().manual_seed(rank)
    lengths = torch.randint(64, 129, (ROWS,), generator=generator) * (1 + rank % 4)
    ids, offsets = torch.arange(ROWS) + ROWS * rank, offsets_of(lengths)
    count = int(offsets[-1])
    numbers = torch.randn(2, count, generator=generator)
    return Batch(
        {
            "sample_id": ids,
            "group_id": ids // 4,
            "slot": ids // 4,
            "prompt_ids": Ragged(setting.random_tokens(ROWS, PROMPT, rank).flatten(), torch.arange(ROWS + 1) * PROMPT),
            "response_ids": Ragged(setting.random_tokens(count, 1, rank).flatten(), offsets),
            "rollout_log_probs": Ragged(numbers[0], offsets),
            "advantages": Ragged(numbers[1], offsets),
            "reward": torch.rand(ROWS, generator=generator),
        }
    )


@pytest.mark.parametrize("transport", get_args(TransportName), ids=lambda name: name.replace("_", " "))
@pytest.mark.parametrize("workers", [2, 4], ids=lambda size: f"{size} workers")
def bench_redistribute(measure_wall: Measure, backend: Backend, workers: int, transport: TransportName) -> None:
    setting.need_devices(backend, workers)
    with World(backend, workers, Redistribution, transport) as world:
        found = total(world.call("counted"))
        measure_wall(
            lambda: world.call("run_candidate"),
            lambda: world.call("run_reference"),
            Rate(found.counters["moved_bytes"], "bytes"),
            against="every row gathered on every worker",
            counted=lambda: found,
            crowded=setting.crowded(backend, workers),
        )
