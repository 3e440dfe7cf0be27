"""How a model lies over the workers that train it: cut, dealt out, sharded or replicated."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from siirl.config.schema import ParallelConfig, TrainingConfig
from siirl.dag.degrees import check_model
from siirl.device.backend import Backend
from siirl.errors import RequestError
from siirl.model.critic import ValueModel
from siirl.model.fallback import AnyDecoder, FallbackConfig
from siirl.training.containment import Containment
from siirl.training.expert_parallel import spread_experts
from siirl.training.mesh import Mesh
from siirl.training.outputs import CriticModel, LogProbModel
from siirl.training.sharding import shard, sum_gradients, whole
from siirl.training.tensor_parallel import parallelize, sum_partial
from siirl_kernels import kernels


class Spread:
    """One model over the workers of a mesh.

    Args:
        model: the decoder or value model; changed in place.
        module: what a pass calls, around it.
        training: of the run's main stage.
        backend: of this worker.
        mesh: of the workers that train.

    Attributes:
        sharded: whether FSDP2 shards the model over the replicas.
        containment: of a lack of memory in a sharded model's passes; None where nothing contains it.

    Raises:
        RequestError: the model cannot be cut so.
    """

    def __init__(
        self, model: AnyDecoder | ValueModel, module: nn.Module, training: TrainingConfig, backend: Backend, mesh: Mesh
    ) -> None:
        parallel, device = training.parallel, backend.device().type
        assert (mesh.tensor.size, mesh.context.size) == (parallel.tensor, parallel.context), "a mesh of other degrees"
        _check_degrees(model, parallel)
        self._module, self.mesh = module, mesh
        self.sharded = training.sharding == "shard" and mesh.replicas.size > 1
        if isinstance(module, LogProbModel | CriticModel):
            module.context = (mesh.context, parallel.context_mode)
            module.tokens_cut = mesh.tensor.size > 1 and parallel.sequence
        replicas, tensor = mesh.devices(device) if self.sharded or mesh.tensor.size > 1 else (None, None)
        self._cut = parallelize(module, mesh.tensor, tensor, parallel.sequence)
        if isinstance(module, LogProbModel) and self._cut.vocabulary:
            module.vocabulary = mesh.tensor
        self._experts = spread_experts(module, mesh.expert, mesh.expert_devices(device))
        self.containment: Containment | None = None
        if self.sharded:
            # routers' probabilities leave a layer beside its result
            plain = not isinstance(model.config, FallbackConfig) and not model.config.sparse_layers
            if plain and mesh.tensor.size * mesh.context.size == 1:
                self.containment = cast(LogProbModel, module).containment = Containment(model)
            shard(module, getattr(torch, training.dtype), backend, replicas, training.cpu_offload)

    @property
    def whole(self) -> bool:
        """Whether this worker holds every parameter as a plain tensor."""
        return not self.sharded and self.mesh.tensor.size * self.mesh.expert.size == 1

    @property
    def lockstep(self) -> bool:
        """Whether passes are collectives, which a worker must not leave."""
        return not self.whole or self.mesh.context.size > 1

    def passes(self, own: int) -> int:
        """How many passes a worker with ``own`` micro-batches takes part in. A collective where they are."""
        if self.sharded or self.mesh.expert.size > 1:
            return int(self.mesh.replicas.all_reduce(torch.tensor(own), "max"))
        return own

    def begin_pass(self, last: bool) -> None:
        """Before a pass whose gradients add up with others': with the ``last`` one a sharded model reduces them."""
        if self.sharded:
            cast(Any, self._module).set_requires_gradient_sync(last)

    @property
    def averaged(self) -> int:
        """How many workers' gradients are averaged, where a loss that is normalised over all of them has to add up."""
        return self.mesh.replicas.size if self.sharded else 1

    def reduce_gradients(self) -> None:
        """Sum the gradients over the workers, as far as the passes have not."""
        if not self.sharded:
            named = list(self._module.named_parameters())
            sum_gradients([p for name, p in named if name not in self._experts], self.mesh.replicas)
            sum_gradients([p for name, p in named if name in self._experts], self.mesh.same_experts)
        sum_partial(self._module, self._cut)

    def clip_gradients(self, limit: float) -> float:
        """Scale all gradients so that their norm is at most ``limit``; the norm before."""
        if not self.whole:
            return float(whole(nn.utils.clip_grad_norm_(self._module.parameters(), limit)))
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        norm = kernels.gradient_norm(gradients)
        share = float(limit / (norm + 1e-6))
        if share < 1.0:  # most steps need no pass over all gradients
            torch._foreach_mul_(gradients, share)
        return float(norm)

    def reshard(self) -> None:
        """After passes without a backward one, which would do it: parameters are those of the optimiser again."""
        if self.sharded:
            cast(Any, self._module).reshard()


def _check_degrees(model: AnyDecoder | ValueModel, parallel: ParallelConfig) -> None:
    if not isinstance(model.config, FallbackConfig):
        check_model(model.config, parallel)
        return
    for name in ("tensor", "context", "expert"):
        if (degree := getattr(parallel, name)) > 1:
            key = f"training.parallel.{name}"
            raise RequestError(f"{key} is {degree}, but transformers runs this model, which is not cut; set {key}=1")
