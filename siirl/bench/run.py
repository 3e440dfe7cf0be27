"""A run of ``siirl bench``: measure, compare, measure what looks slower once more, tell."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siirl.bench import records, session
from siirl.bench.compare import Comparison, compare
from siirl.bench.key import Key
from siirl.bench.measure import Effort
from siirl.bench.table import HEADER
from siirl.device.backend import Backend
from siirl.errors import ValidationError
from siirl_kernels import bind

# What looks slower is measured again with so many times the pairs, so often at most. It counts as slower only if it
# is every time: a neighbour on the machine, or where its memory came to lie, can make it so once.
RETRY_FACTOR = 3
RETRIES = 2


@dataclass(frozen=True)
class Request:
    """What to run.

    Attributes:
        suites: their names.
        only: of their benchmarks those whose name contains one of these texts; empty: all.
        json: file, or directory, to write to.
        compare: record, or directory of records, to compare with.
        tolerance: by which share a ratio or a time may grow.
        pairs: rounds of each side; None: as each benchmark asks.
    """

    suites: Sequence[str]
    only: Sequence[str] = ()
    json: Path | None = None
    compare: Path | None = None
    tolerance: float = 0.10
    pairs: int | None = None

    def wants(self, benchmark: Mapping[str, Any]) -> bool:
        """Whether the benchmark is one of those asked for."""
        return benchmark["group"] in self.suites and self.wants_name(benchmark["name"])

    def wants_name(self, name: str) -> bool:
        return not self.only or any(text in name for text in self.only)


def run(request: Request, backend: Backend, echo: Callable[[str], None]) -> None:
    """Carry out a request on a loaded back end.

    Raises:
        RequestError: the record to compare with cannot be read.
        ValidationError: something is worse than in the record.
    """
    record = _record(request.compare)
    make_ready(backend)
    echo(HEADER)
    effort = Effort(request.pairs)
    document = session.run([f"{suite}.py" for suite in request.suites], backend, echo, effort, request.wants_name)
    echo("")
    record = record or _record_like(document, request.compare, echo)
    comparison = record and _compare(document, record, request, backend, echo)
    if request.json is not None:
        echo(f"written: {records.write(document, request.json)}")
    if comparison and record:
        _tell(comparison, record.path, request.tolerance, echo)


def make_ready(backend: Backend, local_rank: int = 0) -> Backend:
    """Set up this process as a run's worker does, on one thread: other cores may be busy, and differ in number."""
    backend.bind(local_rank, threads=1)
    backend.deterministic("on")
    backend.seed(0)
    bind(backend.kernel_order())
    return backend


@dataclass(frozen=True)
class _Record:
    path: Path
    document: records.Document


def _record(given: Path | None) -> _Record | None:
    """The record named, before anything is measured."""
    return None if given is None or given.is_dir() else _Record(given, records.read(given))


def _record_like(document: records.Document, given: Path | None, echo: Callable[[str], None]) -> _Record | None:
    """The record of a directory that the run can be compared with."""
    if given is None:
        return None
    key = Key(**document["siirl"]["key"])
    if (path := records.nearest(given, key)) is None:
        echo(f"{given} has no record of {key.backend} with PyTorch {key.torch_release}: nothing is compared")
        return None
    return _Record(path, records.read(path))


def _compare(
    document: records.Document, record: _Record, request: Request, backend: Backend, echo: Callable[[str], None]
) -> Comparison:
    """Compare with the record; what looks slower is measured again, and replaced in the document, first."""
    comparison = compare(document, record.document, request.tolerance, request.wants)
    for _ in range(RETRIES):
        if not comparison.suspects:
            break
        _measure_again(document, comparison.suspects, backend, echo, Effort(request.pairs, RETRY_FACTOR))
        comparison = compare(document, record.document, request.tolerance, request.wants)
    return comparison


def _measure_again(
    document: records.Document, names: Sequence[str], backend: Backend, echo: Callable[[str], None], effort: Effort
) -> None:
    """Replace these benchmarks of the document by new measurements with more pairs."""
    echo(f"{len(names)} of the times look slower, and are measured again with {effort.factor} times the pairs:")
    nodes = [b["extra_info"]["node"] for b in document["benchmarks"] if b["fullname"] in names]
    again = session.run(nodes, backend, echo, effort)
    echo("")
    new = {benchmark["fullname"]: benchmark for benchmark in again["benchmarks"]}
    document["benchmarks"] = [new.get(b["fullname"], b) for b in document["benchmarks"]]


def _tell(comparison: Comparison, record: Path, tolerance: float, echo: Callable[[str], None]) -> None:
    def say(text: str) -> None:
        echo(textwrap.fill(text, 80, subsequent_indent="  ", break_on_hyphens=False))

    for note in comparison.notes:
        say(f"{record.name}: {note}")
    if comparison.new:
        say(f"new, compared with nothing: {', '.join(comparison.new)}")
    if comparison.crowded:
        say(f"{comparison.crowded} benchmarks have more workers than cores: counters were compared, and no times")
    if comparison.unjudged:
        say(
            f"{comparison.unjudged} references ran at another speed than in the record: the machine changed, so of "
            "these benchmarks ratios were compared, and no times"
        )
    regressions = comparison.regressions
    for sentence in regressions:
        say(f"REGRESSION {sentence}")
    if regressions:
        many = "1 regression" if len(regressions) == 1 else f"{len(regressions)} regressions"
        raise ValidationError(f"{many} against {record}: {regressions[0]}")
    if comparison.compared:
        say(f"{comparison.compared} benchmarks compared with {record}: counters equal, times within {tolerance:.0%}")
