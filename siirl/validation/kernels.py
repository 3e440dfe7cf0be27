"""L2: every implementation that the back end may bind keeps its op's contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import siirl_kernels
from siirl.validation.checks import Broken, NotApplicable, check, require
from siirl.validation.numbers import same
from siirl.validation.subject import Subject
from siirl_kernels import contracts, kernels, providers, resolved, supported
from siirl_kernels.accuracy import measure
from siirl_kernels.contracts import CONTRACTS, Case, Contract, Direction, tensors_of
from siirl_kernels.registry import choose

HOST = torch.device("cpu")
FLOATS = ("float32", "float16", "bfloat16")


def implementations(subject: Subject) -> Iterator[tuple[str, str]]:
    """(op, provider) of what may be bound: in the back end's order, which ends in the reference, and by pins alone."""
    order = (*subject.backend.kernel_order(), contracts.INVARIANT)
    for op in CONTRACTS:
        yield from ((op, provider) for provider in order if provider in providers(op))


def repeatable(subject: Subject) -> list[tuple[str, str]]:
    return [pair for pair in implementations(subject) if CONTRACTS[pair[0]].deterministic]


def batch_invariant(subject: Subject) -> list[tuple[str, str]]:
    return [(op, provider) for op, provider in implementations(subject) if CONTRACTS[op].invariant(provider)]


def in_each_dtype(subject: Subject) -> Iterator[tuple[str, str, str]]:
    claimed = subject.backend.capabilities().compute_dtypes
    yield from ((op, provider, name) for op, provider in implementations(subject) for name in FLOATS if name in claimed)


def taken(subject: Subject, op: str, provider: str, dtype: torch.dtype) -> list[tuple[Case, bool]]:
    """The contract's cases that the implementation says it takes, and whether in inference mode alone."""
    return list(contracts.taken(op, provider, subject.depth, dtype, subject.backend.device()))


def results(
    function: Callable[..., Any], case: Case, contract: Contract, inference: bool = False
) -> dict[Direction, list[Tensor]]:
    """Outputs, and outside inference mode gradients."""
    forward, backward = contracts.results(function, case, contract, inference)
    return {"forward": forward, "backward": backward}


@check("L2", "an implementation is as near to the truth as its contract says, gradients included", in_each_dtype)
def accuracy(subject: Subject, op: str, provider: str, dtype_name: str) -> None:
    contract, dtype = CONTRACTS[op], getattr(torch, dtype_name)
    worst: dict[Direction, float] = {"forward": 0.0, "backward": 0.0}
    cases = taken(subject, op, provider, dtype)
    if not cases:
        raise NotApplicable(f"it takes no case in {dtype_name}")
    for case, inference in cases:
        found = results(providers(op)[provider], case, contract, inference)
        truth = results(providers(op)["torch"], case.to(HOST, torch.float64), contract, inference)
        for direction in found:
            for number, (x, true) in enumerate(zip(found[direction], truth[direction], strict=True)):
                wanted = contract.dtype(number, direction, dtype, case)
                _look_at(x, case, subject, wanted, provider)
                error = measure(x, true, contract.tolerance(dtype, case, direction))
                require(
                    error.tolerated,
                    f"case '{case.name}', {direction} {number}: off by {error.max_abs:.3g} at most "
                    f"({error.element_share:.3g} of what is allowed) and by {error.scale:.2g} as a whole "
                    f"({error.scale_share:.3g} of what is allowed)",
                )
                worst[direction] = max(worst[direction], error.element_share, error.scale_share)
    for direction, share in worst.items():
        subject.measure(f"share of the tolerance used, {direction}", share, 1.0)


def _look_at(x: Tensor, case: Case, subject: Subject, dtype: torch.dtype, provider: str) -> None:
    require(x.device == subject.backend.device(), f"case '{case.name}': the result is on {x.device}")
    require(x.dtype == dtype, f"case '{case.name}': {provider} returns {x.dtype}, the op is defined in {dtype}")


