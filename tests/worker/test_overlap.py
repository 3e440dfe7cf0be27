"""Rows move while a node that only looks at them computes, with the results of one after the other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from siirl.telemetry.jsonl import read_jsonl
from siirl.telemetry.trace import worker_files
from tests.worker import runs

WATCH = """
import time
from siirl.dag import register_op

@register_op("watch", reads=["response_ids"], observes=True)
def watch(batch, context):
    for _ in range(50):  # calls among the workers, while rows travel between them
        counts = context.collectives.all_gather_ints(batch.lengths("response_ids"))
        time.sleep(0.002)
    if context.step == FAILS:
        raise ValueError("seen enough")
    context.metrics.mean("custom/tokens", float(sum(count.sum() for count in counts)), 1)
"""
NODE = "  - {id: watch, op: watch, layout: groups, after: [advantage], reads: [response_ids]}\n\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose pipeline has an observer from an installed package."""
    _install(tmp_path, monkeypatch, fails_at=0)
    plain = Path("configs/pipelines/grpo.yaml").read_text()
    (tmp_path / "watched.yaml").write_text(plain.replace("  - id: samples\n", f"{NODE}  - id: samples\n"))
    return runs.write_recipe(tmp_path)


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    (folder / "watching.py").write_text(WATCH.replace("FAILS", str(fails_at)))
    facts = folder / "watching-1.0.dist-info"
    facts.mkdir(exist_ok=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: watching\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[siirl.ops]\nwatch = watching\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.parametrize("transport", ["collectives", "shared_memory"])
def test_results_are_those_of_one_after_the_other(transport: str, recipe: Path, tmp_path: Path) -> None:
    beside, after = tmp_path / "beside", tmp_path / "after"
    for run_dir, overlap in ((beside, "true"), (after, "false")):
        settings = ("pipeline=watched.yaml", f"data.overlap={overlap}", f"data.transport={transport}")
        runs.run(recipe, run_dir, *settings, "--workers", "2")
    assert runs.learned(beside) == runs.learned(after)
    assert runs.samples(beside) == runs.samples(after)
    assert all(line["custom/tokens"] > 0 for line in runs.metrics(beside))
    for name, tensor in runs.weights(beside).items():
        assert torch.equal(runs.weights(after)[name], tensor)
    assert _seconds_of_both(after) == 0
    moving = sum(line["time/redistribute_s"] for line in runs.metrics(beside))
    assert 0 < _seconds_of_both(beside) <= 2 * moving


def _seconds_of_both(run_dir: Path) -> float:
    """Time in which a worker moved rows and ran the observer, summed over workers."""
    total = 0.0
    for file in worker_files(run_dir):
        spans = {name: [] for name in ("watch", "redistribute:update")}
        for event in read_jsonl(file):
            if event["name"] in spans:
                spans[event["name"]].append((event["ts"], event["ts"] + event["dur"]))
        assert len(spans["watch"]) == len(spans["redistribute:update"]) == 3
        for (a, b), (c, d) in zip(*spans.values(), strict=True):
            total += max(0.0, min(b, d) - max(a, c)) / 1e6
    return total


def test_an_observer_that_fails_ends_the_run_with_its_error(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, monkeypatch, fails_at=2)
    said = runs.run(recipe, tmp_path / "run", "pipeline=watched.yaml", "--workers", "2", status=1)
    assert "node 'watch'" in said and "seen enough" in said and said.count("\n") == 1
    assert len(runs.metrics(tmp_path / "run")) == 1
