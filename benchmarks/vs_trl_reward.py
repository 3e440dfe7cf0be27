"""Seconds of GRPO until a small model adds two-digit numbers: siirl against TRL's GRPOTrainer.

A Qwen2 model (0.1M parameters) is warmed up once a seed, by supervised training on answers of which two in five are
wrong. From there each side trains by GRPO in float32 on the same prompts: 64 prompts with 8 responses a step, four
updates a step, AdamW at 5e-4, no KL, a reward of 1 for the very answer. The seconds count from the start of the first
step to the end of the first one at which the mean reward of the last five reaches the goal. The sides take turns.
See README.md for TRL's environment.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

from machine import machine
from trl_reward_side import score
from vs_trl import HOW, run_process

from siirl.config.yaml import dump_yaml
from siirl.errors import RequestError, SiirlError
from siirl.telemetry.metrics import read_metrics

HERE = Path(__file__).resolve().parent
PROMPTS, GROUP, UPDATES, NEW_TOKENS, LR, WINDOW = 64, 8, 4, 4, 5e-4, 5
MODEL = {"path": "tiny:qwen2:64:2:128", "initializer_range": 0.08}
QUIET = {
    "evaluation": {"at_end": False},
    "logging": {"tensorboard": False, "trace": False, "report": False, "samples_every": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150, help="of a run that does not reach the goal (default: 150)")
    parser.add_argument("--goal", type=float, default=0.9)
    parser.add_argument("--workers", type=int, default=2, help="of siirl, one thread each (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="of TRL (default: 2)")
    parser.add_argument("--trl-python", type=Path, help="the Python of TRL's environment")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    arguments = parser.parse_args()
    try:
        if arguments.trl_python is None or not arguments.trl_python.is_file():
            raise RequestError(f"TRL needs an environment of its own: {HOW}")
        rounds = [compare(seed, arguments) for seed in range(arguments.seeds)]
    except SiirlError as error:
        print(f"vs_trl_reward: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    medians = {side: statistics.median(found[side]["seconds_to_goal"] for found in rounds) for side in ("siirl", "trl")}
    print(f"\nseconds of GRPO to a mean reward of {arguments.goal}, median of {arguments.seeds} seeds")
    print(f"siirl {medians['siirl']:.1f}, TRL {medians['trl']:.1f}: {medians['siirl'] / medians['trl']:.2f} of TRL's")
    if arguments.json:
        given = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
        found = {**machine(), "settings": given, "medians": medians, "rounds": rounds}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def compare(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides from the same warmed-up model."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        model = warm_up(seed, directory)
        rows = problems(seed, arguments.steps * PROMPTS)
        sides = {
            "siirl": run_siirl(model, rows, seed, arguments, directory),
            "trl": run_trl(model, rows, seed, arguments, directory),
        }
    for side, found in sides.items():
        ends = range(WINDOW, len(found["seconds"]) + 1)
        reached = (end for end in ends if sum(found["rewards"][end - WINDOW : end]) / WINDOW >= arguments.goal)
        step = next(reached, None)
        found |= {"step": step, "seconds_to_goal": found["seconds"][(step or len(found["seconds"])) - 1]}
        said = f"{found['seconds_to_goal']:.1f} s, {step} steps" if step else "did not reach the goal"
        print(f"seed {seed}, {side}: {said}", file=sys.stderr)
    return {"seed": seed, **sides}


def problems(seed: int, count: int) -> list[dict[str, str]]:
    """Sums of two numbers of two digits; the answer has three, the last one first."""
    numbers = random.Random(seed)
    pairs = [(numbers.randrange(100), numbers.randrange(100)) for _ in range(count)]
    return [{"prompt": f"{x}+{y}=", "answer": f"{x + y:03d}"[::-1]} for x, y in pairs]


def warm_up(seed: int, directory: Path) -> Path:
    """The model that both sides begin with."""
    config = QUIET | {
        "device": "cpu",
        "threads_per_worker": 1,
        "seed": seed,
        "model": MODEL,
        "data": {"source": "arithmetic:addition?digits=2&reverse=true", "prompts_per_step": 128, "label_noise": 0.4},
        "pipeline": "sft",
        "rollout": {"max_new_tokens": NEW_TOKENS},
        "training": {"steps": 600, "lr": 2e-3, "lr_warmup_steps": 20},
    }
    return train(config, directory, "warm-up") / "model"


def run_siirl(
    model: Path, rows: list[dict[str, str]], seed: int, arguments: argparse.Namespace, directory: Path
) -> dict[str, Any]:
    source = directory / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = QUIET | {
        "device": "cpu",
        "workers": arguments.workers,
        "threads_per_worker": 1,
        "seed": seed,
        "model": {"path": str(model)},
        "data": {"source": str(source), "prompts_per_step": PROMPTS, "shuffle": False, "chat_template": False},
        "pipeline": "grpo",
        "algorithm": {"mini_batches": UPDATES},
        "rollout": {"group_size": GROUP, "max_new_tokens": NEW_TOKENS},
        "training": {"steps": arguments.steps, "lr": LR},
        "reward": {"function": f"{HERE / 'trl_reward_side.py'}:{score.__name__}"},
        "checkpoint": {"save_last": False},
    }
    metrics = read_metrics(train(config, directory, "grpo"))
    return {
        "seconds": list(accumulate(step["time/step_s"] for step in metrics)),
        "rewards": [step["reward/mean"] for step in metrics],
    }


def train(config: dict[str, Any], directory: Path, name: str) -> Path:
    """A run of ``siirl train``; its directory."""
    recipe, run_dir = directory / f"{name}.yaml", directory / name
    recipe.write_text(dump_yaml(config))
    run_process([sys.executable, "-m", "siirl", "train", recipe, "--run-dir", run_dir], "siirl", 1)
    return run_dir


def run_trl(
    model: Path, rows: list[dict[str, str]], seed: int, arguments: argparse.Namespace, directory: Path
) -> dict[str, Any]:
    work = {
        "model": str(model),
        "prompts": [row["prompt"] for row in rows],
        "answers": [row["answer"] for row in rows],
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "max_new_tokens": NEW_TOKENS,
        "steps": arguments.steps,
        "updates": UPDATES,
        "lr": LR,
        "seed": seed,
        "threads": arguments.threads,
        "goal": arguments.goal,
        "window": WINDOW,
    }
    file = directory / "work.json"
    file.write_text(json.dumps(work))
    command = [arguments.trl_python, HERE / "trl_reward_side.py", file]
    return json.loads(run_process(command, "TRL", arguments.threads).splitlines()[-1])


if __name__ == "__main__":
    main()
