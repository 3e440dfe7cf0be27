"""Batch-invariant runs: rollout's log-probs are training's, bit for bit, whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker import runs

USUAL = ("training.steps=3", "rollout.temperature=0.9", "rollout.max_sequences=5", "algorithm.mini_batches=2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.mark.slow
def test_rollout_and_training_agree_bit_for_bit(recipe: Path, tmp_path: Path) -> None:
    runs.run(recipe, tmp_path / "invariant", *USUAL, "rollout.batch_invariant=true", "--workers", "2")
    lines = runs.metrics(tmp_path / "invariant")
    assert [line["rollout/logprob_diff_max"] for line in lines] == [0.0] * 3
    assert all(line["actor/grad_norm"] > 0 for line in lines)
    # and that is not what happens anyway
    runs.run(recipe, tmp_path / "usual", *USUAL, "--workers", "2")
    assert all(line["rollout/logprob_diff_max"] > 0 for line in runs.metrics(tmp_path / "usual"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["training.dtype=bfloat16"], "needs rollout.engine=native and training.dtype=float32"),
        (["rollout.min_new_tokens=9"], "rollout.min_new_tokens is 9, more than rollout.max_new_tokens, which is 4"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], sentence: str, recipe: Path, tmp_path: Path) -> None:
    said = runs.run(recipe, tmp_path / "run", "rollout.batch_invariant=true", *options, status=2)
    assert sentence in said and said.count("\n") == 1
