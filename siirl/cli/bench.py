"""``siirl bench``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from siirl.bench import SUITES
from siirl.cli.options import device_option
from siirl.errors import RequestError, did_you_mean

_LIST = "\n".join(f"  {name:<13} {text}" for name, text in SUITES.items())
_HELP = f"""Measure SUITEs, all of them when none is named, each against a reference that runs in turns with it.

\b
{_LIST}

What is counted (calls of operators, collectives, memory) has to equal the record given by --compare exactly. Times are
compared as ratios to the reference, and as such where the device, the driver and the versions are the record's.
"""


@click.command(short_help="Measure speed and work, and compare them with a record.", help=_HELP)
@click.argument("suites", metavar="[SUITE ...]", nargs=-1)
@device_option
@click.option("--json", "json_path", metavar="FILE", type=click.Path(path_type=Path), help="Write all numbers there.")
@click.option("--compare", metavar="FILE", type=click.Path(path_type=Path), help="A file that --json has written.")
@click.option(
    "--tolerance",
    metavar="SHARE",
    type=click.FloatRange(min=0, min_open=True),
    default=0.10,
    show_default=True,
    help="By how much a ratio or a time may grow.",
)
@click.option("--pairs", metavar="N", type=click.IntRange(min=1), help="Rounds of each side; default: 20 to 60.")
@click.option("--only", metavar="TEXT", multiple=True, help="Leave out benchmarks without TEXT in their names.")
def bench(
    suites: tuple[str, ...],
    device: str | None,
    json_path: Path | None,
    compare: Path | None,
    tolerance: float,
    pairs: int | None,
    only: tuple[str, ...],
) -> None:
    from siirl.device import resolve, select

    for name in suites:
        if name not in SUITES:
            hint = did_you_mean(name, SUITES) or f"; there are {', '.join(SUITES)}"
            raise RequestError(f"unknown suite '{name}'{hint}")
    if compare is not None and not compare.exists():
        raise RequestError(f"--compare: there is no file {compare}; --json writes one")
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise RequestError("siirl bench needs pytest-benchmark: pip install 'siirl[bench]'")
    resolve(device)
    backend = select(device)
    # Whatever can be refused without PyTorch is refused by now.
    from siirl.bench.run import Request, run

    chosen = [name for name in SUITES if not suites or name in suites]
    run(Request(chosen, only, json_path, compare, tolerance, pairs), backend, click.echo)
