"""A discrete-event simulation of processes on nodes: they compute, wait for each other, and queue for a server.

A process is a generator of requests. `Compute` takes a node's device: where more processes of a node compute than it
has devices, they share these evenly, and busy neighbours slow each other down by the node's contention. `Meet` goes on
when all processes of a meeting have come. `Serve` queues at a server that serves one request at a time, first come
first served. Equal times are told apart by the order of requests, so a simulation is a function of its input.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias


@dataclass(frozen=True)
class Compute:
    """Seconds of work on a device of one's own."""

    seconds: float


@dataclass(frozen=True)
class Meet:
    """Wait for ``size`` processes that name the same meeting, then take ``seconds`` together."""

    name: str
    size: int
    seconds: float


@dataclass(frozen=True)
class Serve:
    """Queue at a server, and take so many of its seconds."""

    server: str
    seconds: float


Request: TypeAlias = Compute | Meet | Serve
Process: TypeAlias = Generator[Request, None, None]


@dataclass
class _Node:
    """Devices that processes share; work is what is left to do of each."""

    devices: int
    contention: float
    work: dict[int, float] = field(default_factory=dict)
    since: float = 0.0
    version: int = 0

    @property
    def rate(self) -> float:
        """Seconds of work that each process gets done in a second."""
        running = len(self.work)
        if running == 0:
            return 1.0
        busy = min(running, self.devices)
        slowed = 1 + (self.contention - 1) * (busy - 1) / max(1, self.devices - 1)
        return busy / running / slowed

    def advance(self, now: float) -> None:
        done = (now - self.since) * self.rate
        for process in self.work:
            self.work[process] -= done
        self.since = now


class Simulation:
    """Runs processes until all have ended.

    Args:
        node_of: the node of each process.
        devices: devices of a node.
        contention: see `siirl.planning.cluster.Device`.
    """

    def __init__(self, node_of: Iterable[int], devices: int, contention: float = 1.0) -> None:
        self._node_of = list(node_of)
        self._nodes = {node: _Node(devices, contention) for node in self._node_of}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._meetings: dict[str, list[int]] = defaultdict(list)
        self._free_at: dict[str, float] = defaultdict(float)
        self._processes: list[Process] = []
        self.now = 0.0
        self.computing: list[float] = [0.0] * len(self._node_of)
        """Seconds each process has computed, on its own or a shared device."""

    def run(self, processes: Iterable[Process]) -> float:
        """The second at which the last process ends."""
        self._processes = list(processes)
        assert len(self._processes) == len(self._node_of)
        for process in range(len(self._processes)):
            self._next(process)
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
        waiting = {name: len(there) for name, there in self._meetings.items() if there}
        assert not waiting, f"nobody else comes to {waiting}"
        return self.now

    def _at(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (seconds, next(self._order), event))

    def _next(self, process: int) -> None:
        request = next(self._processes[process], None)
        if isinstance(request, Compute):
            self._compute(process, request.seconds)
        elif isinstance(request, Meet):
            self._meet(process, request)
        elif isinstance(request, Serve):
            self._free_at[request.server] = max(self.now, self._free_at[request.server]) + request.seconds
            self._at(self._free_at[request.server], lambda: self._next(process))

    def _compute(self, process: int, seconds: float) -> None:
        node = self._nodes[self._node_of[process]]
        node.advance(self.now)
        node.work[process] = seconds
        self.computing[process] -= self.now
        self._schedule(node)

    def _schedule(self, node: _Node) -> None:
        """Make an event of the node's next completion; what changes before it makes another."""
        node.version += 1
        if node.work:
            version, process = node.version, min(node.work, key=node.work.__getitem__)
            ends = self.now + max(0.0, node.work[process]) / node.rate
            self._at(ends, lambda: self._finish(node, process, version))

    def _finish(self, node: _Node, process: int, version: int) -> None:
        if version != node.version:
            return
        node.advance(self.now)
        del node.work[process]
        self.computing[process] += self.now
        self._schedule(node)
        self._next(process)

    def _meet(self, process: int, meeting: Meet) -> None:
        there = self._meetings[meeting.name]
        there.append(process)
        if len(there) < meeting.size:
            return
        del self._meetings[meeting.name]
        self._at(self.now + meeting.seconds, lambda: self._leave(there))

    def _leave(self, processes: list[int]) -> None:
        for process in processes:
            self._next(process)
