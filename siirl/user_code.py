"""Functions that a user names in a configuration: ``module:function``, or ``file.py:function``.

Paths are relative to the working directory, from which modules are importable too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from siirl.errors import RequestError, SiirlError, did_you_mean


def import_target(target: str, what: str) -> ModuleType:
    """Import a module by name, or a file by its path when ``target`` ends in ``.py``.

    Args:
        target: of a ``TARGET:FUNCTION``.
        what: what the function is for, as errors call it: ``reward``.

    Raises:
        RequestError: it does not exist, or raises while it is imported; names the line.
    """
    if target.endswith(".py"):
        return _import_file(target, what)
    _add_to_path(os.getcwd())
    return _run(f"{what} module '{target}'", lambda: importlib.import_module(target))


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function that ``spec`` names; what it raises when called is a SiirlError that names its line.

    Raises:
        RequestError: as `import_target`, or it has no such function.
    """
    target, _, name = spec.rpartition(":")
    return guarded(member(import_target(target, what), name, spec, what), f"{what} '{name}'")


def guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``function``, with whatever it raises turned into a SiirlError that names the user's line."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SiirlError:
            raise
        except Exception as error:  # a user's code may raise anything
            place = blame(error, inside=inspect.getsourcefile(function) or "")
            raise SiirlError(f"{name} raised {type(error).__name__}{place}: {error}") from error

    return call


def member(module: ModuleType, name: str, spec: str, what: str) -> Callable[..., Any]:
    """The function ``name`` of a module; RequestError when there is none."""
    found = getattr(module, name, None)
    if found is None:
        options = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise RequestError(f"{what} '{spec}': {module.__file__} has no '{name}'{did_you_mean(name, options)}")
    if inspect.isclass(found) or not callable(found):
        raise RequestError(f"{what} '{spec}' is a {type(found).__name__}, not a function")
    return found


def blame(error: BaseException, skip: str = "", inside: str = "") -> str:
    """`` at FILE:LINE`` of the innermost frame, or nothing when that is in the file ``skip``.

    A line of the file ``inside`` on the way to the error is named rather than the library's below it.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    frames = [f for f in frames if f.filename == inside] or frames
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames and frames[-1].filename != skip else ""


def _import_file(path: str, what: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        near = did_you_mean(file.name, [p.name for p in file.parent.glob("*.py")])
        raise RequestError(f"{what} file '{path}' does not exist{near}")
    _add_to_path(str(file.parent))
    name = f"siirl_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _run(f"{what} file '{path}'", functools.partial(spec.loader.exec_module, module))
    return module


def _run(place: str, load: Callable[[], Any]) -> Any:
    """Import a user's module. It may raise anything, and a script may leave by `sys.exit`."""
    try:
        return load()
    except (Exception, SystemExit) as error:
        where = blame(error, skip=__file__)
        raise RequestError(f"{place} cannot be imported: {type(error).__name__}{where}: {error}") from error


def _add_to_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)  # at the end: a user's file must not shadow an installed package
