"""What a run promises: the same samples for any number of workers, the same numbers twice, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.worker import runs

SGD = ("training.optimizer=sgd", "training.max_grad_norm=null", "training.lr=0.1")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return runs.write_recipe(tmp_path)


def test_one_and_two_workers_see_the_same_samples_and_reach_the_same_weights(recipe: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    uneven = (*SGD, "data.prompts_per_step=7", "logging.samples_per_step=100")
    runs.run(recipe, one, *uneven)
    runs.run(recipe, two, *uneven, "--workers", "2")
    assert runs.samples(one) == runs.samples(two)
    assert len(runs.samples(one)) == 3 * 28
    assert max(line["actor/grad_norm"] for line in runs.metrics(one)) > 0
    for name, tensor in runs.weights(one).items():
        torch.testing.assert_close(runs.weights(two)[name], tensor, atol=1e-5, rtol=0)
    moved = [line["data/redistributed_bytes"] for line in runs.metrics(two)]
    assert all("data/redistributed_bytes" not in line for line in runs.metrics(one))
    assert max(moved) > 0


@pytest.mark.parametrize(
    "pipeline", ["grpo", pytest.param("ppo", marks=pytest.mark.long), pytest.param("sft", marks=pytest.mark.long)]
)
def test_the_same_command_twice_gives_identical_metrics(pipeline: str, recipe: Path, tmp_path: Path) -> None:
    arguments = (f"pipeline={pipeline}", "--workers", "2", "data.prompts_per_step=8", "algorithm.mini_batches=2")
    runs.run(recipe, tmp_path / "a", *arguments)
    runs.run(recipe, tmp_path / "b", *arguments)
    assert runs.learned(tmp_path / "a") == runs.learned(tmp_path / "b")
    assert len(runs.metrics(tmp_path / "a")) == 3
    for name, tensor in runs.weights(tmp_path / "a").items():
        assert torch.equal(runs.weights(tmp_path / "b")[name], tensor)


def test_a_run_directory_holds_what_the_contract_names(recipe: Path, tmp_path: Path) -> None:
    runs.run(recipe, tmp_path / "run", "--workers", "2", "logging.report=true", "logging.tensorboard=true")
    found = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    expected = {
        "config.yaml", "plan.json", "metrics.jsonl", "report.html", "summary.json", "traces/trace.json",
        "samples/step_000001.jsonl", "logs/worker_000.log", "logs/worker_001.log",
        "checkpoints/step_000003/manifest.json", "model/model.safetensors", "model/config.json",
    }  # fmt: skip
    assert expected <= found
    assert any(name.startswith("tensorboard/") for name in found)
    assert not [name for name in found if name.endswith((".pt", ".pkl", ".bin", ".metadata"))]
    last = runs.metrics(tmp_path / "run")[-1]
    assert {
        "stage", "step", "reward/mean", "reward/std", "actor/loss", "actor/grad_norm", "actor/entropy", "actor/kl",
        "actor/clip_fraction", "rollout/logprob_diff_max", "rollout/logprob_diff_mean", "response/length_mean",
        "time/step_s", "time/rollout_s", "time/reward_s", "time/update_s", "time/redistribute_s",
        "time/sync_weights_s", "throughput/samples_per_s", "throughput/tokens_per_s", "data/redistributed_bytes",
        "memory/host_peak_bytes", "eval/reward_mean",
    } <= set(last)  # fmt: skip
    assert max(line["rollout/logprob_diff_max"] for line in runs.metrics(tmp_path / "run")) < 1e-4


@pytest.mark.parametrize("pipeline", ["grpo", pytest.param("ppo", marks=pytest.mark.long)])
def test_a_killed_worker_is_named_and_the_resumed_run_equals_one_never_killed(
    pipeline: str, recipe: Path, tmp_path: Path
) -> None:
    arguments = (
        f"pipeline={pipeline}", "--workers", "2", "training.steps=12", "training.lr_schedule=cosine",
        "checkpoint.every=2",
    )  # fmt: skip
    runs.run(recipe, tmp_path / "whole", *arguments)
    process = runs.start(recipe, tmp_path / "killed", *arguments)
    runs.wait_for_step(tmp_path / "killed", 3, process)
    pids = runs.worker_pids(process)
    os.kill(pids[1], signal.SIGKILL)
    killed_at = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - killed_at < 30
    assert process.returncode == 1
    assert "worker 1 was ended by SIGKILL after step" in said
    assert "--resume" in said
    assert said.count("\n") == 1 and "Traceback" not in said
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    runs.run(recipe, tmp_path / "killed", *arguments, "--resume")
    assert runs.learned(tmp_path / "killed") == runs.learned(tmp_path / "whole")
    for name, tensor in runs.weights(tmp_path / "whole").items():
        assert torch.equal(runs.weights(tmp_path / "killed")[name], tensor)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_ends_the_run_with_a_checkpoint(
    number: signal.Signals, status: int, workers: str, recipe: Path, tmp_path: Path
) -> None:
    arguments = ("--workers", workers, "training.steps=2000")
    process = runs.start(recipe, tmp_path / "run", *arguments)
    runs.wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert number.name in said
    last = runs.metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:06d}" / "manifest.json").is_file()
    runs.run(recipe, tmp_path / "run", "--workers", workers, f"training.steps={last + 1}", "--resume")
    assert [line["step"] for line in runs.metrics(tmp_path / "run")] == list(range(1, last + 2))


def test_a_run_continues_on_another_number_of_workers(recipe: Path, tmp_path: Path) -> None:
    sharded = ("training.sharding=shard", "checkpoint.every=2", *SGD)
    runs.run(recipe, tmp_path / "whole", "--workers", "2", "training.steps=4", *sharded)
    runs.run(recipe, tmp_path / "moved", "--workers", "2", "training.steps=2", *sharded)
    runs.run(recipe, tmp_path / "moved", "--workers", "1", "training.steps=4", *sharded, "--resume")
    for name, tensor in runs.weights(tmp_path / "whole").items():
        torch.testing.assert_close(runs.weights(tmp_path / "moved")[name], tensor, atol=1e-5, rtol=0)


def test_warm_up_stages_run_first_and_hand_their_model_on(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text() + "warmup: [{pipeline: sft, training: {steps: 2, lr: 0.5, optimizer: sgd}}]\n"
    recipe.write_text(text)
    runs.run(recipe, tmp_path / "run", "training.lr=0", "training.steps=1")
    runs.run(recipe, tmp_path / "cold", "training.lr=0", "training.steps=1", "warmup=null")
    assert [(line["stage"], line["step"]) for line in runs.metrics(tmp_path / "run")] == [
        ("warmup.0", 1), ("warmup.0", 2), ("main", 1),
    ]  # fmt: skip
    name = "model.embed_tokens.weight"
    assert not torch.equal(runs.weights(tmp_path / "run")[name], runs.weights(tmp_path / "cold")[name])
    assert "reward/mean" not in runs.metrics(tmp_path / "run")[0]


def test_a_reward_that_raises_or_hangs_costs_its_sample_and_not_the_run(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "import time\n"
        "def digits(prompt, response, sample):\n"
        "    if prompt.startswith('1'):\n"
        "        raise ValueError('no')\n"
        "    if prompt == '2+3=':\n"
        "        time.sleep(60)\n"
        "    return len(response)\n"
    )
    runs.run(recipe, tmp_path / "run", "data.prompts_per_step=90", "rollout.group_size=2", "training.steps=1",
             "reward.timeout_s=0.5", "logging.samples_per_step=180", "training.micro_batch_tokens=512")  # fmt: skip
    line = runs.metrics(tmp_path / "run")[0]
    rows = runs.samples(tmp_path / "run")
    failed = [row for row in rows if row["prompt"].startswith("1") or row["prompt"] == "2+3="]
    assert line["reward/failed"] == len(failed) > 2
    assert all(row["reward"] is None for row in failed)
    good = [row["reward"] for row in rows if row not in failed]
    assert line["reward/mean"] == pytest.approx(sum(good) / len(good))


def test_two_runs_do_not_share_a_directory(recipe: Path, tmp_path: Path) -> None:
    process = runs.start(recipe, tmp_path / "run", "training.steps=2000")
    runs.wait_for_step(tmp_path / "run", 1, process)
    said = runs.run(recipe, tmp_path / "run", "--resume", status=2)
    assert "another run is writing" in said
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert "holds a run already" in runs.run(recipe, tmp_path / "run", status=2)


def test_workers_leave_when_their_launcher_is_gone(recipe: Path, tmp_path: Path) -> None:
    process = runs.start(recipe, tmp_path / "run", "--workers", "2", "training.steps=2000")
    runs.wait_for_step(tmp_path / "run", 1, process)
    workers = [psutil.Process(pid) for pid in runs.worker_pids(process)]
    everyone = workers + [child for worker in workers for child in worker.children(recursive=True)]
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(everyone, timeout=20)
    assert not alive


def test_the_environment_launcher_is_one_worker_of_a_run(recipe: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "siirl"]
    command = [*torchrun, "train", str(recipe), "--launcher", "env", "--run-dir", str(tmp_path / "env"), *SGD]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    runs.run(recipe, tmp_path / "local", *SGD, "--workers", "2")
    assert runs.learned(tmp_path / "env") == runs.learned(tmp_path / "local")


def test_without_ray_the_extra_is_named(recipe: Path) -> None:
    ray = ["train", str(recipe), "--launcher", "ray"]
    code = f"import sys; sys.modules['ray'] = None; from siirl.cli.main import main; main({ray})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "siirl: error: --launcher ray needs Ray, which is not installed: pip install 'siirl[ray]'\n"


PIPELINE = """
name: branches
nodes:
  - {id: data, op: data, writes: [sample_id, group_id, slot, prompt_ids, row]}
  - {id: rollout, op: rollout, model: actor, reads: [prompt_ids], writes: [response_ids, rollout_log_probs]}
  - {id: long, op: "python:FOLDER/ops.py:length", reads: [response_ids], writes: [long]}
  - {id: bright, op: "python:FOLDER/ops.py:brightness", reads: [response_ids], writes: [bright]}
  - {id: both, op: "python:FOLDER/ops.py:join", reads: [long, bright], writes: [reward, failed]}
  - {id: seldom, op: "python:FOLDER/ops.py:note", every: 2, reads: [reward], writes: []}
  - {id: late, op: "python:FOLDER/ops.py:note", when: step > 2, params: {name: late}, reads: [reward], writes: []}
  - {id: advantage, op: advantage, reads: [reward, failed, group_id, response_ids], writes: [advantages]}
  - {id: update, op: update, model: actor, reads: [prompt_ids, response_ids, advantages, failed]}
  - {id: sync, op: sync_weights, model: actor, after: [update]}
