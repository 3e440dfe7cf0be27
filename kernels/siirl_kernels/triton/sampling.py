"""Drawing tokens and looking up log-probs: every row's words in chunks, measured in parallel, then one program a row.

The second program of a row knows each chunk's share, so it reads only the chunk that holds the token.

Shapes: B rows, V words, C chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from siirl_kernels.triton.support import FUSED

CHUNK = 4096
# Of the programs that normalise, which must all add up alike.
FINISH = {"num_warps": 8, **FUSED}


@triton.jit
def _scaled(logits_ptr, row, stride, word, words, temperature):
    """float32 logits / temperature; -inf behind the last word."""
    at = logits_ptr + row.to(tl.int64) * stride + word
    return tl.load(at, mask=word < words, other=float("-inf")).to(tl.float32) / temperature


@triton.jit
def _finite(peak):
    """What exponents are taken relative to: the largest logit, or 0 where all are -inf."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit(do_not_specialize=["chunks"])
def _measure(peaks_ptr, sums_ptr, logits_ptr, words, stride, chunks, temperature, CHUNK: tl.constexpr):
    """A chunk's largest logit and the sum of exponentials relative to it."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    x = _scaled(logits_ptr, row, stride, chunk * CHUNK + tl.arange(0, CHUNK), words, temperature)
    peak = tl.max(x, 0)
    tl.store(peaks_ptr + row * chunks + chunk, peak)
    tl.store(sums_ptr + row * chunks + chunk, tl.sum(tl.exp(x - _finite(peak)), 0))


@triton.jit
def _normalise(peaks_ptr, sums_ptr, row, chunks, CHUNKS: tl.constexpr):
    """Largest logit of each chunk and of the row; each chunk's weight relative to the latter, and their sum."""
    index = tl.arange(0, CHUNKS)
    peaks = tl.load(peaks_ptr + row * chunks + index, mask=index < chunks, other=float("-inf"))
    sums = tl.load(sums_ptr + row * chunks + index, mask=index < chunks, other=0.0)
    peak = _finite(tl.max(peaks, 0))
    weights = sums * tl.exp(peaks - peak)
    return peaks, peak, weights, tl.sum(weights, 0)


@triton.jit
def _pick(cumulated, weights, wanted, COUNT: tl.constexpr):
    """The first index at which ``cumulated`` exceeds ``wanted``, else the last one; of weights above 0 alone.

    A parallel sum may decrease by a rounding, and grow by one where a weight is 0.
    """
    index = tl.arange(0, COUNT)
    first = tl.min(tl.where((cumulated > wanted) & (weights > 0.0), index, COUNT), 0)
    last = tl.max(tl.where(weights > 0.0, index, 0), 0)
    return tl.where(first < COUNT, first, last)


@triton.jit
def _at(values, index, COUNT: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, COUNT) == index, values, 0.0), 0)


@triton.jit(do_not_specialize=["chunks"])
def _draw(
    tokens_ptr, log_probs_ptr, peaks_ptr, sums_ptr, logits_ptr, uniform_ptr, words, stride, chunks, temperature,
    GREEDY: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    peaks, peak, weights, total = _normalise(peaks_ptr, sums_ptr, row, chunks, CHUNKS)
    if GREEDY:
        chunk = tl.min(tl.where(peaks == peak, tl.arange(0, CHUNKS), CHUNKS), 0)
        chunk = tl.minimum(chunk, chunks - 1)  # of a row that is no numbers
        x = _scaled(logits_ptr, row, stride, chunk * CHUNK + tl.arange(0, CHUNK), words, temperature)
        index = tl.min(tl.where(x == peak, tl.arange(0, CHUNK), CHUNK - 1), 0)
    else:
        cumulated = tl.cumsum(weights, 0)
        end = tl.max(cumulated, 0)
        # rounding must not put the product at the end itself, past the last word
        wanted = tl.minimum(tl.load(uniform_ptr + row) * end, end * (1.0 - 2.0**-24))
        chunk = _pick(cumulated, weights, wanted, CHUNKS)
        before = tl.max(tl.where(tl.arange(0, CHUNKS) < chunk, cumulated, 0.0), 0)
        own_peak = _finite(_at(peaks, chunk, CHUNKS))
        x = _scaled(logits_ptr, row, stride, chunk * CHUNK + tl.arange(0, CHUNK), words, temperature)
        shares = tl.exp(x - own_peak)
        index = _pick(tl.cumsum(shares, 0), shares, (wanted - before) / tl.exp(own_peak - peak), CHUNK)
    token = tl.minimum(chunk * CHUNK + index, words - 1)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(log_probs_ptr + row, _at(x, index, CHUNK) - peak - tl.log(total))


@triton.jit(do_not_specialize=["chunks"])
def _look_up(
    log_probs_ptr, peaks_ptr, sums_ptr, logits_ptr, tokens_ptr, words, stride, chunks, temperature,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    _, peak, _, total = _normalise(peaks_ptr, sums_ptr, row, chunks, CHUNKS)
    x = _scaled(logits_ptr, row, stride, tl.load(tokens_ptr + row), words, temperature)
    tl.store(log_probs_ptr + row, x - peak - tl.log(total))


def categorical(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits without gaps in the last dimension; ``uniform_B``: float32, of the device or the host."""
    tokens_B = logits_BV.new_empty(len(logits_BV), dtype=torch.int64)
    log_probs_B = logits_BV.new_empty(len(logits_BV), dtype=torch.float32)
    if len(logits_BV):
        peaks_BC, sums_BC, chunks = _measured(logits_BV, temperature)
        _draw[(len(logits_BV),)](
            tokens_B, log_probs_B, peaks_BC, sums_BC, logits_BV, uniform_B.to(logits_BV.device).contiguous(),
            logits_BV.shape[1], logits_BV.stride(0), chunks, temperature or 1.0,
            GREEDY=temperature == 0, CHUNKS=triton.next_power_of_2(chunks), CHUNK=CHUNK, **FINISH,
        )  # fmt: skip
    return tokens_B, log_probs_B


def token_log_prob(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
    """Logits without gaps in the last dimension."""
    log_probs_B = logits_BV.new_empty(len(logits_BV), dtype=torch.float32)
    if len(logits_BV):
        peaks_BC, sums_BC, chunks = _measured(logits_BV, temperature)
        _look_up[(len(logits_BV),)](
            log_probs_B, peaks_BC, sums_BC, logits_BV, tokens_B.contiguous(),
            logits_BV.shape[1], logits_BV.stride(0), chunks, temperature or 1.0,
            CHUNKS=triton.next_power_of_2(chunks), **FINISH,
        )  # fmt: skip
    return log_probs_B


def _measured(logits_BV: Tensor, temperature: float) -> tuple[Tensor, Tensor, int]:
    """Each chunk's largest scaled logit and sum of exponentials, float32 [B, C] each, and C."""
    rows, words = logits_BV.shape
    chunks = triton.cdiv(words, CHUNK)
    peaks_BC, sums_BC = logits_BV.new_empty(2, rows, chunks, dtype=torch.float32)
    _measure[(rows, chunks)](
        peaks_BC, sums_BC, logits_BV, words, logits_BV.stride(0), chunks, temperature or 1.0,
        CHUNK=CHUNK, num_warps=8, **FUSED,
    )  # fmt: skip
    return peaks_BC, sums_BC, chunks
