"""Runs that generate with vLLM, as a user would start them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.worker import runs, test_learning
from tests.worker.test_disaggregated import disaggregated

VLLM = "rollout.engine=vllm"

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return runs.write_recipe(tmp_path)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_run_does_not_start(recipe: Path, tmp_path: Path) -> None:
    said = runs.run(recipe, tmp_path / "run", VLLM, status=2)
    assert "rollout.engine is 'vllm', which is not installed: install it as docs/rollout-engines.md says" in said


@needs_vllm
@pytest.mark.vllm
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["workers=2", "rollout.parallel.tensor=2"], "rollout.parallel.tensor is 2, but in a run every worker"),
        (["model.path=tiny:llama:32:2:99"], "takes heads of 32, 64,"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(
    arguments: list[str], says: str, recipe: Path, tmp_path: Path
) -> None:
    assert says in runs.run(recipe, tmp_path / "run", VLLM, *arguments, status=2)


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_rollout_and_training_agree_at_every_step(recipe: Path, tmp_path: Path) -> None:
    runs.run(recipe, tmp_path / "run", VLLM, "workers=2")
    steps = runs.metrics(tmp_path / "run")
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(line["rollout/logprob_diff_max"] < 1e-4 for line in steps)


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_workers_that_only_generate_get_the_weights(recipe: Path, tmp_path: Path) -> None:
    runs.run(recipe, tmp_path / "apart", VLLM, *disaggregated(3, 2))
    runs.run(recipe, tmp_path / "together", VLLM, "workers=2")
    apart, together = (runs.metrics(tmp_path / name) for name in ("apart", "together"))
    for one, other in zip(apart, together, strict=True):
        assert one["rollout/logprob_diff_max"] < 1e-4
        assert one["reward/mean"] == pytest.approx(other["reward/mean"], abs=1e-6)


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("placed", [("workers=1",), disaggregated(2, 1)], ids=["together", "apart"])
def test_adapters_reach_it_merged(placed: tuple[str, ...], recipe: Path, tmp_path: Path) -> None:
    runs.run(recipe, tmp_path / "run", VLLM, "model.lora.rank=4", *placed)
    assert all(line["rollout/logprob_diff_max"] < 1e-4 for line in runs.metrics(tmp_path / "run"))


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_the_reward_rises(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(test_learning.RECIPE.replace("PIPELINE", "grpo"))
    first, last = test_learning.rewards(recipe, tmp_path / "learns", VLLM)
    assert first < 0.6
    assert last > first + 0.25
