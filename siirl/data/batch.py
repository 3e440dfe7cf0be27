"""Named columns over the same rows: what travels between the nodes of a pipeline.

A column is dense, a tensor [rows, ...], or ragged, values [total, ...] with offsets [rows + 1], so that a long row
costs itself and not its neighbours. Batches and columns are immutable: every method returns a new one, and the
tensors of untouched columns are shared.

Standard columns, by the op that writes them (custom ops may add any other):

    sample_id     int64           one response; siirl.data.dataloader.sample_id
    group_id      int64           its prompt, shared by all responses to it
    slot          int64           position of the prompt in the step's global order, 0 .. prompts_per_step - 1
    prompt_ids    ragged int64    token ids
    row           ragged uint8    the data row, as JSON text
    response_ids  ragged int64    token ids
    finish_reason int8            0: end token or stop string, 1: length, 2: aborted
    policy_version int64          training steps that the weights which drew the response had seen
    reward        float32
    failed        bool            the reward raised or hung: the sample leaves group statistics and the loss
    rollout_log_probs, old_log_probs, ref_log_probs, values, returns, advantages, token_rewards
                  ragged float32  aligned with response_ids
    router_choices ragged int16   [layers, experts of a token] of each token of prompt and response but the last
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from siirl.errors import did_you_mean

# Strings keep lone surrogates, which JSON may carry ("\ud800"): "surrogatepass" writes and reads them unchanged, and
# is plain UTF-8 for every other text.
TEXT_ERRORS = "surrogatepass"

_OFFSETS = ".offsets"


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of different lengths.

    values: [total, ...] of any dtype; offsets: int64 [rows + 1], from 0 to total, never decreasing; row i is
    ``values[offsets[i]:offsets[i + 1]]``. Raises ValueError when they do not fit each other.
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        if self.values.dim() == 0:
            raise ValueError("ragged values need a first dimension")
        if self.offsets.dtype != torch.int64 or self.offsets.dim() != 1 or len(self.offsets) == 0:
            raise ValueError("ragged offsets are int64 [rows + 1]")
        if self.offsets.device != self.values.device:
            raise ValueError(f"ragged offsets are on {self.offsets.device}, the values on {self.values.device}")
        if self.offsets.device.type == "cpu":  # elsewhere looking at them would wait for the device
            if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != len(self.values):
                raise ValueError(f"ragged offsets run from 0 to the number of values, {len(self.values)}")
            if bool((self.lengths < 0).any()):
                raise ValueError("ragged offsets never decrease")

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int | float | bool] | Tensor], dtype: torch.dtype) -> Ragged:
        """Make a column from lists of numbers or 1-D tensors, one per row."""
        if any(isinstance(row, Tensor) for row in rows):
            values = torch.cat([torch.as_tensor(row, dtype=dtype) for row in rows])
        else:
            values = torch.tensor(list(chain.from_iterable(rows)), dtype=dtype)
        return cls(values, offsets_of(torch.tensor([len(row) for row in rows], dtype=torch.int64)))

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> Ragged:
        """Make a uint8 column of UTF-8 text; ``texts()`` gives back exactly these strings, lone surrogates included."""
        encoded = [text.encode("utf-8", TEXT_ERRORS) for text in texts]
        values = (
            torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
            if any(encoded)
            else torch.empty(0, dtype=torch.uint8)
        )
        return cls(values, offsets_of(torch.tensor([len(text) for text in encoded], dtype=torch.int64)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Number of values of each row, int64 [rows]."""
        return self.offsets.diff()

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of the values and the offsets."""
        return self.values.nbytes + self.offsets.nbytes

    def rows(self) -> list[Tensor]:
        """Return one view per row."""
        return list(torch.split(self.values, self.lengths.tolist()))

    def texts(self) -> list[str]:
        """Decode a uint8 column, one string per row."""
        if self.dtype != torch.uint8:
            raise ValueError(f"text is stored as uint8, this column is {self.dtype}")
        data, bounds = self.values.cpu().numpy().tobytes(), self.offsets.tolist()
        return [data[start:end].decode("utf-8", TEXT_ERRORS) for start, end in zip(bounds, bounds[1:], strict=False)]

    def take(self, rows: Tensor) -> Ragged:
        """Return a copy of these rows (int64 [n], repetitions allowed) in this order."""
        if self.device.type == "cpu":
            spans = _Spans.of([self], [torch.arange(len(rows))], torch.zeros_like(rows), rows)
            return Ragged(spans.copy([self.values]), spans.offsets)
        offsets = offsets_of(self.lengths.index_select(0, rows))
        index = torch.arange(int(offsets[-1]), device=rows.device)
        index += torch.repeat_interleave(self.offsets.index_select(0, rows) - offsets[:-1], offsets.diff())
        return Ragged(self.values.index_select(0, index), offsets)

    def to(self, device: torch.device | str) -> Ragged:
        """Return the column with its values and offsets on a device."""
        return Ragged(self.values.to(device), self.offsets.to(device))


Column: TypeAlias = Tensor | Ragged


class Batch:
    """Named columns over the same rows; immutable. Columns live on the host unless ``to`` moved them."""

    __slots__ = ("_columns", "_rows")

    def __init__(self, columns: Mapping[str, Column]) -> None:
        """Raise ValueError naming the column that is not as long as the first one."""
        rows: int | None = None
        for name, column in columns.items():
            if isinstance(column, Tensor) and column.dim() == 0:
                raise ValueError(f"column '{name}' is a scalar, not a tensor [rows, ...]")
            if not isinstance(column, Tensor | Ragged):
                raise ValueError(f"column '{name}' is a {type(column).__name__}, not a tensor or a Ragged")
            if rows is not None and len(column) != rows:
                raise ValueError(f"column '{name}' has {len(column)} rows, the batch has {rows}")
            rows = len(column)
        self._columns = dict(columns)
        self._rows = rows or 0

    def __len__(self) -> int:
        return self._rows

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __getitem__(self, name: str) -> Column:
        if name not in self._columns:
            raise KeyError(f"the batch has no column '{name}'{did_you_mean(name, self._columns)}")
        return self._columns[name]

    def __repr__(self) -> str:
        parts = [f"{name}: {'ragged ' if isinstance(c, Ragged) else ''}{c.dtype}" for name, c in self._columns.items()]
        return f"Batch({len(self)} rows; {', '.join(parts)})"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._columns)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, offsets included."""
        return sum(column.nbytes for column in self._columns.values())

    def dense(self, name: str) -> Tensor:
        """Return a dense column; raise ValueError when it is ragged."""
        column = self[name]
        if not isinstance(column, Tensor):
            raise ValueError(f"column '{name}' is ragged where a dense one is needed")
        return column

    def ragged(self, name: str) -> Ragged:
        """Return a ragged column; raise ValueError when it is dense."""
        column = self[name]
        if not isinstance(column, Ragged):
            raise ValueError(f"column '{name}' is dense where a ragged one is needed")
        return column

    def lengths(self, name: str) -> Tensor:
        """Return the row lengths of a ragged column, int64 [rows]."""
        return self.ragged(name).lengths

    def texts(self, name: str) -> list[str]:
        """Return the strings of a text column."""
        return self.ragged(name).texts()

    def with_columns(self, **columns: Column) -> Batch:
        """Return the batch with columns added or replaced."""
        return Batch({**self._columns, **columns})

    def drop(self, names: Iterable[str]) -> Batch:
        """Return the batch without these columns; names it does not have are no error."""
        gone = {names} if isinstance(names, str) else set(names)
        return Batch({name: column for name, column in self._columns.items() if name not in gone})

    def select(self, names: Iterable[str]) -> Batch:
        """Return the batch with these columns only, in this order."""
        return Batch({name: self[name] for name in ([names] if isinstance(names, str) else names)})

    def take(self, rows: Tensor | Sequence[int]) -> Batch:
        """Return a copy of these rows in this order; repetitions are allowed, masks and negative numbers are not."""
        index = rows if isinstance(rows, Tensor) else torch.as_tensor(rows, dtype=torch.int64)
        if index.dtype != torch.int64 or index.dim() != 1:
            raise ValueError(
                f"rows to take are int64 [n], not {index.dtype} {list(index.shape)}; a mask needs nonzero()"
            )
        if all(column.device.type == "cpu" for column in self._columns.values()):
            return Batch(gather([self], self.names, torch.zeros_like(index), index.cpu()))
        return Batch({name: _take(column, index.to(column.device)) for name, column in self._columns.items()})

    def repeat(self, times: int) -> Batch:
        """Return every row ``times`` times, the copies of a row following each other."""
        return self.take(torch.arange(len(self)).repeat_interleave(times))

    @classmethod
    def concat(cls, batches: Sequence[Batch]) -> Batch:
        """Put batches with the same columns one after another; raise ValueError naming a column that differs."""
        if not batches:
            raise ValueError("nothing to concatenate: the list of batches is empty")
        names = batches[0].names
        for batch in batches[1:]:
            if different := set(names) ^ set(batch.names):
                raise ValueError(f"column '{min(different)}' is not in every batch to concatenate")
        return cls({name: _concat(name, [batch[name] for batch in batches]) for name in names})

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every column on a device."""
        return Batch({name: column.to(device) for name, column in self._columns.items()})

    def to_tensors(self) -> dict[str, Tensor]:
        """Copy the columns to tensors by name, for a file; the offsets of a ragged column are ``NAME.offsets``."""
        parts: dict[str, Tensor] = {}
        for name, column in self._columns.items():
            parts[name] = _values(column)
            if isinstance(column, Ragged):
                parts[name + _OFFSETS] = column.offsets
        return {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Batch:
        """The inverse of :meth:`to_tensors`."""
        return cls(
            {
                name: Ragged(values, tensors[name + _OFFSETS]) if name + _OFFSETS in tensors else values
                for name, values in tensors.items()
                if not name.endswith(_OFFSETS)
            }
        )

    def equals(self, other: Batch) -> bool:
        """Say whether both hold the same columns with the same dtypes, shapes and bits (a NaN equals itself)."""
        return set(self.names) == set(other.names) and all(_same(self[name], other[name]) for name in self.names)


def offsets_of(lengths: Tensor) -> Tensor:
    """Return the offsets [rows + 1] of rows with these lengths, int64 [rows]."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def gather(batches: Sequence[Batch], names: Iterable[str], part: Tensor, row: Tensor) -> dict[str, Column]:
    """Return rows of several batches with columns of the same kinds, on the host; each value is copied once.

    part, row: int64 [n], which of the batches each row comes from, and its number there.
    """
    at = [(part == i).nonzero().squeeze(1) for i in range(len(batches))]
    found: dict[str, Column] = {}
    spans: _Spans | None = None
    for name in names:
        columns = [batch[name] for batch in batches]
        sources = [column for column in columns if isinstance(column, Ragged)]
        if sources:
            if spans is None or not spans.fit(sources):  # columns aligned with one another share them
                spans = _Spans.of(sources, at, part, row)
            found[name] = Ragged(spans.copy([source.values for source in sources]), spans.offsets)
        else:
            values = [_values(column) for column in columns]
            out = values[0].new_empty((len(row), *values[0].shape[1:]))
            for value, places in zip(values, at, strict=True):
                out[places] = value.index_select(0, row[places])
            found[name] = out
    return found


