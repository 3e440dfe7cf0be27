"""Every implementation of every op keeps its contract, and the contracts notice when one does not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from siirl_kernels import kernels, providers, supported
from siirl_kernels.accuracy import SCALE_ELEMENTS, Tolerance, measure
from siirl_kernels.contracts import CONTRACTS, results, taken, tensors_of
from tests.device_under_test import device

CPU = torch.device("cpu")
DEVICE = device()  # its back end brings implementations of its own
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLEMENTATIONS = [(op, provider) for op in CONTRACTS for provider in providers(op)]


def test_every_op_has_a_contract() -> None:
    assert CONTRACTS.keys() == vars(kernels).keys()
    for op, contract in CONTRACTS.items():
        parameters = inspect.signature(providers(op)["torch"]).parameters
        for case in contract.cases("smoke", torch.float32, "cpu"):
            assert list(case.arguments) == list(parameters), op
        assert {*contract.differentiable, *contract.rows} <= parameters.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "provider"), IMPLEMENTATIONS)
def test_implementations_are_as_near_to_the_truth_as_promised(op: str, provider: str, dtype: torch.dtype) -> None:
    contract, function, reference = CONTRACTS[op], providers(op)[provider], providers(op)["torch"]
    calls = list(taken(op, provider, "full", dtype, DEVICE))
    if not calls:
        pytest.skip(f"{provider} takes no {op} in {dtype}")
    for case, inference in calls:
        ours = results(function, case, contract, inference)
        truth = results(reference, case.to(CPU, torch.float64), contract, inference)
        for direction, found, expected in zip(("forward", "backward"), ours, truth, strict=True):
            for index, (x, true) in enumerate(zip(found, expected, strict=True)):
                assert x.dtype == contract.dtype(index, direction, dtype, case)
                error = measure(x, true, contract.tolerance(dtype, case, direction))
                assert error.tolerated, f"{case.name}, {direction} {index}: {error}"


@pytest.mark.parametrize(("op", "provider"), IMPLEMENTATIONS)
def test_an_implementation_takes_calls(op: str, provider: str) -> None:
    assert any(any(taken(op, provider, "full", dtype, DEVICE)) for dtype in DTYPES)


@pytest.mark.parametrize(("op", "provider"), IMPLEMENTATIONS)
def test_the_same_call_gives_the_same_bits(op: str, provider: str) -> None:
    contract, function = CONTRACTS[op], providers(op)[provider]
    assert contract.deterministic
    for case, inference in taken(op, provider, "smoke", torch.bfloat16, DEVICE):
        first, second = (results(function, case, contract, inference) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(sum(first, []), sum(second, []), strict=True)), case.name


@pytest.mark.parametrize(
    ("op", "provider"), [pair for pair in IMPLEMENTATIONS if CONTRACTS[pair[0]].invariant(pair[1])]
)
def test_a_row_comes_out_the_same_alone(op: str, provider: str) -> None:
    contract, function = CONTRACTS[op], providers(op)[provider]
    for case, inference in taken(op, provider, "full", torch.float32, DEVICE):
        together, _ = results(function, case, contract, inference)
        for alone, part in contract.alone(case):
            if not supported(op, provider, alone.arguments):
                continue
            found, _ = results(function, alone, contract, inference)
            for x, y in zip(found, together, strict=True):
                assert torch.equal(x, y[part]), (provider, case.name)


@pytest.mark.parametrize("level", ["smoke", "full", "perf"])
@pytest.mark.parametrize("op", CONTRACTS)
def test_cases_are_the_same_each_time_and_named_apart(op: str, level: Any) -> None:
    first, again = (list(CONTRACTS[op].cases(level, torch.float16, CPU, seed=3)) for _ in range(2))
    other = list(CONTRACTS[op].cases(level, torch.float16, CPU, seed=4))
    names = [case.name for case in first]
    assert len(set(names)) == len(names)
    changed = False
    for a, b, c in zip(first, again, other, strict=True):
        drawn, same, apart = (tensors_of(x.arguments.values()) for x in (a, b, c))
        for x, y in zip(drawn, same, strict=True):  # where a cache is not written yet there is no number
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        changed |= not all(map(torch.equal, drawn, apart))
    assert changed


def test_shape_classes_are_covered() -> None:
    for op, contract in CONTRACTS.items():
        cases = list(contract.cases("full", torch.float32, CPU))
        tensors = [tensors_of(case.arguments.values()) for case in cases]
        assert any(not x.is_contiguous() for row in tensors for x in row), op
        assert any(len(row[0]) == 1 for row in tensors), op
        if op != "packed_attention":  # it needs a token
            assert any(len(row[0]) == 0 for row in tensors), op


def off_by_a_unit(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """A mean of squares that is one bfloat16 unit in the last place too large, a relative 2^-8 to 2^-7."""
    wide = x.float()
    mean = wide.square().mean(-1, keepdim=True).bfloat16()
    mean = mean.nextafter(torch.full_like(mean, torch.inf)).float()
    return weight * (wide * (mean + eps).rsqrt()).to(x.dtype)


def test_a_reduction_off_by_one_unit_in_the_last_place_is_noticed() -> None:
    contract, reference = CONTRACTS["rms_norm"], providers("rms_norm")["torch"]
    for dtype in DTYPES:
        noticed = 0
        for case in contract.cases("full", dtype, CPU):
            found, true = off_by_a_unit(**case.arguments), reference(**case.to(CPU, torch.float64).arguments)
            noticed += not measure(found, true, contract.tolerance(dtype, case, "forward")).tolerated
        assert noticed, dtype


def test_errors_are_measured_as_defined() -> None:
    true = torch.tensor([1.0, -4.0, 0.0], dtype=torch.float64)
    error = measure(true + torch.tensor([0.1, -0.2, 0.05]), true, Tolerance(rtol=0.1, atol=0.1, scale=1e-9))
    assert error.max_abs == pytest.approx(0.2)
    assert error.element_share == pytest.approx(0.5)  # 0.1 of 0.1 + 0.1, 0.2 of 0.5, 0.05 of 0.1
    assert error.scale == pytest.approx((0.1 + 0.8) / 17)
    assert error.scale_share == 0.0  # too few elements
    many = torch.ones(SCALE_ELEMENTS, dtype=torch.float64)
    assert measure(1.002 * many, many, Tolerance(1.0, 1.0, scale=0.004)).scale_share == pytest.approx(0.5)


def test_nothing_tolerates_what_is_no_number() -> None:
    true = torch.ones(SCALE_ELEMENTS, dtype=torch.float64)
    assert measure(true.float(), true, Tolerance(0.0, 1e-3, 1e-3)).tolerated
    for bad in (torch.nan, torch.inf):
        assert not measure(true.index_fill(0, torch.tensor([3]), bad), true, Tolerance(1.0, 1.0, 1.0)).tolerated


def test_another_shape_is_no_answer() -> None:
    with pytest.raises(ValueError, match=r"has shape \(2,\), it should have \(3,\)"):
        measure(torch.ones(2), torch.ones(3), Tolerance(1.0, 1.0, 1.0))
