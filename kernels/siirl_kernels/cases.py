"""Inputs of the ops for tests and benchmarks: ragged, empty, one row, strided, extreme, and as large as real ones.

Numbers are drawn on the host, so that every device is asked the same. H, V and D that are no multiple of a block are
there on purpose. Shapes: T packed tokens, H hidden, N query heads, K key/value heads, D head size, V vocabulary,
B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from siirl_kernels.packing import PackedSequences

Level = Literal["smoke", "full", "perf"]
Generated = tuple[str, dict[str, Any], float]
"""A case's name, its arguments, and the size of what the op adds up in it."""


@dataclass
class Source:
    """Draws tensors of one dtype onto one device."""

    dtype: torch.dtype
    device: torch.device
    seed: int
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator) * scale + mean
        return drawn.to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self._generator).to(self.device)

    def permutation(self, count: int) -> Tensor:
        """0 … count-1 in some order, on the host."""
        return torch.randperm(count, generator=self._generator)

    def midpoints(self, logits: Tensor) -> Tensor:
        """Float32 numbers, each in the middle of a token's share of softmax(logits), where rounding moves none."""
        p = logits.cpu().double().softmax(-1)
        if not len(p):
            return torch.empty(0, device=self.device)
        likely = torch.where(p >= 0.5 * p.max(-1, keepdim=True).values, 1.0, 0.0)
        token = torch.multinomial(likely, 1, generator=self._generator)
        return (p.cumsum(-1) - p / 2).gather(1, token).squeeze(1).float().to(self.device)

    def every_other(self, *shape: int) -> Tensor:
        """Normal numbers with a gap behind each in memory."""
        return self.normal(*shape[:-1], 2 * shape[-1])[..., ::2]

    def real(self, count: int) -> int:
        """``count``, as many as in real work; on a host, where 60 calls of that would take minutes, a quarter."""
        return count // 4 if self.device.type == "cpu" else count

    def transposed(self, *shape: int) -> Tensor:
        """Normal numbers whose first two dimensions lie in memory the other way round."""
        return self.normal(shape[1], shape[0], *shape[2:]).transpose(0, 1)


Generate = Callable[[Level, Source], Iterator[Generated]]


def rms_norm(level: Level, source: Source) -> Iterator[Generated]:
    def case(name: str, x: Tensor, eps: float = 1e-6) -> Generated:
        return name, {"x": x, "weight": source.normal(x.shape[-1], scale=0.2, mean=1.0), "eps": eps}, 1.0

    if level == "perf":
        tokens = source.real(2048)
        yield case(f"{tokens}x1024", source.normal(tokens, 1024))
        yield case(f"{tokens}x16x64", source.normal(tokens, 16, 64))
        return
    yield case("ragged 37x100", source.normal(37, 100))
    yield case("heads 5x3x24", source.normal(5, 3, 24))
    yield case("one row", source.normal(1, 129))
    yield case("empty", source.normal(0, 64))
    yield case("strided", source.every_other(19, 48))
    yield case("zeros", torch.zeros_like(source.normal(3, 40)))
    if level == "full":
        yield case("wide 7x4099", source.normal(7, 4099))
        yield case("size 1", source.normal(33, 1, scale=0.2, mean=2.0))
        yield case("transposed", source.transposed(31, 65))
        yield case("large", source.normal(17, 96, scale=2e3))
        yield case("small beside eps", source.normal(17, 96, scale=1e-4))
        yield case("one outlier", source.normal(9, 256).index_fill(1, torch.tensor([77], device=source.device), 6e4))
        yield case("heads of no token", source.normal(0, 4, 64))


def rope(level: Level, source: Source) -> Iterator[Generated]:
    def case(name: str, x: Tensor, positions: Sequence[int] | None = None, size: float = 1.0) -> Generated:
        tokens, width = x.shape[0], x.shape[-1]
        at = torch.tensor(list(range(tokens)) if positions is None else positions, dtype=torch.float64)
        angles = torch.outer(at, 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)).repeat(1, 2)
        cos, sin = (part.to(source.device, source.dtype) for part in (angles.cos(), angles.sin()))
        return name, {"x_TND": x, "cos_TD": cos, "sin_TD": sin}, size

    if level == "perf":
        tokens = source.real(2048)
        yield case(f"{tokens}x16x64", source.normal(tokens, 16, 64))
        return
    yield case("ragged 37x3x24", source.normal(37, 3, 24))
    yield case("one token", source.normal(1, 4, 64))
    yield case("empty", source.normal(0, 4, 64))
    yield case("strided", source.every_other(13, 2, 32))
    if level == "full":
        yield case("transposed", source.transposed(29, 5, 16))
        yield case("size 2", source.normal(11, 1, 2))
        yield case("long positions", source.normal(7, 2, 128), [0, 1, 32_767, 65_535, 131_071, 3, 2])
        yield case("large", source.normal(17, 3, 40, scale=1e3), size=1e3)
        yield case("many heads", source.normal(3, 71, 80))


