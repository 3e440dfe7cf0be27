"""What test_triton.py runs with TRITON_INTERPRET=1: kernels in parts and chunks, and mistakes that must be noticed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from siirl_kernels import providers
from siirl_kernels.accuracy import measure
from siirl_kernels.contracts import CONTRACTS, Case
from siirl_kernels.triton import attention, sampling

CPU = torch.device("cpu")
ATTENTION = CONTRACTS["paged_attention"]
reference = providers("paged_attention")["torch"]


def copied(case: Case) -> dict[str, Any]:
    """The arguments, with caches of their own."""
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in case.arguments.items()}


def tolerated(module: ModuleType, dtype: torch.dtype = torch.float32) -> Iterator[bool]:
    """Of each small case, whether attention is as near to the truth as promised."""
    for case in ATTENTION.cases("smoke", dtype, CPU):
        if case.name != "strided":
            truth = reference(**case.to(CPU, torch.float64).arguments)
            found = module.paged_attention(**copied(case))
            yield measure(found, truth, ATTENTION.tolerance(dtype, case, "forward")).tolerated


@pytest.fixture
def _many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in up to 8 parts of 16, most of them empty."""
    many_parts(attention, monkeypatch)


def many_parts(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_BYTES", 1)
    monkeypatch.setattr(module, "LEAST_KEYS", 1)
    monkeypatch.setattr(module, "MOST_PARTS", 8)
    monkeypatch.setattr(module, "_units", lambda device: 512)


@pytest.mark.usefixtures("_many_parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_in_parts_is_attention(dtype: torch.dtype) -> None:
    assert attention.parts_of(8, 48, 512) == 8
    assert all(tolerated(attention, dtype))


def test_the_caches_hold_what_the_reference_puts_there() -> None:
    for case in ATTENTION.cases("smoke", torch.bfloat16, CPU):
        ours, theirs = copied(case), copied(case)
        attention.paged_attention(**ours)
        reference(**theirs)
        for name in ATTENTION.writes:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)


def test_lengths_are_read_where_they_lie() -> None:
    """A graph is replayed with other lengths than it was captured with, and tables as wide as any sequence needs."""
    (case,) = (case for case in ATTENTION.cases("smoke", torch.float32, CPU) if case.name.startswith("ragged"))
    sequences = case.arguments["sequences"]
    wide = torch.cat((sequences.tables, torch.zeros_like(sequences.tables).repeat(1, 40)), dim=1)
    other = copied(case) | {"sequences": replace(sequences, tables=wide, longest=1)}
    torch.testing.assert_close(attention.paged_attention(**other), reference(**copied(case)))


def test_few_sequences_are_taken_in_parts() -> None:
    assert attention.parts_of(programs=8, most_keys=8192, units=132) == 32
    assert attention.parts_of(programs=256, most_keys=8192, units=132) == 2
    assert attention.parts_of(programs=2048, most_keys=8192, units=132) == 1
    assert attention.parts_of(programs=1, most_keys=300, units=132) == 1


MISTAKES = {
    "a token does not see itself": ("position[None, :] <= (cached", "position[None, :] < (cached"),
    "a token sees the next": ("<= (cached + query)[", "<= (cached + query + 1)["),
    "slots that nobody wrote": ("v_at, mask=written[:, None] & inside", "v_at, mask=inside"),
    "sums do not fade": ("total = total * faded +", "total = total +"),
    "values are cached as keys": ("head * keys_h + column, k,", "head * keys_h + column, v,"),
    "parts overlap": ("tl.minimum(begin + share, end)", "tl.minimum(begin + share + 1, end)"),
    "an empty part counts": ("weights = tl.exp2(peaks - tl.max(peaks, 0))", "weights = tl.exp2(tl.maximum(peaks, 0))"),
    "a tile too far": ("// QUERIES - low) * QUERIES", "// QUERIES - low + 1) * QUERIES"),
    "one head of a group": ("head * GROUP + row % GROUP", "head * GROUP + row % 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = MISTAKES[mistake]
    source = Path(attention.__file__).read_text()
    assert source.count(right) == 1
    path = tmp_path / "mistaken.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("mistaken", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if "part" in mistake:
        many_parts(module, monkeypatch)
    monkeypatch.setattr(module, "TILE_BYTES", 1)  # 16 keys at a time
    assert not all(tolerated(module))


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CHUNK", 64)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_token_is_drawn_where_its_share_lies(dtype: torch.dtype) -> None:
    """At n equidistant numbers each token is drawn n p times, up to the two at its borders."""
    logits = (3 * torch.randn(300, generator=torch.Generator().manual_seed(1))).to(dtype)
    count = 128
    uniform = (torch.arange(count) + 0.5) / count
    tokens, log_probs = sampling.categorical(logits.repeat(count, 1), uniform, 0.8)
    p = (logits.double() / 0.8).softmax(-1)
    assert ((torch.bincount(tokens, minlength=300) - count * p).abs() < 1.01).all()
    assert (tokens.diff() >= 0).all()
    torch.testing.assert_close(log_probs, p[tokens].log().float())
    some = slice(None, None, 9)
    found = sampling.token_log_prob(logits.repeat(len(tokens[some]), 1), tokens[some], 0.8)
    assert torch.equal(found, log_probs[some])


@pytest.mark.usefixtures("_small_chunks")
def test_no_forbidden_token_is_drawn_at_the_ends() -> None:
    logits = torch.full((2, 300), -torch.inf)
    logits[:, [70, 71, 200]] = torch.tensor([0.0, -30.0, 1.0])
    tokens, log_probs = sampling.categorical(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0)
    assert tokens.tolist() == [70, 200]
    assert log_probs.isfinite().all()


@pytest.mark.usefixtures("_small_chunks")
def test_greedy_takes_the_first_of_the_largest_of_all_chunks() -> None:
    logits = torch.zeros(2, 300)
    logits[0, [130, 131, 260]] = 2.0
    tokens, log_probs = sampling.categorical(logits, torch.tensor([0.9, 0.9]), 0.0)
    assert tokens.tolist() == [130, 0]
    torch.testing.assert_close(log_probs, logits.log_softmax(-1)[torch.arange(2), tokens])


def test_a_row_that_is_no_numbers_draws_a_word_that_exists() -> None:
    logits = torch.full((1, 5), torch.nan)
    for temperature in (0.0, 1.0):
        tokens, log_probs = sampling.categorical(logits, torch.tensor([0.5]), temperature)
        assert 0 <= int(tokens) < 5
        assert log_probs.isnan().all()
