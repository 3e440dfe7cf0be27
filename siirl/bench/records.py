"""Recorded runs: files of pytest-benchmark's JSON, named by their keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siirl.bench.key import COUNTERS_NEED, TIMES_NEED, Key
from siirl.errors import RequestError

Document = dict[str, Any]


def read(path: Path) -> Document:
    """A record.

    Raises:
        RequestError: there is no such file, or it is none of `siirl bench`.
    """
    if not path.is_file():
        raise RequestError(f"there is no file {path}; `siirl bench --json FILE` writes one")
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise RequestError(f"{path} is not JSON ({error})") from None
    if not isinstance(document, dict) or "key" not in document.get("siirl", {}):
        raise RequestError(f"{path} was not written by `siirl bench --json`: it has no key")
    return document


def nearest(directory: Path, key: Key) -> Path | None:
    """The record of a directory to compare a run of this key with.

    The newest of those whose times mean the same; else the newest of those whose counters do; else none.
    """
    found = []
    for path in sorted(directory.glob(f"{key.backend}_*.json")):
        document = read(path)
        there = Key(**document["siirl"]["key"])
        if not key.differences(there, COUNTERS_NEED):
            found.append((not key.differences(there, TIMES_NEED), document["datetime"], path))
    return max(found)[2] if found else None


def write(document: Mapping[str, Any], target: Path) -> Path:
    """Write a record to a file, or into a directory under the name of its key; the file."""
    if target.is_dir():
        target = target / Key(**document["siirl"]["key"]).file_name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=1) + "\n")
    return target