def swiglu(level: Level, source: Source) -> Iterator[Generated]:
    def case(name: str, gate: Tensor, up: Tensor) -> Generated:
        return name, {"gate": gate, "up": up}, 1.0

    if level == "perf":
        tokens = source.real(2048)
        yield case(f"{tokens}x3072", source.normal(tokens, 3072), source.normal(tokens, 3072))
        return
    yield case("ragged 37x100", source.normal(37, 100), source.normal(37, 100))
    yield case("one row", source.normal(1, 129), source.normal(1, 129))
    yield case("empty", source.normal(0, 64), source.normal(0, 64))
    both = source.normal(19, 96)
    yield case("halves of one", both[:, :48], both[:, 48:])
    if level == "full":
        yield case("strided", source.every_other(23, 33), source.transposed(23, 33))
        yield case("saturated", source.normal(17, 64, scale=60.0), source.normal(17, 64))
        yield case("small", source.normal(17, 64, scale=1e-3), source.normal(17, 64))
        yield case("three dimensions", source.normal(3, 5, 70), source.normal(3, 5, 70))
        yield case("wide 5x8191", source.normal(5, 8191), source.normal(5, 8191))


def packed_attention(level: Level, source: Source) -> Iterator[Generated]:
    def inputs(tokens: int, heads: int, keys: int, size: int) -> list[Tensor]:
        return [source.normal(tokens, n, size) for n in (heads, keys, keys)]

    def case(
        name: str,
        tensors: Sequence[Tensor],
        lengths: tuple[int, ...],
        parents: tuple[int, ...] = (),
        prefixes: tuple[int, ...] = (),
        size: float = 1.0,
    ) -> Generated:
        sequences = PackedSequences(lengths, source.device, parents, prefixes)
        return name, dict(zip(("q_TND", "k_TKD", "v_TKD"), tensors, strict=True)) | {"sequences": sequences}, size

    if level == "perf":
        length = source.real(256)
        yield case(f"8 of {length}", inputs(8 * length, 16, 8, 64), (length,) * 8)
        lengths = tuple(source.real(n) for n in (700, 500, 301, 203, 150, 100, 64, 30))
        yield case("8 ragged", inputs(sum(lengths), 16, 8, 64), lengths)
        own, prefixes = (length + length // 2, *(length // 2,) * 7), (0, *(length,) * 7)
        yield case("8 of one prompt", inputs(5 * length, 16, 8, 64), own, (0,) * 8, prefixes)
        return
    ragged = (1, 37, 2, 9, 1)
    yield case("ragged, grouped heads", inputs(50, 4, 2, 24), ragged)
    yield case("equal lengths", inputs(12, 2, 2, 16), (4, 4, 4))
    yield case("one token", inputs(1, 2, 1, 32), (1,))
    shared = (5, 2, 4), (0, 0, 0), (0, 3, 3)
    yield case("shared prefix", inputs(11, 4, 2, 16), *shared)
    yield case("an empty row shares all", inputs(14, 2, 1, 16), (4, 0, 3, 6, 1), (0, 0, 2, 2, 2), (0, 4, 0, 2, 2))
    yield case("strided", [source.every_other(50, n, 16) for n in (4, 2, 2)], ragged)
    if level == "full":
        yield case("several parents", inputs(17, 3, 1, 40), (3, 9, 1, 2, 2), (0, 1, 0, 1, 1), (0, 0, 3, 8, 1))
        yield case("blocks and one more", inputs(130, 4, 4, 64), (65, 33, 32))
        yield case("one long", inputs(257, 2, 1, 80), (257,))
        yield case("transposed", [source.transposed(50, n, 16) for n in (4, 4, 4)], ragged)
        q, k, v = inputs(50, 2, 1, 32)
        yield case("sharp", [8 * q, k, v], ragged, size=8.0)
        yield case("every key alike", [q, torch.zeros_like(k), v], ragged)
        yield case("large values", [q, k, 100 * v], ragged, size=100.0)
        yield case("many short", inputs(70, 2, 2, 16), (1, 2, 3, 4) * 7)


def linear_log_prob(level: Level, source: Source) -> Iterator[Generated]:
    def case(
        name: str, hidden: Tensor, vocabulary: int, temperature: float = 1.0, scale: float = 1.0, size: float = 1.0
    ) -> Generated:
        weight = source.normal(vocabulary, hidden.shape[1], scale=scale * hidden.shape[1] ** -0.5)
        target = source.integers(vocabulary, hidden.shape[0])
        arguments = {"hidden_TH": hidden, "weight_VH": weight, "target_T": target, "temperature": temperature}
        return name, arguments, size

    if level == "perf":
        tokens, size, words = (source.real(n) for n in (512, 1024, 16_384))
        yield case(f"{tokens}x{size}, {words} words", source.normal(tokens, size), words)
        return
    yield case("ragged 37x24, 101 words", source.normal(37, 24), 101)
    yield case("temperature 0.7", source.normal(19, 32), 257, 0.7)
    yield case("one token", source.normal(1, 48), 130)
    yield case("no token", source.normal(0, 16), 64)
    yield case("strided", source.every_other(21, 40), 65, 1.3)
    if level == "full":
        yield case("4099 words", source.normal(23, 64), 4099)
        yield case("two words", source.normal(65, 8), 2)
        yield case("one word", source.normal(5, 8), 1)
        yield case("transposed", source.transposed(33, 129), 127)
        yield case("sharp", source.normal(29, 32), 251, 0.25, size=4.0)
        yield case("nearly certain", source.normal(29, 32), 251, scale=4.0, size=4.0)
        yield case("flat", source.normal(29, 32, scale=1e-3), 251)
        yield case("hot", source.normal(29, 32), 251, 10.0)
        yield case("301 tokens", source.normal(301, 40), 333, 0.9)
