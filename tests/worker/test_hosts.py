"""A run over two hosts: namespaces with network, host name and processes of their own, and a cable between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker import runs

pytestmark = pytest.mark.slow
# Of each host its name, which its network namespace has too, its interface and its address.
HOSTS = [(f"siirl{i}-{os.getpid()}", f"siirl{i}", f"10.77.0.{i + 1}") for i in range(2)]
_IN_HOST = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def two_hosts() -> Iterator[None]:
    made = []
    try:
        for name, _, _ in HOSTS:
            ip("netns", "add", name)
            made.append(name)
        (first, cable, _), (second, other, _) = HOSTS
        ip("link", "add", cable, "netns", first, "type", "veth", "peer", "name", other, "netns", second)
        for name, interface, address in HOSTS:
            ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", interface, "up")
        subprocess.run([*_IN_HOST, "true"], check=True, capture_output=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        _remove(made)
        pytest.skip(f"needs the right to make namespaces, and iproute2: {getattr(error, 'stderr', None) or error}")
    yield
    _remove(made)


def _remove(names: list[str]) -> None:
    for name in names:
        ip("netns", "delete", name)


def start(host: int, recipe: Path, run_dir: Path) -> subprocess.Popen[str]:
    """torchrun on one host, for two of four workers."""
    name, interface, _ = HOSTS[host]
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
        "--node-rank", str(host), "--master-addr", HOSTS[0][2], "--master-port", "29500",
    ]  # fmt: skip
    train = ["-m", "siirl", "train", str(recipe), "--launcher", "env", "--run-dir", str(run_dir)]
    named = ["sh", "-c", f'hostname {name}; exec "$@"', "sh"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    command = ["ip", "netns", "exec", name, *_IN_HOST, *named, *torchrun, *train]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def carried(run_dir: Path) -> set[str]:
    """How rows travel, over all stages and workers of a run's plan."""
    plans = [plan for stage in json.loads((run_dir / "plan.json").read_text())["stages"] for plan in stage["plans"]]
    return {step["transport"] for plan in plans for step in plan["steps"] if step["kind"] == "redistribute"}


@pytest.mark.usefixtures("two_hosts")
def test_two_hosts_with_two_workers_each_compute_what_four_workers_of_one_host_do(tmp_path: Path) -> None:
    """Bytes moved count as well: between hosts they are narrowed, through shared memory they are not."""
    recipe = runs.write_recipe(tmp_path)
    launched = [start(host, recipe, tmp_path / "hosts") for host in range(2)]
    for process in launched:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
    runs.run(recipe, tmp_path / "collectives", "--workers", "4", "data.transport=collectives")
    runs.run(recipe, tmp_path / "shared", "--workers", "4", "data.transport=shared_memory")
    assert runs.learned(tmp_path / "hosts") == runs.learned(tmp_path / "collectives")
    assert [carried(tmp_path / name) for name in ("hosts", "shared")] == [{"collectives"}, {"shared_memory"}]
    moved = [[line["data/redistributed_bytes"] for line in runs.metrics(tmp_path / n)] for n in ("hosts", "shared")]
    assert all(over < within for over, within in zip(*moved, strict=True))


@pytest.mark.usefixtures("two_hosts")
def test_shared_memory_between_two_hosts_is_refused_by_all_workers(tmp_path: Path) -> None:
    recipe = runs.write_recipe(tmp_path, runs.RECIPE.replace("held_out: 10", "held_out: 10, transport: shared_memory"))
    launched = [start(host, recipe, tmp_path / "run") for host in range(2)]
    said = [process.communicate(timeout=120)[0] for process in launched]
    assert all(process.returncode for process in launched)
    sentence = "data.transport is shared_memory, but rows move among workers of 2 hosts"
    assert all(sentence in text for text in said), said
