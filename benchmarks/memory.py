"""Memory and processor time of a process and of all processes below it, watched from outside."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

INTERVAL_S = 0.002
SHARED_EVERY = 25  # samples; finding out who else maps a page takes the kernel milliseconds


@dataclass
class Held:
    """One process: its part in the work; bytes, private (anonymous) and its part of shared memory.

    A page of shared memory that n processes have touched counts 1/n for each of them.
    """

    role: str
    idle_private: int = 0
    idle_shared: int = 0
    peak_private: int = 0
    peak_shared: int = 0

    @property
    def added(self) -> int:
        """Bytes above what the process held before there was any batch."""
        return self.peak_private - self.idle_private + max(self.peak_shared - self.idle_shared, 0)


class Watch:
    """Note the memory of the tree at rest, then sample it between `begin` and `end`."""

    def __init__(self, root: int, root_role: str) -> None:
        self._root, self._root_role = root, root_role
        self._held: dict[int, Held] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def cpu_seconds(self) -> float:
        """Processor time of all processes so far, in user and kernel mode."""
        times = [process.cpu_times() for process in self._tree()]
        return sum(time.user + time.system for time in times)

    def idle(self) -> None:
        """Take the processes' memory before they hold anything."""
        for process in self._tree():
            private = _kilobytes(process.pid, "status", "RssAnon")
            shared = _kilobytes(process.pid, "smaps_rollup", "Pss_Shmem")
            self._held[process.pid] = Held(self._role(process), private, shared)

    def begin(self) -> None:
        """Start to sample; processes that came since `idle` held nothing then."""
        for process in self._tree():
            self._held.setdefault(process.pid, Held(self._role(process))).role = self._role(process)
        self._stop.clear()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def end(self) -> dict[str, Any]:
        """Stop. Returns the process with the most private memory, and all that added 1 MB or more."""
        assert self._thread is not None
        self._stop.set()
        self._thread.join()
        self._note(shared=True)
        held = [asdict(process) | {"added": process.added} for process in self._held.values()]
        held.sort(key=lambda process: -process["peak_private"])
        return {"largest": held[0], "processes": [process for process in held if process["added"] >= 10**6]}

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self._root)
        return [root, *root.children(recursive=True)]

    def _role(self, process: psutil.Process) -> str:
        if process.pid == self._root:
            return self._root_role
        command = process.cmdline() or [process.name()]
        if any("spawn_main" in part for part in command) or command[0].startswith("ray::Stage"):
            return "worker"
        return command[0].removeprefix("ray::").split(":")[0].split(".")[0].split("/")[-1]

    def _sample(self) -> None:
        samples = 0
        while not self._stop.is_set():
            self._note(shared=samples % SHARED_EVERY == 0)
            samples += 1
            time.sleep(INTERVAL_S)

    def _note(self, shared: bool) -> None:
        for pid, held in self._held.items():
            held.peak_private = max(held.peak_private, _kilobytes(pid, "status", "RssAnon"))
            if shared:
                held.peak_shared = max(held.peak_shared, _kilobytes(pid, "smaps_rollup", "Pss_Shmem"))


def _kilobytes(pid: int, file: str, name: str) -> int:
    """A number of a file of /proc in bytes; of a process that is gone, nothing."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
