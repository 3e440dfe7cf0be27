"""The comparison of data paths: its own side runs, and what it measures is what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from benchmarks import dataflow_batch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")


def compare(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "vs_dataflow.py"), *map(str, options)]
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.slow
def test_every_row_arrives_whether_few_move_or_all(tmp_path: Path) -> None:
    """The script refuses a run whose rows differ; what it counts must fit the batch."""
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.svg"
    options = ["--sides", "siirl", "siirl-full", "--workers", 2, "--rounds", 1, "--hops", 1]
    done = compare(*options, "--json", numbers, "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80

    (results,) = json.loads(numbers.read_text())["workers"]["2"]["rounds"]
    real, full = results["siirl"], results["siirl-full"]
    assert full["rows_kept"] == 2, "only the rows without tokens stay"
    payload = sum(full["held_bytes"]) - (4096 + 2) * 3 * 8 - 7 * 8 * (4096 + 2 + 2)  # less ids and offsets
    assert 0 <= full["moved_bytes"] - payload < 2 * 8, "a segment ends at a multiple of eight bytes"
    assert real["moved_bytes"] < payload / 100, "rows that are balanced stay"
    for run in (real, full):
        assert run["memory"]["largest"]["role"] == "worker"
        assert run["memory"]["largest"]["added"] > run["held_bytes"][0]
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--sides", "verl"], "--verl-python is missing"),
        (["--sides", "tq", "--tq-python", "/nowhere/python"], "there is no file /nowhere/python"),
        (["--sides", "siirl", "--workers", 3], "--workers 3: it must be at least 2 and divide 4096"),
        (["--sides", "siirl", "--rounds", 0], "--rounds is 0; it must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused(options: list[object], sentence: str) -> None:
    done = compare(*options)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_the_digest_sees_a_token_and_a_swap_of_rows() -> None:
    samples = torch.tensor([5, 900, 17])
    rows = dataflow_batch.padded(samples)
    whole = dataflow_batch.digest(rows)
    assert (
        dataflow_batch.add([dataflow_batch.digest(dataflow_batch.padded(part)) for part in samples.split(1)]) == whole
    )
    token, swap = rows["responses"].clone(), rows["advantages"].flip(0)
    token[0, 0] += 1
    assert dataflow_batch.digest(rows | {"responses": token}) != whole
    assert dataflow_batch.digest(rows | {"advantages": swap}) != whole
