"""The quickstart's recipe in small: it learns, and with the learning rate at 0 it stays where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker import runs

RECIPE = """
device: cpu
workers: 2
threads_per_worker: 1
model: {path: "tiny:qwen3:64:2:99", initializer_range: 0.08}
data: {source: "arithmetic:addition?digits=1", prompts_per_step: 16, max_prompt_tokens: 4}
pipeline: PIPELINE
rollout: {group_size: 8, max_new_tokens: 3}
training: {steps: 40, lr: 1e-3}
algorithm: {mini_batches: 2}
logging: {tensorboard: false, trace: false, report: false, samples_every: 0}
checkpoint: {save_last: false}
warmup:
  - pipeline: sft
    data: {prompts_per_step: 64, label_noise: 0.4}
    training: {steps: 100, lr: 3e-3, lr_warmup_steps: 5}
"""


def rewards(recipe: Path, run_dir: Path, *arguments: str) -> tuple[float, float]:
    """Mean reward of the first and of the last five steps."""
    runs.run(recipe, run_dir, *arguments)
    curve = [line["reward/mean"] for line in runs.metrics(run_dir) if line["stage"] == "main"]
    return sum(curve[:5]) / 5, sum(curve[-5:]) / 5


@pytest.mark.parametrize("pipeline", ["grpo", pytest.param("ppo", marks=pytest.mark.long)])
def test_the_reward_rises_and_without_a_learning_rate_it_does_not(pipeline: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("PIPELINE", pipeline))
    first, last = rewards(recipe, tmp_path / "learns")
    assert first < 0.6
    assert last > first + 0.25
    # 640 samples at each end: the difference of two means has a standard deviation below 0.03
    first, last = rewards(recipe, tmp_path / "stays", "training.lr=0", "training.critic_lr=0")
    assert abs(last - first) < 0.1
