"""Arguments and options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

config_argument: Decorator = click.argument("config", metavar="CONFIG")
overrides_argument: Decorator = click.argument("overrides", metavar="[KEY=VALUE ...]", nargs=-1)
device_option: Decorator = click.option(
    "--device", metavar="D", help="Where to run: auto (the best there is), cpu, or another that `siirl doctor` lists."
)
workers_option: Decorator = click.option(
    "--workers", metavar="N", type=click.IntRange(min=1), help="Number of worker processes; overrides `workers`."
)
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
cluster_option: Decorator = click.option(
    "--cluster", metavar="FILE", help="A cluster: a file, or the name of one in configs/clusters."
)


def lengths_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How long prompts and responses are expected to be: ``prompt_tokens``, ``response_tokens``, ``spread``."""
    for option in (
        click.option("--spread", metavar="S", type=click.FloatRange(min=0), help="Deviation of log response lengths."),
        click.option(
            "--response-tokens", metavar="N", type=click.FloatRange(min=1), help="Mean response; default: half of most."
        ),
        click.option(
            "--prompt-tokens", metavar="N", type=click.FloatRange(min=1), help="Mean prompt; default: half of most."
        ),
    ):
        command = option(command)
    return command
