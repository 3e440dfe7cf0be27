"""The decoder as generation computes with it: layer by layer from weights that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from siirl.model.decoder import MLP, Block, Decoder, Linear, RMSNorm
from siirl.model.experts import Routing
from siirl_kernels import kernels
from siirl_kernels.paging import PagedSequences
from siirl_kernels.weights import LayerWeights, LinearWeights

Caches = Sequence[tuple[Tensor, Tensor]]


class InferenceDecoder:
    """A decoder whose weights must not change while this object lives: kernels may keep them in forms of their own.

    A layer with a mixture of experts is computed by the decoder's own module, with a paged cache.

    Shapes: T new tokens, H hidden, V vocabulary.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._layers = [_layer_weights(block) for block in decoder.blocks]  # None: with experts
        self._head = LinearWeights(decoder.head_weight, one_result=True)

    def __call__(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        caches: Caches,
        sequences: PagedSequences,
        routing: Routing | None = None,
    ) -> Tensor:
        """Hidden states of the new tokens after the final norm, [T, H]; their keys and values are put into ``caches``.

        Args:
            tokens_T: token ids, int64 [T].
            positions_T: position of each token in its sequence, int64 [T].
            caches: keys and values of each layer, [blocks, slots, key heads, head size].
            routing: takes note of the experts that tokens go to.
        """
        x_TH = self._decoder.model.embed_tokens(tokens_T)
        cos_TD, sin_TD = self._decoder.rotary(positions_T, x_TH.dtype)
        for block, weights, (keys, values) in zip(self._decoder.blocks, self._layers, caches, strict=True):
            if weights is None:
                x_TH = block(x_TH, cos_TD, sin_TD, _Paged(keys, values, sequences), routing=routing)
            else:
                x_TH = kernels.inference_layer(x_TH, cos_TD, sin_TD, weights, keys, values, sequences)
        return self._decoder.model.norm(x_TH)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, V], which may last until the next call only."""
        return kernels.inference_linear(hidden_TH, self._head)


class _Paged:
    """Attention of one layer over its part of the cache."""

    def __init__(self, keys: Tensor, values: Tensor, sequences: PagedSequences) -> None:
        self._keys, self._values, self._sequences = keys, values, sequences

    def __call__(self, layer: int, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        return kernels.paged_attention(q_TND, k_TKD, v_TKD, self._keys, self._values, self._sequences)


def _layer_weights(block: Block) -> LayerWeights | None:
    attention, mlp = block.self_attn, block.mlp
    if not isinstance(mlp, MLP):
        return None
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
