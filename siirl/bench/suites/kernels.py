"""Every op by every provider, on the contracts' `perf` cases, forward alone and with the backward pass.

A provider is measured against the reference, the provider `torch`; the reference against the op's plain formula.
GB/s counts the bytes of arguments and results, and of gradients where there are some.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from siirl.bench.measure import Measure, Rate
from siirl.bench.plain_ops import PLAIN
from siirl.bench.plugin import BACKEND
from siirl.device.backend import Backend
from siirl_kernels import providers, supported
from siirl_kernels.contracts import CONTRACTS, Case, tensors_of

SHORT = {"float32": "f32", "bfloat16": "bf16"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    backend = metafunc.config.stash[BACKEND]
    fast = backend.capabilities().fast_dtypes
    backward = metafunc.function is bench_bwd
    chosen = [
        (op, provider, dtype, case)
        for op, contract in CONTRACTS.items()
        if contract.differentiable or not backward
        for dtype in SHORT
        if dtype in fast
        for case in _names(op, dtype, backend.device())
        for provider in providers(op)
    ]
    ids = [f"{op} {provider} {SHORT[dtype]} {case}" for op, provider, dtype, case in chosen]
    metafunc.parametrize(("op", "provider", "dtype", "case"), chosen, ids=ids)


def bench_fwd(measure: Measure, backend: Backend, op: str, provider: str, dtype: str, case: str) -> None:
    found = _case(backend, op, provider, dtype, case)
    function, reference, against = _sides(op, provider)
    moved = _bytes(found.arguments.values()) + _bytes(_tensors(function(**found.arguments)))
    moved += _bytes(found.arguments[name] for name in CONTRACTS[op].writes if CONTRACTS[op].in_place)
    measure(
        lambda: function(**found.arguments),
        lambda: reference(**found.arguments),
        Rate(moved, "bytes"),
        against=against,
    )


def bench_bwd(measure: Measure, backend: Backend, op: str, provider: str, dtype: str, case: str) -> None:
    found = _case(backend, op, provider, dtype, case)
    function, reference, against = _sides(op, provider)
    inputs = [x.requires_grad_() for x in CONTRACTS[op].leaves(found).values()]
    results = _tensors(function(**found.arguments))
    chosen = [x.requires_grad for x in results]
    gradients = [torch.randn_like(x) for x in itertools.compress(results, chosen)]
    moved = _bytes(found.arguments.values()) + 2 * _bytes(results) + _bytes(inputs)

    def both_ways(implementation: Callable[..., Any]) -> Callable[[], Any]:
        def call() -> Any:
            outputs = itertools.compress(_tensors(implementation(**found.arguments)), chosen)
            return torch.autograd.grad(list(outputs), inputs, gradients)

        return call

    measure(both_ways(function), both_ways(reference), Rate(moved, "bytes"), against=against)


@functools.cache
def _names(op: str, dtype: str, device: torch.device) -> list[str]:
    """Names of an op's cases, which have to be drawn to be known."""
    return [case.name for case in CONTRACTS[op].cases("perf", getattr(torch, dtype), device)]


def _case(backend: Backend, op: str, provider: str, dtype: str, name: str) -> Case:
    cases = CONTRACTS[op].cases("perf", getattr(torch, dtype), backend.device())
    case = next(case for case in cases if case.name == name)
    if not supported(op, provider, case.arguments):
        pytest.skip(f"{provider} takes no {op} of {dtype}, {name}")
    return case


def _sides(op: str, provider: str) -> tuple[Callable[..., Any], Callable[..., Any], str]:
    if provider == "torch":
        return providers(op)["torch"], PLAIN[op], "the plain formula"
    return providers(op)[provider], providers(op)["torch"], "the reference"


def _tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [] if result is None else [result]


def _bytes(values: Any) -> int:
    return sum(x.nbytes for x in tensors_of(values))
