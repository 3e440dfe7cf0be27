"""Whole runs whose workers share rows: tensor and context parallel, resumed and moved to one worker."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.worker import runs

# two key/value heads, a vocabulary of two halves; plain steps, so that rounding stays as small as it is
MODEL = ("model.path=tiny:qwen3:128:2:100", "training.optimizer=sgd", "training.lr=0.1", "training.steps=3")
LAYOUTS = {
    "tensor": ("--workers", "4", "training.parallel.tensor=2", "training.sharding=shard"),
    "ring": (
        *("--workers", "2", "training.parallel.context=2", "training.parallel.context_mode=ring"),
        *("training.optimizer=adamw", "training.lr=1e-3"),
    ),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return runs.write_recipe(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", pytest.param("ring", marks=pytest.mark.long)])
def test_a_run_of_groups_of_workers_equals_one_of_a_single_worker_and_resumes(
    layout: str, recipe: Path, tmp_path: Path
) -> None:
    degrees = LAYOUTS[layout]
    single = [arg for arg in degrees if arg.startswith(("training.optimizer", "training.lr"))]
    runs.run(recipe, tmp_path / "single", *MODEL, *single)
    runs.run(recipe, tmp_path / "whole", *MODEL, *degrees, "checkpoint.every=2", "checkpoint.keep=9")
    for name in ("resumed", "moved"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step_000003")
    runs.run(recipe, tmp_path / "resumed", *MODEL, *degrees, "--resume")
    runs.run(recipe, tmp_path / "moved", *MODEL, *single, "--resume")

    expected = runs.learned(tmp_path / "single")
    for found in (runs.learned(tmp_path / "whole"), runs.learned(tmp_path / "resumed")):
        for line, other in zip(found, expected, strict=True):
            assert line.pop("stage") == other["stage"]
            same = {key: value for key, value in line.items() if key in other and not key.startswith("rollout/")}
            assert same == pytest.approx({key: other[key] for key in same}, rel=1e-3, abs=1e-4)
    for name, weight in runs.weights(tmp_path / "single").items():
        assert torch.equal(runs.weights(tmp_path / "resumed")[name], runs.weights(tmp_path / "whole")[name])
        torch.testing.assert_close(runs.weights(tmp_path / "whole")[name], weight, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(runs.weights(tmp_path / "moved")[name], weight, atol=2e-5, rtol=1e-4)


def test_heads_that_do_not_divide_end_a_run_before_it_starts(recipe: Path, tmp_path: Path) -> None:
    said = runs.run(recipe, tmp_path / "run", "--workers", "2", "training.parallel.tensor=2", status=2)
    assert "training.parallel.tensor is 2, which does not divide the model's 1 key/value heads; set" in said
    assert not (tmp_path / "run").exists()
