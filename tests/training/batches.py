"""A tiny model and a batch of ragged samples, with everything a policy or value update reads."""

from __future__ import annotations

import torch

from siirl.config.schema import Config
from siirl.data.batch import Batch, Ragged
from siirl.model.config import DecoderConfig
from siirl.model.decoder import Decoder

PROMPTS_PER_STEP = 6


def decoder(seed: int = 3) -> Decoder:
    config = DecoderConfig(
        family="qwen3",
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=128,
        qk_norm=True,
        initializer_range=0.2,
    )
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(seed))
    return model


def batch() -> Batch:
    """12 samples, two of each of 6 prompts, lengths 1 to 9 and 1 to 12; sample 4 has failed."""
    g = torch.Generator().manual_seed(11)
    slots = torch.arange(PROMPTS_PER_STEP).repeat_interleave(2)
    prompt_lengths = torch.tensor([1, 4, 9, 2, 7, 3])
    response_lengths = torch.tensor([1, 5, 12, 3, 2, 8, 6, 1, 4, 10, 2, 7])

    def tokens(lengths: torch.Tensor) -> Ragged:
        return Ragged.from_lists([torch.randint(2, 50, (int(n),), generator=g) for n in lengths], torch.int64)

    def numbers(scale: float) -> Ragged:
        rows = [torch.randn(int(n), generator=g) * scale for n in response_lengths]
        return Ragged.from_lists(rows, torch.float32)

    failed = torch.zeros(12, dtype=torch.bool)
    failed[4] = True
    return Batch(
        {
            "sample_id": torch.arange(12),
            "group_id": slots,
            "slot": slots,
            "prompt_ids": tokens(prompt_lengths).take(slots),
            "response_ids": tokens(response_lengths),
            "advantages": numbers(1.0),
            "returns": numbers(1.0),
            "values": numbers(0.1),
            "old_log_probs": Ragged(numbers(0.3).values - 3.9, numbers(1.0).offsets),
            "ref_log_probs": Ragged(numbers(0.3).values - 3.9, numbers(1.0).offsets),
            "failed": failed,
        }
    )


def config(**changes: object) -> Config:
    """A configuration for these batches; ``changes`` are dotted keys with ``__`` for the dot."""
    values: dict = {
        "data": {"prompts_per_step": PROMPTS_PER_STEP, "max_prompt_tokens": 9},
        "rollout": {"max_new_tokens": 12},
        "training": {"optimizer": "sgd", "lr": 0.5, "max_grad_norm": None, "micro_batch_tokens": 64},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return Config.model_validate(values)
