"""One process that runs many `siirl bench` commands, so that PyTorch is imported once; kernels can be added to it."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str


class Commands:
    """Runs ``siirl bench ARGUMENTS --device cpu`` in a process of its own, in an empty directory."""

    def __init__(self, directory: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, directory))
        self._process.start()
        theirs.close()

    def __call__(self, *arguments: str) -> Finished:
        return self._ask(_command, *arguments)

    def register(self, op: str, provider: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Give an op a provider, or another one: the reference, changed."""
        self._ask(_register, op, provider, change)

    def close(self) -> None:
        self._pipe.close()
        self._process.join(30)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._pipe.send((function, arguments))
        assert self._pipe.poll(280), "the command hangs"
        return self._pipe.recv()


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same work by another name."""

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)

    return call


def slower(function: Callable[..., Any]) -> Callable[..., Any]:
    """30 % slower, with the same operators: it waits as long, on the processor, after every call."""

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        start = perf_counter()
        result = function(*arguments, **keywords)
        end = start + 1.3 * (perf_counter() - start)
        while perf_counter() < end:
            pass
        return result

    return call


def with_a_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """One operator and one allocation more."""

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords).clone()

    return call


def _serve(pipe: Any, directory: Path) -> None:
    os.environ.pop("SIIRL_DEVICE", None)
    with chdir(directory):
        while True:
            try:
                function, arguments = pipe.recv()
            except EOFError:
                return
            pipe.send(function(*arguments))


def _command(*arguments: str) -> Finished:
    from siirl.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    status = None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(["bench", *arguments, "--device", "cpu"])
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int) or status is None
    return Finished(status or 0, out.getvalue(), err.getvalue())


def _register(op: str, provider: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    from siirl_kernels import implementation, reference

    implementation(op, provider)(change(getattr(reference, op)))
