"""The load of a mixture of experts over a mini-batch, and the loss that evens it out.

Shapes: T packed tokens, L layers with experts, E experts, K experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siirl.config.schema import Config
from siirl.device.collectives import Collectives
from siirl.errors import RequestError
from siirl.model.config import DecoderConfig
from siirl.model.decoder import Decoder
from siirl.model.experts import UNKNOWN, Routing
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.microbatch import MicroBatch


class Balance:
    """The load-balance loss of one mini-batch over all workers, in parts that add up.

    Of each layer it is E Σ_e f_e P_e (Switch Transformer, arXiv 2101.03961; the form for K experts a token is that of
    ``load_balancing_loss_func`` in `transformers`): f_e the tokens that expert e has, as a share of all tokens, and P_e
    the router's mean probability of it; the mean over layers is taken, where that function pools layers before the
    product. Balanced, it is K.

    The product of two means is not a sum over tokens, and computed for each micro-batch it would depend on the split.
    Here f is that of the whole mini-batch on all workers (as in "Demons in the Detail", arXiv 2501.11873). It has no
    gradient, so with f known first the rest is a sum over tokens: micro-batches and workers add up exactly. A token
    counts once for each row it is an input of, wherever it is packed; tokens of failed rows do not count.

    Args:
        config: of a decoder with experts.
        coef: the loss's factor; 0: it is measured only.
        collectives: of the workers that train.
        replay: routers are told; it is measured where they would have chosen otherwise.
    """

    def __init__(self, config: DecoderConfig, coef: float, collectives: Collectives, replay: bool = False) -> None:
        shape = len(config.sparse_layers), config.num_experts
        self._each, self._coef, self._collectives = config.num_experts_per_tok, coef, collectives
        self._counts = torch.zeros(shape, dtype=torch.int64)  # [L, E]
        self._probs = torch.zeros(shape, dtype=torch.float64)
        self._counted = False
        self._replay, self._agreed, self._told = replay, 0, 0

    @property
    def needs_counts(self) -> bool:
        """Whether :meth:`count` has to see every micro-batch, and :meth:`counted` follow, before the first loss."""
        return self._coef != 0 and not self._counted

    def count(self, routing: Routing, shares_T: Tensor) -> None:
        """Add the choices of a pass; ``shares_T`` of :func:`shares`, of all of the micro-batch's tokens."""
        shares_T = shares_T[routing.own]
        self._counts += torch.stack(
            [_counts(routed.chosen_TK, shares_T, self._counts.shape[1]) for _, routed in sorted(routing.layers.items())]
        ).cpu()

    def counted(self) -> None:
        """All micro-batches of this worker are counted. A collective."""
        self._counts, self._counted = self._collectives.all_reduce(self._counts, "sum"), True

    def loss(self, routing: Routing, shares_T: Tensor) -> Tensor | None:
        """The micro-batch's part of the loss, with its factor; None where that is 0."""
        if not self._counted:
            self.count(routing, shares_T)
        shares_T = shares_T[routing.own]
        self._compare(routing, shares_T)
        sums = [routing.layers[i].probs_TE.mul(shares_T[:, None]).sum(0) for i in range(len(self._counts))]
        probs_LE = torch.stack(sums)
        self._probs += probs_LE.detach().double().cpu()
        if self._coef == 0:
            return None
        return self._coef * (probs_LE * self._factors().to(probs_LE)).sum()

    def report(self, metrics: StepMetrics) -> float:
        """Add the mini-batch's metrics; give back this worker's part of the loss that was minimised. A collective."""
        if not self._counted:
            self.counted()
        loss = float((self._collectives.all_reduce(self._probs, "sum") * self._factors()).sum())
        metrics.mean("actor/router_aux_loss", loss, 1)
        load = self._counts.double() / self._counts.double().mean(1, keepdim=True).clamp(min=1e-9)
        metrics.max("actor/router_load_max", float(load.max()))
        metrics.min("actor/router_load_min", float(load.min()))
        if self._replay:
            agreed, told = self._collectives.all_reduce(torch.tensor([self._agreed, self._told]), "sum").tolist()
            metrics.mean("rollout/router_agreement", agreed, told)
        return self._coef * loss if self._collectives.rank == 0 else 0.0

    def _compare(self, routing: Routing, shares_T: Tensor) -> None:
        """Count where a router that is told would have chosen the same."""
        if routing.given_TLK is None:
            return
        for i, routed in routing.layers.items():
            known_TK = (routing.given_TLK[:, i] != UNKNOWN) * shares_T[:, None]
            same_TK = (routed.chosen_TK[..., None] == routed.likeliest_TK[:, None]).any(-1)
            self._told += int(known_TK.sum())
            self._agreed += int((known_TK * same_TK).sum())

    def _factors(self) -> Tensor:
        """What the sums of probabilities are weighed with, E f_e / (L tokens), float64 [L, E]."""
        layers, experts = self._counts.shape
        tokens = self._counts.double().sum(1, keepdim=True).clamp(min=1) / self._each
        return experts * self._counts / tokens**2 / layers


def require_experts(model: nn.Module, config: Config) -> None:
    """Refuse keys of a mixture of experts for a model that has none.

    Raises:
        RequestError: it names the key.
    """
    if isinstance(model, Decoder) and model.config.sparse_layers:
        return
    if config.training.router_aux_coef:
        raise RequestError(
            f"training.router_aux_coef is {config.training.router_aux_coef}, but model.path '{config.model.path}' has "
            "no experts that the built-in decoder routes to; leave the key out"
        )
    if config.rollout.router_replay:
        raise RequestError(
            f"rollout.router_replay needs a mixture of experts that the built-in decoder runs, and model.path "
            f"'{config.model.path}' is none; leave the key out"
        )


def shares(micro: MicroBatch, valid: Tensor) -> Tensor:
    """How many valid rows each packed token is an input of, int64 [T] on the micro-batch's device.

    Args:
        valid: bool, of every row of the batch, on the host.
    """
    packed = micro.sequences
    if not len(micro.rows):
        return torch.zeros_like(micro.tokens_T)
    own, device = valid[micro.rows], micro.tokens_T.device
    lengths = torch.tensor(packed.lengths)
    if packed.whole is None:
        return own.repeat_interleave(lengths).long().to(device)
    rows = own.repeat_interleave(lengths + torch.tensor(packed.prefixes)).to(device)
    return torch.bincount(packed.whole[rows], minlength=len(micro.tokens_T))


def _counts(chosen_TK: Tensor, shares_T: Tensor, experts: int) -> Tensor:
    """Tokens of each expert, int64 [E]; no addition depends on an order."""
    numbers = torch.arange(experts, device=chosen_TK.device)
    return ((chosen_TK[..., None] == numbers).sum(1) * shares_T[:, None]).sum(0)
