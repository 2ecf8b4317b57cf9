"""Flash attention forward in Triton (Dao et al. 2022, 2023): online softmax, one program per tile of queries.

One kernel carries every feature on every architecture; what is not asked for is compiled away. The loop over keys runs twice:
over the tiles in which every score counts, without any mask arithmetic, and over those at the window's edges or with holes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, device_of, grid_x, multiprocessors
from . import config
from .reference import Inputs
from .tile import (
    CHANGING,
    block_list,
    clear_tails,
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
    work_item,
)

LOG2E = 1.4426950408889634
NO_LIMIT = 2**30  # the widest window: added to a position it stays below 2^31


@triton.jit(do_not_specialize=CHANGING)
def _forward(
    Q,
    K,
    V,
    Out,
    Lse,
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
    # CHUNK: head_dim above 256. A program then owns BLOCK_DV columns of the output, of which a row has PARTS such parts.
    PARTS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV
    # PERSISTENT: each program takes every num_programs-th unit of work, otherwise one.
    program = tl.program_id(0)
    for work in range(program, n_work if PERSISTENT else program + 1, tl.num_programs(0) if PERSISTENT else 1):
        tile, b, h = work_item(work // PARTS, n_tiles, heads, group, section, n_heads, RIGHT)
        q_start, sq = sequence(b, n_q, CuQ, None, VARLEN)
        k_start, sk = sequence(b, n_k, CuK, UsedK, VARLEN)
        i0 = tile * BLOCK_M
        if i0 < sq:
            diagonal = 0 if TOP_LEFT else sk - sq
            i = i0 + tl.arange(0, BLOCK_M)
            d = tl.arange(0, BLOCK_D)
            first_dv = work % PARTS * BLOCK_DV
            dv = first_dv + tl.arange(0, BLOCK_DV)
            b64, h64 = b.to(tl.int64), h.to(tl.int64)
            g64 = (h // group).to(tl.int64)
            token = q_start + i.to(tl.int64)
            if CHUNK:
                q_base = Q + b64 * stride_qb + h64 * stride_qh + q_start * stride_qs
            else:
                q_ptrs = Q + b64 * stride_qb + h64 * stride_qh + token[:, None] * stride_qs + d[None, :]
                q = tl.load(q_ptrs, mask=(i < sq)[:, None] & (d < D)[None, :], other=0.0)
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

            row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            row_sum = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
            columns = tl.arange(0, BLOCK_N)
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
                        else:
                            k = load_tile(k_base, j0, stride_kt, sk, D, BLOCK_N, BLOCK_D, MASKED == 1, True, FAR)
                        qk = tl.dot(q, k, input_precision=PRECISION)
                    inside = (j < sk)[None, :]
                    if Bias is not None or Mask is not None:  # rows beyond the last are not stored, but must not be read
                        inside = inside & (i < sq)[:, None]
                    qk, _ = modified_scores(
                        qk,
                        i[:, None],
                        j[None, :],
                        inside,
                        diagonal,
                        scale,
                        softcap,
                        slope,
                        bias,
                        stride_bias_s,
                        stride_bias_t,
                        SOFTCAP,
                    )
                    if MASKED:
                        keep = seen(
                            i[:, None],
                            j[None, :],
                            inside,
                            diagonal,
                            left,
                            right,
                            mask,
                            stride_mask_s,
                            stride_mask_t,
                            LEFT,
                            RIGHT,
                        )
                        qk = tl.where(keep, qk, float("-inf"))
                    tile_max = tl.max(qk, 1)
                    if Bias is None:
                        tile_max = tile_max * factor
                    new_max = tl.maximum(row_max, tile_max)
                    # A row that has not seen a key yet: -inf - -inf would be NaN.
                    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED == 1 or Bias is not None else new_max
                    p = tl.exp2((qk - safe_max[:, None]) * factor if Bias is not None else qk * factor - safe_max[:, None])
                    shrink = row_max - safe_max
                    shrink = tl.exp2(shrink * factor if Bias is not None else shrink)
                    row_sum = row_sum * shrink + tl.sum(p, 1)
                    acc = acc * shrink[:, None]
                    if DROPOUT:
                        p = tl.where(kept_by_dropout(seed_key, seed_counter, bh, i0, j0, threshold, BLOCK_M, BLOCK_N), p, 0.0)
                    if TMA:
                        v = tl.reshape(V.load([b, j0, h // group, 0]), (BLOCK_N, BLOCK_DV))
                    else:
                        v = load_tile(v_base, j0, stride_vt, sk, DV, BLOCK_N, BLOCK_DV, MASKED == 1, False, FAR, first_dv)
                    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
                    row_max = new_max
            if Sinks is not None:
                # In the unit of row_max: that of log 2, or with a bias the natural one.
                sink = tl.load(Sinks + h) * (1.0 if Bias is not None else 1.4426950408889634)
                to_log2 = 1.4426950408889634 if Bias is not None else 1.0
                new_max = tl.maximum(row_max, sink)
                safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
                shrink = tl.exp2((row_max - safe_max) * to_log2)
                row_sum = row_sum * shrink + tl.exp2((sink - safe_max) * to_log2)
                acc = acc * shrink[:, None]
                row_max = new_max
            without_key = row_sum == 0.0
            row_sum = tl.where(without_key, 1.0, row_sum)
            acc = acc * (keep_scale / row_sum)[:, None]
            if Bias is not None:
                lse = row_max + tl.log2(row_sum) * 0.6931471805599453
            else:
                lse = (row_max + tl.log2(row_sum)) * 0.6931471805599453
            lse = tl.where(without_key, float("-inf"), lse)
            o_ptrs = Out + b64 * stride_ob + h64 * stride_oh + token[:, None] * stride_os + dv[None, :]
            tl.store(o_ptrs, acc.to(Out.dtype.element_ty), mask=(i < sq)[:, None] & (dv < DV)[None, :])
            tl.store(Lse + b64 * stride_lb + h64 * stride_lh + token, lse, mask=i < sq)


# --- launch ---------------------------------------------------------------------------------------------------------


def contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, as the kernels need, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strides(tensor: Tensor) -> tuple[int, ...]:
    """(batch, position, head) strides; 0 for the batch of packed sequences. That of a dimension of size 1 may be any number in
    PyTorch, and a kernel would be compiled for each kind: here it is 0."""
    of = tensor.stride()[:-1]
    if 1 in tensor.shape:
        of = tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, of))
    return of if len(of) == 3 else (0, *of)


def lse_strides(lse: Tensor) -> tuple[int, int]:
    return (lse.stride(0), lse.stride(1)) if lse.dim() == 3 else (0, lse.stride(0))


def broadcast(tensor: Tensor | None, x: Inputs) -> Tensor | None:
    """A bias or mask as (B, H, S, T) with stride 0 where it is broadcast; booleans as bytes."""
    if tensor is None:
        return None
    s, t = x.lengths
    tensor = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    if tensor.stride(-1) * t >= 2**31:  # a column's offset is 32 bits in the kernels
        tensor = tensor.contiguous()
    return tensor.expand(x.q.shape[0], x.q.shape[2], s, t)


def strides4(tensor: Tensor | None) -> tuple[int, ...]:
    """(batch, head, row, column) strides, 0 where there is one, as `strides`."""
    if tensor is None:
        return (0, 0, 0, 0)
    return tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride()))


def slope_stride(x: Inputs) -> int:
    return x.alibi_slopes.shape[1] if x.alibi_slopes is not None and x.alibi_slopes.dim() == 2 else 0


def exponent_factor(softmax_scale: float, raw: bool) -> float:
    """What the kernels multiply scores by before exp2, raw products or scaled ones. Not 0: masked scores are -inf."""
    return (max(softmax_scale, 1e-30) if raw else 1.0) * LOG2E


def numbers(x: Inputs) -> tuple[float, ...]:
    """factor, scale, softcap, left, right, threshold, keep_scale of the kernels."""
    factor = exponent_factor(x.softmax_scale, raw=x.bias is None and x.alibi_slopes is None and x.softcap == 0)
    threshold = int(x.dropout_p * 2**24)
    left, right = min(x.window_left, NO_LIMIT), min(x.window_right, NO_LIMIT)
    return factor, x.softmax_scale, x.softcap or 1.0, left, right, threshold, 1 / (1 - x.dropout_p)


def aligned(x: Inputs) -> bool:
    """Whether rows of the bias and of the mask are read in vectors: as long as 16 numbers or a multiple, and as far apart."""
    given = [tensor for tensor in (x.bias, x.mask) if tensor is not None]
    apart = [stride for tensor in given for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
    return bool(given) and x.lengths[1] % 16 == 0 and all(stride % 16 == 0 for stride in apart)


def constants(x: Inputs) -> dict[str, Any]:
    """What is compiled in for a problem, besides the blocks."""
    d, dv = x.q.shape[-1], x.v.shape[-1]
    return {
        "D": d, "DV": dv, **config.widths(d, dv, x.q.dtype), "LEFT": x.window_left >= 0, "RIGHT": x.window_right >= 0,
        "TOP_LEFT": x.top_left, "SOFTCAP": x.softcap > 0, "DROPOUT": x.dropout_p > 0,
        "PRECISION": config.precision(x.q.dtype), "ALIGNED": aligned(x),
    }  # fmt: skip


def block_lists(
    x: Inputs, mask: Tensor | None, rows: int, columns: int, transposed: bool
) -> tuple[Tensor | None, Tensor | None, int, int, int]:
    """(Index, Count, their strides over batch and head in row tiles, column tiles) of `block_list`. Launches."""
    if mask is None:
        return None, None, 0, 0, 0
    s, t = x.lengths
    stride_b, stride_h, stride_r, stride_c = mask.stride()
    left, right = min(x.window_left, NO_LIMIT), min(x.window_right, NO_LIMIT)
    if transposed:
        s, t, left, right, stride_r, stride_c = t, s, right, left, stride_c, stride_r
    batch = x.batch if stride_b or x.seqused_k is not None else 1
    heads = mask.shape[1] if stride_h else 1
    n_rows, n_columns = cdiv(s, rows), cdiv(t, columns)
    index = torch.empty(batch * heads * n_rows, max(n_columns, 1), dtype=torch.int32, device=mask.device)
    count = torch.empty(batch * heads * n_rows, 2, dtype=torch.int32, device=mask.device)
    block_list[grid_x(batch * heads * n_rows)](
        mask, x.seqused_k, index, count, stride_b, stride_h, stride_r, stride_c, heads, s, t, n_rows, max(n_columns, 1), left,
        right, ALIGNED=aligned(x), USED_ROWS=transposed, TOP_LEFT=x.top_left, LEFT=left >= 0, RIGHT=right >= 0,
        ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return index, count, heads * n_rows if batch > 1 else 0, n_rows if heads > 1 else 0, max(n_columns, 1)


_VECTORS = ("alibi_slopes", "s_aux", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "seed")


def dense_vectors(x: Inputs) -> Inputs:
    """The same problem with its small tensors as the kernels read them."""
    copies: dict[str, Any] = {name: tensor.contiguous() for name in _VECTORS if (tensor := getattr(x, name)) is not None}
    return replace(x, **copies) if any(getattr(x, name) is not copy for name, copy in copies.items()) else x


def launch_clear_tails(x: Inputs, q: Tensor, lse: Tensor | None, k: Tensor | None = None, v: Tensor | None = None) -> None:
    """`clear_tails` of dense q, lse, k and v, where sequences are packed."""
    if x.cu_seqlens_q is None:
        return
    widths = [0 if tensor is None else tensor.shape[1] * tensor.shape[2] for tensor in (q, k, v)]
    most = max(tensor.numel() for tensor in (q, k, v) if tensor is not None)
    clear_tails[(min(cdiv(most, 1024), 2 * multiprocessors(q.device)),)](
        q, lse, k, v, x.cu_seqlens_q, x.cu_seqlens_k, x.batch, q.shape[1], q.shape[0], 0 if k is None else k.shape[0], *widths,
        BLOCK=1024, num_warps=4,
    )  # fmt: skip


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked problem; launches on the current stream of q's device."""
    with device_of(x.q):
        return _launch(dense_vectors(x))


