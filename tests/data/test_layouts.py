"""Rows move between any two layouts, over either transport, and nobody holds more than its share."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from siirl.dag.plan import Layout
from siirl.data import databuffer
from siirl.data.batch import Batch, Ragged
from siirl.data.databuffer import Spread, redistribute
from siirl.data.transport import CollectiveTransport, SharedMemoryTransport, hosts
from tests.data.world import FIELDS, SAMPLES, World, make_rows

WORKERS = 4
LAYOUTS = {
    "data": Layout("tokens", 4, 4),
    "tensor": Layout("tokens", 4, 2, tensor=2),
    "context and tensor": Layout("tokens", 4, 1, tensor=2, context=2),
    "pipeline": Layout("tokens", 4, 2, pipeline=2),
    "first two": Layout("tokens", 2, 2),
    "last two, sharing": Layout("tokens", 2, 1, tensor=2, first=2),
    "last three": Layout("tokens", 3, 3, first=1),
}
TRANSPORTS = {
    "collectives": lambda collectives: CollectiveTransport(collectives),
    "narrowed": lambda collectives: CollectiveTransport(collectives, compresses=True),
    "shared memory": SharedMemoryTransport,
}


@pytest.fixture(scope="module")
def world():
    world = World(WORKERS)
    yield world
    world.close()


def share_of(layout: Layout, rank: int) -> int | None:
    return next((share for share, workers in enumerate(layout.shares()) if rank in workers), None)


def start(layout: Layout, rank: int) -> Batch:
    """The rows that a worker of a layout holds at first: contiguous blocks, all to the first share but a few."""
    share, shares = share_of(layout, rank), layout.data
    if share is None:
        return Batch({})
    cuts = [0, *(SAMPLES - 3 * (shares - 1 - i) for i in range(shares))]
    return make_rows(range(cuts[share], cuts[share + 1]))


def move(collectives, source: str, target: str, transport: str, times: int = 1, **options):
    layouts = LAYOUTS[source], LAYOUTS[target]
    carrier = TRANSPORTS[transport](collectives.inner)
    for _ in range(times):
        batch = start(layouts[0], collectives.rank)
        members = {"source": np.array(layouts[0].shares()), "target": np.array(layouts[1].shares())}
        fields = FIELDS if len(batch) else []
        result = redistribute(
            batch, collectives, fields=fields, split="tokens", transport=carrier, **members, **options
        )
    return result


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_share_gets_its_rows_on_all_of_its_workers(world, source: str, target: str, transport: str) -> None:
    results = [result for result, _ in world.run(move, source, target, transport)]
    shares = LAYOUTS[target].shares()
    arrived: list[int] = []
    for workers in shares:
        ids = results[workers[0]].dense("sample_id").tolist()
        arrived += ids
        for worker in workers:
            assert results[worker].equals(make_rows(ids))
    assert sorted(arrived) == list(range(SAMPLES))
    for worker in set(range(WORKERS)) - {w for workers in shares for w in workers}:
        assert len(results[worker]) == 0


@pytest.mark.parametrize("transport", ["collectives", "shared memory"])
def test_a_row_enters_a_share_once_and_what_a_share_has_stays(world, transport: str) -> None:
    moved = [moved for _, moved in world.run(move, "tensor", "tensor", transport)]
    [(first, _), *_] = world.run(move, "tensor", "tensor", transport)
    left = SAMPLES - 3 - len(first)
    assert left > 0
    # each of the two workers that get rows of the other share receives them once, from there or from its neighbour
    assert [m.rows_kept for m in moved] == [len(first), len(first), 3, 3]
    assert moved[0].bytes_received == moved[1].bytes_received == 0
    assert moved[2].bytes_received == moved[3].bytes_received
    assert moved[0].bytes_sent + moved[1].bytes_sent == moved[2].bytes_received  # across, once
    assert moved[2].bytes_sent + moved[3].bytes_sent == moved[2].bytes_received  # inside


def test_narrowing_loses_nothing_and_moves_fewer_bytes(world) -> None:
    plain = [m.bytes_sent for _, m in world.run(move, "first two", "last two, sharing", "collectives")]
    narrow = [m.bytes_sent for _, m in world.run(move, "first two", "last two, sharing", "narrowed")]
    assert sum(narrow) < 0.6 * sum(plain)


def test_shared_memory_is_used_again_and_again(world) -> None:
    results = world.run(move, "first two", "last three", "shared memory", times=25)
    assert sum(len(result) for result, _ in results) == SAMPLES


def test_equal_counts(world) -> None:
    counts = [len(result) for result, _ in world.run(move, "first two", "data", "collectives", equal=True)]
    assert max(counts) - min(counts) <= 1


def seen_hosts(collectives, apart: int) -> list[int]:
    """Hosts as the workers see them, where memory of worker ``apart`` is out of reach."""
    with pytest.MonkeyPatch.context() as patch:
        if collectives.inner.rank == apart:
            patch.setattr(os, "getuid", lambda: 4242)
        return hosts(collectives.inner)


def test_workers_that_can_share_memory_are_on_one_host(world) -> None:
    assert world.run(seen_hosts, -1) == [[0] * WORKERS] * WORKERS
    assert world.run(seen_hosts, 1) == [[0, 1, *[0] * (WORKERS - 2)]] * WORKERS


def test_a_worker_in_two_shares_is_refused() -> None:
    with pytest.raises(ValueError, match="one share at most"):
        Spread.of(np.array([[0, 1], [1, 2]]), 4)


def test_ranks_run_through_tensor_context_data_pipeline() -> None:
    """The order tp-cp-ep-dp-pp in which Megatron-Core numbers its ranks."""
    layout = Layout("tokens", 16, 2, tensor=2, context=2, pipeline=2)
    assert layout.shares() == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
    assert Layout("tokens", 4, 2, pipeline=2, first=4).shares() == [[4, 6], [5, 7]]


def peak_of_a_move(collectives, transport: str) -> tuple[int, int, int]:
    """Bytes of the rows before and after, and by how much the peak of this process's own memory rose meanwhile."""
    rows, tokens = 256, 65_536
    rank = collectives.rank
    ids = torch.arange(rows) + rows * rank
    lengths = torch.full((rows,), tokens)
    lengths[::2] = tokens // 4 if rank % 2 else 2 * tokens
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.arange(int(offsets[-1]), dtype=torch.int32).remainder(1000)
    batch = Batch({"sample_id": ids, "group_id": ids, "slot": ids, "response_ids": Ragged(values, offsets)})
    # the shares turn by one worker, so that nearly every row has to leave
    turned = np.roll(np.arange(collectives.size), 1)[:, None]
    carrier = TRANSPORTS[transport](collectives.inner)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = private_peak()
    result, moved = redistribute(
        batch, collectives, fields=["response_ids"], split="tokens", target=turned, equal=True, transport=carrier
    )
    assert moved.bytes_sent > 0
    return batch.nbytes, result.nbytes, private_peak() - before


