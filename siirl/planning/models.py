"""The shape of the model that `model.path` names, without loading a weight and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from siirl.config.schema import Config
from siirl.dag.degrees import check_model
from siirl.errors import RequestError, did_you_mean
from siirl.model.paths import TinyModel, check_path, read_json
from siirl.planning.files import read, shipped
from siirl.planning.shape import ModelShape

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


def find_shape(path: str, key: str = "model.path") -> ModelShape:
    """The shape of a model: of a shipped shape's name or hub id, a `tiny:` model, a directory, a GGUF file.

    Raises:
        RequestError: nothing here knows the model's shape.
    """
    known = _shipped()
    if path.lower() in known:
        return known[path.lower()]
    file = Path(path).expanduser() / "config.json"
    if file.is_file():  # the weights need not be there
        return of_config(path, read_json(file, f"{key} '{path}'"), key)
    model = check_path(path, key=key)
    if model.tiny is not None:
        return _tiny(path, model.tiny)
    if model.kind == "hub":
        hint = did_you_mean(path.lower(), known) or f"; name a directory with a config.json, or one of {_listing()}"
        raise RequestError(f"{key} '{path}': its shape is not known without its files{hint}")
    assert model.file is not None
    if model.kind == "gguf":
        return _gguf(path, model.file)
    return of_config(path, read_json(model.file / "config.json", f"{key} '{path}'"), key)


def of_config(name: str, config: Mapping[str, Any], key: str = "model.path") -> ModelShape:
    """The shape that a Hugging Face ``config.json`` describes."""
    family = config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise RequestError(f"{key} '{name}': no cost model for the architecture '{family}'; there are {known}")
    missing = [k for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads") if k not in config]
    if missing:
        raise RequestError(f"{key} '{name}': its config.json has no '{missing[0]}'")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise RequestError(f"{key} '{name}': no cost model for a mixture of experts with dense layers between")
    heads, bias = config["num_attention_heads"], bool(config.get("attention_bias", False))
    experts = family == "qwen3_moe"
    return ModelShape(
        name=name,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (128 if family.startswith("qwen3") else config["hidden_size"] // heads),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family.startswith("qwen3"),
        tie_embeddings=bool(config.get("tie_word_embeddings", family not in ("llama", "mistral"))),
        num_experts=config.get("num_experts", config.get("num_local_experts", 128)) if experts else 0,
        experts_per_token=config.get("num_experts_per_tok", 8) if experts else 0,
        expert_size=config.get("moe_intermediate_size", 768) if experts else 0,
    )


def _tiny(name: str, tiny: TinyModel) -> ModelShape:
    return ModelShape(
        name=name,
        vocab_size=tiny.vocab_size,
        hidden_size=tiny.hidden_size,
        intermediate_size=3 * tiny.hidden_size,
        num_layers=tiny.num_layers,
        num_heads=tiny.num_heads,
        num_kv_heads=tiny.num_kv_heads,
        head_dim=tiny.head_dim,
        qkv_bias=tiny.architecture == "qwen2",
        qk_norm=tiny.architecture.startswith("qwen3"),
        tie_embeddings=True,
        num_experts=tiny.num_experts,
        experts_per_token=tiny.experts_per_token,
        expert_size=tiny.expert_size,
    )


def _gguf(name: str, file: Path) -> ModelShape:
    """From a GGUF file's metadata and its tensors' shapes (the GGUF specification's key names)."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    tensors = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}

    def number(key: str, default: int | None = None) -> int:
        field = reader.get_field(key)
        if field is None and default is None:
            raise RequestError(f"model.path '{name}': its metadata has no '{key}'")
        return int(field.contents()) if field is not None else int(default or 0)

    field = reader.get_field("general.architecture")
    family = str(field.contents()) if field is not None else ""
    if family not in FAMILIES:
        raise RequestError(f"model.path '{name}': no cost model for the architecture '{family}'")
    hidden, heads = number(f"{family}.embedding_length"), number(f"{family}.attention.head_count")
    return ModelShape(
        name=name,
        vocab_size=tensors["token_embd.weight"][1],
        hidden_size=hidden,
        intermediate_size=number(f"{family}.feed_forward_length"),
        num_layers=number(f"{family}.block_count"),
        num_heads=heads,
        num_kv_heads=number(f"{family}.attention.head_count_kv", heads),
        head_dim=number(f"{family}.attention.key_length", hidden // heads),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        tie_embeddings="output.weight" not in tensors,
    )


def check_degrees(config: Config) -> None:
    """Refuse degrees of training that do not suit the actor, where its shape is known without its weights.

    Raises:
        RequestError: see :func:`siirl.dag.degrees.check_model`.
    """
    if config.training.engine != "fsdp" or max(config.training.parallel.degrees().values()) == 1:
        return
    try:
        shape = find_shape(config.model.path)
    except RequestError:  # then the workers find out, who load it
        return
    check_model(shape, config.training.parallel)


@cache
def _shipped() -> dict[str, ModelShape]:
    """Every shipped shape by its name and its hub ids, in lower case."""
    shapes = [(stem, read(ModelShape, file)) for stem, file in shipped("models").items()]
    return {name.lower(): shape for stem, shape in shapes for name in (stem, *shape.hub)}


def _listing() -> str:
    return ", ".join(shipped("models"))
