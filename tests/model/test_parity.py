"""The decoder computes what `transformers` computes, logits and gradients, for each family and each switch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from siirl.model.decoder import Decoder
from siirl.model.load import load_model
from tests.model.small_models import run_alone, run_packed

Saved = Callable[..., tuple[PreTrainedModel, Path]]

# With theta 100 and heads of 8 the four wavelengths (6, 20, 63, 199) fall into all three bands of 8 … 32.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
EXPERTS = {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases and llama3 rope": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama, tied, linear rope, wide heads": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LINEAR, "head_dim": 16},
    ),
    "llama, other epsilon": ("llama", {"rms_norm_eps": 0.1}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3, tied, biases, wide heads": (
        "qwen3",
        {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe, tied, layers without experts, weights as they are": (
        "qwen3_moe",
        EXPERTS
        | {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [1], "tie_word_embeddings": True},
    ),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def pair(request: pytest.FixtureRequest, saved: Saved) -> tuple[Decoder, PreTrainedModel]:
    """The same checkpoint as a decoder and as a model of `transformers`."""
    model_type, settings = request.param
    theirs, directory = saved(model_type, **settings)
    ours = load_model(str(directory)).model
    assert isinstance(ours, Decoder)
    return ours, theirs


def mean_log_prob(logits: list[Tensor], sequences: list[list[int]]) -> Tensor:
    total = torch.zeros(())
    for logits_LV, tokens in zip(logits, sequences, strict=True):
        targets = torch.tensor(tokens[1:], dtype=torch.int64)
        total = total + torch.log_softmax(logits_LV[:-1], -1).gather(1, targets[:, None]).sum()
    return total / sum(map(len, sequences))


def test_logits_packed_and_one_by_one(pair: tuple[Decoder, PreTrainedModel], sequences: list[list[int]]) -> None:
    ours, theirs = pair
    with torch.no_grad():
        expected = run_alone(theirs, sequences)
        packed = run_packed(ours, sequences)
        alone = [run_packed(ours, [sequence])[0] for sequence in sequences]
    assert max(x.abs().max() for x in expected) > 1  # a comparison of numbers near zero would show nothing
    for want, together, single in zip(expected, packed, alone, strict=True):
        assert (together - want).abs().max() <= 1e-4
        assert (single - want).abs().max() <= 1e-4


def test_gradients(pair: tuple[Decoder, PreTrainedModel], sequences: list[list[int]]) -> None:
    ours, theirs = pair
    mean_log_prob(run_packed(ours, sequences), sequences).backward()
    mean_log_prob(run_alone(theirs, sequences), sequences).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == set(expected)
    for name, parameter in ours.named_parameters():
        want = expected[name]
        assert want is not None
        assert parameter.grad is not None
        assert float((parameter.grad.cpu() - want).abs().max()) <= 1e-4 * float(want.abs().max()), name


def test_logits_in_bfloat16_are_near(saved: Saved, sequences: list[list[int]]) -> None:
    theirs, directory = saved("qwen3", head_dim=8)
    ours = load_model(str(directory), dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        for want, got in zip(run_alone(theirs, sequences), run_packed(ours, sequences), strict=True):
            assert (got.float() - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize("settings", [LLAMA3, LINEAR], ids=["llama3", "linear"])
def test_rope_keys_of_older_checkpoints(settings: dict[str, Any], saved: Saved, sequences: list[list[int]]) -> None:
    theirs, directory = saved("llama", rope_parameters=settings)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    if scaling["rope_type"] == "linear":
        scaling["type"] = scaling.pop("rope_type")
    file.write_text(json.dumps(config | {"rope_scaling": scaling}))
    ours = load_model(str(directory)).model
    with torch.no_grad():
        for want, got in zip(run_alone(theirs, sequences), run_packed(ours, sequences), strict=True):
            assert (got - want).abs().max() <= 1e-4
