"""Rows from files: JSON lines, a JSON list, Parquet, and data sets of the hub."""

from __future__ import annotations

import array
import base64
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from siirl.config.schema import DataConfig
from siirl.data.source_base import (
    Row,
    Source,
    missing_column,
    parse_query,
    required_columns,
    usable_rows,
    values_problem,
    with_answer,
)
from siirl.errors import RequestError

if TYPE_CHECKING:
    import pyarrow


def open_json(path: Path, config: DataConfig) -> Source:
    """A file of one JSON object per line, or of one JSON list of objects.

    Every row is checked once, here; of a file of lines only the offsets are kept, and a row is read when it is used.
    """
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _open_list(path, config) if start.startswith(b"[") else _open_lines(path, config)


def _open_lines(path: Path, config: DataConfig) -> Source:
    offsets, sizes = array.array("q"), array.array("q")

    def problems(file: BinaryIO) -> Iterator[str | None]:
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                offsets.append(offset)
                sizes.append(len(line))
                yield _line_problem(line, f"{path} line {number}", config)
            offset += len(line)

    def read(index: int) -> Row:
        at = kept[index]
        return with_answer(_parse(os.pread(descriptor, sizes[at], offsets[at])), config)

    with path.open("rb") as file:
        kept = usable_rows(str(path), problems(file), config)
        descriptor = os.dup(file.fileno())  # stays open: a file put in this one's place during the run changes nothing
    weakref.finalize(read, os.close, descriptor)
    return Source(str(path), len(kept), read)


def _open_list(path: Path, config: DataConfig) -> Source:
    try:
        rows = _parse(path.read_bytes())
    except ValueError as error:
        raise RequestError(f"{path} is not a JSON list: {error}") from error
    problems = (_row_problem(row, f"{path} item {number}", config) for number, row in enumerate(rows, start=1))
    kept = usable_rows(str(path), problems, config)
    return Source(str(path), len(kept), lambda index: with_answer(dict(rows[kept[index]]), config))


def _parse(data: bytes) -> Any:
    return json.loads(data.decode("utf-8-sig"))


def _line_problem(line: bytes, where: str, config: DataConfig) -> str | None:
    try:
        row = _parse(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        return f"{where} is not a JSON object: {error}"
    return _row_problem(row, where, config)


def _row_problem(row: Any, where: str, config: DataConfig) -> str | None:
    if not isinstance(row, dict):
        return f"{where} is not a JSON object but a {type(row).__name__}"
    return missing_column(where, row, config) or values_problem(where, row, config)


def open_parquet(path: Path, config: DataConfig) -> Source:
    """A Parquet file, decoded once into an Arrow table."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise RequestError(f"{path} needs the package pyarrow: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise RequestError(f"{path} is not a Parquet file: {error}") from error
    return _open_table(str(path), table, config)


def open_hub(spec: str, config: DataConfig) -> Source:
    """A data set of the hub, ``owner/name?split=train&name=configuration``, through the package `datasets`."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise RequestError(
            f"'{spec}' is no file; to read it as a data set of the hub, install the package datasets: "
            "pip install datasets"
        ) from error
    name, options = parse_query(spec, ["split", "name"])
    try:
        rows = datasets.load_dataset(name, options.get("name"), split=options.get("split", "train"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RequestError(f"'{spec}' is no file, and the hub does not give it: {reason}") from error
    return _open_table(spec, rows.with_format("arrow")[:], config)


def _open_table(name: str, table: pyarrow.Table, config: DataConfig) -> Source:
    if problem := missing_column(name, table.column_names, config):
        raise RequestError(problem)
    rows = (row for batch in table.select(list(required_columns(config))).to_batches() for row in batch.to_pylist())
    problems = (values_problem(f"{name} row {number}", row, config) for number, row in enumerate(rows, start=1))
    kept = usable_rows(name, problems, config)

    def read(index: int) -> Row:
        row = table.slice(kept[index], 1).to_pylist()[0]
        return with_answer(json.loads(json.dumps(row, default=_plain)), config)

    return Source(name, len(kept), read)


def _plain(value: Any) -> str:
    """Text for what Arrow has and JSON has not: bytes in base64, dates in ISO 8601, decimals as written."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
