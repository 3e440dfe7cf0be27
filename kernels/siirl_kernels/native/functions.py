"""The library's functions as Python calls on tensors, which their callers have checked: contiguous, on the host.

Shapes: T tokens, H hidden, O outputs, N query heads, K key/value heads, D head size, P blocks, S slots, B rows,
V words.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from siirl_kernels import pages
from siirl_kernels.native.build import library
from siirl_kernels.packing import PackedSequences
from siirl_kernels.paging import PagedSequences
from siirl_kernels.weights import LayerWeights, LinearWeights

_HALF, _POINTER, _SIZE, _FLOAT = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "siirl_linear": [_POINTER] * 4 + [_SIZE] * 3,
    "siirl_pack": [_HALF] + [_POINTER] * 2 + [_SIZE] * 2,
    "siirl_packed_linear": [_HALF] + [_POINTER] * 5 + [_SIZE] * 3,
    "siirl_layer": [_HALF] + [_POINTER] * 8,
    "siirl_rms_norm": [_HALF] + [_POINTER] * 3 + [_SIZE] * 2 + [_FLOAT],
    "siirl_rope": [_HALF] + [_POINTER] * 4 + [_SIZE] * 3,
    "siirl_swiglu": [_HALF] + [_POINTER] * 3 + [_SIZE],
    "siirl_rms_norm_gradient": [_HALF] + [_POINTER] * 5 + [_SIZE] * 2 + [_FLOAT],
    "siirl_rope_gradient": [_HALF] + [_POINTER] * 4 + [_SIZE] * 3,
    "siirl_swiglu_gradient": [_HALF] + [_POINTER] * 5 + [_SIZE],
    "siirl_categorical": [_HALF, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT, _POINTER, _POINTER],
    "siirl_log_prob": [_HALF] + [_POINTER] * 2 + [_SIZE] * 2 + [_FLOAT] + [_POINTER] * 3,
    "siirl_log_prob_gradient": [_HALF] + [_POINTER] * 2 + [_SIZE] * 2 + [_FLOAT] + [_POINTER] * 5,
    "siirl_paged_attention": [_HALF] + [_POINTER] * 9 + [_SIZE] * 6 + [_POINTER],
    "siirl_packed_attention": [_POINTER] * 6 + [_SIZE] * 4 + [_POINTER],
    "siirl_training_attention": [_HALF] + [_POINTER] * 6 + [_SIZE] * 4 + [_POINTER] * 2,
    "siirl_training_attention_gradient": [_HALF] + [_POINTER] * 6 + [_SIZE] * 4 + [_POINTER] * 6,
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
    """float32, each result one chain of additions."""
    outputs = len(weight_OH)
    out = x_TH.new_empty(len(x_TH), outputs)
    pointers = (x_TH.data_ptr(), weight_OH.data_ptr(), _at(bias), out.data_ptr())
    _function("siirl_linear")(*pointers, len(x_TH), x_TH.shape[1], outputs)
    return out


def _packed(all_weights: Sequence[LinearWeights]) -> list[Tensor]:
    """Each weight in the library's form, beside each other in memory."""
    first = all_weights[0].weight
    side = 32 if _half(first) else 16
    sizes = [-(-len(w.weight) // side) * side * w.weight.shape[1] for w in all_weights]
    forms = list(pages.empty([sum(sizes)], first).split(sizes))
    for weights, form in zip(all_weights, forms, strict=True):
        weight = weights.weight.contiguous()
        _function("siirl_pack")(_half(weight), weight.data_ptr(), form.data_ptr(), *weight.shape)
    return forms


def _bias(weights: LinearWeights) -> Tensor | None:
    return None if weights.bias is None else weights.bias.contiguous()


def _kept(weights: LinearWeights, x_TH: Tensor) -> Tensor:
    """Where the results of these weights lie: memory that is new costs as much as the product of few rows."""
    room: list[Tensor] = weights.form("native result", list)
    if not room or len(room[0]) < len(x_TH):
        room[:] = [x_TH.new_empty(len(x_TH), len(weights.weight))]
    return room[0][: len(x_TH)]


def inference_linear(x_TH: Tensor, weights: LinearWeights) -> Tensor:
    """In float32 the same bits as :func:`linear`; bfloat16 in tiles."""
    form, bias = weights.form("native", lambda: (_packed([weights])[0], _bias(weights)))
    outputs = len(weights.weight)
    out = _kept(weights, x_TH) if weights.one_result else x_TH.new_empty(len(x_TH), outputs)
    pointers = (x_TH.data_ptr(), form.data_ptr(), _at(bias), None, out.data_ptr())
    _function("siirl_packed_linear")(_half(x_TH), *pointers, len(x_TH), x_TH.shape[1], outputs)
    return out


class _Linear(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("packed", "bias")]


_NORMS = ("input_norm", "post_norm", "q_norm", "k_norm")
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_SIZES = ("hidden", "heads", "key_heads", "size", "intermediate")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in _NORMS),
        *((name, _Linear) for name in _LINEARS),
        *((name, _SIZE) for name in _SIZES),
        ("eps", _FLOAT),
    ]


class _Paged(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("tables", "lengths", "starts", "slots")),
        *((name, _SIZE) for name in ("batch", "blocks", "block_size")),
    ]


