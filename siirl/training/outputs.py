"""What a training pass ends in: log-probs and entropies of response tokens, or values."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from siirl.device.collectives import Collectives
from siirl.model.critic import ValueModel
from siirl.model.experts import Routing, local
from siirl.training.containment import Containment
from siirl.training.context_parallel import Part, part_of
from siirl.training.microbatch import MicroBatch
from siirl.training.tensor_parallel import vocabulary_argmax, vocabulary_log_prob
from siirl_kernels import kernels


class _Pass(nn.Module):
    """A pass over a micro-batch, of which the workers of a context group compute a part each."""

    context: tuple[Collectives, str] = (Collectives.single(), "ulysses")
    vocabulary: Collectives = Collectives.single()
    """Workers that hold a part of the vocabulary each."""
    tokens_cut: bool = False
    """Whether layers hold a part of the tokens each: then the last one cannot leave out any."""
    containment: Containment | None = None
    """Of a sharded model's lack of memory."""

    def part(self, micro: MicroBatch) -> Part:
        return part_of(micro, *self.context)

    def states(self, decoder: nn.Module, part: Part, routing: Routing | None = None) -> Tensor:
        """What the decoder gives for the token that predicts each response token, [R, ...]."""
        keep_S = None if self.tokens_cut else part.states_S
        if routing is not None:
            routing.take(part.own)
        experts = {} if routing is None else {"routing": routing}
        states = decoder(part.tokens_T, part.positions_T, part.attention, keep_S, **experts)
        if self.tokens_cut:
            states = states.index_select(0, part.states_S)
        return states.index_select(0, part.state_R)


class LogProbModel(_Pass):
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
        part = self.part(micro)
        hidden = self.states(self.decoder, part, routing)
        weight = local(cast(Tensor, self.decoder.head_weight)).to(hidden.dtype)
        if greedy:
            tokens_R = self._likeliest(hidden, weight)
            return tuple(map(part.gather, (*self._log_prob(hidden, weight, tokens_R, temperature), tokens_R)))
        if self.containment is None:
            return tuple(map(part.gather, self._log_prob(hidden, weight, part.targets_R, temperature)))

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return kernels.linear_log_prob(hidden, weight, micro.targets_R, temperature)

        def nothing(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return hidden.new_zeros(len(hidden)).float(), hidden.new_zeros(len(hidden)).float()

        return self.containment.call(head, nothing, (), hidden, weight)

    def _log_prob(self, hidden: Tensor, weight: Tensor, tokens_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        if self.vocabulary.size > 1:
            return vocabulary_log_prob(hidden, weight, tokens_R, temperature, self.vocabulary)
        return kernels.linear_log_prob(hidden, weight, tokens_R, temperature)

    def _likeliest(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if self.vocabulary.size > 1:
            return vocabulary_argmax(hidden, weight, self.vocabulary)
        return nn.functional.linear(hidden, weight).argmax(-1)


class CriticModel(_Pass):
    """A value model over micro-batches."""

    def __init__(self, decoder: ValueModel) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, ...]:
        """Values at the positions that predict a response token, float32 [R]."""
        part = self.part(micro)
        return (part.gather(self.states(self.decoder, part).float()),)
