"""A few steps of GRPO recorded on the host, and their replay: the same responses, rewards and updates elsewhere.

`python -m siirl.validation.golden` records anew into `golden.json` beside this file, on the device cpu.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from siirl.algorithms.registry import get_advantage
from siirl.config.schema import Config
from siirl.data.batch import Batch, Ragged
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.rollout.engine import NativeEngine
from siirl.rollout.sampling import Sampling
from siirl.validation import tiny

FILE = "golden.json"
STEPS, GROUP = 3, 4
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14], [20, 21], [40, 41, 42, 43], [2, 3]]
# By which share another device may differ. One token more or less beyond the clip is a hundredth of them.
COMPARED = {
    "reward/mean": 1e-9,
    "actor/loss": 2e-3,
    "actor/grad_norm": 2e-3,
    "actor/entropy": 2e-3,
    "actor/ratio_max": 2e-2,
    "actor/clip_fraction": 5e-2,
}


@dataclass(frozen=True)
class Rollout:
    """A step's responses as they were drawn, one row each, with the rewards they were given."""

    response_ids: list[list[int]]
    log_probs: list[list[float]]
    rewards: list[float]


def read_golden() -> list[tuple[Rollout, dict[str, float]]]:
    """The recorded steps: rollouts, and the metrics of the update that followed."""
    steps = json.loads((resources.files("siirl.validation") / FILE).read_text(encoding="utf-8"))["steps"]
    return [(Rollout(**step["rollout"]), step["metrics"]) for step in steps]


def configuration() -> Config:
    """Two mini-batches and two passes, so that the ratio leaves 1 and is clipped."""
    config = tiny.settings(lr=0.15)
    config.algorithm.epochs = 2
    return config


def reward(ids: list[int]) -> float:
    """The share of even tokens."""
    return sum(token % 2 == 0 for token in ids) / len(ids)


def record(backend: Backend) -> list[tuple[Rollout, dict[str, float]]]:
    """Roll out and train, step after step."""
    trainer = _Trainer(backend)
    rollout = NativeEngine(trainer.model, [tiny.EOS], lambda ids: " ".join(map(str, ids)))
    steps = []
    for step in range(1, STEPS + 1):
        rollout.update_weights((), step)  # training's own tensors
        ids = torch.arange(len(PROMPTS) * GROUP)
        done = rollout.generate(PROMPTS, ids, Sampling(trainer.config.rollout.max_new_tokens), GROUP, seed=step)
        responses = [row.tolist() for row in done.response_ids.rows()]
        log_probs = [row.tolist() for row in done.log_probs.rows()]
        drawn = Rollout(responses, log_probs, [reward(response) for response in responses])
        steps.append((drawn, trainer.step(step, drawn)))
    return steps


def replay(backend: Backend, rollouts: list[Rollout]) -> Iterator[dict[str, float]]:
    """Train on recorded rollouts; the metrics of each step, with the distance to the recorded log-probs."""
    trainer = _Trainer(backend)
    for step, rollout in enumerate(rollouts, start=1):
        yield trainer.step(step, rollout)


class _Trainer:
    def __init__(self, backend: Backend) -> None:
        self.config, self.model = configuration(), tiny.decoder()
        self._single = Collectives.single()
        self._engine = tiny.engine(self.config, backend, self._single, self.model)

    def step(self, step: int, rollout: Rollout) -> dict[str, float]:
        slots = torch.arange(len(PROMPTS)).repeat_interleave(GROUP)
        prompts = Ragged.from_lists([torch.tensor(prompt) for prompt in PROMPTS], torch.int64)
        rewards = torch.tensor([reward(response) for response in rollout.response_ids])
        batch = Batch(
            {
                "group_id": slots,
                "slot": slots,
                "prompt_ids": prompts.take(slots),
                "response_ids": Ragged.from_lists(rollout.response_ids, torch.int64),
                "rollout_log_probs": Ragged.from_lists(rollout.log_probs, torch.float32),
                "reward": rewards,
                "failed": torch.zeros(len(slots), dtype=torch.bool),
            }
        )
        batch = batch.with_columns(**self._columns(batch))
        metrics = tiny.train(self._engine, self.config, batch, self._single, 1)
        return {"reward/mean": float(rewards.double().mean()), **metrics}

    def _columns(self, batch: Batch) -> dict[str, Any]:
        algorithm = self.config.algorithm
        old = self._engine.log_probs(batch, algorithm.mini_batches)
        return {"old_log_probs": old, **get_advantage(algorithm.advantage)(batch, algorithm, self._single)}


def to_json(steps: list[tuple[Rollout, dict[str, float]]]) -> str:
    """One line a response; log-probs to nine digits, which tell every float32 apart."""
    content = {
        "steps": [
            {
                "rollout": {
                    "response_ids": rollout.response_ids,
                    "log_probs": [[float(f"{x:.9g}") for x in row] for row in rollout.log_probs],
                    "rewards": rollout.rewards,
                },
                "metrics": {key: metrics[key] for key in COMPARED},
            }
            for rollout, metrics in steps
        ]
    }
    return json.dumps(content) + "\n"


def relative(found: float, recorded: float) -> float:
    """Their difference as a share of the recorded number, of a hundredth where that is smaller."""
    return abs(found - recorded) / max(abs(recorded), 1e-2)


def main() -> None:
    """Record into the package."""
    from siirl.device import select
    from siirl.validation.run import prepared

    with prepared(select("cpu"), "smoke") as subject:
        Path(__file__).with_name(FILE).write_text(to_json(record(subject.backend)), encoding="utf-8")


if __name__ == "__main__":
    main()
