"""What every implementation of an op promises: over which inputs, to which accuracy, and how repeatably.

The truth of a case is the reference computed in float64 on the host from the very same, already rounded inputs. An
implementation is measured against it element by element and as a whole: one rounding may be as large as half a unit in
the last place, the mean of many may not, so the scale shows a reduction that is off by as little as one unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from siirl_kernels import cases, expert_cases, inference_cases
from siirl_kernels.cases import Generate, Level, Source
from siirl_kernels.packing import PackedSequences
from siirl_kernels.paging import PagedSequences
from siirl_kernels.registry import supported
from siirl_kernels.weights import LayerWeights, LinearWeights

# An error in scale shows among so many elements of like size; the roundings of a few may all go one way.
SCALE_ELEMENTS = 64
# The provider all of whose implementations keep a row's bits.
INVARIANT = "invariant"


@dataclass(frozen=True)
class Tolerance:
    """For each element |result - truth| <= atol + rtol |truth|, over all |<result - truth, truth>| <= scale ‖truth‖²"""

    rtol: float
    atol: float
    scale: float

    def times(self, relative: float, absolute: float) -> Tolerance:
        return Tolerance(self.rtol * relative, self.atol * absolute, self.scale)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        name: unique within the op and level.
        arguments: keyword arguments of the op, tensors on the device.
        size: of the numbers that the op adds up, where they are not of the order of 1: rounding errors are as much
            larger, so the absolute part of the tolerance is.
    """

    name: str
    arguments: dict[str, Any]
    size: float = 1.0

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Case:
        """The same call elsewhere, floating tensors cast to ``dtype``."""
        return replace(self, arguments={name: _moved(x, device, dtype) for name, x in self.arguments.items()})


