"""Rows as bytes: the kind of a column, how its values travel, and the segments that each worker gets.

A sender's bytes are, worker by worker and field by field, the values of the rows for that worker; the receiver knows
the sizes already. A worker's segment ends at a multiple of eight bytes, and the widest fields come first in it, so that
what has come can be read where it lies. What travels may be narrower than what arrives, without loss: integers in the
narrowest dtype that holds all of a field's values, booleans as bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from siirl.data.batch import Batch, Column, Ragged, as_bytes, offsets_of
from siirl.data.partition import Ints

BITS = "bits"
# A segment's length is a multiple of this, the widest number's size.
_ALIGNMENT = 8
_NARROW = (torch.uint8, torch.int16, torch.int32)


class Spec(NamedTuple):
    """The kind of a column: name of its dtype, whether it is ragged, shape of a row or of a ragged value."""

    dtype: str
    ragged: bool
    shape: tuple[int, ...]

    @classmethod
    def of(cls, column: Column) -> Spec:
        values = column.values if isinstance(column, Ragged) else column
        return cls(_name(values.dtype), isinstance(column, Ragged), tuple(values.shape[1:]))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{'ragged ' if self.ragged else ''}{self.dtype} {list(self.shape)}"


Range: TypeAlias = tuple[int, int] | None


class Field(NamedTuple):
    """A column on its way: its kind, and the dtype its values travel in (or ``bits``)."""

    spec: Spec
    wire: str

    @property
    def itemsize(self) -> int:
        """Bytes of a number on its way; bits come last."""
        return 0 if self.wire == BITS else int(getattr(torch, self.wire).itemsize)

    def bytes_of(self, values: Ints) -> Ints:
        """Bytes of numbers of rows (dense) or of ragged values that travel together."""
        numbers = values * prod(self.spec.shape)
        return -(-numbers // 8) if self.wire == BITS else numbers * getattr(torch, self.wire).itemsize

    def encode(self, values: Tensor, pieces: Sequence[int]) -> list[Tensor]:
        """The bytes of the values, cut into pieces of so many rows or ragged values each."""
        if self.wire == BITS:
            return [torch.from_numpy(np.packbits(piece.numpy())) for piece in torch.split(values, list(pieces))]
        sizes = self.bytes_of(np.array(pieces, np.int64)).tolist()
        return list(torch.split(as_bytes(values.to(getattr(torch, self.wire))), sizes))

    def decode(self, data: Tensor, values: int) -> Tensor:
        """So many rows or ragged values, a view of the bytes where these are the values themselves."""
        if self.wire == BITS:
            flat = torch.from_numpy(np.unpackbits(data.numpy(), count=values * prod(self.spec.shape))).bool()
        else:
            flat = data.view(getattr(torch, self.wire)).to(self.spec.torch_dtype)
        return flat.reshape(values, *self.spec.shape)


def value_range(column: Column) -> Range:
    """Smallest and largest value of a column of wide integers, None for any other and for an empty one."""
    values = column.values if isinstance(column, Ragged) else column
    if values.dtype not in (torch.int64, torch.int32) or values.numel() == 0:
        return None
    low, high = values.aminmax()
    return int(low), int(high)


def wire_of(spec: Spec, ranges: Sequence[Range], compress: bool) -> str:
    """The dtype in which a field travels between workers whose values lie in ``ranges``."""
    if not compress:
        return spec.dtype
    if spec.dtype == "bool":
        return BITS
    known = [r for r in ranges if r is not None]
    if not known:
        return spec.dtype
    low, high = min(r[0] for r in known), max(r[1] for r in known)
    for dtype in _NARROW:
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max and dtype.itemsize < spec.torch_dtype.itemsize:
            return _name(dtype)
    return spec.dtype


def values_by_worker(field: Field, counts: Ints | None, worker: Ints, workers: int) -> Ints:
    """Rows (dense) or ragged values of each worker; ``counts`` are the ragged values of each row."""
    return np.bincount(worker, counts if field.spec.ragged else None, workers).astype(np.int64)


def segment_bytes(fields: Mapping[str, Field], values: Ints) -> Ints:
    """Bytes of the segments of some workers, whose rows or ragged values are ``values``, int64 [fields, workers]."""
    sizes = [field.bytes_of(values[i]) for i, field in enumerate(fields.values())]
    return -(-np.sum(sizes, axis=0) // _ALIGNMENT) * _ALIGNMENT if sizes else np.zeros(values.shape[1], np.int64)


def pack(rows: Batch, fields: Mapping[str, Field], values: Ints, out: Tensor) -> None:
    """Write rows, which are sorted by destination, to ``out``, uint8.

    Args:
        values: int64 [fields, workers], rows or ragged values for each worker.
    """
    by_field = []
    for (name, field), pieces in zip(fields.items(), values.tolist(), strict=True):
        column = rows[name]
        by_field.append(field.encode(column.values if isinstance(column, Ragged) else column, pieces))
    segments = []
    for pieces, size in zip(zip(*by_field, strict=True), segment_bytes(fields, values).tolist(), strict=True):
        rest = size - sum(len(piece) for piece in pieces)
        segments += [*pieces, torch.zeros(rest, dtype=torch.uint8)]
    torch.cat(segments, out=out)


def unpack(
    segments: Sequence[Tensor], fields: Mapping[str, Field], values: Ints, counts: Mapping[str, Sequence[Ints]]
) -> list[Batch]:
    """Read what came from each worker; columns are views of the segments where nothing was narrowed.

    Args:
        segments: uint8, from each worker in turn.
        values: int64 [fields, workers], rows or ragged values from each worker.
        counts: of each ragged field: from each worker, the values of every row that came.
    """
    batches = []
    for worker, segment in enumerate(segments):
        sizes = [int(field.bytes_of(values[i, worker])) for i, field in enumerate(fields.values())]
        pieces = torch.split(segment, [*sizes, len(segment) - sum(sizes)])
        columns: dict[str, Column] = {}
        for i, (name, field) in enumerate(fields.items()):
            decoded = field.decode(pieces[i], int(values[i, worker]))
            ragged = field.spec.ragged
            columns[name] = Ragged(decoded, offsets_of(torch.from_numpy(counts[name][worker]))) if ragged else decoded
        batches.append(Batch(columns))
    return batches


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
