"""A model over several workers: sharded by FSDP2, or replicated with its gradients summed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from siirl.device.backend import Backend
from siirl.device.collectives import Collectives

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# gradients are summed over workers in pieces of this many elements
_BUCKET = 64 * 2**20


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what a sharded one is a part of: a collective then."""
    own = tensor.detach()
    gather = getattr(own, "full_tensor", None)
    return own if gather is None else gather()


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors themselves, or of sharded ones the parts that are on this worker, the same memory.

    Without gradients.
    """
    return [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]


def sum_gradients(parameters: Iterable[nn.Parameter], collectives: Collectives) -> None:
    """Sum the gradients over workers; a worker without rows contributes zeros."""
    for bucket in _buckets([p for p in parameters if p.requires_grad]):
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sum_flat([own_grad(parameter) for parameter in bucket], collectives)


def own_grad(parameter: nn.Parameter) -> Tensor:
    """This worker's part of a gradient, by reference."""
    grad: Any = parameter.grad
    return getattr(grad, "_local_tensor", grad)


def sum_flat(grads: Sequence[Tensor], collectives: Collectives) -> None:
    """Sum tensors over workers in place, in one reduction."""
    if not grads or collectives.size == 1:
        return
    flat = collectives.all_reduce(torch.cat([grad.reshape(-1) for grad in grads]), "sum")
    for grad, piece in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(piece.view_as(grad))


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
    module: nn.Module, dtype: torch.dtype, backend: Backend, replicas: DeviceMesh | None, on_host: bool = False
) -> None:
    """Shard the parameters over workers (FSDP2), one unit per layer; compute in ``dtype``, reduce in float32.

    Args:
        module: cut over its tensor group already.
        dtype: to compute in.
        backend: of this worker.
        replicas: the workers; None for all of the run.
        on_host: each worker's part, its gradient and what the optimiser has lie in the host's memory.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard  # a second

    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if dtype != torch.float32
        else MixedPrecisionPolicy()
    )
    offload = CPUOffloadPolicy(pin_memory=backend.capabilities().pin_memory) if on_host else OffloadPolicy()
    blocks = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    for block in (b for layers in blocks for b in layers):
        fully_shard(block, mesh=replicas, mp_policy=policy, offload_policy=offload)
    fully_shard(module, mesh=replicas, mp_policy=policy, offload_policy=offload)
