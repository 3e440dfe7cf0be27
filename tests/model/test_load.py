"""Hugging Face directories, models from scratch, and everything that is refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from siirl.errors import RequestError
from siirl.model.load import load_model
from tests.model.small_models import run_alone, run_packed

Saved = Callable[..., tuple[PreTrainedModel, Path]]


def edit(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(path: Path | str) -> str:
    with pytest.raises(RequestError) as caught:
        load_model(str(path))
    assert str(caught.value).startswith(f"model.path '{path}'")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sharded_checkpoint_loads_like_a_single_file(saved: Saved, tmp_path: Path) -> None:
    model, directory = saved("qwen2")
    whole = load_model(str(directory)).model.state_dict()
    shards = tmp_path / "shards"
    model.save_pretrained(shards, max_shard_size="40KB")
    (shards / "tokenizer.json").write_text((directory / "tokenizer.json").read_text())
    (shards / "tokenizer_config.json").write_text((directory / "tokenizer_config.json").read_text())
    assert len(list(shards.glob("*.safetensors"))) > 2
    parts = load_model(str(shards)).model.state_dict()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    next(shards.glob("model-00002*")).unlink()
    assert "1 of" in refusal(shards)


def test_the_model_outlives_its_files(saved: Saved) -> None:
    _, directory = saved("llama")
    model = load_model(str(directory)).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (directory / "model.safetensors").write_bytes(b"")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_end_tokens_come_from_both_configs(saved: Saved) -> None:
    _, directory = saved("llama", eos_token_id=5)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5, 9]}))
    config = load_model(str(directory)).config
    assert config is not None
    assert config.eos_token_ids == (7, 5, 9)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_checkpoint_with_an_output_projection(equal: bool, saved: Saved, sequences: list[list[int]]) -> None:
    _, directory = saved("llama", tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head if equal else head.flip(0)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    theirs, ours = AutoModelForCausalLM.from_pretrained(directory), load_model(str(directory)).model
    with torch.no_grad():
        for want, got in zip(run_alone(theirs, sequences), run_packed(ours, sequences), strict=True):
            assert (got - want).abs().max() <= 1e-4


@pytest.mark.parametrize("hidden", [32, 64, 96, 256])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "qwen3_moe"])
def test_a_tiny_model_has_the_documented_shape(architecture: str, hidden: int) -> None:
    settings: dict[str, Any] = {"head_dim": 32} if architecture.startswith("qwen3") else {}
    if architecture == "qwen3_moe":
        settings |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": hidden * 3 // 2}
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            architecture,
            vocab_size=130,
            hidden_size=hidden,
            intermediate_size=hidden * 3,
            num_hidden_layers=2,
            num_attention_heads=max(2, hidden // 32),
            num_key_value_heads=max(1, hidden // 64),
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=2,
            eos_token_id=1,
            pad_token_id=0,
            **settings,
        )
    )
    loaded = load_model(f"tiny:{architecture}:{hidden}:2:130")
    expected = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    assert {name: parameter.shape for name, parameter in loaded.model.named_parameters()} == expected
    assert loaded.config is not None
    assert loaded.config.max_positions == 4096
    assert loaded.config.rope_theta == theirs.config.rope_parameters["rope_theta"]
    assert loaded.config.rms_norm_eps == theirs.config.rms_norm_eps
    assert (loaded.config.bos_token_id, loaded.config.eos_token_ids, loaded.config.pad_token_id) == (2, (1,), 0)


def test_tiny_weights_follow_the_seed_and_the_deviation() -> None:
    first, again, other = (load_model("tiny:llama:128:1:512", seed=seed).model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.embed_tokens.weight"
    assert not torch.equal(first[name], other[name])
    assert first[name].std().item() == pytest.approx(0.02, rel=0.02)
    wide = load_model("tiny:llama:128:1:512", initializer_range=0.1).model.state_dict()
    assert wide[name].std().item() == pytest.approx(0.1, rel=0.02)


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    load_model("tiny:qwen2:64:1:128")
    assert torch.equal(before, torch.get_rng_state())


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.file),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.safetensors"])
def test_pickled_weights_are_refused_and_never_run(name: str, saved: Saved, tmp_path: Path) -> None:
    _, directory = saved("llama")
    (directory / "model.safetensors").unlink()
    trap = tmp_path / "trap"
    (directory / name).write_bytes(pickle.dumps(Touch(trap)))
    sentence = refusal(directory)
    assert not trap.exists()
    assert ("pickled" if name.endswith(".bin") else "no whole safetensors file") in sentence


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 3}, "lacks 9 weights of its architecture, the first is model.layers.2."),
        ({"num_hidden_layers": 1}, "holds 9 weights its config does not name, the first is model.layers.1."),
        ({"vocab_size": 121}, "model.embed_tokens.weight has the shape [120, 48], by its config it is [121, 48]"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights, which cannot be trained"),
        ({"model_type": "unheard-of"}, "its config.json cannot be used"),
        ({"hidden_size": 47}, "its config.json cannot be used"),
        ({"hidden_size": "big"}, "its config.json cannot be used"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}, "rope_parameters": None}, "Missing required keys"),
    ],
)
def test_a_config_that_does_not_fit(changes: dict[str, Any], expected: str, saved: Saved) -> None:
    _, directory = saved("llama")
    edit(directory, **changes)
    assert expected in refusal(directory)


def test_a_directory_without_a_tokenizer(saved: Saved) -> None:
    _, directory = saved("llama")
    for file in directory.glob("tokenizer*"):
        file.unlink()
    assert "its tokenizer cannot be loaded" in refusal(directory)


def test_a_hub_id_without_access(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "there is no such directory, and the hub did not give it" in refusal("nobody/nothing")
