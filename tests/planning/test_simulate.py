"""A simulated step: deterministic, what slows it, what the controller costs."""

from __future__ import annotations

import pytest

from siirl.planning.loads import Loads
from siirl.planning.simulate import Disturbance, scaled, simulate
from siirl.planning.timing import phases, share_of_steps
from siirl.planning.workload import Lengths
from tests.planning.jobs import job_of

STILL = Disturbance(jitter=0.0)


def test_the_seed_decides() -> None:
    job = job_of(16, data__prompts_per_step=32)
    one, same, other = (simulate(job, Disturbance(0.1, 2.0, 0.05), seed) for seed in (1, 1, 2))
    assert one == same
    assert one.plan.seconds != other.plan.seconds


def test_equal_workers_take_the_sum_of_the_phases() -> None:
    """Rows of equal lengths on undisturbed devices: nobody waits, and a step is as long as one worker's serial plan."""
    job = job_of(8, lengths=Lengths(500.0, 400.0, 0.0, 1024), data__prompts_per_step=64)
    loads = Loads.of(job.rows())
    parts = [p for s in job.steps if s.kind != "drop" and share_of_steps(job, s) > 0.5 for p in phases(job, s, loads)]
    together = sum(p.together or 0.0 for p in parts)
    run = simulate(job, STILL, 0).plan
    assert run.seconds == pytest.approx(sum(float(p.seconds[0]) for p in parts) + together)
    assert run.waiting == pytest.approx(together / run.seconds)


def test_a_slow_worker_holds_all_of_them_up() -> None:
    equal = Lengths(500.0, 400.0, 0.0, 1024)
    job = job_of(64, lengths=equal)
    even = simulate(job, STILL, 0).plan.seconds
    all_slow = simulate(job, Disturbance(1.0, 2.0, 0.0), 0).plan
    some = simulate(job, Disturbance(0.1, 2.0, 0.0), 0).plan
    assert some.seconds == pytest.approx(all_slow.seconds, rel=1e-6)
    assert all_slow.seconds == pytest.approx(2 * even, rel=0.05)  # collectives are as fast as before
    assert some.waiting > 0.4 > all_slow.waiting


def test_workers_share_the_cores_there_are() -> None:
    values = {"model__path": "tiny:qwen3:256:2:1024", "training__dtype": "float32", "data__prompts_per_step": 8}
    equal = Lengths(64.0, 64.0, 0.0, 1024)
    job = job_of(1, "local-2", equal, **values)
    one, two, four = (simulate(scaled(job, w, fixed_batch=True), STILL, 0).plan.seconds for w in (1, 2, 4))
    assert one / 2 < two < one
    assert four > two  # no more cores, and more work that does not depend on the rows


def test_what_the_controller_holds_grows_with_the_batch() -> None:
    job = job_of(8, data__prompts_per_step=64)
    runs = [simulate(scaled(job, w, fixed_batch=False), STILL, 0).controller for w in (8, 64)]
    assert runs[1].controller_bytes == pytest.approx(8 * runs[0].controller_bytes)
    # ids, mask and log-probs of prompts and responses of 1,024 tokens, and some numbers; several times
    row = 2 * 8 * 1024 + 2 * 8 * 1024 + 2 * 4 * 1024
    assert runs[0].controller_bytes > 64 * 8 * row


def test_the_controller_is_no_hindrance_when_it_costs_nothing_and_one_when_it_does() -> None:
    job = job_of(64)
    host = job.cluster.host
    free = host.model_copy(update={"nic_bandwidth": 1e15, "serialise_bandwidth": 1e15, "message_s": 0.0})
    job.cluster.host = free
    point = simulate(job, STILL, 0)
    assert point.controller.seconds < 1.05 * point.plan.seconds
    messages = 64 * 2 * 4  # to and from each worker for rollout, reward, update and weight sync
    job.cluster.host = free.model_copy(update={"message_s": 0.1})
    assert simulate(job, STILL, 0).controller.seconds == pytest.approx(
        point.controller.seconds + 0.1 * messages, rel=0.2
    )


def test_the_plan_scales_and_the_controller_does_not() -> None:
    job = job_of(8, training__sharding="shard", data__prompts_per_step=64)
    few, many = (simulate(scaled(job, w, fixed_batch=False), Disturbance(), 0) for w in (8, 1024))
    per_worker = [p.plan.tokens_per_s / p.workers for p in (few, many)]
    assert per_worker[1] > 0.8 * per_worker[0]
    assert many.controller.tokens_per_s / 1024 < 0.8 * few.controller.tokens_per_s / 8
