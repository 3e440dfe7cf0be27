"""Short real runs through the command line, as a user would start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

# What a machine decides, not the run.
_MEASURED = ("time/", "memory/", "throughput/")

RECIPE = """
device: cpu
threads_per_worker: 1
model: {path: "tiny:qwen3:32:2:99", initializer_range: 0.2}
data: {source: "arithmetic:addition?digits=1", prompts_per_step: 6, max_prompt_tokens: 4, held_out: 10}
rollout: {group_size: 4, max_new_tokens: 4}
training: {steps: 3, lr: 1e-2, micro_batch_tokens: 64}
logging: {tensorboard: false, report: false, samples_every: 1}
reward: {function: "REWARD"}
"""

# Rewards of tiny random models that differ within a group, so that there is something to learn from.
REWARD = """
def digits(prompt, response, sample):
    return sum(character.isdigit() for character in response) + 0.1 * len(response)
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    (folder / "rewards.py").write_text(REWARD)
    recipe = folder / "recipe.yaml"
    recipe.write_text(text.replace("REWARD", f"{folder}/rewards.py:digits"))
    return recipe


def start(recipe: Path, run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "siirl", "train", str(recipe), "--run-dir", str(run_dir), *arguments]
    pipe = subprocess.PIPE
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=recipe.parent)


def run(recipe: Path, run_dir: Path, *arguments: str, status: int = 0) -> str:
    """Run to the end; standard error."""
    process = start(recipe, run_dir, *arguments)
    _, said = process.communicate(timeout=200)
    assert process.returncode == status, said
    return said


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def learned(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics that a run decides, without those that the machine does."""
    return [{k: v for k, v in line.items() if not k.startswith(_MEASURED)} for line in metrics(run_dir)]


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def samples(run_dir: Path) -> list[dict[str, Any]]:
    files = sorted((run_dir / "samples").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str], stage: str = "main") -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if any(f'"stage":"{stage}","step":{step},' in line for line in lines):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached: {process.poll()}")


def worker_pids(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the workers that a launcher has started, by rank."""
    import psutil

    children = psutil.Process(process.pid).children()
    ranks = {int(c.environ()["RANK"]): c.pid for c in children if "siirl.worker" in c.cmdline()}
    return [ranks[rank] for rank in sorted(ranks)]


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
