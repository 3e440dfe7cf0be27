"""What is bound at start-up has been tried: a wrong implementation makes room for the next, a right one stays."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from siirl.cli.doctor import _opened
from siirl.device import facts
from siirl_kernels import bind, implementation, kernels, providers, registry, resolved
from siirl_kernels.contracts import CONTRACTS
from siirl_kernels.selftest import bind_tested, failures
from tests import device_under_test

REFERENCE = providers("swiglu")["torch"]


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_ops", {name: dict(functions) for name, functions in registry._ops.items()})
    monkeypatch.setattr(registry, "_predicates", dict(registry._predicates))
    yield
    monkeypatch.undo()
    bind([])


def right(gate: Tensor, up: Tensor) -> Tensor:
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(gate.dtype)


def raises(gate: Tensor, up: Tensor) -> Tensor:
    raise RuntimeError("no such instruction\nsecond line")


def one_per_cent_more(gate: Tensor, up: Tensor) -> Tensor:
    return REFERENCE(gate, up) * 1.01


def half_of_a_per_cent_more_in_bfloat16(gate: Tensor, up: Tensor) -> Tensor:
    out = right(gate, up)
    return (1.006 * out.float()).to(out.dtype) if out.dtype == torch.bfloat16 else out


class _BackwardOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.01 * grad


def wrong_backward(gate: Tensor, up: Tensor) -> Tensor:
    return REFERENCE(_BackwardOff.apply(gate), up)


def another_shape(gate: Tensor, up: Tensor) -> Tensor:
    return REFERENCE(gate, up)[:-1]


def not_a_number(gate: Tensor, up: Tensor) -> Tensor:
    return REFERENCE(gate, up) * torch.nan


def in_float32(gate: Tensor, up: Tensor) -> Tensor:
    return REFERENCE(gate.float(), up.float())


WRONG: list[tuple[Callable[..., Tensor], str]] = [
    (raises, "case 'ragged 37x100' in float32 raises RuntimeError: no such instruction"),
    (one_per_cent_more, "case 'ragged 37x100' in float32: forward result 0 is off by "),
    (half_of_a_per_cent_more_in_bfloat16, "case 'ragged 37x100' in bfloat16: forward result 0 is off by "),
    (wrong_backward, "case 'ragged 37x100' in float32: backward result 0 is off by "),
    (another_shape, "raises ValueError: the result has shape (36, 100), it should have (37, 100)"),
    (not_a_number, "forward result 0 is off by nan"),
    (in_float32, "case 'ragged 37x100' in bfloat16: forward result 0 is torch.float32, the op is defined in"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=[row[0].__name__ for row in WRONG])
def test_a_wrong_implementation_makes_room_for_the_next(
    wrong: Callable[..., Tensor], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    implementation("swiglu", "fast")(wrong)
    implementation("swiglu", "sound")(right)
    with caplog.at_level(logging.WARNING, "siirl_kernels"):
        assert bind_tested(["fast", "sound", "torch"])["swiglu"] == "sound"
    assert kernels.swiglu is right
    (warning,) = caplog.messages
    assert warning.startswith("the kernel op 'swiglu' is not computed by 'fast', which fails its self-test: ")
    assert says in warning and "\n" not in warning
    assert list(failures()) == [("swiglu", "fast")] and says in failures()["swiglu", "fast"]


def test_at_last_the_reference_is_bound() -> None:
    implementation("swiglu", "fast")(raises)
    implementation("swiglu", "faster")(one_per_cent_more)
    assert bind_tested(["faster", "fast"])["swiglu"] == "torch"
    assert kernels.swiglu is REFERENCE
    assert set(failures()) == {("swiglu", "fast"), ("swiglu", "faster")}


def test_right_ones_stay_and_what_was_wrong_before_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    implementation("swiglu", "fast")(raises)
    bind_tested(["fast"])
    implementation("swiglu", "fast")(right)
    caplog.clear()
    assert bind_tested(["fast"])["swiglu"] == "fast"
    assert not failures() and not caplog.messages


def test_a_pinned_one_that_fails_is_an_error() -> None:
    implementation("swiglu", "fast")(one_per_cent_more)
    says = r"^the provider 'fast' of the kernel op 'swiglu' fails its self-test: case .*: forward result 0 is off by "
    with pytest.raises(ValueError, match=says):
        bind_tested([], {"swiglu": "fast"})
    assert resolved()["swiglu"] == "torch"


def test_it_is_not_tried_on_what_it_does_not_take() -> None:
    implementation("swiglu", "fast", supports=lambda gate, up: gate.shape[-1] % 48 == 0)(right)
    assert bind_tested(["fast"])["swiglu"] == "fast"
    implementation("swiglu", "fast", supports=lambda gate, up: gate.shape[-1] % 48 == 0)(raises)
    bind_tested(["fast"])
    assert "case 'halves of one'" in failures()["swiglu", "fast"]
    implementation("swiglu", "fast", supports=lambda gate, up: False)(raises)
    assert bind_tested(["fast"])["swiglu"] == "fast"


def test_each_of_several_that_are_asked_is_tried() -> None:
    implementation("swiglu", "first", supports=lambda gate, up: len(gate) > 1)(right)
    implementation("swiglu", "second", supports=lambda gate, up: len(gate) > 0)(one_per_cent_more)
    implementation("swiglu", "third")(right)
    assert bind_tested(["first", "second", "third"])["swiglu"] == "first > third"
    assert list(failures()) == [("swiglu", "second")]


def test_a_wrong_op_does_not_spoil_the_truth_of_those_made_of_it() -> None:
    """The reference of a layer calls the ops as they are bound: a wrong norm must not make a right layer look wrong."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return 1.01 * providers("rms_norm")["torch"](x, weight, eps)

    implementation("rms_norm", "fast")(norm)
    bind(["fast"])  # as it is when a table is bound a second time
    implementation("inference_layer", "fast")(providers("inference_layer")["torch"])
    chosen = bind_tested(["fast"])
    assert chosen["rms_norm"] == "torch" and chosen["inference_layer"] == "fast"


