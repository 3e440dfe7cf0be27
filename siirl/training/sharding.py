"""A model over several workers: sharded by FSDP2, or replicated with its gradients summed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from siirl.device.backend import Backend
from siirl.device.collectives import Collectives

# gradients are summed over workers in pieces of this many elements
_BUCKET = 64 * 2**20


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what a sharded one is a part of: a collective then."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather()


def local(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors themselves, or of sharded ones the parts that are on this worker, the same memory; all or none are.

    Without gradients.
    """
    sharded = bool(tensors) and hasattr(tensors[0], "to_local")
    return [cast(Any, tensor).to_local() for tensor in tensors] if sharded else tensors


def sum_gradients(module: nn.Module, collectives: Collectives) -> None:
    """Sum the gradients over workers; a worker without rows contributes zeros."""
    if collectives.size == 1:
        return
    for bucket in _buckets([p for p in module.parameters() if p.requires_grad]):
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
        flat = collectives.all_reduce(torch.cat([g.reshape(-1) for g in grads]), "sum")
        for parameter, piece in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = piece.view_as(parameter)


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(p.numel() for p in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def shard(
    module: nn.Module, dtype: torch.dtype, backend: Backend, collectives: Collectives, on_host: bool = False
) -> None:
    """Shard the parameters over the workers (FSDP2), one unit per layer; compute in ``dtype``, reduce in float32.

    ``on_host``: each worker's part, its gradient and what the optimiser has lie in the host's memory.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard  # a second

    group = collectives.group  # None: all workers of the run
    mesh = None if group is None else DeviceMesh.from_group(group, backend.device().type)
    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if dtype != torch.float32
        else MixedPrecisionPolicy()
    )
    offload = CPUOffloadPolicy(pin_memory=backend.capabilities().pin_memory) if on_host else OffloadPolicy()
    blocks = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    for block in (b for layers in blocks for b in layers):
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
