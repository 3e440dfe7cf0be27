"""What is about to be bound is tried first: one small call of each implementation, against the reference in float64."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from siirl_kernels import registry
from siirl_kernels.accuracy import measure
from siirl_kernels.contracts import CONTRACTS, Case, Direction, results, taken

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOST = torch.device("cpu")

_log = logging.getLogger(__name__)
_failures: dict[tuple[str, str], str] = {}


def bind_tested(
    order: Sequence[str], pinned: Mapping[str, str] | None = None, device: torch.device = HOST
) -> dict[str, str]:
    """As :func:`siirl_kernels.bind`, except that an implementation that fails its try makes room for the next in order.

    What is tried is the first case of the op's contract that it takes, in each dtype, forward and where there are
    gradients backward. One warning names op, provider and what is wrong. References are not tried.

    Args:
        device: where the tensors of the tries are.

    Raises:
        ValueError: as :func:`siirl_kernels.bind`, and where a pinned implementation fails.
    """
    registry.bind(())  # the truth comes from references alone
    _failures.clear()
    passed: set[tuple[str, str]] = set()
    pinned = pinned or {}
    while left := _pairs(registry.choose(order, pinned, _failures)) - passed:
        for op, provider in sorted(left):
            with _one_thread():
                why = problem(op, provider, device)
            if why is None:
                passed.add((op, provider))
            elif op in pinned:
                raise ValueError(f"the provider '{provider}' of the kernel op '{op}' fails its self-test: {why}")
            else:
                _failures[op, provider] = why
                _log.warning(
                    "the kernel op '%s' is not computed by '%s', which fails its self-test: %s", op, provider, why
                )
    return registry.bind_to(registry.choose(order, pinned, _failures))


def _pairs(chosen: Mapping[str, Sequence[str]]) -> set[tuple[str, str]]:
    return {(op, provider) for op, asked in chosen.items() for provider in asked}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small calls are no work for several threads: they would wait for each other, for long on a busy host."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def failures() -> dict[tuple[str, str], str]:
    """What the last :func:`bind_tested` left out, and why, by op and provider."""
    return dict(_failures)


def problem(op: str, provider: str, device: torch.device = HOST) -> str | None:
    """What is wrong with an implementation, or None; what takes no case on the device or the host is not tried."""
    for case, dtype, inference in _cases(op, provider, device):
        where = f"case '{case.name}' in {str(dtype).removeprefix('torch.')}"
        try:
            why = _miss(op, provider, case, dtype, inference)
        except Exception as error:  # whatever it is: the run goes on without this implementation
            first = next(iter(str(error).splitlines()), "")
            return f"{where} raises {type(error).__name__}: {first}"
        if why is not None:
            return f"{where}: {why}"
    return None


def _cases(op: str, provider: str, device: torch.device) -> Iterator[tuple[Case, torch.dtype, bool]]:
    if op not in CONTRACTS:
        return
    for place in dict.fromkeys((device, HOST)):
        tried = False
        for dtype in DTYPES:
            for case, inference in taken(op, provider, "smoke", dtype, place):
                tried = True
                yield case, dtype, inference
                break
        if tried:  # what computes on the device need not know the host's tensors
            return


def _miss(op: str, provider: str, case: Case, dtype: torch.dtype, inference: bool) -> str | None:
    contract, functions = CONTRACTS[op], registry.providers(op)
    found = results(functions[provider], case, contract, inference)
    truth = results(functions["torch"], case.to(HOST, torch.float64), contract, inference)
    directions: tuple[Direction, ...] = ("forward", "backward")
    for direction, ours, theirs in zip(directions, found, truth, strict=True):
        for number, (x, true) in enumerate(zip(ours, theirs, strict=True)):
            wanted = contract.dtype(number, direction, dtype, case)
            if x.dtype != wanted:
                return f"{direction} result {number} is {x.dtype}, the op is defined in {wanted}"
            error = measure(x, true, contract.tolerance(dtype, case, direction))
            if not error.tolerated:
                share = max(error.element_share, error.scale_share)
                return f"{direction} result {number} is off by {error.max_abs:.2g}, {share:.3g} times what is allowed"
    return None
