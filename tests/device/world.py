"""Runs a function in several real worker processes that share a process group."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def run_world(function: Callable[[int, int], Any], size: int) -> list[Any]:
    """`function(rank, size)` in `size` spawned processes; its results by rank, None for one that died."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ready = context.Barrier(size)  # all have imported PyTorch: timeouts in the tests measure the calls alone
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    workers = [
        context.Process(target=_enter, args=(function, rank, size, port, ready, pipes[rank][1])) for rank in range(size)
    ]
    for worker, (_, sender) in zip(workers, pipes, strict=True):
        worker.start()
        sender.close()
    results = []
    for worker, (receiver, _) in zip(workers, pipes, strict=True):
        try:
            results.append(receiver.recv())
        except EOFError:
            results.append(None)
        worker.join(60)
    return results


def _enter(function: Callable[[int, int], Any], rank: int, size: int, port: int, ready: Any, sender: Any) -> None:
    os.environ["MASTER_PORT"] = str(port)
    os.environ.pop("MASTER_ADDR", None)
    from siirl.device import select
    from tests.device_under_test import NAME

    select(NAME).bind(rank, threads=1)
    ready.wait(120)
    sender.send(function(rank, size))
