"""Training: `TrainingEngine` against `siirl.bench.plain.PlainTrainer`, which pads all rows to the longest.

Both see rows of 16 prompts with 4 responses each, whose lengths differ by a factor of four. The engine packs them, and
computes a group's prompt once. The engine's use of the machine is its time against that of matrix products alone, as
many operations as the model's.
"""

from __future__ import annotations

import pytest
import torch

from siirl.bench import setting
from siirl.bench.measure import Measure, Rate, Work
from siirl.bench.plain import PlainDecoder, PlainTrainer
from siirl.config.schema import Config
from siirl.data.batch import Batch
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.model.decoder import Decoder
from siirl.planning.shape import ModelShape, Numbers
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.fsdp import TrainingEngine
from siirl.training.losses import policy_update

PROMPTS, GROUP, PROMPT, LONGEST = 8, 4, 32, 48
# SmolLM2-135M on a host, a model of the size of Qwen2.5-1.5B on an accelerator; tokens of a prompt, and prompts
HOST, ACCELERATOR = ("smollm2-135m", 64, 2), ("qwen2.5-1.5b", 512, 8)


def _engine(
    backend: Backend,
    model: Decoder | None = None,
    prompt: int = PROMPT,
    dtype: Numbers = "float32",
    prompts: int = PROMPTS,
) -> tuple[TrainingEngine, Config, Batch]:
    config = setting.config(prompts, GROUP, LONGEST)
    config.training.dtype = dtype
    model = model or setting.decoder(backend)
    engine = TrainingEngine(model, config.training, backend, Collectives.single(), "actor")
    engine.begin(config, config.training.lr)
    return engine, config, setting.responses(prompts, GROUP, prompt, LONGEST)


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_utilisation(measure: Measure, backend: Backend, dtype: Numbers) -> None:
    if dtype not in backend.capabilities().fast_dtypes:
        pytest.skip(f"{dtype} is not fast here")
    name, prompt, prompts = ACCELERATOR if backend.is_accelerator() else HOST
    model, shape = setting.decoder_of(backend, name)
    engine, config, batch = _engine(backend, model, prompt, dtype, prompts)
    operations = 3 * _forward_operations(shape, batch)
    loss = policy_update(config.algorithm)
    measure(
        lambda: engine.update(batch, loss, step=1, metrics=StepMetrics()),
        _products(backend, getattr(torch, dtype), shape, operations),
        Rate(operations, "FLOP"),
        against="matrix products of as many operations",
        pairs=3,
    )


def _forward_operations(shape: ModelShape, batch: Batch) -> float:
    """Of the distinct tokens: each prompt once, each response but its last token, whose successor nobody asks for."""
    prompts = batch.lengths("prompt_ids")[::GROUP].double()
    own = batch.lengths("response_ids").double() - 1
    pairs = (prompts * (prompts + 1) / 2).sum() + (own * prompts[0] + own * (own + 1) / 2).sum()
    return shape.forward_flops(float(prompts.sum() + own.sum()), float(pairs), float((own + 1).sum()))


def _products(backend: Backend, dtype: torch.dtype, shape: ModelShape, operations: float) -> Work:
    """Products of 1,024 rows with a matrix of the model's MLP, until there are as many operations."""
    rows, hidden, size = 1024, shape.hidden_size, shape.intermediate_size
    x, weight = (torch.ones(n, hidden, dtype=dtype, device=backend.device()) for n in (rows, size))
    times = max(1, round(operations / (2 * rows * hidden * size)))

    def multiply() -> None:
        for _ in range(times):
            torch.nn.functional.linear(x, weight)

    return torch.no_grad()(multiply)
