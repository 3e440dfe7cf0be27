"""The decoder: one module for training (packed sequences) and for rollout (a cache), told apart by who attends.

Parameters carry the names of the Hugging Face checkpoints of these families.
Shapes: T tokens, H hidden, N query heads, K key/value heads, D head size, V vocabulary, I intermediate.
"""

from __future__ import annotations

import math
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from siirl.model.config import DecoderConfig
from siirl.model.experts import Routing, SparseMLP, local
from siirl.model.recompute import cheap
from siirl_kernels import kernels
from siirl_kernels.packing import PackedSequences


class Attention(Protocol):
    """Attends for every layer; training packs, the rollout engine reads and writes its cache."""

    def __call__(self, layer: int, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Return [T, N, D]. Queries and keys are already rotated."""
        ...


class PackedAttention:
    """Causal attention within each of the packed sequences, without a cache."""

    def __init__(self, sequences: PackedSequences) -> None:
        self.sequences = sequences

    def __call__(self, layer: int, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        return kernels.packed_attention(q_TND, k_TKD, v_TKD, self.sequences)


class Linear(nn.Linear):
    """Weights come from a checkpoint or from :meth:`Decoder.initialize`; none are drawn when the layer is made."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x_TH: Tensor) -> Tensor:
        bias = None if self.bias is None else local(self.bias).to(x_TH.dtype)
        return kernels.linear(x_TH, local(self.weight).to(x_TH.dtype), bias)


class Embedding(nn.Embedding):
    """As :class:`Linear`."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, tokens_T: Tensor) -> Tensor:
        return nn.functional.embedding(tokens_T, local(self.weight))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return cheap(kernels.rms_norm, x, local(self.weight).to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, attention: Attention, keep_S: Tensor | None = None
    ) -> Tensor:
        q_TND, k_TKD, v_TKD = self.project(x_TH, cos_TD, sin_TD)
        out_TO = attention(self.layer, q_TND, k_TKD, v_TKD).flatten(1)
        return self.o_proj(out_TO if keep_S is None else out_TO.index_select(0, keep_S))

    def project(self, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [T, N, D] and keys, and values, [T, K, D] each."""
        heads = (-1, self.head_dim)
        q_TND = kernels.rope(self.q_norm(self.q_proj(x_TH).unflatten(1, heads)), cos_TD, sin_TD)
        k_TKD = kernels.rope(self.k_norm(self.k_proj(x_TH).unflatten(1, heads)), cos_TD, sin_TD)
        return q_TND, k_TKD, self.v_proj(x_TH).unflatten(1, heads)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(cheap(kernels.swiglu, self.gate_proj(x_TH), self.up_proj(x_TH)))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer)
        sparse = config.sparse_layers
        self.mlp: MLP | SparseMLP = SparseMLP(config, sparse.index(layer)) if layer in sparse else MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_TH: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        attention: Attention,
        keep_S: Tensor | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """The residual stream behind the layer; of the tokens ``keep_S`` alone where they are given."""
        mixed_TH = self.self_attn(self.input_layernorm(x_TH), cos_TD, sin_TD, attention, keep_S)
        x_TH = (x_TH if keep_S is None else x_TH.index_select(0, keep_S)) + mixed_TH
        normed_TH = self.post_attention_layernorm(x_TH)
        if isinstance(self.mlp, SparseMLP):
            return x_TH + self.mlp(normed_TH, routing)
        return x_TH + self.mlp(normed_TH)


class Backbone(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model of the Llama, Qwen2, Qwen3 or Qwen3-MoE family; see :class:`DecoderConfig`.

    ``compute_dtype`` is what a pass computes in: every weight is cast to it where it is used. None: the weights' own.
    """

    compute_dtype: torch.dtype | None = None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._frequencies: Tensor | None = None

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attention: Attention,
        keep_S: Tensor | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [T, H], or [S, H] of the tokens ``keep_S``.

        Behind the last layer's attention a token does not need another, so there the others are left out; not where
        there are experts, whose load is that of all tokens.

        Args:
            tokens_T: token ids, int64 [T].
            positions_T: position of each token in its sequence, int64 [T].
            attention: attends for every layer, e.g. ``PackedAttention(sequences)``.
            keep_S: int64 [S], packed tokens; None: all.
            routing: takes note of where a mixture of experts sends each token, or tells it.
        """
        x_TH = self.model.embed_tokens(tokens_T)
        x_TH = x_TH.to(self.compute_dtype or x_TH.dtype)
        cos_TD, sin_TD = self.rotary(positions_T, x_TH.dtype)
        *blocks, last = self.blocks
        for block in blocks:
            x_TH = block(x_TH, cos_TD, sin_TD, attention, routing=routing)
        if not self.config.sparse_layers:
            return self.model.norm(last(x_TH, cos_TD, sin_TD, attention, keep_S))
        x_TH = last(x_TH, cos_TD, sin_TD, attention, routing=routing)
        return self.model.norm(x_TH if keep_S is None else x_TH.index_select(0, keep_S))

    @property
    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return cast(list[Block], list(self.model.layers))

    @property
    def head_weight(self) -> Tensor:
        """The output projection, [V, H]."""
        return self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, V]."""
        return kernels.linear(hidden_TH, self.head_weight, None)

    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights: normal with the config's standard deviation, zero biases, unit norms."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                else:
                    parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    def rotary(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions' angles, [T, D], both halves alike."""
        if self._frequencies is None or self._frequencies.device != positions_T.device:
            self._frequencies = rotary_frequencies(self.config).to(positions_T.device)
        angles = torch.outer(positions_T.float(), self._frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_frequencies(config: DecoderConfig) -> Tensor:
    """Angle per position of each pair of dimensions, float32 [D/2], on the host.

    theta^(-2i/D); ``linear`` scaling divides it by its factor, ``llama3`` divides the long waves and interpolates
    between (parameters of the Llama 3.1 checkpoints).
    """
    frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        return frequencies / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        return _llama3_frequencies(frequencies, scaling)
    return frequencies


def _llama3_frequencies(frequencies: Tensor, scaling: dict[str, float]) -> Tensor:
    waves = 2 * math.pi / frequencies
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = ((original / waves - low) / (high - low)).clamp(0, 1)
    return share * frequencies + (1 - share) * frequencies / scaling["factor"]