"""

OPS = """
import torch
def length(batch, context):
    return {"long": batch.lengths("response_ids").float()}
def brightness(batch, context):
    return {"bright": torch.tensor([float(row.float().mean()) for row in batch["response_ids"].rows()])}
def join(batch, context):
    context.metrics.mean("reward/mean", float((batch["long"] + batch["bright"]).sum()), len(batch))
    return {"reward": batch["long"] + batch["bright"], "failed": torch.zeros(len(batch), dtype=torch.bool)}
def note(batch, context, name="seldom"):
    context.metrics.sum(f"custom/{name}", len(batch))
def broken(batch, context):
    return {"long": batch["nowhere"]}
"""


def test_a_pipeline_with_branches_a_join_and_conditions_runs_on_custom_ops(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "ops.py").write_text(OPS)
    (tmp_path / "branches.yaml").write_text(PIPELINE.replace("FOLDER", str(tmp_path)))
    runs.run(recipe, tmp_path / "run", "pipeline=branches.yaml", "training.steps=4", "--workers", "2")
    lines = runs.metrics(tmp_path / "run")
    assert [line.get("custom/seldom") for line in lines] == [None, 24, None, 24]
    assert [line.get("custom/late") for line in lines] == [None, None, 24, 24]
    assert all(line["reward/mean"] > 4 and line["actor/grad_norm"] > 0 for line in lines)


SPY = """
def see(batch, context):
    engine = context.models._rollout
    context.metrics.sum("custom/bytes", sum(p.nbytes for p in engine.decoder.parameters()))
