"""``siirl validate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from siirl.cli.options import device_option
from siirl.errors import RequestError, ValidationError

if TYPE_CHECKING:
    from siirl.validation.report import Result


@click.command(short_help="Check on a device what the framework promises of it.")
@device_option
@click.option(
    "--level",
    type=click.Choice(["smoke", "full"]),
    default="smoke",
    show_default=True,
    help="smoke: under a minute on two cores; full: every case.",
)
@click.option(
    "--report",
    "report_dir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write report.json, report.html and junit.xml there.",
)
@click.option("--only", metavar="PATTERN", multiple=True, help="Check ids to ask, such as 'L2.*'; may be repeated.")
@click.option(
    "--compare",
    metavar="A.json B.json",
    nargs=2,
    type=click.Path(path_type=Path),
    help="Validate nothing; say what changed from one report to the other.",
)
def validate(
    device: str | None,
    level: Literal["smoke", "full"],
    report_dir: Path | None,
    only: tuple[str, ...],
    compare: tuple[Path, Path] | None,
) -> None:
    """Check the device: hygiene, semantics, kernels, collectives, rollout, and a run from end to end.

    The exit status is 4 when a promise does not hold, or when the second report fails where the first did not.

    \b
    For example:
      siirl validate --device cpu --level full --report reports/cpu
      siirl validate --compare reports/cpu/report.json reports/other/report.json
    """
    if compare is not None:
        _compare(*compare)
        return
    from siirl.validation.run import run
    from siirl.validation.tables import print_report

    report = run(device, level, report_dir, only, _progress)
    click.echo("\r" + " " * 79 + "\r", nl=False, err=True)
    print_report(report)
    if report_dir is not None:
        click.echo(f"report: {report_dir / 'report.html'}")
    if report.failures:
        raise ValidationError(report.verdict())
    click.echo(report.verdict())


def _progress(result: Result) -> None:
    """One line on a terminal that each result overwrites."""
    if sys.stderr.isatty():
        click.echo(f"\r{result.status} {result.id}"[:79].ljust(80), nl=False, err=True)


def _compare(first: Path, second: Path) -> None:
    from siirl.validation.compare import compare
    from siirl.validation.report import read_report

    if not first.is_file() or not second.is_file():
        raise RequestError(f"{second if first.is_file() else first} is no file; name two report.json files")
    found = compare(read_report(first), read_report(second))
    for line in found.lines or ("nothing changed",):
        click.echo(line)
    if found.regressions:
        worst = found.regressions[0]
        raise ValidationError(
            f"{second} breaks {len(found.regressions)} promises that {first} keeps, the first: "
            f"{worst.title} ({worst.id}): {worst.sentence}"
        )
