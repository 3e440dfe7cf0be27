"""Rows move between real processes: each arrives once, bit by bit the same, and only what must move is sent."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from siirl.data.batch import Batch, Ragged
from siirl.data.databuffer import redistribute
from siirl.device import select
from siirl.device.collectives import Collectives
from siirl.errors import SiirlError

SAMPLES, GROUP, DTYPES = 48, 4, (torch.uint8, torch.int8, torch.int64, torch.float32, torch.bfloat16, torch.bool)
IDS = ["sample_id", "group_id", "slot"]
SPREADS: dict[str, Callable[[int, int], int]] = {  # (sample, workers) -> worker that holds it at first
    "in blocks": lambda sample, workers: sample * workers // SAMPLES,
    "round robin": lambda sample, workers: sample % workers,
    "one holds all": lambda sample, workers: workers - 1,
    "one holds none": lambda sample, workers: 1 + sample % (workers - 1),
}


def make_rows(samples: Sequence[int]) -> Batch:
    """The rows with these ids; the content of a row depends on its id alone."""
    generators = {sample: torch.Generator().manual_seed(sample) for sample in samples}

    def draw(shape: Callable[[int], tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
        rows = []
        for sample in samples:
            row = torch.randint(-99, 100, shape(sample), generator=generators[sample])
            row = row / 7 if dtype.is_floating_point else row
            rows.append(row.to(dtype))
        return rows

    def dense(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.stack([*draw(lambda _: shape, dtype), torch.zeros(shape, dtype=dtype)])[:-1]

    def ragged(dtype: torch.dtype, factor: int, *shape: int) -> Ragged:
        rows = draw(lambda sample: (sample * factor % 53, *shape), dtype)
        offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
        return Ragged(torch.cat([torch.zeros(0, *shape, dtype=dtype), *rows]), offsets)

    ids = torch.tensor(samples, dtype=torch.int64)
    columns: dict[str, Any] = {"sample_id": ids, "group_id": ids // GROUP, "slot": ids // GROUP % 7}
    columns |= {"prompt_ids": ragged(torch.int64, 3), "response_ids": ragged(torch.int64, 11)}
    columns |= {"row": Ragged.from_texts(["é" * (sample % 5) for sample in samples])}
    columns |= {"reward": torch.where(ids % 5 == 0, float("nan"), ids / 3.0)}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        columns |= {f"dense_{name}": dense(dtype), f"dense2_{name}": dense(dtype, 3)}
        columns |= {f"ragged_{name}": ragged(dtype, 5), f"ragged2_{name}": ragged(dtype, 7, 2)}
    return Batch(columns)


FIELDS = [name for name in make_rows([0]).names if name not in IDS]


class Counted:
    """Collectives that note what passes through them."""

    def __init__(self, inner: Collectives) -> None:
        self.inner, self.rank, self.size = inner, inner.rank, inner.size
        self.calls: list[str] = []
        self.largest = 0

    def all_gather_ints(self, ints: torch.Tensor) -> list[torch.Tensor]:
        self.calls.append("all_gather_ints")
        return self.inner.all_gather_ints(ints)

    def all_to_all_bytes(self, send, send_sizes, recv_sizes) -> torch.Tensor:
        self.calls.append("all_to_all_bytes")
        self.largest = max(sum(send_sizes), sum(recv_sizes))
        return self.inner.all_to_all_bytes(send, send_sizes, recv_sizes)


class World:
    """Worker processes that stay up for the tests of this file."""

    def __init__(self, size: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        context = mp.get_context("spawn")
        self.size = size
        self.pipes, others = zip(*(context.Pipe() for _ in range(size)), strict=True)
        self.processes = [
            context.Process(target=serve, args=(rank, size, port, other), daemon=True)
            for rank, other in enumerate(others)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable, *arguments: Any, **keywords: Any) -> list[Any]:
        """Return what ``function(collectives, *arguments)`` returns, or the error it raises, on every worker."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments, keywords)))
        assert all(pipe.poll(150) for pipe in self.pipes), "a worker hangs"
        return [pickle.loads(pipe.recv_bytes()) for pipe in self.pipes]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(30)


