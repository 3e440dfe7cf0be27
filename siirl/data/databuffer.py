"""The distributed databuffer: rows move from the workers that made them to the workers that use them next.

The control plane is one all-gather: every worker's schema and a few integers per sample. From these all workers
derive the same assignment and the same send and receive lists. The data plane is one exchange of bytes, in which a
row that stays has no part; where several workers need the same rows, one of them receives each row and a second
exchange among these workers shares it. Rows come out in the order of their sample ids, never in the order of arrival.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from siirl.data.balance import assign
from siirl.data.batch import Batch, Column, gather
from siirl.data.partition import Ints
from siirl.data.transport import CollectiveTransport, Transport
from siirl.data.wire import Field, Range, Spec, pack, segment_bytes, unpack, value_range, values_by_worker, wire_of
from siirl.errors import SiirlError

if TYPE_CHECKING:
    from siirl.device.collectives import Collectives

# These travel with the control plane, whatever fields are asked for.
ID_COLUMNS = ("sample_id", "group_id", "slot")
_ID_SPEC = Spec("int64", False, ())

Cost = Callable[[Batch], Tensor]
_Schema: TypeAlias = Mapping[str, tuple[Spec, Range] | None]  # None for a column the worker does not have


@dataclass(frozen=True)
class Moved:
    """What one redistribution moved on this worker: bytes as they travelled, rows that stayed, wall time."""

    bytes_sent: int
    bytes_received: int
    rows_kept: int
    seconds: float


@dataclass(frozen=True)
class Spread:
    """Which workers hold the same rows.

    Attributes:
        members: int64 [shares, copies], the workers of each share; every one of them holds all rows of the share.
        share_of: int64 [workers], the share of each worker, -1 for one that has none.
    """

    members: Ints
    share_of: Ints

    @classmethod
    def of(cls, members: Ints, workers: int) -> Spread:
        """Raise ValueError when a worker is in two shares, or does not exist."""
        flat = members.reshape(-1)
        if len(np.unique(flat)) < len(flat) or (len(flat) and not 0 <= flat.min() <= flat.max() < workers):
            raise ValueError(f"each of the workers 0 .. {workers - 1} belongs to one share at most: {members.tolist()}")
        share_of = np.full(workers, -1, np.int64)
        share_of[flat] = np.repeat(np.arange(len(members)), members.shape[1])
        return cls(members, share_of)

    @classmethod
    def single(cls, workers: int) -> Spread:
        """Every worker has a share of its own."""
        return cls(np.arange(workers)[:, None], np.arange(workers))


@dataclass(frozen=True)
class _Samples:
    """All samples of all workers in the order of their ids: what every worker knows of them. Arrays are int64 [N]."""

    names: tuple[str, ...]  # of the columns that come out, ids aside
    fields: dict[str, Field]  # the same, the widest first, as they travel
    ids: dict[str, Ints]
    stratum: Ints
    cost: Ints
    counts: dict[str, Ints]  # of each ragged field: values in the row
    home: Ints  # share that holds the row
    local: Ints  # number of the row there

    def values(self, rows: Ints, worker: Ints, workers: int) -> Ints:
        """Rows or ragged values of some samples, int64 [fields, workers], by the worker given for each of them."""
        columns = [
            values_by_worker(field, self.counts[name][rows] if field.spec.ragged else None, worker, workers)
            for name, field in self.fields.items()
        ]
        return np.stack(columns) if columns else np.zeros((0, workers), np.int64)


class _Hop(NamedTuple):
    """Rows on their way: samples, and for each its sender and its receiver; int64 [n]."""

    rows: Ints
    sender: Ints
    receiver: Ints


def redistribute(
    batch: Batch,
    collectives: Collectives,
    *,
    fields: Sequence[str],
    split: Literal["tokens", "groups"],
    cost: Cost | None = None,
    strata: Tensor | None = None,
    source: Ints | None = None,
    target: Ints | None = None,
    equal: bool = False,
    transport: Transport | None = None,
) -> tuple[Batch, Moved]:
    """Give every share of the workers an equal part of the rows; every worker calls it at the same point.

    Args:
        batch: this worker's rows; columns live on the host. A worker without rows needs no columns and no fields.
        fields: columns to move; sample_id (unique over all shares), group_id and slot always come along, every other
            column is dropped.
        split: "tokens" deals single rows, "groups" keeps the rows of a group_id on one share.
        cost: maps a worker's batch to the work of each row, int64 [rows]; default: tokens of prompt_ids and
            response_ids, or the values of the row's longest ragged field.
        strata: int64 [rows], each stratum (mini-batch) is balanced by itself.
        source, target: int64 [shares, copies], the workers of each share before and after: those of one share hold
            the same rows. A worker in no share has, or gets, none. Default: every worker is a share.
        equal: shares get equal numbers of rows (or groups), whatever they cost.
        transport: moves the bytes; default: the collectives.

    A run with one worker gets its own tensors back.
    Raises SiirlError, on every worker alike, when a column is missing, differs between workers, or an id occurs twice.
    """
    start = perf_counter()
    names = [name for name in dict.fromkeys(fields) if name not in ID_COLUMNS]
    if collectives.size == 1:
        return batch.select([*ID_COLUMNS, *names]), Moved(0, 0, len(batch), perf_counter() - start)
    assert split in ("tokens", "groups")
    workers, rank = collectives.size, collectives.rank
    before, after = (Spread.single(workers) if s is None else Spread.of(s, workers) for s in (source, target))
    carrier = transport or CollectiveTransport(collectives)
    samples = _gather(batch, names, collectives, before, cost, strata, carrier.compresses)
    carrier.begin()  # who takes part in the gathering has done with what came the last time
    share = assign(
        samples.cost,
        len(after.members),
        groups=samples.ids["group_id"] if split == "groups" else None,
        strata=samples.stratum,
        home=_nearest(before, after)[samples.home],
        equal=equal,
    )

    place = np.where(samples.home == before.share_of[rank], samples.local, -1)
    mine = np.flatnonzero(share == after.share_of[rank]) if after.share_of[rank] >= 0 else np.zeros(0, np.int64)
    kept = int((place[mine] >= 0).sum())
    hops = _hops(samples, share, before, after) if samples.fields else []
    held, sent, received = _collect(batch, place, samples, hops, rank, workers, carrier)
    columns = _take(held, samples.names, place[mine]) if samples.fields else {}
    ids = {name: torch.from_numpy(samples.ids[name][mine]) for name in ID_COLUMNS}
    return Batch({**ids, **columns}), Moved(sent, received, kept, perf_counter() - start)


def _nearest(before: Spread, after: Spread) -> Ints:
    """For each share before, the share after that has most of its workers, -1 where none has any."""
    shares = after.share_of[before.members]
    nearest = np.full(len(shares), -1, np.int64)
    for copy in range(shares.shape[1]):
        better = (shares == shares[:, copy : copy + 1]).sum(1) > (shares == nearest[:, None]).sum(1)
        nearest = np.where((shares[:, copy] >= 0) & ((nearest < 0) | better), shares[:, copy], nearest)
    return nearest


def _hops(samples: _Samples, share: Ints, before: Spread, after: Spread) -> list[_Hop]:
    """Where every row goes: to one worker of its share, unless one has it already, and from there to the others.

    Senders and receivers take turns, row by row, so that no worker of a share carries more than its part.
    """
    number = np.arange(len(share))
    to, copies = after.members[share], after.members.shape[1]
    has = before.share_of[to] == samples.home[:, None]
    away = np.flatnonzero(~has.any(1))
    entry = away % copies
    sender = before.members[samples.home[away], away % before.members.shape[1]]
    hops = [_Hop(away, sender, to[away, entry])]
    if copies > 1:
        has[away, entry] = True
        turn = np.where(has, (np.arange(copies) - number[:, None]) % copies, copies)
        provider = to[number, turn.argmin(1)] if len(number) else number
        rows, column = np.nonzero(~has)
        hops.append(_Hop(rows, provider[rows], to[rows, column]))
    return hops


def _collect(
    batch: Batch, place: Ints, samples: _Samples, hops: Sequence[_Hop], rank: int, workers: int, transport: Transport
) -> tuple[list[Batch], int, int]:
    """Carry out the hops: the rows held before and what came, with ``place`` brought up to date; bytes out and in."""
    held, sent, received = [batch], 0, 0
    for hop in hops:
        coming, arrived, bytes_out, bytes_in = _exchange(held, place, samples, hop, rank, workers, transport)
        place[coming] = sum(map(len, held)) + np.arange(len(coming))
        held += arrived
        sent, received = sent + bytes_out, received + bytes_in
    return held, sent, received


def _exchange(
    held: Sequence[Batch], place: Ints, samples: _Samples, hop: _Hop, rank: int, workers: int, transport: Transport
) -> tuple[Ints, list[Batch], int, int]:
    """Carry out a hop: the samples that came, by sender; their rows, a batch a sender; bytes that left and came."""
    leaving, coming = hop.sender == rank, hop.receiver == rank
    to, by = hop.receiver[leaving], hop.sender[coming]
    out_rows = hop.rows[leaving][np.argsort(to, kind="stable")]
    in_rows = hop.rows[coming][np.argsort(by, kind="stable")]
    out_values = samples.values(hop.rows[leaving], to, workers)
    in_values = samples.values(hop.rows[coming], by, workers)
    sizes = np.zeros((workers, workers), np.int64)
    if transport.whole:
        pairs = samples.values(hop.rows, hop.sender * workers + hop.receiver, workers * workers)
        sizes = segment_bytes(samples.fields, pairs).reshape(workers, workers)
    sizes[rank], sizes[:, rank] = segment_bytes(samples.fields, out_values), segment_bytes(samples.fields, in_values)
    outgoing = transport.allocate(int(sizes[rank].sum()))
    if len(out_rows):
        pack(Batch(_take(held, list(samples.fields), place[out_rows])), samples.fields, out_values, outgoing)
    segments = transport.exchange(outgoing, sizes)
    cuts = np.cumsum(np.bincount(by, minlength=workers))[:-1]
    counts = {name: np.split(count[in_rows], cuts) for name, count in samples.counts.items()}
    arrived = unpack(segments, samples.fields, in_values, counts)
    return in_rows, arrived, int(sizes[rank].sum()), int(sizes[:, rank].sum())


def _gather(
    batch: Batch,
    names: Sequence[str],
    collectives: Collectives,
    before: Spread,
    cost: Cost | None,
    strata: Tensor | None,
    compress: bool,
) -> _Samples:
    """Carry out the control plane.

    A worker's message is int64: its rows, the length of the header, the header, the table. The header is the schema
    as JSON, eight bytes to an integer; the table has for each row the ids, stratum, cost, and count of each ragged
    field. Of the workers of a share, which hold the same rows, the first one speaks. A worker whose ids are unusable
    sends no table: everybody learns why from the schema, and nobody waits.
    """
    share = before.share_of[collectives.rank]
    speaks = share >= 0 and before.members[share, 0] == collectives.rank
    rows = batch if speaks else Batch({})
    schema: _Schema = {
        name: (Spec.of(rows[name]), value_range(rows[name]) if compress else None) if name in rows else None
        for name in ((*ID_COLUMNS, *names) if speaks else ())
    }
    text = json.dumps(schema).encode()
    header = np.frombuffer(text.ljust(-(-len(text) // 8) * 8), np.int64)
    usable = len(rows) > 0 and all((known := schema.get(n)) is not None and known[0] == _ID_SPEC for n in ID_COLUMNS)
    table = _table(rows, schema, cost, strata) if usable else np.zeros(0, np.int64)
    message = np.concatenate([np.array([len(rows), len(header)]), header, table.reshape(-1)])
    parts = [part.numpy() for part in collectives.all_gather_ints(torch.from_numpy(message))]

    told = [int(part[0]) for part in parts]
    fields = _agree([_schema(part[2 : 2 + part[1]].tobytes()) for part in parts], told, compress)
    ragged = [name for name, field in fields.items() if field.spec.ragged]
    width = len(ID_COLUMNS) + 2 + len(ragged)
    table = np.concatenate([part[2 + part[1] :].reshape(-1, width) for part in parts])
    order = np.argsort(table[:, 0], kind="stable")
    sample_id, group_id, slot, stratum, work, *counts = np.ascontiguousarray(table[order].T)
    if (twice := np.flatnonzero(np.diff(sample_id) == 0)).size:
        raise SiirlError(f"cannot redistribute: two rows have the sample id {sample_id[twice[0]]}")
    travelling = {name: field for name, field in fields.items() if name not in ID_COLUMNS}
    return _Samples(
        names=tuple(travelling),
        fields=dict(sorted(travelling.items(), key=lambda item: -item[1].itemsize)),
        ids=dict(zip(ID_COLUMNS, (sample_id, group_id, slot), strict=True)),
        stratum=stratum,
        cost=work,
        counts=dict(zip(ragged, counts, strict=True)),
        home=np.repeat(before.share_of, told)[order],
        local=np.concatenate([np.arange(count) for count in told])[order],
    )


def _table(batch: Batch, schema: _Schema, cost: Cost | None, strata: Tensor | None) -> Ints:
    counts = {name: batch.lengths(name) for name, known in schema.items() if known is not None and known[0].ragged}
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
    return {
        name: known and (Spec(known[0][0], known[0][1], tuple(known[0][2])), known[1] and tuple(known[1]))
        for name, known in columns.items()
    }


def _agree(schemas: Sequence[_Schema], rows: Sequence[int], compress: bool) -> dict[str, Field]:
    """Return the kind of every column; workers without rows are asked only where nobody has rows."""
    agreed: dict[str, Field] = {}
    asked = [worker for worker, count in enumerate(rows) if count] or range(len(rows))
    for name in dict.fromkeys(name for worker in asked for name in schemas[worker]):
        kinds = {worker: schemas[worker].get(name) for worker in asked}
        known = {worker: kind for worker, kind in kinds.items() if kind is not None}
        without = [worker for worker in asked if worker not in known]
        if without and (rows[without[0]] or not known):
            raise SiirlError(f"cannot redistribute column '{name}': worker {without[0]} does not have it")
        (first, (spec, _)), *others = known.items()
        for worker, (other, _) in others:
            if other != spec:
                is_what = f"{spec} on worker {first}, {other} on worker {worker}"
                raise SiirlError(f"cannot redistribute column '{name}': it is {is_what}")
        if name in ID_COLUMNS and spec != _ID_SPEC:
            raise SiirlError(f"cannot redistribute column '{name}': it is {spec}, not {_ID_SPEC}")
        agreed[name] = Field(spec, wire_of(spec, [span for _, span in known.values()], compress))
    return agreed


def _take(held: Sequence[Batch], names: Sequence[str], rows: Ints) -> dict[str, Column]:
    """Rows of several batches, numbered one after the other."""
    begins = np.cumsum([0, *map(len, held)])
    part = np.searchsorted(begins, rows, side="right") - 1
    used, part = np.unique(part, return_inverse=True)
    if len(used) == 0:
        some = next((batch for batch in held if len(batch.names)), held[0])
        return {name: Batch({name: some[name]}).take([])[name] for name in names if name in some}
    index = rows - begins[used][part]
    if len(used) == 1 and np.array_equal(index, np.arange(len(held[used[0]]))) and used[0] == 0:
        return {name: held[0][name] for name in names}
    parts, rows_of = torch.from_numpy(part), torch.from_numpy(index)
    return gather([held[i] for i in used], names, parts, rows_of)
