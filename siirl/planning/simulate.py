"""A simulated step of a plan on thousands of workers; and of the same work with one process that holds the data.

Both runs compute the same on the same devices with the same rows. Without a controller rows move as the plan says:
integers gathered by all, bytes between the workers. With one, as in a single-controller design, the whole batch lies in
one process, padded to the longest row; it sends every worker its rows for each op that the workers run, and takes what
they write; ops without a model or a reward run where the batch is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from siirl.dag import Layout, Step
from siirl.planning.estimate import fits
from siirl.planning.events import Compute, Meet, Process, Request, Serve, Simulation
from siirl.planning.job import Job
from siirl.planning.loads import Loads
from siirl.planning.timing import Phase, phases, share_of_steps
from siirl.planning.traffic import padded_bytes
from siirl.planning.workload import Floats

# Ops that a controller hands to its workers.
HANDED = ("rollout", "reward", "log_prob", "value", "update", "sync_weights", "evaluate")


@dataclass(frozen=True)
class Disturbance:
    """What makes equal devices unequal.

    Attributes:
        slow_share: part of the workers that are slow.
        slow_factor: how many times as long these take.
        jitter: standard deviation of the logarithm of a phase's time on a worker.
    """

    slow_share: float = 0.0
    slow_factor: float = 1.5
    jitter: float = 0.02


@dataclass(frozen=True)
class Run:
    """One simulated step.

    Attributes:
        seconds: from the first worker's start to the last one's end.
        tokens: prompt and response tokens of all samples.
        waiting: mean part of the step in which a worker does not compute.
        controller_bytes: most that the controller holds; 0 without one.
    """

    seconds: float
    tokens: float
    waiting: float
    controller_bytes: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Point:
    """A number of workers: the plan's run, the same with a controller, and whether the plan fits the devices."""

    workers: int
    prompts: int
    plan: Run
    controller: Run
    fits: bool


def scaled(job: Job, workers: int, fixed_batch: bool) -> Job:
    """The job on another number of workers: with as many prompts a worker, or with the same batch.

    Raises:
        RequestError: the configuration does not work with so many workers.
    """
    config = job.config
    if not fixed_batch:
        parts = config.algorithm.mini_batches
        prompts = max(1, round(config.data.prompts_per_step * workers / config.workers / parts)) * parts
        config = config.model_copy(update={"data": config.data.model_copy(update={"prompts_per_step": prompts})})
    return job.changed(config, workers)


def simulate(job: Job, disturbance: Disturbance, seed: int) -> Point:
    """Simulate one step with and without a controller; a function of its arguments."""
    rows = job.rows(seed=seed)
    loads = Loads.of(rows)
    tokens = float(rows.responses.sum() + len(rows.responses) * rows.prompt)
    work = _Work.of(job, loads, disturbance, seed)
    plan = _run(job, [_decentral(work, worker) for worker in range(job.workers)], tokens)
    central = _Central(job, work)
    controlled = _run(job, central.processes(), tokens)
    controlled = replace(controlled, controller_bytes=central.peak)
    return Point(job.workers, job.config.data.prompts_per_step, plan, controlled, fits(job))


