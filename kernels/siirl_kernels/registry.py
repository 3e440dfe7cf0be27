"""The registry: ops by name, implementations by provider, one table of bound callables."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_ops: dict[str, dict[str, Callable[..., Any]]] = {}
_bound: dict[str, str] = {}


class Kernels:
    """The bound implementations, one attribute per op: a call costs one attribute lookup."""

    rms_norm: Callable[..., Any]
    rope: Callable[..., Any]
    swiglu: Callable[..., Any]
    packed_attention: Callable[..., Any]
    linear_log_prob: Callable[..., Any]
    decode_attention: Callable[..., Any]


kernels = Kernels()


def op(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``function`` as the contract and the reference (provider ``torch``) of the op of its name."""
    name = function.__name__
    _ops[name] = {"torch": function}
    _bound[name] = "torch"
    setattr(kernels, name, function)
    return function


def implementation(name: str, provider: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an implementation of the op ``name``; its parameters must equal the reference's.

    Raises:
        ValueError: the op is unknown, or the signatures differ.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if name not in _ops:
            raise ValueError(f"kernel op '{name}' is unknown; the ops are {', '.join(sorted(_ops))}")
        expected = list(inspect.signature(_ops[name]["torch"]).parameters)
        given = list(inspect.signature(function).parameters)
        if expected != given:
            raise ValueError(
                f"'{provider}' implements {name}({', '.join(given)}), the op is {name}({', '.join(expected)})"
            )
        _ops[name][provider] = function
        return function

    return register


def bind(order: Sequence[str], pinned: Mapping[str, str] | None = None) -> dict[str, str]:
    """Choose each op's implementation: the pinned provider, else the first of ``order`` that has the op.

    Returns:
        The provider chosen for each op.

    Raises:
        ValueError: a pinned op or provider does not exist.
    """
    pinned = dict(pinned or {})
    for name, provider in pinned.items():
        if provider not in _ops.get(name, {}):
            raise ValueError(f"no provider '{provider}' implements the kernel op '{name}'")
    for name, providers in _ops.items():
        chosen = pinned.get(name) or next((p for p in order if p in providers), "torch")
        setattr(kernels, name, providers[chosen])
        _bound[name] = chosen
    return resolved()


def resolved() -> dict[str, str]:
    """The provider bound to each op."""
    return dict(_bound)
