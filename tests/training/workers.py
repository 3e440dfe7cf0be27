"""Several worker processes for a test: each calls the same function, whose results come back in rank order."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from siirl.device.collectives import Collectives
from tests import device_under_test

Work = Callable[..., Any]


def together(work: Work, size: int, folder: Path, *arguments: Any) -> list[Any]:
    """What ``work(collectives, *arguments)`` returned on each of ``size`` workers: tensors and plain values.

    ``work`` is a function of a module. Starting costs seconds: do much in one call.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (size, port, str(folder), work, arguments), nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _worker(rank: int, size: int, port: int, folder: str, work: Work, arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    backend = device_under_test.backend()
    backend.bind(rank)
    collectives = Collectives.init(backend, rank, size, 60)
    torch.save(work(collectives, *arguments), f"{folder}/{rank}.pt")
    collectives.close()
