"""From a name in the configuration to a reward function.

A reward function is ``(prompt: str, response: str, sample: dict, **params) -> float``; `sample` is the data row. It is
named by

- a registered name: the built-in ones below, or an entry point of an installed package in the group `siirl.rewards`;
- ``module:function``, the module being importable from the working directory too;
- ``file.py:function``, the path being relative to the working directory.

``@reward("name")`` gives a function a name; ``file.py:name`` finds it by that name as well as by its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from siirl.errors import RequestError, did_you_mean
from siirl.user_code import import_target, member

RewardFunction = Callable[..., float]

# Imported when asked for, so that naming one costs nothing and a library is loaded only by the reward that needs it.
BUILT_IN = {
    "exact_match": "siirl.rewards.text",
    "gsm8k": "siirl.rewards.text",
    "math": "siirl.rewards.mathematics",
    "reasoning_gym": "siirl.rewards.reasoning",
}
ENTRY_POINTS = "siirl.rewards"

_registered: dict[str, RewardFunction] = {}


@dataclass(frozen=True)
class Reward:
    """A resolved reward function with its parameters; `file` and `line` are where it is defined."""

    name: str
    function: RewardFunction
    params: dict[str, Any]
    file: str
    line: int

    @property
    def location(self) -> str:
        return f"{self.file}:{self.line}"

    def __call__(self, prompt: str, response: str, sample: dict[str, Any]) -> float:
        return self.function(prompt, response, sample, **self.params)


def reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Register the decorated function under `name`; the names of two files of one's own may be the same.

    Raises:
        ValueError: `name` is that of a built-in reward.
    """

    def register(function: RewardFunction) -> RewardFunction:
        if name in BUILT_IN and function.__module__ != BUILT_IN[name]:
            raise ValueError(f"'{name}' is the name of a built-in reward")
        _registered[name] = function
        return function

    return register


def choose(function: str, scorer: str | None) -> str:
    """The reward that `reward.function` asks for; `auto` is the data source's own scorer, else `exact_match`."""
    return (scorer or "exact_match") if function == "auto" else function


def resolve(spec: str, params: Mapping[str, Any] | None = None) -> Reward:
    """Find the function that `spec` names and check that it can be called with `params`.

    Raises:
        RequestError: nothing has that name, its module cannot be imported, or it takes other arguments.
    """
    target, _, attribute = spec.rpartition(":")
    if not target:
        function = _by_name(spec)
    else:
        function = _member(target, attribute, spec)
    file, line = _defined_at(function)
    found = Reward(spec, function, dict(params or {}), file, line)
    _check_arguments(found)
    return found


def _by_name(name: str) -> RewardFunction:
    if name in BUILT_IN:
        _import_built_in(name)
        return _registered[name]
    if name in _registered:
        return _registered[name]
    plugins = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if name in plugins:
        return plugins[name].load()
    if name.endswith(".py"):
        raise RequestError(f"reward.function '{name}' names a file without a function; write {name}:FUNCTION")
    names = {**BUILT_IN, **_registered, **plugins}
    raise RequestError(f"there is no reward '{name}'{did_you_mean(name, names)} (there are {', '.join(sorted(names))})")


def _import_built_in(name: str) -> None:
    try:
        importlib.import_module(BUILT_IN[name])
    except ModuleNotFoundError as error:
        package = {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}.get(error.name or "", error.name)
        raise RequestError(f"reward '{name}' needs the package {package}: pip install {package}") from error


def _member(target: str, name: str, spec: str) -> RewardFunction:
    """The function ``name`` of the target, or the one that the target registers under it."""
    module = import_target(target, "reward")
    own = _registered.get(name)
    if not hasattr(module, name) and own is not None and _defined_at(own)[0] == module.__file__:
        return own
    return member(module, name, spec, "reward")


def _check_arguments(found: Reward) -> None:
    if inspect.iscoroutinefunction(found.function):
        raise RequestError(f"reward '{found.name}' ({found.location}) is async; a reward returns its number")
    signature = inspect.signature(found.function)
    try:
        signature.bind("", "", {}, **found.params)
    except TypeError as error:
        unknown = next((key for key in found.params if key not in signature.parameters), None)
        hint = did_you_mean(unknown, list(signature.parameters)[3:]) if unknown else ""
        called = ", ".join(["prompt", "response", "sample", *(f"{key}=" for key in found.params)])
        raise RequestError(
            f"reward '{found.name}' ({found.location}) cannot be called as ({called}): {error}{hint}"
        ) from error


def _defined_at(function: RewardFunction) -> tuple[str, int]:
    """File and line of a function, of a callable object's `__call__`, or of what a `functools.partial` wraps."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code else (repr(function), 0)
