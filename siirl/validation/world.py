"""Workers in processes of their own that share a process group and do what they are told, each with a deadline.

Importing this module imports no torch: a worker prepares its environment for the device before that.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from siirl.device import select
from siirl.device.backend import Backend
from siirl.validation.checks import Broken

if TYPE_CHECKING:
    from siirl.device.collectives import Collectives

Setup = Callable[[], Backend]
"""Makes the back end, selected and loaded, in a worker's process; a function that can be pickled."""

START_S = 120.0
DEADLINE_S = 45.0
# Later than the deadline, so that a call that hangs is found hanging and not failing.
_COLLECTIVE_TIMEOUT_S = 90.0


class RemoteError(Exception):
    """What a worker's function raised: its type's name and its message."""


def by_name(name: str) -> Backend:
    """Select a back end by its name."""
    return select(name, role="validation")


class World:
    """`size` spawned workers. A call that does not end in time, or kills a worker, ends all; the next starts anew."""

    def __init__(self, setup: Setup, size: int) -> None:
        self.size = size
        self._setup = setup
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *arguments: Any, deadline_s: float | None = None) -> list[Any]:
        """`function(collectives, *arguments)` on every worker at once; the results by rank.

        Raises:
            Broken: a worker raised, died or did not answer in time.
        """
        answers = self.try_run(function, *arguments, deadline_s=deadline_s)
        for rank, answer in enumerate(answers):
            if isinstance(answer, RemoteError):
                raise Broken(f"worker {rank} raised {answer}")
        return answers

    def try_run(self, function: Callable[..., Any], *arguments: Any, deadline_s: float | None = None) -> list[Any]:
        """As `run`, but what a worker raised is its answer."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function.__module__, function.__qualname__, arguments))
        return self._collect(deadline_s or DEADLINE_S, f"{function.__name__}{arguments}")

    def close(self) -> None:
        """End all workers."""
        for process, pipe in self._workers:
            pipe.close()  # an idle worker ends by itself
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self._setup, rank, self.size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self._collect(START_S, "starting")

    def _collect(self, deadline_s: float, what: str) -> list[Any]:
        answers: dict[int, Any] = {}
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        until = time.monotonic() + deadline_s
        while len(answers) < self.size:
            ready = wait([pipe for pipe, rank in ranks.items() if rank not in answers], until - time.monotonic())
            if not ready:
                missing = sorted(set(ranks.values()) - answers.keys())
                self._kill()
                raise Broken(f"{what} hangs: workers {missing} gave no answer within {deadline_s:g} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    answers[ranks[pipe]] = pipe.recv()
                except EOFError:
                    process = self._workers[ranks[pipe]][0]
                    process.join(5)
                    self._kill()
                    status = process.exitcode
                    raise Broken(f"{what}: worker {ranks[pipe]} died with exit status {status}") from None
        return [answers[rank] for rank in range(self.size)]

    def _kill(self) -> None:
        for process, _ in self._workers:
            process.kill()
        self.close()


def _serve(setup: Setup, rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    backend = setup()
    backend.bind(rank, threads=1)
    from siirl.device.collectives import Collectives

    collectives = Collectives.init(backend, rank, size, _COLLECTIVE_TIMEOUT_S)
    pipe.send("ready")
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            break
        pipe.send(_answer(collectives, module, name, arguments))


def _answer(collectives: Collectives, module: str, name: str, arguments: tuple[Any, ...]) -> Any:
    try:
        return getattr(importlib.import_module(module), name)(collectives, *arguments)
    except Exception as error:  # whatever it is, it is the answer
        return RemoteError(f"{type(error).__name__}: {error}")
