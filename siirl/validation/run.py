"""A conformance run: every check of a level of depth, one after another, and the reports."""

from __future__ import annotations

import fnmatch
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from siirl import __version__
from siirl.device import select
from siirl.device.backend import Backend
from siirl.errors import RequestError
from siirl.validation.checks import Broken, Check, NotApplicable, all_checks
from siirl.validation.expected import ExpectedFailure, judge, read_expected
from siirl.validation.report import Report, Result
from siirl.validation.subject import Depth, Subject
from siirl.validation.world import Setup

Progress = Callable[[Result], None]


def run(
    device: str | None,
    depth: Depth = "smoke",
    report_dir: Path | None = None,
    only: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Validate a device.

    Args:
        device: a back end's name; None chooses as every verb does.
        depth: ``smoke`` takes under a minute on two cores, ``full`` asks for every case.
        report_dir: where ``report.json``, ``report.html`` and ``junit.xml`` are written; None: nowhere.
        only: patterns of check ids, such as ``L2.*``; empty: all.
        progress: told of each result.

    Raises:
        DeviceError: the device is not usable here.
        RequestError: a pattern matches no check, or the file of expected failures is wrong.
    """
    if report_dir is not None:
        report_dir.mkdir(parents=True, exist_ok=True)
    with prepared(select(device, role="validation"), depth) as subject:
        report = validate(subject, only, progress)
    if report_dir is not None:
        from siirl.validation.junit import write_junit
        from siirl.validation.page import write_page

        (report_dir / "report.json").write_text(report.to_json(), encoding="utf-8")
        write_junit(report, report_dir / "junit.xml")
        write_page(report, report_dir / "report.html")
    return report


@contextmanager
def prepared(backend: Backend, depth: Depth, setup: Setup | None = None) -> Iterator[Subject]:
    """Bind a back end to its first device and its kernels; a subject for checks, until the block ends."""
    from siirl_kernels import bind

    backend.bind(0)
    backend.seed(0)
    bind(backend.kernel_order())
    with tempfile.TemporaryDirectory(prefix="siirl-validate-") as scratch:
        subject = Subject(backend, depth, Path(scratch), setup)
        try:
            yield subject
        finally:
            subject.close()


def validate(subject: Subject, only: Sequence[str] = (), progress: Progress | None = None) -> Report:
    """Ask every check, and describe what was asked."""
    began, started = datetime.now(UTC), time.perf_counter()
    expected = read_expected(subject.backend.expected_failures())
    results = []
    for check, check_id, values in chosen(subject, only):
        results.append(run_check(subject, check, check_id, values, expected))
        if progress is not None:
            progress(results[-1])
    if not results:
        raise RequestError(f"no check of a {subject.depth} run is called {' or '.join(only)}")
    return Report(
        device=subject.backend.name,
        depth=subject.depth,
        started=began.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
        versions=_versions(subject.backend),
        facts=subject.backend.capabilities().to_dict(),
        kernels=_kernels(),
        results=tuple(results),
    )


def chosen(subject: Subject, only: Sequence[str] = ()) -> Iterator[tuple[Check, str, tuple[Any, ...]]]:
    """The checks of the subject's depth, with their ids and values."""
    for check in all_checks():
        if check.full and subject.depth == "smoke":
            continue
        for check_id, values in check.expand(subject):
            names = (check_id, check_id.partition("[")[0])
            if not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only for name in names):
                yield check, check_id, values


def run_check(
    subject: Subject, check: Check, check_id: str, values: tuple[Any, ...], expected: Sequence[ExpectedFailure]
) -> Result:
    """Ask one check. Whatever it raises is a promise that does not hold: a device may fail in any way."""
    subject.measurements = []
    started = time.perf_counter()
    broken: str | None = None
    skipped: str | None = None
    try:
        check.function(subject, *values)
    except NotApplicable as reason:
        skipped = str(reason)
    except Broken as seen:
        broken = str(seen)
    except Exception as error:
        broken = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - started
    if skipped is not None:
        status, sentence = "skipped", skipped
    else:
        status, sentence = judge(check_id, broken and " ".join(broken.split()), expected, datetime.now(UTC).date())
    return Result(check_id, check.level, check.title, status, sentence, seconds, tuple(subject.measurements))  # type: ignore[arg-type]


def _versions(backend: Backend) -> dict[str, str]:
    return {"siirl": __version__, "python": platform.python_version(), **backend.probe().versions}


def _kernels() -> dict[str, Any]:
    from siirl_kernels import resolved, table_hash

    return {"bound": resolved(), "hash": table_hash()}
