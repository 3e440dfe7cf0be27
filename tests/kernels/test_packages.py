"""Packages of others as providers: judged by the contracts where they run, left out quietly where they do not."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from siirl_kernels import bind, flash_attn, liger, obstacle, providers, registry
from siirl_kernels.accuracy import measure
from siirl_kernels.contracts import CONTRACTS, results, taken
from siirl_kernels.packing import PackedSequences
from siirl_kernels.selftest import DTYPES, bind_tested
from siirl_kernels.triton import support
from tests import device_under_test

HOST = torch.device("cpu")
OPS = [("flash_attn", "packed_attention"), ("liger", "rms_norm"), ("liger", "rope"), ("liger", "swiglu")]


@pytest.mark.parametrize(("provider", "op"), OPS)
def test_it_keeps_the_contract(provider: str, op: str) -> None:
    if why := obstacle(provider):
        pytest.skip(why)
    contract, checked = CONTRACTS[op], 0
    for dtype in DTYPES:
        for case, inference in taken(op, provider, "full", dtype, device_under_test.device()):
            found = results(providers(op)[provider], case, contract, inference)
            truth = results(providers(op)["torch"], case.to(HOST, torch.float64), contract, inference)
            for direction, ours, theirs in zip(("forward", "backward"), found, truth, strict=True):
                for x, true in zip(ours, theirs, strict=True):
                    error = measure(x, true, contract.tolerance(dtype, case, direction))
                    assert error.tolerated, f"{case.name}, {dtype}, {direction}: {error}"
                    checked += 1
    assert checked


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: Any = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False,
    block_table: Any = None,
) -> Tensor:  # fmt: skip
    """What flash-attn's documentation says of its function: bottom-right causality, keys' heads in groups."""
    assert causal and softmax_scale is None and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    lengths = cu_seqlens_q.diff().tolist()
    assert (max_seqlen_q, max_seqlen_k) == (max(lengths), max(cu_seqlens_k.diff().tolist()))
    out, group = torch.empty_like(q), q.shape[1] // k.shape[1]
    for start, end in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False):
        keys, values = (x[start:end].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qnd,knd->nqk", q[start:end].double(), keys.double()) * q.shape[2] ** -0.5
        hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[start:end] = torch.einsum("nqk,knd->qnd", weights, values.double()).to(q.dtype)
    return out


def test_flash_attn_is_called_as_its_documentation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, package = providers("packed_attention")["torch"], ModuleType("flash_attn")
    package.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    contract, checked = CONTRACTS["packed_attention"], 0
    for case in contract.cases("full", torch.bfloat16, HOST):
        if any(case.arguments["sequences"].prefixes):
            continue
        found = flash_attn.packed_attention(**case.arguments)
        truth = reference(**case.to(HOST, torch.float64).arguments)
        assert measure(found, truth, contract.tolerance(torch.bfloat16, case, "forward")).tolerated, case.name
        checked += 1
    assert checked > 6


class _OnDevice:
    """A tensor's facts, as a predicate asks for them."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, is_cuda: bool = True) -> None:
        self.shape, self.dtype, self.is_cuda = shape, dtype, is_cuda

    def __len__(self) -> int:
        return self.shape[0]


def test_flash_attn_takes_plain_sequences_in_half_precision_on_a_gpu() -> None:
    plain, shared = PackedSequences((3, 4), HOST), PackedSequences((3, 4), HOST, (0, 0), (0, 2))

    def takes(sequences: PackedSequences, size: int = 64, **facts: Any) -> bool:
        q = _OnDevice((7, 2, size), **facts)
        return flash_attn.takes(q, q, q, sequences)  # type: ignore[arg-type]

    assert takes(plain) and takes(plain, dtype=torch.float16) and takes(PackedSequences((7,), HOST, (0,), (0,)))
    assert not takes(shared) and not takes(plain, size=257)
    assert not takes(plain, dtype=torch.float32) and not takes(plain, is_cuda=False)


def test_where_they_are_not_installed_nobody_is_warned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (flash_attn, liger):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(registry, "_reported", set())
    assert flash_attn.unavailable() == "flash-attn is not installed, which is optional"
    assert liger.unavailable() == "liger-kernel is not installed, which is optional"
    with caplog.at_level(logging.INFO, "siirl_kernels"):
        bind_tested(["flash_attn", "liger", "torch"])
    assert [(r.levelname, r.getMessage().partition(":")[0]) for r in caplog.records] == [
        ("INFO", "the kernel provider 'flash_attn' is left out"),
        ("INFO", "the kernel provider 'liger' is left out"),
    ]
    bind([])


def test_liger_is_in_nobodys_way_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(support, "interpreted", lambda: True)
    assert liger.unavailable() == "liger-kernel is installed, but Triton's interpreter cannot run its kernels"
