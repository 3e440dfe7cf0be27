"""Rows move between real processes: each arrives once, bit by bit the same, and only what must move is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from siirl.data.batch import Batch, Ragged
from siirl.data.databuffer import redistribute
from siirl.device.collectives import Collectives
from siirl.errors import SiirlError
from tests.data.world import FIELDS, GROUP, IDS, SAMPLES, World, make_rows

SPREADS: dict[str, Callable[[int, int], int]] = {  # (sample, workers) -> worker that holds it at first
    "in blocks": lambda sample, workers: sample * workers // SAMPLES,
    "round robin": lambda sample, workers: sample % workers,
    "one holds all": lambda sample, workers: workers - 1,
    "one holds none": lambda sample, workers: 1 + sample % (workers - 1),
}


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
        # the segment for each other worker ends at a multiple of eight bytes
        assert 0 <= moved.bytes_sent - payload(sorted(before - after)) < 8 * world.size
        assert 0 <= moved.bytes_received - payload(sorted(after - before)) < 8 * world.size
        assert moved.rows_kept == len(before & after)
        assert moved.seconds > 0
        assert calls == ["all_gather_ints", "all_to_all_bytes"]
        # Nobody holds more than its own: what it had goes out, its share comes in.
        assert largest <= max(payload(sorted(before)), payload(sorted(after))) + 8 * world.size


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
        assert 0 <= moved.bytes_received - 4 * (len(result) - moved.rows_kept) < 8 * world.size


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
