"""Gradients are reduced once an update, however many micro-batches they are summed over."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from siirl.device.collectives import Collectives
from tests.training.batches import batch, config, decoder
from tests.training.test_updates import update
from tests.training.workers import together

ROWS = [[0, 1, 2, 3, 6, 7], [4, 5, 8, 9, 10, 11]]
BUDGETS = (10_000, 20)
UPDATES = 2
UNITS = 3  # two layers, and all the rest


class _Traffic(TorchDispatchMode):
    """Counts collectives of float32 tensors (metrics are float64, counts integers), and their elements."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
            if any(t.dtype == torch.float32 for t in tensors):
                name = str(func).split(".")[1].strip("_")
                self.calls[name] += 1
                self.elements[name] += max(t.numel() for t in tensors)
        return func(*args, **kwargs or {})


def _count(collectives: Collectives) -> dict[str, dict[str, dict[str, int]]]:
    found = {}
    for sharding in ("replicate", "shard"):
        for budget in BUDGETS:
            settings = config(
                training__sharding=sharding, training__micro_batch_tokens=budget, algorithm__mini_batches=UPDATES
            )
            with _Traffic() as traffic:
                update(settings, batch().take(ROWS[collectives.rank]), collectives=collectives)
            found[f"{sharding} {budget}"] = {"calls": dict(traffic.calls), "elements": dict(traffic.elements)}
    return found


def test_gradients_are_reduced_once_an_update(tmp_path: Path) -> None:
    parameters = sum(p.numel() for p in decoder().parameters())
    for found in together(_count, 2, tmp_path):
        for budget in BUDGETS:
            replicated, sharded = found[f"replicate {budget}"], found[f"shard {budget}"]
            assert replicated["calls"]["allreduce"] == UPDATES
            assert replicated["elements"]["allreduce"] == UPDATES * parameters
            assert sharded["calls"]["reduce_scatter_base"] == UPDATES * UNITS
            assert sharded["elements"]["reduce_scatter_base"] == pytest.approx(UPDATES * parameters, rel=0.05)  # padded
        # weights are gathered for each pass: this is what more micro-batches cost
        few, many = (found[f"shard {budget}"]["calls"]["allgather_base"] for budget in BUDGETS)
        assert few < many