def serve(rank: int, size: int, port: int, pipe: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    backend = select("cpu")
    backend.bind(rank, threads=1)
    collectives = Collectives.init(backend, rank, size, timeout_s=120)
    while request := pickle.loads(pipe.recv_bytes()):
        function, arguments, keywords = request
        try:
            answer = function(Counted(collectives), *arguments, **keywords)
        except Exception as error:  # the test looks at it
            answer = error
        pipe.send_bytes(pickle.dumps(answer))
    collectives.close()


@pytest.fixture(scope="module", params=[2, 3, 4], ids=lambda size: f"{size} workers")
def world(request):
    world = World(request.param)
    yield world
    world.close()


def held(spread: str, rank: int, workers: int) -> list[int]:
    """Ids of the rows a worker starts with, in an order of its own."""
    mine = [sample for sample in range(SAMPLES) if SPREADS[spread](sample, workers) == rank]
    return mine[::-1] if rank % 2 else mine


def spread_rows(collectives, spread: str, *, strata: bool = False, cost=None, fields=FIELDS, split="tokens"):
    rows = held(spread, collectives.rank, collectives.size)
    batch = make_rows(rows) if rows else Batch({})
    fields = fields if rows else []
    minis = batch.dense("slot") % 3 if strata and rows else None
    result, moved = redistribute(batch, collectives, fields=fields, split=split, cost=cost, strata=minis)
    return result, moved, collectives.calls, collectives.largest


def ids_of(result: Batch) -> list[int]:
    return result.dense("sample_id").tolist()


def tokens_of(samples: Sequence[int]) -> int:
    return sum(sample * 3 % 53 + sample * 11 % 53 for sample in samples)


def payload(samples: Sequence[int]) -> int:
    """Bytes of rows without their ids, counted value by value."""
    rows = make_rows(samples).drop(IDS)
    values = [c.values if isinstance(c, Ragged) else c for c in (rows[name] for name in rows.names)]
    return sum(v.numel() * v.element_size() for v in values)


@pytest.mark.parametrize("split", ["tokens", "groups"])
@pytest.mark.parametrize("spread", SPREADS)
def test_every_row_arrives_once_and_unchanged_in_the_order_of_ids(world, spread, split):
    answers = world.run(spread_rows, spread, split=split)
    parts = [ids_of(result) for result, *_ in answers]
    assert sorted(sample for part in parts for sample in part) == list(range(SAMPLES))
    for result, *_ in answers:
        assert ids_of(result) == sorted(ids_of(result))
        assert result.names == (*IDS, *FIELDS)
        assert result.equals(make_rows(ids_of(result)))
    whole = Batch.concat([result for result, *_ in answers])
    assert whole.take(whole.dense("sample_id").argsort()).equals(make_rows(range(SAMPLES)))


@pytest.mark.parametrize("spread", SPREADS)
def test_tokens_are_balanced(world, spread):
    shares = [tokens_of(ids_of(result)) for result, *_ in world.run(spread_rows, spread)]
    # Any list scheduling ends within one row of the mean (Graham 1966); longest first is far nearer.
    longest = max(tokens_of([sample]) for sample in range(SAMPLES))
    mean = sum(shares) / len(shares)
    assert max(shares) <= min(1.05 * mean, mean + longest)


@pytest.mark.parametrize("spread", SPREADS)
def test_groups_are_whole(world, spread):
    groups = [set(result.dense("group_id").tolist()) for result, *_ in world.run(spread_rows, spread, split="groups")]
    assert sum(map(len, groups)) == len(set().union(*groups)) == SAMPLES // GROUP


@pytest.mark.parametrize("spread", SPREADS)
def test_each_mini_batch_is_balanced(world, spread):
    answers = world.run(spread_rows, spread, strata=True)
    longest = max(tokens_of([sample]) for sample in range(SAMPLES))
    for mini in range(3):
        parts = [[s for s in ids_of(result) if s // GROUP % 7 % 3 == mini] for result, *_ in answers]
        shares = [tokens_of(part) for part in parts]
        assert all(parts) and max(shares) - min(shares) <= longest


@pytest.mark.parametrize("spread", SPREADS)
def test_exactly_the_rows_that_change_worker_are_sent(world, spread):
    for rank, (result, moved, calls, largest) in enumerate(world.run(spread_rows, spread)):
        before, after = set(held(spread, rank, world.size)), set(ids_of(result))
        assert moved.bytes_sent == payload(sorted(before - after))
        assert moved.bytes_received == payload(sorted(after - before))
        assert moved.rows_kept == len(before & after)
        assert moved.seconds > 0
        assert calls == ["all_gather_ints", "all_to_all_bytes"]
        # Nobody holds more than its own: what it had goes out, its share comes in.
        assert largest <= max(payload(sorted(before)), payload(sorted(after)))


def test_an_even_spread_sends_nothing(world):
    answers = world.run(spread_equal_rows)
    assert [moved.bytes_sent for _, moved in answers] == [0] * world.size
    assert [moved.rows_kept for _, moved in answers] == [5] * world.size


def spread_equal_rows(collectives):
    ids = torch.arange(5) + 5 * collectives.rank
    tokens = Ragged(torch.arange(50), torch.arange(6) * 10)
    batch = Batch({"sample_id": ids, "group_id": ids, "slot": ids, "response_ids": tokens})
    return redistribute(batch, collectives, fields=["response_ids"], split="tokens")


def test_only_the_fields_asked_for_come_out(world):
    for result, moved, *_ in world.run(spread_rows, "one holds all", fields=["reward", "slot", "reward"]):
        assert result.names == (*IDS, "reward")
        assert moved.bytes_received == 4 * (len(result) - moved.rows_kept)


def test_ids_alone_need_no_data_plane(world):
    for result, moved, *_ in world.run(spread_rows, "one holds all", fields=[]):
        assert result.names == tuple(IDS) and moved.bytes_received == 0
        assert result.equals(make_rows(ids_of(result)).select(IDS))


def squares(batch: Batch) -> torch.Tensor:
    return batch.lengths("response_ids") ** 2


def test_a_cost_function_decides_what_is_balanced(world):
    answers = world.run(spread_rows, "in blocks", cost=squares)
    shares = [sum((sample * 11 % 53) ** 2 for sample in ids_of(result)) for result, *_ in answers]
    assert max(shares) - min(shares) <= 52**2 / 2


def test_nobody_has_rows(world):
    for result in world.run(no_rows):
        assert len(result) == 0 and result.equals(make_rows([]))


def no_rows(collectives):
    batch = make_rows([]) if collectives.rank == 1 else Batch({})
    return redistribute(batch, collectives, fields=FIELDS if collectives.rank else [], split="tokens")[0]


def flawed_rows(collectives, flaw: str):
    rank = collectives.rank
    batch = make_rows([10 * rank, 10 * rank + 1])
    if rank == 1 and flaw == "missing":
        batch = batch.drop(["reward"])
    if rank == 1 and flaw == "dtype":
        batch = batch.with_columns(reward=batch.dense("reward").double())
    if rank == 1 and flaw == "kind":
        batch = batch.with_columns(response_ids=torch.zeros(2, 5, dtype=torch.int64))
    if rank == 1 and flaw == "no id":
        batch = batch.drop(["group_id"])
    if flaw == "float id":
        batch = batch.with_columns(slot=batch.dense("slot").float())
    if rank == 1 and flaw == "twice":
        batch = make_rows([5, 0])
    fields = FIELDS[:3] if rank == 1 and flaw == "field" else FIELDS
    return redistribute(batch, collectives, fields=fields, split="tokens")


@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        ("missing", "column 'reward': worker 1 does not have it"),
        ("field", "column 'reward': worker 1 does not have it"),
        ("dtype", r"column 'reward': it is float32 \[\] on worker 0, float64 \[\] on worker 1"),
        ("kind", r"column 'response_ids': it is ragged int64 \[\] on worker 0, int64 \[5\] on worker 1"),
        ("no id", "column 'group_id': worker 1 does not have it"),
        ("float id", r"column 'slot': it is float32 \[\], not int64"),
        ("twice", "two rows have the sample id 0"),
    ],
)
def test_a_flaw_on_one_worker_is_an_error_on_all_and_no_hang(world, flaw, says):
    for error in world.run(flawed_rows, flaw):
        with pytest.raises(SiirlError, match=says):
            raise error


def test_one_worker_gets_its_own_tensors_back():
    batch = make_rows(range(5))
    result, moved = redistribute(batch, Collectives.single(), fields=["response_ids"], split="groups")
    assert result.names == (*IDS, "response_ids")
    assert all(result[name] is batch[name] for name in result.names)
    assert (moved.bytes_sent, moved.bytes_received, moved.rows_kept) == (0, 0, 5)
