"""Device facts from a record of `siirl bench --json`, in place of a data sheet's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from siirl.bench.records import read
from siirl.errors import RequestError

if TYPE_CHECKING:
    from siirl.planning.cluster import Cluster


def with_measured(cluster: Cluster, file: Path) -> Cluster:
    """The cluster with what a record tells: memory bandwidth and the time of a small operator.

    The bandwidth is the best that a forward kernel reached, so nothing is taken off it (`sustained.memory` is 1); the
    overhead is the time of a call on tensors so small that calling is most of it.

    Raises:
        RequestError: the record has neither kernels nor dispatch.
    """
    benchmarks = read(file)["benchmarks"]
    rates = [_amount(b) / _seconds(b) for b in benchmarks if _suite(b) == "kernels" and b["name"].startswith("fwd")]
    calls = [_seconds(b) / _amount(b) for b in benchmarks if _suite(b) == "dispatch"]
    if not rates and not calls:
        raise RequestError(f"{file} has no benchmark of the suites kernels and dispatch, which tell about a device")
    copy = cluster.model_copy(deep=True)
    if rates:
        copy.device.memory_bandwidth, copy.sustained.memory = max(rates), 1.0
    if calls:
        copy.device.op_overhead_s = min(calls)
    return copy


def _suite(benchmark: dict[str, Any]) -> str:
    return str(benchmark["extra_info"]["node"]).partition(".py")[0]


def _amount(benchmark: dict[str, Any]) -> float:
    return float(benchmark["extra_info"]["amount"])


def _seconds(benchmark: dict[str, Any]) -> float:
    """Of one call of the work; a round is several."""
    return float(benchmark["stats"]["min"]) / float(benchmark["extra_info"]["calls_per_round"])
