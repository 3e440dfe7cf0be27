"""The run directory: which one a run writes to, and that no two runs write to the same."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from siirl.config.loader import Resolved
from siirl.config.schema import Config
from siirl.dag.graph import Graph
from siirl.dag.plan import all_plans_json
from siirl.dag.planner import plan_roles
from siirl.errors import RequestError


def choose(config: Config, given: str | Path | None, resume: bool, create: bool = True) -> Path:
    """The run's directory: the one given, the configured one, or ``runs/NAME-DATE-TIME``.

    Raises:
        RequestError: a new run would write into an old one, or there is nothing to resume.
    """
    wanted = given or config.run_dir
    if wanted is not None:
        directory = Path(wanted)
        metrics = directory / "metrics.jsonl"
        used = metrics.exists() and metrics.stat().st_size > 0
        if used and not resume and create:
            raise RequestError(
                f"{directory} holds a run already; add --resume to go on with it, or choose another --run-dir"
            )
        if resume and not directory.is_dir():
            raise RequestError(f"--resume: there is no run directory {directory}")
    elif resume:
        old = sorted(Path("runs").glob(f"{config.name}-*"), key=lambda p: p.stat().st_mtime)
        if not old:
            raise RequestError(f"--resume: there is no run of '{config.name}' under runs/; name it with --run-dir")
        directory = old[-1]
    else:
        directory = Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if create:
        directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold the directory for this run; the lock goes with the process.

    Raises:
        RequestError: another run holds it.
    """
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(
                f"another run is writing to {directory}; wait for it or choose another --run-dir"
            ) from error
        yield


def write_plans(resolved: Resolved, directory: Path, hosts: Sequence[int]) -> None:
    """Write every worker's plan, stage by stage; ``hosts`` are the numbers of the workers' hosts."""
    with (directory / "plan.json").open("w") as file:
        pipeline = json.dumps(resolved.main.pipeline)
        file.write(f'{{"workers": {len(hosts)}, "pipeline": {pipeline}, "stages": [')
        for number, stage in enumerate(resolved.stages):
            plans = plan_roles(Graph.from_yaml(stage.config.pipeline), stage.config, len(hosts), hosts)
            file.write(f'{"," if number else ""}\n{{"stage": {json.dumps(stage.name)}, "plans": ')
            file.writelines(all_plans_json(plans))
            file.write("}")
        file.write("]}\n")
