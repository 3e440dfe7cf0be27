"""What a decoder looks like: the switches that tell the Llama, Qwen2, Qwen3 and Qwen3-MoE families apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and switches of a :class:`siirl.model.decoder.Decoder`.

    ``rope_scaling`` is None, or the mapping of a Hugging Face config for rope types ``linear`` and ``llama3``.
    The fields from ``num_experts`` on are those of a mixture of experts, by their names there.
    """

    family: str  # llama | qwen2 | qwen3 | qwen3_moe
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.0

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers with a mixture of experts in place of an MLP, as `transformers` tells them apart."""
        if not self.num_experts:
            return ()
        step = self.decoder_sparse_step
        return tuple(i for i in range(self.num_layers) if i not in self.mlp_only_layers and (i + 1) % step == 0)
