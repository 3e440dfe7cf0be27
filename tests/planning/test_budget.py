"""Micro-batches as large as the memory allows: what is chosen fits, and is the same wherever it is asked for."""

from __future__ import annotations

import pytest

from siirl.device.collectives import Collectives
from siirl.planning.budget import MOST, SHARE, STEP
from siirl.planning.job import Job
from siirl.planning.memory import memory_of
from siirl.training.budget import share_memory
from siirl.training.fsdp import TrainingEngine
from tests import device_under_test
from tests.planning.jobs import configured, job_of
from tests.planning.test_memory import decoder, step

AUTO = {"training__micro_batch_tokens": "auto"}
FULL_STEP = {"data__prompts_per_step": 65_536}  # enough samples for any micro-batch


@pytest.mark.parametrize("workers", [8, 64])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_chosen_fits_and_not_much_more_does(workers: int, recompute: str, dtype: str) -> None:
    keys = {"training__sharding": "shard", "training__recompute": recompute, "training__dtype": dtype} | FULL_STEP
    job = job_of(workers, **keys, **AUTO)
    assert job.budget % STEP == 0
    room = job.cluster.memory(workers)
    assert sum(memory_of(job, step(job, "update")).values()) < room
    if job.budget < MOST:
        double = job_of(workers, **keys, training__micro_batch_tokens=2 * job.budget + 8 * STEP)
        assert sum(memory_of(double, step(double, "update")).values()) > SHARE * room


def test_recomputation_makes_room_for_longer_micro_batches() -> None:
    chosen = [
        job_of(8, training__sharding="shard", training__recompute=mode, **FULL_STEP, **AUTO).budget
        for mode in ("none", "selective", "full")
    ]
    assert chosen == sorted(chosen)
    assert chosen[2] > 2 * chosen[0]


def test_there_is_room_for_the_longest_sample_whatever_the_memory() -> None:
    job = job_of(1, "local-2", **AUTO)  # 7 billion parameters on a laptop
    assert job.budget == 1024 + 1024


def test_on_a_host_the_number_of_workers_changes_nothing() -> None:
    keys = {"model__path": "smollm2-135m", "training__dtype": "float32"} | FULL_STEP | AUTO
    assert len({job_of(workers, "local-2", **keys).budget for workers in (1, 2, 4)}) == 1


def test_a_run_chooses_what_the_planner_says() -> None:
    backend, path = device_under_test.backend(), "tiny:qwen3:256:4:1024"
    config = configured(model__path=path, training__optimizer="adamw", **AUTO)
    engine = TrainingEngine(decoder(path), config.training, backend, Collectives.single(), "actor")
    engine.begin(config, 1e-3)
    share_memory({"actor": engine}, config, backend)
    memory, cluster = backend.memory(), job_of(1, "local-2", **AUTO).cluster
    device = cluster.device.model_copy(
        update={"unified": memory.unified, "memory_bytes": memory.total, "reserved_bytes": 0}
    )
    host = cluster.host.model_copy(update={"memory_bytes": memory.total})
    units = backend.capabilities().compute_units if memory.unified else 1
    like = cluster.model_copy(update={"device": device, "host": host, "devices_per_node": units})
    assert engine.budget.tokens == Job.of(config, like, 1).budget > config.data.max_prompt_tokens
