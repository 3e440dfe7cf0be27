"""``siirl report``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Write a run's report page.")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="Default: report.html in RUN_DIR.")
def report(run_dir: Path, output: Path | None) -> None:
    """Write the report of the run in RUN_DIR, finished or not: one self-contained page."""
    from siirl.telemetry.report import write_report

    click.echo(write_report(run_dir, output))
