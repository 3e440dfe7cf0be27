"""Generation and training on different workers: the same results, whoever is slow, however the run ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker import runs, test_learning

SLOW = """
import time
import torch

def consumer(batch, context):
    time.sleep(0.25)
    return {"seen": torch.ones(len(batch))}

def producer(prompt, response, sample):
    time.sleep(0.01)
    return sum(character.isdigit() for character in response) + 0.1 * len(response)
"""


def disaggregated(workers: int, generating: int, staleness: int = 0) -> list[str]:
    return [
        "placement=disaggregated",
        f"workers={workers}",
        f"rollout.workers={generating}",
        f"rollout.max_staleness={staleness}",
    ]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return runs.write_recipe(tmp_path)


def with_slow_training(folder: Path) -> str:
    """A pipeline as GRPO's with a node in the way of the update that takes a quarter of a second."""
    shipped = (Path(__file__).parents[2] / "configs" / "pipelines" / "grpo.yaml").read_text()
    (folder / "slow.py").write_text(SLOW)
    node = f"""  - id: slow
    op: python:{folder}/slow.py:consumer
    layout: tokens
    reads: [response_ids]
    writes: [seen]

  - id: update
"""
    head, _, tail = shipped.partition("  - id: update\n")
    tail = tail.replace("policy_version,", "policy_version, seen,")
    (folder / "slow.yaml").write_text(head + node + tail)
    return f"pipeline={folder}/slow.yaml"


