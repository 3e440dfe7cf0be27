"""The distributed databuffer: rows move from the workers that made them to the workers that use them next.

The control plane is one all-gather: every worker's schema and a few integers per sample. From these all workers
derive the same assignment and the same send and receive lists. The data plane is one uneven all-to-all of bytes, in
which a row that stays has no part. Rows come out in the order of their sample ids, never in the order of arrival.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from siirl.data.balance import Ints, assign
from siirl.data.batch import Batch, Column, Ragged, as_bytes, offsets_of
from siirl.errors import SiirlError

if TYPE_CHECKING:
    from siirl.device.collectives import Collectives

# These travel with the control plane, whatever fields are asked for.
ID_COLUMNS = ("sample_id", "group_id", "slot")

Cost = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Moved:
    """What one redistribution moved on this worker: payload bytes, rows that stayed, wall time."""

    bytes_sent: int
    bytes_received: int
    rows_kept: int
    seconds: float


class _Spec(NamedTuple):
    """The kind of a column: name of its dtype, whether it is ragged, shape of a row or of a ragged value."""

    dtype: str
    ragged: bool
    shape: tuple[int, ...]

    @classmethod
    def of(cls, column: Column) -> _Spec:
        values = column.values if isinstance(column, Ragged) else column
        return cls(str(values.dtype).removeprefix("torch."), isinstance(column, Ragged), tuple(values.shape[1:]))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of a dense row or of one ragged value."""
        return self.torch_dtype.itemsize * prod(self.shape)

    def __str__(self) -> str:
        return f"{'ragged ' if self.ragged else ''}{self.dtype} {list(self.shape)}"


_ID_SPEC = _Spec("int64", False, ())

_Schema: TypeAlias = Mapping[str, _Spec | None]  # of the columns to move; None for one the worker does not have


@dataclass(frozen=True)
class _Samples:
    """All samples of all workers in the order of their ids: what every worker knows of them. Arrays are int64 [N]."""

    specs: dict[str, _Spec]  # of the fields that travel
    ids: dict[str, Ints]
    stratum: Ints
    cost: Ints
    counts: dict[str, Ints]  # of each ragged field: values in the row
    home: Ints  # worker that holds the row
    local: Ints  # number of the row there

    def bytes_by_worker(self, rows: Ints, worker: Ints, workers: int) -> Ints:
        """Return the payload bytes of some rows, by field and by the worker that is given for each sample."""
        sizes = np.zeros((len(self.specs), workers), np.int64)
        for field, (name, spec) in enumerate(self.specs.items()):
            counts = self.counts[name][rows] if spec.ragged else 1
            np.add.at(sizes[field], worker[rows], counts * spec.itemsize)
        return sizes


def redistribute(
    batch: Batch,
    collectives: Collectives,
    *,
    fields: Sequence[str],
    split: Literal["tokens", "groups"],
    cost: Cost | None = None,
    strata: Tensor | None = None,
) -> tuple[Batch, Moved]:
    """Give every worker an equal share of the rows; every worker calls it at the same point of its pipeline.

    fields: columns to move; sample_id (unique over all workers), group_id and slot always come along, every other
    column is dropped. split: "tokens" deals single rows, "groups" keeps the rows of a group_id on one worker.
    cost: maps a worker's batch to the work of each row, int64 [rows]; default: tokens of prompt_ids and response_ids,
    or the values of the row's longest ragged field. strata: int64 [rows], each stratum (mini-batch) is balanced by
    itself. A worker without rows needs no columns and no fields. Columns live on the host; a run with one worker gets
    its own tensors back.
    Raises SiirlError, on every worker alike, when a column is missing, differs between workers, or an id occurs twice.
    """
    start = perf_counter()
    names = [name for name in dict.fromkeys(fields) if name not in ID_COLUMNS]
    if collectives.size == 1:
        return batch.select([*ID_COLUMNS, *names]), Moved(0, 0, len(batch), perf_counter() - start)
    assert split in ("tokens", "groups")
    samples = _gather(batch, names, collectives, cost, strata)
    names = list(samples.specs)
    rank, home = collectives.rank, samples.home
    groups = samples.ids["group_id"] if split == "groups" else None
    target = assign(samples.cost, collectives.size, groups=groups, strata=samples.stratum, home=home)

    leaving = np.flatnonzero((home == rank) & (target != rank))
    leaving = leaving[np.argsort(target[leaving], kind="stable")]
    coming = np.flatnonzero((home != rank) & (target == rank))
    coming = coming[np.argsort(home[coming], kind="stable")]
    send = samples.bytes_by_worker(leaving, target, collectives.size)
    receive = samples.bytes_by_worker(coming, home, collectives.size)
    outgoing = _pack(batch, names, samples.local[leaving], send)
    incoming = collectives.all_to_all_bytes(outgoing, send.sum(0).tolist(), receive.sum(0).tolist())
    arrived = _unpack(incoming, receive, samples, coming)

    mine = np.flatnonzero(target == rank)
    place = samples.local.copy()
    place[coming] = len(batch) + np.arange(len(coming))
    columns = _merge(batch, arrived, names, place[mine])
    ids = {name: torch.from_numpy(samples.ids[name][mine]) for name in ID_COLUMNS}
    moved = Moved(len(outgoing), len(incoming), len(mine) - len(coming), perf_counter() - start)
    return Batch({**ids, **columns}), moved