@dataclass(frozen=True, eq=False)
class _Spans:
    """Where rows lie in ragged columns: rows that follow each other here and there are one span."""

    lengths: list[Tensor]  # of the rows of each source
    offsets: Tensor  # of the rows to come
    parts: list[int]
    starts: list[int]
    sizes: list[int]

    @classmethod
    def of(cls, sources: Sequence[Ragged], at: Sequence[Tensor], part: Tensor, row: Tensor) -> _Spans:
        lengths = [source.lengths for source in sources]
        starts, taken = torch.empty_like(row), torch.empty_like(row)
        for source, length, places in zip(sources, lengths, at, strict=True):
            index = row[places]
            starts[places], taken[places] = source.offsets[:-1].index_select(0, index), length.index_select(0, index)
        offsets = offsets_of(taken)
        head = torch.ones(len(row), dtype=torch.bool)
        head[1:] = (part.diff() != 0) | (row.diff() != 1)
        heads = head.nonzero().squeeze(1)
        sizes = torch.cat([offsets[heads], offsets[-1:]]).diff()
        return cls(lengths, offsets, part[heads].tolist(), starts[heads].tolist(), sizes.tolist())

    def fit(self, sources: Sequence[Ragged]) -> bool:
        return all(torch.equal(own, s.lengths) for own, s in zip(self.lengths, sources, strict=True))

    def copy(self, sources: Sequence[Tensor]) -> Tensor:
        """The values of all spans. Slices of memory: a fifth of the time of as many tensors."""
        out = sources[0].new_empty((int(self.offsets[-1]), *sources[0].shape[1:]))
        if out.numel() == 0:
            return out
        width = out[0].numel() * out.itemsize
        read = [as_bytes(source).numpy().data for source in sources]
        write = as_bytes(out).numpy().data
        place = 0
        for part, start, size in zip(self.parts, self.starts, self.sizes, strict=True):
            end = place + size * width
            write[place:end] = read[part][start * width : (start + size) * width]
            place = end
        return out


