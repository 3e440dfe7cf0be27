"""Small random models of `transformers`, and the two ways to run a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from siirl.model.decoder import PackedAttention
from siirl.model.tokenizer import char_tokenizer
from siirl_kernels.packing import PackedSequences
from tests.device_under_test import device

SHAPE: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def make_model(model_type: str, **settings: Any) -> PreTrainedModel:
    """A model of `transformers` whose weights, biases and norms included, are all far from their initial values."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SHAPE | settings)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model.eval()


def save(model: PreTrainedModel, directory: Path, **settings: Any) -> Path:
    model.save_pretrained(directory, **settings)
    char_tokenizer().save_pretrained(directory)
    return directory


def run_packed(model: nn.Module, sequences: list[list[int]]) -> list[Tensor]:
    """Logits of each sequence, all packed into one call on the device under test; it keeps the model."""
    model.to(device())
    packed = PackedSequences(tuple(map(len, sequences)), device())
    tokens = torch.tensor([token for sequence in sequences for token in sequence], device=device())
    hidden = model(tokens, packed.positions, PackedAttention(packed))
    return list(model.logits(hidden).cpu().split(packed.lengths))


def run_alone(model: PreTrainedModel, sequences: list[list[int]]) -> list[Tensor]:
    """Logits of each sequence from `transformers`, one by one."""
    return [model(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences]
