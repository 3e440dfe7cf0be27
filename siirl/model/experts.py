"""A layer's mixture of experts, as Qwen3-MoE has it: a router, its choice, and experts that are MLPs without biases.

Parameters carry the names and shapes that `transformers` gives them in memory; checkpoints name each expert apart
(:mod:`siirl.model.expert_names`).
Shapes: T tokens, H hidden, E experts, K experts of a token, R = T · K rows, J intermediate size of an expert, L layers
with experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from siirl.model.config import DecoderConfig
from siirl_kernels import kernels
from siirl_kernels.experts import sort_by_expert

# in place of an expert that a router is told: it is not known
UNKNOWN = -1


def local(parameter: Tensor) -> Tensor:
    """What kernels compute with: this worker's part of a parameter that is cut over workers, else the parameter."""
    part = getattr(parameter, "to_local", None)
    return parameter if part is None else part()


@dataclass
class Routed:
    """What a layer's router did.

    Attributes:
        probs_TE: its probabilities, float32, with their gradient.
        chosen_TK: int64, the experts that each token went to.
        likeliest_TK: int64, those it would have chosen itself.
    """

    probs_TE: Tensor
    chosen_TK: Tensor
    likeliest_TK: Tensor


class Routing:
    """What the routers of one forward pass did, and where given, what they were told to do.

    No dataclass: FSDP2 hands copies of these to a module.

    Attributes:
        given_TLK: experts to go to instead of the likeliest ones, any integer dtype; ``UNKNOWN``: the likeliest.
        layers: of each layer with experts, by its number among these.
        own: the tokens that the pass computes, where others compute the rest of a micro-batch.
    """

    own = slice(None)

    def __init__(self, given_TLK: Tensor | None = None) -> None:
        self.given_TLK = given_TLK
        self.layers: dict[int, Routed] = {}

    def take(self, own: slice) -> None:
        """Before the pass: it computes these tokens only."""
        self.own = own
        if self.given_TLK is not None:
            self.given_TLK = self.given_TLK[own]

    @property
    def chosen_TLK(self) -> Tensor:
        """Where all tokens went, int64."""
        return torch.stack([self.layers[i].chosen_TK for i in range(len(self.layers))], 1)


class Router(nn.Module):
    """Logits in the dtype of computation, everything behind them in float32 (float64 of such)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TH: Tensor) -> Tensor:
        """Probabilities of the experts, [T, E]."""
        logits_TE = kernels.linear(x_TH, local(self.weight).to(x_TH.dtype), None)
        wide = torch.float64 if logits_TE.dtype == torch.float64 else torch.float32
        return logits_TE.softmax(-1, dtype=wide)


class Experts(nn.Module):
    """All experts of a layer, one stacked weight for gate and up, one for down."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.count, hidden, size = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.count, 2 * size, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.count, hidden, size))
        # computes rows sorted by expert where experts are on several workers
        self.elsewhere: Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]], Tensor] | None = None

    def forward(self, x_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Σ_k weights_TK · expert(x), [T, H]."""
        places_TK, offsets = sort_by_expert(chosen_TK, self.count)
        x_RH = kernels.permute_tokens(x_TH, places_TK)
        out_RH = (
            self._compute(x_RH, offsets) if self.elsewhere is None else self.elsewhere(x_RH, offsets, self._compute)
        )
        return kernels.unpermute_tokens(out_RH, places_TK, weights_TK)

    def _compute(self, x_RH: Tensor, offsets: Tensor) -> Tensor:
        gate_up, down = (local(weight).to(x_RH.dtype) for weight in (self.gate_up_proj, self.down_proj))
        gate_RJ, up_RJ = kernels.grouped_linear(x_RH, offsets, gate_up).chunk(2, -1)
        return kernels.grouped_linear(kernels.swiglu(gate_RJ, up_RJ), offsets, down)


class SparseMLP(nn.Module):
    """In place of a layer's MLP; ``number`` counts such layers."""

    def __init__(self, config: DecoderConfig, number: int) -> None:
        super().__init__()
        self.number, self.each, self.normalised = number, config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Router(config)
        self.experts = Experts(config)

    def forward(self, x_TH: Tensor, routing: Routing | None = None) -> Tensor:
        probs_TE = self.gate(x_TH)
        weights_TK, likeliest_TK = probs_TE.topk(self.each, dim=-1)
        chosen_TK = likeliest_TK
        if routing is not None and routing.given_TLK is not None:
            given_TK = routing.given_TLK[:, self.number].long()
            chosen_TK = torch.where(given_TK == UNKNOWN, likeliest_TK, given_TK)
            weights_TK = probs_TE.gather(1, chosen_TK)
        if routing is not None:
            # with recomputation a layer runs again; the first run is the one that the loss is made of
            routing.layers.setdefault(self.number, Routed(probs_TE, chosen_TK, likeliest_TK))
        if self.normalised:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return self.experts(x_TH, chosen_TK, weights_TK)
