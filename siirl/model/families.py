"""The Llama, Qwen2, Qwen3 and Qwen3-MoE families, between a `transformers` config and a :class:`DecoderConfig`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from siirl.model.config import DecoderConfig
from siirl.model.paths import TinyModel

# Model types of `transformers` and the family whose arithmetic they share.
_FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3_moe"}
_ROPE_TYPES = ("default", "linear", "llama3")
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# What a config says of a mixture of experts, by the same names in :class:`DecoderConfig`.
_EXPERT_KEYS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "router_aux_loss_coef",
)


def unsupported(hf: PreTrainedConfig) -> str | None:
    """Why :class:`siirl.model.decoder.Decoder` cannot run this config, as a clause; None when it can."""
    if hf.model_type not in _FAMILIES or type(hf).__module__.startswith("transformers_modules"):
        return f"the decoder has no architecture '{hf.model_type}'"
    layers = getattr(hf, "layer_types", None)
    windowed = set(layers) != {"full_attention"} if layers else getattr(hf, "sliding_window", None) is not None
    if windowed:
        return "the decoder has no sliding-window attention"
    rope = hf.rope_parameters
    if rope["rope_type"] not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"the decoder has no rotary embedding of type '{rope['rope_type']}' with these parameters"
    if hf.hidden_act != "silu":
        return f"the decoder has no activation '{hf.hidden_act}'"
    return None


def decoder_config(hf: PreTrainedConfig, eos_token_ids: tuple[int, ...] = ()) -> DecoderConfig:
    """The decoder of a config that :func:`unsupported` lets pass; ``eos_token_ids`` come before the config's own."""
    family = _FAMILIES[hf.model_type]
    attention_bias = bool(getattr(hf, "attention_bias", False))
    rope = {key: value for key, value in hf.rope_parameters.items() if key not in ("rope_theta", "type")}
    return DecoderConfig(
        family=family,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        max_positions=hf.max_position_embeddings,
        rms_norm_eps=hf.rms_norm_eps,
        rope_theta=float(hf.rope_parameters["rope_theta"]),
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        qkv_bias=attention_bias or family == "qwen2",
        out_bias=attention_bias,
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        qk_norm=family.startswith("qwen3"),
        tie_embeddings=bool(hf.tie_word_embeddings),
        initializer_range=hf.initializer_range,
        bos_token_id=hf.bos_token_id,
        eos_token_ids=merge_ids(eos_token_ids, hf.eos_token_id),
        pad_token_id=hf.pad_token_id,
        **_experts(hf),
    )


def _experts(hf: PreTrainedConfig) -> dict[str, Any]:
    if hf.model_type != "qwen3_moe":
        return {}
    return {key: getattr(hf, key) for key in _EXPERT_KEYS} | {"mlp_only_layers": tuple(hf.mlp_only_layers)}


def transformers_config(config: DecoderConfig) -> PreTrainedConfig:
    """The inverse of :func:`decoder_config`."""
    eos = list(config.eos_token_ids)
    switches: dict[str, Any] = {}
    if config.family != "qwen2":
        switches["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        switches["mlp_bias"] = config.mlp_bias
    if config.family != "qwen2" or config.head_dim != config.hidden_size // config.num_heads:
        switches["head_dim"] = config.head_dim
    if config.family == "qwen3_moe":
        switches |= {key: getattr(config, key) for key in _EXPERT_KEYS}
        switches["mlp_only_layers"] = list(config.mlp_only_layers)
    return AutoConfig.for_model(
        config.family,
        architectures=[_CLASSES[config.family]],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=config.initializer_range,
        bos_token_id=config.bos_token_id,
        eos_token_id=eos[0] if len(eos) == 1 else eos or None,
        pad_token_id=config.pad_token_id,
        **switches,
    )


def tiny_config(tiny: TinyModel, initializer_range: float) -> DecoderConfig:
    """A small model's config: what `tiny:` leaves out is fixed here."""
    hf = AutoConfig.for_model(
        tiny.architecture,
        vocab_size=tiny.vocab_size,
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.hidden_size * 3,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        num_key_value_heads=tiny.num_kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        **({"head_dim": tiny.head_dim} if tiny.architecture.startswith("qwen3") else {}),
        **(_tiny_experts(tiny) if tiny.num_experts else {}),
    )
    return decoder_config(hf)


def _tiny_experts(tiny: TinyModel) -> dict[str, Any]:
    return {
        "num_experts": tiny.num_experts,
        "num_experts_per_tok": tiny.experts_per_token,
        "moe_intermediate_size": tiny.expert_size,
        "norm_topk_prob": True,
    }


def merge_ids(*groups: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    """Token ids in order of appearance, each once; a group is None, one id or several."""
    flat = [i for group in groups for i in ((group,) if isinstance(group, int) else group or ())]
    return tuple(dict.fromkeys(flat))
