"""Where old log-probs come from: recomputed, trusted while rollout and training agree, or corrected for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.worker import runs

TWO_UPDATES = "algorithm.mini_batches=2"
TRUST = ("algorithm.old_log_probs=trust", TWO_UPDATES)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return runs.write_recipe(tmp_path)


@pytest.mark.slow
def test_trust_skips_the_pass_but_now_and_then(recipe: Path, tmp_path: Path) -> None:
    """Two workers; what is trusted is right to rounding, so that the run is that of recomputing it."""
    arguments = ("training.steps=5", "--workers", "2", TWO_UPDATES, *TRUST, "training.optimizer=sgd")
    runs.run(recipe, tmp_path / "trust", *arguments, "algorithm.trust_every=3")
    runs.run(recipe, tmp_path / "recompute", *arguments, "algorithm.old_log_probs=recompute")
    lines = runs.metrics(tmp_path / "trust")
    assert [line["rollout/trusted"] for line in lines] == [0, 1, 1, 0, 1]
    for line, other in zip(lines, runs.metrics(tmp_path / "recompute"), strict=True):
        measured = not line["rollout/trusted"]
        assert ("rollout/logprob_diff_max" in line) == ("rollout/ratio_mean" in line) == measured
        assert "rollout/trusted" not in other and other["rollout/ratio_mean"] == pytest.approx(1, abs=1e-4)
        assert line["actor/loss"] == pytest.approx(other["actor/loss"], abs=1e-4)
    for name, weight in runs.weights(tmp_path / "trust").items():
        torch.testing.assert_close(weight, runs.weights(tmp_path / "recompute")[name], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_beyond_the_bound_it_recomputes_and_says_so(recipe: Path, tmp_path: Path) -> None:
    """The two add up in other orders, which shows beyond a billionth of a nat."""
    runs.run(recipe, tmp_path / "run", *TRUST, "algorithm.trust_bound=1e-9")
    lines = runs.metrics(tmp_path / "run")
    assert [line["rollout/trusted"] for line in lines] == [0, 0, 0]
    assert all(line["rollout/logprob_diff_max"] > 1e-9 for line in lines)
    said = (tmp_path / "run" / "logs" / "worker_000.log").read_text()
    assert said.count("algorithm.trust_bound is 1e-09: they are recomputed until they agree") == 1


@pytest.mark.slow
def test_trust_begins_from_a_checkpoint_without_it_and_goes_on_from_one_with_it(recipe: Path, tmp_path: Path) -> None:
    folder, trust = tmp_path / "run", (*TRUST, "algorithm.trust_every=4", "--resume")
    runs.run(recipe, folder, TWO_UPDATES, "training.steps=2")
    runs.run(recipe, folder, *trust, "training.steps=5")
    runs.run(recipe, folder, *trust, "training.steps=8")
    # measured at 3, which lets 4 to 6 trust, 6 after another resume, and at 7
    assert [line.get("rollout/trusted") for line in runs.metrics(folder)] == [None, None, 0, 1, 1, 1, 0, 1]


@pytest.mark.slow
def test_a_run_that_corrects_is_one_that_recomputes_where_both_agree(recipe: Path, tmp_path: Path) -> None:
    """In float32 all ratios are 1 to rounding: the factors are there and change next to nothing."""
    common = (TWO_UPDATES, "training.optimizer=sgd")
    correct = (*common, "algorithm.old_log_probs=correct")
    masked = ("algorithm.correction=mis", "algorithm.correction_level=geometric", "algorithm.correction_low=0.5")
    runs.run(recipe, tmp_path / "recompute", *common)
    runs.run(recipe, tmp_path / "tis", *correct, "--workers", "2")
    runs.run(recipe, tmp_path / "mis", *correct, *masked)
    expected = runs.metrics(tmp_path / "recompute")
    for kind, key in (("tis", "rollout/truncated_fraction"), ("mis", "rollout/masked_fraction")):
        for line, other in zip(runs.metrics(tmp_path / kind), expected, strict=True):
            assert line[key] == 0 and line["rollout/correction_mean"] == pytest.approx(1, abs=1e-4)
            assert key not in other
            assert line["actor/loss"] == pytest.approx(other["actor/loss"], abs=1e-4)


PIPELINE = """
name: blind
nodes:
  - {id: data, op: data, writes: [sample_id, group_id, slot, prompt_ids, row]}
  - {id: rollout, op: rollout, model: actor, reads: [prompt_ids], writes: [response_ids, rollout_log_probs]}
  - {id: reward, op: reward, reads: [prompt_ids, response_ids, row], writes: [reward, failed]}
  - {id: advantage, op: advantage, reads: [reward, failed, group_id, response_ids], writes: [advantages]}
  - {id: old, op: log_prob, model: actor, reads: [prompt_ids, response_ids], writes: {log_probs: old_log_probs}}
  - {id: update, op: update, model: actor, reads: [prompt_ids, response_ids, advantages, failed, old_log_probs]}
  - {id: sync, op: sync_weights, model: actor, after: [update]}
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["trust", "rollout.max_staleness=1", "placement=disaggregated", "workers=2"],
            "is trust, but with rollout.max",
        ),
        (["correct", "rollout.max_staleness=1", "placement=disaggregated", "workers=2"], "old_log_probs=recompute"),
        (["correct", "algorithm.correction_low=0.5"], "set algorithm.correction=mis, or leave it out"),
        (["correct", "algorithm.correction_high=0.5"], "1 does not lie between them"),
        (["correct", "algorithm.correction=mis", "algorithm.correction_low=1.5"], "1 does not lie between them"),
        (["trust", "pipeline=blind.yaml"], "blind.yaml:8: node 'old': must read 'rollout_log_probs' for algorithm.old"),
        (["correct", "pipeline=blind.yaml"], "blind.yaml:9: node 'update': must read 'rollout_log_probs'"),
        (["recomputed"], "'recompute', 'trust' or 'correct'"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], says: str, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "blind.yaml").write_text(PIPELINE)
    given = [f"algorithm.old_log_probs={arguments[0]}", *arguments[1:]]
    said = runs.run(recipe, tmp_path / "run", *given, status=2)
    assert said.startswith("siirl: error: ") and said.count("\n") == 1
    assert says in said


def test_a_warm_up_that_updates_no_policy_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text() + "warmup: [{pipeline: sft, training: {steps: 1}}]\n"
    recipe.write_text(text)
    runs.run(recipe, tmp_path / "run", "algorithm.old_log_probs=correct", "training.steps=1")
    assert "rollout/correction_mean" in runs.metrics(tmp_path / "run")[-1]