def private_peak() -> int:
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM"].split()[0]) * 1024


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY, reason="memory is limited")
@pytest.mark.parametrize("transport", ["collectives", "shared memory"])
def test_a_worker_needs_memory_for_its_own_share_only(world, transport: str) -> None:
    for held, got, risen in world.run(peak_of_a_move, transport):
        # what it held is there before; with it, at most 2.2 times what goes out and comes in
        assert held + risen <= 2.2 * (held + got)


def late(*arguments: Any, take: Callable[..., Any] = databuffer._take) -> Any:
    time.sleep(0.05)
    return take(*arguments)


def moves_in_a_row(collectives) -> tuple[list[bool], int, int]:
    """Whether the rows of each of five moves were right, and bytes of this worker's two shared memories.

    One worker reads what came late, while the others are already about to send anew.
    """
    carrier = SharedMemoryTransport(collectives.inner)
    right = []
    for move in range(5):
        ids = torch.arange(100) + 100 * collectives.rank
        rows = [torch.full((64,), int(i) * 10 + move) for i in ids]
        batch = Batch({"sample_id": ids, "group_id": ids, "slot": ids, "x": Ragged.from_lists(rows, torch.int64)})
        turned = np.roll(np.arange(collectives.size), 1 + move % 2)[:, None]
        with patch.object(databuffer, "_take", late) if collectives.rank == 1 else nullcontext():
            done, _ = redistribute(
                batch, collectives, fields=["x"], split="tokens", target=turned, equal=True, transport=carrier
            )
        values = done.ragged("x").values.view(-1, 64)
        right.append(torch.equal(values, (done.dense("sample_id") * 10 + move)[:, None].expand(-1, 64)))
    first, second = (os.fstat(memory._file).st_size for memory in carrier._own)
    return right, first, second


def test_moves_in_a_row_share_one_memory_and_do_not_overtake_a_slow_reader(world) -> None:
    for right, first, second in world.run(moves_in_a_row):
        assert right == [True] * 5
        assert first > 0 and second == 0
