"""Which device a run takes, and what a user reads when that cannot be."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import siirl.device
import siirl_kernels
from siirl.device import facts, host, selection
from siirl.device.doctor import collect
from siirl.errors import DeviceError, RequestError
from siirl_cpu import CpuBackend
from siirl_npu import NpuBackend
from tests.device.distribution import install, python

# A vendor's whole plug-in: it borrows the host's facts and is an accelerator by its own word.
PLUGIN = """
from siirl.device import Probe
from siirl_cpu import CpuBackend
from siirl_npu import NpuBackend

class Backend(CpuBackend):
    name = "{name}"
    replaces = {replaces}

    @classmethod
    def is_accelerator(cls):
        return True

    @classmethod
    def probe(cls):
        return Probe.of("2 cards", 2, {{}}, {findings}, notes={notes})
"""
BROKEN = "import a_library_of_the_vendor\n"
# An extension of PyTorch whose driver is missing, as the public wheel behaves on a machine without it.
EXTENSION = 'raise ImportError("libvendor.so: cannot open shared object file")\n'


def plug_in(
    folder: Path,
    name: str,
    findings: str = "[]",
    text: str = PLUGIN,
    package: str | None = None,
    replaces: str | None = None,
    notes: str = "()",
) -> Path:
    package = package or name
    return install(
        folder,
        f"siirl-{package}",
        modules={
            f"siirl_{package}.py": text.format(name=name, findings=findings, replaces=repr(replaces), notes=notes)
        },
        entry_points={"siirl.backends": {name: f"siirl_{package}:Backend"}},
    )


@pytest.fixture(autouse=True)
def no_choice_made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIIRL_DEVICE", raising=False)


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in ("siirl_alpha", "siirl_beta", "siirl_other", "siirl_third"):
        sys.modules.pop(name, None)


def automatic(*names: str) -> selection.Choice:
    """What `auto` takes on a machine with these devices and the CPU, whatever else this one has."""
    probes = siirl.device.probe_all()
    return selection.automatic({name: probes[name] for name in ("cpu", *names)})


def test_the_built_in_back_ends_are_found() -> None:
    assert {"cpu", "cuda", "npu"} <= siirl.device.probe_all().keys()


def test_the_command_line_beats_the_environment_beats_the_config(
    plugins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("alpha", "beta"):
        plug_in(plugins, name)
    assert selection.resolve(None, "beta").name == "beta"
    monkeypatch.setenv("SIIRL_DEVICE", "alpha")
    assert selection.resolve(None, "beta").name == "alpha"
    assert selection.resolve("cpu", "beta").name == "cpu"


def test_auto_takes_the_one_accelerator(plugins: Path) -> None:
    plug_in(plugins, "alpha")
    assert automatic("alpha") == selection.Choice("alpha", "the only kind of accelerator that is usable here")


def test_auto_passes_over_an_accelerator_that_is_not_usable_and_warns(
    plugins: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plug_in(plugins, "alpha", findings='[("the fan is off", "turn it on")]')
    assert automatic("alpha") == selection.Choice("cpu", "no accelerator is usable here (alpha: the fan is off)")
    (warning,) = caplog.messages
    assert warning == "running on cpu, for alpha devices are here but not usable: the fan is off"


def test_a_machine_without_accelerators_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    assert automatic().device == "cpu"
    assert not caplog.messages


def test_a_variant_of_the_host_is_taken_by_name_alone(plugins: Path) -> None:
    variant = PLUGIN.replace("return True", "return False")
    plug_in(plugins, "alpha", text=variant)
    assert automatic("alpha").device == "cpu"
    assert selection.resolve("alpha").name == "alpha"


def test_what_a_device_notes_is_logged_when_it_is_taken(plugins: Path, caplog: pytest.LogCaptureFixture) -> None:
    plug_in(plugins, "alpha", notes='("the fan is loud",)')
    assert selection.resolve("alpha").name == "alpha"
    assert caplog.messages == ["device alpha: the fan is loud"]


def test_auto_asks_when_there_are_several_kinds(plugins: Path) -> None:
    plug_in(plugins, "alpha")
    plug_in(plugins, "beta")
    with pytest.raises(RequestError, match="choose one with --device: .*alpha, beta"):
        selection.resolve("auto")


def test_a_device_that_is_not_there_is_refused_with_reason_and_remedy(plugins: Path) -> None:
    plug_in(plugins, "alpha", findings='[("the fan is off", "turn it on"), ("no card", "buy one")]')
    with pytest.raises(DeviceError) as caught:
        selection.resolve("alpha")
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "device 'alpha' is not usable here: the fan is off; no card. What helps: turn it on; buy one"
    )


@pytest.mark.parametrize("source", ["SIIRL_DEVICE", "the configuration"])
def test_a_refusal_says_who_named_the_device(plugins: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(plugins, "alpha", findings='[("the fan is off", "")]')
    if source == "SIIRL_DEVICE":
        monkeypatch.setenv("SIIRL_DEVICE", "alpha")
    with pytest.raises(
        DeviceError, match=rf"^device 'alpha', which {source} names, is not usable here: the fan is off$"
    ):
        selection.resolve(None, "auto" if source == "SIIRL_DEVICE" else "alpha")


def test_an_unknown_device_gets_the_list_and_the_nearest_name() -> None:
    with pytest.raises(
        RequestError, match=r"unknown device 'cdua', devices known here are auto, cpu, .*mean 'cuda'\?$"
    ):
        selection.resolve("cdua")


def test_a_plug_in_that_cannot_be_imported_costs_nothing_but_itself(plugins: Path) -> None:
    plug_in(plugins, "alpha", text=BROKEN)
    assert not siirl.device.probe_all()["alpha"].available
    assert "a_library_of_the_vendor" in siirl.device.probe_all()["alpha"].reason
    assert automatic("alpha").device == "cpu"
    with pytest.raises(DeviceError, match="a_library_of_the_vendor"):
        selection.resolve("alpha")
    assert collect()["devices"]["alpha"]["available"] is False


def test_a_plug_in_must_be_a_back_end(plugins: Path) -> None:
    plug_in(plugins, "alpha", text="Backend = 3\n")
    with pytest.raises(DeviceError, match="is not a siirl.device.Backend"):
        selection.resolve("alpha")


def test_a_back_end_answers_to_one_name(plugins: Path) -> None:
    install(
        plugins,
        "siirl-alpha",
        modules={"siirl_alpha.py": PLUGIN.format(name="beta", findings="[]", replaces=None, notes="()")},
        entry_points={"siirl.backends": {"alpha": "siirl_alpha:Backend"}},
    )
    with pytest.raises(DeviceError, match="'alpha' .* calls itself 'beta'"):
        selection.resolve("alpha")


def test_a_stand_in_wins_over_the_back_end_that_it_replaces(plugins: Path) -> None:
    plug_in(plugins, "npu", package="other", replaces="npu")
    assert selection.backend_class("npu").__module__ == "siirl_other"
    assert selection.resolve("npu").name == "npu"
    assert siirl.device.probe_all()["npu"].available


@pytest.mark.parametrize("replaces", [None, "cuda"])
def test_one_name_for_two_packages_is_refused(plugins: Path, replaces: str | None) -> None:
    plug_in(plugins, "npu", package="other", replaces=replaces)
    with pytest.raises(RequestError, match="2 packages call their back end 'npu': siirl_.* or let one say") as caught:
        selection.resolve("npu")
    assert "siirl_npu:NpuBackend" in str(caught.value)
    assert "siirl_other:Backend" in str(caught.value)
    assert selection.resolve("cpu").name == "cpu", "other devices are none the worse"
    assert not siirl.device.probe_all()["npu"].available


def test_two_stand_ins_for_one_back_end_are_refused(plugins: Path) -> None:
    for package in ("other", "third"):
        plug_in(plugins, "npu", package=package, replaces="npu")
    with pytest.raises(RequestError, match="3 packages call their back end 'npu'"):
        selection.resolve("npu")


def test_select_loads_and_becomes_current() -> None:
    backend = siirl.device.select("cpu")
    assert isinstance(backend, CpuBackend)
    assert siirl.device.current() is backend


def test_current_before_select_is_a_sentence() -> None:
    done = python("from siirl.device import current; current()")
    assert "no device has been chosen in this process" in done.stderr


def test_stage_zero_imports_no_torch() -> None:
    done = python(
        "import sys, json, siirl.device, siirl_cpu, siirl_cuda, siirl_npu\n"
        "from siirl.device.doctor import collect\n"
        "from siirl.device.selection import launch_environment, prepare, resolve\n"
        "json.dumps(collect())\n"
        "backend = resolve('cpu')\n"
        "launch_environment(backend), prepare(backend), backend.engines(), backend.kernel_order()\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    assert done.returncode == 0, done.stderr


def broken_extension(folder: Path) -> Path:
    return install(
        folder,
        "torch-vendor",
        modules={"torch_vendor/__init__.py": EXTENSION},
        entry_points={"torch.backends": {"torch_vendor": "torch_vendor:_autoload"}},
    )


def test_a_broken_extension_of_pytorch_does_not_break_the_cpu(tmp_path: Path) -> None:
    broken_extension(tmp_path)
    trap = python("import torch", tmp_path)
    assert trap.returncode != 0
    assert "Failed to load the backend extension" in trap.stderr
    done = python(
        "from siirl.device import select\n"
        "backend = select('cpu')\n"
        "from importlib.util import find_spec\n"
        "assert find_spec('torch_vendor') is None, 'libraries would still try to import it'\n"
        "print(backend.torch.ones(2, device=backend.device()).sum().item())",
        tmp_path,
    )
    assert done.stdout == "2.0\n", done.stderr


def test_the_broken_npu_wheel_does_not_break_transformers_on_the_cpu(tmp_path: Path) -> None:
    install(
        tmp_path,
        "torch-npu",
        version="2.13.0",
        modules={"torch_npu/__init__.py": EXTENSION},
        entry_points={"torch.backends": {"torch_npu": "torch_npu:_autoload"}},
    )
    # transformers asks this while it imports a model, and imports the extension whenever it is installed.
    ask = "from transformers.utils import is_torch_npu_available; print(is_torch_npu_available())"
    trap = python(ask, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "libvendor.so" in trap.stderr
    done = python(f"from siirl.device import select; select('cpu'); {ask}", tmp_path)
    assert done.stdout == "False\n", done.stderr
    refused = python("from siirl.device import select; select('npu')", tmp_path)
    assert "torch-npu is installed, but CANN's libascendcl.so" in refused.stderr


def test_children_are_told_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = selection.launch_environment(selection.resolve("cpu"), "trainer")
    assert environment["SIIRL_DEVICE"] == "cpu"
    assert environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    monkeypatch.setenv("HCCL_NPU_SOCKET_PORT_RANGE", "60000-60050")
    environment = selection.launch_environment(NpuBackend(), "trainer")
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in environment, "its children need the extension"
    assert environment["HCCL_HOST_SOCKET_PORT_RANGE"] == "auto"
    assert "HCCL_NPU_SOCKET_PORT_RANGE" not in environment, "what the user set stays"


def test_doctor_is_json_and_names_the_device_auto_would_take() -> None:
    report = json.loads(json.dumps(collect()))
    assert report["auto"]["device"] in report["devices"]
    assert report["auto"]["reason"]
    assert report["packages"]["torch"]
    assert report["host"]["cores"] >= 1
    for device in report["devices"].values():
        assert device["available"] == (not device["problems"])
        assert device["reason"]
        assert ("opened" in device) == device["available"]


def test_doctor_opens_what_is_usable_and_says_what_it_can_do() -> None:
    opened = collect()["devices"]["cpu"]["opened"]
    assert opened["capabilities"]["compute_units"] == host.usable_cores()
    assert set(opened["kernels"]) == set(siirl_kernels.resolved())
    assert "float32" in opened["communication"]["dtypes"]["all_reduce"]


def test_a_device_that_is_usable_but_does_not_open_says_why(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = PLUGIN + "    def load(self):\n        raise RuntimeError('the driver has crashed')\n"
    plug_in(plugins, "alpha", text=broken)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(plugins), os.environ.get("PYTHONPATH", "")]))
    assert facts.ask(selection.backend_class("alpha")()) == {"error": "RuntimeError: the driver has crashed"}


def test_doctor_prints_versions_capabilities_kernels_and_the_reason_of_the_choice() -> None:
    done = python("from siirl.cli.main import main; main(['doctor'])", SIIRL_DEVICE="cpu", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    for said in ("torch 2.", "compute dtypes", "kernels by torch", "siirl_cpu:CpuBackend", "--device auto "):
        assert said in done.stdout, done.stdout
    assert "SIIRL_DEVICE is set: without --device a run takes cpu" in done.stdout
