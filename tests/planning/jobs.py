"""Jobs on shipped clusters."""

from __future__ import annotations

from typing import Any

from siirl.config.schema import Config
from siirl.planning.cluster import load_cluster
from siirl.planning.job import Job
from siirl.planning.search import with_values
from siirl.planning.workload import Lengths

SEVEN = {
    "model.path": "qwen2.5-7b",
    "data.prompts_per_step": 512,
    "rollout.max_new_tokens": 1024,
    "training.dtype": "bfloat16",
    "training.micro_batch_tokens": 8192,
}


def configured(**values: Any) -> Config:
    """A configuration; ``__`` in a name stands for the dot of a key."""
    return with_values(Config(), {name.replace("__", "."): value for name, value in values.items()})


def job_of(workers: int, cluster: str = "h200-128x8", lengths: Lengths | None = None, **values: Any) -> Job:
    """A job of Qwen2.5-7B unless ``values`` say otherwise."""
    seven = {key.replace(".", "__"): value for key, value in SEVEN.items()}
    return Job.of(configured(**(seven | values)), load_cluster(cluster), workers, lengths)
