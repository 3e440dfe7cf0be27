"""The command itself: quick help, no needless imports, `plan`, `doctor`, interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import siirl as package

VERBS = ["train", "plan", "simulate", "generate", "validate", "bench", "report", "doctor"]


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_answers_in_under_a_second(siirl, arguments: list[str]) -> None:
    runs = [siirl(*arguments) for _ in range(3)]
    assert all(run.status == 0 and run.stdout.startswith("Usage: siirl") for run in runs)
    assert min(run.seconds for run in runs) < 1.0


def test_help_lists_the_verbs_and_the_exit_status(siirl) -> None:
    shown = siirl("--help").stdout
    assert [line.split()[0] for line in shown.split("Commands:")[1].splitlines() if line.strip()][: len(VERBS)] == VERBS
    assert "3    the device is not usable here" in shown
    assert siirl().stdout == shown


def test_the_installed_script_knows_its_version() -> None:
    script = Path(sys.executable).with_name("siirl")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"siirl {package.__version__}\n"


@pytest.mark.parametrize(
    "module",
    [
        "siirl",
        "siirl.bench",
        "siirl.cli.main",
        "siirl.config",
        "siirl.dag",
        "siirl.device",
        "siirl.errors",
        "siirl.rewards",
    ],
)
def test_importing_what_answers_quickly_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_imports_neither_the_schema_nor_the_planner() -> None:
    code = "import sys, siirl.cli.main; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pydantic", "rich", "yaml", "siirl.config", "siirl.dag", "siirl.device"} & set(loaded)


RECIPE = """
workers: 2
data: {prompts_per_step: 8, max_prompt_tokens: 16}
rollout: {group_size: 4, max_new_tokens: 8}
warmup: [{pipeline: sft}]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "r.yaml").write_text(RECIPE)
    return "r.yaml"


def test_plan_gives_every_worker_of_every_stage_its_pipeline(siirl, recipe: str) -> None:
    stages = {stage["name"]: stage for stage in json.loads(siirl("plan", recipe, "--json").stdout)["stages"]}
    assert list(stages) == ["warmup.0", "main"]
    assert [plan["rank"] for plan in stages["main"]["plans"]] == [0, 1]
    ops = [step["op"] for step in stages["main"]["plans"][0]["steps"] if step["kind"] == "node"]
    assert ops.index("rollout") < ops.index("reward") < ops.index("advantage") < ops.index("update")
    assert "rollout" not in [step["op"] for step in stages["warmup.0"]["plans"][0]["steps"]]


def test_plan_prints_the_sizes_and_the_steps(siirl, recipe: str) -> None:
    shown = siirl("plan", recipe, "--workers", "4", "data.prompts_per_step=16").stdout
    assert [line.split()[3:5] for line in shown.splitlines() if line.startswith(" samples a step")] == [
        ["16", "4"],
        ["64", "16"],
    ]
    assert "redistribute" in shown
    assert "prompt_ids → response_ids" in shown


def test_one_worker_redistributes_nothing(siirl, recipe: str) -> None:
    assert "redistribute" not in siirl("plan", recipe, "--workers", "1").stdout


def test_plan_needs_no_device(siirl, recipe: str) -> None:
    for device in ("auto", "cpu", "cuda", "npu"):
        assert siirl("plan", recipe, "--device", device).status == 0


def test_doctor_says_of_every_device_whether_and_why(siirl) -> None:
    done = siirl("doctor")
    assert done.status == 0
    for device in ("cpu", "cuda", "npu"):
        assert device in done.stdout
    assert isinstance(json.loads(siirl("doctor", "--json").stdout), dict)


def test_an_interrupted_command_says_so_and_leaves_130() -> None:
    code = (
        "import click, signal, time, siirl.cli.main as command\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as in a terminal
        "wait = lambda: (print('waiting', flush=True), time.sleep(60))\n"
        "command.cli.add_command(click.Command('wait', callback=wait))\n"
        "command.main(['wait'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert stderr.strip() == "siirl: error: interrupted"
    assert process.returncode == 130
