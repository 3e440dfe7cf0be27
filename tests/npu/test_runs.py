"""Real runs on the simulated device: they learn what runs on the host learn, and go on there from where these ended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import simulated_npu
from tests.worker import runs

QUICKSTART = Path(__file__).parents[2] / "configs/recipes/quickstart.yaml"
# The quickstart in short: one digit instead of two, half the width, fewer steps.
SHORT = (
    "workers=2",
    "threads_per_worker=1",
    "model.path=tiny:qwen3:64:2:99",
    "model.initializer_range=0.08",
    "data.source=arithmetic:addition?digits=1",
    "data.prompts_per_step=16",
    "data.max_prompt_tokens=4",
    "data.held_out=20",
    "rollout.max_new_tokens=3",
    "training.lr_schedule=constant",
    "algorithm.mini_batches=2",
    "evaluation.every=0",
    "warmup.0.data.prompts_per_step=64",
    "logging.tensorboard=false",
    "logging.report=false",
)
# Bits are not equal: the fused ops round fewer times than what they stand for, and add up in another order. Training
# multiplies what it begins with, 1e-8 of a loss in the first step, by a third in each step; the lengths below end at
# 1e-5 of a loss and 1e-4 of a gradient's size.
TOLERANCE = 5e-4
CLOSE = ("actor/loss", "actor/grad_norm", "actor/entropy", "critic/loss")


def quickstart(run_dir: Path, device: str, steps: int, warmup: int, *arguments: str) -> list[dict[str, Any]]:
    steps_of = (f"training.steps={steps}", f"warmup.0.training.steps={warmup}")
    runs.run(QUICKSTART, run_dir, *SHORT, *steps_of, "--device", device, *arguments)
    return runs.metrics(run_dir)


def assert_same_curve(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert [(line["stage"], line["step"]) for line in ours] == [(line["stage"], line["step"]) for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        where = (mine["stage"], mine["step"])
        # tokens come from the same uniform numbers: one that lies within a rounding of a boundary may fall elsewhere
        assert mine.get("reward/mean", 0) == pytest.approx(other.get("reward/mean", 0), abs=0.02), where
        for key in CLOSE:
            if key in other:
                assert mine[key] == pytest.approx(other[key], rel=TOLERANCE, abs=TOLERANCE), (where, key)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["grpo", pytest.param("ppo", marks=pytest.mark.long)])
def test_the_learning_curve_is_the_hosts(pipeline: str, npu: None, tmp_path: Path) -> None:
    """Supervised steps, then GRPO or PPO; PPO with its weights sharded over both devices."""
    arguments = [f"pipeline={pipeline}", *(["training.sharding=shard"] if pipeline == "ppo" else [])]
    steps, warmup = (6, 25) if pipeline == "grpo" else (4, 10)
    device = quickstart(tmp_path / "npu", "npu", steps, warmup, *arguments)
    host = quickstart(tmp_path / "cpu", "cpu", steps, warmup, *arguments)
    assert_same_curve(device, host)
    supervised = [line["actor/loss"] for line in device if line["stage"] == "warmup.0"]
    assert supervised[-1] < 0.5 * supervised[0]
    if pipeline == "grpo":
        # a model that had learned nothing would guess one answer of 99 characters and more
        assert min(line["reward/mean"] for line in device if line["stage"] == "main") > 0.03
    assert all(line["memory/device_peak_bytes"] > 0 for line in device if line["stage"] == "main")
    log = (tmp_path / "npu/logs/worker_001.log").read_text()
    assert "'packed_attention': 'ascend'" in log


@pytest.mark.slow
def test_a_run_goes_on_from_the_device_to_the_host_and_back(npu: None, tmp_path: Path) -> None:
    recipe = runs.write_recipe(tmp_path)
    arguments = ("pipeline=ppo", "--workers", "2", "data.prompts_per_step=8", "algorithm.mini_batches=2")
    moved = tmp_path / "moved"
    for steps, device in ((2, "npu"), (4, "cpu"), (6, "npu")):
        resume = ["--resume"] if steps > 2 else []
        runs.run(recipe, moved, *arguments, f"training.steps={steps}", "--device", device, *resume)
    stayed = tmp_path / "stayed"
    runs.run(recipe, stayed, *arguments, "training.steps=6", "--device", "cpu")
    assert [line["step"] for line in runs.metrics(moved)] == [1, 2, 3, 4, 5, 6]
    assert_same_curve(runs.metrics(moved), runs.metrics(stayed))
    log = (moved / "logs/worker_000.log").read_text()
    for there, here in (("npu", "cpu"), ("cpu", "npu")):
        assert f"the checkpoint is of device {there}: the generators of {here} are seeded anew, not restored" in log
    assert generated(moved / "model", "npu") == generated(moved / "model", "cpu") != ""


def generated(model: Path, device: str) -> str:
    asked = ["--prompt", "1+2=", "--max-new-tokens", "8", "--temperature", "0", "--device", device]
    done = subprocess.run(
        [sys.executable, "-m", "siirl", "generate", str(model), *asked], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_counters_of_two_runs_are_equal(npu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = runs.write_recipe(tmp_path)
    counted = []
    for name in ("one", "two"):
        for key, value in simulated_npu.environment(report=tmp_path / name).items():
            monkeypatch.setenv(key, value)
        runs.run(recipe, tmp_path / "run", "--workers", "2", "--device", "npu")
        shutil.rmtree(tmp_path / "run")
        counted.append([json.loads((tmp_path / name / f"{rank}.json").read_text()) for rank in (0, 1)])
    one, two = counted
    assert one == two
    for rank in one:
        assert rank["fallbacks"] == {}
        assert min(rank["fused"].values()) > 0 and len(rank["fused"]) == 4
        assert rank["collectives"]["all_reduce"]["bytes"] > 0
        assert rank["memory"]["peak_bytes"] > rank["memory"]["live_bytes"] > 0


@pytest.mark.slow
def test_a_device_too_small_for_the_model_ends_the_run_with_a_sentence(
    npu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in simulated_npu.environment(memory_bytes=200_000).items():
        monkeypatch.setenv(key, value)
    said = runs.run(runs.write_recipe(tmp_path), tmp_path / "run", "--device", "npu", status=1)
    assert "worker 0 has no memory left on npu:0: lower training.micro_batch_tokens or" in said
    assert "NPU out of memory. Tried to allocate" in said and "Traceback" not in said


@pytest.mark.slow
def test_the_device_keeps_every_promise_that_siirl_validate_asks_for(npu: None, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "siirl", "validate", "--device", "npu", "--report", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "device 'npu' keeps" in done.stdout
