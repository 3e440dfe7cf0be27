"""Advantage estimators and policy losses by the names a config uses for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

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

_ADVANTAGES: dict[str, AdvantageFn] = {}
_POLICY_LOSSES: dict[str, PolicyLossFn] = {}


def advantage(name: str) -> Callable[[F], F]:
    """Register an advantage estimator (see `AdvantageFn`) as ``algorithm.advantage: name``."""
    return _register(_ADVANTAGES, "advantage", name)


def policy_loss(name: str) -> Callable[[F], F]:
    """Register a policy loss (see `PolicyLossFn`) as ``algorithm.policy_loss: name``."""
    return _register(_POLICY_LOSSES, "policy_loss", name)


def get_advantage(name: str) -> AdvantageFn:
    """Return the estimator registered as `name`, or of the form `file.py:function`; RequestError when there is none."""
    return _get(_ADVANTAGES, "advantage", name)


def get_policy_loss(name: str) -> PolicyLossFn:
    """Return the policy loss registered as `name`, or of the form `file.py:function`; RequestError when there is none."""
    return _get(_POLICY_LOSSES, "policy_loss", name)


def _register(table: dict, key: str, name: str) -> Callable[[F], F]:
    def add(function: F) -> F:
        if name in table:
            raise ValueError(f"algorithm.{key} '{name}' is already registered, by {table[name].__module__}")
        table[name] = function
        return function

    return add


def _get(table: dict, key: str, name: str):
    if ":" in name:
        return load_function(name, key.replace("_", " "))
    if name not in table:
        known = ", ".join(sorted(table))
        hint = did_you_mean(name, table) or f"; known: {known}"
        raise RequestError(f"algorithm.{key}: nothing is registered as '{name}'{hint}")
    return table[name]
