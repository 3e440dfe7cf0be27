"""Worker processes: starting them on this machine, and watching them until all have ended or one has failed."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from siirl.config.schema import Config
from siirl.device.backend import Backend, Role
from siirl.device.host import usable_cores
from siirl.device.selection import launch_environment
from siirl.errors import DeviceError, RequestError, SiirlError
from siirl.telemetry.metrics import read_metrics
from siirl.worker.place import Place

_POLL_S = 0.1
# after one worker failed, the others have this long to end by themselves
_GRACE_S = 10.0
_CLASSES = {cls.exit_code: cls for cls in (SiirlError, RequestError, DeviceError)}


class Stopped(SiirlError):
    """A signal ended the run after a checkpoint."""

    def __init__(self, number: int, directory: Path) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after a checkpoint; --resume --run-dir {directory} goes on from there")
        self.exit_code = 128 + number


class Process(Protocol):
    """A worker as a launcher sees it; `subprocess.Popen` is one."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


def run_processes(directory: Path, config: Config, backend: Backend, resume: bool) -> None:
    """Start ``config.workers`` workers on this machine and see them through; raises as `supervise` does."""
    count, port = config.workers, free_port("127.0.0.1")

    def start() -> list[Process]:
        role, threads = device_role(config), config.threads_per_worker
        places = [Place(rank, count, rank, count) for rank in range(count)]
        environments = [worker_environment(backend, p, "127.0.0.1", port, threads, role) for p in places]
        return [start_process(directory, environment, resume) for environment in environments]

    supervise(directory, start)


def supervise(directory: Path, start: Callable[[], Sequence[Process]]) -> None:
    """Start workers, in the order of their ranks, wait for them, pass signals on.

    Raises:
        SiirlError: a worker failed; names it, why, and at which step. The others are ended.
        Stopped: SIGTERM or SIGINT ended the run.
    """
    for old in (directory / "logs").glob("worker_*.error.json"):
        old.unlink()
    with _signals() as received:
        workers = start()
        try:
            _wait(workers, received)
        finally:
            ended = _end(workers)
    codes = [worker.wait() for worker in workers]
    if received and all(code in (0, 128 + received[0]) for code in codes):
        raise Stopped(received[0], directory)
    if any(codes):
        raise _failure(directory, codes, ended)


def free_port(address: str) -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def device_role(config: Config) -> Role:
    """What a worker is to its device: vLLM frees and takes pools of the memory that training computes in."""
    return "colocated" if config.rollout.engine == "vllm" else "trainer"


def worker_environment(
    backend: Backend, place: Place, address: str, port: int, threads: int | None = None, role: Role = "trainer"
) -> dict[str, str]:
    """This process's environment and what makes it that of a worker, which meets the others at an address and port."""
    return {
        **os.environ,
        **launch_environment(backend, role),
        **place.variables(),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads or max(1, usable_cores() // place.local_workers)),
        "PYTHONHASHSEED": "0",  # some data sources order sets of strings; every worker must see the same rows
        "SIIRL_LAUNCHER": str(os.getpid()),
    }


def start_process(
    directory: Path, environment: dict[str, str], resume: bool, cwd: str | None = None
) -> subprocess.Popen[bytes]:
    """Start one worker of the run in `directory`."""
    command = [sys.executable, "-m", "siirl.worker", str(directory), *(["--resume"] if resume else [])]
    # a group of its own: an interrupt from the terminal reaches the launcher, which passes it on once
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, cwd=cwd)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of the signals that ask this process to end, as they come."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: Sequence[Process], received: list[int]) -> None:
    """Until all have ended, or the grace period after the first failure is over; passes signals on meanwhile."""
    deadline: float | None = None
    passed = 0
    while [worker for worker in workers if worker.poll() is None]:
        for number in received[passed:]:
            passed += 1
            for worker in workers:
                worker.send_signal(number)
        if deadline is None and any(worker.returncode for worker in workers):
            deadline = time.monotonic() + _GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(_POLL_S)


def _end(workers: Sequence[Process]) -> set[int]:
    """End the workers that still run; their ranks."""
    running = {rank for rank, worker in enumerate(workers) if worker.poll() is None}
    for rank in running:
        workers[rank].kill()
    for rank in running:
        workers[rank].wait()
    return running


def _failure(directory: Path, codes: list[int], ended: set[int]) -> SiirlError:
    """The sentence for a failed run; `ended` are the workers that the launcher ended.

    A worker that someone else killed is the cause, whatever the others said of it. Any other signal may be a library's
    way to leave when its peers are gone, and counts for less than what a worker said.
    """
    metrics = read_metrics(directory)
    last = f"after step {metrics[-1]['step']} of {metrics[-1]['stage']}" if metrics else "before its first step ended"
    resume = f"; --resume --run-dir {directory} goes on from the last checkpoint"
    failed = [rank for rank, code in enumerate(codes) if code and rank not in ended]
    told = {rank: error for rank in failed if (error := _error_of(directory, rank)) is not None}
    causes = [rank for rank in told if not told[rank]["consequence"]]
    killed = [rank for rank in failed if codes[rank] == -signal.SIGKILL]
    aborted = [rank for rank in failed if codes[rank] < 0]
    by_time = sorted(told, key=lambda rank: told[rank]["time"])
    rank = [*killed, *(rank for rank in by_time if rank in causes), *aborted, *by_time, *failed][0]
    if rank in told:
        sentence, exit_code = told[rank]["sentence"], told[rank]["exit_code"]
        said = sentence if exit_code == 2 else f"worker {rank} failed {last}: {sentence}{resume}"
        return _CLASSES.get(exit_code, SiirlError)(said)
    if codes[rank] < 0:
        return SiirlError(f"worker {rank} was ended by {signal.Signals(-codes[rank]).name} {last}{resume}")
    log = f"{directory}/logs/worker_{rank:03d}.log"
    return SiirlError(f"worker {rank} ended with status {codes[rank]} {last}; see {log}")


def _error_of(directory: Path, rank: int) -> dict[str, Any] | None:
    path = error_file(directory, rank)
    return json.loads(path.read_text()) if path.is_file() else None


def error_file(directory: Path, rank: int) -> Path:
    """Where worker ``rank`` leaves the sentence it ended with."""
    return directory / "logs" / f"worker_{rank:03d}.error.json"


def write_error(directory: Path, rank: int, sentence: str, exit_code: int = 1, consequence: bool = False) -> None:
    """Leave the sentence that worker ``rank`` ended with; a ``consequence`` is that of another worker's end."""
    said = {"sentence": sentence, "exit_code": exit_code, "consequence": consequence, "time": time.time()}
    path = error_file(directory, rank)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(said))


@contextmanager
def worker_log(directory: Path, rank: int, redirect: bool = False) -> Iterator[None]:
    """Send this process's logging to ``logs/worker_000.log``; with ``redirect`` standard output and error too."""
    path = directory / "logs" / f"worker_{rank:03d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)  # whichever worker is first
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    if redirect:
        with path.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
