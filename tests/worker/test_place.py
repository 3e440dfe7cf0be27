"""A worker's place under Slurm, from the variables that srun sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from siirl.errors import RequestError
from siirl.worker.place import Place, first_host, meet_under_slurm
from tests.worker import runs


def step(task: int, **changed: str) -> dict[str, str]:
    """What Slurm 22.05 sets for a task of `srun -n 2` on one node."""
    return {
        "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "vm", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_LOCALID": str(task), "SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": str(task),
        "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "vm", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2",
    } | changed  # fmt: skip


def test_torchruns_variables_come_first() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert Place.from_environment(torchrun | step(0)) == Place(3, 4, 1, 2)
    assert Place(3, 4, 1, 2).variables() == torchrun
    meet_under_slurm(both := torchrun | step(0))
    assert "MASTER_PORT" not in both


@pytest.mark.parametrize(("node", "workers"), [("0", 2), ("2", 2), ("3", 1)])
def test_the_tasks_of_a_node_are_its_entry_of_the_list(node: str, workers: int) -> None:
    environment = step(0, SLURM_STEP_TASKS_PER_NODE="2(x3),1", SLURM_NTASKS="7", SLURM_NODEID=node)
    assert Place.from_environment(environment) == Place(0, 7, 0, workers)


def test_without_either_the_request_is_wrong() -> None:
    with pytest.raises(RequestError, match=r"neither RANK, .* \(torchrun\) nor SLURM_PROCID is set"):
        Place.from_environment({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("vm", "vm"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[007-012,020],login1", "gpu007"),
        ("gpu[12,14]", "gpu12"),
        ("rack[0-1]node[3-4]-ib,x", "rack0node3-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_of_several_nodes_meet_on_the_first() -> None:
    environment = step(0, SLURM_STEP_NODELIST="gpu[007-008]", SLURM_STEP_NUM_NODES="2", SLURM_JOB_ID="1234567")
    meet_under_slurm(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("gpu007", "24567")


def test_tasks_of_one_node_meet_on_its_loopback_interface() -> None:
    meet_under_slurm(environment := step(0))
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_what_the_user_set_stays() -> None:
    meet_under_slurm(environment := step(0, MASTER_ADDR="10.0.0.1", MASTER_PORT="29500"))
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.slow
def test_two_tasks_of_a_step_are_a_run_and_one_may_only_generate(tmp_path: Path) -> None:
    """The recipe asks for one worker, for which that placement would be refused; the number of tasks goes before it."""
    recipe, env = runs.write_recipe(tmp_path), tmp_path / "env"
    disaggregated = ["placement=disaggregated", "rollout.workers=1", "rollout.max_staleness=1"]
    command = [sys.executable, "-m", "siirl", "train", str(recipe), *disaggregated]
    command += ["--launcher", "env", "--run-dir", str(env)]
    job = str(os.getpid())  # the port follows from it
    outer = {key: value for key, value in os.environ.items() if key not in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
    tasks = [
        subprocess.Popen(command, env=outer | step(task, SLURM_JOB_ID=job), stderr=subprocess.PIPE, text=True)
        for task in range(2)
    ]
    for task in tasks:
        _, said = task.communicate(timeout=200)
        assert task.returncode == 0, said
    runs.run(recipe, tmp_path / "local", *disaggregated, "--workers", "2")
    assert runs.learned(env) == runs.learned(tmp_path / "local")
    assert json.loads((env / "summary.json").read_text())["status"] == "finished"
    assert sorted(log.name for log in (env / "logs").iterdir()) == ["worker_000.log", "worker_001.log"]