def _launch(x: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v = (contiguous_rows(tensor) for tensor in (x.q, x.k, x.v))
    out, lse = x.empty()
    if lse.numel() == 0:
        return out, lse
    (n_q, n_k), heads, group = x.lengths, q.shape[-2], q.shape[-2] // k.shape[-2]
    row = config.forward(x)
    n_tiles, n_heads, fixed = cdiv(n_q, row.block_m), x.batch * heads, constants(x)
    n_work = n_tiles * n_heads * cdiv(v.shape[-1], fixed["BLOCK_DV"])
    programs, persistent = config.grid(n_work, row, q.device)
    bias, mask = broadcast(x.bias, x), broadcast(x.mask, x)
    index, count, stride_index_b, stride_index_h, index_end = block_lists(x, mask, row.block_m, row.block_n, False)
    tma = row.tma and config.describable(x, k, v)
    keys, values = (config.descriptor(tensor, row.block_n) if tma else tensor for tensor in (k, v))
    _forward[(programs,)](
        q, keys, values, out, lse, bias, mask, x.alibi_slopes, x.s_aux, x.cu_seqlens_q, x.cu_seqlens_k, x.seqused_k, x.seed,
        index, count, *strides(q), *strides(k), *strides(v), *strides(out), *lse_strides(lse), *strides4(bias),
        *strides4(mask), slope_stride(x), stride_index_b, stride_index_h, index_end, heads, group, n_q, n_k, n_tiles, n_work,
        config.section(k, v, group, n_k, n_heads, n_tiles), n_heads, *numbers(x), BLOCK_M=row.block_m, BLOCK_N=row.block_n,
        VARLEN=x.cu_seqlens_q is not None, TMA=tma, FAR=config.far(row.block_n, k, v) or config.far_rows(fixed, row.block_m, q),
        PERSISTENT=persistent, num_warps=row.num_warps, num_stages=row.num_stages, **fixed,
    )  # fmt: skip
    launch_clear_tails(x, out, lse)
    return out, lse