def close(a: list[dict[str, Any]], b: list[dict[str, Any]], tolerance: float, leave: set[str]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() - leave == other.keys() - leave
        for key in one.keys() - leave - {"stage"}:
            assert one[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), (one["step"], key)


@pytest.mark.parametrize("pipeline", ["grpo", pytest.param("ppo", marks=pytest.mark.long)])
def test_where_the_workers_are_changes_nothing(pipeline: str, recipe: Path, tmp_path: Path) -> None:
    """At staleness 0 only sums over other numbers of workers may round differently."""
    arguments = [f"pipeline={pipeline}", "algorithm.mini_batches=2", "evaluation.every=2"]
    runs.run(recipe, tmp_path / "together", *arguments, "workers=2")
    expected = runs.learned(tmp_path / "together")
    for workers, generating in ((2, 1), (3, 2), (3, 1)):
        folder = tmp_path / f"{workers}-{generating}"
        runs.run(recipe, folder, *arguments, *disaggregated(workers, generating))
        close(expected, runs.learned(folder), 1e-3, leave={"data/redistributed_bytes"})
        assert runs.samples(folder) == runs.samples(tmp_path / "together")
        for name, weight in runs.weights(folder).items():
            torch.testing.assert_close(weight, runs.weights(tmp_path / "together")[name], rtol=1e-3, atol=1e-4)


def test_samples_have_the_age_that_is_asked_for_however_slow_anybody_is(recipe: Path, tmp_path: Path) -> None:
    """Step n is drawn with the weights after step n - 1 - k: slow training or slow generation changes no number."""
    slow = with_slow_training(tmp_path)
    slow_reward = f"reward.function={tmp_path}/slow.py:producer"
    runs.run(recipe, tmp_path / "fast", "training.steps=6", *disaggregated(2, 1, staleness=2))
    runs.run(recipe, tmp_path / "slow training", "training.steps=6", slow, *disaggregated(2, 1, staleness=2))
    runs.run(recipe, tmp_path / "slow rewards", "training.steps=6", slow_reward, *disaggregated(2, 1, staleness=2))
    learned = runs.learned(tmp_path / "fast")
    assert [line["rollout/staleness_max"] for line in learned] == [0, 1, 2, 2, 2, 2]
    assert [line["rollout/staleness_mean"] for line in learned] == [0, 1, 2, 2, 2, 2]
    close(learned, runs.learned(tmp_path / "slow training"), 0, leave={"data/redistributed_bytes"})
    close(learned, runs.learned(tmp_path / "slow rewards"), 0, leave=set())


def spans(run_dir: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """Begin and end of each node in each step, microseconds on one clock."""
    trace = json.loads((run_dir / "traces" / "trace.json").read_text())["traceEvents"]
    found = [event for event in trace if event["ph"] == "X" and "step" in event["args"]]
    return {(e["name"], e["args"]["step"]): (e["ts"], e["ts"] + e["dur"]) for e in found}


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_generation_runs_ahead_and_the_queue_is_bounded(staleness: int, recipe: Path, tmp_path: Path) -> None:
    slow = with_slow_training(tmp_path)
    runs.run(recipe, tmp_path / "run", "training.steps=7", slow, *disaggregated(2, 1, staleness))
    times = spans(tmp_path / "run")
    for number in range(2 + staleness, 8):
        generated = times["rollout", number][0]
        assert generated > times["update", number - 1 - staleness][1], "it waits for a slow consumer"
        if staleness:
            assert generated < times["slow", number - staleness][1], "it does not wait for the step that is trained on"


@pytest.mark.parametrize("staleness", [0, 2])
def test_killed_and_resumed_is_the_same_run(staleness: int, recipe: Path, tmp_path: Path) -> None:
    """What was generated ahead is a part of the checkpoint."""
    arguments = ["training.steps=8", "checkpoint.every=2", "evaluation.every=3", *disaggregated(3, 2, staleness)]
    runs.run(recipe, tmp_path / "whole", *arguments)
    process = runs.start(recipe, tmp_path / "killed", with_slow_training(tmp_path), *arguments)
    runs.wait_for_step(tmp_path / "killed", 5, process)
    runs.kill([process.pid, *runs.worker_pids(process)])
    process.communicate()
    runs.run(recipe, tmp_path / "killed", "--resume", *arguments)
    close(runs.learned(tmp_path / "whole"), runs.learned(tmp_path / "killed"), 0, leave={"data/redistributed_bytes"})
    killed = runs.weights(tmp_path / "killed")
    assert all(torch.equal(weight, killed[name]) for name, weight in runs.weights(tmp_path / "whole").items())


def test_a_run_goes_on_with_other_workers_and_in_another_placement(recipe: Path, tmp_path: Path) -> None:
    """Every prompt is drawn once: steps generated ahead are drawn again where their workers are gone."""
    folder = tmp_path / "run"
    arguments = ["checkpoint.every=2", "checkpoint.save_last=true"]
    changes = [disaggregated(3, 2, 2), disaggregated(2, 1, 1), ["workers=2"], disaggregated(3, 1, 1)]
    for number, placed in enumerate(changes, start=1):
        resume = ["--resume"] if number > 1 else []
        runs.run(recipe, folder, *resume, *arguments, f"training.steps={2 * number}", *placed)
    assert [line["step"] for line in runs.metrics(folder)] == list(range(1, 9))
    prompts = [sample["sample_id"] >> 20 for sample in runs.samples(folder)]
    assert sorted(prompts) == sorted(4 * list(range(8 * 6)))


def test_it_stops_when_it_is_asked_to(recipe: Path, tmp_path: Path) -> None:
    arguments = ["training.steps=500", *disaggregated(2, 1, 2)]
    process = runs.start(recipe, tmp_path / "run", *arguments)
    runs.wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    last = runs.metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:06d}").is_dir()
    runs.run(recipe, tmp_path / "run", "--resume", f"training.steps={last + 2}", *disaggregated(2, 1, 2))
    assert [line["step"] for line in runs.metrics(tmp_path / "run")] == list(range(1, last + 3))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_worker_ends_the_run_with_a_sentence(rank: int, recipe: Path, tmp_path: Path) -> None:
    process = runs.start(recipe, tmp_path / "run", "training.steps=500", *disaggregated(2, 1, 2))
    runs.wait_for_step(tmp_path / "run", 2, process)
    runs.kill([runs.worker_pids(process)[rank]])
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith(f"siirl: error: worker {rank} ")
    assert "Traceback" not in said


def test_weights_that_are_sharded_come_whole(recipe: Path, tmp_path: Path) -> None:
    runs.run(recipe, tmp_path / "whole", *disaggregated(3, 1, 1))
    runs.run(recipe, tmp_path / "sharded", "training.sharding=shard", *disaggregated(3, 1, 1))
    close(runs.learned(tmp_path / "whole"), runs.learned(tmp_path / "sharded"), 1e-4, leave=set())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rollout.max_staleness=1"], "set placement=disaggregated"),
        (["placement=disaggregated"], "set workers=2 or more"),
        (disaggregated(3, 3), "set workers=4 or more"),
        (["pipeline=dapo", *disaggregated(2, 1)], "node 'keep': keeps groups from step to step"),
    ],
)
def test_what_cannot_be_placed(arguments: list[str], says: str, recipe: Path, tmp_path: Path) -> None:
    said = runs.run(recipe, tmp_path / "run", *arguments, status=2)
    assert said.startswith("siirl: error: ") and said.count("\n") == 1
    assert says in said


@pytest.mark.parametrize("staleness", [0, 1])
def test_it_learns(staleness: int, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(test_learning.RECIPE.replace("PIPELINE", "grpo"))
    first, last = test_learning.rewards(recipe, tmp_path / "learns", *disaggregated(2, 1, staleness))
    assert first < 0.6
    assert last > first + 0.25
