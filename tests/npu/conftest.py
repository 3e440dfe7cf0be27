"""Everything in this folder runs in subprocesses on the simulated NPU: PyTorch takes one such device per process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import simulated_npu

ROOT = Path(__file__).parents[2]
INSIDE = Path(__file__).with_name("inside")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a compiler there is no device, and every test here is skipped with that reason."""
    reason = simulated_npu.missing()
    for item in items if reason else ():
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subprocesses of the test find the simulated device."""
    for name, value in simulated_npu.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("SIIRL_DEVICE", "TORCH_DEVICE_BACKEND_AUTOLOAD", "ASCEND_RT_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def run_inside(*arguments: str | Path, device: str = "npu", **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own whose tests run on `device`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, arguments)]
    outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    chosen = {"SIIRL_TEST_DEVICE": device, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=outside | chosen, cwd=ROOT, timeout=280)
