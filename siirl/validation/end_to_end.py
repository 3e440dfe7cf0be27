"""L5: plans, recorded steps and a short run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import siirl.config
from siirl.dag.graph import Graph
from siirl.dag.planner import plan
from siirl.validation import golden
from siirl.validation.checks import check, require
from siirl.validation.subject import Subject
from siirl.worker import launch

RECIPE = """
threads_per_worker: 1
model: {path: "tiny:qwen3:64:2:99", initializer_range: 0.08}
data: {source: "arithmetic:addition?digits=1", prompts_per_step: 16, max_prompt_tokens: 4}
pipeline: PIPELINE
rollout: {group_size: 8, max_new_tokens: 3}
training: {steps: 25, lr: 1e-3}
algorithm: {mini_batches: 2}
logging: {tensorboard: false, trace: false, report: false, samples_every: 0}
checkpoint: {save_last: false}
warmup:
  - pipeline: sft
    data: {prompts_per_step: 64, label_noise: 0.4}
    training: {steps: 100, lr: 3e-3, lr_warmup_steps: 5}
"""


def _recipe(subject: Subject, pipeline: str) -> Path:
    path = subject.scratch / f"{pipeline}.yaml"
    path.write_text(RECIPE.replace("PIPELINE", pipeline))
    return path


@check("L5", "the plan of every worker is that of a run on the host", lambda _: (("sft",), ("grpo",), ("ppo",)))
def same_plan(subject: Subject, pipeline: str) -> None:
    for workers in (1, 2, 8):
        plans = []
        for device in (subject.backend.name, "cpu"):
            config = siirl.config.load(_recipe(subject, pipeline), {"device": device, "workers": workers}).main
            made = plan(Graph.from_yaml(config.pipeline), config, workers)
            plans.append(json.dumps([each.to_dict() for each in made], sort_keys=True))
        require(plans[0] == plans[1], f"with {workers} workers another plan is made")


@check("L5", "recorded rollouts give the rewards, losses and gradients that they gave on the host")
def golden_rollouts(subject: Subject) -> None:
    steps = golden.read_golden()
    rollouts = [rollout for rollout, _ in steps]
    for number, (found, (_, recorded)) in enumerate(
        zip(golden.replay(subject.backend, rollouts), steps, strict=True), 1
    ):
        for key, value in recorded.items():
            subject.measure(f"{key} of step {number} off by", golden.relative(found[key], value), golden.COMPARED[key])
        gap = found["rollout/logprob_diff_max"]
        subject.measure(f"log-probs of step {number} off by", gap, 2e-3)
    for number, rollout in enumerate(rollouts, 1):
        rewards = [golden.reward(response) for response in rollout.response_ids]
        require(rewards == rollout.rewards, f"the rewards of step {number} are others than recorded")


def pipelines(subject: Subject) -> list[tuple[str]]:
    return [("grpo",), ("ppo",)] if subject.depth == "full" else [("grpo",)]


@check("L5", "a short run learns: the reward rises", pipelines)
def learning_curve(subject: Subject, pipeline: str) -> None:
    resolved = siirl.config.load(_recipe(subject, pipeline))
    workers = min(2, subject.backend.probe().count) if subject.backend.is_accelerator() else 2
    done = launch.train(
        resolved,
        device=subject.backend.name,
        workers=workers,
        run_dir=subject.scratch / f"run-{pipeline}",
        stream=io.StringIO(),
    )
    curve = [line["reward/mean"] for line in done.metrics if line["stage"] == "main"]
    first, last = sum(curve[:5]) / 5, sum(curve[-5:]) / 5
    gaps = [line["rollout/logprob_diff_mean"] for line in done.metrics if "rollout/logprob_diff_mean" in line]
    subject.measure("reward at the start", first)
    subject.measure("reward at the end", last)
    # 640 samples at each end: the deviation of the difference of two means is below 0.03
    require(last > first + 0.1, f"the reward went from {first:.3f} to {last:.3f}")
    subject.measure("mean difference of log-probs between rollout and training", sum(gaps) / len(gaps), 1e-2)
