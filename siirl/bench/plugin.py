"""The pytest plugin under which the suites run: the fixtures they use, one line for each that is done, the JSON."""

from __future__ import annotations

import platform
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from siirl.bench.key import Key
from siirl.bench.measure import Clock, Effort, Measure
from siirl.bench.table import line_of
from siirl.device.backend import Backend

BACKEND = pytest.StashKey[Backend]()


class Plugin:
    """One session of benchmarks.

    Args:
        backend: what they run on.
        effort: how many rounds.
        echo: shows a line.
        wanted: chooses benchmarks by their names.

    Attributes:
        error: what a benchmark raised; it ends the session.
    """

    def __init__(
        self, backend: Backend, effort: Effort, echo: Callable[[str], None], wanted: Callable[[str], bool]
    ) -> None:
        self._backend, self._effort, self._echo, self._wanted = backend, effort, echo, wanted
        self._suite = ""
        self.error: BaseException | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[BACKEND] = self._backend
        config.addinivalue_line(
            "markers", "one_thread: the calling thread does all the work, where the device is the host"
        )

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        items[:] = [item for item in items if self._wanted(name_of(item))]
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=self._clock(item)))

    @pytest.fixture(scope="session")
    def backend(self) -> Backend:
        return self._backend

    @pytest.fixture
    def measure(self, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Measure:
        """For work that this thread does alone, or has the device do."""
        benchmark.group = request.path.stem
        benchmark.name = name_of(request.node)
        benchmark.extra_info["node"] = request.node.nodeid
        return Measure(benchmark, self._backend, self._clock(request.node), self._effort, self._show)

    @pytest.fixture
    def measure_wall(self, measure: Measure) -> Measure:
        """For work in which other processes have a part: by the wall clock, whatever the device."""
        return measure

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        suite = nodeid.partition(".py::")[0]
        if suite != self._suite:
            self._suite = suite
            self._echo(f"\n{suite}")

    def pytest_exception_interact(self, call: pytest.CallInfo[Any]) -> None:
        assert call.excinfo is not None
        self.error = self.error or call.excinfo.value

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            why = f"  left out: {report.longrepr[2].removeprefix('Skipped: ')}"
            self._echo(textwrap.fill(why, 80, subsequent_indent="    "))

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_machine_info(self) -> dict[str, str]:
        """What the key leaves out, and no host name; pytest-benchmark's own takes a second to list a CPU's flags."""
        return {"system": platform.system(), "machine": platform.machine(), "python_version": platform.python_version()}

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json["siirl"] = {"key": Key.of(self._backend, output_json["commit_info"]).to_dict()}
        for benchmark in output_json["benchmarks"]:
            benchmark["fullname"] = f"{benchmark['group']}: {benchmark['name']}"
            del benchmark["stats"]["data"]
            del benchmark["params"]  # functions and tensors, which JSON cannot hold

    def _clock(self, item: pytest.Function) -> Clock:
        """The thread's own time where it does all the work: it stands still while others have the processor."""
        alone = not self._backend.is_accelerator() and "measure_wall" not in item.fixturenames
        return time.thread_time if alone else time.perf_counter

    def _show(self, benchmark: BenchmarkFixture) -> None:
        assert benchmark.stats is not None
        self._echo(line_of(benchmark.stats.as_dict(include_data=False)))


def name_of(node: pytest.Function) -> str:
    """A benchmark's name: its function's without ``bench_``, and its parameters."""
    name = node.originalname.removeprefix("bench_").replace("_", " ")
    return f"{name} {node.callspec.id}" if hasattr(node, "callspec") else name
