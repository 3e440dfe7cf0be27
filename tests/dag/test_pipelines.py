"""The built-in pipelines compute what their formulas need, and nothing that a setting makes superfluous."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from siirl.config.schema import Config
from siirl.dag import Graph, WorkerPlan, due, plan_worker
from siirl.worker.dag_worker import weights_follow


def planned(name: str, workers: int = 2, **algorithm: object) -> WorkerPlan:
    graph = Graph.from_yaml(name)
    config = Config(pipeline=name, algorithm={**graph.algorithm, **algorithm})  # type: ignore[arg-type]
    return plan_worker(graph, config, workers, 0)


def nodes(worker: WorkerPlan) -> list[str]:
    return [step.id for step in worker.steps if step.kind == "node"]


def moved(worker: WorkerPlan) -> list[set[str]]:
    return [set(step.fields) for step in worker.steps if step.kind == "redistribute"]


def test_grpo_on_policy_generates_scores_updates() -> None:
    worker = planned("grpo")
    assert nodes(worker) == ["data", "rollout", "reward", "advantage", "samples", "update", "sync", "evaluate"]
    assert worker.models == ("actor",)
    ids = {"sample_id", "slot"}
    assert moved(worker) == [
        ids | {"prompt_ids", "response_ids", "rollout_log_probs", "policy_version", "advantages", "failed"}
    ]


def test_grpo_with_several_updates_and_a_reference() -> None:
    worker = planned("grpo", mini_batches=2, kl_coef=0.04)
    assert nodes(worker)[4:8] == ["samples", "reference", "old", "update"]
    assert worker.models == ("actor", "reference")
    assert len(moved(worker)) == 1
    reads = next(step.reads for step in worker.steps if step.id == "update")
    assert {"old_log_probs", "ref_log_probs"} <= set(reads)


def test_dapo_generates_and_scores_in_rounds_and_trains_once() -> None:
    worker = planned("dapo")
    assert nodes(worker) == [
        "data",
        "rollout",
        "reward",
        "keep",
        "advantage",
        "samples",
        "old",
        "update",
        "sync",
        "evaluate",
    ]
    ids = {"sample_id", "slot"}
    update = {"prompt_ids", "response_ids", "rollout_log_probs", "advantages", "failed"}
    assert moved(worker) == [ids | update | {"policy_version"}]
    reads = next(step.reads for step in worker.steps if step.id == "old")
    assert set(reads) == {"prompt_ids", "response_ids", "rollout_log_probs", "policy_version"}


def test_sft_needs_neither_rollout_nor_reward() -> None:
    worker = planned("sft")
    assert nodes(worker) == ["data", "update", "sync", "evaluate"]
    assert moved(worker) == [{"sample_id", "slot", "prompt_ids", "response_ids"}]


PPO = ["data", "rollout", "reward", "samples", "values", "advantage", "update_critic", "update", "sync", "evaluate"]


@pytest.mark.parametrize(
    ("algorithm", "extra"),
    [
        ({"kl_reward_coef": 0.0, "epochs": 1}, set()),
        ({"kl_reward_coef": 0.0, "epochs": 4}, {"old"}),
        ({"kl_reward_coef": 0.0, "epochs": 1, "mini_batches": 2}, {"old"}),
        ({"kl_reward_coef": 0.0, "epochs": 1, "kl_coef": 0.1}, {"reference"}),
        ({"kl_reward_coef": 0.1, "epochs": 1}, {"old", "reference", "kl_reward"}),
    ],
)
def test_ppo_computes_log_probs_only_where_they_are_used(algorithm: dict, extra: set[str]) -> None:
    worker = planned("ppo", **algorithm)
    assert set(nodes(worker)) == {*PPO, *extra}
    assert [name for name in nodes(worker) if name in PPO] == PPO
    assert ("reference" in worker.models) == ("reference" in extra)
    reads = next(step.reads for step in worker.steps if step.id == "advantage")
    assert ("token_rewards" in reads) == ("kl_reward" in extra)
    assert len(moved(worker)) == 1
    assert not {"group_id", "row", "finish_reason"} & moved(worker)[0]


@pytest.mark.parametrize("name", ["dapo", "grpo", "ppo", "sft"])
@pytest.mark.parametrize(
    ("every", "at_end", "expected"),
    [(0, True, [9]), (0, False, None), (4, False, [4, 8]), (4, True, [4, 8, 9]), (1, True, list(range(1, 10)))],
)
def test_evaluation_is_due_when_asked_for(name: str, every: int, at_end: bool, expected: list[int] | None) -> None:
    config = Config(training={"steps": 9}, evaluation={"every": every, "at_end": at_end})  # type: ignore[arg-type]
    steps = {step.id: step for step in plan_worker(Graph.from_yaml(name), config, 1, 0).steps}
    found = [n for n in range(1, 10) if due(steps["evaluate"], n, config)] if "evaluate" in steps else None
    assert found == expected


@pytest.mark.parametrize("name", ["dapo", "grpo", "ppo", "sft"])
def test_the_file_is_named_after_its_pipeline_and_says_what_it_is(name: str) -> None:
    graph = Graph.from_yaml(name)
    assert graph.name == name
    assert graph.description.endswith(".")


@pytest.mark.parametrize("name", ["dapo", "grpo", "ppo", "sft"])
@pytest.mark.parametrize("reverse", [False, True])
def test_no_built_in_pipeline_leans_on_the_order_of_its_file(name: str, reverse: bool) -> None:
    graph = Graph.from_yaml(name)
    graph.nodes.sort(key=lambda node: node.id, reverse=reverse)
    config = Config(algorithm=graph.algorithm)  # type: ignore[arg-type]
    order = nodes(plan_worker(graph, config, 2, 0))
    assert set(order) == set(nodes(plan_worker(Graph.from_yaml(name), config, 2, 0)))
    assert order.index("data") < order.index("update") < order.index("sync") < order.index("evaluate")


@pytest.mark.parametrize("name", ["grpo", "ppo", "sft", "dapo"])
def test_every_step_of_training_is_followed_by_new_weights_for_the_rollout_engine(name: str) -> None:
    steps = planned(name, mini_batches=2, kl_coef=0.04).steps
    training = [place for place, step in enumerate(steps) if step.op in ("log_prob", "value", "update")]
    assert training and all(weights_follow(steps[place + 1 :]) for place in training)
    rollout = next((place for place, step in enumerate(steps) if step.op == "rollout"), len(steps))
    assert not weights_follow(steps[:rollout])  # nothing comes before the step ends
    sync = next(place for place, step in enumerate(steps) if step.op == "sync_weights")
    seldom, custom = replace(steps[sync], every=2), replace(steps[sync], op="custom")
    assert not weights_follow([*steps[training[0] + 1 : sync], seldom])
    assert not weights_follow([*steps[training[0] + 1 : sync], custom, steps[sync]])  # it may generate


def test_what_only_looks_at_the_rows_runs_while_they_move() -> None:
    steps = planned("grpo").steps
    hop = next(place for place, step in enumerate(steps) if step.kind == "redistribute")
    during = steps[hop + 1 : hop + 1 + steps[hop].overlaps]
    assert [step.op for step in during if step.kind == "node"] == ["record_samples"]
    assert steps[hop - 1].id == "advantage" and steps[hop + 1 + steps[hop].overlaps].id == "update"
    read = {column for step in steps[hop + 1 + steps[hop].overlaps :] for column in step.reads.values()}
    assert read <= set(steps[hop].fields) and "row" not in steps[hop].fields
    assert WorkerPlan.from_json(planned("grpo").to_json()) == planned("grpo")


@pytest.mark.parametrize("settings", [{"data": {"overlap": False}}, {"placement": "disaggregated"}])
def test_nothing_runs_while_rows_move_when_that_is_off_or_generation_is_elsewhere(settings: dict[str, Any]) -> None:
    graph = Graph.from_yaml("grpo")
    config = Config.model_validate({"pipeline": "grpo", "algorithm": graph.algorithm, **settings})
    for rank in range(2):
        assert not any(step.overlaps for step in plan_worker(graph, config, 2, rank).steps)
    assert [step.overlaps for step in planned("grpo", workers=1).steps if step.kind == "redistribute"] == []
