"""The nodes of control_plane.yaml: they compute nothing, and read the clocks of a step."""

from __future__ import annotations

from time import perf_counter, process_time

import torch

from siirl.data.batch import Batch, Ragged, offsets_of
from siirl.worker.context import Context

_before: list[float] = []


def clock(batch: Batch, context: Context) -> dict[str, torch.Tensor]:
    """What this worker spent since it was here a step ago, metrics and the loop around the steps included."""
    groups = {context.collectives, context.world, context.moving}  # rows move on a group of their own
    now = [perf_counter(), process_time(), sum(g.seconds for g in groups), float(sum(g.calls for g in groups))]
    if _before:
        wall, cpu, waited, calls = (after - before for after, before in zip(now, _before, strict=True))
        context.metrics.mean("control/wall_s", wall, 1)
        context.metrics.mean("control/collectives_s", waited, 1)
        context.metrics.min("control/collectives_least_s", waited)
        context.metrics.sum("control/cpu_s", cpu)
        context.metrics.max("control/calls", calls)
    _before[:] = now
    return {}


def respond(batch: Batch, context: Context) -> dict[str, Ragged]:
    """One token for every prompt."""
    rows = len(batch)
    return {
        "response_ids": Ragged(torch.zeros(rows, dtype=torch.int64), offsets_of(torch.ones(rows, dtype=torch.int64)))
    }


def learn(batch: Batch, context: Context) -> dict[str, torch.Tensor]:
    """Nothing; its layout is that of an update, so that rows are dealt anew before it."""
    context.metrics.sum("control/samples", len(batch))
    return {}
