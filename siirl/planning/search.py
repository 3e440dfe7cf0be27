"""The best layout for a model, a cluster and a pipeline: every combination of degrees that the engines know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from siirl.config.schema import Config
from siirl.dag import ENGINE_DEGREES, Table
from siirl.errors import RequestError
from siirl.planning.cluster import Cluster
from siirl.planning.estimate import GIB, Estimate, estimate, fits
from siirl.planning.job import Job
from siirl.planning.workload import Lengths

# Micro-batches are tried at the configured size, then halved as often as this.
HALVINGS = 3


@dataclass(frozen=True)
class Candidate:
    """A layout that fits: the keys that make it, and its estimate."""

    overrides: dict[str, Any]
    estimate: Estimate

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.overrides.items())


def search(config: Config, cluster: Cluster, workers: int, lengths: Lengths) -> list[Candidate]:
    """Every layout that fits, the fastest first; of each the largest micro-batch that fits."""
    found = []
    base = _base(config, cluster, workers, lengths)
    for overrides in _layouts(base):
        candidate = _fitting(base, overrides)
        if candidate is not None:
            found.append(candidate)
    return sorted(found, key=lambda candidate: candidate.estimate.seconds)


def advice(config: Config, cluster: Cluster, workers: int, lengths: Lengths) -> str:
    """What would fit, as a clause: another layout, more workers, or engines that know more degrees."""
    best = search(config, cluster, workers, lengths)
    if best:
        return f"{best[0]} would fit"
    for more in (2 * workers, 4 * workers, 8 * workers):
        grown = config if config.data.prompts_per_step >= more else with_values(config, {"data.prompts_per_step": more})
        best = search(grown, cluster, more, lengths)
        if best:
            extra = "" if grown is config else f" data.prompts_per_step={more}"
            return f"no layout of {workers} workers fits; {best[0]}{extra} would with {more} workers"
    engines = {"training.engine": "megatron", "rollout.engine": "vllm"}
    best = search(with_values(config, engines), cluster, workers, lengths)
    names = f"'{config.training.engine}' and '{config.rollout.engine}'"
    if best:
        chosen = " ".join(f"{key}={value}" for key, value in engines.items())
        return f"no layout that the engines {names} know fits; {chosen} {best[0]} would"
    return f"no layout that the engines {names} know fits; use a smaller model or devices with more memory"


def table(found: list[Candidate], shown: int = 5) -> Table:
    """The first candidates."""
    rows = tuple(
        (
            str(place),
            f"{candidate.estimate.seconds:,.3g} s",
            f"{candidate.estimate.tokens / candidate.estimate.seconds:,.0f}",
            f"{candidate.estimate.fullest.total / GIB:,.1f}",
            str(candidate),
        )
        for place, candidate in enumerate(found[:shown], start=1)
    )
    return Table(
        f"best of {len(found)} layouts that fit {found[0].estimate.room / GIB:,.1f} GiB",
        ("", "a step", "tokens/s", "GiB", "keys"),
        rows,
    )


def _base(config: Config, cluster: Cluster, workers: int, lengths: Lengths) -> Job:
    """A job without degrees, from which the others are made."""
    degrees = ("tensor", "context", "pipeline", "expert")
    plain = with_values(config, {**{f"training.parallel.{name}": 1 for name in degrees}, "rollout.parallel.tensor": 1})
    return Job.of(with_values(plain, {"training.parallel.data": None}), cluster, workers, lengths)


def _layouts(base: Job) -> Iterator[dict[str, Any]]:
    """Keys of every layout: degrees are powers of two that divide the workers and suit the model.

    Key/value heads are cut by tensor, layers by pipeline, experts by expert parallelism.
    """
    config, shape, workers = base.config, base.actor, base.workers
    powers = [2**i for i in range(workers.bit_length()) if workers % 2**i == 0]
    inside = [degree for degree in powers if degree <= base.cluster.devices_per_node]
    dense = not shape.num_experts or config.training.engine != "fsdp"  # whose experts are whole
    choices = {
        "tensor": [degree for degree in inside if shape.num_kv_heads % degree == 0 and (dense or degree == 1)],
        "context": powers,
        "pipeline": [degree for degree in powers if shape.num_layers % degree == 0],
        "expert": [
            degree for degree in powers if degree == 1 or (shape.num_experts and not shape.num_experts % degree)
        ],
    }
    training = [name for name in choices if name in ENGINE_DEGREES[config.training.engine]]
    rollout = inside if "tensor" in ENGINE_DEGREES[config.rollout.engine] else [1]
    rollout = [degree for degree in rollout if shape.num_heads % degree == 0]
    fsdp = config.training.engine == "fsdp"
    shardings = ["replicate", "shard"] if fsdp else [None]
    for sharding, degree, *degrees in product(shardings, rollout, *(choices[name] for name in training)):
        chosen = dict(zip(training, degrees, strict=True))
        inner = prod(value for name, value in chosen.items() if name != "expert")
        if fsdp and chosen.get("expert", 1) > 1 and (inner > 1 or sharding == "shard"):
            continue  # not combined
        if workers % inner or workers // inner * chosen.get("context", 1) % chosen.get("expert", 1):
            continue
        if sharding == "shard" and workers > 1 and workers // inner * chosen.get("context", 1) == 1:
            continue  # nothing is left to shard
        overrides: dict[str, Any] = {} if sharding is None else {"training.sharding": sharding}
        overrides |= {f"training.parallel.{name}": value for name, value in chosen.items() if value > 1}
        if sharding is not None and shape.num_kv_heads // chosen["tensor"] % chosen["context"]:
            overrides["training.parallel.context_mode"] = "ring"
        yield overrides | ({"rollout.parallel.tensor": degree} if degree > 1 else {})


def _fitting(base: Job, overrides: dict[str, Any]) -> Candidate | None:
    """The layout with the largest micro-batch that fits, or None."""
    config = base.config
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for halving in range(HALVINGS + 1):
        tokens = base.budget >> halving
        if tokens < longest:
            break
        chosen = overrides | ({"training.micro_batch_tokens": tokens} if halving else {})
        try:
            job = base.changed(with_values(config, chosen))
        except RequestError:  # too few prompts for so many shares
            return None
        if fits(job):
            return Candidate(chosen, estimate(job))
    return None


def with_values(config: Config, overrides: dict[str, Any]) -> Config:
    """A copy of the configuration with other values for dotted keys; the values are ours and right."""
    copy = config.model_copy(deep=True)
    for key, value in overrides.items():
        *path, last = key.split(".")
        section: Any = copy
        for part in path:
            section = getattr(section, part)
        setattr(section, last, value)
    return copy
