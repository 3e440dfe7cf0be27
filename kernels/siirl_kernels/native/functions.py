"""The library's functions as Python calls on tensors, which their callers have checked: contiguous, on the host.

Shapes: T tokens, H hidden, O outputs, N query heads, K key/value heads, D head size, P blocks, S slots, B rows,
V words.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from siirl_kernels.native.build import library
from siirl_kernels.packing import PackedSequences
from siirl_kernels.paging import PagedSequences

_HALF, _POINTER, _SIZE, _FLOAT = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "siirl_linear": [_POINTER] * 4 + [_SIZE] * 3,
    "siirl_tiles_linear": [_POINTER] * 4 + [_SIZE] * 3,
    "siirl_rms_norm": [_HALF] + [_POINTER] * 3 + [_SIZE] * 2 + [_FLOAT],
    "siirl_rope": [_HALF] + [_POINTER] * 4 + [_SIZE] * 3,
    "siirl_swiglu": [_HALF] + [_POINTER] * 3 + [_SIZE],
    "siirl_categorical": [_HALF, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT, _POINTER, _POINTER],
    "siirl_log_prob": [_POINTER] * 2 + [_SIZE] * 2 + [_FLOAT] + [_POINTER] * 2,
    "siirl_paged_attention": [_HALF] + [_POINTER] * 9 + [_SIZE] * 6 + [_POINTER],
    "siirl_packed_attention": [_POINTER] * 6 + [_SIZE] * 4 + [_POINTER],
}


@functools.cache
def _function(name: str) -> Callable[..., None]:
    function = getattr(library(), name)
    function.argtypes, function.restype = _SIGNATURES[name], None
    return function


@functools.cache
def has_tiles() -> bool:
    """Whether the CPU multiplies bfloat16 in tiles (AMX) and this process may."""
    return bool(library().siirl_has_tiles())


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _half(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def linear(x_TH: Tensor, weight_OH: Tensor, bias: Tensor | None) -> Tensor:
    """float32 by dot products of one fixed order, bfloat16 in tiles."""
    tokens, outputs = x_TH.shape[0], weight_OH.shape[0]
    out = x_TH.new_empty(tokens, outputs)
    pointers = (x_TH.data_ptr(), weight_OH.data_ptr(), _at(bias), out.data_ptr())
    _function("siirl_tiles_linear" if _half(x_TH) else "siirl_linear")(*pointers, tokens, x_TH.shape[1], outputs)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out, size = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // size
    _function("siirl_rms_norm")(_half(x), x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, size, eps)
    return out


def rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    out = torch.empty_like(x_TND)
    pointers = (x_TND.data_ptr(), cos_TD.data_ptr(), sin_TD.data_ptr(), out.data_ptr())
    _function("siirl_rope")(_half(x_TND), *pointers, *x_TND.shape)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _function("siirl_swiglu")(_half(gate), gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel())
    return out


def categorical(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    rows, words = logits_BV.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    log_probs = torch.empty(rows, dtype=torch.float32)
    _function("siirl_categorical")(
        _half(logits_BV),
        logits_BV.data_ptr(),
        uniform_B.data_ptr(),
        rows,
        words,
        temperature,
        tokens.data_ptr(),
        log_probs.data_ptr(),
    )
    return tokens, log_probs


def log_prob_of(logits_TV: Tensor, target_T: Tensor, temperature: float, log_prob_T: Tensor, entropy_T: Tensor) -> None:
    """Fills in each target's log-prob, of the same bits as :func:`categorical`'s, and each row's entropy."""
    rows, words = logits_TV.shape
    _function("siirl_log_prob")(
        logits_TV.data_ptr(),
        target_T.data_ptr(),
        rows,
        words,
        temperature,
        log_prob_T.data_ptr(),
        entropy_T.data_ptr(),
    )


def token_log_prob(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
    """float32, of the same bits as :func:`categorical`'s; temperature 0 counts as 1."""
    log_prob = torch.empty(len(logits_BV), dtype=torch.float32)
    log_prob_of(logits_BV, tokens_B, temperature or 1.0, log_prob, torch.empty_like(log_prob))
    return log_prob


def paged_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, sequences: PagedSequences
) -> Tensor:
    out = torch.empty_like(q_TND)
    tensors = (q_TND, k_TKD, v_TKD, keys_PSKD, values_PSKD)
    indices = (sequences.tables, sequences.lengths, sequences.starts, sequences.slots)
    _function("siirl_paged_attention")(
        _half(q_TND),
        *(x.data_ptr() for x in tensors + indices),
        *sequences.tables.shape,
        keys_PSKD.shape[1],
        q_TND.shape[1],
        *k_TKD.shape[1:],
        out.data_ptr(),
    )
    return out


def packed_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences) -> Tensor:
    out = torch.empty_like(q_TND)
    own = torch.tensor(sequences.lengths, dtype=torch.int64)
    starts = torch.cat((sequences.starts, own.sum()[None]))
    lengths = own + torch.tensor(sequences.prefixes, dtype=torch.int64) if sequences.prefixes else own
    whole = torch.arange(len(q_TND)) if sequences.whole is None else sequences.whole
    tensors = (q_TND, k_TKD, v_TKD, starts, lengths, whole)
    _function("siirl_packed_attention")(
        *(x.data_ptr() for x in tensors), len(own), q_TND.shape[1], *k_TKD.shape[1:], out.data_ptr()
    )
    return out
