"""Weights from the workers that train to the workers that generate, one message a step."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from siirl.device.collectives import Collectives
from siirl.errors import SiirlError

# tensors are broadcast together in pieces of about so many bytes
_BUCKET_BYTES = 64 * 2**20
# a message begins with: step that ended, whether weights follow, checksum of their names
_HEADER = 3


class WeightSender:
    """The training side: training worker 0 broadcasts, the others only help to gather what is sharded.

    Args:
        collectives: of training worker 0 and all workers that generate, in this order; None on other workers.
        names: of the weights, in the order in which they come.
        dtype: of the weights on their way.
    """

    def __init__(self, collectives: Collectives | None, names: Iterable[str], dtype: torch.dtype) -> None:
        self._collectives, self._names, self._dtype = collectives, _checksum(names), dtype

    def send(self, step: int, named: Iterable[tuple[str, Tensor]] | None) -> None:
        """Tell that ``step`` has ended, with its weights or None where they did not change. A collective."""
        if self._collectives is None:
            for _ in named or ():
                pass
            return
        self._collectives.broadcast(torch.tensor([step, int(named is not None), self._names]))
        for bucket in _buckets(tensor.to(self._dtype) for _, tensor in named or ()):
            self._collectives.broadcast(torch.cat([tensor.reshape(-1) for tensor in bucket]))


class WeightReceiver:
    """The generating side, with room for one message beside the engine's own weights.

    Args:
        collectives: see :class:`WeightSender`.
        like: the engine's own weights, by name, in the order in which they come.
    """

    def __init__(self, collectives: Collectives, like: Sequence[tuple[str, Tensor]]) -> None:
        self._collectives = collectives
        self._names = [name for name, _ in like]
        self._room = [torch.empty_like(tensor) for _, tensor in like]

    def receive(self) -> tuple[int, list[tuple[str, Tensor]] | None]:
        """The next message: its step, and the weights where they changed, valid until the next call. A collective."""
        step, present, names = self._collectives.broadcast(torch.zeros(_HEADER, dtype=torch.int64)).tolist()
        if not present:
            return step, None
        if names != _checksum(self._names):
            raise SiirlError("the workers that train and those that generate have models with different weights")
        for bucket in _buckets(self._room):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self._collectives.broadcast(flat)
            for tensor, piece in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(piece.view_as(tensor))
        return step, list(zip(self._names, self._room, strict=True))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.nbytes for t in bucket) >= _BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _checksum(names: Iterable[str]) -> int:
    return zlib.crc32("\n".join(names).encode())
