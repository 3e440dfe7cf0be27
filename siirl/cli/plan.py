"""``siirl plan``."""

from __future__ import annotations

import json

import click

from siirl.cli.options import (
    config_argument,
    device_option,
    json_option,
    overrides_argument,
    workers_option,
)
from siirl.cli.tables import print_table

COLUMNS = ("#", "step", "op", "model", "layout", "reads → writes, or moves, or frees", "when")


@click.command(short_help="Show every worker's pipeline without running it.")
@config_argument
@overrides_argument
@device_option
@workers_option
@json_option
def plan(config: str, overrides: tuple[str, ...], device: str | None, workers: int | None, as_json: bool) -> None:
    """Show what each worker of the recipe CONFIG would run, stage by stage, and what its steps are made of.

    Needs no device: it answers for any number of workers.
    """
    from siirl.config import load
    from siirl.dag import Graph, batch_table, check_batch, describe
    from siirl.dag import plan as plan_workers
    from siirl.device.selection import backend_class

    if device not in (None, "auto"):
        backend_class(device)  # refuses an unknown name
    given = [] if workers is None else [f"workers={workers}"]
    output = []
    for stage in load(config, [*overrides, *given]).stages:
        graph = Graph.from_yaml(stage.config.pipeline)
        count = stage.config.workers
        check_batch(stage.config, count, graph)
        plans = plan_workers(graph, stage.config, count)
        sizes = batch_table(stage.config, count, graph)
        if as_json:
            output.append({"name": stage.name, "batch": list(sizes.rows), "plans": [p.to_dict() for p in plans]})
            continue
        print_table(f"{stage.name}: {sizes.title}", sizes.columns, sizes.rows)
        for table in describe(plans):
            rows = [_narrow(dict(zip(table.columns, row, strict=True))) for row in table.rows]
            print_table(table.title, COLUMNS, rows)
    if as_json:
        click.echo(json.dumps({"stages": output}, indent=2))


def _narrow(row: dict[str, str]) -> tuple[str, ...]:
    """A row of `describe` with what it reads, writes, moves and frees in one column, to fit a terminal."""
    step, op = (row["op"], "") if row["op"] in ("redistribute", "drop") else (row["step"], row["op"])
    fields = row["moves or frees"] or " → ".join(filter(None, [row["reads"], row["writes"]]))
    return row["#"], step, op if op != step else "", row["model"], row["layout"], fields, row["when"]
