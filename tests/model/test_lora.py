"""Adapters against the formula W + s·B·A, against the merged model in `transformers`, and against the stage's rules."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from siirl.config.schema import LoRAConfig
from siirl.errors import RequestError
from siirl.model.critic import ValueModel
from siirl.model.decoder import Decoder
from siirl.model.export import save_adapter, save_pretrained
from siirl.model.load import Loaded, load_model
from siirl.model.lora import (
    adapt,
    adapted,
    adapter_shapes,
    base_names,
    begin_adapters,
    is_adapter,
    merged_parts,
    merged_weights,
    scale_of,
    without_adapters,
)
from tests.model.small_models import make_model, run_alone, run_packed, save
from tests.model.test_parity import MODELS

FAMILIES = ["llama", "qwen2", "qwen3"]  # qwen2's attention has biases
ALL = LoRAConfig().targets


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach()


def trained(decoder: Decoder, lora: LoRAConfig, seed: int = 1) -> None:
    """Adapters as after some training: B is no longer zero."""
    adapt(decoder, lora, seed=0)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapted(decoder):
        layer.lora_B.data.normal_(0, 0.05, generator=generator)


def tiny(family: str) -> Loaded:
    return load_model(f"tiny:{family}:48:2:120", initializer_range=0.1)


def as_decoder(loaded: Loaded) -> Decoder:
    assert isinstance(loaded.model, Decoder)
    return loaded.model


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_model_begins_as_the_one_it_adapts(family: str, sequences: list[list[int]]) -> None:
    plain, other = as_decoder(tiny(family)), as_decoder(tiny(family))
    adapt(other, LoRAConfig(rank=4), seed=0)
    with torch.no_grad():
        for want, got in zip(run_packed(plain, sequences), run_packed(other, sequences), strict=True):
            assert torch.equal(want, got)


@pytest.mark.parametrize("targets", [ALL, ["v_proj", "down_proj"]], ids=["all", "two"])
@pytest.mark.parametrize("name", MODELS)
def test_the_merged_export_computes_in_transformers_as_the_adapted_model_does(
    name: str, targets: list, tmp_path: Path, sequences: list[list[int]]
) -> None:
    model_type, settings = MODELS[name]
    loaded = load_model(str(save(make_model(model_type, **settings), tmp_path / "base")))
    decoder, lora = as_decoder(loaded), LoRAConfig(rank=3, alpha=6.0, targets=targets)
    with torch.no_grad():
        before = run_packed(decoder, sequences)
        trained(decoder, lora)
        adapted_logits = run_packed(decoder, sequences)
    state = dict(merged_weights(decoder, whole))
    save_pretrained(decoder, loaded.tokenizer, tmp_path / "merged", state_dict=state)
    with torch.no_grad():
        theirs = run_alone(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), sequences)
    for want, got, old in zip(adapted_logits, theirs, before, strict=True):
        assert (want - got).abs().max() <= 3e-5 * want.abs().max()
        assert (want - old).abs().max() > 1e-2 * want.abs().max()  # the adapters do something


def test_the_formula() -> None:
    decoder = as_decoder(tiny("qwen2"))
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    trained(decoder, LoRAConfig(rank=4, alpha=10.0, targets=["k_proj"]))
    merged = dict(merged_weights(decoder, whole))
    assert merged.keys() == before.keys()
    for name, tensor in before.items():
        if not name.endswith("k_proj.weight"):
            assert torch.equal(merged[name], tensor)
            continue
        layer = decoder.get_submodule(name.removesuffix(".weight"))
        expected = tensor.double() + 10 / 4 * layer.lora_B.double() @ layer.lora_A.double()
        torch.testing.assert_close(merged[name].double(), expected, atol=1e-7, rtol=1e-6)
    parts = dict(decoder.named_parameters())
    for name, tensor in merged_parts(parts, 10 / 4):
        assert torch.equal(tensor, merged[name])


def test_scales() -> None:
    assert scale_of(LoRAConfig(rank=8, alpha=16.0)) == 2
    assert scale_of(LoRAConfig(rank=16, alpha=16.0, rslora=True)) == 4
    decoder = as_decoder(tiny("llama"))
    adapt(decoder, LoRAConfig(rank=200), seed=0)
    for _, layer in adapted(decoder):
        a = layer.lora_A.detach()
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.98 * bound < a.abs().max() <= bound  # uniform within ± bound, whose deviation is bound / √3
        assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not layer.lora_B.any()


def test_every_seed_draws_its_own() -> None:
    def first(seed: int) -> Tensor:
        decoder = as_decoder(tiny("llama"))
        adapt(decoder, LoRAConfig(rank=2), seed)
        return next(adapted(decoder))[1].lora_A

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_known_without_the_model(family: str) -> None:
    loaded, lora = tiny(family), LoRAConfig(rank=3, targets=["v_proj", "o_proj", "up_proj"])
    decoder = as_decoder(loaded)
    names = [name for name, _ in decoder.named_parameters()]
    adapt(decoder, lora, seed=0)
    found = [(name, tuple(p.shape)) for name, p in decoder.named_parameters() if is_adapter(name)]
    assert loaded.config is not None
    assert adapter_shapes(loaded.config, lora) == found and len(found) == 2 * 3 * 2
    assert base_names(decoder) == names


def gradients(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_adapters_alone_are_trained_beside_a_critics_head() -> None:
    decoder = as_decoder(tiny("qwen3"))
    trained(decoder, LoRAConfig(rank=2))
    critic = ValueModel(decoder)
    begin_adapters(critic, trained=True, adapters=True)
    found = gradients(critic)
    assert found - {"value_head.weight"} == {name for name, _ in critic.named_parameters() if is_adapter(name)}
    assert "value_head.weight" in found
    begin_adapters(critic, trained=True, adapters=False)
    assert gradients(critic) == {name for name, _ in critic.named_parameters() if not is_adapter(name)}
    begin_adapters(critic, trained=False, adapters=True)
    assert not gradients(critic)


def test_a_model_without_adapters_is_trained_whole() -> None:
    decoder = as_decoder(tiny("llama"))
    begin_adapters(decoder, trained=True, adapters=False)
    assert gradients(decoder) == {name for name, _ in decoder.named_parameters()}


def test_a_stage_begins_with_the_adapters_of_the_one_before_merged(sequences: list[list[int]]) -> None:
    decoder = as_decoder(tiny("llama"))
    trained(decoder, LoRAConfig(rank=2))
    expected = dict(merged_weights(decoder, whole))
    with torch.no_grad():
        before = run_packed(decoder, sequences)
        begin_adapters(decoder, trained=True, adapters=True)
        after = run_packed(decoder, sequences)
        with without_adapters(decoder):
            reference = run_packed(decoder, sequences)
    for old, new, bare in zip(before, after, reference, strict=True):
        torch.testing.assert_close(new, old, atol=1e-4, rtol=1e-4)
        assert torch.equal(new, bare)
    for name, tensor in expected.items():
        torch.testing.assert_close(dict(decoder.named_parameters())[name].detach(), tensor, atol=1e-6, rtol=1e-6)


def test_without_adapters_is_the_model_as_it_was(sequences: list[list[int]]) -> None:
    decoder = as_decoder(tiny("qwen3"))
    with torch.no_grad():
        before = run_packed(decoder, sequences)
        trained(decoder, LoRAConfig(rank=2))
        with without_adapters(decoder):
            inside = run_packed(decoder, sequences)
        after = run_packed(decoder, sequences)
    for old, off, on in zip(before, inside, after, strict=True):
        assert torch.equal(old, off) and not torch.equal(old, on)


def test_a_model_that_transformers_runs_is_refused(tmp_path: Path) -> None:
    directory = save(make_model("gpt_neox"), tmp_path / "other")
    with pytest.warns(UserWarning, match="transformers runs it"):
        loaded = load_model(str(directory))
    with pytest.raises(RequestError) as caught:
        adapt(loaded.model, LoRAConfig(rank=4), seed=0)
    assert str(caught.value) == (
        "model.lora.rank is 4, but transformers runs a model of type 'gpt_neox', and only siirl's own decoder takes "
        "adapters; set model.lora.rank=0"
    )


def test_the_adapters_files_are_named_and_shaped_as_pefts(tmp_path: Path) -> None:
    """Names as PEFT 0.21 gives them; :func:`test_peft_computes_the_same` runs it where it is installed."""
    decoder, lora = as_decoder(tiny("llama")), LoRAConfig(rank=2, alpha=8.0, targets=["v_proj", "q_proj"])
    trained(decoder, lora)
    parts = {name: p for name, p in decoder.named_parameters() if is_adapter(name)}
    save_adapter(parts, lora, "owner/name", tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert written["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (2, 48)
    assert len(written) == 2 * 2 * 2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 8.0)
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["base_model_name_or_path"] == "owner/name"


def test_peft_computes_the_same(tmp_path: Path, sequences: list[list[int]]) -> None:
    peft = pytest.importorskip("peft")
    directory = save(make_model("qwen2"), tmp_path / "base")
    decoder, lora = as_decoder(load_model(str(directory))), LoRAConfig(rank=4, alpha=8.0, rslora=True)
    trained(decoder, lora)
    save_adapter({n: p for n, p in decoder.named_parameters() if is_adapter(n)}, lora, str(directory), tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "a").eval()
    with torch.no_grad():
        for want, got in zip(run_packed(decoder, sequences), run_alone(theirs, sequences), strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_target_that_is_no_layer_is_refused_by_the_schema() -> None:
    with pytest.raises(ValueError, match="targets"):
        LoRAConfig(rank=2, targets=["lm_head"])  # type: ignore[list-item]
