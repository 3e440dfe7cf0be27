"""Training: `TrainingEngine` against `siirl.bench.plain.PlainTrainer`, which pads all rows to the longest.

Both see rows of 16 prompts with 4 responses each, whose lengths differ by a factor of four. The engine packs them, and
computes a group's prompt once.
"""

from __future__ import annotations

import torch

from siirl.bench import setting
from siirl.bench.measure import Measure, Rate
from siirl.bench.plain import PlainDecoder, PlainTrainer
from siirl.config.schema import Config
from siirl.data.batch import Batch
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.model.decoder import Decoder
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.fsdp import TrainingEngine
from siirl.training.losses import policy_update

PROMPTS, GROUP, PROMPT, LONGEST = 8, 4, 32, 48


def _engine(backend: Backend) -> tuple[TrainingEngine, Config, Batch]:
    config = setting.config(PROMPTS, GROUP, LONGEST)
    engine = TrainingEngine(setting.decoder(backend), config.training, backend, Collectives.single(), "actor")
    engine.begin(config, config.training.lr)
    return engine, config, setting.responses(PROMPTS, GROUP, PROMPT, LONGEST)


def _tokens(batch: Batch) -> Rate:
    return Rate(float(batch.lengths("prompt_ids").sum() + batch.lengths("response_ids").sum()), "tokens")


def bench_update(measure: Measure, backend: Backend) -> None:
    engine, config, batch = _engine(backend)
    loss = policy_update(config.algorithm)
    trainer, tokens, lengths = _plain(backend, engine, batch)
    advantages = batch.ragged("advantages").values[batch.ragged("advantages").offsets[:-1]].to(backend.device())
    with torch.no_grad():
        old = trainer.log_probs(tokens, PROMPT)
    measure(
        lambda: engine.update(batch, loss, step=1, metrics=StepMetrics()),
        lambda: trainer.update(tokens, PROMPT, lengths, old, advantages),
        _tokens(batch),
        against="plain PyTorch, padded to the longest",
        pairs=20,
    )


def bench_log_probs(measure: Measure, backend: Backend) -> None:
    engine, _, batch = _engine(backend)
    trainer, tokens, _ = _plain(backend, engine, batch)
    measure(
        lambda: engine.log_probs(batch, mini_batches=1),
        torch.no_grad()(lambda: trainer.log_probs(tokens, PROMPT)),
        _tokens(batch),
        against="plain PyTorch, padded to the longest",
        pairs=20,
    )


def _plain(backend: Backend, engine: TrainingEngine, batch: Batch) -> tuple[PlainTrainer, torch.Tensor, torch.Tensor]:
    assert isinstance(engine.model, Decoder)
    tokens, lengths = (x.to(backend.device()) for x in setting.padded(batch, PROMPT))
    return PlainTrainer(PlainDecoder(engine.model), 1e-8, Collectives.single()), tokens, lengths