def _gather(
    batch: Batch, names: Sequence[str], collectives: Collectives, cost: Cost | None, strata: Tensor | None
) -> _Samples:
    """Carry out the control plane.

    A worker's message is int64: its rows, the length of the header, the header, the table. The header is the schema
    as JSON, eight bytes to an integer; the table has for each row the ids, stratum, cost, and count of each ragged
    field. A worker whose ids are unusable sends no table: everybody learns why from the schema, and nobody waits.
    """
    schema = {name: _Spec.of(batch[name]) if name in batch else None for name in (*ID_COLUMNS, *names)}
    text = json.dumps(schema).encode()
    header = np.frombuffer(text.ljust(-(-len(text) // 8) * 8), np.int64)
    usable = len(batch) > 0 and all(schema.get(name) == _ID_SPEC for name in ID_COLUMNS)
    table = _table(batch, schema, cost, strata) if usable else np.zeros(0, np.int64)
    message = np.concatenate([np.array([len(batch), len(header)]), header, table.reshape(-1)])
    parts = [part.numpy() for part in collectives.all_gather_ints(torch.from_numpy(message))]

    rows = [int(part[0]) for part in parts]
    specs = _agree([_schema(part[2 : 2 + part[1]].tobytes()) for part in parts], rows)
    ragged = [name for name, spec in specs.items() if spec.ragged]
    width = len(ID_COLUMNS) + 2 + len(ragged)
    table = np.concatenate([part[2 + part[1] :].reshape(-1, width) for part in parts])
    order = np.argsort(table[:, 0], kind="stable")
    sample_id, group_id, slot, stratum, work, *counts = np.ascontiguousarray(table[order].T)
    if (twice := np.flatnonzero(np.diff(sample_id) == 0)).size:
        raise SiirlError(f"cannot redistribute: two rows have the sample id {sample_id[twice[0]]}")
    return _Samples(
        specs={name: spec for name, spec in specs.items() if name not in ID_COLUMNS},
        ids=dict(zip(ID_COLUMNS, (sample_id, group_id, slot), strict=True)),
        stratum=stratum,
        cost=work,
        counts=dict(zip(ragged, counts, strict=True)),
        home=np.repeat(np.arange(len(rows)), rows)[order],
        local=np.concatenate([np.arange(count) for count in rows])[order],
    )


def _table(batch: Batch, schema: _Schema, cost: Cost | None, strata: Tensor | None) -> Ints:
    counts = {name: batch.lengths(name) for name, spec in schema.items() if spec is not None and spec.ragged}
    stratum = torch.zeros(len(batch), dtype=torch.int64) if strata is None else strata
    work = _tokens(counts, len(batch)) if cost is None else cost(batch)
    return torch.stack([*(batch.dense(name) for name in ID_COLUMNS), stratum, work, *counts.values()], dim=1).numpy()


def _tokens(counts: Mapping[str, Tensor], rows: int) -> Tensor:
    """The default cost of each row, int64 [rows]."""
    if tokens := [counts[name] for name in ("prompt_ids", "response_ids") if name in counts]:
        return torch.stack(tokens).sum(0)
    return torch.stack(list(counts.values())).amax(0) if counts else torch.ones(rows, dtype=torch.int64)


def _schema(header: bytes) -> _Schema:
    columns = json.loads(header)
    return {name: spec and _Spec(spec[0], spec[1], tuple(spec[2])) for name, spec in columns.items()}


def _agree(schemas: Sequence[_Schema], rows: Sequence[int]) -> dict[str, _Spec]:
    """Return the kind of every column; workers without rows are asked only where nobody has rows."""
    agreed: dict[str, _Spec] = {}
    asked = [worker for worker, count in enumerate(rows) if count] or range(len(rows))
    for name in dict.fromkeys(name for worker in asked for name in schemas[worker]):
        kinds = {worker: schemas[worker].get(name) for worker in asked}
        known = {worker: kind for worker, kind in kinds.items() if kind is not None}
        without = [worker for worker in asked if worker not in known]
        if without and (rows[without[0]] or not known):
            raise SiirlError(f"cannot redistribute column '{name}': worker {without[0]} does not have it")
        (first, agreed[name]), *others = known.items()
        for worker, kind in others:
            if kind != agreed[name]:
                is_what = f"{agreed[name]} on worker {first}, {kind} on worker {worker}"
                raise SiirlError(f"cannot redistribute column '{name}': it is {is_what}")
        if name in ID_COLUMNS and agreed[name] != _ID_SPEC:
            raise SiirlError(f"cannot redistribute column '{name}': it is {agreed[name]}, not {_ID_SPEC}")
    return agreed


def _pack(batch: Batch, names: Sequence[str], rows: Ints, sizes: Ints) -> Tensor:
    """Serialise rows, which are sorted by destination: for each worker, for each field, its bytes (sizes)."""
    if len(rows) == 0 or not names:
        return torch.empty(0, dtype=torch.uint8)
    leaving = batch.select(names).take(torch.from_numpy(rows))
    by_field = []
    for name, by_worker in zip(names, sizes.tolist(), strict=True):
        column = leaving[name]
        data = as_bytes(column.values if isinstance(column, Ragged) else column)
        by_field.append(torch.split(data, by_worker))
    return torch.cat([piece for pieces in zip(*by_field, strict=True) for piece in pieces])


def _unpack(data: Tensor, sizes: Ints, samples: _Samples, rows: Ints) -> Batch:
    """Undo ``_pack`` for the rows (of samples) that came, which are sorted by the worker they came from."""
    fields = len(samples.specs)
    pieces = torch.split(data, sizes.T.reshape(-1).tolist())
    columns: dict[str, Column] = {}
    for field, (name, spec) in enumerate(samples.specs.items()):
        values = torch.cat(pieces[field::fields]).view(spec.torch_dtype)  # a copy, so aligned for any dtype
        if spec.ragged:
            offsets = offsets_of(torch.from_numpy(samples.counts[name][rows]))
            columns[name] = Ragged(values.reshape(int(offsets[-1]), *spec.shape), offsets)
        else:
            columns[name] = values.reshape(len(rows), *spec.shape)
    return Batch(columns)


def _merge(batch: Batch, arrived: Batch, names: Sequence[str], rows: Ints) -> dict[str, Column]:
    """Return rows of both batches, numbered one after the other; column by column, to hold only one of them twice."""
    if len(batch) == 0:
        arrived = arrived.take(torch.from_numpy(rows))
        return {name: arrived[name] for name in names}
    if len(arrived) == 0 and np.array_equal(rows, np.arange(len(batch))):
        return {name: batch[name] for name in names}
    index = torch.from_numpy(rows)
    return {name: Batch.concat([batch.select([name]), arrived.select([name])]).take(index)[name] for name in names}
