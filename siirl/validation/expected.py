"""What a vendor knows to fail: a TOML file beside its back end, strict and with a date on every entry.

[[expected]]
check = "L3.library[all_reduce-bool]"        # one case, or without brackets every case
reason = "the library rounds booleans"
url = "https://example.org/issues/17"
expires = 2030-01-31
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from siirl.errors import RequestError

_KEYS = {"check": str, "reason": str, "url": str, "expires": date}


@dataclass(frozen=True)
class ExpectedFailure:
    check: str
    reason: str
    url: str
    expires: date

    def covers(self, check_id: str) -> bool:
        return self.check in (check_id, check_id.partition("[")[0])


def read_expected(path: Path | None) -> list[ExpectedFailure]:
    """The entries of a file; none where there is no file.

    Raises:
        RequestError: the file is no TOML, or an entry lacks a key, has one too many, or one of another type.
    """
    if path is None:
        return []
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{path} is not TOML: {error}") from None
    if content.keys() - {"expected"}:
        raise RequestError(f"{path} has tables [[expected]] alone, not '{min(content.keys() - {'expected'})}'")
    return [_entry(path, number, entry) for number, entry in enumerate(content.get("expected", []), start=1)]


def _entry(path: Path, number: int, entry: dict[str, object]) -> ExpectedFailure:
    for key, kind in _KEYS.items():
        if not isinstance(entry.get(key), kind):
            raise RequestError(f"{path}, entry {number}: '{key}' is missing, or no {kind.__name__}")
    if unknown := entry.keys() - _KEYS.keys():
        raise RequestError(f"{path}, entry {number}: unknown key '{min(unknown)}'")
    return ExpectedFailure(**entry)  # type: ignore[arg-type]  # the types were just looked at


def judge(check_id: str, broken: str | None, expected: Sequence[ExpectedFailure], today: date) -> tuple[str, str]:
    """The status of a check that ended, and a sentence: what it saw, or what the entry says of it.

    Args:
        broken: what the check saw; None where the promise holds.
    """
    entry = next((e for e in expected if e.covers(check_id)), None)
    if entry is None:
        return ("passed", "") if broken is None else ("failed", broken)
    if broken is None:
        return "failed", f"passes, but is expected to fail ({entry.reason}): remove the entry"
    if entry.expires < today:
        return "failed", f"its expected failure ({entry.reason}, {entry.url}) expired on {entry.expires}: {broken}"
    return "expected", f"{entry.reason} ({entry.url}, until {entry.expires}): {broken}"
