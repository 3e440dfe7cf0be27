"""The images: parsed by a parser of Dockerfiles; pinned, without root, without secrets, small."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "docker").glob("Dockerfile.*"))
SECRET = re.compile(r"token|password|secret|credential|api_?key", re.IGNORECASE)


def parse(path: Path, **arguments: str) -> Any:
    parser = pytest.importorskip("dockerfile_parse", reason="the extra dev has dockerfile-parse")
    return parser.DockerfileParser(fileobj=path.open("rb"), build_args=arguments)


def instructions(path: Path) -> list[tuple[str, str]]:
    return [(step["instruction"], step["value"]) for step in parse(path).structure if step["instruction"] != "COMMENT"]


def test_there_is_one_for_each_kind_of_device() -> None:
    assert [path.suffix for path in IMAGES] == [".cpu", ".cuda", ".npu"]


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_its_base_is_pinned_to_a_release(image: Path) -> None:
    base = parse(image).baseimage
    assert re.search(r":.*\d+\.\d+\.\d+", base), base
    assert "latest" not in base


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_it_installs_a_pytorch_that_siirl_accepts(image: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    accepted = {
        found.name: found.specifier
        for found in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["npu"]])
    }
    given = dict(re.findall(r"^ARG (TORCH_VERSION|TORCH_NPU_VERSION)=(\S+)$", image.read_text(), re.MULTILINE))
    assert given.pop("TORCH_VERSION") in accepted["torch"]
    assert all(version in accepted["torch-npu"] for version in given.values())
    assert bool(given) == (image.suffix == ".npu")


def test_the_cuda_image_keeps_the_pytorch_of_its_base() -> None:
    (image,) = [path for path in IMAGES if path.suffix == ".cuda"]
    version = re.search(r"^ARG TORCH_VERSION=(\S+)$", image.read_text(), re.MULTILINE)
    assert version
    assert parse(image).baseimage.startswith(f"pytorch/pytorch:{version[1]}-cuda")


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_it_runs_siirl_as_a_user_without_rights(image: Path) -> None:
    steps = instructions(image)
    last_user = [value for name, value in steps if name == "USER"][-1]
    assert last_user.isdigit()
    assert int(last_user) > 0
    assert f"--uid {last_user} " in image.read_text()
    (entry,) = [json.loads(value) for name, value in steps if name == "ENTRYPOINT"]
    assert entry in (["siirl"], ["npu-entrypoint.sh"])


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_it_holds_no_secret_and_few_layers(image: Path) -> None:
    steps = instructions(image)
    assert not [value for name, value in steps if name in ("ARG", "ENV") and SECRET.search(value.split("=")[0])]
    assert len([name for name, _ in steps if name in ("RUN", "COPY", "ADD")]) <= 3
    assert not [value for name, value in steps if name == "ADD"]
    pips = [value for name, value in steps if name == "RUN" and "pip install" in value]
    assert all(value.count("pip install") == value.count("--no-cache-dir") for value in pips)


def test_the_context_has_what_the_package_is_built_from_and_no_more() -> None:
    admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in admitted)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {name.split("/")[0] for name in wheel["only-include"]}
    needed |= {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert set(admitted) == needed | {"docker/npu-entrypoint.sh"}


def test_the_linter_of_dockerfiles_finds_nothing() -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed; the workflow that builds the images runs it")
    done = subprocess.run([linter, *IMAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_workflow_lints_every_image_and_builds_one() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "cpu.yml").read_text())
    commands = [step.get("run", "") for step in workflow["jobs"]["images"]["steps"]]
    assert "hadolint docker/Dockerfile.*" in commands
    assert any(command.startswith("docker build") for command in commands)


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_nobody_elses_code_reaches_a_machine_of_ours(device: str) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{device}.yml").read_text())
    triggers = workflow[True]  # YAML reads the key `on` as a truth value
    assert set(triggers) == {"push", "schedule", "workflow_dispatch"}
    assert triggers["push"] == {"branches": ["main"]}
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "linux", device]
    assert f"ci/{device}.sh ci-results" in [step.get("run") for step in job["steps"]]
