"""run-directory.md lists every metric and every file that a run writes, and no other."""

from __future__ import annotations

import re
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

import siirl
from tests.docs.conftest import Finished, run_example
from tests.docs.pages import ROOT, code, table_cells

PAGE = "docs/run-directory.md"

RECIPE = """
device: cpu
model: {path: "tiny:qwen3:16:1:99"}
data: {source: "arithmetic:addition?digits=1", held_out: 4, prompts_per_step: 4, max_prompt_tokens: 8}
rollout: {group_size: 4, max_new_tokens: 4}
training: {steps: 1}
logging: {samples_every: 1}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, example: Finished) -> list[Path]:
    """Runs that together write every metric: the example, PPO, DAPO, GRPO with a reference model on two workers, with
    groups that are carried and adapters, and with a mixture of experts."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.yaml").write_text(RECIPE)
    cases: dict[str, dict[str, Any]] = {
        "ppo": {
            "pipeline": "ppo",
            "warmup": [{"pipeline": "sft"}],
            "algorithm.old_log_probs": "correct",
            "algorithm.correction": "mis",
        },
        "grpo": {"workers": 2, "algorithm.kl_coef": 0.1, "algorithm.old_log_probs": "correct"},
        "carried": {"rollout.partial": 0.5, "model.lora.rank": 2},
        "experts": {"model.path": "tiny:qwen3_moe:64:1:99", "rollout.router_replay": True},
        "dapo": {
            "pipeline": "dapo",
            "algorithm.old_log_probs": "trust",
            "reward.function": f"{ROOT}/docs/examples/partial_credit.py:partial_credit",
        },
    }
    with chdir(folder):
        return [
            example.dir,
            *(siirl.train("recipe.yaml", given, run_dir=name).dir.resolve() for name, given in cases.items()),
        ]


def test_every_metric_is_on_the_page(runs: list[Path]) -> None:
    listed = {name for cell in table_cells(PAGE, "## Metrics") for name in code(cell)}
    written = {key for run in runs for record in siirl.Run(run).metrics for key in record}
    assert written - {"reward/shaped_mean"} == listed


def test_every_file_is_on_the_page(runs: list[Path]) -> None:
    listed = [code(cell)[0] for cell in table_cells(PAGE, "# A run directory")]
    two_stages, adapted = runs[1], runs[3]
    for name in listed:
        exists = (adapted if name == "adapter/" else two_stages) / name.replace("step_000010", "step_000001")
        assert exists.is_dir() if name.endswith("/") else exists.is_file(), name
    top = {path.name for run in (two_stages, adapted) for path in run.iterdir()} - {".lock"}
    assert top == {name.partition("/")[0] for name in listed}


def test_files_of_a_warm_up_carry_its_stage(runs: list[Path]) -> None:
    names = re.findall(r"`(?:samples|checkpoints)/(warmup[^`]*)`", (ROOT / PAGE).read_text())
    assert {re.sub(r"\d{6}", "", name).rstrip("/") for name in names} == {"warmup.0_step_.jsonl", "warmup.0_step_"}


def test_the_same_run_twice_writes_the_same_values(example: Finished, tmp_path: Path) -> None:
    again = run_example(tmp_path)
    noisy = re.compile(r"(time|throughput|memory)/")
    once, twice = (
        [{k: v for k, v in m.items() if not noisy.match(k)} for m in run.metrics] for run in (example, again)
    )
    assert once == twice
