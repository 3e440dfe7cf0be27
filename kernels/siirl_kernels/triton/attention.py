"""Attention of new tokens to a paged cache: writing it, reading it in parallel parts, joining the parts.

A program takes a tile of rows, (queries x query heads of one key head), and goes through the keys with an online
softmax (FlashAttention, arXiv 2205.14135). Where sequences are too few to fill a device the keys are dealt out to
several programs, whose parts a second kernel joins (Flash-Decoding). Grids follow from shapes alone, lengths are read
on the device: a call can be captured in a graph and replayed with other lengths.

Shapes: T new tokens, B sequences, N query heads, K key/value heads, D head size, P blocks, S slots of a block,
M blocks of a table, C parts.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from siirl_kernels.paging import PagedSequences
from siirl_kernels.triton.numbers import narrow, product
from siirl_kernels.triton.support import FUSED

TILE_BYTES = 16384  # of keys that a program holds at once; it holds as much of values
PROGRAMS_PER_UNIT = 4
LEAST_KEYS = 256  # that a part is worth a program and its share of the joining
MOST_PARTS = 32
WRITERS = 32768


@triton.jit(do_not_specialize=["tokens"])
def _write(
    k_ptr, v_ptr, keys_ptr, values_ptr, slots_ptr, tokens,
    k_t, k_h, v_t, v_h, keys_p, keys_s, keys_h, values_p, values_s, values_h,
    ROUNDS: tl.constexpr, SLOTS: tl.constexpr,
    HEADS: tl.constexpr, HEADS_TILE: tl.constexpr, SIZE: tl.constexpr, SIZE_TILE: tl.constexpr,
):  # fmt: skip
    """Copies the keys and values of a token, [K, D] each, to its slot."""
    head = tl.arange(0, HEADS_TILE)[:, None].to(tl.int64)
    column = tl.arange(0, SIZE_TILE)[None, :]
    for turn in range(ROUNDS):
        token = (tl.program_id(0) + turn * tl.num_programs(0)).to(tl.int64)
        there = (head < tl.where(token < tokens, HEADS, 0)) & (column < SIZE)
        slot = tl.load(slots_ptr + token, mask=token < tokens, other=0).to(tl.int64)
        block, offset = slot // SLOTS, slot % SLOTS
        k = tl.load(k_ptr + token * k_t + head * k_h + column, mask=there)
        v = tl.load(v_ptr + token * v_t + head * v_h + column, mask=there)
        tl.store(keys_ptr + block * keys_p + offset * keys_s + head * keys_h + column, k, mask=there)
        tl.store(values_ptr + block * values_p + offset * values_s + head * values_h + column, v, mask=there)


@triton.jit
def _tile_of(starts_ptr, tile, sequences, QUERIES: tl.constexpr):
    """The sequence that a tile of ``QUERIES`` queries belongs to, and which of its queries is the tile's first.

    Sequence b has the tiles from starts[b] // QUERIES + b on: enough for any lengths, the last ones may be empty.
    """
    low, high = tl.full([], 0, tl.int32), sequences
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(starts_ptr + middle) // QUERIES + middle <= tile
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low, (tile - tl.load(starts_ptr + low) // QUERIES - low) * QUERIES


@triton.jit(do_not_specialize=["sequences", "table_width"])
def _attend(
    out_ptr, parts_ptr, peaks_ptr, sums_ptr, q_ptr, keys_ptr, values_ptr, tables_ptr, lengths_ptr, starts_ptr,
    sequences, table_width, scale,
    q_t, q_h, keys_p, keys_s, keys_h, values_p, values_s, values_h,
    ONE_QUERY: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of rows to one part of its keys. ``scale``: log2(e) / sqrt(D), for powers of two."""
    head, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if ONE_QUERY:
        sequence, first = tile, 0
    else:
        sequence, first = _tile_of(starts_ptr, tile, sequences, QUERIES)
    start = tl.load(starts_ptr + sequence)
    count = tl.load(starts_ptr + sequence + 1) - start
    if first >= count:
        return
    cached = tl.load(lengths_ptr + sequence) - count  # position of the first new token
    end = cached + tl.minimum(first + QUERIES, count)  # no row of the tile sees a key from here on
    share = tl.cdiv(tl.cdiv(end, PARTS), WIDTH) * WIDTH
    begin = part * share
    stop = tl.minimum(begin + share, end)

    row = tl.arange(0, ROWS)
    query = first + row // GROUP
    real = (row < QUERIES * GROUP) & (query < count)
    token = (start + query).to(tl.int64)
    query_head = head * GROUP + row % GROUP
    column = tl.arange(0, SIZE_TILE)
    inside = column < SIZE
    q_at = q_ptr + token[:, None] * q_t + query_head[:, None].to(tl.int64) * q_h + column[None, :]
    q = tl.load(q_at, mask=real[:, None] & inside[None, :], other=0.0)
    keys_ptr += head.to(tl.int64) * keys_h
    values_ptr += head.to(tl.int64) * values_h
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_width

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, SIZE_TILE], tl.float32)
    for low in range(begin, stop, WIDTH):
        position = low + tl.arange(0, WIDTH)
        written = position < stop
        block = tl.load(table_ptr + position // SLOTS, mask=written, other=0).to(tl.int64)
        slot = (position % SLOTS).to(tl.int64)
        k_at = keys_ptr + (block * keys_p + slot * keys_s)[None, :] + column[:, None]
        k = tl.load(k_at, mask=written[None, :] & inside[:, None], other=0.0)
        scores = product(q, k) * scale
        seen = written[None, :] & (position[None, :] <= (cached + query)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
        faded = tl.exp2(peak - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * faded + tl.sum(weights, 1)
        v_at = values_ptr + (block * values_p + slot * values_s)[:, None] + column[None, :]
        v = tl.load(v_at, mask=written[:, None] & inside[None, :], other=0.0)
        mixed = mixed * faded[:, None] + product(narrow(weights, v.dtype), v)
        peak = higher

    place = token * HEADS + query_head
    stored = real[:, None] & inside[None, :]
    if PARTS == 1:
        out = mixed / tl.where(real, total, 1.0)[:, None]
        tl.store(out_ptr + place[:, None] * SIZE + column[None, :], narrow(out, out_ptr.dtype.element_ty), mask=stored)
    else:
        place = place * PARTS + part
        tl.store(parts_ptr + place[:, None] * SIZE + column[None, :], mixed, mask=stored)
        tl.store(peaks_ptr + place, peak, mask=real)
        tl.store(sums_ptr + place, total, mask=real)


@triton.jit
def _join(
    out_ptr, parts_ptr, peaks_ptr, sums_ptr, PARTS: tl.constexpr, SIZE: tl.constexpr, SIZE_TILE: tl.constexpr
):  # fmt: skip
    """The attention of one token's head from that to each part of the keys; a part may be empty."""
    place = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    column = tl.arange(0, SIZE_TILE)
    peaks = tl.load(peaks_ptr + place * PARTS + part)
    weights = tl.exp2(peaks - tl.max(peaks, 0))
    total = tl.sum(weights * tl.load(sums_ptr + place * PARTS + part), 0)
    at = parts_ptr + (place * PARTS + part)[:, None] * SIZE + column[None, :]
    mixed = tl.load(at, mask=(column < SIZE)[None, :], other=0.0)
    out = tl.sum(weights[:, None] * mixed, 0) / total
    tl.store(out_ptr + place * SIZE + column, narrow(out, out_ptr.dtype.element_ty), mask=column < SIZE)


def paged_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, sequences: PagedSequences
) -> Tensor:
    """Tensors on one device, of one dtype (float32, float16, bfloat16), without gaps in the last dimension."""
    out_TND = q_TND.new_empty(q_TND.shape)
    if len(q_TND):
        _cache(k_TKD, v_TKD, keys_PSKD, values_PSKD, sequences.slots)
        _attention(out_TND, q_TND, keys_PSKD, values_PSKD, sequences)
    return out_TND


def _cache(k_TKD: Tensor, v_TKD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, slots_T: Tensor) -> None:
    tokens, heads, size = k_TKD.shape
    _write[(min(tokens, WRITERS),)](
        k_TKD, v_TKD, keys_PSKD, values_PSKD, slots_T, tokens,
        *k_TKD.stride()[:2], *v_TKD.stride()[:2], *keys_PSKD.stride()[:3], *values_PSKD.stride()[:3],
        ROUNDS=triton.cdiv(tokens, WRITERS), SLOTS=keys_PSKD.shape[1],
        HEADS=heads, HEADS_TILE=triton.next_power_of_2(heads),
        SIZE=size, SIZE_TILE=triton.next_power_of_2(size),
        num_warps=4, **FUSED,
    )  # fmt: skip


def _attention(
    out_TND: Tensor, q_TND: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, sequences: PagedSequences
) -> None:
    (tokens, query_heads, size), (_, slots, heads, _) = q_TND.shape, keys_PSKD.shape
    group, batch = query_heads // heads, len(sequences.lengths)
    single = sequences.longest_query == 1
    rows, width, size_tile = tiles(q_TND.dtype, size, group, sequences.longest_query)
    queries = 1 if single else rows // group
    count = batch if single else tokens // queries + batch
    tables_BM = sequences.tables.contiguous()
    parts = parts_of(count * heads, tables_BM.shape[1] * slots, _units(q_TND.device))
    sums_TNC = peaks_TNC = mixed_TNCD = out_TND  # unused with one part
    if parts > 1:
        peaks_TNC, sums_TNC = q_TND.new_empty(2, tokens, query_heads, parts, dtype=torch.float32)
        mixed_TNCD = q_TND.new_empty(tokens, query_heads, parts, size, dtype=torch.float32)
    _attend[(heads, count, parts)](
        out_TND, mixed_TNCD, peaks_TNC, sums_TNC, q_TND, keys_PSKD, values_PSKD,
        tables_BM, sequences.lengths, sequences.starts, batch, tables_BM.shape[1], math.log2(math.e) * size**-0.5,
        *q_TND.stride()[:2], *keys_PSKD.stride()[:3], *values_PSKD.stride()[:3],
        ONE_QUERY=single, QUERIES=queries, GROUP=group, ROWS=rows, WIDTH=width,
        SLOTS=slots, HEADS=query_heads, SIZE=size, SIZE_TILE=size_tile, PARTS=parts,
        num_warps=4, num_stages=2, **FUSED,
    )  # fmt: skip
    if parts > 1:
        _join[(tokens * query_heads,)](
            out_TND, mixed_TNCD, peaks_TNC, sums_TNC, PARTS=parts, SIZE=size, SIZE_TILE=size_tile,
            num_warps=2, **FUSED,
        )  # fmt: skip


def tiles(dtype: torch.dtype, size: int, group: int, longest_query: int) -> tuple[int, int, int]:
    """Rows, keys and columns of a program's tile, powers of two of at least 16, which matrix units want."""
    size_tile = max(16, triton.next_power_of_2(size))
    exact = dtype == torch.float32  # products without matrix units, which keep more in registers
    wanted = min(triton.next_power_of_2(group * longest_query), 16 if exact else 64)
    rows = max(16, triton.next_power_of_2(group), wanted)
    fitting = TILE_BYTES // (2 if exact else 1) // (size_tile * dtype.itemsize)
    width = max(16, min(fitting, 64 if rows > 32 else 128))
    return rows, width, size_tile


def parts_of(programs: int, most_keys: int, units: int) -> int:
    """How many parts to take keys in so that all ``units`` of a device have work, a power of two."""
    wanted = min(PROGRAMS_PER_UNIT * units // programs, most_keys // LEAST_KEYS, MOST_PARTS)
    return 1 << max(wanted, 1).bit_length() - 1


@functools.cache
def _units(device: torch.device) -> int:
    """Multiprocessors of a GPU; what runs on the host, under Triton's interpreter, acts as a small one."""
    if device.type == "cpu":
        return 4
    return torch.get_device_module(device).get_device_properties(device).multi_processor_count
