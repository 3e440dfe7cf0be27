"""Architectures the decoder does not know run through `transformers`, packed, with the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from siirl.errors import RequestError
from siirl.model.critic import ValueModel
from siirl.model.export import save_pretrained
from siirl.model.fallback import TransformersDecoder
from siirl.model.load import load_model
from siirl.model.tokenizer import char_tokenizer
from tests.model.small_models import run_alone, run_packed

Saved = Callable[..., tuple[PreTrainedModel, Path]]

GPT2 = ("gpt2", {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 256, "tie_word_embeddings": True})
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": (*GPT2, "no architecture 'gpt2'"),
    "gpt-neox": ("gpt_neox", {}, "no architecture 'gpt_neox'"),
    "a sliding window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "no sliding-window attention",
    ),
    "mistral with its window": ("mistral", {"sliding_window": 8}, "no sliding-window attention"),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "no rotary embedding of type 'yarn' with these parameters",
    ),
    "gelu": ("llama", {"hidden_act": "gelu"}, "no activation 'gelu'"),
}


def load(directory: Path, reason: str = "") -> TransformersDecoder:
    with pytest.warns(UserWarning, match=f"{reason}, so transformers runs it"):
        loaded = load_model(str(directory))
    assert loaded.config is None
    assert isinstance(loaded.model, TransformersDecoder)
    return loaded.model


@pytest.mark.parametrize(("model_type", "settings", "reason"), MODELS.values(), ids=MODELS.keys())
def test_packed_logits_equal_each_sequence_alone(
    model_type: str, settings: dict[str, Any], reason: str, saved: Saved, sequences: list[list[int]]
) -> None:
    theirs, directory = saved(model_type, **settings)
    ours = load(directory, reason)
    with torch.no_grad():
        for want, got in zip(run_alone(theirs, sequences), run_packed(ours, sequences), strict=True):
            assert (got - want).abs().max() <= 1e-4


def test_the_config_has_what_callers_need(saved: Saved) -> None:
    _, directory = saved(*GPT2[:1], **GPT2[1])
    config = load(directory).config
    assert (config.family, config.vocab_size, config.hidden_size, config.max_positions) == ("gpt2", 120, 48, 256)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (2, (1,), 0)


def test_dropout_stays_off_in_training(saved: Saved, sequences: list[list[int]]) -> None:
    _, directory = saved(*GPT2[:1], **GPT2[1], resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = load(directory)
    quiet = run_packed(model.eval(), sequences)[0]
    assert torch.equal(run_packed(model.train(), sequences)[0], quiet)


def test_gradients_reach_every_weight(saved: Saved, sequences: list[list[int]]) -> None:
    _, directory = saved(*GPT2[:1], **GPT2[1])
    model = load(directory).train()
    torch.cat(run_packed(model, sequences)).logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_critic_and_an_export(saved: Saved, sequences: list[list[int]], tmp_path: Path) -> None:
    theirs, directory = saved(*GPT2[:1], **GPT2[1])
    model = load(directory)
    save_pretrained(model, char_tokenizer(), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        for want, got in zip(run_alone(theirs, sequences), run_alone(again, sequences), strict=True):
            assert torch.equal(want, got)
    assert ValueModel(model).value_head.weight.shape == (1, 48)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("phi", {}),  # a bias
        ("cohere", {"logit_scale": 0.5}),
        ("gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8, "query_pre_attn_scalar": 8}),
    ],
)
def test_logits_that_a_matrix_cannot_give_are_refused(model_type: str, settings: dict[str, Any], saved: Saved) -> None:
    _, directory = saved(model_type, **settings)
    with pytest.raises(RequestError, match="its logits are more than hidden states times a matrix"):
        load_model(str(directory))


def test_a_missing_weight_is_not_made_up(saved: Saved) -> None:
    _, directory = saved("gpt_neox")
    tensors = load_file(directory / "model.safetensors")
    del tensors["embed_out.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match="lacks 1 weights of its architecture, the first is "):
        load_model(str(directory))


def test_a_config_that_does_not_fit_is_refused(saved: Saved) -> None:
    _, directory = saved("gpt_neox")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 121}))
    with pytest.raises(RequestError, match="transformers cannot load it as a language model"):
        load_model(str(directory))


def test_a_cache_is_not_pretended(saved: Saved) -> None:
    _, directory = saved(*GPT2[:1], **GPT2[1])
    model = load(directory)
    assert model.supports_cache is False
    with pytest.raises(AssertionError, match="no cache"):
        model(torch.tensor([1]), torch.tensor([0]), lambda layer, q, k, v: q)
