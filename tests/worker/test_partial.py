"""Partial rollout over workers: the longest responses go on in the next step, and no sample is lost or seen twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.worker import runs

GROUP, WANTED, EXTRA = 4, 6, 3
SGD = ("training.optimizer=sgd", "training.lr=0.05")
# responses of 1 to 24 tokens: an eleventh of the draws ends one
LONG = ("rollout.max_new_tokens=24", "rollout.stop_ids=[40,41,42,43,44,45,46,47,48]", "training.micro_batch_tokens=128")
USUAL = (*LONG, f"rollout.partial={EXTRA / WANTED}", *SGD, "training.steps=6", "evaluation.at_end=false")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    runs.run(recipe, run_dir, *USUAL, "--workers", "2")
    return run_dir


def trained(run_dir: Path) -> list[list[int]]:
    """Sample ids of each step."""
    steps: dict[int, list[int]] = {}
    for sample in runs.samples(run_dir):
        steps.setdefault(sample["step"], []).append(sample["sample_id"])
    return [sorted(steps[step]) for step in sorted(steps)]


def carried(run_dir: Path) -> list[dict[str, torch.Tensor]]:
    last = max((run_dir / "checkpoints").glob("step_*"))
    return [load_file(file) for file in sorted(last.glob("worker_*.safetensors"))]


def test_every_group_is_trained_on_once_or_still_carried(whole: Path) -> None:
    steps = trained(whole)
    assert [len(samples) for samples in steps] == [WANTED * GROUP] * 6
    seen = [sample for samples in steps for sample in samples]
    waiting = [int(s) for held in carried(whole) for s in held["prompts.sample_id"]]
    expected = {first + response for first in waiting for response in range(GROUP)}
    assert len(set(seen)) == len(seen) and not expected & set(seen)
    prompts = {sample >> 20 for sample in seen} | {sample >> 20 for sample in waiting}
    # the first step began WANTED + EXTRA prompts, each other one WANTED
    assert prompts == set(range(6 * WANTED + EXTRA))


def test_what_is_carried_is_older_and_says_so(whole: Path) -> None:
    lines = runs.metrics(whole)
    assert all(line["rollout/carried_groups"] == EXTRA for line in lines)
    assert lines[0]["rollout/staleness_max"] == 0
    assert max(line["rollout/staleness_max"] for line in lines) >= 1


def test_rows_that_were_not_carried_are_compared_with_training(recipe: Path, whole: Path, tmp_path: Path) -> None:
    runs.run(recipe, tmp_path / "run", *USUAL, "algorithm.mini_batches=2", "training.steps=3", "--workers", "2")
    for line in [*runs.metrics(whole), *runs.metrics(tmp_path / "run")]:
        # carried rows, or log-probs behind an update, would be apart by as much as a step of training makes
        assert 0 < line["rollout/logprob_diff_max"] < 1e-4
        assert line["rollout/ratio_mean"] == pytest.approx(1, abs=1e-4)


def test_a_killed_run_goes_on_with_what_it_carried(recipe: Path, whole: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    runs.run(recipe, killed, *USUAL, "training.steps=3", "--workers", "2")
    runs.run(recipe, killed, *USUAL, "--workers", "2", "--resume")
    assert runs.learned(killed) == runs.learned(whole)
    for name, tensor in runs.weights(whole).items():
        assert torch.equal(runs.weights(killed)[name], tensor)
    said = runs.run(recipe, killed, *LONG, "training.steps=8", "--workers", "2", "--resume", status=2)
    assert "holds groups of rollout.partial for later steps, and this run has no rollout.partial" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["pipeline=dapo"], "has rounds of its own, across which nothing is carried; set rollout.partial=0"),
        (["placement=disaggregated"], "set rollout.partial=0 or placement=colocated"),
        (["rollout.engine=vllm"], "rollout.partial needs rollout.engine=native"),
    ],
)
def test_what_cannot_be_carried_is_refused(options: list[str], sentence: str, recipe: Path, tmp_path: Path) -> None:
    said = runs.run(recipe, tmp_path / "run", *USUAL, *options, "--workers", "2", status=2)
    assert sentence in said and said.count("\n") == 1