def _run(job: Job, processes: Sequence[Process], tokens: float) -> Run:
    """Run worker processes, and one more for a controller where there is one, on a host of its own."""
    per_node = job.cluster.workers_per_node(job.workers)
    nodes = [worker // per_node for worker in range(job.workers)]
    nodes += [-1] * (len(processes) - job.workers)
    simulation = Simulation(nodes, job.cluster.devices_per_node, job.cluster.device.contention)
    seconds = simulation.run(processes)
    computing = float(np.mean(simulation.computing[: job.workers]))
    return Run(seconds, tokens, 1 - computing / seconds)


@dataclass(frozen=True)
class _Work:
    """Every step's phases with each worker's own seconds: of phase p of step s, float64 [workers]."""

    steps: tuple[Step, ...]
    phases: tuple[tuple[tuple[Floats, float | None], ...], ...]

    @classmethod
    def of(cls, job: Job, loads: Loads, disturbance: Disturbance, seed: int) -> _Work:
        generator = np.random.default_rng([seed, job.workers])
        slow = generator.random(job.workers) < disturbance.slow_share
        factor = np.where(slow, disturbance.slow_factor, 1.0)
        steps, found = [], []
        for step in job.steps:
            if step.kind == "drop" or share_of_steps(job, step) < 0.5:
                continue
            parts = []
            for phase in phases(job, step, loads):
                jitter = generator.lognormal(0, disturbance.jitter, job.workers)
                parts.append((_on_workers(job, step, phase, factor * jitter), phase.together))
            steps.append(step)
            found.append(tuple(parts))
        return cls(tuple(steps), tuple(found))


def _on_workers(job: Job, step: Step, phase: Phase, factor: Floats) -> Floats:
    """Seconds of each worker, float64 [workers]: a share is as fast as its slowest member."""
    share = _share_of(job, len(phase.seconds), step.target)
    slowest = np.zeros(len(phase.seconds))
    np.maximum.at(slowest, share, factor)
    return (phase.seconds * slowest)[share]


def _share_of(job: Job, shares: int, layout: Layout | None) -> np.ndarray:
    """The share of each worker, int64 [workers]."""
    for known in (layout, job.rollout, job.training):
        if known is not None and known.data == shares:
            share = np.zeros(job.workers, np.int64)
            for number, members in enumerate(known.shares()):
                share[members] = number
            return share
    raise AssertionError(f"no layout has {shares} shares")


def _decentral(work: _Work, worker: int) -> Process:
    """A worker's own serial plan."""
    workers = len(work.phases[0][0][0])
    for step, parts in zip(work.steps, work.phases, strict=True):
        for number, (seconds, together) in enumerate(parts):
            yield Compute(float(seconds[worker]))
            if together is not None and workers > 1:
                yield Meet(f"{step.id}.{number}", workers, together)


class _Central:
    """The same work with the batch in one process: what each op reads goes out and what it writes comes back."""

    def __init__(self, job: Job, work: _Work) -> None:
        self._job, self._work = job, work
        samples = job.config.data.prompts_per_step * job.group
        columns = {column for step in job.steps for column in step.writes.values()}
        batch = samples * sum(padded_bytes(job, column) for column in columns)
        self._hops: dict[str, tuple[float, float]] = {}
        for step in work.steps:
            if step.op in HANDED:
                sides = (step.reads.values(), step.writes.values())
                out, back = (samples * sum(padded_bytes(job, column) for column in side) for side in sides)
                self._hops[step.id] = out, back
        # the batch, and during a hop its parts beside the whole they are cut from or put together to
        self.peak = batch + max((max(hop) for hop in self._hops.values()), default=0.0) * 2

    def processes(self) -> list[Process]:
        """The workers', then the controller's."""
        workers = self._job.workers
        return [*(self._worker(worker) for worker in range(workers)), self._controller()]

    def _worker(self, worker: int) -> Process:
        workers = self._job.workers
        for step, parts in zip(self._work.steps, self._work.phases, strict=True):
            if step.id not in self._hops:
                continue
            out, back = self._hops[step.id]
            copies = workers / (step.target.data if step.target else workers)
            yield Meet(f"{step.id}.ready", workers + 1, 0.0)
            yield from self._message(out * copies / workers)
            for number, (seconds, together) in enumerate(parts):
                yield Compute(float(seconds[worker]))
                if together is not None and workers > 1:
                    yield Meet(f"{step.id}.{number}", workers, together)
            yield from self._message(back * copies / workers)[::-1]
            yield Meet(f"{step.id}.done", workers + 1, 0.0)

    def _message(self, size: float) -> list[Request]:
        """One worker's message to or from the controller: its process turns it over, its network carries it."""
        host = self._job.cluster.host
        network = host.nic_bandwidth * self._job.cluster.sustained.network
        work = Serve("controller", host.message_s + size / host.serialise_bandwidth)
        return [work, Serve("network", size / network)]

    def _controller(self) -> Process:
        workers = self._job.workers
        for step, parts in zip(self._work.steps, self._work.phases, strict=True):
            if step.id in self._hops:
                yield Meet(f"{step.id}.ready", workers + 1, 0.0)
                yield Meet(f"{step.id}.done", workers + 1, 0.0)
            elif step.kind == "node":
                yield Serve("controller", float(parts[0][0].max()))
