"""Worker processes that stay up while a benchmark measures them. Importing this module imports no PyTorch."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from siirl.device.backend import Backend
from siirl.device.selection import launch_environment
from siirl.errors import SiirlError

SECONDS = 120  # the longest that a call may take


class World:
    """``size`` workers on this machine, each with what ``factory(backend, collectives, *arguments)`` gave it.

    A context manager: leaving it ends the workers.

    Raises:
        SiirlError: a worker raised, or did not answer in time; names it.
    """

    def __init__(self, backend: Backend, size: int, factory: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(rank, size, theirs, factory, arguments), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        with _environment({**launch_environment(backend), **_rendezvous()}):
            for process, (_, theirs) in zip(self._processes, pairs, strict=True):
                process.start()
                theirs.close()

    def __enter__(self) -> World:
        try:
            self._answers()
        except SiirlError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()

    def call(self, method: str) -> list[Any]:
        """Call a method of every worker's object at once; what it returns, by rank."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps(method))
        return self._answers()

    def _answers(self) -> list[Any]:
        return [self._answer(rank) for rank in range(len(self._pipes))]

    def _answer(self, rank: int) -> Any:
        if not self._pipes[rank].poll(SECONDS):
            raise SiirlError(f"worker {rank} of the benchmark did not answer within {SECONDS} s")
        try:
            error, answer = pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            raise SiirlError(f"worker {rank} of the benchmark ended without a word") from None
        if error is not None:
            raise SiirlError(f"worker {rank} of the benchmark failed: {error}")
        return answer


def _serve(rank: int, size: int, pipe: Any, factory: Any, arguments: tuple[Any, ...]) -> None:
    """A worker's life: until the other end of the pipe is closed."""
    from siirl.bench.run import make_ready
    from siirl.device import Collectives, select

    try:
        backend = make_ready(select(), rank)
        collectives = Collectives.init(backend, rank, size, timeout_s=SECONDS)
        subject = factory(backend, collectives, *arguments)
        pipe.send_bytes(pickle.dumps((None, None)))
        while True:
            try:
                method = pickle.loads(pipe.recv_bytes())
            except EOFError:
                break
            pipe.send_bytes(pickle.dumps((None, getattr(subject, method)())))
    except Exception as error:  # told to who waits for the answer
        pipe.send_bytes(pickle.dumps((f"{type(error).__name__}: {error}", None)))
        traceback.print_exc()
        raise SystemExit(1) from error


def _rendezvous() -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """The environment of processes started meanwhile."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
