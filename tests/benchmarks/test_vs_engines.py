"""The comparison of engines: the sides that need no other environment run, and draw what was asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def compare(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "vs_engines.py"), *map(str, options)]
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.slow
def test_both_sides_draw_the_same_number_of_tokens(tmp_path: Path) -> None:
    """The script refuses a side that drew others; what it prints fits a terminal."""
    numbers = tmp_path / "numbers.json"
    done = compare("--shapes", "tiny", "--rounds", 1, "--json", numbers)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    (run,) = json.loads(numbers.read_text())["shapes"]["tiny"]["rounds"]
    assert run["siirl"]["tokens"] == run["transformers"]["tokens"] == [256 * 32] * 5
    assert all(run[side]["tokens_per_s"] > 0 for side in ("siirl", "transformers"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rounds", 0], "--rounds is 0; it must be at least 1"),
        (
            ["--vllm-python", "/absent/python"],
            "there is no file /absent/python; to make it: make .venv-vllm/.installed",
        ),
        (["--vllm-python", sys.executable], "cannot import vllm; to make an environment that can: make .venv-vllm"),
    ],
)
def test_what_cannot_work_is_refused(options: list[object], sentence: str) -> None:
    done = compare(*options)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
