"""A model of thousands of parameters, samples for it, and a configuration: what the checks of engines run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from siirl.config.schema import Config
from siirl.data.batch import Batch, Ragged
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.model.config import DecoderConfig
from siirl.model.decoder import Decoder
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.fsdp import TrainingEngine
from siirl.training.losses import LOSSES

PROMPTS, VOCABULARY, EOS = 6, 61, 1


def decoder(seed: int = 3, intermediate_size: int = 80) -> Decoder:
    """On the host, in float32, the same on every machine; its logits are far enough apart to compare token by token."""
    config = DecoderConfig(
        family="qwen3",
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=intermediate_size,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_positions=128,
        qk_norm=True,
        initializer_range=0.25,
    )
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(seed))
    return model


def samples() -> Batch:
    """12 samples, two to each of 6 prompts, of 1 to 9 and 1 to 12 tokens; sample 4 has failed."""
    generator = torch.Generator().manual_seed(11)
    slots = torch.arange(PROMPTS).repeat_interleave(2)
    lengths = torch.tensor([1, 5, 12, 3, 2, 8, 6, 1, 4, 10, 2, 7])

    def tokens(lengths: Tensor) -> Ragged:
        rows = [torch.randint(2, VOCABULARY, (int(n),), generator=generator) for n in lengths]
        return Ragged.from_lists(rows, torch.int64)

    def numbers(mean: float, scale: float) -> Ragged:
        rows = [torch.randn(int(n), generator=generator) * scale + mean for n in lengths]
        return Ragged.from_lists(rows, torch.float32)

    return Batch(
        {
            "sample_id": torch.arange(12),
            "group_id": slots,
            "slot": slots,
            "prompt_ids": tokens(torch.tensor([1, 4, 9, 2, 7, 3])).take(slots),
            "response_ids": tokens(lengths),
            "advantages": numbers(0.0, 1.0),
            "old_log_probs": numbers(-4.0, 0.3),
            "failed": torch.arange(12) == 4,
        }
    )


def settings(**training: Any) -> Config:
    """A configuration for these samples: plain gradient descent, clipped, in several micro-batches."""
    chosen = {"optimizer": "sgd", "lr": 0.2, "max_grad_norm": 0.5, "micro_batch_tokens": 48}
    return Config.model_validate(
        {
            "data": {"prompts_per_step": PROMPTS, "max_prompt_tokens": 9},
            "rollout": {"max_new_tokens": 12},
            "algorithm": {"mini_batches": 2},
            "training": chosen | training,
        }
    )


def engine(config: Config, backend: Backend, collectives: Collectives, model: Decoder | None = None) -> TrainingEngine:
    """A training engine at the beginning of a stage."""
    made = TrainingEngine(model or decoder(), config.training, backend, collectives, "actor")
    made.begin(config, config.training.lr)
    return made


def train(
    trained: TrainingEngine, config: Config, batch: Batch, collectives: Collectives, steps: int
) -> dict[str, Any]:
    """Update `steps` times on the same samples; the metrics of all, reduced over the workers."""
    metrics = StepMetrics()
    for step in range(1, steps + 1):
        trained.update(batch, LOSSES["policy"](config.algorithm), step, metrics)
    return metrics.reduce(collectives)


def weights(trained: TrainingEngine) -> dict[str, Tensor]:
    """The whole parameters, on the host."""
    return {name: tensor.detach().cpu().clone() for name, tensor in trained.named_weights()}
