"""Fused ops, each from the formula and with the limits that its page in Ascend/op-plugin gives for Atlas A2.

The pages are docs/zh/custom_APIs/torch_npu/*<name>.md there. What they allow and this file does not compute raises
NotImplementedError; what they forbid raises RuntimeError. Gradients are those of the formula.

Shapes: T tokens, N query heads, K key/value heads, D head size, S tokens of one sequence.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# (input, weight) of npu_rms_norm
NORM_DTYPES = {(dtype, dtype) for dtype in DTYPES} | {
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
}
ROTARY_MODES = ("half", "interleave")
COMPRESSED = 2048  # rows and columns of the mask that stands for a triangle of any size
LEFT_UP, RIGHT_DOWN = 2, 3  # sparse modes: where the triangle begins, where it ends
MOST_SEQUENCES = 1024  # of one call with sequences of different lengths
fused: collections.Counter[str] = collections.Counter()  # calls
_triangles: WeakIdKeyDictionary = WeakIdKeyDictionary()  # masks that were looked at, and their version then


def _op(function: Callable[..., Any]) -> Callable[..., Any]:
    """Counts the calls and refuses tensors that are not on the device."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.device.type != "npu":
                raise RuntimeError(
                    "Expected all tensors to be on the same device. Expected NPU tensor, please check whether the "
                    f"input tensor device is correct: {function.__name__} got one on {value.device}"
                )
        fused[function.__name__] += 1
        return function(*args, **kwargs)

    return call


def _require(fulfilled: bool, op: str, rule: str) -> None:
    if not fulfilled:
        raise RuntimeError(f"{op}: {rule}")


@_op
def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The normalised input, and 1 / Rms(x) in float32 over the dimensions that gamma does not have."""
    _require((self.dtype, gamma.dtype) in NORM_DTYPES, "npu_rms_norm", f"not for {self.dtype} with {gamma.dtype}")
    _require(2 <= self.dim() <= 8, "npu_rms_norm", f"self has 2 to 8 dimensions, not {self.dim()}")
    inner = self.shape[-gamma.dim() :] if gamma.dim() else None
    _require(gamma.dim() < self.dim() and gamma.shape == inner, "npu_rms_norm", "gamma has the last dimensions of self")
    over = tuple(range(-gamma.dim(), 0))
    x = self.float()
    rstd = torch.rsqrt(x.square().mean(over, keepdim=True) + epsilon)
    return (x * rstd * gamma.float()).to(self.dtype), rstd.reshape(self.shape[: -gamma.dim()])


@_op
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """swish(A) B, where A and B are the first and the second half of the input along `dim`."""
    _require(input.dtype in DTYPES, "npu_swiglu", f"not for {input.dtype}")
    _require(1 <= input.dim() <= 8, "npu_swiglu", f"the input has 1 to 8 dimensions, not {input.dim()}")
    _require(input.is_contiguous(), "npu_swiglu", "the input must be contiguous")
    _require(input.numel() > 0, "npu_swiglu", "the input must not be empty")
    _require(input.shape[dim] % 2 == 0, "npu_swiglu", f"dimension {dim} must be divisible by 2")
    first, second = input.float().chunk(2, dim)
    return (first * torch.sigmoid(first) * second).to(input.dtype)


@_op
def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """input r1 + rotate(input) r2, the rotation by halves; layout TND, r1 and r2 as [T, 1, D] or [T, N, D]."""
    if rotate is not None or rotary_mode != "half" or input.dim() != 3:
        _require(rotary_mode in ROTARY_MODES and input.dim() in (3, 4), "npu_rotary_mul", "no such mode or layout")
        raise NotImplementedError("the simulated npu_rotary_mul knows rotary_mode='half' and three dimensions (TND)")
    tokens, heads, size = input.shape
    _require({input.dtype, r1.dtype, r2.dtype} <= {input.dtype} & set(DTYPES), "npu_rotary_mul", "not for these dtypes")
    _require(size % 2 == 0 and size < 896, "npu_rotary_mul", f"D is even and less than 896, not {size}")
    _require(heads < 1000, "npu_rotary_mul", f"N is less than 1000, not {heads}")
    allowed = ((tokens, 1, size), (tokens, heads, size))
    _require(r1.shape == r2.shape and r1.shape in allowed, "npu_rotary_mul", "r1 and r2 are [T, 1, D] or [T, N, D]")
    if r1.numel() and not torch.npu.is_current_stream_capturing():
        within = max(float(r.detach().abs().max()) for r in (r1, r2)) <= 1.0
        _require(within, "npu_rotary_mul", "r1 and r2 lie between -1 and 1")
    x, cos, sin = input.float(), r1.float(), r2.float()
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(input.dtype)


@_op
def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Attention in the layout TND: query [T, N, D], key and value [T', K, D], sequences one after another.

    Args:
        atten_mask: bool or uint8 [S, S'], true where a query may NOT attend to a key.
        actual_seq_qlen, actual_seq_kvlen: where each sequence ends, cumulative, integers of the host.
        sparse_mode: 0 and 1: the mask as it is. 2 and 3: causal, from the first or from the last token on; the mask
            is then the upper triangle of 2048 x 2048, whatever the lengths.

    Returns:
        The attention [T, N, D], and six values for the op's own backward pass, empty here.
    """
    if input_layout != "TND" or keep_prob != 1.0 or sparse_mode not in (0, 1, LEFT_UP, RIGHT_DOWN) or pse is not None:
        raise NotImplementedError("the simulated npu_fusion_attention knows TND, no dropout, sparse modes 0 to 3")
    _check_attention(query, key, value, head_num)
    queries, keys = _lengths(actual_seq_qlen, query), _lengths(actual_seq_kvlen, key)
    _require(len(queries) == len(keys), "npu_fusion_attention", "as many query sequences as key sequences")
    masks = functools.partial(_mask, atten_mask, sparse_mode)
    out = _attend(query, key, value, queries, keys, scale, masks)
    nothing = query.new_empty(0, dtype=torch.float32)
    return out, nothing, nothing, nothing, 0, 0, 0


