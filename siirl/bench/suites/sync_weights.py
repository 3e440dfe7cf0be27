"""New weights for the rollout engine: `NativeEngine.update_weights` against the bare copies it stands for.

One worker: from the actor's float32 tensors into the engine's own. Two workers, each with half of every tensor: what
FSDP2 holds is gathered tensor by tensor and copied.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from siirl.bench import setting
from siirl.bench.counters import Counted, count, total
from siirl.bench.measure import Measure, Rate
from siirl.bench.world import World
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.rollout.engine import NativeEngine
from siirl.training.fsdp import TrainingEngine

MODEL = "tiny:qwen3:256:4:4096"


class Sync:
    """An actor, a rollout engine with weights of its own, and the copies by hand."""

    def __init__(self, backend: Backend, collectives: Collectives, dtype: str) -> None:
        self._backend, self._collectives = backend, collectives
        config = setting.config(1, 1, 1)
        config.training.sharding = "shard"
        self.actor = TrainingEngine(setting.decoder(backend, MODEL), config.training, backend, collectives, "actor")
        own = setting.decoder(backend, MODEL).to(getattr(torch, dtype)).requires_grad_(False)
        self.engine = NativeEngine(own, [setting.END], lambda ids: "")
        self.tensors = list(own.parameters())
        self.sources = [_shard(p, collectives) for p in setting.decoder(backend, MODEL).parameters()]
        self.whole = [torch.empty(collectives.size * s.numel(), device=s.device) for s in self.sources]

    @property
    def nbytes(self) -> int:
        """Bytes that the engine holds afterwards."""
        return sum(t.nbytes for t in self.tensors)

    def candidate(self) -> None:
        self.engine.update_weights(self.actor.named_weights(), version=1)

    def reference(self) -> None:
        with torch.no_grad():
            for own, source, whole in zip(self.tensors, self.sources, self.whole, strict=True):
                if self._collectives.size > 1:
                    dist.all_gather(list(whole.chunk(self._collectives.size)), source)
                    source = whole[: own.numel()].view_as(own)
                own.copy_(source)

    def counted(self) -> Counted:
        return count(self.candidate, self._backend)


def _shard(parameter: torch.Tensor, collectives: Collectives) -> torch.Tensor:
    """This worker's part of a parameter, flat and filled up with zeros; the parameter itself where there is one."""
    if collectives.size == 1:
        return parameter.detach()
    size = -(-parameter.numel() // collectives.size)
    filled = torch.nn.functional.pad(parameter.detach().flatten(), (0, size * collectives.size - parameter.numel()))
    return filled[collectives.rank * size :][:size].clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_whole(measure: Measure, backend: Backend, dtype: str) -> None:
    sync = Sync(backend, Collectives.single(), dtype)
    measure(sync.candidate, sync.reference, Rate(sync.nbytes, "bytes"), against="a copy of each tensor")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_sharded(measure_wall: Measure, backend: Backend, dtype: str) -> None:
    setting.need_devices(backend, 2)
    nbytes = Sync(backend, Collectives.single(), dtype).nbytes
    with World(backend, 2, Sync, dtype) as world:
        found = total(world.call("counted"))
        measure_wall(
            lambda: world.call("candidate"),
            lambda: world.call("reference"),
            Rate(2 * nbytes, "bytes"),
            against="an all-gather and a copy of each tensor",
            pairs=30,
            counted=lambda: found,
        )
