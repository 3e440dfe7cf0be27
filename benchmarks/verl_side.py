"""verl's side of vs_dataflow.py, in verl's own environment: a controller between the workers of two stages.

python verl_side.py WORK.json, where WORK.json says: workers, hops. The workers answer to the dispatch that verl's own
workers register (split by data-parallel rank, puts into the object store in parallel), and the controller is this
process, as in its trainer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dataflow_batch as common
import ray
import torch
from verl import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

MESH = "stage"


@ray.remote
class Stage(Worker):
    """One worker: it made its rows in one stage and gets its share for the next."""

    def __init__(self) -> None:
        super().__init__()
        self._register_dispatch_collect_info(MESH, dp_rank=self.rank, is_collect=True)
        torch.set_num_threads(1)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def ready(self) -> None:
        """Answer once the worker is up."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def make(self) -> int:
        share = common.SAMPLES // self.world_size
        samples = torch.arange(self.rank * share, (self.rank + 1) * share)
        self.held = DataProto.from_dict(tensors=common.padded(samples))
        common.settle()
        return sum(field.nbytes for field in self.held.batch.values())

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name=MESH))
    def produce(self, order: DataProto) -> DataProto:
        self.arrived = None
        return self.held

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name=MESH))
    def consume(self, rows: DataProto) -> DataProto:
        self.arrived = rows
        return DataProto.from_dict(tensors={"done": torch.ones(len(rows))})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def check(self) -> tuple[int, int, int]:
        rows = self.arrived.batch
        return sum(field.nbytes for field in rows.values()), len(rows), common.digest(dict(rows.items()))


def hop(group: Any) -> float:
    """One hop, in seconds: from the workers to the controller, from the controller to the workers."""
    order = DataProto.from_dict(tensors={"order": torch.zeros(group.world_size)})
    start = time.perf_counter()
    rows = group.produce(order)
    group.consume(rows)
    return time.perf_counter() - start


def main(work: dict[str, Any]) -> dict[str, Any]:
    """All hops."""
    torch.set_num_threads(1)
    here = os.path.dirname(os.path.abspath(__file__))
    ray.init(
        address="local",
        num_cpus=2 * work["workers"],
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=4 * 2**30,
        runtime_env={"env_vars": {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"}},
    )
    pool = RayResourcePool([work["workers"]], use_gpu=False, max_colocate_count=1)
    group = RayWorkerGroup(pool, RayClassWithInitArgs(cls=Stage), device_name="cpu")
    group.ready()
    common.tell("idle")
    held = group.make()
    hop(group)
    common.tell("start")
    seconds = [hop(group) for _ in range(work["hops"])]
    common.tell("stop")
    common.tell("begin")
    hop(group)
    common.tell("end")
    arrived, rows, digests = zip(*group.check(), strict=True)
    ray.shutdown()
    return {
        "seconds": seconds,
        "moved_bytes": sum(held) + sum(arrived),
        "held_bytes": held,
        "arrived_bytes": list(arrived),
        "rows": sum(rows),
        "digest": common.add(list(digests)),
        "versions": {name: version(name) for name in ("verl", "ray", "tensordict", "torch")},
    }


if __name__ == "__main__":
    common.tell("result", **main(json.loads(Path(sys.argv[1]).read_text())))
