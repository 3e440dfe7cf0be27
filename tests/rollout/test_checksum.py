"""The checksum sees every element, name and shape, and not the order; the engine refuses weights that are not whole."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from siirl.errors import SiirlError
from siirl.rollout import checksum as module
from siirl.rollout.checksum import weights_checksum
from tests.rollout.test_engine import engine, tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]


def named(dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    g = torch.Generator().manual_seed(5)
    shapes = {"a": (3, 5), "b": (7,), "c": (), "d": (4, 4), "empty": (0, 3)}
    return [(name, (torch.randn(shape, generator=g) * 50).to(dtype)) for name, shape in shapes.items()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype: torch.dtype) -> None:
    weights = named(dtype)
    before = weights_checksum(weights)
    for _, tensor in weights:
        flat = tensor.view(-1).view(torch.uint8)
        for place in range(8 * len(flat)):
            flat[place // 8] ^= 1 << place % 8
            assert weights_checksum(weights) != before
            flat[place // 8] ^= 1 << place % 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_signs_of_two_elements_count(dtype: torch.dtype) -> None:
    """Their bits may be the highest of two words, which a sum of words by odd factors does not see."""
    values = torch.arange(1, 41).to(dtype)
    seen = {weights_checksum([("w", values)])}
    for i in range(40):
        for j in range(i):
            flipped = values.clone()
            flipped[[i, j]] *= -1
            seen.add(weights_checksum([("w", flipped)]))
    assert len(seen) == 1 + 40 * 39 // 2
    assert weights_checksum([("w", -values)]) not in seen


def test_elements_that_change_places_count() -> None:
    weights = dict(named())
    before = weights_checksum(weights.items())
    seen = {before}
    for i in range(16):
        for j in range(i):
            swapped = weights["d"].clone().view(-1)
            swapped[[i, j]] = swapped[[j, i]]
            seen.add(weights_checksum((weights | {"d": swapped.view(4, 4)}).items()))
    assert len(seen) == 1 + 16 * 15 // 2
    assert weights_checksum((weights | {"d": weights["d"].t().contiguous()}).items()) != before


def test_order_does_not_count_and_names_shapes_and_dtypes_do() -> None:
    weights = named()
    expected = weights_checksum(weights)
    assert weights_checksum(weights[::-1]) == expected
    assert weights_checksum(iter(weights)) == expected
    others = [
        weights[1:],
        [("A", weights[0][1]), *weights[1:]],
        [("b", weights[0][1]), ("a", weights[1][1]), *weights[2:]],
        [("a", weights[0][1].view(5, 3)), *weights[1:]],
        [("a", weights[0][1].view(torch.int32)), *weights[1:]],
        [*weights, weights[0], weights[0]],
    ]
    found = [weights_checksum(other) for other in others]
    assert len({expected, *found}) == 1 + len(others)


def test_how_a_tensor_lies_in_memory_does_not_count() -> None:
    wide = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    for view in (wide.t(), wide[:, 1:4], wide.view(-1)[1:10], wide[1:]):
        assert weights_checksum([("w", view)]) == weights_checksum([("w", view.contiguous().clone())])


def test_a_cast_is_that_of_the_engine() -> None:
    cast = [(name, tensor.to(torch.bfloat16)) for name, tensor in named()]
    assert weights_checksum(named(), torch.bfloat16) == weights_checksum(cast) != weights_checksum(named())


def test_the_sum_is_that_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ over pieces and words, in Python's integers; pieces of 4 words, so that there are several and a rest."""
    monkeypatch.setattr(module, "_PIECE", 4)
    tensor = torch.randn(27, generator=torch.Generator().manual_seed(2)).bfloat16()
    factors = module._factors(tensor.device)[:4].tolist()
    data = tensor.view(torch.int16).numpy().tobytes()
    words = [w for (w,) in struct.iter_unpack("<i", data + bytes(2))]
    words, rest = words[:13], words[13:]
    expected = 0
    for piece in (words[:4], words[4:8], words[8:12], words[12:], rest):
        expected = expected * module._PIECE_FACTOR + sum(w * m for w, m in zip(piece, factors, strict=False))
    assert module._weigh(tensor).item() % 2**64 == expected % 2**64


def test_pieces_that_change_places_count() -> None:
    pieces = torch.randn(2, module._PIECE, generator=torch.Generator().manual_seed(2))
    assert module._weigh(pieces).item() != module._weigh(pieces.flip(0)).item()


def weights_of(scale: float) -> dict[str, Tensor]:
    return {name: p.detach() * scale for name, p in tiny().named_parameters()}


def test_the_engine_confirms_what_it_holds() -> None:
    made, sent = engine(tiny()), weights_of(1.5)
    made.update_weights(sent.items(), 3, weights_checksum(sent.items()))
    assert made.version == 3


def test_a_sync_that_drops_a_tensor_names_it() -> None:
    made, sent = engine(tiny()), weights_of(1.5)
    checksum = weights_checksum(sent.items())
    last, _ = sent.popitem()
    with pytest.raises(SiirlError) as caught:
        made.update_weights(sent.items(), 3, checksum)
    assert str(caught.value) == f"weights of version 3 did not arrive whole: {last} is missing"
    assert made.version == 0


def test_more_than_three_missing_tensors_are_counted() -> None:
    with pytest.raises(SiirlError, match="embed_tokens.weight, .* and 21 more are missing"):
        engine(tiny()).update_weights([], 1, 0)


def test_weights_that_changed_on_the_way_are_refused() -> None:
    made, sent = engine(tiny()), weights_of(1.5)
    checksum = weights_checksum(sent.items())
    name = next(iter(sent))
    sent[name][0, 0] += 1e-6 * sent[name][0, 0]
    with pytest.raises(SiirlError) as caught:
        made.update_weights(sent.items(), 4, checksum)
    assert "weights of version 4 did not arrive as they were sent" in str(caught.value)
    assert f"{checksum:016x}" in str(caught.value)
    assert made.version == 0
