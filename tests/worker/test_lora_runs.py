"""Real runs that train adapters: what they leave behind, that they resume, learn, and agree whatever the placement."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from siirl.model.load import load_model
from tests.worker import runs
from tests.worker.test_learning import RECIPE, rewards

LORA = ("model.lora.rank=4", "training.optimizer=sgd", "training.max_grad_norm=null", "training.lr=0.5")
KL = ("algorithm.kl_coef=0.01",)


@pytest.mark.slow
def test_a_run_leaves_a_merged_model_and_its_adapter(tmp_path: Path) -> None:
    recipe, run = runs.write_recipe(tmp_path), tmp_path / "run"
    runs.run(recipe, run, *LORA, *KL, "checkpoint.every=1")
    base = load_model("tiny:qwen3:32:2:99", initializer_range=0.2).model.state_dict()
    adapter, merged = load_file(run / "adapter" / "adapter_model.safetensors"), runs.weights(run)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert merged.keys() == base.keys()
    for name, tensor in base.items():
        parts = [f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight" for x in "AB"]
        expected = tensor
        if parts[0] in adapter:
            expected = tensor + config["lora_alpha"] / config["r"] * adapter.pop(parts[1]) @ adapter.pop(parts[0])
            assert not torch.equal(merged[name], tensor)
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-6)
    assert not adapter
    saved = [load_file(f) for f in (run / "checkpoints" / "step_000003" / "tensors").glob("*.safetensors")]
    names = {name for tensors in saved for name in tensors}
    assert names and all(".lora_" in name for name in names if name.startswith("actor.model."))
    assert runs.metrics(run)[0]["actor/kl"] == 0  # the reference is the actor without its adapters
    assert runs.metrics(run)[-1]["actor/kl"] > 0
    assert max(line["rollout/logprob_diff_max"] for line in runs.metrics(run)) < 1e-3

    state = run / "checkpoints" / "step_000003" / "state.json"
    assert json.loads(state.read_text())["adapters"]["lora"]["rank"] == 4
    said = runs.run(recipe, run, *LORA, *KL, "model.lora.rank=2", "training.steps=4", "--resume", status=2)
    assert "the checkpoint is of a run with model.lora.rank=4, and this one has 2" in said


@pytest.mark.slow
def test_a_resumed_run_is_the_one_that_went_on(tmp_path: Path) -> None:
    """In a stage after one that trained all weights: the base is in the checkpoint alone."""
    overlay = "warmup: [{pipeline: sft, training: {steps: 2}, model: {lora: {rank: 0}}}]"
    recipe = runs.write_recipe(tmp_path, runs.RECIPE + overlay)
    arguments = ("model.lora.rank=4", *KL, "checkpoint.every=1", "checkpoint.keep=9", "--workers", "2")
    runs.run(recipe, tmp_path / "whole", *arguments)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    for later in ("step_000002", "step_000003"):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / later)
    runs.run(recipe, tmp_path / "cut", *arguments, "--resume")
    assert runs.learned(tmp_path / "cut") == runs.learned(tmp_path / "whole")
    before, after = runs.weights(tmp_path / "whole"), runs.weights(tmp_path / "cut")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not (tmp_path / "whole" / "adapter").exists()  # no file has what it adapts


@pytest.mark.slow
def test_where_workers_are_placed_and_how_weights_lie_does_not_matter(tmp_path: Path) -> None:
    recipe = runs.write_recipe(tmp_path)
    runs.run(recipe, tmp_path / "one", *LORA)
    placed = ("placement=disaggregated", "--workers", "2", "rollout.workers=1")
    runs.run(recipe, tmp_path / "placed", *LORA, *placed)
    runs.run(recipe, tmp_path / "shard", *LORA, "--workers", "2", "training.sharding=shard")
    one, placed_weights = runs.weights(tmp_path / "one"), runs.weights(tmp_path / "placed")
    assert all(torch.equal(tensor, placed_weights[name]) for name, tensor in one.items())
    for name, tensor in runs.weights(tmp_path / "shard").items():
        torch.testing.assert_close(tensor, one[name], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_critic_with_adapters(tmp_path: Path) -> None:
    recipe = runs.write_recipe(tmp_path)
    runs.run(recipe, tmp_path / "run", "model.lora.rank=2", "pipeline=ppo", "training.dtype=bfloat16")
    assert all(line["critic/grad_norm"] > 0 for line in runs.metrics(tmp_path / "run"))


@pytest.mark.slow
def test_adapters_alone_raise_the_reward(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("PIPELINE", "grpo") + "    model: {lora: {rank: 0}}\n")
    first, last = rewards(recipe, tmp_path / "learns", "model.lora.rank=8", "training.lr=3e-3")
    assert first < 0.6
    assert last > first + 0.25
