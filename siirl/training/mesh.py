"""The workers of training as a mesh: data x context x tensor, the last one fastest."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from siirl.dag.plan import Layout
from siirl.device.collectives import Collectives

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """One worker's groups.

    Attributes:
        data: workers that hold different rows, one of each share: those with this one's place in its share.
        context: workers that compute different tokens of the same rows with the same part of the weights.
        tensor: workers that compute the same tokens with different parts of the weights.
        replicas: data x context: workers whose gradients add up, and among whom FSDP2 shards.
        workers: of training, all of them.
        copy: number of this worker among those that hold the same rows; the first one speaks for them.
        expert: neighbouring workers with different rows that hold a part of each layer's experts each.
        same_experts: workers that hold the same experts; all that train where these are whole.
    """

    data: Collectives
    context: Collectives
    tensor: Collectives
    replicas: Collectives
    workers: Collectives
    copy: int = 0
    expert: Collectives = field(default_factory=Collectives.single)
    same_experts: Collectives = field(default_factory=Collectives.single)

    @classmethod
    def plain(cls, workers: Collectives) -> Mesh:
        """Data parallel only."""
        return cls(workers, Collectives.single(), Collectives.single(), workers, workers)

    @classmethod
    def of(cls, world: Collectives, layout: Layout, workers: Collectives | None) -> Mesh | None:
        """This worker's groups; None on a worker of the run that does not train.

        Args:
            world: all workers of the run; all of them call this.
            layout: of training.
            workers: of training; None where this one is none of them.
        """
        inner = layout.tensor * layout.context
        if layout.expert > 1:
            groups = torch.tensor(layout.ranks).view(-1, layout.expert)
            expert, same = _group(world, groups), _group(world, groups.t())
            if workers is None:
                return None
            assert expert is not None and same is not None
            return replace(cls.plain(workers), expert=expert, same_experts=same)
        if inner == 1:
            return None if workers is None else cls.plain(workers)
        ranks = torch.tensor(layout.ranks).view(layout.data, layout.context, layout.tensor)
        data = _group(world, ranks.permute(1, 2, 0).reshape(inner, -1))
        context = _group(world, ranks.permute(0, 2, 1).reshape(-1, layout.context))
        tensor = _group(world, ranks.reshape(-1, layout.tensor))
        replicas = data if layout.context == 1 else _group(world, ranks.permute(2, 0, 1).reshape(layout.tensor, -1))
        if workers is None:
            return None
        assert data is not None and context is not None and tensor is not None and replicas is not None
        return cls(data, context, tensor, replicas, workers, workers.rank % inner)

    def expert_devices(self, device: str) -> DeviceMesh | None:
        """PyTorch's view of ``expert``; None for one worker."""
        from torch.distributed.device_mesh import DeviceMesh  # a second to import

        if self.expert.size == 1:
            return None
        assert self.expert.group is not None
        return DeviceMesh.from_group(self.expert.group, device, mesh_dim_names=("expert",))

    def devices(self, device: str) -> tuple[DeviceMesh | None, DeviceMesh | None]:
        """PyTorch's view of ``replicas`` and of ``tensor``, parts of one mesh; None for one worker, or for all.

        Args:
            device: PyTorch's type of device.
        """
        from torch.distributed.device_mesh import DeviceMesh  # a second to import

        # it would have one all-gather in place of two, which a group for each pair of dimensions costs
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        replicas, tensor = self.replicas, self.tensor
        if tensor.size == 1:
            group = replicas.group
            return None if group is None else DeviceMesh.from_group(group, device, mesh_dim_names=("replicas",)), None
        assert tensor.group is not None
        if replicas.size == 1:
            return None, DeviceMesh.from_group(tensor.group, device, mesh_dim_names=("tensor",))
        assert replicas.group is not None
        ranks = torch.arange(self.workers.size).view(-1, tensor.size)
        both = DeviceMesh.from_group(
            [replicas.group, tensor.group], device, mesh=ranks, mesh_dim_names=("replicas", "tensor")
        )
        return both["replicas"], both["tensor"]


def _group(world: Collectives, rows: torch.Tensor) -> Collectives | None:
    """The group of the row that has this worker; all workers make all groups in the same order."""
    if rows.shape[1] == 1:
        return Collectives.single()
    groups = [world.subgroup(row.tolist()) for row in rows]
    return next((group for group in groups if group is not None), None)
