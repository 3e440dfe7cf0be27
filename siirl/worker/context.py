"""What a node's implementation may use, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from siirl.algorithms.kl import KLController
from siirl.algorithms.mismatch import Trust
from siirl.config.schema import Config
from siirl.data.batch import Batch, Column
from siirl.data.dataloader import DistributedDataloader, Item
from siirl.data.dynamic_sampling import GroupPool
from siirl.data.prompts import PromptReader
from siirl.data.transport import Transports
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.rewards.pool import RewardPool
from siirl.rollout.partial import CarriedGroups
from siirl.telemetry.accumulator import StepMetrics

if TYPE_CHECKING:
    from siirl.training.mesh import Mesh
    from siirl.worker.models import Models


@dataclass
class Context:
    """One worker's view of a stage.

    ``collectives`` and ``transports`` are of the workers that share this one's role, ``world`` and
    ``world_transports`` of all. Rows that travel while a node uses the collectives of all workers travel on others of
    their own. ``mesh`` is of the workers that train; None on the others. In a node that reads rows which several of
    them hold, ``collectives`` are of the workers that hold different ones, and ``metrics`` count for the first holder
    alone. ``step`` counts from 1; ``policy_version`` is the number of steps that the rollout engine's weights
    have seen; ``rollout_seed`` differs by stage, for sample ids begin anew in each. ``pool`` holds
    what is kept from step to step: groups that passed the filter where the pipeline has a node with ``op:
    dynamic_sampling``, groups begun where ``rollout.partial`` is above 0.
    """

    stage: str
    config: Config
    run_dir: Path
    backend: Backend
    collectives: Collectives
    transports: Transports
    world: Collectives
    world_transports: Transports
    mesh: Mesh | None
    models: Models
    loader: DistributedDataloader
    reader: PromptReader
    held_out: list[Item]
    eval_reader: PromptReader
    rewards: RewardPool
    metrics: StepMetrics
    kl: KLController
    rollout_seed: int
    pool: GroupPool | CarriedGroups | None = None
    trust: Trust | None = None
    step: int = 0
    policy_version: int = 0

    @property
    def first_holder(self) -> bool:
        """Whether this worker speaks for the rows that it holds."""
        return self.mesh is None or self.collectives is not self.mesh.data or not self.mesh.copy


@dataclass(frozen=True)
class Output:
    """What an op did to the batch.

    Attributes:
        columns: new columns, by their formal names; ragged or dense, over the rows after ``take``.
        take: int64 [rows]: the rows that go on, in order; a row may come several times. None: all, once.
        batch: a new batch in place of the old one (an op that is a source of rows).
        whole: from the batch with all its columns, those that the node does not read too, the one that goes on; None
            when the plan has to run again from its first step to this one.
    """

    columns: Mapping[str, Column] = field(default_factory=dict)
    take: Tensor | None = None
    batch: Batch | None = None
    whole: Callable[[Batch], Batch | None] | None = None


Op = Callable[..., Output | Mapping[str, Column] | None]
"""(context, the columns it reads under their formal names, node) -> Output, or just its columns."""
