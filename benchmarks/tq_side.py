"""TransferQueue's side of vs_dataflow.py, in its own environment: storage units between the workers of two stages.

python tq_side.py WORK.json, where WORK.json says: workers, case (padded or ragged), hops, units (processes that store).
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
import transfer_queue
from omegaconf import OmegaConf
from tensordict import TensorDict

PARTITION = "batch"


@ray.remote(num_cpus=1)
class Stage:
    """One worker: it made its rows in one stage and gets another worker's for the next."""

    def __init__(self, rank: int, size: int, case: str) -> None:
        torch.set_num_threads(1)
        transfer_queue.init()
        self.case = case
        self.share = common.SAMPLES // size
        self.own, self.next = rank, (rank + 1) % size

    def ready(self) -> None:
        """Answer once the worker is up."""

    def make(self) -> int:
        samples = torch.arange(self.own * self.share, (self.own + 1) * self.share)
        rows = common.padded(samples)
        self.held = TensorDict(rows if self.case == "padded" else cut(rows), batch_size=len(samples))
        common.settle()
        return size_of(self.held)

    def keys(self, worker: int) -> list[str]:
        return [str(worker * self.share + row) for row in range(self.share)]

    def put(self) -> None:
        self.arrived = None
        transfer_queue.kv_batch_put(keys=self.keys(self.own), partition_id=PARTITION, fields=self.held)

    def get(self) -> None:
        self.arrived = transfer_queue.kv_batch_get(keys=self.keys(self.next), partition_id=PARTITION)

    def clear(self) -> None:
        transfer_queue.kv_clear(keys=self.keys(self.own), partition_id=PARTITION)

    def check(self) -> tuple[int, int, int]:
        pad = torch.nn.utils.rnn.pad_sequence
        rows = {name: pad(list(field.unbind()), batch_first=True) for name, field in self.arrived.items()}
        return size_of(self.arrived), len(self.arrived), common.digest(rows)


def cut(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows without padding, as verl's trainer over TransferQueue carries them: without attention_mask too."""
    counts = rows["response_mask"].sum(1)
    wholes = {"prompts": torch.full_like(counts, common.PROMPT), "input_ids": common.PROMPT + counts}
    wholes["position_ids"] = wholes["input_ids"]
    ragged = {}
    for name, field in rows.items():
        if name != "attention_mask":
            lengths = wholes.get(name, counts)
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            values = field[torch.arange(field.shape[1]) < lengths[:, None]]
            ragged[name] = torch.nested.nested_tensor_from_jagged(values, offsets)
    return ragged


def size_of(rows: TensorDict) -> int:
    """Bytes of all fields' values."""
    return sum((field.values() if field.is_nested else field).nbytes for field in rows.values())


def main(work: dict[str, Any]) -> dict[str, Any]:
    """All hops."""
    torch.set_num_threads(1)
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {"PYTHONPATH": here, "OMP_NUM_THREADS": "1", "TQ_LOGGING_LEVEL": "WARNING"}
    ray.init(
        address="local",
        num_cpus=work["workers"] + work["units"] + 2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2**30,
        runtime_env={"env_vars": environment},
    )
    storage = {"storage_backend": "SimpleStorage", "SimpleStorage": {"num_data_storage_units": work["units"]}}
    transfer_queue.init(OmegaConf.create({"backend": storage}))
    workers = [Stage.remote(rank, work["workers"], work["case"]) for rank in range(work["workers"])]

    def every(method: str) -> list[Any]:
        return ray.get([getattr(worker, method).remote() for worker in workers])

    def hop(clear: bool = True) -> float:
        start = time.perf_counter()
        every("put")
        every("get")
        seconds = time.perf_counter() - start
        if clear:
            every("clear")
        return seconds

    every("ready")
    common.tell("idle")
    held = every("make")
    hop()
    common.tell("start")
    seconds = [hop() for _ in range(work["hops"])]
    common.tell("stop")
    common.tell("begin")
    hop(clear=False)
    common.tell("end")
    arrived, rows, digests = zip(*every("check"), strict=True)
    transfer_queue.close()
    ray.shutdown()
    return {
        "seconds": seconds,
        "moved_bytes": sum(held) + sum(arrived),
        "held_bytes": held,
        "arrived_bytes": list(arrived),
        "rows": sum(rows),
        "digest": common.add(list(digests)),
        "versions": {name: version(name) for name in ("TransferQueue", "ray", "tensordict", "torch")},
    }


if __name__ == "__main__":
    common.tell("result", **main(json.loads(Path(sys.argv[1]).read_text())))
