"""The built-in training engine: packed micro-batches, data parallel, replicated or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from siirl.algorithms.aggregation import token_weights
from siirl.config.schema import Config, TrainingConfig
from siirl.data.batch import Batch, Ragged
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.errors import SiirlError
from siirl.model.critic import ValueModel
from siirl.model.decoder import PackedAttention
from siirl.model.fallback import AnyDecoder
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.losses import Loss
from siirl.training.microbatch import MicroBatch, dummy, input_lengths, mini_batch_index, pack, split
from siirl.training.optimizer import lr_factor, make_optimizer
from siirl_kernels import kernels

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# gradients are summed over workers in pieces of this many elements
_BUCKET = 64 * 2**20


class LogProbModel(nn.Module):
    """A decoder whose forward pass ends in log-probs, so that sharding gathers the head's weight where it is used."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, micro: MicroBatch, temperature: float, greedy: bool = False) -> tuple[Tensor, ...]:
        """Log-probs and entropies of the response tokens, float32 [R] each.

        With ``greedy`` they are of the likeliest tokens instead, whose ids come third, int64 [R].
        """
        hidden = self.decoder(micro.tokens_T, micro.sequences.positions, PackedAttention(micro.sequences))
        hidden, weight = hidden[micro.predict_R], self.decoder.head_weight
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if greedy:
            tokens_R = nn.functional.linear(hidden, cast(Tensor, weight)).argmax(-1)
            return (*kernels.linear_log_prob(hidden, weight, tokens_R, temperature), tokens_R)
        return kernels.linear_log_prob(hidden, weight, micro.targets_R, temperature)


class CriticModel(nn.Module):
    """A value model over micro-batches."""

    def __init__(self, decoder: ValueModel) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, ...]:
        """Values at the positions that predict a response token, float32 [R]."""
        values = self.decoder(micro.tokens_T, micro.sequences.positions, PackedAttention(micro.sequences))
        return (values.float()[micro.predict_R],)


class TrainingEngine:
    """Log-probs, values and updates of one model on this worker.

    Args:
        model: a decoder, or a :class:`ValueModel`; moved to the device.
        training: of the run's main stage; says the dtype and whether the model is sharded.
        backend, collectives: of this worker.
        prefix: of this model's metrics, ``actor`` or ``critic``.
    """

    def __init__(
        self,
        model: AnyDecoder | ValueModel,
        training: TrainingConfig,
        backend: Backend,
        collectives: Collectives,
        prefix: str,
    ) -> None:
        self.model, self.prefix = model, prefix
        self._backend, self._collectives = backend, collectives
        self._device = backend.device()
        self._dtype = getattr(torch, training.dtype)
        model.to(self._device)
        self.module: nn.Module = CriticModel(model) if isinstance(model, ValueModel) else LogProbModel(model)
        self.sharded = training.sharding == "shard" and collectives.size > 1
        if self.sharded:
            _shard(self.module, self._dtype, _mesh(backend, collectives))

    def begin(self, config: Config, lr: float | None) -> None:
        """Begin a stage with a new optimiser; ``lr`` is its peak rate, None for a model that is not trained."""
        self._config, self._lr = config, lr
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
                values = self._forward(micro)[0].float().cpu()
                for row, start, end in zip(micro.rows.tolist(), micro.offsets, micro.offsets[1:], strict=False):
                    out[offsets[row] : offsets[row + 1]] = values[start:end]
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
            outputs = self._forward(micro)
            value = loss(outputs, part, weights.to(self._device), metrics)
            # FSDP averages gradients over workers; the loss is normalised over all of them already, so they add up
            (value * self._collectives.size if self.sharded else value).backward()
            metrics.sum(f"{self.prefix}/loss", value.item() / updates)
        if not self.sharded:
            self._sum_gradients()
        norm = self._clip()
        metrics.mean(f"{self.prefix}/grad_norm", norm, 1)
        if not torch.isfinite(torch.tensor(norm)):
            raise SiirlError(
                f"the gradient of the {self.prefix} is {norm}; lower training.lr or training.max_grad_norm, "
                "or look at the newest samples for what the loss could not take"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _forward(self, micro: MicroBatch) -> tuple[Tensor, ...]:
        return self._compute(micro, self._config.rollout.temperature or 1.0)

    def _compute(self, *arguments: Any) -> tuple[Tensor, ...]:
        if self._dtype == torch.float32 or self.sharded:
            return self.module(*arguments)
        with self._backend.autocast(self._dtype):
            return self.module(*arguments)

    def _mini_batches(self, batch: Batch, count: int) -> list[Tensor]:
        index = mini_batch_index(batch.dense("slot"), self._config.data.prompts_per_step, count)
        return [(index == m).nonzero().squeeze(1) for m in range(count)]

    def _micro_batches(self, batch: Batch, rows: Tensor) -> list[MicroBatch]:
        parts = split(input_lengths(batch)[rows], batch.dense("slot")[rows], self._config.training.micro_batch_tokens)
        micros = [pack(batch, rows[part], self._device) for part in parts]
        wanted = max(1, len(micros))  # a worker without rows still names its metrics and has gradients to add
        if self.sharded:  # every pass is a collective: all workers make as many
            wanted = int(self._collectives.all_reduce(torch.tensor(wanted), "max"))
        return micros + [dummy(self._device)] * (wanted - len(micros))

    def _global_counts(self, batch: Batch, minis: list[Tensor], valid: Tensor) -> list[tuple[int, int]]:
        """Response tokens and responses of each mini-batch over all workers."""
        lengths = batch.lengths("response_ids")
        counts = torch.tensor([[int(lengths[r][valid[r]].sum()), int(valid[r].sum())] for r in minis])
        return [tuple(pair) for pair in self._collectives.all_reduce(counts, "sum").tolist()]

    def _sum_gradients(self) -> None:
        """Sum the gradients over workers; a worker without rows contributes zeros."""
        if self._collectives.size == 1:
            return
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        for bucket in _buckets(parameters):
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
            flat = self._collectives.all_reduce(torch.cat([g.reshape(-1) for g in grads]), "sum")
            for parameter, piece in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = piece.view_as(parameter)

    def _clip(self) -> float:
        limit = self._config.training.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        return float(_whole(norm))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters by their own names, gathered whole one at a time where they are sharded."""
        for name, parameter in self.model.named_parameters():
            yield name, self._backend.to_canonical(_whole(parameter))


def _whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what a sharded one is a part of: a collective then."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather()


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(p.numel() for p in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _mesh(backend: Backend, collectives: Collectives) -> DeviceMesh | None:
    """Of the workers that train; None for all workers of the run."""
    if collectives.group is None:
        return None
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(collectives.group, backend.device().type)


def _shard(module: nn.Module, dtype: torch.dtype, mesh: DeviceMesh | None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a second to import

    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if dtype != torch.float32
        else MixedPrecisionPolicy()
    )
    blocks = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    for block in (b for layers in blocks for b in layers):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
