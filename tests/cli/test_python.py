"""`siirl.train` is `siirl train` as a function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import siirl
from siirl.errors import RequestError

RECIPE = """
model: {path: "tiny:qwen3:32:1:128"}
data: {source: "arithmetic:addition?digits=1", prompts_per_step: 4, max_prompt_tokens: 8}
rollout: {group_size: 2, max_new_tokens: 3}
training: {steps: 50}
evaluation: {at_end: false}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    return file


def test_a_run_gives_its_metrics_and_its_directory(recipe: Path, tmp_path: Path) -> None:
    run = siirl.train(recipe, overrides={"training.steps": 2}, device="cpu", run_dir=tmp_path / "run")
    assert run.dir == tmp_path / "run"
    assert [(record["stage"], record["step"]) for record in run.metrics] == [("main", 1), ("main", 2)]
    assert run.metrics == [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]


def test_a_wrong_request_is_an_exception_with_the_same_sentence(recipe: Path) -> None:
    with pytest.raises(
        RequestError, match=r"^overrides: unknown key 'training\.step'; did you mean 'training\.steps'\?$"
    ):
        siirl.train(recipe, overrides={"training.step": 2})
