"""Inputs of the ops that end an update, as :mod:`siirl_kernels.cases`: lists of tensors of any shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from siirl_kernels.cases import Generated, Level, Source

RAGGED = ((7, 13), (5,), (1, 1), (33,), (2, 3, 4))


def _layer(source: Source) -> list[tuple[int, ...]]:
    """The parameters of a decoder layer and a small head, norms and biases among them."""
    size = source.real(2048)
    return [(size,), *[(size, size)] * 4, (size,), *[(4 * size, size)] * 2, (size, 4 * size), (size,)]


def _all(source: Source, shapes: Sequence[tuple[int, ...]], scale: float = 1.0) -> list[Tensor]:
    return [source.normal(*shape, scale=scale) for shape in shapes]


def _misaligned(source: Source, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors that begin one number behind the last one's end, in one piece of memory."""
    flat, found, at = source.normal(sum(1 + torch.Size(s).numel() for s in shapes)), [], 1
    for shape in shapes:
        count = torch.Size(shape).numel()
        found.append(flat[at : at + count].view(shape))
        at += count + 1
    return found


def gradient_norm(level: Level, source: Source) -> Iterator[Generated]:
    def case(name: str, tensors: list[Tensor]) -> Generated:
        return name, {"tensors": tensors}, 1.0

    if level == "perf":
        yield case("a layer", _all(source, _layer(source)))
        return
    yield case("ragged", _all(source, RAGGED))
    yield case("one number", [source.normal(1)])
    yield case("an empty one", [source.normal(0), source.normal(3, 4)])
    yield case("strided", [source.every_other(5, 8), source.transposed(6, 7)])
    yield case("misaligned", _misaligned(source, RAGGED))
    if level == "full":
        yield case("zeros", [torch.zeros_like(source.normal(9))])
        yield case("large", _all(source, RAGGED, scale=1e4))
        yield case("small", _all(source, RAGGED, scale=1e-6 if source.dtype != torch.float16 else 1e-3))
        yield case("one outlier", [*_all(source, RAGGED), 6e4 * torch.ones_like(source.normal(1))])
        yield case("many", _all(source, [(3,)] * 200))
        yield case("100,000 numbers", [source.normal(100_000)])


def adamw_step(level: Level, source: Source) -> Iterator[Generated]:
    def case(name: str, tensors: list[Tensor], step: int = 3, decay: float = 0.1, gradient: float = 1.0) -> Generated:
        """Moments as steps with gradients of that size leave them."""
        gradients = [gradient * source.normal(*x.shape) for x in tensors]
        averages = [0.1 * gradient * source.normal(*x.shape) for x in tensors]
        squares = [gradient * gradient * (0.05 + 0.01 * source.normal(*x.shape).abs()) for x in tensors]
        if step == 1:
            averages, squares = ([torch.zeros_like(x) for x in tensors] for _ in range(2))
        numbers = {"step": step, "lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": decay}
        lists = {"parameters": tensors, "gradients": gradients, "exp_avgs": averages, "exp_avg_sqs": squares}
        return name, lists | numbers, max(1.0, gradient)

    if level == "perf":
        yield case("a layer", _all(source, _layer(source)))
        return
    yield case("ragged", _all(source, RAGGED))
    yield case("the first step, no decay", _all(source, RAGGED), step=1, decay=0.0)
    yield case("one number", [source.normal(1)])
    yield case("an empty one", [source.normal(0), source.normal(3, 4)])
    yield case("misaligned", _misaligned(source, RAGGED))
    if level == "full":
        yield case("transposed", [source.transposed(6, 7), source.normal(5)])
        yield case("strided", [source.every_other(4, 9)])
        yield case("a late step", _all(source, RAGGED), step=100_000)
        yield case("large gradients", _all(source, RAGGED), gradient=64.0)
        yield case("many", _all(source, [(3,)] * 130))


def cast_pack(level: Level, source: Source) -> Iterator[Generated]:
    def case(name: str, tensors: list[Tensor], dtype: torch.dtype = torch.bfloat16) -> Generated:
        return name, {"tensors": tensors, "dtype": dtype}, 1.0

    if level == "perf":
        yield case("a layer to bfloat16", _all(source, _layer(source)))
        yield case("a layer as it is", _all(source, _layer(source)), source.dtype)
        return
    yield case("ragged", _all(source, RAGGED))
    yield case("as it is", _all(source, RAGGED), source.dtype)
    yield case("one number", [source.normal(1)], torch.float32)
    yield case("an empty one", [source.normal(0), source.normal(3, 4)], torch.float16)
    yield case("strided", [source.every_other(5, 8), source.transposed(6, 7)])
    yield case("misaligned", _misaligned(source, RAGGED))
    if level == "full":
        yield case("many", _all(source, [(3,)] * 200))
        yield case("mixed", [source.normal(9).float(), source.normal(2, 2).bfloat16()], torch.float32)
