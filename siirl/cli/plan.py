"""``siirl plan``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from siirl.cli.options import (
    cluster_option,
    config_argument,
    device_option,
    json_option,
    lengths_options,
    overrides_argument,
    workers_option,
)
from siirl.cli.tables import print_table

if TYPE_CHECKING:
    from siirl.config import Stage
    from siirl.planning.cluster import Cluster
    from siirl.planning.estimate import Estimate
    from siirl.planning.search import Candidate

FITTING = 80
COLUMNS = ("#", "step", "op", "model", "layout", "reads → writes, or moves, or frees", "when")


@click.command(short_help="Show every worker's pipeline without running it.")
@config_argument
@overrides_argument
@device_option
@workers_option
@cluster_option
@lengths_options
@click.option("--search", is_flag=True, help="Find the best layout on the cluster; needs --cluster.")
@json_option
def plan(
    config: str,
    overrides: tuple[str, ...],
    device: str | None,
    workers: int | None,
    cluster: str | None,
    prompt_tokens: float | None,
    response_tokens: float | None,
    spread: float | None,
    search: bool,
    as_json: bool,
) -> None:
    """Show what each worker of the recipe CONFIG would run, stage by stage, and what its steps are made of.

    Needs no device: it answers for any number of workers. With --cluster it estimates the memory of a worker by term,
    the bytes through each redistribution and the time of each step, and refuses what does not fit.
    """
    from siirl.config import load
    from siirl.device.selection import backend_class
    from siirl.errors import RequestError
    from siirl.planning.cluster import load_cluster

    if device not in (None, "auto"):
        backend_class(device)  # refuses an unknown name
    if search and cluster is None:
        raise RequestError("--search needs a cluster: add --cluster FILE")
    place = None if cluster is None else load_cluster(cluster)
    given = [] if workers is None else [f"workers={workers}"]
    lengths = {"prompt": prompt_tokens, "response": response_tokens, "spread": spread}
    stages = load(config, [*overrides, *given]).stages
    problems = []
    if as_json:
        click.echo('{"stages": [', nl=False)
    for number, stage in enumerate(stages):
        found = None if place is None else _found(stage, place, lengths, search)
        if as_json:
            hosts = None if place is None else place.hosts(stage.config.workers)
            _print_json(stage, found, hosts, number)
        elif found is None:
            _print_plan(stage)
        else:
            _print_found(stage, found)
        problems += [] if found is None or found.problem is None else [found.problem]
    if as_json:
        click.echo("]}")
    if problems:
        raise RequestError(problems[-1])


@dataclass(frozen=True)
class _Found:
    """What is known of a stage on a cluster: an estimate, or the layouts that fit; and what does not."""

    estimate: Estimate | None
    candidates: list[Candidate]
    problem: str | None


def _found(stage: Stage, cluster: Cluster, given: dict[str, float | None], search: bool) -> _Found:
    from siirl.planning.estimate import estimate
    from siirl.planning.job import Job
    from siirl.planning.search import advice
    from siirl.planning.search import search as search_layouts
    from siirl.planning.workload import Lengths

    config, workers = stage.config, stage.config.workers
    lengths = Lengths.of(config, **given)
    if search:
        candidates = search_layouts(config, cluster, workers, lengths)
        none = None if candidates else f"{stage.name}: {advice(config, cluster, workers, lengths)}"
        return _Found(None, candidates, none)
    found = estimate(Job.of(config, cluster, workers, lengths))
    problem = found.problem()
    if problem is not None:
        problem = f"{stage.name} does not fit: {problem}; {advice(config, cluster, workers, lengths)}"
    return _Found(found, [], problem)


def _print_found(stage: Stage, found: _Found) -> None:
    from siirl.planning.estimate import tables, title
    from siirl.planning.search import table

    shown = found.estimate or (found.candidates[0].estimate if found.candidates else None)
    if shown is None:
        return
    click.echo(f"{stage.name}: {title(shown)}\n")
    if found.candidates:
        best = table(found.candidates)
        print_table(best.title, best.columns, best.rows, width=FITTING)
    for part in tables(shown):
        print_table(part.title, part.columns, part.rows, width=FITTING)


def _print_plan(stage: Stage) -> None:
    from siirl.dag import Graph, batch_table, check_batch, describe_all, left_out, plan_roles
    from siirl.planning.models import check_degrees

    graph, count = Graph.from_yaml(stage.config.pipeline), stage.config.workers
    check_batch(stage.config, count, graph)
    check_degrees(stage.config)
    sizes = batch_table(stage.config, count, graph)
    print_table(f"{stage.name}: {sizes.title}", sizes.columns, sizes.rows)
    for plan, ranks in plan_roles(graph, stage.config, count):
        table = describe_all(plan, ranks)
        rows = [_narrow(dict(zip(table.columns, row, strict=True))) for row in table.rows]
        print_table(table.title, COLUMNS, rows)
    absent = left_out(graph, stage.config)
    if absent.rows:
        print_table(absent.title, absent.columns, absent.rows)


def _print_json(stage: Stage, found: _Found | None, hosts: list[int] | None, number: int) -> None:
    """Write one stage of the list; the plans one by one, for there may be thousands."""
    from siirl.dag import Graph, all_plans_json, batch_table, check_batch, left_out, plan_roles
    from siirl.planning.models import check_degrees

    graph, count = Graph.from_yaml(stage.config.pipeline), stage.config.workers
    check_batch(stage.config, count, graph)
    check_degrees(stage.config)
    described: dict[str, Any] = {"name": stage.name, "batch": list(batch_table(stage.config, count, graph).rows)}
    described["left_out"] = {row[0]: row[-1] for row in left_out(graph, stage.config).rows}
    if found is not None and found.estimate is not None:
        described["estimate"] = found.estimate.to_dict()
    elif found is not None:
        described["layouts"] = [
            {"keys": candidate.overrides, "estimate": candidate.estimate.to_dict()} for candidate in found.candidates
        ]
    click.echo(f'{"," if number else ""}\n{json.dumps(described)[:-1]}, "plans": ', nl=False)
    for piece in all_plans_json(plan_roles(graph, stage.config, count, hosts)):
        click.echo(piece, nl=False)
    click.echo("}", nl=False)


def _narrow(row: dict[str, str]) -> tuple[str, ...]:
    """A row of `describe` with what it reads, writes, moves and frees in one column, to fit a terminal."""
    step, op = (row["op"], row["by"]) if row["op"] in ("redistribute", "drop") else (row["step"], row["op"])
    fields = row["moves or frees"] or " → ".join(filter(None, [row["reads"], row["writes"]]))
    return row["#"], step, op if op != step else "", row["model"], row["layout"], fields, row["when"]
