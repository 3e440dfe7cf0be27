"""The Ray launcher on a cluster of several nodes on this machine: same runs, same ends, same sentences as locally."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.device.distribution import install
from tests.worker import runs

pytestmark = pytest.mark.slow
TWO = ("--launcher", "ray", "--workers", "2")

# A back end on the host whose devices Ray counts under the name of a real accelerator's, and so hands out by number.
BOXED = """
import json, os
from pathlib import Path
from siirl_cpu import CpuBackend

class Boxed(CpuBackend):
    name, replaces = "npu", "npu"

    @classmethod
    def is_accelerator(cls):
        return True

    @classmethod
    def visible_devices_env(cls):
        return "ASCEND_RT_VISIBLE_DEVICES"

    @classmethod
    def launcher_resources(cls, n):
        return {"resources": {"NPU": n}}

    def _bind_device(self, local_rank):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ASCEND_RT_VISIBLE_DEVICES", "OMP_NUM_THREADS")
        seen = {name: os.environ.get(name) for name in names}
        Path(os.environ["BOXED_FOLDER"], f"{seen['RANK']}.json").write_text(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    groups = {"siirl.backends": {"npu": "siirl_boxed:Boxed"}}
    return install(
        tmp_path_factory.mktemp("boxed"), "siirl-boxed", modules={"siirl_boxed.py": BOXED}, entry_points=groups
    )


@pytest.fixture(scope="module", autouse=True)
def cluster(boxed: Path) -> Iterator[None]:
    """A head without resources and two nodes of two cores and two devices each, which RAY_ADDRESS names."""
    pytest.importorskip("ray", reason="needs the extra ray, which is not installed")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(boxed), os.environ.get("PYTHONPATH")])))
        patch.setenv("BOXED_FOLDER", str(boxed))
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        try:
            for _ in range(2):
                started.add_node(num_cpus=2, resources={"NPU": 2})
            patch.setenv("RAY_ADDRESS", started.address)
            yield
        finally:
            started.shutdown()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return runs.write_recipe(tmp_path)


def workers_of(run_dir: Path) -> list[psutil.Process]:
    """The worker processes of a run, by rank."""
    found = {
        int(process.environ()["RANK"]): process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] and process.info["cmdline"][1:4] == ["-m", "siirl.worker", str(run_dir)]
    }
    return [found[rank] for rank in sorted(found)]


def test_workers_on_two_nodes_compute_what_those_of_one_machine_do(recipe: Path, boxed: Path, tmp_path: Path) -> None:
    """Without --device it is the one whose resource the cluster has, which the machine that asks may lack."""
    text = recipe.read_text()
    recipe.write_text(text.replace("device: cpu", "device: auto"))
    runs.run(recipe, tmp_path / "ray", "--launcher", "ray", "--workers", "4")
    summary = json.loads((tmp_path / "ray" / "summary.json").read_text())
    assert (summary["status"], summary["device"]) == ("finished", "npu")
    for rank in range(4):
        seen = json.loads((boxed / f"{rank}.json").read_text())
        assert sorted(seen.pop("ASCEND_RT_VISIBLE_DEVICES").split(",")) == ["0", "1"]
        local_rank = str(rank % 2)
        assert seen == {
            "RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
    recipe.write_text(text)
    runs.run(recipe, tmp_path / "local", "--workers", "4")
    assert len(runs.metrics(tmp_path / "local")) == 3
    assert runs.learned(tmp_path / "ray") == runs.learned(tmp_path / "local")


def test_a_killed_worker_is_named_and_the_run_goes_on_from_its_checkpoint(recipe: Path, tmp_path: Path) -> None:
    process = runs.start(recipe, tmp_path / "run", *TWO, "training.steps=2000", "checkpoint.every=2")
    runs.wait_for_step(tmp_path / "run", 3, process)
    workers = workers_of(tmp_path / "run")
    workers[1].kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "worker 1 was ended by SIGKILL after step" in said and "--resume" in said
    assert said.count("\n") == 1 and "Traceback" not in said
    assert not [worker for worker in workers if worker.is_running()]
    last = runs.metrics(tmp_path / "run")[-1]["step"]
    runs.run(recipe, tmp_path / "run", *TWO, f"training.steps={last + 1}", "--resume")
    assert [line["step"] for line in runs.metrics(tmp_path / "run")] == list(range(1, last + 2))


def test_a_lost_actor_ends_the_run_with_its_name(recipe: Path, tmp_path: Path) -> None:
    process = runs.start(recipe, tmp_path / "run", *TWO, "training.steps=2000")
    runs.wait_for_step(tmp_path / "run", 1, process)
    workers = workers_of(tmp_path / "run")
    workers[1].parent().kill()
    _, said = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "worker 1 failed after step" in said and "Ray lost the actor that ran it" in said
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_a_full_cluster_is_said_and_a_signal_ends_the_run_with_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    process = runs.start(recipe, tmp_path / "run", *TWO, "training.steps=2000")
    runs.wait_for_step(tmp_path / "run", 1, process)
    said = runs.run(recipe, tmp_path / "other", "--launcher", "ray", "--workers", "3", "timeout_s=2", status=3)
    assert "had no room for 3 workers within 2 s (timeout_s): each needs 1 CPU, and 2 CPU is free" in said
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    last = runs.metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:06d}" / "manifest.json").is_file()


def test_more_workers_than_the_cluster_has_room_for_are_refused(recipe: Path, tmp_path: Path) -> None:
    said = runs.run(recipe, tmp_path / "run", "--launcher", "ray", "--workers", "5", status=3)
    assert "room for 4 workers on device 'cpu', not for 5: each needs 1 CPU, its 3 nodes have 4 CPU in all" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1, which RAY_ADDRESS names"),
        ("ray://127.0.0.1:1", "ray://127.0.0.1:1, an address of Ray's client"),
    ],
)
def test_a_cluster_that_is_not_there_is_refused_at_once(
    address: str, says: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    assert says in runs.run(recipe, tmp_path / "run", *TWO, status=2)
    assert time.monotonic() - began < 20
