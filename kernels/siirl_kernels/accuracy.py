"""How near a result is to the truth, and how near it has to be.

An implementation is measured element by element and as a whole: one rounding may be as large as half a unit in the
last place, the mean of many may not, so the scale shows a reduction that is off by as little as one unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# An error in scale shows among so many elements of like size; the roundings of a few may all go one way.
SCALE_ELEMENTS = 64


@dataclass(frozen=True)
class Tolerance:
    """For each element |result - truth| <= atol + rtol |truth|, over all |<result - truth, truth>| <= scale ‖truth‖²"""

    rtol: float
    atol: float
    scale: float

    def times(self, relative: float, absolute: float) -> Tolerance:
        return Tolerance(self.rtol * relative, self.atol * absolute, self.scale)


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


def tolerances(single: tuple[float, float], half: tuple[float, float]) -> dict[str, Tolerance]:
    """Tolerances from (elements, scale) in units of the dtype's roundoff u, for float32 and for its halves.

    Halves compute inside in float32, so what they lose are the roundings of what they store: at most u each, and of
    many as many up as down. An accumulator that is off by one unit in the last place shifts all by 1 u to 2 u.
    """
    chosen = {"float32": (2**-24, single), "float16": (2**-11, half), "bfloat16": (2**-8, half)}
    return {name: Tolerance(elements * u, elements * u, scale * u) for name, (u, (elements, scale)) in chosen.items()}


# What only moves numbers or rounds them once has one right answer.
EXACT = dict.fromkeys(("float32", "float16", "bfloat16"), Tolerance(0.0, 0.0, 1.0))
