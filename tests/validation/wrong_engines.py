"""Patches of the rollout engine and of training, each a mistake that is easily made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from siirl.algorithms import advantages
from siirl.rollout import engine as engines
from siirl.rollout.engine import NativeEngine
from siirl.rollout.sampling import Sampling
from siirl.rollout.state import CachedState
from siirl.training.fsdp import TrainingEngine

_draw, _keep, _group_advantages, _clip = (
    engines.draw,
    CachedState.keep,
    advantages.group_advantages,
    TrainingEngine._clip,
)


def _weights_stay(self: NativeEngine, named: Iterable[tuple[str, Tensor]], version: int) -> None:
    self.version = version


def _version_stays(self: NativeEngine, named: Iterable[tuple[str, Tensor]], version: int) -> None:
    own = dict(self.decoder.named_parameters())
    with torch.no_grad():
        for name, tensor in named:
            own[name].copy_(tensor)


def _transposed_where_square(self: NativeEngine, named: Iterable[tuple[str, Tensor]], version: int) -> None:
    _version_stays(self, ((n, t.t() if t.dim() == 2 and t.shape[0] == t.shape[1] else t) for n, t in named), version)
    self.version = version
    # where no weight is square, the heads of the queries are in another order
    for name, parameter in self.decoder.named_parameters():
        if name.endswith("q_proj.weight"):
            with torch.no_grad():
                parameter.copy_(parameter.flip(0))


def _never_ends(self: NativeEngine, tokens_B: Tensor, sampling: Sampling) -> Tensor:
    return torch.zeros(len(tokens_B), dtype=torch.bool)


def _cache_not_moved(self: CachedState, order: Tensor) -> None:
    lengths = self._lengths.clone()
    cache = self._cache.clone()
    _keep(self, order)
    self._cache.copy_(cache)
    self._lengths[: len(order)] = lengths[order]


def _too_cold(logits_BV: Tensor, sampling: Sampling, *rest: Any) -> Any:
    colder = Sampling(sampling.max_new_tokens, 0.6 * sampling.temperature, ignore_eos=sampling.ignore_eos)
    tokens, _ = _draw(logits_BV, colder, *rest)
    log_p = torch.log_softmax(logits_BV.float() / (sampling.temperature or 1.0), -1)
    return tokens, log_p.gather(1, tokens[:, None]).squeeze(1)


def _log_probs_untempered(logits_BV: Tensor, sampling: Sampling, *rest: Any) -> Any:
    tokens, _ = _draw(logits_BV, sampling, *rest)
    return tokens, torch.log_softmax(logits_BV.float(), -1).gather(1, tokens[:, None]).squeeze(1)


def _not_by_the_deviation(reward_N: Tensor, group_N: Tensor, valid_N: Tensor, norm_std: bool, **rest: Any) -> Tensor:
    return _group_advantages(reward_N, group_N, valid_N, False, **rest)


def _one_per_cent_more(self: TrainingEngine) -> float:
    for parameter in self.module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1.01)
    return _clip(self)


PATCHES: dict[str, list[tuple[Any, str, Any]]] = {
    "stale weights after a sync": [(NativeEngine, "update_weights", _weights_stay)],
    "the old version after a sync": [(NativeEngine, "update_weights", _version_stays)],
    "weights in another layout": [(NativeEngine, "update_weights", _transposed_where_square)],
    "end tokens are not seen": [(NativeEngine, "_eos", _never_ends)],
    "cache rows that do not move": [(CachedState, "keep", _cache_not_moved)],
    "drawn too cold": [(engines, "draw", _too_cold)],
    "log-probs without the temperature": [(engines, "draw", _log_probs_untempered)],
    "advantages not by the deviation": [(advantages, "group_advantages", _not_by_the_deviation)],
    "gradients one per cent too large": [(TrainingEngine, "_clip", _one_per_cent_more)],
}
