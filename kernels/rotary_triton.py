"""Triton kernel of the rotary embedding: what rotary.py imports at the first use of it.

A program owns BLOCK_S positions of one sequence and a few heads: it loads the cosines and sines of its positions once, keeps
them in registers in float32, and turns one head after the other. Heads of q come first, then those of k. Halves are
two tiles that lie R / 2 apart; pairs are one tile that is split in registers, since a thread's 16 bytes hold whole pairs. What
is read is read by the program that writes it, before it writes: so input and output may be one tensor.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, device_of, next_power_of_2


@triton.jit
def _turn_heads(
    X,
    Y,
    stride_xb,
    stride_xh,
    stride_xs,
    stride_yb,
    stride_yh,
    stride_ys,
    b,
    first,
    last,
    s,
    inside,
    cos,
    sin,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Heads first .. last of X into Y at positions s (BLOCK_S, 1), of which `inside` exist."""
    # Strides and rows come in units of VECTOR elements, so that the compiler knows how far rows are aligned.
    first_head = first.to(tl.int64)
    x_row = b * stride_xb + first_head * stride_xh + s * stride_xs
    y_row = b * stride_yb + first_head * stride_yh + s * stride_ys
    r = tl.arange(0, BLOCK_R)[None, :]
    for _ in range(first, last):
        x_ptr, y_ptr = X + x_row * VECTOR, Y + y_row * VECTOR
        if INTERLEAVED:
            d = tl.arange(0, 2 * BLOCK_R)[None, :]
            both = tl.load(x_ptr + d, mask=inside & (d < 2 * HALF), other=0.0)
            x1, x2 = tl.split(tl.reshape(both, (BLOCK_S, BLOCK_R, 2)))
        else:
            x1 = tl.load(x_ptr + r, mask=inside & (r < HALF), other=0.0)
            x2 = tl.load(x_ptr + HALF + r, mask=inside & (r < HALF), other=0.0)
        x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
        y1 = (x1 * cos - x2 * sin).to(Y.dtype.element_ty)
        y2 = (x2 * cos + x1 * sin).to(Y.dtype.element_ty)
        if INTERLEAVED:
            y = tl.reshape(tl.join(y1, y2), (BLOCK_S, 2 * BLOCK_R))
            tl.store(y_ptr + d, y, mask=inside & (d < 2 * HALF))
        else:
            tl.store(y_ptr + r, y1, mask=inside & (r < HALF))
            tl.store(y_ptr + HALF + r, y2, mask=inside & (r < HALF))
        for part in tl.static_range((REST + BLOCK_REST - 1) // BLOCK_REST):
            e = part * BLOCK_REST + tl.arange(0, BLOCK_REST)[None, :]
            rest = tl.load(x_ptr + 2 * HALF + e, mask=inside & (e < REST), other=0.0)
            tl.store(y_ptr + 2 * HALF + e, rest, mask=inside & (e < REST))
        x_row += stride_xh
        y_row += stride_yh


# Triton would compile the kernel anew where one of these is 1 or a multiple of 16. VECTOR and COS_VECTOR say all that it gains
# from that.
_NUMBERS = [
    *("n_positions", "n_angles", "q_heads", "k_heads", "heads_per_program"),
    *(f"stride_{tensor}{dimension}" for tensor in ("q", "k", "qo", "ko") for dimension in "bhs"),
    *("stride_cos_b", "stride_cos_s", "stride_positions_b"),
]


@triton.jit(do_not_specialize=_NUMBERS)
def _rotary(
    Q,
    K,
    QOut,
    KOut,
    Cos,
    Sin,
    Positions,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_qob,
    stride_qoh,
    stride_qos,
    stride_kob,
    stride_koh,
    stride_kos,
    stride_cos_b,
    stride_cos_s,
    stride_positions_b,
    n_positions,
    n_angles,
    q_heads,
    k_heads,
    heads_per_program,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    VECTOR: tl.constexpr,
    COS_VECTOR: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    # One dimension, heads first, since the others end at 65,535.
    tiles, q_tiles = tl.cdiv(n_positions, BLOCK_S), tl.cdiv(q_heads, heads_per_program)
    head_tiles = q_tiles + tl.cdiv(k_heads, heads_per_program)
    head_tile, tile = tl.program_id(0) % head_tiles, tl.program_id(0) // head_tiles
    b = (tile // tiles).to(tl.int64)  # 64 bits: a stride times an index passes 2^31 in tensors of 4 GB
    s = (tile % tiles).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = (s < n_positions)[:, None]
    angle = s
    if Positions is not None:
        angle = tl.load(Positions + b * stride_positions_b + s, mask=s < n_positions, other=0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)[None, :]
    angles = (b * stride_cos_b + angle * stride_cos_s)[:, None] * COS_VECTOR + r
    # No position outside the table is read; its rows become NaN.
    known = ((angle >= 0) & (angle < n_angles))[:, None] & (r < HALF)
    cos = tl.load(Cos + angles, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(Sin + angles, mask=known, other=float("nan")).to(tl.float32)
    if INVERSE:
        sin = -sin
    row = s[:, None]
    if head_tile < q_tiles:
        first = head_tile * heads_per_program
        _turn_heads(
            Q, QOut, stride_qb, stride_qh, stride_qs, stride_qob, stride_qoh, stride_qos, b, first,
            tl.minimum(first + heads_per_program, q_heads), row, inside, cos, sin,
            HALF, REST, INTERLEAVED, VECTOR, BLOCK_S, BLOCK_R, BLOCK_REST,
        )  # fmt: skip
    else:
        if K is not None:
            first = (head_tile - q_tiles) * heads_per_program
            _turn_heads(
                K, KOut, stride_kb, stride_kh, stride_ks, stride_kob, stride_koh, stride_kos, b, first,
                tl.minimum(first + heads_per_program, k_heads), row, inside, cos, sin,
                HALF, REST, INTERLEAVED, VECTOR, BLOCK_S, BLOCK_R, BLOCK_REST,
            )  # fmt: skip


# --- launch ---------------------------------------------------------------------------------------------------------

BYTES = 4096
"""Of one head that a program turns at a time, with 4 warps: two loads of 16 bytes a thread."""
PROGRAMS = 2048
"""At least so many programs, if there are heads enough: a wave of a GPU with 128 multiprocessors."""
HEADS = 8
"""At most so many heads a program: by then the angles are an eighth of what is read."""


def blocks(x: Tensor, half: int) -> tuple[int, int, int]:
    """(BLOCK_S, BLOCK_R, warps). Only a single position, as in decoding, has a block of its own: each block compiles anew."""
    block_r = next_power_of_2(half)
    block_s = max(BYTES // (2 * block_r * x.element_size()), 1) if x.shape[2] > 1 else 1
    return block_s, block_r, min(max(2 * block_s * block_r * x.element_size() // 1024, 1), 4)


def _heads_per_program(position_tiles: int, heads: int) -> int:
    n = min(HEADS, next_power_of_2(heads))
    while n > 1 and position_tiles * cdiv(heads, n) < PROGRAMS:
        n //= 2
    return n


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _vector(tensors: list[Tensor], *numbers: int) -> int:
    """The number of elements, up to 16 bytes, that divides every stride but the last, and the numbers."""
    strides = (stride for x in tensors for stride, size in zip(x.stride()[:-1], x.shape[:-1]) if size > 1)
    return math.gcd(16 // tensors[0].element_size(), *strides, *numbers)


def rotate(
    q: Tensor,
    k: Tensor | None,
    q_out: Tensor,
    k_out: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Write the turned q and k to q_out and k_out, which may be q and k; launches on the current stream."""
    half = cos.shape[-1]
    inputs = [x for x in (q, k) if x is not None]
    outputs = [y for y in (q_out, k_out) if y is not None]
    batch, _, length, head_dim = q.shape
    heads = [x.shape[1] for x in inputs]
    if batch * length * head_dim * sum(heads) == 0:
        return
    if half == 0:
        for x, y in zip(inputs, outputs):
            y.copy_(x)
        return
    xs, ys = [_dense(x) for x in inputs], [_dense(y) for y in outputs]
    # In place nothing has to be done for the dimensions that do not turn.
    rest = 0 if all(x is y for x, y in zip(xs, ys)) else head_dim - 2 * half
    cos, sin = (_dense(table) for table in (cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    stride_cos_b = cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0
    vector = _vector(xs + ys)
    cos_vector = math.gcd(16 // cos.element_size(), cos.stride(-2), stride_cos_b)
    if positions is not None:
        positions = positions.contiguous()
    block_s, block_r, warps = blocks(q, half)
    tiles = batch * cdiv(length, block_s)
    per_program = _heads_per_program(tiles, max(heads))
    strides = [tuple(stride // vector for stride in tensor.stride()[:3]) for tensor in (*xs, *ys)]
    if k is None:
        strides = [strides[0], (0, 0, 0), strides[1], (0, 0, 0)]
    with device_of(q):
        _rotary[(tiles * sum(cdiv(n, per_program) for n in heads),)](
            xs[0], xs[1] if k is not None else None, ys[0], ys[1] if k is not None else None, cos, sin, positions,
            *(stride for three in strides for stride in three), stride_cos_b // cos_vector, cos.stride(-2) // cos_vector,
            length if positions is not None and positions.dim() == 2 else 0, length, cos.shape[-2], heads[0],
            heads[1] if k is not None else 0, per_program, HALF=half, REST=rest, INTERLEAVED=interleaved, INVERSE=inverse,
            VECTOR=vector, COS_VECTOR=cos_vector, BLOCK_S=block_s, BLOCK_R=block_r,
            BLOCK_REST=max(2 * block_r, 32), num_warps=warps,
        )  # fmt: skip
    for y, dense in zip(outputs, ys):
        if y is not dense:
            y.copy_(dense)


def turned(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor | None]:
    """New tensors, in memory laid out as q and k are."""
    q_out, k_out = torch.empty_like(q), None if k is None else torch.empty_like(k)
    rotate(q, k, q_out, k_out, cos, sin, positions, interleaved, inverse)
    return q_out, k_out
