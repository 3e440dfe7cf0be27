"""One stage of a run on a cluster: everything that memory, traffic and time are computed from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from siirl.config.schema import Config
from siirl.dag import Graph, Layout, Step, check_batch, plan_steps, rollout_layout, training_layout
from siirl.errors import RequestError
from siirl.planning.budget import Held, auto_tokens
from siirl.planning.cluster import Cluster
from siirl.planning.models import check_degrees, find_shape
from siirl.planning.shape import ModelShape
from siirl.planning.workload import Lengths, Rows

ITEMSIZE = {"float32": 4, "bfloat16": 2}


SAMPLED_SHARES = 64
"""Estimates draw and assign the rows of so many shares: a share's part is alike in larger runs."""


@dataclass(frozen=True)
class Job:
    """A stage's plan and where it runs.

    Attributes:
        config, cluster, lengths: of the stage; the cluster has devices for all workers.
        workers: processes.
        steps, models: of the plan, the same for every worker.
        shapes: of the models in the plan, and always the actor's.
        graph: that is planned.
        drawn: rows that were drawn already, by their parameters; jobs made from one another share them.
    """

    config: Config
    cluster: Cluster
    lengths: Lengths
    workers: int
    steps: tuple[Step, ...]
    models: tuple[str, ...]
    shapes: dict[str, ModelShape]
    graph: Graph
    drawn: dict[tuple[Any, ...], Rows] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, config: Config, cluster: Cluster, workers: int, lengths: Lengths | None = None) -> Job:
        """Plan ``config`` on ``workers`` workers of ``cluster``.

        Raises:
            RequestError: the plan does not work, or a model's shape is not known.
        """
        graph, model = Graph.from_yaml(config.pipeline), config.model
        check_batch(config, workers, graph)
        if config.placement != "colocated":
            raise RequestError("the cost model knows placement=colocated only; set it to plan on a cluster")
        grown = cluster.grown(workers)
        steps, models = plan_steps(graph, config, workers, grown.hosts(workers))
        paths = {"actor": model.path, "reference": model.reference or model.path, "critic": model.critic or model.path}
        keys = {"actor": "model.path", "reference": "model.reference", "critic": "model.critic"}
        shapes = {name: find_shape(paths[name], keys[name]) for name in dict.fromkeys(("actor", *models))}
        check_degrees(config)
        expected = lengths or Lengths.of(config)
        return cls(config, grown, expected, workers, steps, models, shapes, graph)

    def changed(self, config: Config, workers: int | None = None) -> Job:
        """The same with other degrees, sizes or workers; model and pipeline stay. Raises as `of`."""
        count = self.workers if workers is None else workers
        check_batch(config, count, self.graph)
        cluster = self.cluster.grown(count)
        steps, models = plan_steps(self.graph, config, count, cluster.hosts(count))
        return replace(self, config=config, workers=count, cluster=cluster, steps=steps, models=models)

    @property
    def actor(self) -> ModelShape:
        return self.shapes["actor"]

    @cached_property
    def rollout(self) -> Layout:
        return rollout_layout(self.config, self.workers)

    @cached_property
    def training(self) -> Layout:
        return training_layout(self.config, self.workers)

    @property
    def group(self) -> int:
        """Samples of a prompt."""
        return self.config.rollout.group_size if self.generates else 1

    @cached_property
    def generates(self) -> bool:
        return any(step.op == "rollout" for step in self.steps)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the forward pass."""
        return ITEMSIZE[self.config.training.dtype]

    @property
    def megatron(self) -> bool:
        return self.config.training.engine == "megatron"

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the models."""
        return self.config.training.sharding == "shard" and self.replicas > 1 and not self.megatron

    @property
    def replicas(self) -> int:
        """Workers with the same part of the weights before they are sharded."""
        return self.training.data * self.training.context

    def held(self, model: str) -> float:
        """Parameters of a worker's part of a model before they are sharded: tensor parallelism cuts them, expert
        parallelism deals out the experts."""
        experts = self.shapes[model].num_layers * self.shapes[model].expert_parameters
        return (self.parameters(model) - experts + experts / self.training.expert) / self.training.tensor

    @property
    def on_host(self) -> bool:
        """Whether shards, their gradients and optimiser states lie in the host's memory, away from the device's."""
        return self.sharded and self.config.training.cpu_offload and not self.cluster.device.unified

    @property
    def shared_weights(self) -> bool:
        """Whether the rollout engine computes with training's own tensors."""
        native = self.config.rollout.engine == "native" and not self.megatron and not self.adapted
        whole = not self.sharded and self.training.tensor * self.training.expert == 1
        return native and whole and self.config.training.dtype == "float32"

    @cached_property
    def budget(self) -> int:
        """Tokens of a micro-batch: `training.micro_batch_tokens`, or for `auto` what fits."""
        config, device = self.config, self.cluster.device
        if config.training.micro_batch_tokens != "auto":
            return config.training.micro_batch_tokens
        counts = {name: float(self.parameters(name)) for name in dict.fromkeys(("actor", *self.models))}
        models = [Held(count, count * (name in self.trained)) for name, count in counts.items()]
        # on a host whose workers share the memory, a core's part of it: their number changes nothing
        memory = self.cluster.memory(self.cluster.devices if device.unified else self.workers)
        longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        shards = self.replicas if self.sharded else 1
        return auto_tokens(self.actor, models, config.training, memory, shards, longest, unified=device.unified)

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, beside weights that stay."""
        return self.config.model.lora.rank > 0

    @property
    def resident(self) -> tuple[str, ...]:
        """Models with weights of their own: a reference that is the actor without its adapters has none."""
        shared = self.adapted and self.config.model.reference is None
        return tuple(name for name in dict.fromkeys(("actor", *self.models)) if name != "reference" or not shared)

    @property
    def trained(self) -> tuple[str, ...]:
        """Models that an `update` of the plan trains."""
        return tuple(dict.fromkeys(step.model for step in self.steps if step.op == "update" and step.model))

    def parameters(self, model: str) -> int:
        """Of a whole model."""
        return self.shapes[model].critic_parameters if model == "critic" else self.shapes[model].parameters

    def adapters(self, model: str) -> int:
        """Parameters of a model's adapters; the reference has none."""
        lora = self.config.model.lora
        return 0 if model == "reference" else self.shapes[model].adapter_parameters(lora.rank, lora.targets)

    def trainable(self, model: str) -> int:
        """Parameters that are optimised: all, or those of the adapters and of a critic's head."""
        head = self.shapes[model].hidden_size * (model == "critic")
        return self.adapters(model) + head if self.adapted else self.parameters(model)

    def held_trainable(self, model: str) -> float:
        """Those of a worker's part of a model before it is sharded; adapters are whole."""
        return float(self.trainable(model)) if self.adapted else self.held(model)

    def prompts(self, shares: int) -> int:
        """Prompts of the fullest of so many shares."""
        return -(-self.config.data.prompts_per_step // shares)

    @cached_property
    def sampled(self) -> Rows:
        """The rows of a part of the run."""
        return self.rows(SAMPLED_SHARES)

    def rows(self, shares: int | None = None, seed: int = 0) -> Rows:
        """A step's samples on ``shares`` training shares (default: all), as many a share as in the run.

        With fewer shares than the run has, the mini-batches keep their rows a share.
        """
        data, algorithm = self.config.data, self.config.algorithm
        part = 1.0 if shares is None else min(1.0, shares / self.training.data)
        targets = max(1, round(self.training.data * part))
        sources = max(1, round(self.rollout.data * part))
        prompts = max(sources, targets, round(data.prompts_per_step * part))
        prompts = -(-prompts // algorithm.mini_batches) * algorithm.mini_batches
        key = (self.lengths, prompts, self.group, algorithm.mini_batches, sources, targets, seed)
        if key not in self.drawn:
            self.drawn[key] = Rows.draw(*key)
        return self.drawn[key]
