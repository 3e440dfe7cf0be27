"""The decoder as generation computes with it: layer by layer from weights that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from siirl.model.decoder import Block, Decoder, Linear, RMSNorm
from siirl_kernels import kernels
from siirl_kernels.paging import PagedSequences
from siirl_kernels.weights import LayerWeights, LinearWeights

Caches = Sequence[tuple[Tensor, Tensor]]


class InferenceDecoder:
    """A decoder whose weights must not change while this object lives: kernels may keep them in forms of their own.

    Shapes: T new tokens, H hidden, V vocabulary.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._layers = [_layer_weights(block) for block in decoder.blocks]
        self._head = LinearWeights(decoder.head_weight, one_result=True)

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, caches: Caches, sequences: PagedSequences) -> Tensor:
        """Hidden states of the new tokens after the final norm, [T, H]; their keys and values are put into ``caches``.

        Args:
            tokens_T: token ids, int64 [T].
            positions_T: position of each token in its sequence, int64 [T].
            caches: keys and values of each layer, [blocks, slots, key heads, head size].
        """
        x_TH = self._decoder.model.embed_tokens(tokens_T)
        cos_TD, sin_TD = self._decoder.rotary(positions_T, x_TH.dtype)
        for weights, (keys, values) in zip(self._layers, caches, strict=True):
            x_TH = kernels.inference_layer(x_TH, cos_TD, sin_TD, weights, keys, values, sequences)
        return self._decoder.model.norm(x_TH)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, V], which may last until the next call only."""
        return kernels.inference_linear(hidden_TH, self._head)


def _layer_weights(block: Block) -> LayerWeights:
    attention, mlp = block.self_attn, block.mlp
    return LayerWeights(
        input_norm=block.input_layernorm.weight,
        q=_linear_weights(attention.q_proj),
        k=_linear_weights(attention.k_proj),
        v=_linear_weights(attention.v_proj),
        q_norm=_norm_weight(attention.q_norm),
        k_norm=_norm_weight(attention.k_norm),
        o=_linear_weights(attention.o_proj),
        post_norm=block.post_attention_layernorm.weight,
        gate=_linear_weights(mlp.gate_proj),
        up=_linear_weights(mlp.up_proj),
        down=_linear_weights(mlp.down_proj),
        eps=block.input_layernorm.eps,
    )


def _linear_weights(linear: Linear) -> LinearWeights:
    return LinearWeights(linear.weight, linear.bias)


def _norm_weight(norm: nn.Module) -> Tensor | None:
    return norm.weight if isinstance(norm, RMSNorm) else None