@dataclass(frozen=True)
class Contract:
    """The contract of one op.

    Attributes:
        op: its name in the registry.
        differentiable: arguments that gradients reach.
        tolerances: of the forward pass, by the dtype of the inputs.
        backward_scale: factor for the elements of gradients.
        deterministic: the same call gives the same bits, gradients included, in the back end's deterministic mode.
        batch_invariant: of every provider, a row comes out the same, bit for bit, whatever rows are beside it.
        rows: arguments whose first dimension is the rows; empty where the op has no rows to take apart.
        writes: arguments that the op changes.
        returns: the dtype of each result; None, and where nothing is said, that of the inputs.
    """

    op: str
    generate: Generate
    tolerances: Mapping[str, Tolerance]
    differentiable: tuple[str, ...] = ()
    backward_scale: float = 1.0
    deterministic: bool = True
    batch_invariant: bool = False
    rows: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    returns: tuple[torch.dtype | None, ...] = (None,)

    def cases(self, level: Level, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Iterator[Case]:
        """The calls an implementation is judged by; the same numbers on every device, up to the rounding to ``dtype``.

        ``smoke`` is small and quick, ``full`` covers every shape class, ``perf`` are the
        sizes of real models, smaller on a host.
        """
        source = Source(dtype, torch.device(device), seed)
        for name, arguments, size in self.generate(level, source):
            yield Case(name, arguments, size)

    def invariant(self, provider: str) -> bool:
        """Whether the provider's implementation promises that a row comes out the same whatever rows are beside it."""
        return bool(self.rows) and (self.batch_invariant or provider == INVARIANT)

    def leaves(self, case: Case) -> dict[str, Tensor]:
        """The case's arguments that gradients reach; an optional one may be absent."""
        return {name: case.arguments[name] for name in self.differentiable if case.arguments[name] is not None}

    def dtype(self, number: int, direction: Literal["forward", "backward"], inputs: torch.dtype) -> torch.dtype:
        """The dtype of a result, or of a gradient, for inputs of dtype ``inputs``."""
        return (self.returns[number] if direction == "forward" else None) or inputs

    def tolerance(self, dtype: torch.dtype, case: Case, direction: Literal["forward", "backward"]) -> Tolerance:
        """What may be lost in a case."""
        factor = self.backward_scale if direction == "backward" else 1.0
        return self.tolerances[str(dtype).removeprefix("torch.")].times(factor, factor * case.size)


def taken(
    op: str, provider: str, level: Level, dtype: torch.dtype, device: torch.device | str
) -> Iterator[tuple[Case, bool]]:
    """The cases that an implementation says it takes, and whether it does only in inference mode."""
    for case in CONTRACTS[op].cases(level, dtype, device):
        for inference in (False, True):
            with torch.inference_mode(inference):
                accepted = supported(op, provider, case.arguments)
            if accepted:
                yield case, inference
                break


@dataclass(frozen=True)
class Error:
    """How far a result is from the truth.

    Attributes:
        max_abs: largest difference of an element.
        scale: by which share the result as a whole is too large: <result - truth, truth> / <truth, truth>.
        element_share: the largest part of its tolerance that an element uses up.
        scale_share: the part of its tolerance that the scale uses up; 0 where there are too few elements to say.
    """

    max_abs: float = 0.0
    scale: float = 0.0
    element_share: float = 0.0
    scale_share: float = 0.0

    @property
    def tolerated(self) -> bool:
        return self.element_share <= 1.0 and self.scale_share <= 1.0  # false for NaN


def measure(result: Tensor, truth: Tensor, tolerance: Tolerance) -> Error:
    """Compare a result, on any device, with the truth of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != truth.shape:
        raise ValueError(f"the result has shape {tuple(result.shape)}, it should have {tuple(truth.shape)}")
    expected = truth.detach().to("cpu", torch.float64)
    difference = result.detach().to("cpu").double() - expected
    if not difference.any():  # NaN counts as true
        return Error()
    share = difference.abs() / (tolerance.atol + tolerance.rtol * expected.abs())
    square = float(expected.square().sum())
    scale = float((difference * expected).sum()) / square if square else 0.0
    # as many elements of equal size would have the same ratio of these sums
    enough = square**2 >= SCALE_ELEMENTS * float(expected.pow(4).sum()) > 0
    return Error(
        float(difference.abs().max()), scale, float(share.max()), abs(scale) / tolerance.scale if enough else 0.0
    )


def _moved(x: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(x, PackedSequences):
        return replace(x, device=device)
    if isinstance(x, PagedSequences):
        return x.to(device)
    if isinstance(x, LinearWeights | LayerWeights):
        return x.to(device, dtype)
    if isinstance(x, Tensor):
        return x.to(device, dtype if x.is_floating_point() else None)
    return x


def _tolerances(single: tuple[float, float], half: tuple[float, float]) -> dict[str, Tolerance]:
    """Tolerances from (elements, scale) in units of the dtype's roundoff u, for float32 and for its halves.

    Halves compute inside in float32, so what they lose are the roundings of what they store: at most u each, and of
    many as many up as down. An accumulator that is off by one unit in the last place shifts all by 1 u to 2 u.
    """
    chosen = {"float32": (2**-24, single), "float16": (2**-11, half), "bfloat16": (2**-8, half)}
    return {name: Tolerance(elements * u, elements * u, scale * u) for name, (u, (elements, scale)) in chosen.items()}


CONTRACTS: dict[str, Contract] = {
    contract.op: contract
    for contract in (
        Contract(
            op="rms_norm",
            differentiable=("x", "weight"),
            tolerances=_tolerances(single=(8, 4), half=(3, 0.5)),
            backward_scale=6,
            rows=("x",),
            generate=cases.rms_norm,
        ),
        Contract(
            op="rope",
            differentiable=("x_TND",),
            tolerances=_tolerances(single=(4, 1), half=(3, 0.5)),
            backward_scale=1,
            batch_invariant=True,
            rows=("x_TND", "cos_TD", "sin_TD"),
            generate=cases.rope,
        ),
        Contract(
            op="swiglu",
            differentiable=("gate", "up"),
            tolerances=_tolerances(single=(16, 4), half=(3, 0.5)),
            backward_scale=2,
            rows=("gate", "up"),
            generate=cases.swiglu,
        ),
        Contract(
            op="packed_attention",
            differentiable=("q_TND", "k_TKD", "v_TKD"),
            tolerances=_tolerances(single=(48, 32), half=(4, 1)),
            backward_scale=4,
            generate=cases.packed_attention,
        ),
        Contract(
            op="linear_log_prob",
            differentiable=("hidden_TH", "weight_VH"),
            tolerances=_tolerances(single=(32, 8), half=(4, 2)),
            backward_scale=6,
            rows=("hidden_TH", "target_T"),
            returns=(torch.float32, torch.float32),
            generate=cases.linear_log_prob,
        ),
        Contract(
            op="paged_attention",
            tolerances=_tolerances(single=(48, 32), half=(4, 2)),
            writes=("keys_PSKD", "values_PSKD"),
            generate=inference_cases.paged_attention,
        ),
        Contract(
            op="linear",
            differentiable=("x_TH", "weight_OH", "bias"),
            tolerances=_tolerances(single=(32, 8), half=(3, 0.5)),
            backward_scale=6,
            rows=("x_TH",),
            generate=inference_cases.linear,
        ),
        Contract(
            op="inference_linear",
            tolerances=_tolerances(single=(32, 8), half=(3, 0.5)),
            rows=("x_TH",),
            generate=inference_cases.inference_linear,
        ),
        Contract(
            op="inference_layer",
            # eleven ops behind each other, of which each takes up the rounding of those before
            tolerances=_tolerances(single=(256, 64), half=(16, 4)),
            writes=("keys_PSKD", "values_PSKD"),
            generate=inference_cases.inference_layer,
        ),
        Contract(
            op="categorical",
            tolerances=dict.fromkeys(("float32", "float16", "bfloat16"), Tolerance(16 * 2**-24, 16 * 2**-24, 2**-20)),
            rows=("logits_BV", "uniform_B"),
            returns=(torch.int64, torch.float32),
            generate=inference_cases.categorical,
        ),
        Contract(
            op="token_log_prob",
            tolerances=dict.fromkeys(("float32", "float16", "bfloat16"), Tolerance(16 * 2**-24, 16 * 2**-24, 2**-20)),
            rows=("logits_BV", "tokens_B"),
            returns=(torch.float32,),
            generate=inference_cases.token_log_prob,
        ),
        Contract(
            op="permute_tokens",
            differentiable=("x_TH",),
            tolerances=_tolerances(single=(4, 1), half=(3, 0.5)),
            backward_scale=2,
            generate=expert_cases.permute_tokens,
        ),
        Contract(
            op="unpermute_tokens",
            differentiable=("x_RH", "weights_TK"),
            tolerances=_tolerances(single=(16, 4), half=(3, 0.5)),
            backward_scale=6,
            generate=expert_cases.unpermute_tokens,
        ),
        Contract(
            op="grouped_linear",
            differentiable=("x_RH", "weight_EOH"),
            tolerances=_tolerances(single=(32, 8), half=(3, 0.5)),
            backward_scale=6,
            generate=expert_cases.grouped_linear,
        ),
    )
}
