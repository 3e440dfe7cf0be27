"""Data sources by name, and the split into training and held-out rows.

- ``arithmetic:addition?digits=2&reverse=true`` (also subtraction, multiplication)
- ``reasoning-gym:TASK?size=N&parameter=value``
- a path ending in .jsonl, .ndjson, .json or .parquet
- ``owner/name?split=train&name=configuration``: a data set of the hub
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np

from siirl.config.schema import DataConfig
from siirl.data.source_base import Source
from siirl.data.source_files import open_hub, open_json, open_parquet
from siirl.data.source_generated import open_arithmetic, open_reasoning_gym
from siirl.errors import RequestError, did_you_mean

__all__ = ["Source", "open_source", "split"]

GENERATED = {"arithmetic": open_arithmetic, "reasoning-gym": open_reasoning_gym}
FILES = {".jsonl": open_json, ".ndjson": open_json, ".json": open_json, ".parquet": open_parquet}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(\?.*)?")


def open_source(spec: str, *, config: DataConfig, seed: int, key: str = "data.source") -> Source:
    """Open the source that `spec` names; the rows are a function of `spec`, `config` and `seed` alone.

    Five tasks of reasoning-gym 0.1.25 also depend on the order of Python's sets (isomorphic_strings, knight_swap,
    polynomial_multiplication, ransom_note, word_ladder), which PYTHONHASHSEED fixes.

    Raises:
        RequestError: no such source or file, a row or column that cannot be used, or no row at all; the sentence
            begins with `key`, the configuration key that asked for the source.
    """
    try:
        return _open(spec, config, seed)
    except RequestError as error:
        raise RequestError(f"{key}: {error}") from error
    except OSError as error:
        raise RequestError(f"{key}: '{spec}' cannot be read: {error.strerror}") from error


def _open(spec: str, config: DataConfig, seed: int) -> Source:
    kind = spec.partition(":")[0]
    if kind in GENERATED:
        return GENERATED[kind](spec, config, seed)
    path = Path(spec)
    if path.suffix in FILES:
        if not path.exists():
            near = did_you_mean(path.name, [file.name for file in path.parent.glob("*") if file.suffix in FILES])
            raise RequestError(f"the file '{spec}' does not exist{near}")
        return FILES[path.suffix](path, config)
    if path.exists():
        raise RequestError(f"'{spec}' is no file of a known kind ({', '.join(FILES)})")
    if HUB_ID.fullmatch(spec):
        return open_hub(spec, config)
    raise RequestError(
        f"'{spec}' is neither a file ({', '.join(FILES)}) nor arithmetic:OPERATION, reasoning-gym:TASK "
        f"or owner/name of the hub{did_you_mean(kind, GENERATED)}"
    )


def split(source: Source, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (int64, ascending) of the training rows and of `held_out` others, drawn with `seed`.

    The rows are told apart by index: a source that repeats a prompt may have it on both sides.

    Raises:
        RequestError: nothing would be left to train on.
    """
    if held_out >= len(source):
        raise RequestError(f"data.held_out={held_out} leaves nothing to train on: {source.name} has {len(source)} rows")
    drawn = random.Random(f"held out {seed}").sample(range(len(source)), held_out)  # a stream of its own
    held = np.sort(np.array(drawn, dtype=np.int64))
    return np.setdiff1d(np.arange(len(source), dtype=np.int64), held, assume_unique=True), held
