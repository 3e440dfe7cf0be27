"""Runs with a mixture of experts, from generation to the weight sync, on two workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker.runs import RECIPE, learned, metrics, run, weights, write_recipe

EXPERTS = (
    RECIPE.replace("tiny:qwen3:32:2:99", "tiny:qwen3_moe:64:2:99")
    .replace("lr: 1e-2", "lr: 1e-3, router_aux_coef: 0.01")
    .replace("steps: 3", "steps: 2")
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, EXPERTS)


def test_two_workers_with_half_of_the_experts_each_learn_what_one_does(recipe: Path, tmp_path: Path) -> None:
    given = ("algorithm.mini_batches=2", "rollout.router_replay=true")
    run(recipe, tmp_path / "one", *given)
    parts = ("--workers", "2", "training.parallel.expert=2", *given)
    run(recipe, tmp_path / "two", *parts, "training.steps=1")
    run(recipe, tmp_path / "two", *parts, "--resume")
    one, two = learned(tmp_path / "one"), learned(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        shared = (a.keys() & b.keys()) - {"stage", "data/redistributed_bytes"}
        assert {"actor/router_load_max", "actor/router_aux_loss", "rollout/router_agreement"} <= shared
        assert {k: a[k] for k in shared} == pytest.approx({k: b[k] for k in shared}, rel=1e-3, abs=1e-5)
        assert a["rollout/logprob_diff_max"] < 1e-4
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in first
    assert all((first[name] - second[name]).abs().max() < 1e-4 for name in first)


@pytest.mark.slow
def test_with_replay_sharded_bfloat16_training_agrees_better_with_rollout(recipe: Path, tmp_path: Path) -> None:
    given = (
        "--workers=2",
        "model.path=tiny:qwen3_moe:128:4:99",
        "rollout.max_new_tokens=48",
        "rollout.ignore_eos=true",
        "rollout.probe_bound=5",
        "training.micro_batch_tokens=512",
        "training.sharding=shard",
        "training.dtype=bfloat16",
        "training.steps=1",
    )
    worst = {}
    for replay in ("false", "true"):
        run(recipe, tmp_path / replay, *given, f"rollout.router_replay={replay}")
        worst[replay] = metrics(tmp_path / replay)[0]["rollout/logprob_diff_max"]
    assert worst["true"] < 0.5 * worst["false"]
