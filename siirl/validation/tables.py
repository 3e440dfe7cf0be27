"""What the terminal shows of a run: one line a level, the failures in words, no line wider than 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from siirl.validation.checks import TITLES
from siirl.validation.report import Report, Result

WIDTH = 80
_COLUMNS = ("passed", "failed", "expected", "skipped")


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the outcome of a run."""
    console = console or Console(width=WIDTH, highlight=False, soft_wrap=False)
    console.print(_levels(report))
    for result in report.results:
        if result.status in ("failed", "expected"):
            for line in _described(result):
                console.print(Text(line))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    console.print(Text(textwrap.fill(f"kernels {report.kernels['hash']}; {versions}", WIDTH)))


def _levels(report: Report) -> Table:
    title = f"validate {report.device}, {report.depth}: {report.facts.get('device_name', '')}"
    table = Table(
        title=Text(textwrap.shorten(title, WIDTH, placeholder=" …")), title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("level", no_wrap=True)
    for column in (*_COLUMNS, "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for level in report.levels():
        counts = report.counts(level)
        seconds = sum(result.seconds for result in report.results if result.level == level)
        numbers = [str(counts[column]) if counts[column] else "·" for column in _COLUMNS]
        style = "red" if counts["failed"] else ""
        table.add_row(f"{level} {TITLES[level]}", *numbers, f"{seconds:.1f}", style=style)
    return table


def _described(result: Result) -> Iterator[str]:
    yield from textwrap.wrap(f"{result.status}: {result.id}", WIDTH)
    for text in (result.title, result.sentence):
        yield from textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")
