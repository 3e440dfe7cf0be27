"""The registry: ops by name, implementations by provider, one table of bound callables."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

_ops: dict[str, dict[str, Callable[..., Any]]] = {}
_predicates: dict[tuple[str, str], Callable[..., bool]] = {}
_bound: dict[str, str] = {}
_obstacles: dict[str, Callable[[], str | None]] = {}
_reported: set[str] = set()
_optional: set[str] = set()

_log = logging.getLogger(__name__)


class Kernels:
    """The bound implementations, one attribute per op: a call costs one attribute lookup."""

    rms_norm: Callable[..., Any]
    rope: Callable[..., Any]
    swiglu: Callable[..., Any]
    packed_attention: Callable[..., Any]
    linear_log_prob: Callable[..., Any]
    paged_attention: Callable[..., Any]
    linear: Callable[..., Any]
    inference_linear: Callable[..., Any]
    inference_layer: Callable[..., Any]
    categorical: Callable[..., Any]
    token_log_prob: Callable[..., Any]
    group_advantages: Callable[..., Any]
    gae: Callable[..., Any]
    policy_loss: Callable[..., Any]
    gradient_norm: Callable[..., Any]
    adamw_step: Callable[..., Any]
    cast_pack: Callable[..., Any]
    permute_tokens: Callable[..., Any]
    unpermute_tokens: Callable[..., Any]
    grouped_linear: Callable[..., Any]


kernels = Kernels()


def op(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``function`` as the contract and the reference (provider ``torch``) of the op of its name."""
    name = function.__name__
    _ops[name] = {"torch": function}
    _bound[name] = "torch"
    setattr(kernels, name, function)
    return function


def implementation(
    name: str, provider: str, supports: Callable[..., bool] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an implementation of the op ``name``; its parameters must equal the reference's.

    Args:
        supports: asked with a call's own arguments, from their dtypes, shapes and devices alone; where it says no the
            next provider or the reference runs. Without it the implementation takes every call.

    Raises:
        ValueError: the op is unknown, or the signatures differ.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if name not in _ops:
            raise ValueError(f"kernel op '{name}' is unknown; the ops are {', '.join(sorted(_ops))}")
        expected = list(inspect.signature(_ops[name]["torch"]).parameters)
        for given in (list(inspect.signature(f).parameters) for f in (function, supports) if f is not None):
            if expected != given:
                raise ValueError(
                    f"'{provider}' implements {name}({', '.join(given)}), the op is {name}({', '.join(expected)})"
                )
        _ops[name][provider] = function
        _predicates.pop((name, provider), None)
        if supports is not None:
            _predicates[name, provider] = supports
        return function

    return register


def provider(name: str, obstacle: Callable[[], str | None], optional: bool = False) -> None:
    """Say that a provider may be unable to run here.

    Args:
        obstacle: asked when a table is bound, not before: why none of the provider's implementations can run, or None.
        optional: nothing is amiss without it, so that a run does not warn.
    """
    _obstacles[name] = obstacle
    (_optional.add if optional else _optional.discard)(name)


def obstacle(name: str) -> str | None:
    """Why the provider ``name`` cannot run here, or None."""
    return _obstacles[name]() if name in _obstacles else None


def providers(name: str) -> dict[str, Callable[..., Any]]:
    """The implementations of the op ``name`` by provider, the reference (``torch``) first; none asks its predicate.

    Providers that cannot run here are left out.
    """
    return {provider: function for provider, function in _ops[name].items() if obstacle(provider) is None}


def supported(name: str, provider: str, arguments: Mapping[str, Any]) -> bool:
    """Whether the provider's implementation of the op ``name`` takes a call with these arguments."""
    predicate = _predicates.get((name, provider))
    return predicate is None or predicate(**arguments)


def bind(order: Sequence[str], pinned: Mapping[str, str] | None = None) -> dict[str, str]:
    """Bind each op to the pinned provider, else to the first of ``order`` that has the op.

    A call that the provider does not take goes to the next in the order, at last to the reference.
    :func:`siirl_kernels.selftest.bind_tested` tries them first.

    Returns:
        The provider chosen for each op; several that are asked one after another as ``first > second``.

    Raises:
        ValueError: a pinned op or provider does not exist, or the provider cannot run here.
    """
    return bind_to(choose(order, pinned))


def bind_to(chosen: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Bind each op to the providers chosen for it (:func:`choose`); all that are bound now."""
    for name, asked in chosen.items():
        setattr(kernels, name, _slot(name, asked))
        _bound[name] = " > ".join(asked) or "torch"
    return resolved()


def choose(
    order: Sequence[str], pinned: Mapping[str, str] | None = None, without: Container[tuple[str, str]] = ()
) -> dict[str, tuple[str, ...]]:
    """The providers beside the reference that :func:`bind` would have asked, one after another, by op.

    Args:
        without: pairs of op and provider that are left out.
    """
    pinned = dict(pinned or {})
    for name, provider in pinned.items():
        if provider not in _ops.get(name, {}):
            raise ValueError(f"no provider '{provider}' implements the kernel op '{name}'")
        if why := obstacle(provider):
            raise ValueError(f"the provider '{provider}' of the kernel op '{name}' cannot run here: {why}")
    order = [provider for provider in order if _able(provider)]
    return {name: _asked(name, [pinned[name]] if name in pinned else order, without) for name in _ops}


def _asked(name: str, order: Sequence[str], without: Container[tuple[str, str]]) -> tuple[str, ...]:
    """Those of ``order`` that have the op, up to the first that takes every call."""
    asked: list[str] = []
    for provider in order:
        if provider == "torch":
            break
        if provider in _ops[name] and (name, provider) not in without:
            asked.append(provider)
            if (name, provider) not in _predicates:
                break
    return tuple(asked)


def _able(provider: str) -> bool:
    """Whether the provider can run here; the log says once why not."""
    why = obstacle(provider)
    if why is not None and provider not in _reported:
        _reported.add(provider)
        level = logging.INFO if provider in _optional else logging.WARNING
        _log.log(level, "the kernel provider '%s' is left out: %s", provider, why)
    return why is None


def resolved() -> dict[str, str]:
    """The provider bound to each op."""
    return dict(_bound)


def table_hash() -> str:
    """A digest of what is bound, the same in every process that computes with the same implementations."""
    return hashlib.sha256(json.dumps(_bound, sort_keys=True).encode()).hexdigest()[:16]


def _slot(name: str, asked: Sequence[str]) -> Callable[..., Any]:
    slot = _ops[name]["torch"]
    for provider in reversed(asked):
        slot = _unless_refused(_ops[name][provider], _predicates.get((name, provider)), slot)
    return slot


def _unless_refused(
    function: Callable[..., Any], predicate: Callable[..., bool] | None, otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    if predicate is None:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if predicate(*args, **kwargs) else otherwise)(*args, **kwargs)

    return call
