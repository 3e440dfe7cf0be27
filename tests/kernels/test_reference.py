"""The reference ops against their formulas, written out naively in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from siirl_kernels import kernels
from siirl_kernels.packing import PackedSequences

LENGTHS = [(5,), (1,), (1, 1, 1), (4, 4, 4), (1, 37, 2, 9, 1), (2, 50, 3)]


# own tokens, parents and shared tokens: (5, 2 + 3 shared, 4 + 3 shared, ...)
SHARED = [
    ((5, 2, 4), (0, 0, 0), (0, 3, 3)),
    ((4, 0, 3, 6, 1), (0, 0, 2, 2, 2), (0, 4, 0, 2, 2)),
    ((3, 9, 1, 2, 2), (0, 1, 0, 1, 1), (0, 0, 3, 8, 1)),
]


def packed(lengths: tuple[int, ...], parents: tuple[int, ...] = (), prefixes: tuple[int, ...] = ()) -> PackedSequences:
    return PackedSequences(lengths, torch.device("cpu"), parents, prefixes)


def whole_sequences(lengths: tuple[int, ...], parents: tuple[int, ...], prefixes: tuple[int, ...]) -> list[list[int]]:
    """The packed positions of each sequence, shared ones included."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        [starts[parent] + t for t in range(prefix)] + [start + t for t in range(length)]
        for start, length, parent, prefix in zip(starts, lengths, parents, prefixes, strict=True)
    ]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attend_naively(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """softmax(q kᵀ / √D) v over the tokens of the same sequence up to the own one, token by token."""
    out, share, start = torch.empty_like(q), q.shape[1] // k.shape[1], 0
    for length in lengths:
        for t in range(start, start + length):
            for head in range(q.shape[1]):
                keys, values = k[start : t + 1, head // share], v[start : t + 1, head // share]
                weights = torch.softmax(keys @ q[t, head] / math.sqrt(q.shape[2]), dim=0)
                out[t, head] = weights @ values
        start += length
    return out


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    x, weight = random(7, 12), random(12, seed=1)
    expected = weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_computes_in_float32_and_keeps_bfloat16() -> None:
    x, weight = random(64, 512) * 30, random(512, seed=1)
    expected = weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    result = kernels.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), expected, rtol=2e-2, atol=1e-3)


def test_rope_multiplies_each_pair_by_a_complex_phase() -> None:
    x = random(6, 3, 8)
    angles = torch.outer(torch.arange(6, dtype=torch.float64), 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4))
    phase = torch.polar(torch.ones_like(angles), angles)
    turned = torch.complex(x[..., :4], x[..., 4:]) * phase[:, None]
    both = torch.cat((angles, angles), dim=-1)
    torch.testing.assert_close(kernels.rope(x, both.cos(), both.sin()), torch.cat((turned.real, turned.imag), dim=-1))


def test_swiglu_gates_with_silu() -> None:
    gate, up = random(5, 9), random(5, 9, seed=1)
    torch.testing.assert_close(kernels.swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_packed_attention_stays_within_each_sequence(lengths: tuple[int, ...], heads: int, kv_heads: int) -> None:
    tokens = sum(lengths)
    q, k, v = random(tokens, heads, 4), random(tokens, kv_heads, 4, seed=1), random(tokens, kv_heads, 4, seed=2)
    out = kernels.packed_attention(q, k, v, packed(lengths))
    torch.testing.assert_close(out, attend_naively(q, k, v, lengths))


def test_a_sequence_packed_among_others_comes_out_as_alone() -> None:
    lengths = (3, 40, 1, 7)
    q, k, v = (random(sum(lengths), 2, 4, seed=seed) for seed in range(3))
    together = kernels.packed_attention(q, k, v, packed(lengths))
    for x in torch.split(torch.arange(sum(lengths)), lengths):
        alone = kernels.packed_attention(q[x], k[x], v[x], packed((len(x),)))
        torch.testing.assert_close(together[x], alone)


@pytest.mark.parametrize(("lengths", "parents", "prefixes"), SHARED)
@pytest.mark.parametrize("largest_mask", [16 * 2**20, 0], ids=["masked", "shared queries again"])
def test_shared_tokens_are_seen_by_each_sequence_that_begins_with_them(
    lengths, parents, prefixes, largest_mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siirl_kernels.packing._MAX_MASK", largest_mask)
    tokens = sum(lengths)
    inputs = [random(tokens, heads, 4, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    upstream = random(tokens, 4, 4, seed=9)
    out = kernels.packed_attention(*inputs, packed(lengths, parents, prefixes))
    grads = torch.autograd.grad((out * upstream).sum(), inputs)

    expected = torch.zeros_like(out)
    for positions, prefix in zip(whole_sequences(lengths, parents, prefixes), prefixes, strict=True):
        if own := positions[prefix:]:
            alone = attend_naively(*(x[positions] for x in inputs), (len(positions),))[prefix:]
            expected = expected.index_add(0, torch.tensor(own), alone)
    torch.testing.assert_close(out, expected)
    for grad, plain in zip(grads, torch.autograd.grad((expected * upstream).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, plain)


@pytest.mark.parametrize("lengths", [(3,), (2, 2), (1, 6, 2)])
def test_gradients_of_packed_attention(lengths: tuple[int, ...]) -> None:
    tokens = sum(lengths)
    inputs = [random(tokens, heads, 2, seed=heads).requires_grad_() for heads in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda q, k, v: kernels.packed_attention(q, k, v, packed(lengths)), inputs)


def test_gradients_of_norm_rope_and_swiglu() -> None:
    x, weight, gate, up = (random(*shape).requires_grad_() for shape in ((3, 4), (4,), (3, 4), (3, 4)))
    angles = random(3, 4, seed=5)
    assert torch.autograd.gradcheck(lambda x, w: kernels.rms_norm(x, w, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(lambda x: kernels.rope(x.view(3, 1, 4), angles.cos(), angles.sin()), (x,))
    assert torch.autograd.gradcheck(kernels.swiglu, (gate, up))


def test_positions_count_from_zero_in_each_sequence() -> None:
    sequences = packed((3, 1, 2))
    assert sequences.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert sequences.starts.tolist() == [0, 3, 4]


def test_positions_of_a_sequence_go_on_behind_what_it_shares() -> None:
    assert packed((3, 2, 2), (0, 0, 0), (0, 2, 3)).positions.tolist() == [0, 1, 2, 2, 3, 3, 4]


def test_padding_stays_within_half_of_each_sequence() -> None:
    for lengths in LENGTHS:
        for bucket in packed(lengths).buckets:
            assert bucket.keys.real.numel() <= 1.5 * bucket.keys.real.sum()
