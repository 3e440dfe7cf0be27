"""Dynamic sampling over several workers: no sample is lost or seen twice, whatever happens to the run."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker import runs, sampled_runs
from tests.worker.sampled_runs import SGD, USUAL, account, by_step, last_checkpoint, leftovers, probes, total

GROUP, WANTED = 4, 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sampled_runs.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run with one, two and three workers."""
    folder = tmp_path_factory.mktemp("runs")
    for workers in (1, 2, 3):
        runs.run(recipe, folder / str(workers), *USUAL, "--workers", str(workers))
    return {workers: folder / str(workers) for workers in (1, 2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_sample_is_trained_on_once_or_filtered_or_left_over(workers: int, whole: dict[int, Path]) -> None:
    run = whole[workers]
    assert account(run) == ([], [])
    lines = runs.metrics(run)
    assert total(run, "filtered") > 0 and max(line["sampling/leftover_groups"] for line in lines) > 0
    assert total(run, "generated") == total(run, "kept") + total(run, "filtered")
    assert total(run, "kept") == total(run, "trained") + lines[-1]["sampling/leftover_groups"]
    assert sum(len(probe["sample_id"]) for probe in probes(run, "generated")) == GROUP * total(run, "generated")
    assert all(line["sampling/trained_groups"] == WANTED for line in lines)
    left = [0.0, *(line["sampling/leftover_groups"] for line in lines)]
    assert max(left) <= math.ceil(WANTED * 2) - WANTED
    for before, line in zip(left, lines, strict=False):
        if line["sampling/rounds"] == 1:
            assert line["sampling/generated_groups"] == math.ceil((WANTED - before) * 2)


def test_any_number_of_workers_generates_and_trains_on_the_same_samples(whole: dict[int, Path]) -> None:
    def seen(run: Path, name: str) -> dict[int, list[int]]:
        return {step: sorted(samples) for step, samples in by_step(probes(run, name), "sample_id").items()}

    for workers in (2, 3):
        for name in ("generated", "trained"):
            assert seen(whole[workers], name) == seen(whole[1], name)
        for one, line in zip(runs.learned(whole[1]), runs.learned(whole[workers]), strict=True):
            assert {k: v for k, v in line.items() if k.startswith("sampling/")} == {
                k: v for k, v in one.items() if k.startswith("sampling/")
            }
            gone = {"stage", "data/redistributed_bytes", "rollout/logprob_diff_max", "rollout/logprob_diff_mean"}
            assert {k: v for k, v in line.items() if k not in gone} == pytest.approx(
                {k: v for k, v in one.items() if k not in gone}, abs=1e-4, rel=1e-4
            )
        for name, tensor in runs.weights(whole[1]).items():
            torch.testing.assert_close(runs.weights(whole[workers])[name], tensor, atol=1e-5, rtol=0)


def test_the_oldest_groups_are_trained_on_first_with_the_log_probs_of_their_own_policy(whole: dict[int, Path]) -> None:
    born = {s: probe["step"] for probe in probes(whole[2], "generated") for s in probe["sample_id"]}
    trained = probes(whole[2], "trained")
    groups = by_step(trained, "group_id")
    assert all(max(groups[step]) < min(groups[after]) for step, after in pairwise(sorted(groups)))
    ages = []
    for probe in trained:
        assert probe["policy_version"] == [born[sample] - 1 for sample in probe["sample_id"]]
        for version, gap in zip(probe["policy_version"], probe["gap"], strict=True):
            ages.append(probe["step"] - 1 - version)
            assert gap == 0 if ages[-1] else gap < 1e-4
    assert 0 < max(ages) == max(line["rollout/staleness_max"] for line in runs.metrics(whole[2]))
    for line in runs.metrics(whole[2]):  # new weights against old samples: their ratio is not that of fresh ones
        assert line["rollout/staleness_max"] == 0 or line["actor/ratio_max"] > 1.001


def test_slots_are_those_of_a_full_step(whole: dict[int, Path]) -> None:
    for slots in by_step(probes(whole[3], "trained"), "slot").values():
        assert sorted(slots) == [slot for slot in range(WANTED) for _ in range(GROUP)]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_leftovers_and_equals_one_never_killed(
    recipe: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    process = runs.start(recipe, killed, *USUAL, "training.steps=2000", "checkpoint.every=1", "--workers", "2")
    runs.wait_for_step(killed, 3, process)
    runs.kill(runs.worker_pids(process))
    process.communicate(timeout=60)
    waiting = leftovers(last_checkpoint(killed))
    assert waiting, "the checkpoint that the run goes on from has leftovers"
    # as many steps as the other run: what was done beyond them would be no resumption
    done = int(last_checkpoint(killed).name.removeprefix("step_"))
    steps = max(7, done + 2)
    runs.run(recipe, killed, *USUAL, f"training.steps={steps}", "--workers", "2", "--resume")
    reference = whole[2]
    if steps != 7:
        reference = tmp_path / "longer"
        runs.run(recipe, reference, *USUAL, f"training.steps={steps}", "--workers", "2")
    assert runs.learned(killed) == runs.learned(reference)
    for name, tensor in runs.weights(reference).items():
        assert torch.equal(runs.weights(killed)[name], tensor)
    assert leftovers(last_checkpoint(killed)) == leftovers(last_checkpoint(reference))
    assert account(killed) == ([], [])


@pytest.mark.slow
def test_leftovers_find_a_worker_when_their_number_changes(
    recipe: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    runs.run(recipe, moved, *USUAL, "training.steps=3", "--workers", "3")
    assert leftovers(last_checkpoint(moved))
    runs.run(recipe, moved, *USUAL, "--workers", "2", "--resume")
    assert account(moved) == ([], [])
    for name, tensor in runs.weights(whole[1]).items():
        torch.testing.assert_close(runs.weights(moved)[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_checkpoint_whose_rows_would_be_lost_or_misread_is_refused(recipe: Path, tmp_path: Path) -> None:
    run, apart = tmp_path / "run", tmp_path / "apart"
    runs.run(recipe, run, *USUAL, "training.steps=2", "--workers", "2")
    waiting = leftovers(last_checkpoint(run))
    assert waiting
    said = runs.run(recipe, run, *USUAL, "pipeline=grpo", "--workers", "2", "--resume", status=2)
    assert "holds groups of dynamic_sampling for later steps, and this run has no dynamic_sampling" in said
    assert said.count("\n") == 1 and leftovers(last_checkpoint(run)) == waiting
    ahead = ("pipeline=grpo", "placement=disaggregated", "rollout.max_staleness=1")
    runs.run(recipe, apart, *SGD, *ahead, "training.steps=2", "--workers", "2")
    said = runs.run(recipe, apart, *USUAL, "--workers", "2", "--resume", status=2)
    assert "is of a disaggregated placement" in said and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_account_finds_leftovers_that_were_dropped(workers: int, tmp_path: Path) -> None:
    broken = sampled_runs.write_recipe(tmp_path, leftovers_lost=True)
    runs.run(broken, tmp_path / "run", *USUAL, "--workers", str(workers))
    lost, repeated = account(tmp_path / "run")
    assert len(lost) == GROUP * total(tmp_path / "run", "leftover") > 0
    assert repeated == []


@pytest.mark.slow
def test_workers_with_few_groups_or_none_make_as_many_micro_batches_as_the_others(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sizes = ("data.prompts_per_step=3", "rollout.group_size=2", "training.micro_batch_tokens=8")
    limits = ("algorithm.max_rounds=1", "algorithm.oversample=1", "training.sharding=shard", "training.steps=8")
    said = runs.run(recipe, run, *SGD, *sizes, *limits, "--workers", "3")
    assert account(run) == ([], [])
    assert not said
    steps: dict[int, list[dict[str, Any]]] = {}
    for probe in probes(run, "trained"):
        steps.setdefault(probe["step"], []).append(probe)
    assert [len(workers) for workers in steps.values()] == [3] * 8
    rows = [[len(probe["sample_id"]) for probe in workers] for workers in steps.values()]
    assert any(min(counts) == 0 < max(counts) for counts in rows), "a worker has no row while another one has"
    assert any(max(counts) >= 2 for counts in rows)
    for workers in steps.values():
        assert len({tuple(probe["micro_batches"]) for probe in workers}) == 1
    short = [line["sampling/trained_groups"] for line in runs.metrics(run)]
    assert min(short) < 3
    log = (run / "logs" / "worker_000.log").read_text()
    assert f"{short[0]:.0f} of 3 groups passed the filter in 1 rounds of generation (algorithm.max_rounds)" in log


@pytest.mark.slow
def test_a_step_that_leftovers_fill_generates_nothing(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.run(recipe, run, *SGD, "algorithm.oversample=6", "training.steps=5", "--workers", "2")
    assert account(run) == ([], [])
    lines = runs.metrics(run)
    idle = [line for line in lines if line["sampling/rounds"] == 0]
    assert idle and all(line["sampling/generated_groups"] == 0 for line in idle)
    assert all(line["sampling/trained_groups"] == WANTED for line in lines)
    assert all("reward/mean" not in line for line in idle)
