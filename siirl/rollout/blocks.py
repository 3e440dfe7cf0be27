"""Blocks of the key/value cache: who holds them, and prefixes found again by their tokens.

A block has room for ``BLOCK`` tokens and is held by every sequence that begins with the same tokens up to its end. A
block that nobody holds any more keeps what it has, and can be found, until its room is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK = 16

Ints = NDArray[np.int64]


def prefix_keys(tokens: Ints, version: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """A key for each full block of ``tokens``: a digest of all tokens up to its end and of the weights' version.

    Args:
        tokens: int64 [T], of one sequence from its beginning.
        version: of the weights; keys and values of other weights are never found.
        known: the first keys, where they have been computed before.
    """
    keys = list(known)
    last = keys[-1] if keys else version.to_bytes(8, "little", signed=True)
    for start in range(BLOCK * len(keys), len(tokens) - BLOCK + 1, BLOCK):
        last = hashlib.blake2b(last + tokens[start : start + BLOCK].tobytes(), digest_size=16).digest()
        keys.append(last)
    return keys


class BlockPool:
    """Blocks 0 … count-1 by number of holders, and full ones by their key."""

    def __init__(self, count: int) -> None:
        self._holders = np.zeros(count, np.int32)
        self._free = list(range(count))[::-1]
        self._idle: dict[int, None] = {}  # found by a key and held by nobody, the longest unused first
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def grow(self, count: int) -> None:
        """Add blocks up to ``count``."""
        self._free = [*range(len(self), count)[::-1], *self._free]
        self._holders = np.concatenate((self._holders, np.zeros(count - len(self), np.int32)))

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> Ints:
        """``count`` blocks, each with one holder; what idle ones kept is forgotten, the longest unused first."""
        while len(self._free) < count:
            block = next(iter(self._idle))
            del self._idle[block]
            del self._block_of[self._key_of.pop(block)]
            self._free.append(block)
        taken = np.array(self._free[len(self._free) - count :], np.int64)
        del self._free[len(self._free) - count :]
        self._holders[taken] = 1
        return taken

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix; nobody holds them for that."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of these nobody holds: held, they are no longer available."""
        return sum(block in self._idle for block in blocks)

    def share(self, blocks: Sequence[int] | Ints) -> None:
        """Another holder for each of these, no two alike."""
        self._holders[blocks] += 1
        if self._idle:
            for block in blocks:
                self._idle.pop(int(block), None)

    def release(self, blocks: Ints) -> None:
        """A holder less for each, the blocks of one sequence in its order: of idle ones, the end is reused first."""
        self._holders[blocks] -= 1
        for block in blocks[self._holders[blocks] == 0][::-1].tolist():
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def register(self, blocks: Ints, keys: Sequence[bytes]) -> None:
        """Let full blocks be found; a prefix that is known stays with the block that has it."""
        for block, key in zip(blocks.tolist(), keys, strict=True):
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key], self._key_of[block] = block, key
