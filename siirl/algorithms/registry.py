"""Advantage estimators and policy losses by the names a config uses for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from siirl.errors import RequestError, did_you_mean
from siirl.user_code import load_function

if TYPE_CHECKING:
    from torch import Tensor

    from siirl.algorithms.policy_losses import PolicyLossInput
    from siirl.config.schema import AlgorithmConfig
    from siirl.data.batch import Batch, Ragged
    from siirl.device.collectives import Collectives

# From a worker's batch, the columns to write: `advantages`, perhaps `returns`, ragged float32 as `response_ids` is.
AdvantageFn: TypeAlias = "Callable[[Batch, AlgorithmConfig, Collectives], dict[str, Ragged]]"

# The loss of every token [T], differentiable, and statistics of every token, each float32 [T] and detached.
PolicyLossFn: TypeAlias = "Callable[[PolicyLossInput, AlgorithmConfig], tuple[Tensor, dict[str, Tensor]]]"

F = TypeVar("F", bound=Callable[..., object])

# Imported when asked for: a configuration is checked before PyTorch is.
BUILT_IN = {
    "advantage": {"grpo": "siirl.algorithms.advantages", "gae": "siirl.algorithms.advantages"},
    "policy_loss": {"ppo_clip": "siirl.algorithms.policy_losses"},
}

_registered: dict[str, dict[str, Callable[..., Any]]] = {key: {} for key in BUILT_IN}


def advantage(name: str) -> Callable[[F], F]:
    """Register an advantage estimator (see `AdvantageFn`) as ``algorithm.advantage: name``."""
    return _register("advantage", name)


def policy_loss(name: str) -> Callable[[F], F]:
    """Register a policy loss (see `PolicyLossFn`) as ``algorithm.policy_loss: name``."""
    return _register("policy_loss", name)


def get_advantage(name: str) -> AdvantageFn:
    """Return the estimator registered as `name`, or `file.py:function`; RequestError when there is none."""
    return _get("advantage", name)


def get_policy_loss(name: str) -> PolicyLossFn:
    """Return the policy loss registered as `name`, or `file.py:function`; RequestError when there is none."""
    return _get("policy_loss", name)


def check_names(config: AlgorithmConfig) -> None:
    """Refuse an ``algorithm.advantage`` or ``algorithm.policy_loss`` that nothing is registered as."""
    for key in BUILT_IN:
        _check(key, getattr(config, key))


def _register(key: str, name: str) -> Callable[[F], F]:
    def add(function: F) -> F:
        table = _registered[key]
        if name in table or BUILT_IN[key].get(name, function.__module__) != function.__module__:
            raise ValueError(f"algorithm.{key} '{name}' is already registered")
        table[name] = function
        return function

    return add


def _check(key: str, name: str) -> None:
    known = {**BUILT_IN[key], **_registered[key]}
    if ":" not in name and name not in known:
        hint = did_you_mean(name, known) or f"; known: {', '.join(sorted(known))}"
        raise RequestError(f"algorithm.{key}: nothing is registered as '{name}'{hint}")


def _get(key: str, name: str) -> Any:
    if ":" in name:
        return load_function(name, key.replace("_", " "))
    _check(key, name)
    if name in BUILT_IN[key]:
        importlib.import_module(BUILT_IN[key][name])
    return _registered[key][name]
