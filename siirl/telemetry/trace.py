"""Traces: what each worker did when, on one clock, for Perfetto, chrome://tracing and the report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from siirl.telemetry.jsonl import encode_line, open_for_append, read_jsonl, rewrite

FOLDER = "traces"


class Tracer:
    """Times one worker's spans.

    Events are Chrome trace "complete" events (`ts` and `dur` in microseconds, `pid` the worker's rank). Time stamps are
    the wall clock at the tracer's start plus a monotonic difference, so the workers share one clock and no span has a
    negative length. Durations are kept whether or not the events are written.
    """

    def __init__(self, run_dir: Path | str, rank: int, enabled: bool = True) -> None:
        self._path = worker_file(run_dir, rank)
        self._rank = rank
        self._enabled = enabled
        self._events: list[bytes] = []
        self._durations: dict[str, float] = {}
        self._clock_offset_ns = time.time_ns() - time.perf_counter_ns()

    @contextmanager
    def span(self, name: str, *, step: int | None = None, stage: str = "main", **args: Any) -> Iterator[None]:
        """Time the block as `name`, a node's id in a worker's plan; `args` are JSON values shown beside it."""
        start_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            duration_ns = time.perf_counter_ns() - start_ns
            self._durations[name] = self._durations.get(name, 0.0) + duration_ns / 1e9
            if self._enabled:
                event = {"name": name, "ph": "X", "pid": self._rank, "tid": 0}
                event |= {"ts": (start_ns + self._clock_offset_ns) / 1e3, "dur": duration_ns / 1e3}
                event |= {"args": {"stage": stage} | ({} if step is None else {"step": step}) | args}
                self._events.append(encode_line(event))

    def durations(self) -> dict[str, float]:
        """Return the seconds spent in each name's spans since the last call."""
        durations, self._durations = self._durations, {}
        return durations

    def flush(self) -> None:
        """Write the events since the last call to `traces/worker_000.jsonl`, in one write."""
        if self._events:
            with open_for_append(self._path) as file:
                file.write(b"".join(self._events))
            self._events.clear()


def merge_traces(run_dir: Path | str) -> Path:
    """Merge all workers' events into `traces/trace.json` and return its path; time 0 is the first event's start."""
    files = worker_files(run_dir)
    start = min((event["ts"] for file in files for event in read_jsonl(file)), default=0.0)
    target = Path(run_dir) / FOLDER / "trace.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    rewrite(target, _merged(files, start))
    return target


def worker_file(run_dir: Path | str, rank: int) -> Path:
    """Return the path of a worker's events."""
    return Path(run_dir) / FOLDER / f"worker_{rank:03d}.jsonl"


def worker_files(run_dir: Path | str) -> list[Path]:
    """Return the workers' event files in rank order."""
    files = (Path(run_dir) / FOLDER).glob("worker_*.jsonl")
    return sorted(files, key=lambda file: (len(file.name), file.name))


def _merged(files: list[Path], start: float) -> Iterator[bytes]:
    yield b'{"displayTimeUnit":"ms","otherData":' + json.dumps({"start_unix_us": start}).encode()
    yield b',"traceEvents":['
    separator = b"\n"
    for file in files:
        rank = int(file.stem.removeprefix("worker_"))
        named = {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"worker {rank}"}}
        ordered = {"name": "process_sort_index", "ph": "M", "pid": rank, "args": {"sort_index": rank}}
        yield separator + json.dumps(named).encode() + b",\n" + json.dumps(ordered).encode()
        separator = b",\n"
        for event in read_jsonl(file):
            yield separator + encode_line(event | {"ts": event["ts"] - start}).rstrip()
    yield b"\n]}\n"
