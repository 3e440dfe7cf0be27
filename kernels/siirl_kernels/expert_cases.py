"""Inputs of the ops of a mixture of experts, as :mod:`siirl_kernels.cases`.

Shapes: T tokens, H hidden, K experts of a token, E experts, R = T · K rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from siirl_kernels.cases import Generated, Level, Source


def permute_tokens(level: Level, source: Source) -> Iterator[Generated]:
    for name, x, places, _, size in _dealt(level, source, rows=False):
        yield name, {"x_TH": x, "places_TK": places}, size


def unpermute_tokens(level: Level, source: Source) -> Iterator[Generated]:
    for name, x, places, weights, size in _dealt(level, source, rows=True):
        yield name, {"x_RH": x, "places_TK": places, "weights_TK": weights}, size


def _dealt(level: Level, source: Source, rows: bool) -> Iterator[tuple[str, Tensor, Tensor, Tensor, float]]:
    """Name, tokens or with ``rows`` their copies, places, weights, size."""

    def case(
        name: str, tokens: int, each: int, width: int, strided: bool = False, scale: float = 1.0
    ) -> tuple[str, Tensor, Tensor, Tensor, float]:
        count = tokens * each
        shape = count if rows else tokens, width
        x = source.every_other(*shape) if strided else source.normal(*shape, scale=scale)
        places = source.permutation(count).view(tokens, each).to(source.device)
        weights = source.normal(tokens, each).float().softmax(-1).to(source.dtype)
        return name, x, places, weights, scale

    if level == "perf":
        tokens = source.real(2048)
        yield case(f"{tokens}x1024 to 8", tokens, 8, 1024)
        return
    yield case("ragged 37x24 to 3", 37, 3, 24)
    yield case("one token to one", 1, 1, 129)
    yield case("no token", 0, 2, 64)
    yield case("strided", 19, 2, 48, strided=True)
    if level == "full":
        yield case("64 tokens to 8", 64, 8, 100)
        yield case("to one", 33, 1, 65)
        yield case("large", 17, 4, 96, scale=1e2)
        yield case("wide", 3, 2, 4099)


def grouped_linear(level: Level, source: Source) -> Iterator[Generated]:
    def case(
        name: str, counts: Sequence[int], inputs: int, outputs: int, strided: bool = False, size: float = 1.0
    ) -> Generated:
        """``counts``: rows of each expert."""
        shape = sum(counts), inputs
        x = source.every_other(*shape) if strided else source.normal(*shape, scale=size)
        offsets = torch.tensor([0, *counts]).cumsum(0).to(source.device)
        weight = source.normal(len(counts), outputs, inputs, scale=inputs**-0.5)
        return name, {"x_RH": x, "offsets": offsets, "weight_EOH": weight}, size

    if level == "perf":
        each = source.real(256)
        yield case(f"32 experts of about {each}, 512 to 384", [each // 2, each, each + each // 2, each] * 8, 512, 384)
        yield case("32 experts of 0 to 3, 512 to 384", [0, 1, 2, 3] * 8, 512, 384)
        return
    yield case("ragged, two without rows", [5, 0, 19, 1, 0, 12], 24, 101)
    yield case("one row", [0, 1, 0], 129, 65)
    yield case("no row", [0, 0, 0], 16, 8)
    yield case("strided", [7, 3, 11], 40, 64, strided=True)
    if level == "full":
        yield case("one expert has all", [0, 0, 301, 0], 64, 130)
        yield case("one expert", [17], 96, 48)
        yield case("64 experts", [n % 5 for n in range(64)], 32, 40)
        yield case("large", [9, 8], 96, 40, size=1e2)
        yield case("wide", [2, 1], 2049, 31)
