"""An update's memory does not grow with tokens x vocabulary, as the plain form's does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "update_memory.py"
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


@pytest.mark.slow
def test_an_update_takes_less_than_a_quarter_of_the_plain_forms_memory(tmp_path: Path) -> None:
    """At 1,024 tokens and 150 thousand words; at 8,192 tokens the plain form takes eight times as much, and a gigabyte
    here is not to be had everywhere."""
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, str(SCRIPT), "--tokens", "1024", "--json", str(numbers)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(numbers.read_text())["sizes"]
    logits = 4 * 1024 * 152_064
    assert found["plain"]["added"] > 2.5 * logits  # log-probs, and two gradients of their size
    assert found["siirl"]["added"] < found["plain"]["added"] / 4
    assert abs(found["siirl"]["loss"] - found["plain"]["loss"]) < 0.1
