"""The simulated fused ops are what their pages define, sequence by sequence, and refuse what these forbid."""

from __future__ import annotations

from typing import Any

import pytest
import simulated_npu
import torch
import torch_npu
from torch import Tensor

from siirl_kernels import kernels, providers, supported
from siirl_kernels.packing import PackedSequences
from tests.device_under_test import backend

NPU = torch.device("npu", 0)
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(NPU, dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int], **options: Any) -> Tensor:
    ends = {"actual_seq_qlen": queries, "actual_seq_kvlen": keys}
    return torch_npu.npu_fusion_attention(q, k, v, q.shape[1], "TND", scale=0.5, **ends, **options)[0]


def plainly(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Attention of one sequence, on the host in float64; `hidden` [S, S'] is true where a query does not see a key."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, k) * 0.5
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


QUERIES, KEYS = [2, 2, 5, 9], [3, 7, 10, 14]  # lengths 2, 0, 3, 4 and 3, 4, 3, 4


@pytest.mark.parametrize("mode", [2, 3])
def test_attention_is_causal_from_either_end(mode: int) -> None:
    q, k, v = drawn(9, 4, 8), drawn(14, 2, 8), drawn(14, 2, 8)
    out = attention(q, k, v, QUERIES, KEYS, sparse_mode=mode, atten_mask=TRIANGLE.to(NPU)).cpu()
    for i, (end, key_end) in enumerate(zip(QUERIES, KEYS, strict=True)):
        start, key_start = (QUERIES[i - 1], KEYS[i - 1]) if i else (0, 0)
        rows, columns = end - start, key_end - key_start
        shift = columns - rows if mode == 3 else 0
        hidden = torch.arange(columns)[None, :] > torch.arange(rows)[:, None] + shift
        expected = plainly(q[start:end], k[key_start:key_end], v[key_start:key_end], hidden)
        torch.testing.assert_close(out[start:end].double(), expected, atol=1e-5, rtol=0)


def test_a_true_mask_hides_and_no_mask_hides_nothing() -> None:
    q, k, v = drawn(3, 1, 4), drawn(3, 1, 4), drawn(3, 1, 4)
    hidden = torch.tensor([[False, True, True], [False, False, True], [True, False, False]])
    masked = attention(q, k, v, [3], [3], atten_mask=hidden.to(NPU))
    torch.testing.assert_close(masked.cpu().double(), plainly(q, k, v, hidden), atol=1e-5, rtol=0)
    free = attention(q, k, v, [3], [3], sparse_mode=3)
    torch.testing.assert_close(free.cpu().double(), plainly(q, k, v, torch.zeros(3, 3).bool()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"actual_seq_qlen": torch.tensor([2, 3], device=NPU)}, "ends are a list of integers"),
        ({"actual_seq_qlen": [2, 1]}, "ends of sequences are cumulative"),
        ({"actual_seq_qlen": [2, 2]}, "the last sequence ends at T"),
        ({"actual_seq_qlen": [3]}, "as many query sequences as key sequences"),
        ({"actual_seq_qlen": list(range(1025))}, "1 to 1024 sequences, not 1025"),
        ({"atten_mask": ~TRIANGLE}, "the mask of this sparse mode is triu"),
        ({"atten_mask": TRIANGLE[:3, :3]}, "the mask of this sparse mode is triu"),
        ({"atten_mask": TRIANGLE.float()}, "the mask is bool or uint8"),
        ({"query": drawn(3, 2, 8).double()}, "not for torch.float64"),
        ({"value": drawn(3, 2, 8).bfloat16()}, "query, key and value have one dtype"),
        ({"query": drawn(3, 3, 8)}, "head_num is N of the query"),
        ({"key": torch.zeros(3, 2, 8)}, "Expected NPU tensor"),
        ({"actual_seq_qlen": [1, 3], "actual_seq_kvlen": [2, 3]}, "no query may be masked out entirely"),
    ],
)
def test_attention_refuses_what_its_page_forbids(changed: dict[str, Any], sentence: str) -> None:
    x = drawn(3, 2, 8)
    arguments = {
        "query": x, "key": x, "value": x, "head_num": 2, "input_layout": "TND", "sparse_mode": 3,
        "atten_mask": TRIANGLE, "actual_seq_qlen": [2, 3], "actual_seq_kvlen": [2, 3],
    } | changed  # fmt: skip
    arguments["atten_mask"] = arguments["atten_mask"].to(NPU)
    with pytest.raises(RuntimeError, match=sentence):
        torch_npu.npu_fusion_attention(**arguments)


