"""Flash attention backward in Triton (Dao 2023, algorithm 2): the weights are recomputed from lse, tile by tile.

One pass over keys per tile of queries gives dQ (and delta = rowsum(dO * O) - dlse, which the second pass reads), one pass over
queries per tile of keys gives dK and dV, summed over the query heads that share them. A third kernel gives the gradient of an
additive bias, and only where one is wanted. Every sum has one owner and one order: the result is the same in every run.

    p = exp(s - lse)   dv = p^T dO   ds = p * (dO v^T - delta)   dq = scale * ds k   dk = scale * ds^T q   dbias = ds
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, device_of, grid_x
from . import config
from .forward import (
    block_lists,
    broadcast,
    constants,
    contiguous_rows,
    dense_vectors,
    launch_clear_tails,
    lse_strides,
    numbers,
    slope_stride,
    strides,
    strides4,
)
from .reference import Inputs
from .tile import (
    CHANGING,
    kept_by_dropout,
    load_tile,
    modified_scores,
    nth_masked,
    of_head,
    product,
    seen,
    sequence,
    sixteens,
    tile_range,
    used,
    work_item,
)


@triton.jit
def _top(lse, BIAS: tl.constexpr):
    """lse as it enters the exponent (see tile.py). A row without keys has lse -inf: any finite number gives it the weights 0
    that its scores of -inf ask for."""
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    return lse if BIAS else lse * 1.4426950408889634


@triton.jit(do_not_specialize=CHANGING)
def _dq(
    Q,
    K,
    V,
    Out,
    DOut,
    Lse,
    DLse,
    Delta,
    Inverse,
    DQ,
    Bias,
    Mask,
    Slopes,
    Sinks,
    CuQ,
    CuK,
    UsedK,
    Seed,
    Index,
    Count,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_dob,
    stride_dos,
    stride_doh,
    stride_dqb,
    stride_dqs,
    stride_dqh,
    stride_lb,
    stride_lh,
    stride_bias_b,
    stride_bias_h,
    stride_bias_s,
    stride_bias_t,
    stride_mask_b,
    stride_mask_h,
    stride_mask_s,
    stride_mask_t,
    stride_slope_b,
    stride_index_b,
    stride_index_h,
    index_end,
    heads,
    group,
    n_q,
    n_k,
    n_tiles,
    n_work,
    section,
    n_heads,
    factor,
    scale,
    softcap,
    left,
    right,
    threshold,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    VARLEN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    FAR: tl.constexpr,
    PERSISTENT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    if ALIGNED:
        n_k = sixteens(n_k)
    PARTS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D  # as in the forward; here of a row of dQ
    program = tl.program_id(0)
    for work in range(program, n_work if PERSISTENT else program + 1, tl.num_programs(0) if PERSISTENT else 1):
        tile, b, h = work_item(work // PARTS, n_tiles, heads, group, section, n_heads, RIGHT)
        q_start, sq = sequence(b, n_q, CuQ, None, VARLEN)
        k_start, sk = sequence(b, n_k, CuK, UsedK, VARLEN)
        i0 = tile * BLOCK_M
        if i0 < sq:
            diagonal = 0 if TOP_LEFT else sk - sq
            i = i0 + tl.arange(0, BLOCK_M)
            first_d = work % PARTS * BLOCK_D
            d = first_d + tl.arange(0, BLOCK_D)
            dv = tl.arange(0, BLOCK_DV)
            columns = tl.arange(0, BLOCK_N)
            b64, h64 = b.to(tl.int64), h.to(tl.int64)
            g64 = (h // group).to(tl.int64)
            token = q_start + i.to(tl.int64)
            rows = (i < sq)[:, None]
            q_mask, o_mask = rows & (d < D)[None, :], rows & (dv < DV)[None, :]
            if CHUNK:
                q_base = Q + b64 * stride_qb + h64 * stride_qh + q_start * stride_qs
                o_base = Out + b64 * stride_ob + h64 * stride_oh + q_start * stride_os
                do_base = DOut + b64 * stride_dob + h64 * stride_doh + q_start * stride_dos
                delta = tl.zeros((BLOCK_M,), tl.float32)
                for c0 in tl.range(0, DV, CHUNK):
                    do = load_tile(do_base, i0, stride_dos, sq, DV, BLOCK_M, CHUNK, True, False, FAR, c0)
                    out = load_tile(o_base, i0, stride_os, sq, DV, BLOCK_M, CHUNK, True, False, FAR, c0)
                    delta += tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
            else:
                q_ptrs = Q + b64 * stride_qb + h64 * stride_qh + token[:, None] * stride_qs + d[None, :]
                q = tl.load(q_ptrs, mask=q_mask, other=0.0)
                o_ptrs = Out + b64 * stride_ob + h64 * stride_oh + token[:, None] * stride_os + dv[None, :]
                do_ptrs = DOut + b64 * stride_dob + h64 * stride_doh + token[:, None] * stride_dos + dv[None, :]
                do = tl.load(do_ptrs, mask=o_mask, other=0.0)
                out = tl.load(o_ptrs, mask=o_mask, other=0.0)
                delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
            row_ptrs = b64 * stride_lb + h64 * stride_lh + token
            if DLse is not None:
                delta -= tl.load(DLse + row_ptrs, mask=i < sq, other=0.0)
            tl.store(Delta + row_ptrs, delta, mask=i < sq)
            lse = _top(tl.load(Lse + row_ptrs, mask=i < sq, other=0.0), Bias is not None)

            if not TMA:
                k_base = K + b64 * stride_kb + g64 * stride_kh + k_start * stride_kt
                v_base = V + b64 * stride_vb + g64 * stride_vh + k_start * stride_vt
            bias = of_head(Bias, b64, h64, stride_bias_b, stride_bias_h, ALIGNED) if Bias is not None else None
            mask = of_head(Mask, b64, h64, stride_mask_b, stride_mask_h, ALIGNED) if Mask is not None else None
            slope = tl.load(Slopes + b64 * stride_slope_b + h) if Slopes is not None else None
            seed_key = tl.load(Seed) if DROPOUT else 0
            seed_counter = tl.load(Seed + 1).to(tl.uint32) if DROPOUT else 0
            bh = (b * heads + h).to(tl.uint32)

            first, last, full_first, full_last = tile_range(
                i0, tl.minimum(i0 + BLOCK_M, sq), sk, diagonal, left, right, LEFT, RIGHT, BLOCK_N
            )
            n_full = full_last - full_first
            n_masked = last - first - n_full
            index = None
            if Index is not None:
                row = b64 * stride_index_b + h64 * stride_index_h + tile
                index = Index + row * index_end
                n_masked = tl.load(Count + row * 2)
                n_full = tl.load(Count + row * 2 + 1)

            dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            if Bias is not None:
                # A bias can put a whole row so far from 0 that lse has no digits left for the logarithm of the row's sum: what
                # exp(s - lse) then adds up to is not 1, and the weights are divided by it.
                row_sum = tl.zeros((BLOCK_M,), tl.float32)
                if Sinks is not None:
                    row_sum += tl.exp2((tl.load(Sinks + h) - lse) * 1.4426950408889634)
            for MASKED in tl.static_range(2):
                for visit in tl.range(0, n_masked if MASKED else n_full):
                    if Index is not None:
                        column_tile = tl.load(index + (visit if MASKED else index_end - 1 - visit))
                    elif MASKED:
                        column_tile = nth_masked(visit, first, full_first, full_last)
                    else:
                        column_tile = full_first + visit
                    j0 = column_tile * BLOCK_N
                    j = j0 + columns
                    if CHUNK:
                        qk = product(
                            q_base, i0, stride_qs, sq, k_base, j0, stride_kt, sk, D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, FAR
                        )
                    else:
                        if TMA:
                            k = tl.trans(tl.reshape(K.load([b, j0, h // group, 0]), (BLOCK_N, BLOCK_D)))
                            v = tl.trans(tl.reshape(V.load([b, j0, h // group, 0]), (BLOCK_N, BLOCK_DV)))
                        else:
                            k = load_tile(k_base, j0, stride_kt, sk, D, BLOCK_N, BLOCK_D, MASKED == 1, True, FAR)
                            v = load_tile(v_base, j0, stride_vt, sk, DV, BLOCK_N, BLOCK_DV, MASKED == 1, True, FAR)
                        qk = tl.dot(q, k, input_precision=PRECISION)
                    inside = (j < sk)[None, :]
                    if Bias is not None or Mask is not None:  # rows beyond the last are not stored, but must not be read
                        inside = inside & rows
                    qk, derivative = modified_scores(
                        qk, i[:, None], j[None, :], inside, diagonal, scale, softcap, slope, bias, stride_bias_s,
                        stride_bias_t, SOFTCAP,
                    )  # fmt: skip
                    p = tl.exp2((qk - lse[:, None]) * factor if Bias is not None else qk * factor - lse[:, None])
                    if MASKED:
                        keep = seen(
                            i[:, None], j[None, :], inside, diagonal, left, right, mask, stride_mask_s, stride_mask_t, LEFT,
                            RIGHT,
                        )  # fmt: skip
                        p = tl.where(keep, p, 0.0)
                    if Bias is not None:
                        row_sum += tl.sum(p, 1)
                    if CHUNK:
                        dp = product(
                            do_base, i0, stride_dos, sq, v_base, j0, stride_vt, sk, DV, BLOCK_M, BLOCK_N, CHUNK, PRECISION, FAR
                        )
                    else:
                        dp = tl.dot(do, v, input_precision=PRECISION)
                    if DROPOUT:
                        keep = kept_by_dropout(seed_key, seed_counter, bh, i0, j0, threshold, BLOCK_M, BLOCK_N)
                        dp = tl.where(keep, dp * keep_scale, 0.0)
                    ds = p * (dp - delta[:, None]) * derivative
                    if CHUNK:
                        k = load_tile(k_base, j0, stride_kt, sk, D, BLOCK_N, BLOCK_D, True, False, FAR, first_d)
                        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
                    else:
                        dq = tl.dot(ds.to(k.dtype), tl.trans(k), dq, input_precision=PRECISION)
            if Bias is not None:
                inverse = 1 / tl.where(row_sum == 0, 1.0, row_sum)
                tl.store(Inverse + row_ptrs, inverse, mask=i < sq)
                dq *= inverse[:, None]
            dq_ptrs = DQ + b64 * stride_dqb + h64 * stride_dqh + token[:, None] * stride_dqs + d[None, :]
            tl.store(dq_ptrs, (dq * scale).to(DQ.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=CHANGING)
def _dkdv(
    Q,
    K,
    V,
    DOut,
    Lse,
    Delta,
    Inverse,
    DK,
    DV_,
    Bias,
    Mask,
    Slopes,
    CuQ,
    CuK,
    UsedK,
    Seed,
    Index,
    Count,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dos,
    stride_doh,
    stride_dkb,
    stride_dkt,
    stride_dkh,
    stride_dvb,
    stride_dvt,
    stride_dvh,
    stride_lb,
    stride_lh,
    stride_bias_b,
    stride_bias_h,
    stride_bias_s,
    stride_bias_t,
    stride_mask_b,
    stride_mask_h,
    stride_mask_s,
    stride_mask_t,
    stride_slope_b,
    stride_index_b,
    stride_index_h,
    index_end,
    heads,
    group,
    n_q,
    n_k,
    n_tiles,
    n_work,
    section,
    n_heads,
    factor,
    scale,
    softcap,
    left,
    right,
    threshold,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    VARLEN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    FAR: tl.constexpr,
    PERSISTENT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Tiles are transposed here: rows are keys, columns queries."""
    if ALIGNED:
        n_k = sixteens(n_k)
    groups = heads // group
    D_PARTS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D  # as in the forward; here of a row of dK and of dV
    DV_PARTS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV
    PARTS: tl.constexpr = D_PARTS if D_PARTS > DV_PARTS else DV_PARTS
    program = tl.program_id(0)
    for work in range(program, n_work if PERSISTENT else program + 1, tl.num_programs(0) if PERSISTENT else 1):
        tile, b, g = work_item(work // PARTS, n_tiles, groups, 1, section, n_heads, False)
        q_start, sq = sequence(b, n_q, CuQ, None, VARLEN)
        k_start, sk_all = sequence(b, n_k, CuK, None, VARLEN)
        sk = sk_all
        if UsedK is not None:
            sk = used(UsedK, b, sk_all)
        j0 = tile * BLOCK_N
        if j0 < sk_all:
            diagonal = 0 if TOP_LEFT else sk - sq
            j = j0 + tl.arange(0, BLOCK_N)
            first_d, first_dv = work % PARTS * BLOCK_D, work % PARTS * BLOCK_DV
            d = first_d + tl.arange(0, BLOCK_D)
            dv = first_dv + tl.arange(0, BLOCK_DV)
            columns = tl.arange(0, BLOCK_M)
            b64, g64 = b.to(tl.int64), g.to(tl.int64)
            token = k_start + j.to(tl.int64)
            k_mask, v_mask = (j < sk)[:, None] & (d < D)[None, :], (j < sk)[:, None] & (dv < DV)[None, :]
            if CHUNK:
                k_base = K + b64 * stride_kb + g64 * stride_kh + k_start * stride_kt
                v_base = V + b64 * stride_vb + g64 * stride_vh + k_start * stride_vt
            else:
                k_ptrs = K + b64 * stride_kb + g64 * stride_kh + token[:, None] * stride_kt + d[None, :]
                v_ptrs = V + b64 * stride_vb + g64 * stride_vh + token[:, None] * stride_vt + dv[None, :]
                k = tl.load(k_ptrs, mask=k_mask, other=0.0)
                v = tl.load(v_ptrs, mask=v_mask, other=0.0)
            seed_key = tl.load(Seed) if DROPOUT else 0
            seed_counter = tl.load(Seed + 1).to(tl.uint32) if DROPOUT else 0
            first, last, full_first, full_last = tile_range(
                j0, tl.minimum(j0 + BLOCK_N, sk), sq, -diagonal, right, left, RIGHT, LEFT, BLOCK_M
            )
            if j0 >= sk:
                last, full_first, full_last = first, first, first
            dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            dvalue = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
            for h_of_group in range(0, group):
                h = g * group + h_of_group
                h64 = h.to(tl.int64)
                if not TMA:
                    q_base = Q + b64 * stride_qb + h64 * stride_qh + q_start * stride_qs
                    do_base = DOut + b64 * stride_dob + h64 * stride_doh + q_start * stride_dos
                row_base = b64 * stride_lb + h64 * stride_lh + q_start
                bias = of_head(Bias, b64, h64, stride_bias_b, stride_bias_h, ALIGNED) if Bias is not None else None
                mask = of_head(Mask, b64, h64, stride_mask_b, stride_mask_h, ALIGNED) if Mask is not None else None
                slope = tl.load(Slopes + b64 * stride_slope_b + h) if Slopes is not None else None
                bh = (b * heads + h).to(tl.uint32)
                n_full = full_last - full_first
                n_masked = last - first - n_full
                index = None
                if Index is not None:
                    row = b64 * stride_index_b + h64 * stride_index_h + tile
                    index = Index + row * index_end
                    n_masked = tl.load(Count + row * 2)
                    n_full = tl.load(Count + row * 2 + 1)
                for MASKED in tl.static_range(2):
                    for visit in tl.range(0, n_masked if MASKED else n_full):
                        if Index is not None:
                            column_tile = tl.load(index + (visit if MASKED else index_end - 1 - visit))
                        elif MASKED:
                            column_tile = nth_masked(visit, first, full_first, full_last)
                        else:
                            column_tile = full_first + visit
                        i0 = column_tile * BLOCK_M
                        i = i0 + columns
                        if TMA:
                            q = tl.trans(tl.reshape(Q.load([b, i0, h, 0]), (BLOCK_M, BLOCK_D)))
                            do = tl.reshape(DOut.load([b, i0, h, 0]), (BLOCK_M, BLOCK_DV))
                        elif not CHUNK:
                            q = load_tile(q_base, i0, stride_qs, sq, D, BLOCK_M, BLOCK_D, MASKED == 1, True, FAR)
                            do = load_tile(do_base, i0, stride_dos, sq, DV, BLOCK_M, BLOCK_DV, MASKED == 1, False, FAR)
                        if MASKED:
                            lse = tl.load(Lse + row_base + i, mask=i < sq, other=0.0)
                            delta = tl.load(Delta + row_base + i, mask=i < sq, other=0.0)
                        else:
                            lse = tl.load(Lse + row_base + i)
                            delta = tl.load(Delta + row_base + i)
                        lse = _top(lse, Bias is not None)
                        if CHUNK:
                            qk = product(
                                k_base, j0, stride_kt, sk, q_base, i0, stride_qs, sq, D, BLOCK_N, BLOCK_M, CHUNK, PRECISION, FAR
                            )
                        else:
                            qk = tl.dot(k, q, input_precision=PRECISION)
                        inside = (i < sq)[None, :]
                        if Bias is not None or Mask is not None:  # as in dq
                            inside = inside & (j < sk)[:, None]
                        qk, derivative = modified_scores(
                            qk, i[None, :], j[:, None], inside, diagonal, scale, softcap, slope, bias, stride_bias_s,
                            stride_bias_t, SOFTCAP,
                        )  # fmt: skip
                        p = tl.exp2((qk - lse[None, :]) * factor if Bias is not None else qk * factor - lse[None, :])
                        if Bias is not None:
                            p *= tl.load(Inverse + row_base + i, mask=i < sq, other=0.0)[None, :]
                        if MASKED:
                            keep = seen(
                                i[None, :], j[:, None], inside, diagonal, left, right, mask, stride_mask_s, stride_mask_t,
                                LEFT, RIGHT,
                            )  # fmt: skip
                            p = tl.where(keep, p, 0.0)
                        if CHUNK:
                            dp = product(
                                v_base, j0, stride_vt, sk, do_base, i0, stride_dos, sq, DV, BLOCK_N, BLOCK_M, CHUNK, PRECISION,
                                FAR,
                            )  # fmt: skip
                        else:
                            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                        weights = p
                        if DROPOUT:
                            kept = kept_by_dropout(seed_key, seed_counter, bh, i0, j0, threshold, BLOCK_M, BLOCK_N)
                            keep = tl.trans(kept.to(tl.int8)) != 0
                            dp = tl.where(keep, dp * keep_scale, 0.0)
                            weights = tl.where(keep, p * keep_scale, 0.0)
                        if CHUNK:
                            do = load_tile(do_base, i0, stride_dos, sq, DV, BLOCK_M, BLOCK_DV, True, False, FAR, first_dv)
                        dvalue = tl.dot(weights.to(do.dtype), do, dvalue, input_precision=PRECISION)
                        ds = p * (dp - delta[None, :]) * derivative
                        if CHUNK:
                            q = load_tile(q_base, i0, stride_qs, sq, D, BLOCK_M, BLOCK_D, True, False, FAR, first_d)
                            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
                        else:
                            dk = tl.dot(ds.to(q.dtype), tl.trans(q), dk, input_precision=PRECISION)
            rows = (j < sk_all)[:, None]
            dk_ptrs = DK + b64 * stride_dkb + g64 * stride_dkh + token[:, None] * stride_dkt + d[None, :]
            dv_ptrs = DV_ + b64 * stride_dvb + g64 * stride_dvh + token[:, None] * stride_dvt + dv[None, :]
            dk *= scale
            if UsedK is not None:  # keys that are not in use are in no score: their rows of garbage must not be stored
                dk = tl.where((j < sk)[:, None], dk, 0.0)
                dvalue = tl.where((j < sk)[:, None], dvalue, 0.0)
            tl.store(dk_ptrs, dk.to(DK.dtype.element_ty), mask=rows & (d < D)[None, :])
            tl.store(dv_ptrs, dvalue.to(DV_.dtype.element_ty), mask=rows & (dv < DV)[None, :])


@triton.jit(do_not_specialize=CHANGING)
def _dbias(
    Q,
    K,
    V,
    DOut,
    Lse,
    Delta,
    Inverse,
    DBias,
    Bias,
    Mask,
    Slopes,
    UsedK,
    Seed,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dos,
    stride_doh,
    stride_lb,
    stride_lh,
    stride_dbias_b,
    stride_dbias_h,
    stride_dbias_s,
    stride_dbias_t,
    stride_bias_b,
    stride_bias_h,
    stride_bias_s,
    stride_bias_t,
    stride_mask_b,
    stride_mask_h,
    stride_mask_s,
    stride_mask_t,
    stride_slope_b,
    batch,
    heads,
    group,
    n_q,
    n_k,
    n_q_tiles,
    n_k_tiles,
    scale,
    softcap,
    left,
    right,
    threshold,
    keep_scale,
    ONE_B: tl.constexpr,
    ONE_H: tl.constexpr,
    ONE_S: tl.constexpr,
    ONE_T: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One program per tile of the bias: it sums ds over the dimensions (ONE_*) in which the bias has size 1."""
    if ALIGNED:
        n_k = sixteens(n_k)
    t_tiles = 1 if ONE_T else n_k_tiles
    s_tiles = 1 if ONE_S else n_q_tiles
    of_t = tl.program_id(0) % t_tiles
    of_s = tl.program_id(0) // t_tiles % s_tiles
    of_bh = tl.program_id(0) // t_tiles // s_tiles
    bias_heads = 1 if ONE_H else heads
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    seed_key = tl.load(Seed) if DROPOUT else 0
    seed_counter = tl.load(Seed + 1).to(tl.uint32) if DROPOUT else 0
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_first, h_first = of_bh // bias_heads, of_bh % bias_heads
    for later_b in range(0, batch if ONE_B else 1):
        b = b_first + later_b
        sk = n_k
        if UsedK is not None:
            sk = used(UsedK, b, n_k)
        diagonal = 0 if TOP_LEFT else sk - n_q
        b64 = b.to(tl.int64)
        for later_h in range(0, heads if ONE_H else 1):
            h = h_first + later_h
            h64 = h.to(tl.int64)
            g64 = (h // group).to(tl.int64)
            slope = tl.load(Slopes + b64 * stride_slope_b + h) if Slopes is not None else None
            bias = of_head(Bias, b64, h64, stride_bias_b, stride_bias_h, ALIGNED)
            mask = of_head(Mask, b64, h64, stride_mask_b, stride_mask_h, ALIGNED) if Mask is not None else None
            bh = (b * heads + h).to(tl.uint32)
            for later_s in range(0, n_q_tiles if ONE_S else 1):
                i0 = (of_s + later_s) * BLOCK_M
                i = i0 + tl.arange(0, BLOCK_M)
                i64 = i.to(tl.int64)
                rows = (i < n_q)[:, None]
                first, last, _full_first, _full_last = tile_range(
                    i0, tl.minimum(i0 + BLOCK_M, n_q), sk, diagonal, left, right, LEFT, RIGHT, BLOCK_N
                )
                if not ONE_T:
                    first, last = tl.maximum(first, of_t), tl.minimum(last, of_t + 1)
                if CHUNK:
                    q_base, k_base = Q + b64 * stride_qb + h64 * stride_qh, K + b64 * stride_kb + g64 * stride_kh
                    do_base, v_base = DOut + b64 * stride_dob + h64 * stride_doh, V + b64 * stride_vb + g64 * stride_vh
                else:
                    q_ptrs = Q + b64 * stride_qb + h64 * stride_qh + i64[:, None] * stride_qs + d[None, :]
                    do_ptrs = DOut + b64 * stride_dob + h64 * stride_doh + i64[:, None] * stride_dos + dv[None, :]
                    q = tl.load(q_ptrs, mask=rows & (d < D)[None, :], other=0.0)
                    do = tl.load(do_ptrs, mask=rows & (dv < DV)[None, :], other=0.0)
                row_ptrs = b64 * stride_lb + h64 * stride_lh + i
                lse = _top(tl.load(Lse + row_ptrs, mask=i < n_q, other=0.0), True)
                delta = tl.load(Delta + row_ptrs, mask=i < n_q, other=0.0)
                inverse = tl.load(Inverse + row_ptrs, mask=i < n_q, other=0.0)
                for t_tile in range(first, last):
                    j0 = t_tile * BLOCK_N
                    j = j0 + tl.arange(0, BLOCK_N)
                    j64 = j.to(tl.int64)
                    if CHUNK:
                        qk = product(
                            q_base, i0, stride_qs, n_q, k_base, j0, stride_kt, sk, D, BLOCK_M, BLOCK_N, CHUNK, PRECISION, True
                        )
                        dp = product(
                            do_base, i0, stride_dos, n_q, v_base, j0, stride_vt, sk, DV, BLOCK_M, BLOCK_N, CHUNK, PRECISION,
                            True,
                        )  # fmt: skip
                    else:
                        k_ptrs = K + b64 * stride_kb + g64 * stride_kh + j64[None, :] * stride_kt + d[:, None]
                        v_ptrs = V + b64 * stride_vb + g64 * stride_vh + j64[None, :] * stride_vt + dv[:, None]
                        k = tl.load(k_ptrs, mask=(j < sk)[None, :] & (d < D)[:, None], other=0.0)
                        v = tl.load(v_ptrs, mask=(j < sk)[None, :] & (dv < DV)[:, None], other=0.0)
                        qk = tl.dot(q, k, input_precision=PRECISION)
                        dp = tl.dot(do, v, input_precision=PRECISION)
                    inside = rows & (j < sk)[None, :]
                    qk, _ = modified_scores(
                        qk, i[:, None], j[None, :], inside, diagonal, scale, softcap, slope, bias, stride_bias_s,
                        stride_bias_t, SOFTCAP,
                    )  # fmt: skip
                    keep = seen(
                        i[:, None], j[None, :], inside, diagonal, left, right, mask, stride_mask_s, stride_mask_t, LEFT, RIGHT
                    )
                    p = tl.where(keep, tl.exp2((qk - lse[:, None]) * 1.4426950408889634), 0.0) * inverse[:, None]
                    if DROPOUT:
                        kept = kept_by_dropout(seed_key, seed_counter, bh, i0, j0, threshold, BLOCK_M, BLOCK_N)
                        dp = tl.where(kept, dp * keep_scale, 0.0)
                    total += p * (dp - delta[:, None])
    dbias = of_head(DBias, b_first.to(tl.int64), h_first.to(tl.int64), stride_dbias_b, stride_dbias_h, ALIGNED and not ONE_T)
    i = of_s * BLOCK_M + tl.arange(0, BLOCK_M)
    j = of_t * BLOCK_N + tl.arange(0, BLOCK_N)
    i_ptrs = i.to(tl.int64) * stride_dbias_s
    if ONE_S and ONE_T:
        tl.store(dbias, tl.sum(tl.sum(total, 1), 0).to(DBias.dtype.element_ty))
    elif ONE_S:
        tl.store(dbias + j * stride_dbias_t, tl.sum(total, 0).to(DBias.dtype.element_ty), mask=j < n_k)
    elif ONE_T:
        tl.store(dbias + i_ptrs, tl.sum(total, 1).to(DBias.dtype.element_ty), mask=i < n_q)
    else:
        inside = (i < n_q)[:, None] & (j < n_k)[None, :]
        tl.store(dbias + i_ptrs[:, None] + j[None, :] * stride_dbias_t, total.to(DBias.dtype.element_ty), mask=inside)


# --- launch ---------------------------------------------------------------------------------------------------------


def backward(
    x: Inputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """(dq, dk, dv, dbias or None, delta) of a checked problem; dbias in the shape of x.bias, delta in that of lse: of no value
    where packed tokens lie behind the last sequence, and with a bias over what exp(s - lse) adds up to, as the sinks' gradient
    -exp(s_aux - lse) * delta needs it. Launches on the current stream of q's device."""
    with device_of(x.q):
        return _launch(dense_vectors(x), out, lse, grad_out, grad_lse, needs_bias)


def _launch(
    x: Inputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    q, k, v, out, grad_out = (contiguous_rows(tensor) for tensor in (x.q, x.k, x.v, out, grad_out))
    lse = lse.contiguous()
    dq, dk, dv = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))
    dbias = x.bias.new_empty(x.bias.shape) if needs_bias and x.bias is not None else None
    delta = torch.empty_like(lse)
    inverse = torch.empty_like(lse) if x.bias is not None else None
    if lse.numel() == 0 or k.numel() == 0:
        # Without queries or keys nothing depends on anything; delta still carries the sinks' part.
        nothing = [tensor.zero_() for tensor in (dq, dk, dv, dbias) if tensor is not None]
        delta.zero_() if grad_lse is None else torch.neg(grad_lse, out=delta)
        return nothing[0], nothing[1], nothing[2], dbias, delta
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    (n_q, n_k), heads, groups = x.lengths, q.shape[-2], k.shape[-2]
    group = heads // groups
    bias, mask = broadcast(x.bias, x), broadcast(x.mask, x)
    varlen = x.cu_seqlens_q is not None
    rows, fixed = config.rows(x), constants(x)
    d_parts, dv_parts = cdiv(q.shape[-1], fixed["BLOCK_D"]), cdiv(v.shape[-1], fixed["BLOCK_DV"])

    row = rows.dq
    n_tiles, n_heads = cdiv(n_q, row.block_m), x.batch * heads
    n_work = n_tiles * n_heads * d_parts
    programs, persistent = config.grid(n_work, row, q.device)
    index, count, *index_strides = block_lists(x, mask, row.block_m, row.block_n, False)
    tma = row.tma and config.describable(x, k, v)
    keys, values = (config.descriptor(tensor, row.block_n) if tma else tensor for tensor in (k, v))
    _dq[(programs,)](
        q, keys, values, out, grad_out, lse, grad_lse, delta, inverse, dq, bias, mask, x.alibi_slopes,
        x.s_aux if bias is not None else None, x.cu_seqlens_q, x.cu_seqlens_k, x.seqused_k, x.seed, index, count, *strides(q),
        *strides(k), *strides(v), *strides(out), *strides(grad_out), *strides(dq), *lse_strides(lse), *strides4(bias),
        *strides4(mask), slope_stride(x), *index_strides, heads, group, n_q, n_k, n_tiles, n_work,
        config.section(k, v, group, n_k, n_heads, n_tiles), n_heads, *numbers(x), BLOCK_M=row.block_m, BLOCK_N=row.block_n,
        VARLEN=varlen, TMA=tma,
        FAR=config.far(row.block_n, k, v) or config.far_rows(fixed, row.block_m, q, out, grad_out), PERSISTENT=persistent,
        num_warps=row.num_warps, num_stages=row.num_stages, **fixed,
    )  # fmt: skip

    row = rows.dkdv
    n_tiles, n_heads = cdiv(n_k, row.block_n), x.batch * groups
    n_work = n_tiles * n_heads * max(d_parts, dv_parts)
    programs, persistent = config.grid(n_work, row, q.device)
    index, count, *index_strides = block_lists(x, mask, row.block_n, row.block_m, True)
    tma = row.tma and config.describable(x, q, grad_out)
    queries, grads = (config.descriptor(tensor, row.block_m) if tma else tensor for tensor in (q, grad_out))
    _dkdv[(programs,)](
        queries, k, v, grads, lse, delta, inverse, dk, dv, bias, mask, x.alibi_slopes, x.cu_seqlens_q, x.cu_seqlens_k,
        x.seqused_k, x.seed, index, count, *strides(q), *strides(k), *strides(v), *strides(grad_out), *strides(dk),
        *strides(dv), *lse_strides(lse), *strides4(bias), *strides4(mask), slope_stride(x), *index_strides, heads, group, n_q,
        n_k, n_tiles, n_work, config.section(q, grad_out, 1, group * n_q, n_heads, n_tiles), n_heads, *numbers(x),
        BLOCK_M=row.block_m, BLOCK_N=row.block_n, VARLEN=varlen, TMA=tma,
        FAR=config.far(row.block_m, q, grad_out) or config.far_rows(fixed, row.block_n, k, v), PERSISTENT=persistent,
        num_warps=row.num_warps, num_stages=row.num_stages, **fixed,
    )  # fmt: skip
    launch_clear_tails(x, dq, None, dk, dv)

    if dbias is not None and bias is not None:
        row = rows.dq
        full = dbias[(None,) * (4 - dbias.dim())]
        one = [size == 1 for size in full.shape]
        n_q_tiles, n_k_tiles = cdiv(n_q, row.block_m), cdiv(n_k, row.block_n)
        programs = full.shape[0] * full.shape[1] * (1 if one[2] else n_q_tiles) * (1 if one[3] else n_k_tiles)
        _dbias[grid_x(programs)](
            q, k, v, grad_out, lse, delta, inverse, full, bias, mask, x.alibi_slopes, x.seqused_k, x.seed, *strides(q),
            *strides(k), *strides(v), *strides(grad_out), *lse_strides(lse), *full.stride(), *strides4(bias), *strides4(mask),
            slope_stride(x), x.batch, heads, group, n_q, n_k, n_q_tiles, n_k_tiles, *numbers(x)[1:], ONE_B=one[0],
            ONE_H=one[1], ONE_S=one[2], ONE_T=one[3], BLOCK_M=row.block_m, BLOCK_N=row.block_n, num_warps=row.num_warps,
            num_stages=1, **fixed,
        )  # fmt: skip
    return dq, dk, dv, dbias, delta if inverse is None or x.s_aux is None else delta * inverse
