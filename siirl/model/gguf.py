"""GGUF files of the Llama, Qwen2 and Qwen3 families: configuration, dequantised weights, tokenizer.

Key and tensor names are those of the GGUF specification and of llama.cpp's `gguf-py/gguf/constants.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from siirl.errors import RequestError
from siirl.model.config import DecoderConfig
from siirl.model.decoder import rotary_frequencies
from siirl.model.families import decoder_config, merge_ids
from siirl.model.paths import ARCHITECTURES

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQUENCIES = "rope_freqs.weight"
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


class _Reader(gguf.GGUFReader):
    """The reader of `gguf`, free of a memory map's slices, which for a vocabulary of strings take seconds."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if self.byte_order == "S":
            return super()._get(offset, dtype, count, override_order)
        return np.frombuffer(self.data, dtype, int(count), int(offset))


class GGUFModel:
    """An open GGUF file.

    Raises:
        RequestError: the file is damaged, its architecture is not one of the three, or it uses a feature that the
            decoder does not have.
    """

    def __init__(self, file: Path, where: str) -> None:
        self.file, self.where = file, where
        try:
            self._reader = _Reader(file)
        except (ValueError, IndexError) as error:
            raise RequestError(f"{where} is no whole GGUF file ({error})") from None
        self._shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in self._reader.tensors}
        self.architecture = self._field("general.architecture")
        if self.architecture not in ARCHITECTURES:
            names = ", ".join(ARCHITECTURES)
            raise RequestError(f"{where} is of architecture '{self.architecture}'; GGUF files are read for {names}")
        self.config = self._config()

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights under the decoder's parameter names, dequantised."""
        return dict(self._dequantised(dtype))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the metadata, chat template included."""
        try:
            return PreTrainedTokenizerFast.from_pretrained(str(self.file.parent), gguf_file=self.file.name)
        except (ValueError, KeyError) as error:
            raise RequestError(f"{self.where}: its tokenizer cannot be read ({error})") from None

    def _dequantised(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for tensor in self._reader.tensors:
            if tensor.name == _ROPE_FREQUENCIES:
                continue
            match = _NAME.fullmatch(tensor.name)
            if match is None or match[2] not in _TENSORS:
                raise RequestError(f"{self.where} holds '{tensor.name}', which the decoder has no place for")
            try:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                kind = tensor.tensor_type.name
                raise RequestError(f"{self.where}: '{tensor.name}' is quantised as {kind}, which is not read") from None
            layer = f"model.layers.{match[1]}." if match[1] else ""
            if self.architecture == "llama" and match[2] in ("attn_q", "attn_k"):
                values = halves_layout(
                    values, self.config.num_heads if match[2] == "attn_q" else self.config.num_kv_heads
                )
            yield f"{layer}{_TENSORS[match[2]]}.{match[3]}", torch.tensor(values, dtype=dtype)

    def _config(self) -> DecoderConfig:
        hidden, heads = self._number("embedding_length"), self._number("attention.head_count")
        head_dim = self._number("attention.key_length", self._number("rope.dimension_count", hidden // heads))
        if self._number("rope.dimension_count", head_dim) != head_dim:
            raise RequestError(f"{self.where} rotates a part of each head only, which the decoder does not do")
        if self._number("expert_count", 0):
            raise RequestError(f"{self.where} is a mixture of experts, which the decoder does not have")
        if "token_embd.weight" not in self._shapes:
            raise RequestError(f"{self.where} has no tensor token_embd.weight")
        hf = self._transformers_config(hidden, heads, head_dim)
        eos = merge_ids(self._token("eos"), self._token("eot"))
        config = decoder_config(hf, eos)
        if _ROPE_FREQUENCIES in self._shapes:
            hf.rope_parameters = {**self._llama3_rope(config), "rope_theta": config.rope_theta}
            config = decoder_config(hf, eos)
        return config

    def _transformers_config(self, hidden: int, heads: int, head_dim: int) -> PreTrainedConfig:
        bias = "blk.0.attn_q.bias" in self._shapes
        switches: dict[str, Any] = {} if self.architecture == "qwen2" else {"attention_bias": bias}
        if self.architecture == "llama":
            switches["mlp_bias"] = "blk.0.ffn_gate.bias" in self._shapes
        return AutoConfig.for_model(
            self.architecture,
            vocab_size=self._shapes["token_embd.weight"][1],
            hidden_size=hidden,
            intermediate_size=self._number("feed_forward_length"),
            num_hidden_layers=self._number("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._number("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=self._number("context_length"),
            rms_norm_eps=self._field(f"{self.architecture}.attention.layer_norm_rms_epsilon"),
            rope_parameters=self._rope(),
            tie_word_embeddings="output.weight" not in self._shapes,
            bos_token_id=self._token("bos"),
            eos_token_id=self._token("eos"),
            pad_token_id=self._token("padding"),
            **switches,
        )

    def _rope(self) -> dict[str, Any]:
        theta = self._field(f"{self.architecture}.rope.freq_base", 10_000.0)
        kind = self._field(f"{self.architecture}.rope.scaling.type", "none")
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        if kind == "linear":
            factor = self._field(f"{self.architecture}.rope.scaling.factor")
            return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        raise RequestError(f"{self.where} scales its rotary embedding by '{kind}', which the decoder does not do")

    def _llama3_rope(self, config: DecoderConfig) -> dict[str, Any]:
        """The file stores each frequency's divisor; the Llama 3 models' constants are tried, the divisors decide."""
        tensor = next(tensor for tensor in self._reader.tensors if tensor.name == _ROPE_FREQUENCIES)
        divisors = torch.tensor(np.asarray(tensor.data, dtype=np.float32))
        rope = {
            "rope_type": "llama3",
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        wanted = rotary_frequencies(config) / divisors
        scaled = rotary_frequencies(DecoderConfig(**{**vars(config), "rope_scaling": rope}))
        if not torch.allclose(wanted, scaled, rtol=1e-4, atol=0):
            raise RequestError(f"{self.where} has rotary frequencies (rope_freqs) other than those of Llama 3")
        return rope

    def _number(self, key: str, default: int | None = None) -> int:
        value = self._field(f"{self.architecture}.{key}", default)
        if not isinstance(value, int):
            raise RequestError(
                f"{self.where}: {self.architecture}.{key} differs from layer to layer, which is not read"
            )
        return value

    def _token(self, name: str) -> int | None:
        field = self._reader.get_field(f"tokenizer.ggml.{name}_token_id")
        return None if field is None else field.contents()

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        if field is None and default is None:
            raise RequestError(f"{self.where} has no metadata '{key}'")
        return default if field is None else field.contents()


def halves_layout(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of query and key rows.

    Its rotary embedding pairs neighbouring rows (2i, 2i+1) of a head; ours pairs (i, i + D/2), as checkpoints do.
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
