"""Patches of the rollout engine and of training, each a mistake that is easily made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from siirl.algorithms import advantages
from siirl.rollout import checksum, sampler
from siirl.rollout.blocks import BlockPool, Ints
from siirl.rollout.contract import SleepLevel
from siirl.rollout.engine import NativeEngine
from siirl.rollout.sampler import Sampler
from siirl.rollout.sampling import Sampling
from siirl.rollout.state import PagedState
from siirl.training.spread import Spread

_sleep, _wake, _abort = NativeEngine.sleep, NativeEngine.wake, NativeEngine.abort
_words = checksum._words
_draw, _group_advantages, _clip = sampler.draw, advantages.group_advantages, Spread.clip_gradients
_make = Sampler.__init__


def _weights_stay(self: NativeEngine, named: Iterable[tuple[str, Tensor]], version: int, checksum: Any = None) -> None:
    self.version = version


def _version_stays(self: NativeEngine, named: Iterable[tuple[str, Tensor]], version: int, checksum: Any = None) -> None:
    own = dict(self.decoder.named_parameters())
    with torch.no_grad():
        for name, tensor in named:
            own[name].copy_(tensor)


def _confirms_nothing(
    self: NativeEngine, named: Iterable[tuple[str, Tensor]], version: int, checksum: Any = None
) -> None:
    _version_stays(self, named, version)
    self.version = version


def _transposed_where_square(
    self: NativeEngine, named: Iterable[tuple[str, Tensor]], version: int, checksum: Any = None
) -> None:
    _version_stays(self, ((n, t.t() if t.dim() == 2 and t.shape[0] == t.shape[1] else t) for n, t in named), version)
    self.version = version
    # where no weight is square, the heads of the queries are in another order
    for name, parameter in self.decoder.named_parameters():
        if name.endswith("q_proj.weight"):
            with torch.no_grad():
                parameter.copy_(parameter.flip(0))


def _every_other(tensor: Tensor) -> tuple[Tensor, Tensor]:
    words, rest = _words(tensor)
    return words[1::2], rest


def _never_ends(self: Sampler, sampling: Sampling, ends: list[int], *rest: Any) -> None:
    _make(self, sampling, ends if sampling.ignore_eos else [], *rest)


def _not_copied(self: PagedState, source: Ints, target: Ints) -> None:
    pass


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


def _one_per_cent_more(self: Spread, limit: float) -> float:
    for parameter in self._module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1.01)
    return _clip(self, limit)


def _keeps_its_cache(self: NativeEngine, level: SleepLevel = 1) -> None:
    cache = self.cache
    _sleep(self, level)
    self.cache = cache


def _keeps_its_weights(self: NativeEngine, level: SleepLevel = 1) -> None:
    self.cache, self._pool, self._asleep = None, BlockPool(0), {}


def _wakes_without_asking_for_weights(self: NativeEngine) -> None:
    _wake(self)
    for name, weight in self.decoder.named_parameters():
        if name in self._dropped:
            weight.data.zero_()
    self._dropped.clear()


def _ends_only_the_first(self: NativeEngine, sample_ids: Tensor | None = None) -> None:
    _abort(self, None if sample_ids is None else sample_ids[:1])


def _ends_all(self: NativeEngine, sample_ids: Tensor | None = None) -> None:
    _abort(self, None)


PATCHES: dict[str, list[tuple[Any, str, Any]]] = {
    "stale weights after a sync": [(NativeEngine, "update_weights", _weights_stay)],
    "the old version after a sync": [(NativeEngine, "update_weights", _version_stays)],
    "weights in another layout": [(NativeEngine, "update_weights", _transposed_where_square)],
    "weights that nobody confirms": [(NativeEngine, "update_weights", _confirms_nothing)],
    "a checksum of every other number": [(checksum, "_words", _every_other)],
    "end tokens are not seen": [(Sampler, "__init__", _never_ends)],
    "a group's last block that is not copied": [(PagedState, "copy", _not_copied)],
    "drawn too cold": [(sampler, "draw", _too_cold)],
    "log-probs without the temperature": [(sampler, "draw", _log_probs_untempered)],
    "a cache kept asleep": [(NativeEngine, "sleep", _keeps_its_cache)],
    "weights kept asleep": [(NativeEngine, "sleep", _keeps_its_weights), (NativeEngine, "wake", lambda self: None)],
    "woken without its weights": [(NativeEngine, "wake", _wakes_without_asking_for_weights)],
    "one abort of many": [(NativeEngine, "abort", _ends_only_the_first)],
    "all aborted for some": [(NativeEngine, "abort", _ends_all)],
    "advantages not by the deviation": [(advantages, "group_advantages", _not_by_the_deviation)],
    "gradients one per cent too large": [(Spread, "clip_gradients", _one_per_cent_more)],
}
