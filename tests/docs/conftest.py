"""Runs of the examples, made once and looked at by several tests."""

from __future__ import annotations

import json
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import siirl
from siirl.dag import Graph
from tests.docs.pages import ROOT

RECIPE = "docs/examples/shaped_recipe.yaml"
PROBED = [
    "sample_id",
    "group_id",
    "reward",
    "shaped_reward",
    "failed",
    "response_ids",
    "advantages",
    "rollout_log_probs",
]


@dataclass(frozen=True)
class Finished:
    """A run of the example's recipe, and what its nodes saw."""

    dir: Path
    metrics: list[dict[str, Any]]

    def columns(self, step: int) -> dict[str, list[Any]]:
        """The columns that the update got at a step, all workers' rows together."""
        parts = [json.loads(file.read_text()) for file in sorted(self.dir.glob(f"columns_{step}_*.json"))]
        return {name: [value for part in parts for value in part[name]] for name in parts[0]}

    def samples(self, step: int) -> list[dict[str, Any]]:
        lines = (self.dir / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def run_example(folder: Path, **overrides: Any) -> Finished:
    """Run the example's recipe with a probe before the update; ``a__b=1`` is the override ``a.b=1``."""
    with chdir(ROOT):
        graph = Graph.from_yaml("docs/examples/shaped.yaml")
        graph.node("probe", op=f"python:{ROOT}/tests/docs/probe.py:probe", reads=PROBED)
        (folder / "pipeline.yaml").write_text(graph.to_yaml())
        given = {"pipeline": str(folder / "pipeline.yaml"), "logging.samples_every": 1}
        given |= {key.replace("__", "."): value for key, value in overrides.items()}
        run = siirl.train(RECIPE, given, run_dir=folder / "run")
    return Finished(run.dir, run.metrics)


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The example's recipe as it stands, with one worker."""
    return run_example(tmp_path_factory.mktemp("example"))
