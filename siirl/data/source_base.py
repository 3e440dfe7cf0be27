"""What a data source is: rows that can be read by index, the same on every worker."""

from __future__ import annotations

import array
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np

from siirl.config.schema import DataConfig
from siirl.errors import RequestError, did_you_mean

Row = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Rows read by index.

    Attributes:
        name: how messages call it.
        length: number of rows.
        read: row by index, 0 <= index < length; JSON-able, with the prompt column and, where known, `answer`.
        scorer: the registered reward that these rows are made for; None when any may fit.
    """

    name: str
    length: int
    read: Callable[[int], Row]
    scorer: str | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.length:
            raise IndexError(f"row {index} of {self.name}, which has {self.length}")
        return self.read(int(index))


def required_columns(config: DataConfig) -> dict[str, str]:
    """Column to the key that names it. The answer is required only when the configuration names its column."""
    required = {config.prompt_key: "data.prompt_key"}
    if config.answer_key != DataConfig.model_fields["answer_key"].default:
        required[config.answer_key] = "data.answer_key"
    return required


def missing_column(where: str, columns: Iterable[str], config: DataConfig) -> str | None:
    """The sentence for a column that the configuration names and that is not among `columns`; None when all are."""
    columns = list(columns)
    for column, key in required_columns(config).items():
        if column not in columns:
            near, listed = did_you_mean(column, columns), ", ".join(columns[:12]) or "none"
            return f"{where} has no column '{column}' ({key}){near} (its columns: {listed})"
    return None


def values_problem(where: str, row: Row, config: DataConfig) -> str | None:
    """The sentence for a prompt or a required answer that cannot be used; None when the row can."""
    for column in required_columns(config):
        if column != config.prompt_key and row[column] is None:
            return f"{where}: '{column}' is null"
    prompt = row[config.prompt_key]
    if isinstance(prompt, str):
        return None if prompt.strip() else f"{where}: '{config.prompt_key}' is empty"
    messages = prompt if isinstance(prompt, list) else []
    if messages and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
        return None
    return f"{where}: '{config.prompt_key}' is neither a text nor a list of messages with role and content"


def usable_rows(name: str, problems: Iterable[str | None], config: DataConfig) -> np.ndarray:
    """Indices (int64) of the rows without a problem, at most `data.limit`.

    Raises:
        RequestError: `data.on_error` is stop and a row has a problem, or no row is left.
    """
    kept = array.array("q")
    skipped: list[str] = []
    for index, problem in enumerate(problems):
        if problem is None:
            kept.append(index)
            if len(kept) == config.limit:
                break
        elif config.on_error == "stop":
            raise RequestError(f"{problem} (data.on_error=skip leaves such rows out)")
        else:
            skipped.append(problem)
    if skipped:
        log.warning("%s: %d rows left out, the first: %s", name, len(skipped), skipped[0])
    if not kept:
        raise RequestError(f"{name} has no usable row" + (f": {skipped[0]}" if skipped else ": it is empty"))
    return np.frombuffer(kept, dtype=np.int64)


def with_answer(row: Row, config: DataConfig) -> Row:
    """The row with its answer under `answer`, where rewards look for it."""
    if config.answer_key in row:
        row["answer"] = row[config.answer_key]
    return row


def parse_query(spec: str, allowed: Iterable[str]) -> tuple[str, dict[str, Any]]:
    """Split ``name?key=value&key=value``; a value is JSON where it reads as such, else text.

    Raises:
        RequestError: a key that is not allowed, or a part without `=`.
    """
    name, _, query = spec.partition("?")
    allowed = list(allowed)
    values: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, equals, text = part.partition("=")
        if not equals:
            raise RequestError(f"'{spec}': '{part}' is not KEY=VALUE")
        if key not in allowed:
            near = did_you_mean(key, allowed)
            raise RequestError(f"'{name}' has no parameter '{key}'{near} (it has {', '.join(sorted(allowed))})")
        try:
            values[key] = json.loads(unquote(text))
        except json.JSONDecodeError:
            values[key] = unquote(text)
    return name, values
