"""Rewards computed in processes of their own, so that no reward function can harm the run.

Samples are streamed to each process and results streamed back, so a warm process costs microseconds a sample, and at
any moment it is known which sample a process is at: the first one not answered. A function that raises, returns no
finite number, takes longer than the time allowed or ends its process costs that sample; the process is replaced where
necessary, and the samples behind it are scored by another.
"""

from __future__ import annotations

import logging
import math
import selectors
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from siirl.errors import RequestError
from siirl.rewards.process import RewardProcess

START_TIMEOUT_S = 120.0
LEAVE_TIMEOUT_S = 1.0
OUTPUT_BYTES = 1 << 16

log = logging.getLogger(__name__)


class RewardResult(NamedTuple):
    """A sample's reward, or the sentence that says why it has none."""

    reward: float | None
    error: str | None


class RewardPool:
    """`workers` processes that run one reward function. Not for use by several threads at once.

    Args:
        spec: what `siirl.rewards.resolve` takes.
        params: keyword arguments of the function; JSON-able.
        timeout_s: seconds for one call.
        workers: number of processes. They start at the first use and stay until `close`.
    """

    def __init__(
        self, spec: str, params: Mapping[str, Any] | None = None, timeout_s: float = 10.0, workers: int = 1
    ) -> None:
        self.spec = spec
        self.params = dict(params or {})
        self.timeout_s = timeout_s
        self.workers = workers
        self.respawns = 0
        self._selector = selectors.DefaultSelector()
        self._processes: list[RewardProcess] = []
        self._output_left = OUTPUT_BYTES

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the processes and wait until each has loaded the function.

        Raises:
            RequestError: the function cannot be found, imported or called with these parameters.
        """
        self._drive(_Work((), (), ()), until_ready=True)

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], samples: Sequence[dict[str, Any]]
    ) -> list[RewardResult]:
        """Score response i to prompt i; `samples[i]` is its data row (JSON-able). Results are in the order given.

        Raises:
            RequestError: as `start`, when the pool has not started yet.
        """
        if not len(prompts) == len(responses) == len(samples):
            raise ValueError(f"{len(prompts)} prompts, {len(responses)} responses and {len(samples)} samples")
        self._output_left = OUTPUT_BYTES
        return self._drive(_Work(prompts, responses, samples), until_ready=False)

    def close(self) -> None:
        """End the processes. A closed pool starts again when it is used."""
        while self._processes:
            process = self._processes[-1]
            self._show_output(process)
            self._forget(process)
            if process.pending or not process.ready:
                process.stop()
            else:
                process.leave(LEAVE_TIMEOUT_S)

    def _drive(self, work: _Work, until_ready: bool) -> list[RewardResult]:
        finished = False
        try:
            self._turn(work, timeout_s=0)  # a process that ended while idle is replaced, and no sample blamed
            while work.open or (until_ready and not self._all_ready()):
                self._spawn(work, until_ready)
                self._feed(work)
                self._turn(work, self._time_left())
                self._enforce_deadlines(work)
            finished = True
        finally:
            if not finished:  # unread results of this call must not meet the next one
                self.close()
        return work.results

    def _all_ready(self) -> bool:
        return len(self._processes) == self.workers and all(process.ready for process in self._processes)

    def _spawn(self, work: _Work, until_ready: bool) -> None:
        wanted = self.workers if until_ready else min(self.workers, work.open)
        while len(self._processes) < wanted:
            process = RewardProcess(self.spec, self.params, START_TIMEOUT_S)
            self._processes.append(process)
            self._selector.register(process.results, selectors.EVENT_READ, process)
            self._selector.register(process.output, selectors.EVENT_READ, process)

    def _feed(self, work: _Work) -> None:
        """Give every process a share of what is left, smaller towards the end so that they end together."""
        for process in self._processes:
            share = max(2, len(work.queue) // (2 * self.workers))
            while process.ready and work.queue and len(process.pending) < share and not process.full:
                index = work.queue.popleft()
                process.give(index, *work.sample(index), self.timeout_s)
            process.flush()
            self._watch_requests(process)

    def _watch_requests(self, process: RewardProcess) -> None:
        watched = process.requests in self._selector.get_map()
        if process.unsent and not watched:
            self._selector.register(process.requests, selectors.EVENT_WRITE, process)
        elif watched and not process.unsent:
            self._selector.unregister(process.requests)

    def _time_left(self) -> float | None:
        nearest = min((process.deadline for process in self._processes), default=math.inf)
        return None if nearest == math.inf else max(0.0, nearest - time.monotonic())

    def _turn(self, work: _Work, timeout_s: float | None) -> None:
        """Wait for something to read or to write, and read it. Writing is left to `_feed`."""
        for key, _ in self._selector.select(timeout_s):
            process: RewardProcess = key.data
            if key.fd == process.output:
                if not self._show_output(process):
                    self._selector.unregister(process.output)
            elif key.fd == process.results:
                messages = process.receive()
                if messages is None:
                    self._lose(process, work)
                else:
                    for message in messages:
                        self._take(process, message, work)

    def _take(self, process: RewardProcess, message: Any, work: _Work) -> None:
        if isinstance(message, list):
            index, reward, error = message
            asked = process.pending.popleft()
            assert index == asked, f"result {index} where {asked} was due"
            work.settle(index, RewardResult(reward, error))
        elif "refused" in message:
            raise RequestError(message["refused"])
        else:
            process.ready, process.location = True, message["location"]
        process.deadline = time.monotonic() + self.timeout_s if process.pending else math.inf

    def _enforce_deadlines(self, work: _Work) -> None:
        now = time.monotonic()
        for process in [process for process in self._processes if process.deadline <= now]:
            limit = f"reward.timeout_s={self.timeout_s:g}" if process.ready else f"{START_TIMEOUT_S:g} s"
            self._lose(process, work, f"it took longer than {limit}")

    def _lose(self, process: RewardProcess, work: _Work, reason: str | None = None) -> None:
        """Replace a process; the sample it was at has no reward, those behind it go to another process."""
        self._show_output(process)
        self._forget(process)
        ending = process.stop()
        if not process.ready:
            raise RequestError(f"reward '{self.spec}' cannot be loaded: {reason or ending}")
        self.respawns += 1
        if process.pending:
            error = f"reward '{self.spec}' ({process.location}): {reason or ending}"
            log.warning("%s; its process is replaced", error)
            work.settle(process.pending.popleft(), RewardResult(None, error))
            work.queue.extendleft(reversed(process.pending))

    def _forget(self, process: RewardProcess) -> None:
        self._processes.remove(process)
        for descriptor in (process.results, process.output, process.requests):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)

    def _show_output(self, process: RewardProcess) -> bool:
        """Pass on what the function prints to this worker's log, up to a limit a call of `score`; False at its end."""
        data = process.read_output()
        if not data:
            return data is not None
        shown = data[: self._output_left].decode(errors="replace")
        sys.stderr.write("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in shown))
        if 0 < self._output_left <= len(data):
            sys.stderr.write(f"\n[reward '{self.spec}': the rest of this step's output is dropped]\n")
        self._output_left = max(0, self._output_left - len(data))
        return True


class _Work:
    """The samples of one call: what waits, and what is settled."""

    def __init__(self, prompts: Sequence[str], responses: Sequence[str], samples: Sequence[dict[str, Any]]) -> None:
        self._columns = prompts, responses, samples
        self.queue = deque(range(len(prompts)))
        self.results: list[Any] = [None] * len(prompts)
        self.open = len(prompts)

    def sample(self, index: int) -> tuple[str, str, dict[str, Any]]:
        prompts, responses, samples = self._columns
        return prompts[index], responses[index], samples[index]

    def settle(self, index: int, result: RewardResult) -> None:
        self.results[index] = result
        self.open -= 1
