"""Thousands of workers: planning is quick and small, and nothing grows with their square."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from siirl.config.schema import Config
from siirl.dag import Graph, all_plans_json, plan, plan_roles, plan_worker

# Processor time, for other programs may run beside the test; VmHWM is the most memory this program had in use.
MEASURED = """
import sys, time
from pathlib import Path
from siirl.cli.main import main
try:
    main(sys.argv[1:])
finally:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(time.process_time(), 1024 * int(status["VmHWM"].split()[0]), file=sys.stderr)
"""

RECIPE = """
workers: 4096
model: {path: qwen2.5-7b}
data: {prompts_per_step: 32768}
rollout: {max_new_tokens: 1024}
training: {dtype: bfloat16, sharding: shard, micro_batch_tokens: 8192}
"""


def measured(tmp_path: Path, *arguments: str) -> tuple[float, float, str]:
    """Seconds and peak bytes of a command in a process of its own, and what it printed."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = [sys.executable, "-c", MEASURED, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stderr.split()[-2:])
    return seconds, peak, done.stdout


@pytest.mark.parametrize("extra", [[], ["--json"], ["--cluster", "h200-128x8"]])
def test_4096_workers_are_planned_in_two_seconds_and_500_megabytes(tmp_path: Path, extra: list[str]) -> None:
    seconds, peak, shown = measured(tmp_path, "plan", "r.yaml", *extra)
    assert seconds < 2
    assert peak < 500e6
    if extra == ["--json"]:
        plans = json.loads(shown)["stages"][0]["plans"]
        assert [p["rank"] for p in plans] == list(range(4096))


def test_a_worker_makes_its_own_plan_and_it_does_not_grow_with_the_workers() -> None:
    config = Config(data={"prompts_per_step": 4096})  # type: ignore[arg-type]
    graph = Graph.from_yaml("grpo")
    sizes = {workers: len(plan_worker(graph, config, workers, workers - 1).to_json()) for workers in (8, 4096)}
    layouts = plan_worker(graph, config, 8, 0).to_json().count('"workers"') + 1
    assert sizes[4096] - sizes[8] <= 2 * 3 * layouts  # the numbers of workers have more digits, nothing else


def test_plans_written_piece_by_piece_are_those_of_the_planner() -> None:
    config, graph = Config(), Graph.from_yaml("ppo")
    text = "".join(all_plans_json(plan_roles(graph, config, 5)))
    assert json.loads(text) == [p.to_dict() for p in plan(graph, config, 5)]


def test_a_simulation_of_4096_workers_is_a_matter_of_seconds(tmp_path: Path) -> None:
    seconds, peak, shown = measured(
        tmp_path, "simulate", "r.yaml", "--cluster", "h200-128x8", "--workers", "1024,4096", "--json"
    )
    assert seconds < 10
    assert peak < 1e9
    assert [p["workers"] for p in json.loads(shown)["points"]] == [1024, 4096]
