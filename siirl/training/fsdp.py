"""The built-in training engine: packed micro-batches, data parallel, replicated or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from siirl.algorithms.aggregation import token_weights
from siirl.config.schema import Config, ParallelConfig, TrainingConfig
from siirl.dag.degrees import check_model
from siirl.data.batch import Batch, Ragged
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.errors import RequestError, SiirlError
from siirl.model.critic import ValueModel
from siirl.model.decoder import Decoder
from siirl.model.experts import Routing
from siirl.model.fallback import AnyDecoder, FallbackConfig
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.balance import Balance, require_experts, shares
from siirl.training.expert_parallel import spread_experts
from siirl.training.losses import Loss
from siirl.training.mesh import Mesh
from siirl.training.microbatch import MicroBatch, dummy, input_lengths, mini_batch_index, pack, split
from siirl.training.optimizer import lr_factor, make_optimizer
from siirl.training.outputs import CriticModel, LogProbModel
from siirl.training.replay import COLUMN, check_choices
from siirl.training.sharding import shard, sum_gradients, whole
from siirl.training.tensor_parallel import TensorParallel, parallelize, sum_partial


class TrainingEngine:
    """Log-probs, values and updates of one model on this worker.

    Args:
        model: a decoder, or a :class:`ValueModel`; moved to the device.
        training: of the run's main stage; says the dtype and whether the model is sharded.
        backend: of this worker.
        collectives: of the workers that train.
        prefix: of this model's metrics, ``actor`` or ``critic``.
        mesh: of the same workers; None for data parallel only.
    """

    def __init__(
        self,
        model: AnyDecoder | ValueModel,
        training: TrainingConfig,
        backend: Backend,
        collectives: Collectives,
        prefix: str,
        mesh: Mesh | None = None,
    ) -> None:
        self.model, self.prefix = model, prefix
        self._backend, self._mesh = backend, mesh or Mesh.plain(collectives)
        self._device = backend.device()
        self._dtype = getattr(torch, training.dtype)
        model.to(self._device)
        self.module: nn.Module = CriticModel(model) if isinstance(model, ValueModel) else LogProbModel(model)
        self.sharded = training.sharding == "shard" and self._mesh.replicas.size > 1
        decoder = model.decoder if isinstance(model, ValueModel) else model
        self._autocast = self._dtype != torch.float32 and not self.sharded and not isinstance(decoder, Decoder)
        if isinstance(decoder, Decoder) and not self.sharded:
            decoder.compute_dtype = self._dtype
        self._parallel = self._spread(training)

    def _spread(self, training: TrainingConfig) -> TensorParallel:
        """Cut and shard the model over the workers of the mesh."""
        mesh, parallel = self._mesh, training.parallel
        assert (mesh.tensor.size, mesh.context.size) == (parallel.tensor, parallel.context), "a mesh of other degrees"
        if isinstance(self.module, LogProbModel | CriticModel):
            self.module.context = (mesh.context, parallel.context_mode)
            self.module.tokens_cut = mesh.tensor.size > 1 and parallel.sequence
        _check_degrees(self.model, parallel)
        replicas, tensor = mesh.devices(self._device.type) if self.sharded or mesh.tensor.size > 1 else (None, None)
        cut = parallelize(self.module, mesh.tensor, tensor, parallel.sequence)
        if isinstance(self.module, LogProbModel) and cut.vocabulary:
            self.module.vocabulary = mesh.tensor
        self._spread_experts = spread_experts(self.module, mesh.expert, mesh.expert_devices(self._device.type))
        if self.sharded:
            shard(self.module, self._dtype, replicas)
        return cut

    @property
    def whole(self) -> bool:
        """Whether this worker holds every parameter as a plain tensor."""
        return not self.sharded and self._mesh.tensor.size == 1 and self._mesh.expert.size == 1

    def begin(self, config: Config, lr: float | None) -> None:
        """Begin a stage with a new optimiser; ``lr`` is its peak rate, None for a model that is not trained."""
        self._config, self._lr = config, lr
        if lr is not None and self.prefix == "actor":
            require_experts(self.model, config)
        self.model.requires_grad_(lr is not None)
        self.optimizer = None if lr is None else make_optimizer(self.module, config.training, lr)

    def log_probs(self, batch: Batch, mini_batches: int) -> Ragged:
        """Log-probs of the response tokens, ragged float32 like ``response_ids``, at the rollout's temperature.

        Micro-batches are those of :meth:`update`, so that its first pass computes the very same numbers.
        """
        return self._infer(batch, mini_batches)

    def values(self, batch: Batch, mini_batches: int) -> Ragged:
        """The critic's values, ragged float32 like ``response_ids``."""
        return self._infer(batch, mini_batches)

    @torch.no_grad()
    def _infer(self, batch: Batch, mini_batches: int) -> Ragged:
        offsets = batch.ragged("response_ids").offsets
        out = torch.zeros(int(offsets[-1]), dtype=torch.float32)
        for rows in self._mini_batches(batch, mini_batches):
            for micro in self._micro_batches(batch, rows):
                told = None if micro.choices_TLK is None else Routing(micro.choices_TLK)
                values = self._forward(micro, told)[0].float().cpu()
                for row, start, end in zip(micro.rows.tolist(), micro.offsets, micro.offsets[1:], strict=False):
                    out[offsets[row] : offsets[row + 1]] = values[start:end]
        self._reshard()
        return Ragged(out, offsets)

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> tuple[Tensor, Tensor]:
        """Continue each prompt by its likeliest tokens, past end tokens too. A collective where the model is sharded.

        Returns:
            The tokens, int64 [prompts, count], and their log-probs at temperature 1, float32, on the host.
        """
        texts = [list(prompt) for prompt in prompts]
        next_one = Ragged.from_lists([torch.zeros(1, dtype=torch.int64)] * len(texts), torch.int64)  # is not read
        tokens, log_probs = [], []
        for _ in range(count):
            rows = Ragged.from_lists([torch.tensor(text) for text in texts], torch.int64)
            batch = Batch({"prompt_ids": rows, "response_ids": next_one})
            found = self._compute(pack(batch, torch.arange(len(texts)), self._device), 1.0, True)
            tokens.append(found[2].cpu())
            log_probs.append(found[0].float().cpu())
            texts = [[*text, int(token)] for text, token in zip(texts, tokens[-1], strict=True)]
        self._reshard()
        return torch.stack(tokens, 1), torch.stack(log_probs, 1)

    def update(self, batch: Batch, loss: Loss, step: int, metrics: StepMetrics) -> None:
        """Run the step's updates: ``algorithm.epochs`` passes of ``algorithm.mini_batches`` mini-batches.

        Args:
            batch: columns ``prompt_ids``, ``response_ids``, ``slot``, optionally ``failed``, and what the loss reads.
            loss: see :mod:`siirl.training.losses`.
            step: from 1; sets the learning rate.
            metrics: takes the statistics of all updates.
        """
        assert self.optimizer is not None and self._lr is not None, "this model is not trained"
        algorithm = self._config.algorithm
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * lr_factor(step, self._config.training)
        minis = self._mini_batches(batch, algorithm.mini_batches)
        valid = ~batch.dense("failed") if "failed" in batch else torch.ones(len(batch), dtype=torch.bool)
        counts = self._global_counts(batch, minis, valid)
        for _ in range(algorithm.epochs):
            for rows, (tokens, sequences) in zip(minis, counts, strict=True):
                self._update_once(batch, rows, valid, tokens, sequences, loss, metrics)
        metrics.mean(f"{self.prefix}/lr", self.optimizer.param_groups[0]["lr"], 1)

    def _update_once(
        self, batch: Batch, rows: Tensor, valid: Tensor, tokens: int, sequences: int, loss: Loss, metrics: StepMetrics
    ) -> None:
        assert self.optimizer is not None
        updates = self._config.algorithm.mini_batches * self._config.algorithm.epochs
        micros = self._micro_batches(batch, rows)
        balance = self._balance(micros, valid, COLUMN in batch)
        for i, micro in enumerate(micros):
            if self.sharded:
                cast(Any, self.module).set_requires_gradient_sync(i == len(micros) - 1)
            part = batch.take(micro.rows)
            weights = token_weights(
                self._config.algorithm.loss_agg,
                micro.offsets.diff(),
                valid[micro.rows],
                global_tokens=tokens,
                global_sequences=sequences,
                max_length=self._config.rollout.max_new_tokens,
            )
            routing = None if balance is None else Routing(micro.choices_TLK)
            outputs = self._forward(micro, routing)
            value = loss(outputs, part, weights.to(self._device), metrics)
            metrics.sum(f"{self.prefix}/loss", value.item() / updates)
            if balance is not None and routing is not None:
                even = balance.loss(routing, shares(micro, valid))
                value = value if even is None else value + even
            # FSDP averages gradients over workers; the loss is normalised over all of them already, so they add up
            (value * self._mesh.replicas.size if self.sharded else value).backward()
        if balance is not None:
            metrics.sum(f"{self.prefix}/loss", balance.report(metrics) / updates)
        if not self.sharded:
            self._sum_gradients()
        sum_partial(self.module, self._parallel)
        norm = self._clip()
        metrics.mean(f"{self.prefix}/grad_norm", norm, 1)
        if not torch.isfinite(torch.tensor(norm)):
            raise SiirlError(
                f"the gradient of the {self.prefix} is {norm}; lower training.lr or training.max_grad_norm, "
                "or look at the newest samples for what the loss could not take"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _sum_gradients(self) -> None:
        named = list(self.module.named_parameters())
        sum_gradients([p for name, p in named if name not in self._spread_experts], self._mesh.replicas)
        sum_gradients([p for name, p in named if name in self._spread_experts], self._mesh.same_experts)

    def _balance(self, micros: Sequence[MicroBatch], valid: Tensor, replay: bool) -> Balance | None:
        """The load of the actor's experts in a mini-batch, counted by a pass of its own where the loss needs it first.

        That pass has the micro-batches and weights of the update's, so routers choose the same.
        """
        if not isinstance(self.model, Decoder) or not self.model.config.sparse_layers:
            return None
        coef = self._config.training.router_aux_coef
        coef = self.model.config.router_aux_loss_coef if coef is None else coef
        balance = Balance(self.model.config, coef, self._mesh.replicas, replay)
        if balance.needs_counts:
            with torch.no_grad():
                for micro in micros:
                    routing = Routing(micro.choices_TLK)
                    self._forward(micro, routing)
                    balance.count(routing, shares(micro, valid))
            balance.counted()
        return balance

    def _forward(self, micro: MicroBatch, routing: Routing | None = None) -> tuple[Tensor, ...]:
        temperature = self._config.rollout.temperature or 1.0
        return self._compute(micro, temperature, *(() if routing is None else (False, routing)))

    def _compute(self, *arguments: Any) -> tuple[Tensor, ...]:
        if not self._autocast:
            return self.module(*arguments)
        with self._backend.autocast(self._dtype):
            return self.module(*arguments)

    def _reshard(self) -> None:
        """After passes without a backward one, which would do it: parameters are those of the optimiser again."""
        if self.sharded:
            cast(Any, self.module).reshard()

    def _mini_batches(self, batch: Batch, count: int) -> list[Tensor]:
        index = mini_batch_index(batch.dense("slot"), self._config.data.prompts_per_step, count)
        return [(index == m).nonzero().squeeze(1) for m in range(count)]

    def _micro_batches(self, batch: Batch, rows: Tensor) -> list[MicroBatch]:
        if COLUMN in batch:
            assert isinstance(self.model, Decoder)
            check_choices(batch, self.model.config)
        lengths, prompt_lengths = input_lengths(batch)[rows], batch.lengths("prompt_ids")[rows]
        slots, budget = batch.dense("slot")[rows], self._config.training.micro_batch_tokens
        parts = split(lengths, slots, prompt_lengths, budget)
        micros = [pack(batch, rows[part], self._device) for part in parts]
        wanted = max(1, len(micros))  # a worker without rows still names its metrics and has gradients to add
        if self.sharded or self._mesh.expert.size > 1:  # every pass is a collective: all workers make as many
            wanted = int(self._mesh.replicas.all_reduce(torch.tensor(wanted), "max"))
        return micros + [dummy(self._device)] * (wanted - len(micros))

    def _global_counts(self, batch: Batch, minis: list[Tensor], valid: Tensor) -> list[tuple[int, int]]:
        """Response tokens and responses of each mini-batch over all workers."""
        lengths = batch.lengths("response_ids")
        counts = torch.tensor([[int(lengths[r][valid[r]].sum()), int(valid[r].sum())] for r in minis])
        return [tuple(pair) for pair in self._mesh.data.all_reduce(counts, "sum").tolist()]

    def _clip(self) -> float:
        limit = self._config.training.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        return float(whole(norm))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters by their own names, gathered whole one at a time where they are sharded."""
        for name, parameter in self.model.named_parameters():
            yield name, self._backend.to_canonical(whole(parameter))


def _check_degrees(model: AnyDecoder | ValueModel, parallel: ParallelConfig) -> None:
    if not isinstance(model.config, FallbackConfig):
        check_model(model.config, parallel)
        return
    for name in ("tensor", "context", "expert"):
        if (degree := getattr(parallel, name)) > 1:
            key = f"training.parallel.{name}"
            raise RequestError(f"{key} is {degree}, but transformers runs this model, which is not cut; set {key}=1")
