"""The local launcher: one process per worker on this machine, watched until all have ended or one has failed."""

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from siirl.config.schema import Config
from siirl.device.backend import Backend
from siirl.device.host import usable_cores
from siirl.device.selection import launch_environment
from siirl.errors import DeviceError, RequestError, SiirlError
from siirl.telemetry.metrics import read_metrics

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


def run_processes(directory: Path, config: Config, backend: Backend, resume: bool) -> None:
    """Start ``config.workers`` workers, wait for them, pass signals on.

    Raises:
        SiirlError: a worker failed; names it, why, and at which step. The others are ended.
        Stopped: SIGTERM or SIGINT ended the run.
    """
    for old in (directory / "logs").glob("worker_*.error.json"):
        old.unlink()
    environment = {**os.environ, **launch_environment(backend), **_rendezvous(config)}
    workers = [_start(directory, rank, environment, resume) for rank in range(config.workers)]
    with _pass_signals(workers) as received:
        try:
            _wait(workers)
        finally:
            _end(workers)
    codes = [worker.returncode for worker in workers]
    if received and all(code in (0, 128 + received[0]) for code in codes):
        raise Stopped(received[0], directory)
    if any(codes):
        raise _failure(directory, codes)


def _rendezvous(config: Config) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = config.threads_per_worker or max(1, usable_cores() // config.workers)
    return {
        "WORLD_SIZE": str(config.workers),
        "LOCAL_WORLD_SIZE": str(config.workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONHASHSEED": "0",  # some data sources order sets of strings; every worker must see the same rows
    }


def _start(directory: Path, rank: int, environment: dict[str, str], resume: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "siirl.worker", str(directory), *(["--resume"] if resume else [])]
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "SIIRL_LAUNCHER": str(os.getpid())}
    # a group of its own: an interrupt from the terminal reaches the launcher, which passes it on once
    return subprocess.Popen(command, env=environment | own, stdin=subprocess.DEVNULL, start_new_session=True)


@contextmanager
def _pass_signals(workers: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    received: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for worker in workers:
            worker.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or the grace period after the first failure is over."""
    deadline: float | None = None
    while any(worker.poll() is None for worker in workers):
        if deadline is None and any(worker.poll() for worker in workers):
            deadline = time.monotonic() + _GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(_POLL_S)


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
            worker.wait()


def _failure(directory: Path, codes: list[int]) -> SiirlError:
    """The sentence for a failed run: a worker that was killed is the cause, what the others then said is not."""
    metrics = read_metrics(directory)
    last = f"after step {metrics[-1]['step']} of {metrics[-1]['stage']}" if metrics else "before its first step ended"
    errors = {rank: _error_of(directory, rank) for rank, code in enumerate(codes) if code}
    killed = [rank for rank, code in enumerate(codes) if code < 0 and code != -signal.SIGKILL]
    killed += [rank for rank, code in enumerate(codes) if code == -signal.SIGKILL and errors[rank] is None]
    told = {rank: error for rank, error in errors.items() if error is not None}
    causes = {rank: error for rank, error in told.items() if not error["consequence"]}
    resume = f"; --resume --run-dir {directory} goes on from the last checkpoint"
    if causes:
        rank, error = min(causes.items(), key=lambda item: item[1]["time"])
        kind = _CLASSES.get(error["exit_code"], SiirlError)
        return kind(
            error["sentence"]
            if error["exit_code"] == 2
            else f"worker {rank} failed {last}: {error['sentence']}{resume}"
        )
    if killed:
        name = signal.Signals(-codes[killed[0]]).name
        return SiirlError(f"worker {killed[0]} was ended by {name} {last}{resume}")
    if told:
        rank, error = min(told.items(), key=lambda item: item[1]["time"])
        return SiirlError(f"worker {rank} failed {last}: {error['sentence']}{resume}")
    rank = next(rank for rank, code in enumerate(codes) if code)
    return SiirlError(
        f"worker {rank} ended with status {codes[rank]} {last}; see {directory}/logs/worker_{rank:03d}.log"
    )


def _error_of(directory: Path, rank: int) -> dict[str, Any] | None:
    path = error_file(directory, rank)
    return json.loads(path.read_text()) if path.is_file() else None


def error_file(directory: Path, rank: int) -> Path:
    """Where worker ``rank`` leaves the sentence it ended with."""
    return directory / "logs" / f"worker_{rank:03d}.error.json"


@contextmanager
def worker_log(directory: Path, rank: int, redirect: bool = False) -> Iterator[None]:
    """Send this process's logging to ``logs/worker_000.log``; with ``redirect`` standard output and error too."""
    path = directory / "logs" / f"worker_{rank:03d}.log"
    path.parent.mkdir(exist_ok=True)
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
