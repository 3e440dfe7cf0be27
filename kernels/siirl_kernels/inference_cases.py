"""Inputs of the ops that generation consists of, as :mod:`siirl_kernels.cases`, and of the linear layers.

Shapes: T tokens, N query heads, K key/value heads, D head size, B sequences, L cache length, P blocks of a paged cache,
S slots of a block, H hidden, O outputs, V words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from siirl_kernels.cases import Generated, Level, Source
from siirl_kernels.paging import PagedSequences
from siirl_kernels.weights import LayerWeights, LinearWeights


def paged_attention(level: Level, source: Source) -> Iterator[Generated]:
    def case(
        name: str,
        heads: tuple[int, int, int],
        lengths: Sequence[int],
        counts: Sequence[int],
        slots: int = 16,
        sharpness: float = 1.0,
        strided: bool = False,
    ) -> Generated:
        """Blocks dealt out in no order; unwritten slots hold NaN. ``heads``: query heads, key heads, their size."""
        queries, keys, size = heads
        draw = source.every_other if strided else source.normal
        q, k, v = (draw(sum(counts), n, size) for n in (queries, keys, keys))
        tables, caches = _cache(source, lengths, slots, keys, size)
        tensors = dict(zip(("q_TND", "k_TKD", "v_TKD"), (sharpness * q, k, v), strict=True))
        sequences = PagedSequences.of(tables, lengths, counts, slots, source.device)
        return name, {**tensors, **caches, "sequences": sequences}, sharpness

    if level == "perf":
        length = source.real(512)
        lengths = list(range(length // 32, length + 1, length // 32))
        yield case(f"32 rows of {length}", (16, 8, 64), lengths, [1] * 32)
        yield case(f"a prompt of {length} behind {length}", (16, 8, 64), [2 * length], [length])
        return
    yield case("ragged, grouped heads", (4, 2, 24), [1, 37, 2, 9, 40], [1] * 5)
    yield case("one row of one token", (2, 1, 32), [1], [1])
    yield case("no row", (2, 1, 32), [], [])
    yield case("prompts", (4, 2, 16), [5, 17, 1], [5, 17, 1])
    yield case("chunks, drafts and single tokens", (6, 2, 64), [40, 19, 33, 3], [7, 4, 1, 3], slots=8)
    yield case("strided", (4, 2, 16), [5, 30], [2, 30], strided=True)
    if level == "full":
        yield case("equal heads", (3, 3, 40), [33, 32, 1, 17], [1] * 4)
        yield case("one long", (8, 2, 64), [1025], [1])
        yield case("sharp", (4, 1, 16), [65, 64, 2, 33], [1, 3, 2, 1], sharpness=8.0)
        yield case("blocks of one slot", (2, 2, 16), [7, 3], [2, 1], slots=1)
        yield case("a block of all", (9, 3, 64), [70, 100], [1, 5], slots=128)
        yield case("a long chunk", (9, 3, 64), [300], [277])
        yield case("wide heads", (4, 2, 128), [90, 20, 77], [1, 20, 33])


def _cache(
    source: Source, lengths: Sequence[int], slots: int, keys: int, size: int
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Blocks of each sequence, dealt out in no order, and the caches; what no sequence has holds NaN."""
    needed = [-(-length // slots) for length in lengths]
    blocks = source.permutation(sum(needed) + 2).tolist()
    tables = [[blocks.pop() for _ in range(n)] for n in needed]
    cached = PagedSequences.of(tables, lengths, lengths, slots, source.device).slots
    caches = {}
    for name in ("keys_PSKD", "values_PSKD"):
        flat = torch.full_like(source.normal((sum(needed) + 2) * slots, keys, size), torch.nan)
        flat[cached] = source.normal(len(cached), keys, size)
        caches[name] = flat.view(-1, slots, keys, size)
    return tables, caches


def linear(level: Level, source: Source) -> Iterator[Generated]:
    def case(name: str, x: Tensor, outputs: int, bias: bool = False, size: float = 1.0) -> Generated:
        weight = source.normal(outputs, x.shape[1], scale=x.shape[1] ** -0.5)
        return name, {"x_TH": x, "weight_OH": weight, "bias": source.normal(outputs) if bias else None}, size

    if level == "perf":
        for rows in (1, 16, 64):
            yield case(f"{rows}x1024 to 3072", source.normal(rows, 1024), 3072)
        return
    yield case("ragged 37x24 to 101", source.normal(37, 24), 101)
    yield case("with a bias", source.normal(19, 40), 33, bias=True)
    yield case("one row", source.normal(1, 129), 65)
    yield case("no row", source.normal(0, 16), 8)
    yield case("5 rows of 576", source.normal(5, 576), 192)
    yield case("strided", source.every_other(21, 40), 64)
    if level == "full":
        yield case("transposed", source.transposed(33, 129), 127)
        yield case("one row, a bias", source.normal(1, 64), 192, bias=True)
        yield case("64 rows", source.normal(64, 96), 48)
        yield case("one output", source.normal(5, 64), 1)
        yield case("wide", source.normal(3, 2049), 31)
        yield case("large", source.normal(17, 96, scale=1e2), 40, size=1e2)
        yield case("301 rows", source.normal(301, 64), 130, bias=True)


def inference_linear(level: Level, source: Source) -> Iterator[Generated]:
    for name, arguments, size in linear(level, source):
        weights = LinearWeights(arguments["weight_OH"], arguments["bias"])
        yield name, {"x_TH": arguments["x_TH"], "weights": weights}, size


def inference_layer(level: Level, source: Source) -> Iterator[Generated]:
    def case(
        name: str,
        hidden: int,
        heads: tuple[int, int, int],
        intermediate: int,
        lengths: Sequence[int],
        counts: Sequence[int],
        bias: bool = False,
        head_norms: bool = False,
        strided: bool = False,
    ) -> Generated:
        """``heads``: query heads, key heads, their size."""
        queries, keys, size = heads

        def linear(inputs: int, outputs: int, bias: bool = False) -> LinearWeights:
            weight = source.normal(outputs, inputs, scale=inputs**-0.5)
            return LinearWeights(weight, source.normal(outputs) if bias else None)

        def norm(width: int) -> Tensor:
            return source.normal(width, scale=0.1, mean=1.0)

        weights = LayerWeights(
            input_norm=norm(hidden),
            q=linear(hidden, queries * size, bias),
            k=linear(hidden, keys * size, bias),
            v=linear(hidden, keys * size, bias),
            q_norm=norm(size) if head_norms else None,
            k_norm=norm(size) if head_norms else None,
            o=linear(queries * size, hidden),
            post_norm=norm(hidden),
            gate=linear(hidden, intermediate),
            up=linear(hidden, intermediate),
            down=linear(intermediate, hidden),
            eps=1e-6,
        )
        angles = source.normal(sum(counts), size // 2).repeat(1, 2)
        tables, caches = _cache(source, lengths, 16, keys, size)
        x = (source.every_other if strided else source.normal)(sum(counts), hidden)
        tensors = {"x_TH": x, "cos_TD": angles.cos(), "sin_TD": angles.sin()}
        sequences = PagedSequences.of(tables, lengths, counts, 16, source.device)
        return name, {**tensors, "weights": weights, **caches, "sequences": sequences}, 1.0

    if level == "perf":
        yield case("16 rows of 256", 512, (8, 4, 64), 1536, [256] * 16, [1] * 16)
        yield case("64 rows of 256", 512, (8, 4, 64), 1536, [256] * 64, [1] * 64)
        return
    yield case("one token each", 64, (4, 2, 16), 96, [1, 37, 2, 9, 40], [1] * 5)
    yield case("biases, prompts", 96, (3, 1, 32), 64, [5, 17, 1], [5, 17, 1], bias=True)
    yield case("norms of heads, chunks", 64, (2, 2, 32), 160, [40, 19, 33, 3], [7, 4, 1, 3], head_norms=True)
    yield case("no row", 32, (2, 1, 16), 64, [], [])
    if level == "full":
        yield case("strided", 64, (4, 2, 16), 64, [20, 7], [1, 1], strided=True)
        yield case("odd sizes", 40, (3, 3, 24), 50, [33, 5], [1, 5])
        yield case("one row", 64, (4, 4, 16), 64, [130], [1], bias=True, head_norms=True)
        yield case("many rows", 64, (4, 2, 16), 128, list(range(1, 302)), [1] * 301)


def categorical(level: Level, source: Source) -> Iterator[Generated]:
    def case(name: str, logits: Tensor, temperature: float = 1.0, size: float = 1.0) -> Generated:
        uniform = source.midpoints(logits / (temperature or 1.0))
        return name, {"logits_BV": logits, "uniform_B": uniform, "temperature": temperature}, size

    if level == "perf":
        rows, words = source.real(128), source.real(65_536)
        yield case(f"{rows} rows of {words}", source.normal(rows, words))
        return
    yield case("ragged 37x101", source.normal(37, 101))
    yield case("temperature 0.7", source.normal(19, 257), 0.7)
    yield case("greedy", source.normal(7, 130), 0.0)
    yield case("one row", source.normal(1, 65))
    yield case("no row", source.normal(0, 64))
    yield case("strided", source.every_other(21, 65), 1.3)
    if level == "full":
        yield case("4099 words", source.normal(23, 4099))
        yield case("one word", source.normal(5, 1))
        yield case("sharp", source.normal(29, 251, scale=8.0), 0.5, size=16.0)
        yield case("flat", source.normal(29, 251, scale=1e-3))
        yield case("hot", source.normal(29, 251), 10.0)
        yield case(
            "all but one forbidden",
            torch.full_like(source.normal(3, 33), -torch.inf).index_fill(1, _at(17, source), 2.0),
        )
        yield case("far from zero", source.normal(17, 333, mean=-500.0), size=2.0)


def token_log_prob(level: Level, source: Source) -> Iterator[Generated]:
    for name, arguments, size in categorical(level, source):
        if name != "all but one forbidden":
            logits, temperature = arguments["logits_BV"], arguments["temperature"]
            tokens = source.integers(logits.shape[1], len(logits))
            yield name, {"logits_BV": logits, "tokens_B": tokens, "temperature": temperature}, size


def _at(index: int, source: Source) -> Tensor:
    return torch.tensor([index], device=source.device)
