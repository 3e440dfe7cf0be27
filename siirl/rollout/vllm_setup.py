"""Starting vLLM: its arguments, from a decoder, what it has to hold and what the device needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from siirl.device.backend import Backend
from siirl.errors import RequestError
from siirl.model.decoder import Decoder
from siirl.model.fallback import AnyDecoder, TransformersDecoder
from siirl.model.families import transformers_config
from siirl.rollout.state import cache_bytes_per_token
from siirl.rollout.vllm_model import compile_nothing

# prompts are computed in forward passes of at most so many tokens
_PREFILL_TOKENS = 8192
# tokens of vLLM's largest block
_BLOCK = 128


@dataclass(frozen=True)
class VllmSize:
    """What the engine has to hold.

    Attributes:
        max_length: prompt and response tokens of the longest sequence.
        max_sequences: sequences decoded together at most.
        cache_bytes: of the KV cache on each device at most; no more is taken than all sequences can fill.
    """

    max_length: int
    max_sequences: int
    cache_bytes: int


def start(
    decoder: AnyDecoder, dtype: torch.dtype, size: VllmSize, tensor: int, options: Mapping[str, Any], directory: str
) -> Any:
    """vLLM's engine for the decoder's shape, with random weights.

    Args:
        decoder, dtype, size, tensor: see :class:`siirl.rollout.vllm.VllmEngine`.
        options: of the device, which win.
        directory: where the configuration is written, to stay while the engine lives.

    Raises:
        RequestError: vLLM refuses.
    """
    from vllm import EngineArgs, LLMEngine

    _write_config(decoder, dtype, directory)
    if options.get("enforce_eager"):
        compile_nothing()
    arguments: dict[str, Any] = {
        "model": directory,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no sampling defaults of the model's
        "load_format": "dummy",
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": size.max_length,
        "max_num_seqs": size.max_sequences,
        "max_num_batched_tokens": max(_PREFILL_TOKENS, size.max_length, size.max_sequences),
        "kv_cache_memory_bytes": _cache_bytes(decoder, dtype, size),
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",  # before penalties, bans and filters
        "tensor_parallel_size": tensor,
        "distributed_executor_backend": "external_launcher",  # the workers of the run are its processes
        "disable_log_stats": True,
    }
    try:
        return LLMEngine.from_engine_args(EngineArgs(**(arguments | dict(options))))
    except ValueError as error:  # what vLLM says of a configuration that it refuses
        raise RequestError(f"vLLM cannot start with this model here: {_one_line(error)}") from error


def options_of(backend: Backend) -> Mapping[str, Any]:
    """What vLLM needs on this device."""
    for spec in backend.engines():
        if (spec.kind, spec.name) == ("rollout", "vllm"):
            return spec.options
    raise RequestError(f"device '{backend.name}' runs no vLLM; set rollout.engine=native")


def _cache_bytes(decoder: AnyDecoder, dtype: torch.dtype, size: VllmSize) -> int:
    if not isinstance(decoder, Decoder):
        return size.cache_bytes
    length = -(-size.max_length // _BLOCK) * _BLOCK
    full = (size.max_sequences + 1) * length * cache_bytes_per_token(decoder.config, dtype)
    return min(size.cache_bytes, full)


def published(name: str) -> str:
    """A weight's name as in its checkpoint."""
    return name.removeprefix("inner.")


def _write_config(decoder: AnyDecoder, dtype: torch.dtype, directory: str) -> None:
    if isinstance(decoder, TransformersDecoder):
        config = decoder.inner.config
    else:
        shape = decoder.config
        if shape.family == "qwen2" and shape.head_dim * shape.num_heads != shape.hidden_size:
            raise RequestError(
                f"vLLM takes a qwen2 model's heads to have hidden size / heads = "
                f"{shape.hidden_size // shape.num_heads} numbers, and this one's have {shape.head_dim}; "
                "set rollout.engine=native"
            )
        if shape.sparse_layers:
            # 0.32 on a host: right from files, wrong after `reload_weights`, by which all weights come here
            raise RequestError(
                "vLLM does not take over new weights of a mixture of experts correctly; set rollout.engine=native"
            )
        config = transformers_config(shape)
        config.dtype = dtype
    config.save_pretrained(directory)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
