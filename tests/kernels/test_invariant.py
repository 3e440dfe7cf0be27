"""The provider ``invariant``: equal bits, whatever is computed beside a token and however it got there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from siirl.model.config import DecoderConfig
from siirl.model.decoder import Decoder, PackedAttention
from siirl.model.inference import InferenceDecoder
from siirl_kernels import bind, invariant, kernels, resolved
from siirl_kernels.invariant import OPS, invariant_pins
from siirl_kernels.native.build import unavailable
from siirl_kernels.packing import PackedSequences
from siirl_kernels.paging import PagedSequences
from siirl_kernels.weights import LinearWeights

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
CPU = torch.device("cpu")
BLOCK = 4


@pytest.fixture(autouse=True)
def _bound() -> Iterator[None]:
    bind([], invariant_pins())
    yield
    bind([])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_pins_bind_all_but_what_nothing_calls() -> None:
    assert {op for op, provider in resolved().items() if provider == "invariant"} == set(OPS)


@pytest.mark.parametrize("hidden", [40, 576, 133])
@pytest.mark.parametrize("rows", [1, 3, 17, 64, 131])
def test_rows_in_batches_are_rows_alone(rows: int, hidden: int) -> None:
    x, weight, bias = normal(rows, hidden), normal(45, hidden, seed=1), normal(45, seed=2)
    gain, angles = normal(hidden, seed=3), normal(rows, hidden // 2 * 2, seed=4)
    heads = x[:, : hidden // 2 * 2].unflatten(1, (1, -1))
    target = torch.arange(rows) % 45
    calls = {
        "linear": lambda at: kernels.linear(x[at], weight, bias),
        "inference_linear": lambda at: kernels.inference_linear(x[at], LinearWeights(weight)),
        "rms_norm": lambda at: kernels.rms_norm(x[at], gain, 1e-6),
        "rope": lambda at: kernels.rope(heads[at], angles[at].cos(), angles[at].sin()),
        "swiglu": lambda at: kernels.swiglu(x[at], x.flip(0)[at]),
        "log_prob": lambda at: torch.stack(kernels.linear_log_prob(x[at], weight, target[at], 0.7), 1),
    }
    for name, call in calls.items():
        together = call(slice(None))
        for size in (1, 3, 17, 64):
            parts = [call(slice(start, start + size)) for start in range(0, rows, size)]
            assert torch.equal(torch.cat(parts), together), (name, size)


def test_threads_change_no_bit() -> None:
    x, weight = normal(70, 576), normal(1000, 576, seed=1)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(kernels.linear(x, weight, None))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_training_finds_the_log_prob_that_drawing_reported(temperature: float) -> None:
    hidden, weight = normal(33, 64), normal(1003, 64, seed=1)
    uniform = torch.rand(33, generator=torch.Generator().manual_seed(2))
    tokens, drawn = kernels.categorical(kernels.inference_linear(hidden, LinearWeights(weight)), uniform, temperature)
    assert torch.equal(kernels.linear_log_prob(hidden, weight, tokens, temperature or 1.0)[0], drawn)


def cached(lengths: list[int], chunk: int, attend: object) -> None:
    """Call ``attend(rows and positions of the new tokens, sequences)`` until all sequences are cached."""
    tables = [[3 * b + i for i in range(-(-n // BLOCK))] for b, n in enumerate(lengths)]
    for first in range(0, max(lengths), chunk):
        rows = [b for b, n in enumerate(lengths) if first < n]
        ends = [min(first + chunk, lengths[b]) for b in rows]
        paged = PagedSequences.of([tables[b] for b in rows], ends, [end - first for end in ends], BLOCK, CPU)
        at = [sum(lengths[:b]) + t for b, end in zip(rows, ends, strict=True) for t in range(first, end)]
        attend(torch.tensor(at), paged)  # type: ignore[operator]


@pytest.mark.parametrize("size", [24, 64])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_a_prompt_in_chunks_is_the_packed_sequence(chunk: int, size: int) -> None:
    lengths = [11, 3, 12]
    q, k, v = (normal(26, heads, size, seed=heads) for heads in (6, 2, 3))
    v = v[:, :2].contiguous()
    packed, found = kernels.packed_attention(q, k, v, PackedSequences(tuple(lengths), CPU)), torch.empty_like(q)
    caches = torch.full((2, 9, BLOCK, 2, size), torch.nan)

    def attend(at: Tensor, paged: PagedSequences) -> None:
        found[at] = kernels.paged_attention(q[at], k[at], v[at], *caches, paged)

    cached(lengths, chunk, attend)
    assert torch.equal(found, packed)


def test_a_shared_prefix_is_the_prefix_repeated() -> None:
    lengths, parents, prefixes = (9, 4, 2), (0, 0, 0), (0, 7, 3)
    q, k, v = (normal(15, heads, 16, seed=heads) for heads in (4, 2, 2))
    shared = kernels.packed_attention(q, k, v, PackedSequences(lengths, CPU, parents, prefixes))
    for start, own, prefix in zip((0, 9, 13), lengths, prefixes, strict=True):
        at = torch.tensor([*range(prefix), *range(start, start + own)])
        alone = kernels.packed_attention(q[at], k[at], v[at], PackedSequences((len(at),), CPU))
        assert torch.equal(shared[start : start + own], alone[prefix:])


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = DecoderConfig(
        family="qwen3",
        vocab_size=301,
        hidden_size=80,
        intermediate_size=136,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        max_positions=64,
        qk_norm=True,
        tie_embeddings=True,
        initializer_range=0.2,
    )
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_a_generated_token_has_the_log_prob_of_training(decoder: Decoder, chunk: int) -> None:
    lengths = [11, 3, 12, 7]
    tokens = torch.randint(301, (33,), generator=torch.Generator().manual_seed(1))
    sequences = PackedSequences(tuple(lengths), CPU)
    targets = tokens.roll(-1)
    hidden = decoder(tokens, sequences.positions, PackedAttention(sequences))
    trained = kernels.linear_log_prob(hidden, decoder.head_weight, targets, 0.9)[0].detach()
    generated = torch.empty(33)
    caches = torch.full((3, 2, 12, BLOCK, 2, 24), torch.nan)

    generation = InferenceDecoder(decoder)

    def attend(at: Tensor, paged: PagedSequences) -> None:
        logits = generation.logits(generation(tokens[at], paged.positions, list(map(tuple, caches)), paged))
        uniform = _draws(logits, targets[at], 0.9)
        drawn, log_probs = kernels.categorical(logits, uniform, 0.9)
        same = drawn == targets[at]
        assert same.float().mean() > 0.5
        generated[at] = torch.where(same, log_probs, torch.nan)

    with torch.inference_mode():
        cached(lengths, chunk, attend)
    found = ~generated.isnan()
    assert torch.equal(generated[found], trained[found])


def _draws(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Numbers at which the targets are drawn."""
    p = (logits.double() / temperature).softmax(-1)
    return (p.cumsum(-1) - p / 2).gather(1, targets[:, None]).squeeze(1).float()


def test_without_a_compiler_the_pins_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariant, "obstacle", lambda provider: "no C++ compiler was found")
    with pytest.raises(ValueError, match="batch-invariant kernels need a C\\+\\+ compiler .* no C\\+\\+ compiler"):
        invariant_pins()
