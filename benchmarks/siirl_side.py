"""siirl's side of vs_dataflow.py: worker processes that give each other rows by `redistribute`.

python siirl_side.py WORK.json, where WORK.json says: workers, case (real or full), transport (its name), hops.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import dataflow_batch as common
import torch
import torch.multiprocessing as mp

import siirl
from siirl.data.batch import Batch, Ragged
from siirl.data.databuffer import redistribute
from siirl.data.transport import Transport, open_transport
from siirl.device import select
from siirl.device.collectives import Collectives
from siirl.errors import SiirlError

FIELDS = ("prompt_ids", "response_ids", *common.PER_TOKEN.values())


def make(samples: torch.Tensor) -> Batch:
    """The rows as siirl carries them: no masks, no positions, no second copy of the tokens."""
    counts = common.response_lengths()[samples]
    rows = common.padded(samples)
    held = rows["response_mask"].bool()
    columns: dict[str, Any] = {
        "sample_id": samples,
        "group_id": samples // common.GROUP,
        "slot": samples // common.GROUP,
        "prompt_ids": _ragged(rows["prompts"].reshape(-1), torch.full_like(samples, common.PROMPT)),
        "response_ids": _ragged(rows["responses"][held], counts),
    }
    columns |= {ours: _ragged(rows[theirs][held], counts) for theirs, ours in common.PER_TOKEN.items()}
    return Batch(columns)


def _ragged(values: torch.Tensor, counts: torch.Tensor) -> Ragged:
    return Ragged(values, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def make_anchored(samples: torch.Tensor, rank: int) -> Batch:
    """The same rows behind one more row, without tokens, that keeps all of them from staying (see ``hop``)."""
    ids = common.SAMPLES + torch.tensor([rank])
    none = torch.zeros(1, dtype=torch.int64)
    rows = make(samples)
    anchor: dict[str, Any] = {"sample_id": ids, "group_id": ids, "slot": ids}
    anchor |= {name: _ragged(rows.ragged(name).values[:0], none) for name in FIELDS}
    return Batch.concat([rows, Batch(anchor)])


def hop(case: str, batch: Batch, collectives: Collectives, transport: Transport) -> tuple[Batch, Any]:
    """One redistribution.

    real: rows are dealt by tokens, and what is balanced stays. full: every sample changes worker. The rows of each
    worker are a stratum of their own, in which the row without tokens costs as much as a share must have: it fills
    its worker, and the samples are dealt evenly among all others.
    """
    if case == "real":
        return redistribute(batch, collectives, fields=FIELDS, split="tokens", transport=transport)
    cost = batch.lengths("response_ids").clone()
    cost[-1] = cost.sum() // (collectives.size - 1)
    strata = torch.full((len(batch),), collectives.rank)
    arrangement: dict[str, Any] = {"cost": lambda _: cost, "strata": strata}
    return redistribute(batch, collectives, fields=FIELDS, split="tokens", transport=transport, **arrangement)


def serve(rank: int, work: dict[str, Any], port: int, pipe: Any) -> None:
    """A worker: does what it is told through the pipe."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    size, case = work["workers"], work["case"]
    backend = select("cpu")
    backend.bind(rank, threads=1)
    collectives = Collectives.init(backend, rank, size, timeout_s=300)
    transport = open_transport(work["transport"], collectives)
    pipe.send(transport.name)
    share = common.SAMPLES // size
    samples = torch.arange(rank * share, (rank + 1) * share)
    batch = result = None
    while (order := pipe.recv()) != "end":
        if order == "make":
            batch = make(samples) if case == "real" else make_anchored(samples, rank)
            common.settle()
            pipe.send(batch.nbytes)
        elif order == "hop":
            result = None
            collectives.barrier()
            start = time.perf_counter()
            result, moved = hop(case, batch, collectives, transport)
            pipe.send((start, time.perf_counter(), moved.bytes_sent, moved.rows_kept))
        else:
            assert result is not None
            pipe.send((result.nbytes, *check(result)))
    collectives.close()


def check(result: Batch) -> tuple[int, int]:
    """Number of samples, and their digest."""
    rows = result.take((result.dense("sample_id") < common.SAMPLES).nonzero().squeeze(1))
    fields = {"prompts": "prompt_ids", "responses": "response_ids", **common.PER_TOKEN}
    return len(rows), common.digest({theirs: _pad(rows.ragged(ours)) for theirs, ours in fields.items()})


def _pad(column: Ragged) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(column.rows(), batch_first=True)


def main(work: dict[str, Any]) -> dict[str, Any]:
    """All hops of one case."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    context = mp.get_context("spawn")
    ends = [context.Pipe() for _ in range(work["workers"])]
    workers = [
        context.Process(target=serve, args=(rank, work, port, other), daemon=True)
        for rank, (_, other) in enumerate(ends)
    ]
    for worker in workers:
        worker.start()
    pipes = [end for end, _ in ends]

    def every(order: str) -> list[Any]:
        for pipe in pipes:
            pipe.send(order)
        return [pipe.recv() for pipe in pipes]

    transport, *_ = [pipe.recv() for pipe in pipes]
    common.tell("idle")
    held = every("make")
    every("hop")
    seconds = []
    common.tell("start")
    for _ in range(work["hops"]):
        starts, ends_, sent, kept = zip(*every("hop"), strict=True)
        seconds.append(max(ends_) - min(starts))
    common.tell("stop")
    common.tell("begin")
    every("hop")
    common.tell("end")
    arrived, rows, digests = zip(*every("check"), strict=True)
    if work["case"] == "full" and any(count != 1 for count in kept):
        raise SiirlError(f"rows stayed where none should: {[count - 1 for count in kept]}")
    for pipe in pipes:
        pipe.send("end")
    for worker in workers:
        worker.join()
    return {
        "seconds": seconds,
        "moved_bytes": sum(sent),
        "rows_kept": sum(kept),
        "transport": transport,
        "held_bytes": list(held),
        "arrived_bytes": list(arrived),
        "rows": sum(rows),
        "digest": common.add(list(digests)),
        "versions": {"siirl": siirl.__version__, "torch": torch.__version__},
    }


if __name__ == "__main__":
    common.tell("result", **main(json.loads(Path(sys.argv[1]).read_text())))
