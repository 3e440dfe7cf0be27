"""A vendor's package: MetaX's, in a repository of its own for all siirl knows, installed by pip and used."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.device.distribution import install, python

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PACKAGE = EXAMPLES / "siirl-metax"
MAIN = "from siirl.cli.main import main; main({arguments!r})"
RECIPE = """
model: {path: "tiny:qwen3:16:1:99"}
data: {source: "arithmetic:addition?digits=1", prompts_per_step: 4, max_prompt_tokens: 8}
rollout: {group_size: 2, max_new_tokens: 3}
training: {steps: 3}
logging: {report: false}
"""
RUNTIME = "int mcGetDeviceCount(int *count) { *count = 2; return 0; }\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that pip installed the package into, from a copy, for it writes beside its sources."""
    folder = tmp_path_factory.mktemp("metax")
    shutil.copytree(PACKAGE, folder / "source")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.mark.parametrize("file", ["siirl-metax/siirl_metax/__init__.py", "siirl-acme/siirl_acme/__init__.py"])
def test_a_plug_in_is_short(file: str) -> None:
    assert len((EXAMPLES / file).read_text().splitlines()) < 150


def test_on_a_machine_without_the_device_it_is_refused_with_reasons(installed: Path) -> None:
    done = python(MAIN.format(arguments=["train", "quickstart", "--device", "metax"]), installed)
    assert done.returncode == 3
    assert done.stderr.startswith("siirl: error: device 'metax' is not usable here: PyTorch 2.")
    assert "is not MetaX's build; no MetaX device is present (no /dev/mxcd). What helps: install" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_doctor_lists_it(installed: Path) -> None:
    done = python(MAIN.format(arguments=["doctor", "--json"]), installed)
    devices = json.loads(done.stdout)["devices"]
    assert not devices["metax"]["available"]
    assert devices["metax"]["visible_devices_env"] == "MACA_VISIBLE_DEVICES"
    assert devices["metax-host"]["opened"]["capabilities"]["compute_dtypes"]


def test_its_host_variant_trains(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    arguments = ["train", str(tmp_path / "recipe.yaml"), "--device", "metax-host", "--run-dir", str(tmp_path / "run")]
    done = python(MAIN.format(arguments=arguments), installed)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["device"] == "metax-host"


@pytest.fixture
def metax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module on a machine that has the device node and MetaX's build of PyTorch, and no runtime yet."""
    spec = importlib.util.spec_from_file_location("siirl_metax", PACKAGE / "siirl_metax" / "__init__.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "torch", "2.11.0+metax3.9.0.1")
    (tmp_path / "mxcd").touch()
    monkeypatch.setattr(module, "NODE", tmp_path / "mxcd")
    monkeypatch.setenv("MACA_PATH", str(tmp_path))
    return module


def test_with_the_device_its_runtime_counts(metax: ModuleType, tmp_path: Path) -> None:
    (problem,) = metax.MetaxBackend.probe().problems
    assert problem.startswith("MACA's runtime cannot be loaded"), problem
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler to build a stand-in for the runtime's library")
    (tmp_path / "lib").mkdir()
    (tmp_path / "runtime.c").write_text(RUNTIME)
    library = tmp_path / "lib" / "libmcruntime.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "runtime.c"], check=True)
    probe = metax.MetaxBackend.probe()
    assert (probe.available, probe.count, probe.reason) == (True, 2, "2 MetaX devices"), probe
