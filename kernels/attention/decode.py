"""Attention over a key/value cache in Triton: append, attend in splits (Dao et al. 2023, "Flash-Decoding"), combine.

Decoding reads the whole cache for a handful of queries, so its time is that of the reading. What counts is that each key is
read once and that enough programs read at the same time:

    _append    writes the new keys, turned, and values into the cache, and the turned queries into a buffer
    _decode    one program takes one part ("split") of the keys of one key/value head. All queries of the heads that share
               these keys are the rows of one tile, so that a key is loaded once for all of them.
    _combine   adds the splits up, each weighted by exp(its log-sum-exp)

With one split `_decode` writes the result and `_combine` does not run. Offsets into a cache are 64-bit.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import GRID_X, architecture, cdiv, device_of, grid_x, multiprocessors
from .config import padded
from .forward import NO_LIMIT, contiguous_rows, exponent_factor, strides
from .kvcache import MAX_SPLITS, CacheInputs
from .tile import _tanh

# --- append ---------------------------------------------------------------------------------------------------------


@triton.jit
def _turned(x, X, Cos, Sin, position, inside, d, n_positions, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """x (rows, dims), loaded from the pointers X of its rows, with each of its pairs turned by the angle of its position."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    if INTERLEAVED:
        pair, first, partner = d // 2, d % 2 == 0, d ^ 1
    else:
        pair, first, partner = d % HALF, d < HALF, (d + HALF) % ROTARY_DIM
    turns = inside[:, None] & (d < ROTARY_DIM)[None, :]
    known = turns & ((position >= 0) & (position < n_positions))[:, None]  # a position beyond the table does not turn
    angle = position.to(tl.int64)[:, None] * HALF + pair[None, :]
    cos = tl.load(Cos + angle, mask=known, other=1.0).to(tl.float32)
    sin = tl.load(Sin + angle, mask=known, other=0.0).to(tl.float32)
    other = tl.load(X[:, None] + partner[None, :], mask=turns, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    turned = tl.where(first[None, :], wide * cos - other * sin, wide * cos + other * sin)
    return tl.where(turns, turned.to(x.dtype), x)


# Lengths, counts and strides of small tensors change from call to call and from model to model: none is worth a compilation.
_CHANGING = (
    "seqlen", "n_new", "capacity", "n_q", "n_blocks", "n_positions", "n_parts", "n_splits", "n_rows", "n_tiles", "batch",
    "heads", "group", "groups", "left", "right", "stride_table", "stride_slope",
)  # fmt: skip


@triton.jit(do_not_specialize=_CHANGING)
def _append(
    Q,
    K,
    V,
    QTurned,
    KCache,
    VCache,
    Cos,
    Sin,
    Seqlens,
    BatchIdx,
    Table,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_kcb,
    stride_kcs,
    stride_kch,
    stride_vcb,
    stride_vcs,
    stride_vch,
    stride_table,
    seqlen,
    capacity,
    n_q,
    n_new,
    n_blocks,
    n_parts,
    heads,
    groups,
    n_positions,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ADVANCES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (b, block of positions, one of the n_parts: a head of k, then of v, then of q). A sequence of negative length is
    idle: nothing of it is written."""
    head, block = tl.program_id(0) % n_parts, tl.program_id(0) // n_parts % n_blocks
    b = tl.program_id(0) // n_parts // n_blocks
    b64 = b.to(tl.int64)
    i = block * BLOCK_S + tl.arange(0, BLOCK_S)
    i64 = i.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    start = seqlen
    if Seqlens is not None:
        start = tl.load(Seqlens + b)
    if head >= 2 * groups:
        if Cos is not None:  # always so in such a program, but what follows cannot be compiled without
            h = (head - 2 * groups).to(tl.int64)
            inside = i < n_q
            ok = inside[:, None] & (d < D)[None, :]
            rows = Q + b64 * stride_qb + h * stride_qh + i64 * stride_qs
            q = tl.load(rows[:, None] + d[None, :], mask=ok, other=0.0)
            position = start + (i if ADVANCES else i * 0)
            q = _turned(q, rows, Cos, Sin, position, inside, d, n_positions, ROTARY_DIM, INTERLEAVED)
            out = QTurned + ((b64 * n_q + i64) * heads + h) * D
            tl.store(out[:, None] + d[None, :], q, mask=ok)
    else:
        position = start + i
        inside = (i < n_new) & (position < capacity) & (start >= 0)
        if Table is not None:
            page = tl.load(Table + b64 * stride_table + position // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
            slot = (position % PAGE_SIZE).to(tl.int64)
        else:
            page = b64 + i64 * 0
            if BatchIdx is not None:
                page = tl.load(BatchIdx + b).to(tl.int64) + i64 * 0
            slot = position.to(tl.int64)
        if head < groups:
            g = head.to(tl.int64)
            ok = inside[:, None] & (d < D)[None, :]
            rows = K + b64 * stride_kb + g * stride_kh + i64 * stride_ks
            k = tl.load(rows[:, None] + d[None, :], mask=ok, other=0.0)
            if Cos is not None:
                k = _turned(k, rows, Cos, Sin, position, inside, d, n_positions, ROTARY_DIM, INTERLEAVED)
            cache = KCache + page * stride_kcb + slot * stride_kcs + g * stride_kch
            tl.store(cache[:, None] + d[None, :], k, mask=ok)
        else:
            g = (head - groups).to(tl.int64)
            ok = inside[:, None] & (d < DV)[None, :]
            rows = V + b64 * stride_vb + g * stride_vh + i64 * stride_vs
            cache = VCache + page * stride_vcb + slot * stride_vcs + g * stride_vch
            tl.store(cache[:, None] + d[None, :], tl.load(rows[:, None] + d[None, :], mask=ok, other=0.0), mask=ok)


# --- attend ---------------------------------------------------------------------------------------------------------


@triton.jit
def _load(pointers, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile, with 0 where rows (n, 1) or columns (1, m) are False; no mask where none is needed."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, mask=rows & columns, other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=rows, other=0.0)
    elif MASK_COLUMNS:
        return tl.load(pointers, mask=columns, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _attend(
    acc,
    row_max,
    row_sum,
    q,
    q_rows,
    K,
    V,
    table,
    stride_kb,
    stride_ks,
    stride_vb,
    stride_vs,
    first,
    last,
    n_keys,
    row_low,
    row_high,
    row_position,
    slope,
    scale,
    softcap,
    factor,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(acc, row_max, row_sum) after the blocks of keys from first to last. Row r sees the keys row_low[r] .. row_high[r];
    without MASKED, all of the block. row_max is in units of log 2, scores are natural where softcap or slopes change them.
    A head_dim above BLOCK_D is multiplied BLOCK_D numbers at a time, and the queries come from their pointers q_rows."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for j0 in tl.range(first, last, BLOCK_N):
        j = j0 + n
        exists = j < n_keys
        if table is not None:
            page = tl.load(table + j // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
            slot = (j % PAGE_SIZE).to(tl.int64)
            k_rows, v_rows = page * stride_kb + slot * stride_ks, page * stride_vb + slot * stride_vs
        else:
            k_rows, v_rows = j.to(tl.int64) * stride_ks, j.to(tl.int64) * stride_vs
        if D > BLOCK_D:
            s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for d0 in tl.static_range(0, D, BLOCK_D):
                part = d0 + d
                q_part = _load(q_rows[:, None] + part[None, :], (part < D)[None, :], True, D % BLOCK_D != 0, False)
                k = _load(K + k_rows[None, :] + part[:, None], (part < D)[:, None], exists[None, :], D % BLOCK_D != 0, MASKED)
                s = tl.dot(q_part, k, s, input_precision="ieee")
        else:
            k = _load(K + k_rows[None, :] + d[:, None], (d < D)[:, None], exists[None, :], D != BLOCK_D, MASKED)
            s = tl.dot(q, k, input_precision="ieee")  # (rows, keys)
        if SOFTCAP:
            s = _tanh(s * (scale / softcap)) * softcap
        elif slope is not None:
            s = s * scale
        if slope is not None:
            s -= slope[:, None] * tl.abs(row_position[:, None] - j[None, :]).to(tl.float32)
        if MASKED:
            s = tl.where((j[None, :] >= row_low[:, None]) & (j[None, :] < row_high[:, None]), s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
        safe_max = new_max
        if MASKED:  # a row that has not seen a key yet: -inf - -inf would be NaN
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s * factor - safe_max[:, None])
        shrink = tl.exp2(row_max - safe_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        row_max = new_max
        v = _load(V + v_rows[:, None] + dv[None, :], exists[:, None], (dv < DV)[None, :], MASKED, DV != BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def _with_sink(row_max, row_sum, sink):
    """(factor for the sum so far, row_max, row_sum) with one more logit."""
    new_max = tl.maximum(row_max, sink * 1.4426950408889634)
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = tl.exp2(row_max - safe_max)
    return shrink, new_max, row_sum * shrink + tl.exp2(sink * 1.4426950408889634 - safe_max)


@triton.jit(do_not_specialize=_CHANGING)
def _decode(
    Q,
    K,
    V,
    Out,
    Lse,
    Seqlens,
    BatchIdx,
    Leftpad,
    Table,
    Slopes,
    Sinks,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_table,
    stride_slope,
    seqlen,
    n_new,
    capacity,
    n_q,
    heads,
    group,
    groups,
    n_tiles,
    batch,
    left,
    right,
    scale,
    softcap,
    factor,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Program (b, g and tile of rows; split). Row r of a key/value head is query r // group of its head r % group.

    SPLITS: Out (splits, B, S, H, DV) and Lse (splits, B, H, S), base 2, of this split's keys; otherwise the results.
    """
    tile, split, n_splits = tl.program_id(0) % n_tiles, tl.program_id(1), tl.num_programs(1)
    g, b = tl.program_id(0) // n_tiles % groups, tl.program_id(0) // n_tiles // groups
    b64, g64 = b.to(tl.int64), g.to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = rows // group
    h = g * group + rows % group
    real = i < n_q
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    start = seqlen
    if Seqlens is not None:
        start = tl.load(Seqlens + b)
    n_keys = tl.where(start < 0, 0, tl.minimum(start + n_new, capacity))
    n_pad = n_keys * 0
    if Leftpad is not None:
        n_pad = tl.load(Leftpad + b)

    # Row r sees keys row_low .. row_high, the tile keys low .. high, and all of its rows keys full_low .. full_high.
    diagonal = n_keys - n_q
    i_first = tile * BLOCK_M // group
    i_last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // group, n_q - 1)
    row_low = tl.maximum(i + diagonal - left, n_pad)
    row_high = tl.minimum(i + diagonal + right + 1, n_keys)
    low, full_low = tl.maximum(i_first + diagonal - left, n_pad), tl.maximum(i_last + diagonal - left, n_pad)
    high, full_high = tl.minimum(i_last + diagonal + right + 1, n_keys), tl.minimum(i_first + diagonal + right + 1, n_keys)

    per_split = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_N), n_splits) * BLOCK_N
    first = low + split * per_split
    last = tl.minimum(high, first + per_split)
    full_first = first
    if LEFT:
        full_first = tl.minimum(first + tl.cdiv(tl.maximum(full_low - first, 0), BLOCK_N) * BLOCK_N, last)
    full_last = full_first + tl.maximum(tl.minimum(full_high, last) - full_first, 0) // BLOCK_N * BLOCK_N

    q_rows = Q + b64 * stride_qb + i.to(tl.int64) * stride_qs + h.to(tl.int64) * stride_qh
    if D > BLOCK_D:
        q = None
        q_rows = tl.where(real, q_rows, Q)  # what the rows behind the last give is not stored, but must not be read
    else:
        q = tl.load(q_rows[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    slope = tl.load(Slopes + b64 * stride_slope + h, mask=real, other=0.0) if Slopes is not None else None
    K += g64 * stride_kh
    V += g64 * stride_vh
    table = Table
    if Table is not None:
        table = Table + b64 * stride_table
    else:
        row = b64
        if BatchIdx is not None:
            row = tl.load(BatchIdx + b).to(tl.int64)
        K += row * stride_kb
        V += row * stride_vb

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if LEFT:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, q_rows, K, V, table, stride_kb, stride_ks, stride_vb, stride_vs, first, full_first,
            n_keys, row_low, row_high, i + diagonal, slope, scale, softcap, factor,
            D, DV, PAGE_SIZE, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, q_rows, K, V, table, stride_kb, stride_ks, stride_vb, stride_vs, full_first, full_last,
        n_keys, row_low, row_high, i + diagonal, slope, scale, softcap, factor,
        D, DV, PAGE_SIZE, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, q_rows, K, V, table, stride_kb, stride_ks, stride_vb, stride_vs, full_last, last,
        n_keys, row_low, row_high, i + diagonal, slope, scale, softcap, factor,
        D, DV, PAGE_SIZE, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip

    if not SPLITS and Sinks is not None:
        shrink, row_max, row_sum = _with_sink(row_max, row_sum, tl.load(Sinks + h, mask=real, other=0.0))
        acc = acc * shrink[:, None]
    safe_sum = tl.where(row_sum == 0, 1.0, row_sum)
    acc = acc / safe_sum[:, None]
    lse = tl.where(row_sum == 0, float("-inf"), row_max + tl.log2(safe_sum))
    if not SPLITS:
        lse = lse * 0.6931471805599453
    part = split.to(tl.int64) * batch + b64
    tl.store(Lse + (part * heads + h) * n_q + i, lse, mask=real)
    out = Out + ((part * n_q + i) * heads + h) * DV
    tl.store(out[:, None] + dv[None, :], acc.to(Out.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])


# --- combine --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_CHANGING)
def _combine(
    Parts,
    PartLse,
    Out,
    Lse,
    Sinks,
    n_splits,
    n_rows,
    n_q,
    heads,
    DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Program: one query of one head. out = sum_s 2^(lse_s - lse) out_s, and the sink joins the sum here, once."""
    row = tl.program_id(0).to(tl.int64)  # of (B, S, H)
    h = row % heads
    lse_row = (row // heads // n_q * heads + h) * n_q + row // heads % n_q  # of (B, H, S)
    dv = tl.arange(0, BLOCK_DV)
    s = tl.arange(0, BLOCK_SPLITS)

    top = tl.full((), float("-inf"), tl.float32)
    for s0 in range(0, n_splits, BLOCK_SPLITS):
        lse = tl.load(PartLse + (s0 + s).to(tl.int64) * n_rows + lse_row, mask=s0 + s < n_splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(lse, 0))
    safe_top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for s0 in range(0, n_splits, BLOCK_SPLITS):
        part = (s0 + s).to(tl.int64) * n_rows
        lse = tl.load(PartLse + part + lse_row, mask=s0 + s < n_splits, other=float("-inf"))
        weight = tl.exp2(lse - safe_top)
        ok = (weight > 0)[:, None] & (dv < DV)[None, :]
        out = tl.load(Parts + ((part + row) * DV)[:, None] + dv[None, :], mask=ok, other=0.0)
        acc += tl.sum(out * weight[:, None], 0)
        total += tl.sum(weight, 0)
    if Sinks is not None:
        shrink, top, total = _with_sink(top, total, tl.load(Sinks + h))
        acc = acc * shrink
    safe_total = tl.where(total == 0, 1.0, total)
    lse = tl.where(total == 0, float("-inf"), top + tl.log2(safe_total))
    tl.store(Out + row * DV + dv, (acc / safe_total).to(Out.dtype.element_ty), mask=dv < DV)
    tl.store(Lse + lse_row, lse * 0.6931471805599453)


# --- launch ---------------------------------------------------------------------------------------------------------


def config(arch: int, head_dim: int, dtype: torch.dtype, n_rows: int, paged: bool) -> dict[str, int]:
    """Block sizes of `_decode` for the larger head_dim of q and v and n_rows queries per key/value head.

    A block of keys or values is 16 KiB, so that three stages of both fit the shared memory of every architecture; half of it
    beside 64 rows or for float32, where registers would spill. Page numbers are one more load, which the pages wait for: two
    more stages keep as many pages in flight.
    """
    if arch == 0:  # the interpreter: small tiles, so that tests cross their borders
        return {"BLOCK_M": min(32, padded(n_rows)), "BLOCK_N": 16, "num_warps": 1, "num_stages": 1}
    wide, row = dtype == torch.float32, padded(head_dim) * dtype.itemsize
    if head_dim > 256:  # 16 keys a block, and queries as many as leave room for whole rows of the output
        small = head_dim * dtype.itemsize <= 1152  # to 576 in 16 bits
        block_m = 32 if small and n_rows > 16 else 16
        stages = (2 if block_m == 32 else 3) if small else 1
        return {"BLOCK_M": block_m, "BLOCK_N": 16, "num_warps": block_m // 4, "num_stages": stages}
    block_m = 16 if wide else min(64 if head_dim <= 128 else 32, padded(n_rows))
    block_n = max(16, min(128, (8192 if wide or block_m == 64 else 16384) // row))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 5 if paged and not wide else 3}


# Shared memory of a multiprocessor, KiB: CUDA C++ programming guide, "Technical specifications per compute capability".
_SHARED = {80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 120: 100}


def resident(arch: int, block_m: int, block_n: int, width: int, dtype: torch.dtype) -> int:
    """How many blocks of `_decode` a multiprocessor runs at a time; width is head_dim of q and v together. Two tiles of keys
    and of values are in flight, beside the queries and their weights; CUDA and Triton take a KiB each. Registers allow three
    blocks."""
    block = (2 * block_n * width + block_m * (width // 2 + block_n)) * dtype.itemsize + 2048
    shared = _SHARED[max((known for known in _SHARED if known <= arch), default=90)]
    return max(1, min(3, shared * 1024 // block))


@functools.lru_cache(4096)
def splits_for(programs: int, blocks: int, slots: int) -> int:
    """Into how many parts to divide `blocks` blocks of keys when `programs` programs have them all to read, on a device
    that runs `slots` at a time: the least time, counted in blocks read one after the other."""

    def time(splits: int) -> int:
        start, combine = 2, 0 if splits == 1 else 4
        return -(-programs * splits // slots) * (-(-blocks // splits) + start) + combine

    return min(range(1, max(1, min(blocks, MAX_SPLITS)) + 1), key=time)


_VECTORS = ("rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "alibi_slopes", "s_aux")


def _dense_vectors(x: CacheInputs) -> CacheInputs:
    """The same problem with its small tensors as the kernels read them."""
    copies: dict[str, Any] = {name: tensor.contiguous() for name in _VECTORS if (tensor := getattr(x, name)) is not None}
    if x.block_table is not None:
        copies["block_table"] = contiguous_rows(x.block_table)
    return replace(x, **copies) if any(getattr(x, name) is not copy for name, copy in copies.items()) else x


def forward(x: CacheInputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked problem; writes into the caches; launches on the current stream of q's device."""
    out, lse = x.empty()
    with device_of(x.q):
        x = _dense_vectors(x)
        q = _launch_append(x)
        if lse.numel() > 0:
            _launch_decode(x, q, out, lse)
    return out, lse


def _launch_append(x: CacheInputs) -> Tensor:
    """The queries to attend with. Nothing is launched where there is nothing to write."""
    q, (batch, n_q, heads, dim), groups = contiguous_rows(x.q), x.q.shape, x.k_cache.shape[2]
    turns = x.rotary_cos is not None
    longest = max(x.n_new, n_q) if turns else x.n_new
    if x.k is None or x.v is None or batch * longest * groups == 0:
        return q
    k, v, table, cos, sin = contiguous_rows(x.k), contiguous_rows(x.v), x.block_table, x.rotary_cos, x.rotary_sin
    turned = torch.empty_like(q, memory_format=torch.contiguous_format) if turns else None
    block_s = 1 if longest == 1 else 16  # two kernels, one for a single new token
    n_blocks, n_parts = cdiv(longest, block_s), 2 * groups + (heads if turns else 0)
    _append[grid_x(batch * n_blocks * n_parts)](
        q, k, v, turned, x.k_cache, x.v_cache, cos, sin, x.cache_seqlens, x.cache_batch_idx, table,
        *strides(q), *strides(k), *strides(v), *strides(x.k_cache), *strides(x.v_cache),
        0 if table is None else table.stride(0), x.start, x.capacity, n_q, x.n_new, n_blocks, n_parts, heads, groups,
        0 if cos is None else cos.shape[0], D=dim, DV=v.shape[3], ROTARY_DIM=0 if cos is None else 2 * cos.shape[1],
        INTERLEAVED=x.rotary_interleaved, ADVANCES=x.advances,
        PAGE_SIZE=0 if table is None else x.k_cache.shape[1], BLOCK_S=block_s, BLOCK_D=padded(max(dim, v.shape[3])),
        num_warps=4 if block_s > 4 else 1,
    )  # fmt: skip
    return q if turned is None else turned


def _launch_decode(x: CacheInputs, q: Tensor, out: Tensor, lse: Tensor) -> None:
    (batch, n_q, heads, dim), groups, dim_v = q.shape, x.k_cache.shape[2], x.v_cache.shape[3]
    table = x.block_table
    n_rows = heads // groups * n_q
    arch = architecture(q.device)
    blocks = config(arch, max(dim, dim_v), q.dtype, n_rows, table is not None)
    n_tiles = cdiv(n_rows, blocks["BLOCK_M"])
    programs = batch * groups * n_tiles
    # The most keys a tile can see, as far as is known without asking the device.
    n_keys = x.capacity if x.cache_seqlens is not None else x.start + x.n_new
    if x.window_left >= 0:
        n_keys = min(n_keys, x.window_left + (n_q if x.window_right < 0 else x.window_right + blocks["BLOCK_M"]))
    slots = multiprocessors(q.device) * resident(
        arch, blocks["BLOCK_M"], blocks["BLOCK_N"], padded(dim) + padded(dim_v), q.dtype
    )
    splits = x.num_splits or splits_for(programs, cdiv(n_keys, blocks["BLOCK_N"]), slots)
    if lse.numel() > GRID_X:  # more rows than `_combine` can have programs: there is enough to do without splits
        splits = 1
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
    plain = x.softcap == 0 and x.alibi_slopes is None
    _decode[(*grid_x(programs), splits)](
        q, x.k_cache, x.v_cache, part, part_lse, x.cache_seqlens, x.cache_batch_idx, x.cache_leftpad, table,
        x.alibi_slopes, x.s_aux, *strides(q), *strides(x.k_cache), *strides(x.v_cache),
        0 if table is None else table.stride(0),
        heads if x.alibi_slopes is not None and x.alibi_slopes.dim() == 2 else 0,
        x.start, x.n_new, x.capacity, n_q, heads, heads // groups, groups, n_tiles, batch,
        *(min(n, NO_LIMIT) if n >= 0 else NO_LIMIT for n in (x.window_left, x.window_right)),
        x.softmax_scale, x.softcap, exponent_factor(x.softmax_scale, plain),
        D=dim, DV=dim_v, PAGE_SIZE=0 if table is None else x.k_cache.shape[1],
        LEFT=x.window_left >= 0, SOFTCAP=x.softcap > 0, SPLITS=splits > 1,
        BLOCK_D=padded(dim) if dim <= 256 else 64, BLOCK_DV=padded(dim_v), **blocks,
    )  # fmt: skip
    if splits > 1:
        _combine[grid_x(lse.numel())](
            part, part_lse, out, lse, x.s_aux, splits, lse.numel(), n_q, heads,
            DV=dim_v, BLOCK_SPLITS=16, BLOCK_DV=padded(dim_v), num_warps=4,
        )  # fmt: skip


__all__ = ["config", "forward", "splits_for"]
