"""The scripts that vendors run: their steps call siirl as it is, and the first failure is their exit status."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from siirl.cli.main import cli

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "ci").glob("*.sh"))
RUNNABLE = [script for script in SCRIPTS if script.stem != "common"]
ACME = ROOT / "docs" / "examples" / "siirl-acme" / "ci" / "acme.sh"
CLUSTERS = sorted((ROOT / "docs" / "examples" / "clusters").glob("*.sh"))
SHELL = [*SCRIPTS, *CLUSTERS, ACME, ROOT / ".ci" / "run", ROOT / "docker" / "npu-entrypoint.sh"]

# Stands in for the environment's siirl: writes down each call, has two devices, fails as a test asks.
SIIRL = """#!{python}
import json, os, sys
verb = sys.argv[1]
with open({calls!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if verb == "doctor":
    device = {{"available": {usable}, "count": 2, "reason": "2 devices", "fixes": []}}
    print(json.dumps({{"devices": dict.fromkeys(["cpu", "cuda", "npu", "acme"], device)}}))
sys.exit({statuses}.get(verb, 0))
"""


def tool(name: str) -> str:
    """A linter of the extra `dev`, which lies beside the interpreter."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is not installed; the extra dev has it")
    return found


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_the_shell_can_read_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_linter_of_shell_scripts_finds_nothing() -> None:
    done = subprocess.run([tool("shellcheck"), "-x", *SHELL], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda path: path.name)
def test_it_stops_at_what_it_did_not_foresee(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert re.search(r"^set -euo pipefail$", script.read_text(), re.MULTILINE)


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda path: path.name)
def test_the_options_at_its_top_are_the_ones_it_reads(script: Path) -> None:
    text = script.read_text()
    described = set(re.findall(r"^#   (?!ci/)([A-Z_]+)=", text, re.MULTILINE)) | {"TORCH_INDEX"}
    read = set(re.findall(r"^([A-Z_]+)=\$\{\1:?-", text + (ROOT / "ci" / "common.sh").read_text(), re.MULTILINE))
    read |= {"TORCH_NPU"} if "TORCH_NPU:-" in text else set()
    assert described == read - {"EXTRAS"}


def run_script(
    script: Path, folder: Path, statuses: dict[str, int] | None = None, usable: bool = True, **options: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run a script on the stand-in; its end, and the calls it made."""
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True)
    calls = folder / "calls.jsonl"
    text = SIIRL.format(python=sys.executable, calls=str(calls), usable=usable, statuses=statuses or {})
    (programs / "siirl").write_text(text)
    (programs / "siirl").chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    env = {**os.environ, "VENV": str(folder / "venv"), "INSTALL": "0", **options}
    done = subprocess.run([script, "results"], capture_output=True, text=True, cwd=folder, env=env, timeout=60)
    return done, [json.loads(line) for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda path: path.name)
def test_every_step_calls_a_verb_with_options_that_it_has(script: Path, tmp_path: Path) -> None:
    done, calls = run_script(script, tmp_path, LEVEL="smoke", SUITES="kernels update")
    assert done.returncode == 0, done.stderr + done.stdout
    assert [call[0] for call in calls] == ["doctor", "validate", "bench", "train"]
    for verb, *arguments in calls:
        given = cli.commands[verb].make_context(verb, arguments).params
        assert given.get("device", script.stem) == script.stem
    assert calls[2][1:3] == ["kernels", "update"]
    assert calls[2][-4:] == ["--compare", "benchmarks/results", "--tolerance", "0.10"]
    results = tmp_path / "results"
    assert [line.split()[0] for line in (results / "summary.txt").read_text().splitlines()] == [
        "doctor",
        "validate",
        "bench",
        "train",
    ]
    assert calls[3][-1] == str(results / "run")


def test_a_script_of_another_package_runs_the_same_steps(tmp_path: Path) -> None:
    done, calls = run_script(ACME, tmp_path, SIIRL=str(ROOT))
    assert done.returncode == 0, done.stderr + done.stdout
    assert [call[0] for call in calls] == ["doctor", "validate", "bench", "train"]
    assert all(call[call.index("--device") + 1] == "acme" for call in calls[1:])


def test_a_failed_step_is_the_exit_status_and_the_others_run(tmp_path: Path) -> None:
    done, calls = run_script(ROOT / "ci" / "cpu.sh", tmp_path, statuses={"validate": 4, "train": 1})
    assert done.returncode == 4
    assert [call[0] for call in calls] == ["doctor", "validate", "bench", "train"]
    assert "exit   4" in done.stdout


def test_without_the_device_nothing_else_runs(tmp_path: Path) -> None:
    done, calls = run_script(ROOT / "ci" / "cuda.sh", tmp_path, usable=False)
    assert done.returncode == 3
    assert [call[0] for call in calls] == ["doctor"]
    assert "cuda:\n  2 devices" in done.stdout


def test_without_records_nothing_is_compared(tmp_path: Path) -> None:
    _, calls = run_script(ROOT / "ci" / "cpu.sh", tmp_path, BASELINES="nowhere", WORKERS="1")
    assert "--compare" not in calls[2]
    assert calls[3][calls[3].index("--workers") + 1] == "1"


def test_workflows_are_valid() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert len(workflows) == 3
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", *workflows]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
