"""``siirl simulate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from siirl.cli.options import cluster_option, config_argument, json_option, lengths_options, overrides_argument
from siirl.cli.tables import print_table

if TYPE_CHECKING:
    from siirl.planning.simulate import Point

DEFAULT_WORKERS = "8,16,32,64,128,256,512,1024"
COLUMNS = ("workers", "prompts", "a step", "tokens/s", "waiting", "a step ", "tokens/s ", "it holds", "slower", "fits")


@click.command(short_help="Simulate a step on many workers, with and without a controller.")
@config_argument
@overrides_argument
@cluster_option
@click.option("--workers", metavar="N,N,…", default=DEFAULT_WORKERS, show_default=True, help="Numbers of workers.")
@click.option("--fixed-batch", is_flag=True, help="Keep data.prompts_per_step instead of the prompts a worker.")
@lengths_options
@click.option("--slow-share", metavar="P", type=click.FloatRange(0, 1), default=0.0, help="Part of slow workers.")
@click.option("--slow-factor", metavar="F", type=click.FloatRange(min=1), default=1.5, help="How slow these are: 1.5.")
@click.option("--jitter", metavar="S", type=click.FloatRange(min=0), default=0.02, help="Deviation of log times: 0.02.")
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, help="Of lengths, jitter and slow workers.")
@click.option("--plot", metavar="FILE.svg", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curves.")
@json_option
def simulate(
    config: str,
    overrides: tuple[str, ...],
    cluster: str | None,
    workers: str,
    fixed_batch: bool,
    prompt_tokens: float | None,
    response_tokens: float | None,
    spread: float | None,
    slow_share: float,
    slow_factor: float,
    jitter: float,
    seed: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Simulate a step of the recipe CONFIG's main stage event by event on numbers of workers of a cluster.

    Beside it, the same step with one process that holds the data, hands it to the workers and takes it back. The batch
    grows with the workers: as many prompts each as CONFIG has.
    """
    from siirl.config import load
    from siirl.errors import RequestError
    from siirl.planning.cluster import load_cluster
    from siirl.planning.job import Job
    from siirl.planning.simulate import Disturbance, scaled
    from siirl.planning.simulate import simulate as simulate_step
    from siirl.planning.workload import Lengths

    if cluster is None:
        raise RequestError("a simulation needs a cluster: add --cluster FILE")
    counts = _counts(workers)
    main = load(config, list(overrides)).main
    lengths = Lengths.of(main, prompt_tokens, response_tokens, spread)
    job = Job.of(main, load_cluster(cluster), main.workers, lengths)
    disturbance = Disturbance(slow_share, slow_factor, jitter)
    points = [simulate_step(scaled(job, count, fixed_batch), disturbance, seed) for count in counts]
    name = f"{job.actor.name or main.model.path} on {job.cluster.device.name}"
    if as_json:
        click.echo(
            json.dumps({"model": job.actor.name, "cluster": job.cluster.name, "seed": seed, "points": _plain(points)})
        )
    else:
        print_table(
            f"{name}: simulated step; right of 'waiting' the same with a controller", COLUMNS, _rows(points), 80
        )
    if plot is not None:
        plot.write_text(_svg(name, points))


def _counts(text: str) -> list[int]:
    from siirl.errors import RequestError

    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise RequestError(f"--workers is '{text}'; write numbers of workers with commas between: 8,64,512")
    return [int(part) for part in parts]


def _rows(points: list[Point]) -> list[list[str]]:
    return [
        [
            f"{point.workers:,}",
            f"{point.prompts:,}",
            f"{point.plan.seconds:,.3g} s",
            f"{point.plan.tokens_per_s:,.0f}",
            f"{point.plan.waiting:.0%}",
            f"{point.controller.seconds:,.3g} s",
            f"{point.controller.tokens_per_s:,.0f}",
            f"{point.controller.controller_bytes / 2**30:,.1f} GiB",
            f"{point.controller.seconds / point.plan.seconds:.2f}x",
            "" if point.fits else "no",
        ]
        for point in points
    ]


def _plain(points: list[Point]) -> list[dict[str, object]]:
    return [
        {"workers": p.workers, "prompts": p.prompts, "fits": p.fits}
        | {
            side: vars(run) | {"tokens_per_s": run.tokens_per_s}
            for side, run in (("plan", p.plan), ("controller", p.controller))
        }
        for p in points
    ]


def _svg(name: str, points: list[Point]) -> str:
    from siirl.planning.plot import Curve, Panel, svg

    workers = [point.workers for point in points]
    first = points[0].plan.tokens_per_s / points[0].workers
    throughput = (
        Curve("siirl", workers, [point.plan.tokens_per_s for point in points]),
        Curve("with a controller", workers, [point.controller.tokens_per_s for point in points]),
        Curve("proportional", workers, [first * count for count in workers], dashed=True),
    )
    memory = (Curve("controller", workers, [point.controller.controller_bytes / 2**30 for point in points]),)
    return svg(name, (Panel("tokens/s", throughput), Panel("GiB the controller holds", memory)))
