"""A pytest session over suites of benchmarks, in this process."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from siirl.bench.measure import Effort
from siirl.bench.plugin import Plugin
from siirl.device.backend import Backend
from siirl.errors import RequestError, SiirlError

SUITES = Path(__file__).parent / "suites"
# The session is the suites' own: no configuration, plugin or conftest.py of the directory it is called in has a part.
OPTIONS = (
    "-c", os.devnull, f"--rootdir={SUITES}", "--noconftest", "--disable-plugin-autoload", "--capture=no",
    "-p", "no:terminal", "-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin", "-o", "python_functions=bench_*",
    "--assert=plain", "-W", "ignore::pytest.PytestWarning", "--maxfail=1",
    "--benchmark-quiet", "--benchmark-disable-gc",
)  # fmt: skip


def run(
    targets: Sequence[str],
    backend: Backend,
    echo: Callable[[str], None],
    effort: Effort,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, Any]:
    """Measure suites (``kernels.py``) or single benchmarks (``kernels.py::bench_op[…]``).

    Args:
        targets: paths within the folder of suites.
        backend: loaded and bound.
        echo: shows a line.
        effort: how many rounds.
        wanted: chooses benchmarks by their names.

    Returns:
        pytest-benchmark's JSON with the run's key under ``siirl``.

    Raises:
        Exception: whatever a benchmark raised.
    """
    for setting in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):  # of a session that this one may have been started from
        os.environ.pop(setting, None)
    plugin = Plugin(backend, effort, echo, wanted)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "run.json"
        paths = [str(SUITES / target) for target in targets]
        storage = [f"--benchmark-json={file}", f"--benchmark-storage=file://{directory}"]
        status = pytest.main([*OPTIONS, *storage, *paths], plugins=[plugin])
        if plugin.error is not None:
            raise plugin.error
        if status == pytest.ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        if status == pytest.ExitCode.NO_TESTS_COLLECTED or (status == pytest.ExitCode.OK and not file.is_file()):
            raise RequestError("none of the benchmarks was wanted, or none can run on this device")
        if status != pytest.ExitCode.OK:
            raise SiirlError(f"pytest could not run the benchmarks: {pytest.ExitCode(status).name}")
        return json.loads(file.read_text())
