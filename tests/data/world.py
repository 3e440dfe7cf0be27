"""Worker processes for tests that move rows, and rows whose content follows from their ids."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.multiprocessing as mp

from siirl.data.batch import Batch, Ragged
from siirl.device import select
from siirl.device.collectives import Collectives

SAMPLES, GROUP, DTYPES = 48, 4, (torch.uint8, torch.int8, torch.int64, torch.float32, torch.bfloat16, torch.bool)
IDS = ["sample_id", "group_id", "slot"]


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
