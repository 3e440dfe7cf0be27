"""The outcome of a run, as data: `report.json`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from siirl.errors import RequestError
from siirl.validation.checks import LEVELS, TITLES, Level
from siirl.validation.subject import Measurement

SCHEMA = 1
Status = Literal["passed", "failed", "expected", "skipped"]


@dataclass(frozen=True)
class Result:
    """One check's outcome; `sentence` says what was seen where the promise does not hold, or why nothing was asked."""

    id: str
    level: Level
    title: str
    status: Status
    sentence: str
    seconds: float
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True)
class Report:
    """A run: what was validated, in which surroundings, and every result."""

    device: str
    depth: str
    started: str  # ISO 8601, UTC
    seconds: float
    versions: dict[str, str]
    facts: dict[str, Any]  # the back end's capabilities
    kernels: dict[str, Any]  # provider by op, and the table's hash
    results: tuple[Result, ...]
    schema: int = field(default=SCHEMA)

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if result.status == "failed"]

    def counts(self, level: Level | None = None) -> Counter[str]:
        """Number of results by status."""
        return Counter(result.status for result in self.results if level in (None, result.level))

    def levels(self) -> list[Level]:
        return [level for level in LEVELS if self.counts(level)]

    def verdict(self) -> str:
        """One line: the promises kept, or the first that broke."""
        counts = self.counts()
        asked = counts["passed"] + counts["expected"] + counts["failed"]
        known = f" ({counts['expected']} known to differ)" if counts["expected"] else ""
        if not self.failures:
            return f"device '{self.device}' keeps {counts['passed']} of {asked} promises{known}"
        first = self.failures[0]
        more = f", the first of {len(self.failures)} that broke" if len(self.failures) > 1 else ""
        return (
            f"device '{self.device}' breaks a promise of {first.level}, {TITLES[first.level]}{more}: "
            f"{first.title} ({first.id}): {first.sentence}"
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=True) + "\n"


def read_report(path: Path) -> Report:
    """Read a `report.json`.

    Raises:
        RequestError: there is no such file, or it is none of a validation run's.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        results = tuple(
            Result(**{**r, "measurements": tuple(Measurement(**m) for m in r["measurements"])})
            for r in data.pop("results")
        )
        report = Report(**data, results=results)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RequestError(f"{path} is no report of `siirl validate` ({error})") from None
    if report.schema != SCHEMA:
        raise RequestError(f"{path} has schema {report.schema}, this version reads {SCHEMA}")
    return report
