"""JSON Lines files that outlive a killed writer: whole lines only, one write a line, atomic rewrites."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from siirl.errors import SiirlError


def encode_line(record: Mapping[str, Any]) -> bytes:
    """Encode one line with its end. Floats are written as `repr` writes them, so they round-trip."""
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines with their ends; a last line that a killed writer left half-written is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line
            elif _is_json(line):
                yield line + b"\n"


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the file's records; a missing file has none. NaN and infinities, which are not JSON, read as None.

    Raises:
        SiirlError: a line other than a half-written last one is not JSON.
    """
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            yield json.loads(line, parse_constant=lambda name: None)
        except ValueError as error:
            raise SiirlError(f"{path}, line {number}, is not JSON ({error}); remove that line to go on") from error


def open_for_append(path: Path) -> BinaryIO:
    """Open, unbuffered, to append whole lines; what a killed writer left half-written is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _ends_within_a_line(path):
        rewrite(path, whole_lines(path))
    return path.open("ab", buffering=0)


def rewrite(path: Path, lines: Iterable[bytes]) -> None:
    """Replace the file by these lines; a kill at any moment leaves either the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _ends_within_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
