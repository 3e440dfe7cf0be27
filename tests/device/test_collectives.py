"""Collectives between real processes: every worker gets what the definition says, and a lost worker is a sentence."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import psutil
import pytest
import torch

from siirl.device import Collectives, CommSpec, Unsupported, current
from siirl.errors import RequestError
from siirl_cpu import CpuBackend
from siirl_npu import NpuBackend
from tests.device.world import run_world

DTYPES = [torch.bool, torch.int16, torch.float8_e4m3fn, torch.bfloat16, torch.complex64, torch.float64]


class NarrowBackend(CpuBackend):
    """A library that exchanges float32 alone, so that bytes must travel in its words."""

    def communication(self) -> CommSpec:
        return CommSpec("gloo", {"all_to_all": frozenset({"float32"})})


def segment_sizes(size: int) -> list[list[int]]:
    """Bytes from worker i to worker j: uneven, no multiples of four, zeros among them."""
    return [[(3 * i + 5 * j) % 7 if i != 1 else 0 for j in range(size)] for i in range(size)]


def all_to_all(comm: Collectives) -> list[int]:
    sizes = segment_sizes(comm.size)
    outgoing = sizes[comm.rank]
    send = torch.tensor([16 * comm.rank + j for j, n in enumerate(outgoing) for _ in range(n)], dtype=torch.uint8)
    return comm.all_to_all_bytes(send, outgoing, [row[comm.rank] for row in sizes]).tolist()


def message(function: Any, *arguments: Any) -> str:
    with pytest.raises(Exception) as caught:
        function(*arguments)
    return f"{caught.type.__name__}: {caught.value}"


def exercise(rank: int, size: int) -> dict[str, Any]:
    comm = Collectives.init(current(), rank, size, timeout_s=60)
    own = torch.tensor([rank + 1.0, -10.0 * rank])
    parameter = torch.nn.Parameter(own.clone())
    matrix = torch.arange(6.0).view(2, 3) + rank
    result = {
        **{op: comm.all_reduce(own.clone(), op).tolist() for op in ("sum", "mean", "max", "min")},
        "in place": comm.all_reduce(parameter, "mean") is parameter and parameter.tolist(),
        "int64": comm.all_reduce(torch.tensor([2**40 + rank])).tolist(),
        "int16": comm.all_reduce(torch.tensor([1000 * (rank + 1)], dtype=torch.int16)).tolist(),
        "any": comm.all_reduce(torch.tensor([rank == 1, False]), "max").tolist(),
        "view": (comm.all_reduce(matrix[:, 1]), matrix.tolist())[1],
        "scalar": comm.all_reduce(torch.tensor(rank + 1.0), "mean").item(),
        "nothing": comm.all_reduce(torch.zeros(0)).tolist(),
        "broadcast": {
            str(dtype): comm.broadcast(torch.tensor([rank, 1 - rank]).to(dtype), src=1).tolist() for dtype in DTYPES
        },
        "broadcast view": (comm.broadcast(matrix.t()[1], src=0), matrix.tolist())[1],
        "ints": [t.tolist() for t in comm.all_gather_ints(torch.arange(2 * rank))],
        "rows": [t.tolist() for t in comm.all_gather_ints(torch.full((rank, 3), rank))],
        "no ints": [t.tolist() for t in comm.all_gather_ints(torch.zeros(0, dtype=torch.int64))],
        "bytes": comm.all_gather_bytes(b"\0x" * rank),
        "no bytes": comm.all_gather_bytes(b""),
        "gathered": comm.gather_bytes(f"worker {rank}".encode(), dst=1),
        "all to all": all_to_all(comm),
        "mismatch": message(comm.all_gather_ints, torch.zeros(1, rank + 1, dtype=torch.int64)),
        "listening": {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN},
    }
    comm.barrier()
    narrow = NarrowBackend()
    narrow.load()
    result["all to all in words"] = all_to_all(Collectives(narrow, rank, size, timeout_s=60))
    comm.close()
    return result


@pytest.fixture(scope="module", params=[2, 3])
def world(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_world(exercise, request.param)


def test_reductions_follow_their_definitions(world: list[dict[str, Any]]) -> None:
    size = len(world)
    columns = list(zip(*[[rank + 1.0, -10.0 * rank] for rank in range(size)], strict=True))
    for result in world:
        assert result["sum"] == [sum(column) for column in columns]
        assert result["mean"] == result["in place"] == pytest.approx([sum(column) / size for column in columns])
        assert result["max"] == [max(column) for column in columns]
        assert result["min"] == [min(column) for column in columns]
        assert result["int64"] == [size * 2**40 + sum(range(size))]
        assert result["scalar"] == (size + 1) / 2
        assert result["nothing"] == []


def test_a_dtype_the_library_lacks_is_reduced_all_the_same(world: list[dict[str, Any]]) -> None:
    for result in world:
        assert result["int16"] == [1000 * sum(range(1, len(world) + 1))]
        assert result["any"] == [True, False]


def test_a_view_is_reduced_in_place_and_its_neighbours_stay(world: list[dict[str, Any]]) -> None:
    size = len(world)
    for rank, result in enumerate(world):
        reduced = [[rank, size * 1 + sum(range(size)), 2 + rank], [3 + rank, size * 4 + sum(range(size)), 5 + rank]]
        assert result["view"] == reduced
        assert [row[1] for row in result["broadcast view"]] == [row[1] for row in reduced]


def test_broadcast_moves_every_dtype(world: list[dict[str, Any]]) -> None:
    for result in world:
        assert all(values == [1, 0] for values in result["broadcast"].values()), result["broadcast"]


def test_gathers_keep_rank_order_and_uneven_lengths(world: list[dict[str, Any]]) -> None:
    ranks = range(len(world))
    for rank, result in enumerate(world):
        assert result["ints"] == [list(range(2 * r)) for r in ranks]
        assert result["rows"] == [[[r, r, r]] * r for r in ranks]
        assert result["no ints"] == [[] for _ in ranks]
        assert result["bytes"] == [b"\0x" * r for r in ranks]
        assert result["no bytes"] == [b"" for _ in ranks]
        assert result["gathered"] == ([f"worker {r}".encode() for r in ranks] if rank == 1 else None)


def test_all_to_all_delivers_uneven_segments_in_rank_order(world: list[dict[str, Any]]) -> None:
    sizes = segment_sizes(len(world))
    assert any(0 in row for row in sizes)
    for rank, result in enumerate(world):
        expected = [16 * i + rank for i in range(len(world)) for _ in range(sizes[i][rank])]
        assert result["all to all"] == expected
        assert result["all to all in words"] == expected


def test_rows_of_different_shape_are_refused_on_every_worker(world: list[dict[str, Any]]) -> None:
    for result in world:
        assert result["mismatch"].startswith("SiirlError: all_gather_ints: the workers' rows differ in shape")


def test_workers_listen_on_the_loopback_interface_alone(world: list[dict[str, Any]]) -> None:
    for result in world:
        assert result["listening"] <= {"127.0.0.1"}
    assert world[0]["listening"], "worker 0 serves the store"


def lose_worker_one(rank: int, size: int) -> str:
    comm = Collectives.init(current(), rank, size, timeout_s=30)
    comm.barrier()
    if rank == 1:
        os._exit(9)
    return message(comm.all_reduce, torch.ones(4))


def test_a_lost_worker_is_a_sentence() -> None:
    survivor, dead = run_world(lose_worker_one, 2)
    assert dead is None
    assert survivor.startswith("WorkerLost: all_reduce failed on worker 0 of 2: another worker was lost"), survivor


def come_late(rank: int, size: int) -> str | None:
    comm = Collectives.init(current(), rank, size, timeout_s=3)
    if rank == 1:
        time.sleep(8)
        return None
    return message(comm.all_gather_bytes, b"early")


def test_a_worker_that_does_not_come_is_a_sentence() -> None:
    early, _ = run_world(come_late, 2)
    assert early.startswith("WorkerLost: all_gather failed on worker 0 of 2"), early
    assert "did not arrive within 3 s" in early


def meet_nobody(rank: int, size: int) -> tuple[str, str]:
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
        taken = message(Collectives.init, current(), 0, 2, 2.0)
    return taken, message(Collectives.init, current(), 0, 2, 2.0)


def test_a_meeting_that_fails_is_a_sentence() -> None:
    ((taken, alone),) = run_world(meet_nobody, 1)
    assert taken.startswith("SiirlError: worker 0 cannot listen on 127.0.0.1, MASTER_PORT"), taken
    assert alone.startswith("WorkerLost: the first meeting failed on worker 0 of 2"), alone


def test_one_worker_needs_no_process_group() -> None:
    comm = Collectives.single()
    t = torch.tensor([1.0, 2.0])
    assert comm.all_reduce(t, "mean") is t
    assert comm.broadcast(t) is t
    ints = torch.arange(3)
    assert comm.all_gather_ints(ints)[0] is ints
    assert comm.all_gather_bytes(b"x") == [b"x"]
    assert comm.gather_bytes(b"x") == [b"x"]
    assert comm.all_to_all_bytes(torch.tensor([7], dtype=torch.uint8), [1], [1]).tolist() == [7]
    comm.barrier()
    comm.close()
    assert not torch.distributed.is_initialized()


def test_what_has_no_meaning_is_refused_with_one_worker_too() -> None:
    comm = Collectives.single()
    with pytest.raises(ValueError, match="mean of torch.int64"):
        comm.all_reduce(torch.tensor([1]), "mean")
    with pytest.raises(ValueError, match="sum of booleans"):
        comm.all_reduce(torch.tensor([True]))
    with pytest.raises(ValueError, match="not 'product'"):
        comm.all_reduce(torch.ones(1), "product")  # type: ignore[arg-type]


def test_the_launcher_must_name_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(RequestError, match="MASTER_PORT is not set"):
        Collectives.init(CpuBackend(), 0, 2, 1.0)


def test_a_device_library_with_few_dtypes_is_worked_around_without_loss() -> None:
    comm = Collectives(NpuBackend(), 0, 2, 1.0)

    def way(dtype: torch.dtype) -> tuple[torch.dtype, bool]:
        return comm._reduction_way(torch.empty(2, dtype=dtype, device="meta"))

    on_device, on_host = False, True
    assert way(torch.bfloat16) == (torch.bfloat16, on_device)
    assert way(torch.int8) == (torch.int32, on_device)
    assert way(torch.bool) == (torch.int32, on_device)
    assert way(torch.float64) == (torch.float64, on_host)
    assert comm._byte_carrier() == torch.float32
    with pytest.raises(Unsupported, match="complex64"):
        way(torch.complex64)