"""


@pytest.mark.parametrize(("dtype", "asleep"), [("bfloat16", True), ("float32", False)])
def test_weights_that_only_generation_uses_are_not_in_memory_while_the_actor_is_updated(
    dtype: str, asleep: bool, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "ops.py").write_text(OPS + SPY)
    spy = f'  - {{id: spy, op: "python:{tmp_path}/ops.py:see", after: [update], reads: [response_ids]}}\n'
    spied = PIPELINE.replace("FOLDER", str(tmp_path))
    spied = spied.replace("  - {id: sync", f"{spy}  - {{id: sync")
    spied = spied.replace(
        "op: sync_weights, model: actor, after: [update]", "op: sync_weights, model: actor, after: [spy]"
    )
    (tmp_path / "spied.yaml").write_text(spied)
    runs.run(recipe, tmp_path / "run", "pipeline=spied.yaml", f"training.dtype={dtype}", "--workers", "1")
    assert all((line["custom/bytes"] == 0) == asleep for line in runs.metrics(tmp_path / "run"))


def test_an_error_in_a_custom_op_names_its_line(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "ops.py").write_text(OPS)
    (tmp_path / "branches.yaml").write_text(PIPELINE.replace("FOLDER", str(tmp_path)).replace(":length", ":broken"))
    for workers in ("1", "2"):
        said = runs.run(recipe, tmp_path / f"run{workers}", "pipeline=branches.yaml", "--workers", workers, status=1)
        assert "node 'long': 'broken' raised" in said and "ops.py:" in said
        assert said.count("\n") == 1 and "Traceback" not in said


def test_the_python_interface_returns_the_metrics(recipe: Path, tmp_path: Path) -> None:
    import siirl

    done = siirl.train(recipe, overrides={"training.steps": 2}, device="cpu", run_dir=tmp_path / "run")
    assert [line["step"] for line in done.metrics] == [1, 2]
    assert json.loads((done.dir / "plan.json").read_text())["workers"] == 1