def test_rms_norm_gives_the_norm_and_the_inverse_of_its_root_mean_square() -> None:
    x, weight = drawn(5, 3, 16, dtype=torch.bfloat16), drawn(16)
    y, rstd = torch_npu.npu_rms_norm(x, weight, epsilon=1e-2)
    root = (x.cpu().double().square().mean(-1) + 1e-2).sqrt()
    assert y.dtype == torch.bfloat16 and rstd.dtype == torch.float32 and rstd.shape == (5, 3)
    torch.testing.assert_close(rstd.cpu().double(), 1 / root, atol=0, rtol=1e-6)
    torch.testing.assert_close(
        y.cpu().double(), x.cpu().double() / root[..., None] * weight.cpu().double(), atol=0, rtol=2**-8
    )


def test_rotation_turns_the_plane_of_i_and_i_plus_half() -> None:
    x, angle = drawn(4, 2, 6), torch.arange(4.0)[:, None, None].to(NPU)
    y = torch_npu.npu_rotary_mul(x, angle.cos().expand(4, 1, 6), angle.sin().expand(4, 1, 6)).cpu().double()
    turned = torch.complex(*x.cpu().double().chunk(2, -1)) * torch.exp(1j * angle.cpu().double())
    torch.testing.assert_close(torch.complex(*y.chunk(2, -1)), turned, atol=1e-6, rtol=0)


def test_swiglu_gates_the_second_half_by_the_first() -> None:
    x = drawn(3, 8)
    gate, up = x.cpu().double().chunk(2, -1)
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(torch_npu.npu_swiglu(x).cpu().double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: torch_npu.npu_swiglu(drawn(3, 7)), "must be divisible by 2"),
        (lambda: torch_npu.npu_swiglu(drawn(8, 4).t()), "the input must be contiguous"),
        (lambda: torch_npu.npu_swiglu(drawn(0, 4)), "the input must not be empty"),
        (lambda: torch_npu.npu_swiglu(drawn(2, 4).double()), "not for torch.float64"),
        (lambda: torch_npu.npu_rms_norm(drawn(4), drawn(4)), "2 to 8 dimensions"),
        (lambda: torch_npu.npu_rms_norm(drawn(2, 4), drawn(3)), "gamma has the last dimensions"),
        (lambda: torch_npu.npu_rms_norm(drawn(2, 4), drawn(4).bfloat16()), "not for torch.float32 with torch.bfloat16"),
        (lambda: torch_npu.npu_rotary_mul(drawn(2, 2, 5), drawn(2, 1, 5), drawn(2, 1, 5)), "D is even"),
        (lambda: torch_npu.npu_rotary_mul(drawn(2, 2, 4), drawn(2, 4), drawn(2, 4)), r"r1 and r2 are \[T, 1, D\]"),
        (
            lambda: torch_npu.npu_rotary_mul(drawn(2, 2, 4), *[torch.full((2, 1, 4), 1.5, device=NPU)] * 2),
            "between -1 and 1",
        ),
    ],
)
def test_ops_refuse_what_their_pages_forbid(call: Any, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()


def test_our_kernels_are_bound_and_call_the_vendors_ops() -> None:
    backend()
    sequences = PackedSequences((3, 2), NPU, (0, 0), (0, 2))  # the second begins with two tokens of the first
    simulated_npu.reset_counters()
    kernels.rms_norm(drawn(5, 8), drawn(8), 1e-6)
    kernels.rope(drawn(5, 2, 8), drawn(5, 8).clamp(-1, 1), drawn(5, 8).clamp(-1, 1))
    kernels.swiglu(drawn(5, 8), drawn(5, 8))
    kernels.packed_attention(drawn(5, 2, 8), drawn(5, 1, 8), drawn(5, 1, 8), sequences)
    assert simulated_npu.counters()["fused"] == {
        "npu_rms_norm": 1, "npu_rotary_mul": 1, "npu_swiglu": 1, "npu_fusion_attention": 1,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_a_dtype_that_the_vendor_does_not_list_is_left_to_the_reference(dtype: torch.dtype) -> None:
    backend()
    x = drawn(4, 2, 8).to(dtype)
    sequences = PackedSequences((4,), NPU)
    assert "ascend" in providers("swiglu")
    assert not supported("rms_norm", "ascend", {"x": x, "weight": x[0, 0], "eps": 1e-6})
    assert not supported("rope", "ascend", {"x_TND": x, "cos_TD": x[:, 0], "sin_TD": x[:, 0]})
    assert not supported("swiglu", "ascend", {"gate": x, "up": x})
    assert not supported("packed_attention", "ascend", {"q_TND": x, "k_TKD": x, "v_TKD": x, "sequences": sequences})