def _check_attention(query: Tensor, key: Tensor, value: Tensor, head_num: int) -> None:
    name = "npu_fusion_attention"
    _require(query.dtype in DTYPES, name, f"not for {query.dtype}")
    _require(query.dtype == key.dtype == value.dtype, name, "query, key and value have one dtype")
    _require(query.dim() == key.dim() == value.dim() == 3, name, "TND has three dimensions")
    _require(
        key.shape == value.shape and query.shape[2] == key.shape[2], name, "key and value have one shape, D is one"
    )
    _require(1 <= query.shape[2] <= 768, name, f"D is 1 to 768, not {query.shape[2]}")
    _require(query.shape[0] >= 1 and key.shape[0] >= 1, name, "T is 1 or more")
    _require(head_num == query.shape[1] and 1 <= head_num <= 256, name, "head_num is N of the query, 1 to 256")
    _require(query.shape[1] % key.shape[1] == 0, name, "N of the query is a multiple of N of the key")


def _lengths(ends: Sequence[int] | None, tokens: Tensor) -> list[int]:
    """The lengths of the sequences that take part; a tail of zeros stands for sequences that do not."""
    name = "npu_fusion_attention"
    _require(
        isinstance(ends, list | tuple) and all(type(end) is int for end in ends), name, "ends are a list of integers"
    )
    assert ends is not None
    _require(1 <= len(ends) <= MOST_SEQUENCES, name, f"1 to {MOST_SEQUENCES} sequences, not {len(ends)}")
    kept = list(ends)
    while kept and kept[-1] == 0:
        kept.pop()
    lengths = [end - start for start, end in itertools.pairwise([0, *kept])]
    _require(min(lengths, default=0) >= 0, name, f"ends of sequences are cumulative: {list(ends)}")
    _require(sum(lengths) == tokens.shape[0] or len(kept) < len(ends), name, "the last sequence ends at T")
    return lengths


def _mask(atten_mask: Tensor | None, sparse_mode: int, queries: int, keys: int) -> Tensor | None:
    """bool [queries, keys], true where masked out."""
    name = "npu_fusion_attention"
    if atten_mask is None:
        return None
    _require(atten_mask.dtype in (torch.bool, torch.uint8), name, f"the mask is bool or uint8, not {atten_mask.dtype}")
    _require(atten_mask.dim() == 2, name, "with sequences of different lengths the mask is [S, S']")
    if sparse_mode not in (LEFT_UP, RIGHT_DOWN):
        return atten_mask.bool()[:queries, :keys]
    _require(_is_compressed(atten_mask), name, f"the mask of this sparse mode is triu(ones({COMPRESSED}²), 1)")
    first = keys - queries if sparse_mode == RIGHT_DOWN else 0  # the last key that the first query sees
    _require(first >= 0, name, "no query may be masked out entirely")
    return torch.ones(queries, keys, dtype=torch.bool, device=atten_mask.device).triu(first + 1)


def _is_compressed(mask: Tensor) -> bool:
    if mask.shape != (COMPRESSED, COMPRESSED):
        return False
    if _triangles.get(mask) != mask._version:
        if not torch.equal(mask.cpu().bool(), torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)):
            return False
        _triangles[mask] = mask._version
    return True


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: list[int],
    keys: list[int],
    scale: float,
    masks: Callable[[int, int], Tensor | None],
) -> Tensor:
    """Sequences of equal lengths together."""
    alike: dict[tuple[int, int], list[int]] = {}
    for i, lengths in enumerate(zip(queries, keys, strict=True)):
        if lengths[0]:
            alike.setdefault(lengths, []).append(i)
    query_starts, key_starts = (torch.tensor([0, *itertools.accumulate(lengths)]) for lengths in (queries, keys))
    group = query.shape[1] // key.shape[1]
    parts, places = [], []
    for (length, context), rows in alike.items():
        place = (query_starts[rows][:, None] + torch.arange(length)).flatten()
        source = (key_starts[rows][:, None] + torch.arange(context)).flatten().to(key.device)
        q = query[place.to(query.device)].unflatten(0, (-1, length)).transpose(1, 2).float()
        k, v = (x[source].unflatten(0, (-1, context)).transpose(1, 2).float() for x in (key, value))
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scale
        if (mask := masks(length, context)) is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        attended = scores.softmax(-1) @ v.repeat_interleave(group, 1)
        parts.append(attended.transpose(1, 2).flatten(0, 1))
        places.append(place)
    out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    if parts:
        out = out.index_copy(0, torch.cat(places).to(query.device), torch.cat(parts))
    return out.to(query.dtype)
