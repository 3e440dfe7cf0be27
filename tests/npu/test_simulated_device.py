"""The simulated device: what it promises (`inside/`), how it is built, and where it refuses to be."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from siirl.errors import DeviceError
from tests import simulated_npu
from tests.device.distribution import install, python
from tests.npu.conftest import INSIDE, run_inside
from tests.simulated_npu import build


@pytest.mark.slow
@pytest.mark.parametrize("checks", sorted(INSIDE.glob("check_*.py")), ids=lambda path: path.stem)
def test_the_device_keeps_its_promises(checks: Path, npu: None) -> None:
    done = run_inside(checks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_siirl_finds_it_as_it_finds_a_real_one(npu: None) -> None:
    code = """
import sys
from siirl.device import probe_all, resolve
probe = probe_all()["npu"]
assert "torch" not in sys.modules, "a probe imports no PyTorch"
print(probe.available, probe.count, type(resolve("npu")).__mro__[1].__name__, resolve().name)
"""
    done = python(code)
    assert done.stdout.split() == ["True", "2", "NpuBackend", "npu"], done.stderr


@pytest.mark.parametrize(("visible", "count"), [("0", 1), ("0,1,2,3", 2)])
def test_hidden_devices_are_not_there(visible: str, count: int, npu: None) -> None:
    code = "import torch; from siirl.device import probe_all; print(probe_all()['npu'].count, torch.npu.device_count())"
    done = python(code, ASCEND_RT_VISIBLE_DEVICES=visible)
    assert done.stdout.split() == [str(count)] * 2, done.stderr


def test_without_a_device_the_reason_is_said(npu: None) -> None:
    done = python("from siirl.device import resolve; resolve('npu')", ASCEND_RT_VISIBLE_DEVICES="")
    assert f"{DeviceError.__name__}: device 'npu' is not usable here: ASCEND_RT_VISIBLE_DEVICES hides" in done.stderr


def test_it_is_not_loaded_beside_a_real_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "torch-npu", "2.13.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    reason = f"the simulated NPU does not load beside a real one, and torch-npu 2.13.0 in {tmp_path} is installed"
    assert simulated_npu.missing() == reason
    with pytest.raises(RuntimeError, match="does not load beside a real one"):
        build.package_folder.__wrapped__()


def test_without_a_compiler_the_tests_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert simulated_npu.missing() == "the simulated NPU needs a C++ compiler, and there is no no-such-compiler"


def _build(cache: str, results: multiprocessing.Queue) -> None:
    """As `package_folder` for the first time, with a compiler that only takes its time and keeps count."""

    def compile_slowly(scratch: Path, target: Path) -> None:
        with Path(cache, "compilations").open("a") as log:
            log.write("once\n")
        time.sleep(0.5)
        (target / "module.so").write_text("compiled")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache)
        patch.setattr(build, "_compile", compile_slowly)
        folder = build.package_folder.__wrapped__()
    results.put((str(folder), (folder / "module.so").read_text()))


def test_processes_that_want_it_at_once_build_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_build, args=(str(tmp_path), results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert len(set(found)) == 1 and found[0][1] == "compiled"
    assert (tmp_path / "compilations").read_text() == "once\n"
    left = {path.name for path in (tmp_path / "siirl-simulated-npu").iterdir()}
    assert left == {Path(found[0][0]).name, f"{Path(found[0][0]).name}.lock"}  # no half-built directory


def test_it_is_in_no_wheel() -> None:
    import tomllib

    settings = tomllib.loads((Path(build.__file__).parents[2] / "pyproject.toml").read_text())
    shipped = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert not [entry for entry in shipped if entry.startswith("tests")]
