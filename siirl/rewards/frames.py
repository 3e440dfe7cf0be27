"""Messages between a worker and its reward processes: 4 bytes of length (big endian), then JSON.

To the process: first ``{"spec": ..., "params": ...}``, then ``[index, prompt, response, sample]`` each.
From it: first ``{"name": ..., "location": ...}`` or ``{"refused": sentence}``, then ``[index, reward, error]`` each,
in the order of the requests; exactly one of reward and error is null.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

LENGTH = struct.Struct(">I")


def pack(message: Any) -> bytes:
    """One message as a frame."""
    body = json.dumps(message).encode()
    return LENGTH.pack(len(body)) + body


def unpack(buffer: bytearray) -> Iterator[Any]:
    """The whole messages at the front of `buffer`; what they took is removed once all of them are read."""
    start = 0
    while len(buffer) - start >= LENGTH.size:
        end = start + LENGTH.size + LENGTH.unpack_from(buffer, start)[0]
        if len(buffer) < end:
            break
        yield json.loads(buffer[start + LENGTH.size : end].decode())
        start = end
    del buffer[:start]
