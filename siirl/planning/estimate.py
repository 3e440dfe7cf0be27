"""The estimate of a stage: memory, bytes and seconds of every step of its plan, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from siirl.dag import Table
from siirl.planning.job import Job
from siirl.planning.loads import Loads
from siirl.planning.memory import TERMS, Terms, memory_of
from siirl.planning.timing import phases, share_of_steps
from siirl.planning.traffic import Moved, moved_bytes

GIB = 2**30

_SHORT = dict(zip(TERMS, ("weights", "optim", "grads", "copy", "cache", "activ", "head", "buf"), strict=True))


@dataclass(frozen=True)
class StepEstimate:
    """One step of the plan.

    Attributes:
        id, layout: of the step.
        memory: bytes on a worker by term.
        moved: of a redistribution.
        seconds: on the slowest of the sampled shares, waiting for the others included.
        share: the part of the training steps in which it runs.
    """

    id: str
    layout: str
    memory: Terms
    moved: Moved | None
    seconds: float
    share: float

    @property
    def total(self) -> float:
        """Bytes on a worker."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """All steps of a stage's plan.

    Attributes:
        room: bytes a worker may use.
        tokens: prompt and response tokens of all samples of a step.
    """

    job: Job
    steps: tuple[StepEstimate, ...]
    room: float
    tokens: float

    @property
    def seconds(self) -> float:
        """Of a training step, on average."""
        return sum(step.seconds * step.share for step in self.steps)

    @property
    def fullest(self) -> StepEstimate:
        """The step that needs most memory."""
        return max(self.steps, key=lambda step: step.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= self.room

    def problem(self) -> str | None:
        """What does not fit, as a clause; None where all does."""
        if self.fits:
            return None
        step = self.fullest
        term, size = max(step.memory.items(), key=lambda item: item[1])
        return (
            f"step '{step.id}' needs {step.total / GIB:,.1f} GiB a worker and {self.room / GIB:,.1f} GiB are there; "
            f"the largest term is {term}, {size / GIB:,.1f} GiB"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: bytes and seconds."""
        return {
            "workers": self.job.workers,
            "cluster": self.job.cluster.name,
            "nodes": self.job.cluster.nodes,
            "model": {"name": self.job.actor.name, "parameters": self.job.actor.parameters},
            "memory_bytes": self.room,
            "fits": self.fits,
            "step_s": self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "steps": [
                {
                    "id": step.id,
                    "layout": step.layout,
                    "memory_bytes": dict(step.memory),
                    "moved": None if step.moved is None else vars(step.moved),
                    "seconds": step.seconds,
                    "share_of_steps": step.share,
                }
                for step in self.steps
            ],
        }


def estimate(job: Job) -> Estimate:
    """Estimate every step of the plan but those that only free columns."""
    loads = Loads.of(job.sampled)
    steps = []
    for step in job.steps:
        if step.kind == "drop":
            continue
        moved = moved_bytes(job, step) if step.kind == "redistribute" else None
        layout = f"{step.source} → {step.target}" if step.kind == "redistribute" else str(step.target or "")
        seconds = sum(float(phase.seconds.max()) + (phase.together or 0.0) for phase in phases(job, step, loads))
        name = step.id.replace("redistribute:", "→ ")
        steps.append(StepEstimate(name, layout, memory_of(job, step), moved, seconds, share_of_steps(job, step)))
    samples = job.config.data.prompts_per_step * job.group
    tokens = samples * (job.lengths.prompt + job.lengths.mean_response)
    return Estimate(job, tuple(steps), job.cluster.memory(job.workers), tokens)


def fits(job: Job) -> bool:
    """Whether every step has the memory it needs."""
    room = job.cluster.memory(job.workers)
    return all(sum(memory_of(job, step).values()) <= room for step in job.steps if step.kind != "drop")


def title(found: Estimate) -> str:
    """One line about model, cluster and lengths."""
    job = found.job
    cluster, lengths = job.cluster, job.lengths
    return (
        f"{job.actor.name or job.config.model.path}, {job.actor.parameters / 1e9:.3g} billion parameters; "
        f"{job.workers:,} workers on {cluster.nodes:,} x {cluster.devices_per_node} {cluster.device.name}\n"
        f"prompts of {lengths.prompt:,.0f} tokens, responses of {lengths.mean_response:,.0f} on average, "
        f"{lengths.longest:,} at most"
    )


def tables(found: Estimate) -> list[Table]:
    """Memory by term, then bytes and time."""
    used = [term for term in TERMS if any(term in step.memory for step in found.steps)]
    unit, name = (GIB, "GiB") if found.fullest.total >= GIB / 2 else (2**20, "MiB")
    memory = [
        (step.id, *(_size(step.memory.get(term, 0), unit) for term in used), _size(step.total, unit))
        for step in found.steps
    ]
    times = [
        (
            step.id,
            step.layout,
            _bytes(step.moved.total) if step.moved else "",
            f"{step.moved.kept:.1%}" if step.moved else "",
            _seconds(step.seconds),
            "" if step.share == 1 else f"{step.share:.1%}",
        )
        for step in found.steps
    ]
    times.append(("a step", "", "", "", _seconds(found.seconds), ""))
    rate = found.tokens / found.seconds
    return [
        Table(
            f"{name} a worker, of {found.room / unit:,.1f}",
            ("step", *(_SHORT[term] for term in used), "total"),
            tuple(memory),
        ),
        Table(
            f"estimated: {rate:,.0f} tokens/s, {rate / found.job.workers:,.0f} a worker",
            ("step", "layout", "moved", "stay", "time", "in steps"),
            tuple(times),
        ),
    ]


def _size(size: float, unit: int) -> str:
    return f"{size / unit:,.1f}" if size else ""


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"
