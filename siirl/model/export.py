"""A Hugging Face directory of a model: what `transformers`, an inference server and :func:`load_model` read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from siirl.config.schema import LoRAConfig
from siirl.model.decoder import Decoder
from siirl.model.expert_names import split_experts
from siirl.model.fallback import TransformersDecoder
from siirl.model.families import transformers_config

_MAX_SHARD = "5GB"


def save_pretrained(
    model: Decoder | TransformersDecoder,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: str = _MAX_SHARD,
) -> None:
    """Write config, generation config, safetensors weights and tokenizer.

    Args:
        model: gives the config, and the weights unless ``state_dict`` does.
        directory: made if missing; files of the same names are replaced.
        dtype: of the written weights; None: as they are.
        state_dict: whole tensors by the model's parameter names, for a model whose own are sharded.
        max_shard_size: of one weight file, such as ``5GB``.
    """
    from transformers import GenerationConfig  # with all of transformers' generation behind it

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    whole = model.state_dict() if state_dict is None else state_dict
    tensors = {name: _own(tensor.detach().to("cpu", dtype)) for name, tensor in whole.items()}
    if isinstance(model, Decoder):
        tensors = {name: _own(tensor) for name, tensor in split_experts(tensors.items())}
    if isinstance(model, TransformersDecoder):
        inner = {name.removeprefix("inner."): tensor for name, tensor in tensors.items()}
        model.inner.save_pretrained(directory, state_dict=inner, max_shard_size=max_shard_size)
    else:
        config = transformers_config(model.config)
        config.dtype = next(iter(tensors.values())).dtype
        config.save_pretrained(directory)
        save_torch_state_dict(tensors, directory, max_shard_size=max_shard_size)
    GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=list(model.config.eos_token_ids) or None,
        pad_token_id=model.config.pad_token_id,
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_adapter(adapters: Mapping[str, Tensor], lora: LoRAConfig, base: str, directory: str | Path) -> None:
    """Write an adapter in the file format of PEFT 0.19: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        adapters: whole tensors by the decoder's parameter names.
        lora: how they were trained.
        base: path or id of the model that they adapt.
        directory: made if missing.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": sorted(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {f"base_model.model.{name}.weight": _own(tensor.detach().cpu()) for name, tensor in adapters.items()}
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory of exactly its size: a gathered one may be a view of a padded buffer."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
