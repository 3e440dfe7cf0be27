"""``siirl train``."""

from __future__ import annotations

from pathlib import Path

import click

from siirl.cli.options import config_argument, device_option, overrides_argument, workers_option


@click.command(short_help="Run a recipe.")
@config_argument
@overrides_argument
@device_option
@workers_option
@click.option("--run-dir", metavar="DIR", type=click.Path(path_type=Path), help="Where to write; overrides `run_dir`.")
@click.option("--resume", is_flag=True, help="Go on from the run directory's last checkpoint.")
@click.option(
    "--launcher",
    type=click.Choice(["local", "env", "ray"]),
    default="local",
    show_default=True,
    help="What starts the workers: this process; torchrun or Slurm, from whose environment it reads its place; Ray.",
)
def train(
    config: str,
    overrides: tuple[str, ...],
    device: str | None,
    workers: int | None,
    run_dir: Path | None,
    resume: bool,
    launcher: str,
) -> None:
    """Run the recipe CONFIG, a YAML file or the name of a shipped one, with its keys changed by KEY=VALUE.

    \b
    For example:
      siirl train quickstart rollout.group_size=16 --run-dir runs/first
    """
    from siirl.config import load
    from siirl.worker import launch

    resolved = load(config, overrides)
    launch.train(resolved, device=device, workers=workers, run_dir=run_dir, resume=resume, launcher=launcher)