def _take(column: Column, rows: Tensor) -> Column:
    return column.take(rows) if isinstance(column, Ragged) else column.index_select(0, rows)


def _concat(name: str, columns: list[Column]) -> Column:
    kinds = {(isinstance(column, Ragged), column.dtype, _values(column).shape[1:]) for column in columns}
    if len(kinds) > 1:  # torch.cat would promote dtypes silently
        raise ValueError(f"column '{name}' has different kinds, dtypes or shapes in the batches to concatenate")
    values = torch.cat([_values(column) for column in columns])
    if isinstance(columns[0], Ragged):
        return Ragged(values, offsets_of(torch.cat([c.lengths for c in columns if isinstance(c, Ragged)])))
    return values


def _values(column: Column) -> Tensor:
    return column.values if isinstance(column, Ragged) else column


def _same(a: Column, b: Column) -> bool:
    if isinstance(a, Ragged) != isinstance(b, Ragged):
        return False
    if isinstance(a, Ragged) and isinstance(b, Ragged):
        return torch.equal(a.offsets, b.offsets) and _same(a.values, b.values)
    x, y = _values(a), _values(b)
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(as_bytes(x), as_bytes(y))


def as_bytes(values: Tensor) -> Tensor:
    """Return the memory of a tensor of any dtype as uint8 [bytes], without a copy when it is contiguous."""
    flat = values.contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8, device=values.device)
