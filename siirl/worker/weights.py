"""Weights from the workers that train to the workers that generate, one message a step."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from siirl.device.collectives import Collectives
from siirl.errors import SiirlError
from siirl.rollout.checksum import Checksum
from siirl.rollout.probe import Answers, Probe
from siirl_kernels import kernels

# tensors are broadcast together in pieces of about so many bytes
_BUCKET_BYTES = 64 * 2**20
# a message begins with: step that ended, whether weights follow, checksum of their names
_HEADER = 3


@dataclass(frozen=True)
class Message:
    """What the workers that train tell those that generate after a step.

    Attributes:
        step: that has ended.
        weights: valid until the next message; None where they did not change.
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
        names: of the weights, in the order in which they come.
        dtype: of the weights on their way.
    """

    def __init__(self, collectives: Collectives | None, names: Iterable[str], dtype: torch.dtype) -> None:
        self._collectives, self._names, self._dtype = collectives, _names_checksum(names), dtype

    def send(self, step: int, named: Iterable[tuple[str, Tensor]] | None, answers: Answers | None = None) -> None:
        """Tell that ``step`` has ended, with its weights or None where they did not change. A collective.

        Weights are cast and packed in one pass. The checksum follows them, for it is computed while they pass: sharded
        ones are gathered once.

        Args:
            step: that has ended.
            named: the weights.
            answers: to the parity probe with these weights; needed where there are weights.
        """
        if self._collectives is None:
            for _ in named or ():
                pass
            return
        self._collectives.broadcast(torch.tensor([step, int(named is not None), self._names]))
        if named is None:
            return
        assert answers is not None, "weights travel with the answers to the probe"
        checksum = Checksum(self._dtype)
        for bucket in _buckets(named, self._dtype):
            packed = kernels.cast_pack([tensor for _, tensor in bucket], self._dtype)
            for _ in checksum.passing(_unpacked(bucket, packed)):
                pass
            self._collectives.broadcast(packed)
        self._collectives.broadcast(torch.cat((torch.tensor([checksum.value()]), answers.to_integers())))


class WeightReceiver:
    """The generating side, with room for one message beside the engine's own weights.

    Args:
        collectives: see :class:`WeightSender`.
        like: the engine's own weights, by name, in the order in which they come.
        probe: of the run.
    """

    def __init__(self, collectives: Collectives, like: Sequence[tuple[str, Tensor]], probe: Probe) -> None:
        self._collectives, self._probe = collectives, probe
        self._names = [name for name, _ in like]
        self._room = [torch.empty_like(tensor) for _, tensor in like]

    def receive(self) -> Message:
        """The next message. A collective."""
        step, present, names = self._collectives.broadcast(torch.zeros(_HEADER, dtype=torch.int64)).tolist()
        if not present:
            return Message(step)
        if names != _names_checksum(self._names):
            raise SiirlError("the workers that train and those that generate have models with different weights")
        for bucket in _buckets(zip(self._names, self._room, strict=True), self._room[0].dtype):
            packed = bucket[0][1].new_empty(sum(tensor.numel() for _, tensor in bucket))
            self._collectives.broadcast(packed)
            for (_, tensor), (_, piece) in zip(bucket, _unpacked(bucket, packed), strict=True):
                tensor.copy_(piece)
        end = self._collectives.broadcast(torch.zeros(1 + self._probe.integers, dtype=torch.int64))
        answers = Answers.from_integers(end[1:], len(self._probe.prompts))
        return Message(step, list(zip(self._names, self._room, strict=True)), int(end[0]), answers)


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
