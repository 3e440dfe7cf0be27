"""The built-in training engine: packed micro-batches, over as many workers as :class:`Spread` lays the model on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from siirl.algorithms.aggregation import token_weights
from siirl.config.memory import check_memory_keys
from siirl.config.schema import Config, TrainingConfig
from siirl.data.batch import Batch, Ragged
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.errors import SiirlError
from siirl.model.critic import ValueModel
from siirl.model.decoder import Decoder
from siirl.model.experts import Routing
from siirl.model.fallback import AnyDecoder
from siirl.model.lora import begin_adapters, is_adapter, merged_weights
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.activations import bound_activations
from siirl.training.balance import Balance, require_experts, shares
from siirl.training.budget import TokenBudget
from siirl.training.compiled import compile_layers
from siirl.training.losses import Loss
from siirl.training.mesh import Mesh
from siirl.training.microbatch import MicroBatch, dummy, input_lengths, mini_batch_index, pack, split
from siirl.training.optimizer import lr_factor, make_optimizer, set_rate
from siirl.training.outputs import CriticModel, LogProbModel
from siirl.training.replay import COLUMN, check_choices
from siirl.training.sharding import whole
from siirl.training.spread import Spread


class TrainingEngine:
    """Log-probs, values and updates of one model on this worker.

    Args:
        model: a decoder, or a :class:`ValueModel`; moved to the device.
        training: of the run's main stage; says the dtype and how the model lies over the workers.
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
        check_memory_keys(training, self._mesh.replicas.size)
        self._bounded = bound_activations(model, training, backend)
        self.spread = Spread(model, self.module, training, backend, self._mesh)
        decoder = model.decoder if isinstance(model, ValueModel) else model
        known, cast_here = isinstance(decoder, Decoder), self._dtype != torch.float32 and not self.spread.sharded
        self._autocast = cast_here and not known
        if isinstance(decoder, Decoder) and cast_here:
            decoder.compute_dtype = self._dtype
        if training.compile:
            compile_layers(model)
        self.budget = TokenBudget(backend, self._mesh.workers, self.spread.lockstep, self.spread.containment)

    def begin(self, config: Config, lr: float | None) -> None:
        """Begin a stage with a new optimiser; ``lr`` is its peak rate, None for a model that is not trained."""
        self._config, self._lr = config, lr
        self.budget.begin(config)
        if lr is not None and self.prefix == "actor":
            require_experts(self.model, config)
        begin_adapters(self.model, lr is not None, adapters=config.model.lora.rank > 0)
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

        def infer(_: int, micro: MicroBatch) -> None:
            told = None if micro.choices_TLK is None else Routing(micro.choices_TLK)
            values = self._forward(micro, told)[0].float().cpu()
            for row, start, end in zip(micro.rows.tolist(), micro.offsets, micro.offsets[1:], strict=False):
                out[offsets[row] : offsets[row + 1]] = values[start:end]

        for rows in self._mini_batches(batch, mini_batches):
            while not self.budget.fit(self._micro_batches(batch, rows), infer):
                pass
        self.spread.reshard()
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
            self.budget.check()
            tokens.append(found[2].cpu())
            log_probs.append(found[0].float().cpu())
            texts = [[*text, int(token)] for text, token in zip(texts, tokens[-1], strict=True)]
        self.spread.reshard()
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
            set_rate(group, self._lr * lr_factor(step, self._config.training))
        minis = self._mini_batches(batch, algorithm.mini_batches)
        valid = ~batch.dense("failed") if "failed" in batch else torch.ones(len(batch), dtype=torch.bool)
        counts = self._global_counts(batch, minis, valid)
        for _ in range(algorithm.epochs):
            for rows, (tokens, sequences) in zip(minis, counts, strict=True):
                self._update_once(batch, rows, valid, tokens, sequences, loss, metrics)
        metrics.mean(f"{self.prefix}/lr", float(self.optimizer.param_groups[0]["lr"]), 1)

    def _update_once(
        self, batch: Batch, rows: Tensor, valid: Tensor, tokens: int, sequences: int, loss: Loss, metrics: StepMetrics
    ) -> None:
        assert self.optimizer is not None
        while True:
            micros, seen = self._micro_batches(batch, rows), StepMetrics()
            balance = self._balance(COLUMN in batch)
            learn = partial(self._learn, batch, valid, (tokens, sequences), loss, balance, seen, len(micros) - 1)
            if self._count(balance, micros, valid) and self.budget.fit(micros, learn):
                break
            self.optimizer.zero_grad(set_to_none=True)
        metrics.add(seen)
        if balance is not None:
            metrics.sum(f"{self.prefix}/loss", balance.report(metrics) / self._updates)
        self.spread.reduce_gradients()
        norm = self.spread.clip_gradients(self._config.training.max_grad_norm or float("inf"))
        metrics.mean(f"{self.prefix}/grad_norm", norm, 1)
        if not torch.isfinite(torch.tensor(norm)):
            raise SiirlError(
                f"the gradient of the {self.prefix} is {norm}; lower training.lr or training.max_grad_norm, "
                "or look at the newest samples for what the loss could not take"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def _updates(self) -> int:
        """Of a step."""
        return self._config.algorithm.mini_batches * self._config.algorithm.epochs

    def _learn(
        self,
        batch: Batch,
        valid: Tensor,
        counts: tuple[int, int],
        loss: Loss,
        balance: Balance | None,
        metrics: StepMetrics,
        last: int,
        number: int,
        micro: MicroBatch,
    ) -> None:
        """Add a micro-batch's gradients; those of the ``last`` one are reduced over the workers."""
        self.spread.begin_pass(last=number == last)
        weights = token_weights(
            self._config.algorithm.loss_agg,
            micro.offsets.diff(),
            valid[micro.rows],
            global_tokens=counts[0],
            global_sequences=counts[1],
            max_length=self._config.rollout.max_new_tokens,
        )
        routing = None if balance is None else Routing(micro.choices_TLK)
        value = loss(self._forward(micro, routing), batch.take(micro.rows), weights.to(self._device), metrics)
        metrics.sum(f"{self.prefix}/loss", value.item() / self._updates)
        if balance is not None and routing is not None:
            even = balance.loss(routing, shares(micro, valid))
            value = value if even is None else value + even
        (value * self.spread.averaged).backward()

    def _balance(self, replay: bool) -> Balance | None:
        """The load of a model's experts in a mini-batch; None where it has none."""
        if not isinstance(self.model, Decoder) or not self.model.config.sparse_layers:
            return None
        coef = self._config.training.router_aux_coef
        coef = self.model.config.router_aux_loss_coef if coef is None else coef
        return Balance(self.model.config, coef, self._mesh.replicas, replay)

    @torch.no_grad()
    def _count(self, balance: Balance | None, micros: Sequence[MicroBatch], valid: Tensor) -> bool:
        """Count the load by a pass of its own where the loss needs it first; False where memory ran out.

        That pass has the micro-batches and weights of the update's, so routers choose the same.
        """
        if balance is None or not balance.needs_counts:
            return True

        def count(_: int, micro: MicroBatch) -> None:
            routing = Routing(micro.choices_TLK)
            self._forward(micro, routing)
            balance.count(routing, shares(micro, valid))

        if not self.budget.fit(micros, count):
            return False
        balance.counted()
        return True

    def _forward(self, micro: MicroBatch, routing: Routing | None = None) -> tuple[Tensor, ...]:
        temperature = self._config.rollout.temperature or 1.0
        return self._compute(micro, temperature, *(() if routing is None else (False, routing)))

    def _compute(self, *arguments: Any) -> tuple[Tensor, ...]:
        with self._bounded():
            if not self._autocast:
                return self.module(*arguments)
            with self._backend.autocast(self._dtype):
                return self.module(*arguments)

    def _mini_batches(self, batch: Batch, count: int) -> list[Tensor]:
        index = mini_batch_index(batch.dense("slot"), self._config.data.prompts_per_step, count)
        return [(index == m).nonzero().squeeze(1) for m in range(count)]

    def _micro_batches(self, batch: Batch, rows: Tensor) -> list[MicroBatch]:
        if COLUMN in batch:
            assert isinstance(self.model, Decoder)
            check_choices(batch, self.model.config)
        lengths, prompt_lengths = input_lengths(batch)[rows], batch.lengths("prompt_ids")[rows]
        parts = split(lengths, batch.dense("slot")[rows], prompt_lengths, self.budget.tokens)
        micros = [pack(batch, rows[part], self._device) for part in parts]
        # a worker without rows still names its metrics and has gradients to add
        passes = self.spread.passes(max(1, len(micros)))
        return micros + [dummy(self._device)] * (passes - len(micros))

    def _global_counts(self, batch: Batch, minis: list[Tensor], valid: Tensor) -> list[tuple[int, int]]:
        """Response tokens and responses of each mini-batch over all workers."""
        lengths = batch.lengths("response_ids")
        counts = torch.tensor([[int(lengths[r][valid[r]].sum()), int(valid[r].sum())] for r in minis])
        return [tuple(pair) for pair in self._mesh.data.all_reduce(counts, "sum").tolist()]

    def named_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The model's weights by their own names, gathered whole one at a time where they are sharded.

        Adapters are merged into what they adapt, each part rounded to ``dtype`` before where one is given.
        """
        for name, tensor in merged_weights(self.model, whole, dtype):
            yield name, self._backend.to_canonical(tensor)

    def parts(self, *, adapters: bool) -> Iterator[tuple[str, Tensor]]:
        """As :meth:`named_weights`, unmerged: the adapters' matrices, or all but those."""
        for name, parameter in self.model.named_parameters():
            if is_adapter(name) == adapters:
                yield name, self._backend.to_canonical(whole(parameter))