@check("L2", "the same call gives the same bits, gradients included", repeatable)
def repeatability(subject: Subject, op: str, provider: str) -> None:
    contract = CONTRACTS[op]
    subject.backend.deterministic("on")
    try:
        for case, inference in taken(subject, op, provider, torch.float32):
            first = results(providers(op)[provider], case, contract, inference)
            for _ in range(3):
                again = results(providers(op)[provider], case, contract, inference)
                for direction in first:
                    for x, y in zip(again[direction], first[direction], strict=True):
                        same(x, y, f"case '{case.name}', {direction}")
    finally:
        subject.backend.deterministic("off")


@check("L2", "a row comes out the same alone, bit for bit", batch_invariant)
def batch_invariance(subject: Subject, op: str, provider: str) -> None:
    contract, function = CONTRACTS[op], providers(op)[provider]
    for case, inference in taken(subject, op, provider, torch.float32):
        together = results(function, case, contract, inference)["forward"]
        for row, (alone, part) in enumerate(contract.alone(case)):
            if (subject.depth == "full" or row % 7 == 0) and supported(op, provider, alone.arguments):
                found = results(function, alone, contract, inference)["forward"]
                for x, y in zip(found, together, strict=True):
                    same(x, y[part], f"case '{case.name}', row {row}")


@check("L2", "no call changes arguments other than those its op writes", implementations)
def arguments_stay(subject: Subject, op: str, provider: str) -> None:
    for case, inference in taken(subject, op, provider, torch.float32):
        kept = case.arguments.keys() - CONTRACTS[op].writes
        arguments = {name: tensors_of([case.arguments[name]]) for name in kept}
        before = {name: [x.clone() for x in given] for name, given in arguments.items()}
        results(providers(op)[provider], case, CONTRACTS[op], inference)
        for name, given in arguments.items():
            for x, y in zip(given, before[name], strict=True):
                same(x, y, f"case '{case.name}', {name}")


@check("L2", "a predicate takes some cases, answers the same twice, and no call it takes fails", implementations)
def honest_predicate(subject: Subject, op: str, provider: str) -> None:
    claimed = [name for name in FLOATS if name in subject.backend.capabilities().compute_dtypes]
    accepted = 0
    for name in claimed:
        dtype = getattr(torch, name)
        for case in CONTRACTS[op].cases(subject.depth, dtype, subject.backend.device()):
            for inference in (False, True):
                with torch.inference_mode(inference):
                    answers = [supported(op, provider, case.arguments) for _ in range(2)]
                require(all(isinstance(answer, bool) for answer in answers), f"it answers {answers[0]!r}, not a bool")
                again = f"it answers {answers[0]}, then {answers[1]}"
                require(answers[0] == answers[1], f"case '{case.name}', {name}: {again}")
                if answers[0]:
                    accepted += 1
                    _runs(providers(op)[provider], case, CONTRACTS[op], name, inference)
    subject.measure("cases taken", accepted)
    require(accepted > 0, "it takes no case of its op in any dtype")


def _runs(function: Callable[..., Any], case: Case, contract: Contract, dtype_name: str, inference: bool) -> None:
    try:
        results(function, case, contract, inference)
    except Exception as error:  # whatever it is: it said it takes the call
        raise Broken(
            f"it takes case '{case.name}' in {dtype_name} and raises {type(error).__name__}: {error}"
        ) from None


@check("L2", "each op is bound to the first provider in the back end's order, and refused calls reach the reference")
def bound_table(subject: Subject) -> None:
    for op, asked in choose(subject.backend.kernel_order()).items():
        chosen, first = resolved()[op], " > ".join(asked) or "torch"
        require(chosen == first, f"{op} is bound to {chosen}, first in order is {first}")
        for case in CONTRACTS[op].cases("smoke", torch.float32, subject.backend.device()):
            if not any(supported(op, provider, case.arguments) for provider in asked):
                ours, expected = (
                    results(function, case, CONTRACTS[op])["forward"]
                    for function in (getattr(kernels, op), providers(op)["torch"])
                )
                for x, y in zip(ours, expected, strict=True):
                    same(x, y, f"{op}, case '{case.name}', which {chosen} refuses")
    require(siirl_kernels.table_hash() == siirl_kernels.table_hash(), "the table's hash changes")
