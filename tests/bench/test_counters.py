"""Counters are exact: what a short program does can be counted by hand."""

from __future__ import annotations

import pytest
import torch

from siirl.bench.counters import Counted, count, total
from siirl.bench.world import World
from siirl.device import select
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.errors import SiirlError


@pytest.fixture
def backend() -> Backend:
    return select("cpu")


def test_memory_is_counted_from_what_operators_make_to_where_it_is_freed(backend: Backend) -> None:
    given = torch.ones(1000)

    def work() -> None:
        a = given + 1  # 4000 bytes
        b = a * 2  # 8000
        del a  # 4000
        view = b[:10]  # the same memory
        del b
        c = torch.zeros(500, dtype=torch.float64)  # 8000
        del view, c
        torch.zeros(100)  # 400

    counters = count(work, backend).counters
    assert counters["op_calls"] == 5
    assert counters["allocations"] == 4
    assert counters["allocated_bytes"] == 4000 + 4000 + 4000 + 400
    assert counters["peak_bytes"] == 8000


def test_a_backward_pass_counts(backend: Backend) -> None:
    x = torch.ones(100, requires_grad=True)
    assert count(lambda: x.sin(), backend).ops == {"aten.sin.default": 1}
    both = count(lambda: x.sin().backward(torch.ones(100)), backend)
    assert both.ops["aten.cos.default"] == both.ops["aten.mul.Tensor"] == 1  # d sin(x) = cos(x) dx
    assert both.counters["peak_bytes"] >= 3 * 400  # dy, cos(x), their product


def test_the_same_work_counts_the_same(backend: Backend) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32)
    optimizer = torch.optim.AdamW(layer.parameters())

    def step() -> None:
        layer(torch.ones(3, 2, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    first = count(step, backend)
    assert [count(step, backend) for _ in range(3)] == [first] * 3


class Calls:
    """Two collectives of known sizes."""

    def __init__(self, backend: Backend, collectives: Collectives) -> None:
        self.backend, self.collectives = backend, collectives

    def counted(self) -> Counted:
        return count(self.work, self.backend)

    def work(self) -> None:
        self.collectives.all_reduce(torch.ones(25), "sum")
        send = torch.zeros(2 * self.collectives.size, dtype=torch.uint8)
        self.collectives.all_to_all_bytes(send, [2] * self.collectives.size, [2] * self.collectives.size)

    def fail(self) -> None:
        raise ValueError("no reason")


def test_collectives_of_all_workers_are_counted_with_their_bytes(backend: Backend) -> None:
    with World(backend, 2, Calls) as world:
        parts = world.call("counted")
        assert [part.counters["collectives"] for part in parts] == [2, 2]
        # 25 float32 are reduced in place; 4 bytes go out and 4 come in
        assert [part.counters["collective_bytes"] for part in parts] == [100 + 8, 100 + 8]
        assert total(parts).counters["collective_bytes"] == 216
        assert total(parts).ops["c10d.allreduce_.default"] == 2
        with pytest.raises(SiirlError, match="worker 0 of the benchmark failed: ValueError: no reason"):
            world.call("fail")
