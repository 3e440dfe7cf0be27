"""Cluster files: the shipped ones agree with what back ends know, wrong ones are refused with their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from siirl.errors import RequestError
from siirl.planning.cluster import load_cluster
from siirl.planning.files import shipped
from siirl_cuda import published


@pytest.mark.parametrize("name", shipped("clusters"))
def test_a_shipped_cluster_is_whole(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.memory(cluster.devices) > 1e9
    assert cluster.peak("bfloat16") > cluster.peak("float32") * (1 if cluster.device.unified else 2)


@pytest.mark.parametrize(("name", "device"), [("h200-128x8", "NVIDIA H200"), ("h100-8x8", "NVIDIA H100 80GB HBM3")])
def test_device_figures_are_those_the_back_end_publishes(name: str, device: str) -> None:
    facts = load_cluster(name).device
    assert (facts.flops["bfloat16"], facts.memory_bandwidth) == published(device)


TEXT = (Path(__file__).parents[2] / "configs" / "clusters" / "local-2.yaml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nodes: 1", "nodes: 0", r"c.yaml:\d+: nodes is 0: .*greater than 0"),
        ("nodes: 1", "node: 1", r"'nodes' is missing|unknown key 'node'; did you mean 'nodes'\?"),
        ("memory_bandwidth: 10e9", "memory_bandwith: 10e9", "'device.memory_bandwi"),
        ("  unified: true", "  unified: 3", r"c.yaml:\d+: device.unified is 3"),
        ("network: 0.8", "network: 1.8", r"c.yaml:\d+: sustained.network is 1.8"),
    ],
)
def test_a_wrong_file_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in TEXT
    file = tmp_path / "c.yaml"
    file.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(RequestError, match=message):
        load_cluster(str(file))


def test_a_record_of_siirl_bench_tells_bandwidth_and_overhead(tmp_path: Path) -> None:
    """A million bytes in the half of a round of 2 ms are 1 GB/s; a hundred calls in a round of 0.4 ms 4 us each."""

    def benchmark(suite: str, name: str, amount: float, calls: int, seconds: float) -> dict:
        info = {"node": f"{suite}.py::bench[{name}]", "amount": amount, "calls_per_round": calls}
        return {"name": name, "extra_info": info, "stats": {"min": seconds}}

    benchmarks = [
        benchmark("kernels", "fwd a", 1e6, 2, 2e-3),
        benchmark("kernels", "fwd b", 1e6, 1, 2e-3),
        benchmark("kernels", "bwd a", 1e9, 1, 1e-3),
        benchmark("dispatch", "call a", 100, 1, 4e-4),
    ]
    (tmp_path / "record.json").write_text(json.dumps({"siirl": {"key": {}}, "benchmarks": benchmarks}))
    (tmp_path / "c.yaml").write_text(TEXT + "measured: record.json\n")
    cluster = load_cluster(str(tmp_path / "c.yaml"))
    assert cluster.device.memory_bandwidth == pytest.approx(1e9)
    assert cluster.sustained.memory == 1.0
    assert cluster.device.op_overhead_s == pytest.approx(4e-6)
    (tmp_path / "record.json").unlink()
    with pytest.raises(RequestError, match="there is no file .*record.json"):
        load_cluster(str(tmp_path / "c.yaml"))


def test_an_unknown_cluster_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="no such cluster file: 'h200-128x9'; did you mean 'h200-128x8'"):
        load_cluster("h200-128x9")
    assert load_cluster("configs/clusters/h200-128x8.yaml").devices == 1024


def test_more_workers_than_devices_need_more_nodes_unless_they_share_devices() -> None:
    assert load_cluster("local-2").grown(8).nodes == 1
    assert load_cluster("local-2").memory(8) == 24e9 / 8
    assert load_cluster("h200-128x8").grown(1024).nodes == 128
    assert load_cluster("h200-128x8").grown(4096).nodes == 512