def test_the_back_ends_own_pass_in_no_time() -> None:
    backend = device_under_test.backend()
    order, device = backend.kernel_order(), backend.device()
    bind_tested(order, device=device)  # what the process loads with its first call is not counted
    assert not failures()
    started = time.thread_time()
    chosen = bind_tested(order, device=device)
    assert time.thread_time() - started < 0.3 or device.type != "cpu"
    assert chosen == bind(order)


def test_an_op_that_writes_is_tried_on_a_copy() -> None:
    called: list[list[Tensor]] = []

    def step(parameters: Any, gradients: Any, exp_avgs: Any, exp_avg_sqs: Any, step: int, lr: float, beta1: float,
             beta2: float, eps: float, weight_decay: float) -> None:  # fmt: skip
        called.append(parameters)
        rate = 1.01 * lr
        providers("adamw_step")["torch"](
            parameters, gradients, exp_avgs, exp_avg_sqs, step, rate, beta1, beta2, eps, weight_decay
        )

    implementation("adamw_step", "fast")(step)
    assert bind_tested(["fast"])["adamw_step"] == "torch" and called
    assert "is off by" in failures()["adamw_step", "fast"]


@pytest.mark.parametrize("op", CONTRACTS)
def test_every_op_has_a_first_case_that_shows_a_hundredth(op: str) -> None:
    """Results that are one per cent too large are noticed whatever the op, but for tokens and bits that have none."""
    reference = providers(op)["torch"]

    def more(*args: Any, **kwargs: Any) -> Any:
        out = reference(*args, **kwargs)
        if CONTRACTS[op].in_place:
            for x in next(iter(kwargs.values())):
                x.mul_(1.01)
            return None
        outs = out if isinstance(out, tuple) else (out,)
        outs = tuple(1.01 * x if x.is_floating_point() else x for x in outs)
        return outs if isinstance(out, tuple) else outs[0]

    registry._ops[op]["fast"] = more
    bind_tested(["fast"])
    assert "is off by" in failures()[op, "fast"]


def test_doctor_says_what_is_left_out_and_why() -> None:
    device_under_test.backend()  # brings the host's kernels, whose place this one takes
    implementation("swiglu", "native")(raises)
    opened = facts.tell("cpu")
    assert opened["kernels"]["swiglu"] == "torch" and list(opened["kernels_failed"]) == ["swiglu by native"]
    rows = dict(_opened({"back_end": "", "versions": {}, "devices": [], "notes": [], "opened": opened}))
    assert rows["no swiglu by native"].startswith("fails its self-test: case 'ragged 37x100' in float32 raises Runtime")