def inference_layer(
    x_TH: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    weights: LayerWeights,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    sequences: PagedSequences,
) -> Tensor:
    size = cos_TD.shape[1]

    def make() -> tuple[_Layer, list[Tensor | None]]:
        norms = [getattr(weights, name) for name in _NORMS]
        linears = [getattr(weights, name) for name in _LINEARS]
        forms, biases = _packed(linears), [_bias(linear) for linear in linears]
        heads, key_heads = (len(w.weight) // size for w in (weights.q, weights.k))
        layer = _Layer(
            *map(_at, norms),
            *(_Linear(_at(form), _at(bias)) for form, bias in zip(forms, biases, strict=True)),
            *(x_TH.shape[1], heads, key_heads, size, len(weights.gate.weight)),
            weights.eps,
        )
        return layer, [*forms, *biases]  # what it points to lives as long

    layer, _ = weights.form("native", make)
    out = torch.empty_like(x_TH)
    indices = (sequences.tables, sequences.lengths, sequences.starts, sequences.slots)
    paged = _Paged(*(x.data_ptr() for x in indices), *sequences.tables.shape, keys_PSKD.shape[1])
    _function("siirl_layer")(
        _half(x_TH),
        ctypes.addressof(layer),
        *(x.data_ptr() for x in (x_TH, cos_TD, sin_TD, keys_PSKD, values_PSKD)),
        ctypes.addressof(paged),
        out.data_ptr(),
    )
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


def rms_norm_gradient(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of the input and of the weight."""
    grad_x, grad_weight, size = torch.empty_like(x), torch.empty_like(weight), x.shape[-1]
    pointers = (x.data_ptr(), weight.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), grad_weight.data_ptr())
    _function("siirl_rms_norm_gradient")(_half(x), *pointers, x.numel() // size, size, eps)
    return grad_x, grad_weight


def rope_gradient(grad_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    out = torch.empty_like(grad_TND)
    pointers = (grad_TND.data_ptr(), cos_TD.data_ptr(), sin_TD.data_ptr(), out.data_ptr())
    _function("siirl_rope_gradient")(_half(grad_TND), *pointers, *grad_TND.shape)
    return out


def swiglu_gradient(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    pointers = (gate.data_ptr(), up.data_ptr(), grad.data_ptr(), grad_gate.data_ptr(), grad_up.data_ptr())
    _function("siirl_swiglu_gradient")(_half(gate), *pointers, gate.numel())
    return grad_gate, grad_up


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


def log_prob_of(
    logits_TV: Tensor,
    target_T: Tensor,
    temperature: float,
    log_prob_T: Tensor,
    entropy_T: Tensor | None,
    sums_T2: Tensor | None = None,
) -> None:
    """Fills in each target's log-prob, of the same bits as :func:`categorical`'s, and each row's entropy.

    ``sums_T2`` takes what :func:`log_prob_gradient` needs of each row.
    """
    rows, words = logits_TV.shape
    _function("siirl_log_prob")(
        _half(logits_TV),
        logits_TV.data_ptr(),
        target_T.data_ptr(),
        rows,
        words,
        temperature,
        log_prob_T.data_ptr(),
        _at(entropy_T),
        _at(sums_T2),
    )


def log_prob_gradient(
    logits_TV: Tensor,
    target_T: Tensor,
    temperature: float,
    sums_T2: Tensor,
    entropy_T: Tensor,
    grad_T: Tensor,
    grad_entropy_T: Tensor | None,
    out_TV: Tensor,
) -> None:
    """Fills in the gradient of the logits; ``out_TV`` may be the logits themselves."""
    rows, words = logits_TV.shape
    _function("siirl_log_prob_gradient")(
        _half(logits_TV),
        logits_TV.data_ptr(),
        target_T.data_ptr(),
        rows,
        words,
        temperature,
        *map(_at, (sums_T2, entropy_T, grad_T, grad_entropy_T, out_TV)),
    )


def token_log_prob(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
    """float32, of the same bits as :func:`categorical`'s; temperature 0 counts as 1."""
    log_prob = torch.empty(len(logits_BV), dtype=torch.float32)
    log_prob_of(logits_BV, tokens_B, temperature or 1.0, log_prob, None)
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


def _family(sequences: PackedSequences) -> tuple[Tensor, Tensor, Tensor]:
    """First own token of each sequence and the end, int64 [B + 1], its parent and what it shares, int64 [B]."""
    batch = len(sequences.lengths)
    starts = torch.tensor((0, *sequences.lengths), dtype=torch.int64).cumsum(0)
    parents = torch.tensor(sequences.parents or range(batch), dtype=torch.int64)
    return starts, parents, torch.tensor(sequences.prefixes or (0,) * batch, dtype=torch.int64)


def training_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sequences: PackedSequences
) -> tuple[Tensor, Tensor]:
    """The op's result, and the log-sum-exp of each token's and head's scores, float32 [T, N]."""
    out, sums, family = torch.empty_like(q_TND), torch.empty(q_TND.shape[:2]), _family(sequences)
    pointers = (x.data_ptr() for x in (q_TND, k_TKD, v_TKD, *family))
    sizes = (len(sequences.lengths), q_TND.shape[1], *k_TKD.shape[1:])
    _function("siirl_training_attention")(_half(q_TND), *pointers, *sizes, out.data_ptr(), sums.data_ptr())
    return out, sums


def training_attention_gradient(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    sequences: PackedSequences,
    out_TND: Tensor,
    sums_TN: Tensor,
    grad_TND: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the queries, the keys and the values."""
    found, family = [torch.empty_like(x) for x in (q_TND, k_TKD, v_TKD)], _family(sequences)
    pointers = (x.data_ptr() for x in (q_TND, k_TKD, v_TKD, *family))
    sizes = (len(sequences.lengths), q_TND.shape[1], *k_TKD.shape[1:])
    results = (x.data_ptr() for x in (out_TND, sums_TN, grad_TND, *found))
    _function("siirl_training_attention_gradient")(_half(q_TND), *pointers, *sizes, *results)
    return found[0], found[1], found[2]
