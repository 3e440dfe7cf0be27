"""The worker's end of one reward process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from siirl.rewards import frames

# The parent's own import path first: it may differ from what PYTHONPATH and the installation give.
BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from siirl.rewards.child import main; main(*map(int, sys.argv[2:]))"
)
OUTGOING_BYTES = 1 << 18
READ_BYTES = 1 << 20


class RewardProcess:
    """A started process: the pipes to it, and the samples it was given and has not answered, oldest first.

    Attributes:
        requests, results, output: descriptors of its three pipes; all are non-blocking here.
        ready: it has loaded the function.
        location: file and line of the function, once ready.
        deadline: when (monotonic seconds) its next message is due; infinity when none is.
    """

    def __init__(self, spec: str, params: dict[str, Any], start_timeout_s: float) -> None:
        child_requests, self.requests = os.pipe()
        self.results, child_results = os.pipe()
        self.output, child_output = os.pipe()
        numbers = [str(number) for number in (child_requests, child_results, os.getpid())]
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", BOOT, json.dumps([str(entry) for entry in sys.path]), *numbers],
            stdin=subprocess.DEVNULL,
            stdout=child_output,
            stderr=child_output,
            pass_fds=(child_requests, child_results),
            start_new_session=True,  # Ctrl-C is the parent's; a kill reaches what the function has started
        )
        for descriptor in (child_requests, child_results, child_output):
            os.close(descriptor)
        for descriptor in (self.requests, self.results, self.output):
            os.set_blocking(descriptor, False)
        self.ready = False
        self.location = ""
        self.pending: deque[int] = deque()
        self.deadline = time.monotonic() + start_timeout_s
        self._incoming = bytearray()
        self._outgoing = bytearray(frames.pack({"spec": spec, "params": params}))

    @property
    def unsent(self) -> bool:
        return bool(self._outgoing)

    @property
    def full(self) -> bool:
        return len(self._outgoing) >= OUTGOING_BYTES

    def give(self, index: int, prompt: str, response: str, sample: dict[str, Any], timeout_s: float) -> None:
        """Queue a sample; `flush` sends it."""
        if not self.pending:
            self.deadline = time.monotonic() + timeout_s
        self.pending.append(index)
        self._outgoing += frames.pack([index, prompt, response, sample])

    def flush(self) -> None:
        """Send what the pipe takes. A process that is gone is noticed by `receive`."""
        try:
            while self._outgoing:
                with memoryview(self._outgoing) as view:
                    sent = os.write(self.requests, view)
                del self._outgoing[:sent]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._outgoing.clear()

    def receive(self) -> Iterator[Any] | None:
        """The messages that have arrived; None when the process is gone."""
        try:
            data = os.read(self.results, READ_BYTES)
        except BlockingIOError:
            return iter(())
        if not data:
            return None
        self._incoming += data
        return frames.unpack(self._incoming)

    def read_output(self) -> bytes | None:
        """What the function has printed, empty when there is nothing now; None when it has closed its output."""
        try:
            return os.read(self.output, READ_BYTES) or None
        except BlockingIOError:
            return b""

    def leave(self, timeout_s: float) -> None:
        """Let an idle process end by itself, and stop it if it does not."""
        os.close(self.requests)
        self.requests = -1
        ended = select.poll()
        ended.register(self.results, select.POLLIN)
        ended.poll(timeout_s * 1000)
        self.stop()

    def stop(self) -> str:
        """Kill the process and what it has started, reap it, close the pipes; say how it ended."""
        os.killpg(self._process.pid, signal.SIGKILL)  # before it is reaped: until then the number is its own
        status = self._process.wait()
        for descriptor in (self.requests, self.results, self.output):
            if descriptor >= 0:
                os.close(descriptor)
        self.requests = self.results = self.output = -1
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        return f"it ended its process with exit status {status}"
