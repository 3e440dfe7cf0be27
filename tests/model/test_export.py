"""An exported directory: `transformers` computes the same with it, and it loads back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from siirl.model.decoder import Decoder
from siirl.model.export import save_pretrained
from siirl.model.load import Loaded, load_model
from tests.model.small_models import make_model, run_alone, run_packed, save
from tests.model.test_parity import MODELS


def decoder(loaded: Loaded) -> Decoder:
    assert isinstance(loaded.model, Decoder)
    return loaded.model


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tmp_path: Path, sequences: list[list[int]]) -> None:
    model_type, settings = MODELS[name]
    first = load_model(str(save(make_model(model_type, **settings), tmp_path / "first")))
    save_pretrained(decoder(first), first.tokenizer, tmp_path / "second")
    second, theirs = load_model(str(tmp_path / "second")), AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert second.config == first.config
    weights = second.model.state_dict()
    assert weights.keys() == first.model.state_dict().keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in first.model.state_dict().items())
    with torch.no_grad():
        for want, got in zip(run_packed(first.model, sequences), run_alone(theirs, sequences), strict=True):
            assert (got - want).abs().max() <= 1e-5


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "qwen3_moe"])
def test_tokenizer_and_end_tokens_survive(architecture: str, tmp_path: Path) -> None:
    first = load_model(f"tiny:{architecture}:64:1:128")
    save_pretrained(decoder(first), first.tokenizer, tmp_path)
    second = load_model(str(tmp_path))
    text = "12 + 3 =\n15~<eos>"
    assert second.tokenizer(text)["input_ids"] == first.tokenizer(text)["input_ids"]
    assert second.config == first.config
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [1]


def test_written_precision(tmp_path: Path) -> None:
    loaded = load_model("tiny:qwen3:64:1:128")
    save_pretrained(decoder(loaded), loaded.tokenizer, tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_shards_replace_what_was_there(tmp_path: Path) -> None:
    loaded = load_model("tiny:qwen3:64:2:128")
    save_pretrained(decoder(loaded), loaded.tokenizer, tmp_path)
    save_pretrained(decoder(loaded), loaded.tokenizer, tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {file.name for file in tmp_path.glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    assert len(files) > 2
    again = load_model(str(tmp_path)).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.model.state_dict().items())


def test_weights_gathered_elsewhere(tmp_path: Path) -> None:
    loaded = load_model("tiny:llama:64:1:128")
    gathered = {name: tensor + 1 for name, tensor in loaded.model.state_dict().items()}
    save_pretrained(decoder(loaded).to("meta"), loaded.tokenizer, tmp_path, state_dict=gathered)
    again = load_model(str(tmp_path)).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in gathered.items())


def test_several_end_tokens_reach_transformers(tmp_path: Path) -> None:
    directory = save(make_model("llama", eos_token_id=[5, 7]), tmp_path / "first")
    loaded = load_model(str(directory))
    assert loaded.config is not None
    assert loaded.config.eos_token_ids == (5, 7)
    save_pretrained(decoder(loaded), loaded.tokenizer, tmp_path / "second")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "second").generation_config.eos_token_id == [5, 7]
    assert AutoTokenizer.from_pretrained(tmp_path / "second").eos_token == "<eos>"
