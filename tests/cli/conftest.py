"""Running the real command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str
    seconds: float


Siirl = Callable[..., Finished]


@pytest.fixture
def siirl(tmp_path: Path) -> Siirl:
    """Run ``siirl ARGUMENTS...`` in an empty directory."""

    def run(*arguments: str, **environment: str) -> Finished:
        command = [sys.executable, "-m", "siirl", *arguments]
        surroundings = {k: v for k, v in os.environ.items() if k not in ("SIIRL_DEVICE", "SIIRL_DEBUG")} | environment
        started = time.monotonic()
        done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=120)
        return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - started)

    return run
