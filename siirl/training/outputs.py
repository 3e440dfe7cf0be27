"""What a training pass ends in: log-probs and entropies of response tokens, or values."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from siirl.model.critic import ValueModel
from siirl.model.decoder import PackedAttention
from siirl.model.experts import Routing
from siirl.training.microbatch import MicroBatch
from siirl_kernels import kernels


class LogProbModel(nn.Module):
    """A decoder whose forward pass ends in log-probs, so that sharding gathers the head's weight where it is used."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, micro: MicroBatch, temperature: float, greedy: bool = False, routing: Routing | None = None
    ) -> tuple[Tensor, ...]:
        """Log-probs and entropies of the response tokens, float32 [R] each.

        With ``greedy`` they are of the likeliest tokens instead, whose ids come third, int64 [R]. ``routing`` is for a
        decoder with experts.
        """
        attention = PackedAttention(micro.sequences)
        experts = {} if routing is None else {"routing": routing}
        states = self.decoder(micro.tokens_T, micro.sequences.positions, attention, micro.states_S, **experts)
        hidden = states.index_select(0, micro.state_R)
        weight = cast(Tensor, self.decoder.head_weight).to(hidden.dtype)
        if greedy:
            tokens_R = nn.functional.linear(hidden, weight).argmax(-1)
            return (*kernels.linear_log_prob(hidden, weight, tokens_R, temperature), tokens_R)
        return kernels.linear_log_prob(hidden, weight, micro.targets_R, temperature)


class CriticModel(nn.Module):
    """A value model over micro-batches."""

    def __init__(self, decoder: ValueModel) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, ...]:
        """Values at the positions that predict a response token, float32 [R]."""
        attention = PackedAttention(micro.sequences)
        values = self.decoder(micro.tokens_T, micro.sequences.positions, attention, micro.states_S)
        return (values.float()[micro.state_R],)
