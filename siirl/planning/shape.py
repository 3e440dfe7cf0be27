"""The shape of a decoder, and what follows from it alone: parameters, matrix products, cache, saved activations.

No weights are read. Symbols, here and in `docs/cost-model.md`: H hidden, I intermediate, L layers, N query heads, K
key/value heads, D head size, V vocabulary, E experts of which each token uses e, J an expert's intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from siirl.config.schema import NonNegative, Positive, PositiveFloat, Section

Recompute = Literal["none", "selective", "full"]
"""`training.recompute`."""

Numbers = Literal["float32", "bfloat16"]
"""What a forward pass computes in."""


class ModelShape(Section):
    """A decoder of the Llama, Qwen2, Qwen3 or Qwen3-MoE family."""

    name: str = ""
    hub: list[str] = Field(default_factory=list, description="hub ids of checkpoints of this shape")
    published_parameters: PositiveFloat | None = Field(None, description="the model card's number")
    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    num_experts: NonNegative = Field(0, description="0: a dense model")
    experts_per_token: NonNegative = 0
    expert_size: NonNegative = Field(0, description="intermediate size of an expert")

    @property
    def attention_parameters(self) -> int:
        """Of one layer: H·(N+2K)·D + N·D·H, and biases and the two norms over D where the family has them."""
        heads = self.num_heads + 2 * self.num_kv_heads
        biases = heads * self.head_dim * self.qkv_bias + self.hidden_size * self.out_bias
        return self._attention_matrices + biases + 2 * self.head_dim * self.qk_norm

    @property
    def expert_parameters(self) -> int:
        """Of one layer's experts: 3·E·H·J; 0 in a dense model."""
        return 3 * self.num_experts * self.hidden_size * self.expert_size

    @property
    def shared_layer_parameters(self) -> int:
        """Of one layer without its experts: attention, the MLP or the router, two norms over H."""
        return self.attention_parameters + self._dense_mlp + 2 * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        return self.shared_layer_parameters + self.expert_parameters

    @property
    def embedding_parameters(self) -> int:
        """V·H."""
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Of an output projection of its own: V·H, or 0 where it is the embedding."""
        return 0 if self.tie_embeddings else self.embedding_parameters

    @property
    def parameters(self) -> int:
        """All of them."""
        return (
            self.num_layers * self.layer_parameters
            + self.embedding_parameters
            + self.head_parameters
            + self.hidden_size  # the last norm
        )

    @property
    def critic_parameters(self) -> int:
        """Of a value model on this backbone: no output projection of its own, a head of H."""
        return self.parameters - self.head_parameters + self.hidden_size

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Of LoRA: rank · (inputs + outputs) of each adapted matrix of each layer; the experts' have none."""
        hidden, queries, keys = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        widths = {"q_proj": hidden + queries, "o_proj": hidden + queries, "k_proj": hidden + keys}
        widths["v_proj"] = widths["k_proj"]
        if not self.num_experts:
            widths |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + self.intermediate_size)
        return self.num_layers * rank * sum(widths.get(name, 0) for name in targets)

    @property
    def active_matrices(self) -> int:
        """Weights that multiply each token in the layers: a token meets e of E experts and no embedding matrix."""
        if self.num_experts:
            mlp = self.num_experts * self.hidden_size + 3 * self.experts_per_token * self.hidden_size * self.expert_size
        else:
            mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (self._attention_matrices + mlp)

    @property
    def active_parameters(self) -> int:
        """Parameters one token meets, embedding and head included."""
        unused = self.num_experts - self.experts_per_token if self.num_experts else 0
        return self.parameters - 3 * self.num_layers * unused * self.hidden_size * self.expert_size

    def cache_bytes(self, itemsize: int) -> int:
        """Keys and values of one token: 2·L·K·D numbers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    def saved_bytes(self, numbers: Numbers, recompute: Recompute = "none") -> int:
        """What one layer keeps of one token for the backward pass.

        Both norms keep their input and the normalised input; what follows them keeps its input. Norms over D keep
        their input and the normalised one. Attention keeps its operands and result, (2N+2K)·D; the MLP gate, its SiLU,
        up and their product, 4I (each of e experts its own 4J, a copy of its input and its result, and 24 bytes of
        numbers and weights; the router its probabilities and their sum). Norms and attention keep a
        float32 statistic a row and head.

        With *selective* recomputation norms keep their input alone, and the MLP gate and up, 2I; with *full* the layer
        keeps its input.
        """
        if recompute != "none":
            return self._kept(numbers, recompute)
        heads = (self.num_heads + self.num_kv_heads) * self.head_dim
        size = 4 if numbers == "float32" else 2
        norms = {"float32": 24, "bfloat16": 16}[numbers] * self.hidden_size
        head_norms = (8 if numbers == "float32" else 6) * heads * self.qk_norm
        mlp = 4 * self.intermediate_size * size
        if self.num_experts:
            each = 4 * self.expert_size + 2 * self.hidden_size
            mlp = self.experts_per_token * (each * size + 24) + 4 * (self.num_experts + 1)
        rows = 2 + self.num_heads + (self.num_heads + self.num_kv_heads) * self.qk_norm
        return norms + head_norms + 2 * heads * size + mlp + 4 * rows

    def _kept(self, numbers: Numbers, recompute: Recompute) -> int:
        size = 4 if numbers == "float32" else 2
        if recompute == "full":
            return size * self.hidden_size
        heads = (self.num_heads + self.num_kv_heads) * self.head_dim
        mlp = 2 * self.intermediate_size * size
        if self.num_experts:  # experts keep all of theirs
            each = 4 * self.expert_size + 2 * self.hidden_size
            mlp = self.experts_per_token * (each * size + 24) + 4 * (self.num_experts + 1)
        attention = (2 + self.qk_norm) * heads * size + 4 * self.num_heads
        return 2 * self.hidden_size * size + attention + mlp

    def forward_flops(self, tokens: float, pairs: float, predicted: float) -> float:
        """Floating-point operations of a forward pass, a multiplication and an addition counting two.

        2 a weight and token; 4·N·D a pair of a query and a key it attends to, in each layer (scores, and their
        product with the values); 2·H·V a predicted token.

        Args:
            tokens: that pass the layers.
            pairs: of a query and a key, causal: n(n+1)/2 for a sequence of n.
            predicted: tokens whose distribution over the vocabulary is computed.
        """
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * pairs
        return 2 * self.active_matrices * tokens + attention + 2 * self.embedding_parameters * predicted

    @property
    def _attention_matrices(self) -> int:
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return self.hidden_size * heads * self.head_dim

    @property
    def _dense_mlp(self) -> int:
        if self.num_experts:
            return self.num_experts * self.hidden_size  # the router
        return 3 * self.hidden_size * self.intermediate_size + self.mlp_bias * (
            2 * self.intermediate_size + self.hidden_size
        )
