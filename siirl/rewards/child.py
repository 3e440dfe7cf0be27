"""The reward process: it loads one reward function and answers requests until its pipe is closed.

It speaks over two pipes of its own, so whatever the function prints disturbs nobody. It ends with its parent, also
while the function runs.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import os
import reprlib
import signal
import sys
import traceback
from typing import Any

from siirl.errors import RequestError
from siirl.rewards import frames
from siirl.rewards.registry import Reward, resolve

PR_SET_PDEATHSIG = 1  # linux/prctl.h
READ_BYTES = 1 << 20
MESSAGE_CHARS = 500


def main(requests: int, results: int, parent: int) -> None:
    """Serve the requests of descriptor `requests` on descriptor `results` for the process `parent`."""
    _end_with(parent)
    faulthandler.enable()
    _keep_to_this_process(requests, results)
    reward: Reward | None = None
    buffer = bytearray()
    while data := os.read(requests, READ_BYTES):
        buffer += data
        for message in frames.unpack(buffer):
            if reward is None:
                try:
                    reward = resolve(message["spec"], message["params"])
                except RequestError as refusal:
                    _write(results, {"refused": str(refusal)})
                    return
                _write(results, {"name": reward.name, "location": reward.location})
            else:
                index, prompt, response, sample = message
                _write(results, [index, *call(reward, prompt, response, sample)])


def call(reward: Reward, prompt: str, response: str, sample: dict[str, Any]) -> tuple[float | None, str | None]:
    """The reward, or a sentence that says why there is none."""
    try:
        value: Any = reward(prompt, response, sample)
        if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
            return None, f"{_who(reward)} returned {reprlib.repr(value)}, not a number"
        number = float(value)
    except BaseException as error:  # the user's code: sys.exit() and KeyboardInterrupt, too, cost only this sample
        return None, _sentence(reward, error)
    if not math.isfinite(number):
        return None, f"{_who(reward)} returned {number}, not a finite number"
    return number, None


def _who(reward: Reward) -> str:
    return f"reward '{reward.name}' ({reward.location})"


def _sentence(reward: Reward, error: BaseException) -> str:
    """`reward 'x' raised ValueError at file.py:12: message`, the line being the last one in the reward's own file."""
    trace = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in reversed(trace) if frame.filename == reward.file), trace[-1])
    message = traceback.format_exception_only(error)[-1].strip().partition(": ")[2]
    message = " ".join(message.split())[:MESSAGE_CHARS]
    said = f": {message}" if message else ""
    return f"reward '{reward.name}' raised {type(error).__name__} at {place.filename}:{place.lineno}{said}"


def _write(descriptor: int, message: Any) -> None:
    data = frames.pack(message)
    while data:
        data = data[os.write(descriptor, data) :]


def _keep_to_this_process(*descriptors: int) -> None:
    """A process that the function starts must not hold the pipes open: their end is how this one's end is seen."""
    still_open = set(descriptors)

    def close() -> None:
        while still_open:  # once: in a child of the child the numbers may be something else's
            os.close(still_open.pop())

    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    os.register_at_fork(after_in_child=close)


def _end_with(parent: int) -> None:
    """Be killed by the kernel when `parent` ends. Elsewhere than on Linux the closed pipe ends an idle process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request above
        os._exit(0)
