"""Launching a run: everything that can be refused is refused here, then the workers start.

``local`` starts one process per worker on this machine (one worker runs in this very process), ``env`` is one worker
of a run that torchrun or Slurm started, ``ray`` has the workers started on the nodes of a Ray cluster.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from siirl.algorithms.registry import check_names
from siirl.config.loader import Resolved, Stage, dump
from siirl.config.schema import Config
from siirl.dag.graph import Graph
from siirl.dag.plan import Table, batch_table, check_batch
from siirl.dag.planner import plan_steps
from siirl.data.sources import open_source, split
from siirl.device import resolve, select
from siirl.device.backend import Backend
from siirl.errors import RequestError, SiirlError
from siirl.model.paths import check_path
from siirl.planning.models import check_degrees
from siirl.rewards.registry import choose
from siirl.rewards.registry import resolve as resolve_reward
from siirl.telemetry.display import ProgressDisplay
from siirl.telemetry.metrics import read_metrics
from siirl.telemetry.report import write_report
from siirl.telemetry.trace import merge_traces
from siirl.worker import run_dir as directories
from siirl.worker.place import Place, meet_under_slurm
from siirl.worker.processes import Stopped, device_role, run_processes, worker_log

Run = Callable[[Path, Config, Backend, bool], None]
"""(run directory, main stage's configuration, back end, whether to resume): runs the workers to their end."""


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory, its metrics as in ``metrics.jsonl``, its report."""

    dir: Path
    metrics: list[dict[str, Any]]
    report: Path | None


def train(
    resolved: Resolved,
    *,
    device: str | None = None,
    workers: int | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    launcher: str = "local",
    stream: TextIO | None = None,
) -> RunResult:
    """Run a recipe to its end.

    Args:
        resolved: the configuration of all stages.
        device, workers, run_dir: override the configuration's.
        resume: go on from the newest checkpoint of the run directory (the newest of this name when none is given).
        launcher: ``local``, ``env`` or ``ray``.
        stream: where progress is shown; standard output when absent.

    Raises:
        RequestError: something in the request cannot work.
        DeviceError: the device is not usable.
        Stopped: SIGTERM or SIGINT ended the run, after a checkpoint.
        SiirlError: a worker failed.
    """
    resolved, stream = _with(resolved, device, workers), stream or sys.stdout
    if launcher == "ray":
        return _train_ray(resolved, device, run_dir, resume, stream)
    backend = resolve(device, resolved.main.device)
    if launcher == "env":
        return _train_env(resolved, backend, run_dir, resume, stream)
    check(resolved)
    run = partial(_run_here, resolved, Place(0, 1, 0, 1)) if resolved.main.workers == 1 else run_processes
    return _finish(resolved, backend, run_dir, resume, stream, run)


def check(resolved: Resolved) -> None:
    """Refuse what cannot work, before any process starts."""
    check_path(resolved.main.model.path)
    for stage in resolved.stages:
        config = stage.config
        for key in ("reference", "critic"):
            if (other := getattr(config.model, key)) is not None:
                check_path(other, key=f"model.{key}")
        graph = Graph.from_yaml(config.pipeline)
        check_batch(config, config.workers, graph)
        check_degrees(config)
        if config.training.parallel != resolved.main.training.parallel:
            raise RequestError(f"{stage.name} trains with other degrees than main; leave out its training.parallel")
        plan_steps(graph, config, config.workers)
        split(open_source(config.data.source, config=config.data, seed=config.seed), config.data.held_out, config.seed)
        check_names(config.algorithm)
        if ":" not in config.reward.function:
            resolve_reward(choose(config.reward.function, None), config.reward.params)
        _check_engines(stage)
        _check_optimizer(config)


def _check_engines(stage: Stage) -> None:
    config = stage.config
    if config.rollout.engine == "vllm":
        _check_vllm(config)
    if config.training.engine != "fsdp":
        raise RequestError(f"training.engine is '{config.training.engine}', which is not installed; use fsdp")
    rollout, key = config.rollout, "rollout.batch_invariant"
    if rollout.batch_invariant and (rollout.engine, config.training.dtype) != ("native", "float32"):
        raise RequestError(f"{key} needs rollout.engine=native and training.dtype=float32; set {key}=false")
    if rollout.batch_invariant and config.training.compile:
        raise RequestError(f"{key} cannot hold where training is compiled; set training.compile=false or {key}=false")
    if rollout.min_new_tokens > rollout.max_new_tokens:
        raise RequestError(
            f"rollout.min_new_tokens is {rollout.min_new_tokens}, more than rollout.max_new_tokens, which is "
            f"{rollout.max_new_tokens}"
        )


def _check_optimizer(config: Config) -> None:
    if config.training.optimizer != "adamw8bit":
        return
    if importlib.util.find_spec("torchao") is None:
        raise RequestError(
            "training.optimizer is 'adamw8bit', which needs torchao, and that is not installed: "
            "pip install 'siirl[adamw8bit]', or set training.optimizer=adamw"
        )
    if config.training.sharding == "shard":
        raise RequestError(
            "training.optimizer is 'adamw8bit', whose states cannot be saved in shards; set training.optimizer=adamw, "
            "or training.sharding=replicate"
        )


def _check_vllm(config: Config) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise RequestError(
            "rollout.engine is 'vllm', which is not installed: install it as docs/rollout-engines.md says, or set "
            "rollout.engine=native"
        )
    if (tensor := config.rollout.parallel.tensor) > 1:
        raise RequestError(
            f"rollout.parallel.tensor is {tensor}, but in a run every worker generates its own prompts; set "
            "rollout.parallel.tensor=1"
        )


def _with(resolved: Resolved, device: str | None, workers: int | None) -> Resolved:
    changes: dict[str, Any] = {}
    if device is not None:
        changes["device"] = device
    if workers is not None:
        changes["workers"] = workers
    stages = [Stage(stage.name, stage.config.model_copy(update=changes)) for stage in resolved.stages]
    return Resolved(resolved.path, tuple(stages))


def _print_tables(resolved: Resolved, stream: TextIO) -> None:
    for stage in resolved.stages:
        table = batch_table(stage.config, stage.config.workers, Graph.from_yaml(stage.config.pipeline))
        _print(Table(f"{stage.name} · {stage.config.pipeline}: {table.title}", table.columns, table.rows), stream)
    stream.flush()


def _print(table: Table, stream: TextIO) -> None:
    widths = [max(len(row[i]) for row in (table.columns, *table.rows)) for i in range(len(table.columns) - 1)]
    print(table.title, file=stream)
    for row in (table.columns, *table.rows):
        cells = [cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
        print("  " + "  ".join(cells).rstrip(), file=stream)


def _finish(
    resolved: Resolved, backend: Backend, run_dir: str | Path | None, resume: bool, stream: TextIO, run: Run
) -> RunResult:
    """Run the workers under a display, then write the summary, the merged trace and the report, however it ended."""
    config = resolved.main
    directory = directories.choose(config, run_dir, resume)
    with directories.lock(directory):
        (directory / "config.yaml").write_text(dump(resolved))
        _print_tables(resolved, stream)
        steps = {stage.name: stage.config.training.steps for stage in resolved.stages}
        started = time.perf_counter()
        error: SiirlError | None = None
        try:
            with ProgressDisplay(directory, steps, stream):
                run(directory, config, backend, resume)
        except SiirlError as failure:
            error = failure
        _summarize(config, backend.name, directory, time.perf_counter() - started, error)
        report = _conclude(directory, config.logging.trace, config.logging.report)
    if error is not None:
        raise error
    metrics = read_metrics(directory)
    print(_verdict(metrics, directory, report), file=stream)
    return RunResult(directory, metrics, report)


def _summarize(config: Config, device: str, directory: Path, seconds: float, error: SiirlError | None) -> None:
    summary = {
        "status": "finished" if error is None else "stopped" if isinstance(error, Stopped) else "failed",
        "device": device,
        "workers": config.workers,
        "model": config.model.path,
        "seconds": seconds,
        **({} if error is None else {"error": str(error)}),
    }
    (directory / "summary.json").write_text(json.dumps(summary, indent=1))


def _conclude(directory: Path, trace: bool, report: bool) -> Path | None:
    if trace:
        merge_traces(directory)
    return write_report(directory) if report else None


def _run_here(resolved: Resolved, place: Place, directory: Path, config: Config, chosen: Backend, resume: bool) -> None:
    """Run one worker in this process."""
    backend = select(chosen.name, role=device_role(config))
    from siirl.worker.run import run_worker

    with worker_log(directory, place.rank):
        stopped = run_worker(resolved, directory, backend, place, resume)
    if stopped:
        raise Stopped(stopped, directory)


def _train_env(
    resolved: Resolved, backend: Backend, run_dir: str | Path | None, resume: bool, stream: TextIO
) -> RunResult:
    """One worker of a run whose processes torchrun or Slurm started; worker 0 also prepares, shows and concludes."""
    place = Place.from_environment(os.environ)
    meet_under_slurm(os.environ)
    resolved = _with(resolved, None, place.workers)
    check(resolved)
    if run_dir is None and resolved.main.run_dir is None:
        raise RequestError("--launcher env needs --run-dir (or run_dir): all workers write to the same directory")
    run = partial(_run_here, resolved, place)
    if place.rank == 0:
        return _finish(resolved, backend, run_dir, resume, stream, run)
    directory = directories.choose(resolved.main, run_dir, resume, create=False)
    run(directory, resolved.main, backend, resume)
    return RunResult(directory, read_metrics(directory), None)


def _train_ray(
    resolved: Resolved, device: str | None, run_dir: str | Path | None, resume: bool, stream: TextIO
) -> RunResult:
    if importlib.util.find_spec("ray") is None:
        raise RequestError("--launcher ray needs Ray, which is not installed: pip install 'siirl[ray]'")
    from siirl.worker import ray_cluster

    check(resolved)
    with ray_cluster.connected():
        backend = ray_cluster.choose_backend(device, resolved.main.device)
        with ray_cluster.reserved(backend, resolved.main) as group:
            return _finish(resolved, backend, run_dir, resume, stream, partial(ray_cluster.run_actors, group))


def _verdict(metrics: list[dict[str, Any]], directory: Path, report: Path | None) -> str:
    """The run in two lines: what was reached, and where to look."""
    main = [record for record in metrics if record.get("stage") == "main"]
    rewards = [record["reward/mean"] for record in main if "reward/mean" in record]
    evaluations = [record["eval/reward_mean"] for record in metrics if "eval/reward_mean" in record]
    parts = [f"{len(main)} steps"]
    if rewards:
        window = max(1, min(5, len(rewards) // 2))
        first, last = sum(rewards[:window]) / window, sum(rewards[-window:]) / window
        parts.append(f"mean reward {first:.3f} → {last:.3f}")
    if evaluations:
        parts.append(f"held-out greedy reward {evaluations[-1]:.3f}")
    return f"{', '.join(parts)}\n{'report' if report else 'run'}: {report or directory}"
