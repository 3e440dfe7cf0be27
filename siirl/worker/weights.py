"""Weights from the workers that train to the workers that generate, one message a step.

Where adapters are trained, the weights that they adapt are *frozen*: they travel when a stage begins and stay with the
receiver, and a step's message holds the adapters alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from siirl.device.collectives import Collectives
from siirl.errors import SiirlError
from siirl.rollout.checksum import Checksum, combined
from siirl.rollout.probe import Answers, Probe
from siirl_kernels import kernels

# tensors are broadcast together in pieces of about so many bytes
_BUCKET_BYTES = 64 * 2**20
# a message begins with: step that ended, which weights follow, checksum of all names
_HEADER = 3
_NONE, _MOVING, _ALL = 0, 1, 2


@dataclass(frozen=True)
class Message:
    """What the workers that train tell those that generate after a step.

    Attributes:
        step: that has ended.
        weights: all of them, frozen ones too; valid until the next message. None where they did not change.
        checksum: of the weights, as training holds them, in the engine's dtype.
        answers: of training to the parity probe.
    """

    step: int
    weights: list[tuple[str, Tensor]] | None = None
    checksum: int = 0
    answers: Answers | None = None


class WeightSender:
    """The training side: training worker 0 broadcasts, the others only help to gather what is sharded.

    Args:
        collectives: of training worker 0 and all workers that generate, in this order; None on other workers.
        names: of the weights, frozen ones before the others, in the order in which they come.
        dtype: of the weights on their way.
    """

    def __init__(self, collectives: Collectives | None, names: Iterable[str], dtype: torch.dtype) -> None:
        self._collectives, self._names, self._dtype = collectives, _names_checksum(names), dtype
        self._frozen_sum = 0

    def send(
        self,
        step: int,
        named: Iterable[tuple[str, Tensor]] | None,
        answers: Answers | None = None,
        frozen: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        """Tell that ``step`` has ended, with its weights or None where they did not change. A collective.

        Weights are cast and packed in one pass. The checksum follows them, for it is computed while they pass: sharded
        ones are gathered once.

        Args:
            step: that has ended.
            named: the weights.
            answers: to the parity probe with these weights; needed where there are weights.
            frozen: those that stay until they are sent again; None where they are as they were sent.
        """
        if self._collectives is None:
            for _ in chain(frozen or (), named or ()):
                pass
            return
        kind = _NONE if named is None else _MOVING if frozen is None else _ALL
        self._collectives.broadcast(torch.tensor([step, kind, self._names]))
        if named is None:
            return
        assert answers is not None, "weights travel with the answers to the probe"
        if frozen is not None:
            self._frozen_sum = self._broadcast(self._collectives, frozen)
        checksum = combined(self._frozen_sum, self._broadcast(self._collectives, named))
        self._collectives.broadcast(torch.cat((torch.tensor([checksum]), answers.to_integers())))

    def _broadcast(self, collectives: Collectives, named: Iterable[tuple[str, Tensor]]) -> int:
        """Send weights; their checksum."""
        checksum = Checksum(self._dtype)
        for bucket in _buckets(named, self._dtype):
            packed = kernels.cast_pack([tensor for _, tensor in bucket], self._dtype)
            for _ in checksum.passing(_unpacked(bucket, packed)):
                pass
            collectives.broadcast(packed)
        return checksum.value()


class WeightReceiver:
    """The generating side, with room for one message beside the engine's own weights.

    Args:
        collectives: see :class:`WeightSender`.
        like: tensors like those that every message has, by name, in the order in which they come.
        probe: of the run.
        frozen: like those that come with some messages only, before the others.
    """

    def __init__(
        self,
        collectives: Collectives,
        like: Sequence[tuple[str, Tensor]],
        probe: Probe,
        frozen: Sequence[tuple[str, Tensor]] = (),
    ) -> None:
        self._collectives, self._probe = collectives, probe
        self._names = [name for name, _ in (*frozen, *like)]
        self._frozen = [torch.empty_like(tensor) for _, tensor in frozen]
        self._room = [torch.empty_like(tensor) for _, tensor in like]

    def receive(self) -> Message:
        """The next message. A collective."""
        step, kind, names = self._collectives.broadcast(torch.zeros(_HEADER, dtype=torch.int64)).tolist()
        if kind == _NONE:
            return Message(step)
        if names != _names_checksum(self._names):
            raise SiirlError("the workers that train and those that generate have models with different weights")
        if kind == _ALL:
            self._fill(self._frozen)
        self._fill(self._room)
        end = self._collectives.broadcast(torch.zeros(1 + self._probe.integers, dtype=torch.int64))
        answers = Answers.from_integers(end[1:], len(self._probe.prompts))
        held = zip(self._names, (*self._frozen, *self._room), strict=True)
        return Message(step, list(held), int(end[0]), answers)

    def _fill(self, room: list[Tensor]) -> None:
        """The next weights, into tensors like them."""
        for bucket in _buckets((("", tensor) for tensor in room), room[0].dtype):
            packed = bucket[0][1].new_empty(sum(tensor.numel() for _, tensor in bucket))
            self._collectives.broadcast(packed)
            for (_, tensor), (_, piece) in zip(bucket, _unpacked(bucket, packed), strict=True):
                tensor.copy_(piece)


def _buckets(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors that travel together in ``dtype``: by their sizes alone, so the same on both sides."""
    bucket: list[tuple[str, Tensor]] = []
    for name, tensor in named:
        bucket.append((name, tensor))
        if sum(t.numel() for _, t in bucket) * dtype.itemsize >= _BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _unpacked(bucket: Sequence[tuple[str, Tensor]], packed: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The pieces of what a bucket is packed into, in the shapes of its tensors."""
    pieces = packed.split([tensor.numel() for _, tensor in bucket])
    return ((name, piece.view(tensor.shape)) for (name, tensor), piece in zip(bucket, pieces, strict=True))


def _names_checksum(names: Iterable[str]) -> int:
    return zlib.crc32("\n".join(names).encode())
