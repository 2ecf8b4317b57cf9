"""The Triton kernels of LayerNorm and RMSNorm (norm.py imports them at first use).

M rows of N numbers, seen as a matrix with any distance between rows. A program owns BLOCK_M rows, so that it has a few
thousand numbers in flight whatever N is; BLOCK_N is N padded to a power of two, or a part of the row where a whole one does
not fit the registers.

Backward, with x_hat = (h - mean) * rstd and g = dy * weight:

    dh = rstd * (g - x_hat * mean(g * x_hat) - mean(g)) + (gradient that arrives through h)      (no mean(g) for RMSNorm)
    dx = dropout's mask * dh,  d residual = dh,  dweight = sum over rows of dy * x_hat,  dbias = sum over rows of dy

A fixed number of programs walks over all rows and keeps its sums for dweight and dbias in registers; a second kernel adds
what they leave, in a fixed order. The loads of the next rows are in flight while a row is reduced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import architecture, cdiv, device_of, multiprocessors, next_power_of_2
from .attention.tile import kept_by_dropout


@triton.jit
def _rows(i, n_rows, BLOCK_M: tl.constexpr):
    """Which rows of a tile exist; a constant where all do, which the compiler drops."""
    return i < n_rows if BLOCK_M > 1 else tl.full((BLOCK_M,), True, tl.int1)


@triton.jit
def _columns(c, N: tl.constexpr, BLOCK_N: tl.constexpr):
    return c < N if N % BLOCK_N != 0 else tl.full((BLOCK_N,), True, tl.int1)


@triton.jit
def _sum_tile(
    X,
    Residual,
    Seed,
    i0,
    j0,
    i,
    c,
    inside,
    stride_x,
    stride_r,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h = dropout(x) + residual in the dtype it is stored in."""
    h = tl.load(X + i[:, None] * stride_x + c[None, :], mask=inside, other=0.0)
    if Seed is not None:
        keep = kept_by_dropout(tl.load(Seed), tl.load(Seed + 1).to(tl.uint32), 0, i0, j0, threshold, BLOCK_M, BLOCK_N)
        h = tl.where(keep, h.to(tl.float32) * keep_scale, 0.0).to(X.dtype.element_ty if Residual is None else tl.float32)
    if Residual is not None:
        residual = tl.load(Residual + i[:, None] * stride_r + c[None, :], mask=inside, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(Residual.dtype.element_ty)
    return h


@triton.jit
def _load_weight(Weight, c, columns, UNIT_OFFSET: tl.constexpr):
    weight = tl.load(Weight + c, mask=columns, other=0.0).to(tl.float32)
    return (weight + 1.0 if UNIT_OFFSET else weight)[None, :]


@triton.jit
def _scaled(y, Weight, Bias, c, columns, UNIT_OFFSET: tl.constexpr):
    if Weight is not None:
        y = y * _load_weight(Weight, c, columns, UNIT_OFFSET)
    if Bias is not None:
        y += tl.load(Bias + c, mask=columns, other=0.0).to(tl.float32)[None, :]
    return y


# Triton would compile a kernel anew where one of these is 1 or a multiple of 16. It gains nothing from that, unlike from the
# strides, which say how far rows are aligned.
_NUMBERS = ["n_rows", "n_tiles", "n_partials", "threshold"]


@triton.jit(do_not_specialize=_NUMBERS)
def _forward(
    X,
    Residual,
    Weight,
    Bias,
    Seed,
    Y,
    H,
    Mean,
    Rstd,
    stride_x,
    stride_r,
    n_rows,
    eps,
    threshold,
    keep_scale,
    N: tl.constexpr,
    RMS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns BLOCK_M whole rows."""
    # 64 bits: rows times their distance may pass 2^31.
    i0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    rows, columns = _rows(i, n_rows, BLOCK_M), _columns(c, N, BLOCK_N)
    inside = rows[:, None] & columns[None, :]
    h = _sum_tile(X, Residual, Seed, i0, 0, i, c, inside, stride_x, stride_r, threshold, keep_scale, BLOCK_M, BLOCK_N)
    y_offsets = i[:, None] * N + c[None, :]
    if H is not None:
        tl.store(H + y_offsets, h, mask=inside)
    h = h.to(tl.float32)
    if not RMS:
        mean = tl.sum(h, 1) / N
        h = tl.where(inside, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(h * h, 1) / N + eps)
    if Rstd is not None:
        tl.store(Rstd + i, rstd, mask=rows)
        if not RMS:
            tl.store(Mean + i, mean, mask=rows)
    y = _scaled(h * rstd[:, None], Weight, Bias, c, columns, UNIT_OFFSET)
    tl.store(Y + y_offsets, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS)
def _forward_wide(
    X,
    Residual,
    Weight,
    Bias,
    Seed,
    Y,
    H,
    Mean,
    Rstd,
    stride_x,
    stride_r,
    eps,
    threshold,
    keep_scale,
    N: tl.constexpr,
    RMS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program owns one row and reads it twice, BLOCK_N columns at a time: for the statistics, and, from the L2 cache, for y.

    Each lane keeps the mean and the sum of squared differences (Welford 1962) of its own columns, so that nothing is reduced
    inside the loop; they are combined at the end (Chan et al. 1983).
    """
    i0 = tl.program_id(0).to(tl.int64)
    i = i0 + tl.arange(0, 1)
    lane = tl.arange(0, BLOCK_N)
    mean = tl.zeros((1, BLOCK_N), tl.float32)
    squares = tl.zeros((1, BLOCK_N), tl.float32)
    for j0 in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        c = j0 + lane
        inside = _columns(c, N, BLOCK_N)[None, :]
        h = _sum_tile(X, Residual, Seed, i0, j0, i, c, inside, stride_x, stride_r, threshold, keep_scale, 1, BLOCK_N)
        if H is not None:
            tl.store(H + i[:, None] * N + c[None, :], h, mask=inside)
        h = h.to(tl.float32)
        if RMS:
            squares += h * h
        else:
            difference = tl.where(inside, h - mean, 0.0)
            mean += difference * (1.0 / (j0 // BLOCK_N + 1))
            squares += difference * tl.where(inside, h - mean, 0.0)
    row_mean = tl.zeros((1,), tl.float32)
    if not RMS:
        count = ((N - lane + BLOCK_N - 1) // BLOCK_N).to(tl.float32)[None, :]
        row_mean = tl.sum(mean * count, 1) / N
        squares += count * (mean - row_mean[:, None]) * (mean - row_mean[:, None])
    rstd = tl.rsqrt(tl.sum(squares, 1) / N + eps)
    if Rstd is not None:
        tl.store(Rstd + i, rstd)
        if not RMS:
            tl.store(Mean + i, row_mean)
    for j0 in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        c = j0 + lane
        columns = _columns(c, N, BLOCK_N)
        inside = columns[None, :]
        h = _sum_tile(X, Residual, Seed, i0, j0, i, c, inside, stride_x, stride_r, threshold, keep_scale, 1, BLOCK_N)
        y = (h.to(tl.float32) - row_mean[:, None]) * rstd[:, None]
        y = _scaled(y, Weight, Bias, c, columns, UNIT_OFFSET)
        tl.store(Y + i[:, None] * N + c[None, :], y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_tile(Dy, H, Mean, Rstd, i, c, inside, rows, stride_dy, stride_h):
    """(dy, x_hat, rstd) of a tile."""
    dy = tl.load(Dy + i[:, None] * stride_dy + c[None, :], mask=inside, other=0.0).to(tl.float32)
    x_hat = tl.load(H + i[:, None] * stride_h + c[None, :], mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(Rstd + i, mask=rows, other=0.0)[:, None]
    if Mean is not None:
        x_hat -= tl.load(Mean + i, mask=rows, other=0.0)[:, None]
    return dy, x_hat * rstd, rstd


@triton.jit
def _backward_means(
    Dy,
    H,
    Weight,
    Mean,
    Rstd,
    MeanProduct,
    MeanGradient,
    stride_dy,
    stride_h,
    N: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """mean(g * x_hat) and mean(g) of one row, for rows that do not fit the registers."""
    i = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rows = tl.full((1,), True, tl.int1)
    product = tl.zeros((1, BLOCK_N), tl.float32)
    gradient = tl.zeros((1, BLOCK_N), tl.float32)
    for j0 in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        c = j0 + tl.arange(0, BLOCK_N)
        columns = _columns(c, N, BLOCK_N)
        inside = columns[None, :]
        dy, x_hat, _ = _gradient_tile(Dy, H, Mean, Rstd, i, c, inside, rows, stride_dy, stride_h)
        if Weight is not None:
            dy *= _load_weight(Weight, c, columns, UNIT_OFFSET)
        product += dy * x_hat
        gradient += dy
    tl.store(MeanProduct + i, tl.sum(product, 1) / N)
    if MeanGradient is not None:
        tl.store(MeanGradient + i, tl.sum(gradient, 1) / N)


@triton.jit(do_not_specialize=_NUMBERS)
def _backward(
    Dy,
    Dh,
    H,
    Weight,
    Mean,
    Rstd,
    MeanProduct,
    MeanGradient,
    Seed,
    Dx,
    Dresidual,
    Dweight,
    Dbias,
    stride_dy,
    stride_dh,
    stride_h,
    n_rows,
    n_tiles,
    threshold,
    keep_scale,
    N: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program owns BLOCK_N columns and every num_programs-th tile of BLOCK_M rows; MeanProduct and MeanGradient are given
    where these are not all columns. Dweight and Dbias (programs, N) receive its sums."""
    j0 = tl.program_id(1) * BLOCK_N
    c = j0 + tl.arange(0, BLOCK_N)
    columns = _columns(c, N, BLOCK_N)
    # Otherwise it comes from the cache again for each row.
    KEEP_WEIGHT: tl.constexpr = BLOCK_M * BLOCK_N <= _KEPT_WEIGHT
    if Weight is not None and KEEP_WEIGHT:
        weight = _load_weight(Weight, c, columns, UNIT_OFFSET)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        # From the last row to the first: what the ops before this one wrote last is still in the L2 cache.
        i0 = (n_tiles - t).to(tl.int64) * BLOCK_M - BLOCK_M
        i = i0 + tl.arange(0, BLOCK_M)
        rows = _rows(i, n_rows, BLOCK_M)
        inside = rows[:, None] & columns[None, :]
        dy, x_hat, rstd = _gradient_tile(Dy, H, Mean, Rstd, i, c, inside, rows, stride_dy, stride_h)
        if Dweight is not None:
            dweight += dy * x_hat
        if Dbias is not None:
            dbias += dy
        g = dy
        if Weight is not None:
            if not KEEP_WEIGHT:
                weight = _load_weight(Weight, c, columns, UNIT_OFFSET)
            g = dy * weight
        if MeanProduct is not None:
            mean_product = tl.load(MeanProduct + i, mask=rows, other=0.0)
        else:
            mean_product = tl.sum(g * x_hat, 1) / N
        dh = g - x_hat * mean_product[:, None]
        if Mean is not None:
            if MeanGradient is not None:
                dh -= tl.load(MeanGradient + i, mask=rows, other=0.0)[:, None]
            else:
                dh -= (tl.sum(g, 1) / N)[:, None]
        dh *= rstd
        if Dh is not None:
            dh += tl.load(Dh + i[:, None] * stride_dh + c[None, :], mask=inside, other=0.0).to(tl.float32)
        offsets = i[:, None] * N + c[None, :]
        if Dresidual is not None:
            tl.store(Dresidual + offsets, dh.to(Dresidual.dtype.element_ty), mask=inside)
        if Seed is not None:
            keep = kept_by_dropout(tl.load(Seed), tl.load(Seed + 1).to(tl.uint32), 0, i0, j0, threshold, BLOCK_M, BLOCK_N)
            dh = tl.where(keep, dh * keep_scale, 0.0)
        tl.store(Dx + offsets, dh.to(Dx.dtype.element_ty), mask=inside)
    out = tl.program_id(0).to(tl.int64) * N + c
    if Dweight is not None:
        tl.store(Dweight + out, tl.sum(dweight, 0).to(Dweight.dtype.element_ty), mask=columns)
    if Dbias is not None:
        tl.store(Dbias + out, tl.sum(dbias, 0).to(Dbias.dtype.element_ty), mask=columns)


@triton.jit
def _add_partial(Partial, Out, c, n_partials, N: tl.constexpr, BLOCK_P: tl.constexpr):
    p = tl.arange(0, BLOCK_P)
    inside = (p < n_partials)[:, None] & (c < N)[None, :]
    partial = tl.load(Partial + p.to(tl.int64)[:, None] * N + c[None, :], mask=inside, other=0.0)
    tl.store(Out + c, tl.sum(partial, 0).to(Out.dtype.element_ty), mask=c < N)


@triton.jit(do_not_specialize=_NUMBERS)
def _add_partials(
    PartialWeight, PartialBias, Dweight, Dbias, n_partials, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The sums that the programs of `_backward` leave, added: program (column block, 0 for dweight or 1 for dbias)."""
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if Dbias is None or (Dweight is not None and tl.program_id(1) == 0):
        _add_partial(PartialWeight, Dweight, c, n_partials, N, BLOCK_P)
    else:
        _add_partial(PartialBias, Dbias, c, n_partials, N, BLOCK_P)


# --- block sizes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """block_m rows by block_n columns; with fewer columns than a row has, the kernels for wide rows run.
    programs: how many share a multiprocessor (of `_backward`)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    programs: int = 1


# Elements of a tile of narrow rows: 16 a thread, which are two loads of 16 bytes in 16 bits. Forward many small programs;
# backward few, because each leaves its sums: two a multiprocessor, so that one computes while the other waits at a barrier.
_FORWARD_TILE, _BACKWARD_TILE = 2048, 4096
# Up to here `_backward` keeps the weight in registers; beside a wider row and its sums there is no room.
_KEPT_WEIGHT = tl.constexpr(8192)
# KiB of shared memory that loads in flight may take on one multiprocessor (the rest is L1 cache), by architecture.
_IN_FLIGHT = {80: 144, 90: 192, 100: 192}
_IN_FLIGHT_ELSE = 96

_BACKWARD_MEANS = Blocks(1, 4096, 8, 2)


def _padded(n: int) -> int:
    return max(16, next_power_of_2(n))


def _stages(bytes_in_flight: int, kib: int) -> int:
    """Two tiles on their way, or as many as there is room for."""
    return 1 + min(2, kib * 1024 // bytes_in_flight)


def forward_blocks(n: int, sizes: int, affine_sizes: int, dropout: bool) -> Blocks:
    """For rows of n numbers that are read from x and the residual, `sizes` bytes a number in all, weight and bias
    `affine_sizes`. The widest rows are those that spill nothing."""
    width = _padded(n)
    if width <= (32768 if sizes == 2 and not dropout else 16384):
        return Blocks(max(1, _FORWARD_TILE // width), width, min(32, max(4, width // 512)))
    # Two programs a multiprocessor: their rows have to stay in the L2 cache until they are read again.
    return Blocks(1, 4096, 16, _stages(4096 * (sizes + affine_sizes), 48))


def backward_blocks(n: int, sizes: int, weight_size: int, light: bool, arch: int) -> Blocks:
    """For rows of n numbers that are read from dy, h and dh, `sizes` bytes a number in all. light: RMSNorm with one sum to
    keep, dweight or dbias. The widest rows are those that spill nothing."""
    width = _padded(n)
    if width > (16384 if light and sizes <= 8 else 8192):
        return Blocks(1, 2048, 4, 3, 4)
    block_m, programs = max(1, _BACKWARD_TILE // width), 2 if width <= _BACKWARD_TILE else 1
    in_flight = programs * block_m * width * (sizes + (weight_size if width > _KEPT_WEIGHT.value else 0))
    stages = _stages(in_flight, _IN_FLIGHT.get(arch, _IN_FLIGHT_ELSE))
    return Blocks(block_m, width, min(16, max(8, width // 512)), stages, programs)


_forced: tuple[Blocks, Blocks] | None = None


@contextlib.contextmanager
def force(forward: Blocks, backward: Blocks) -> Iterator[None]:
    """These blocks for every problem inside the block: for tests and for tuning."""
    global _forced
    before, _forced = _forced, (forward, backward)
    try:
        yield
    finally:
        _forced = before


# --- launch ---------------------------------------------------------------------------------------------------------


def _matrix(tensor: Tensor) -> Tensor:
    """(M, N) with dense rows: a view where the layout has them at equal distances, else a copy."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _sizes(*tensors: Tensor | None) -> int:
    """Bytes of one element of each."""
    return sum(tensor.element_size() for tensor in tensors if tensor is not None)


def _chance(dropout_p: float) -> tuple[int, float]:
    return int(dropout_p * 2**24), 1 / (1 - dropout_p)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    rms: bool,
    unit_offset: bool,
    keep_h: bool,
    keep_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(y, h, mean, rstd) of a checked problem, those that are not kept None."""
    n = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None
    if keep_h:
        h = torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)
    rows = x.numel() // n
    rstd = x.new_empty(rows, dtype=torch.float32) if keep_statistics else None
    mean = x.new_empty(rows, dtype=torch.float32) if keep_statistics and not rms else None
    if rows == 0:
        return y, h, mean, rstd
    x, weight, bias = _matrix(x), _dense(weight), _dense(bias)
    stride_r = 0
    if residual is not None:
        residual = _matrix(residual)
        stride_r = residual.stride(0)
    if _forced is not None:
        blocks = _forced[0]
    else:
        blocks = forward_blocks(n, _sizes(x, residual), _sizes(weight, bias), seed is not None)
    arguments = (x, residual, weight, bias, seed, y, h, mean, rstd, x.stride(0), stride_r)
    numbers = (eps, *_chance(dropout_p))
    with device_of(x):
        if blocks.block_n >= n:
            _forward[(cdiv(rows, blocks.block_m),)](
                *arguments, rows, *numbers, N=n, RMS=rms, UNIT_OFFSET=unit_offset, BLOCK_M=blocks.block_m,
                BLOCK_N=blocks.block_n, num_warps=blocks.num_warps,
            )  # fmt: skip
        else:
            _forward_wide[(rows,)](
                *arguments, *numbers, N=n, RMS=rms, UNIT_OFFSET=unit_offset, BLOCK_N=blocks.block_n,
                STAGES=blocks.num_stages, num_warps=blocks.num_warps,
            )  # fmt: skip
    return y, h, mean, rstd


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    unit_offset: bool,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    needs_residual: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, d residual, dweight, dbias); dx of dtype, d residual of h's, dbias of bias_dtype, those not needed None."""
    n = h.shape[-1]
    rows = h.numel() // n
    dx = torch.empty_like(h, dtype=dtype, memory_format=torch.contiguous_format)
    dresidual = torch.empty_like(h, memory_format=torch.contiguous_format) if needs_residual else None
    new = h.new_zeros if rows == 0 else h.new_empty
    dweight = new(n, dtype=weight.dtype) if needs_weight and weight is not None else None
    dbias = new(n, dtype=bias_dtype) if bias_dtype is not None else None
    if rows == 0:
        return dx, dresidual, dweight, dbias
    dy, h, weight = _matrix(dy), _matrix(h), _dense(weight)
    stride_dh = 0
    if dh is not None:
        dh = _matrix(dh)
        stride_dh = dh.stride(0)
    light = mean is None and (dweight is None or dbias is None)
    if _forced is not None:
        blocks = _forced[1]
    else:
        blocks = backward_blocks(n, _sizes(dy, h, dh), _sizes(weight), light, architecture(h.device))
    mean_product = mean_gradient = None
    with device_of(h):
        if blocks.block_n < n:
            mean_product = torch.empty_like(rstd)
            mean_gradient = None if mean is None else torch.empty_like(rstd)
            _backward_means[(rows,)](
                dy, h, weight, mean, rstd, mean_product, mean_gradient, dy.stride(0), h.stride(0), N=n,
                UNIT_OFFSET=unit_offset, BLOCK_N=_BACKWARD_MEANS.block_n, STAGES=_BACKWARD_MEANS.num_stages,
                num_warps=_BACKWARD_MEANS.num_warps,
            )  # fmt: skip
        tiles, parts = cdiv(rows, blocks.block_m), cdiv(n, blocks.block_n)
        resident = max(1, blocks.programs * multiprocessors(h.device) // parts)
        # Each with at least four tiles, because what each leaves has to be written and added.
        programs = max(1, min(resident, cdiv(tiles, 4)))
        totals = [total for total in (dweight, dbias) if total is not None]
        # One program's sums are the gradients, where they have the dtype of sums: another one would be another kernel.
        alone = programs == 1 and all(total.dtype == torch.float32 for total in totals)
        sums = [
            total if total is None or alone else total.new_empty(programs, n, dtype=torch.float32) for total in (dweight, dbias)
        ]
        _backward[(programs, parts)](
            dy, dh, h, weight, mean, rstd, mean_product, mean_gradient, seed, dx, dresidual, *sums, dy.stride(0), stride_dh,
            h.stride(0), rows, tiles, *_chance(dropout_p), N=n, UNIT_OFFSET=unit_offset, BLOCK_M=blocks.block_m,
            BLOCK_N=blocks.block_n, STAGES=blocks.num_stages, num_warps=blocks.num_warps,
        )  # fmt: skip
        if totals and not alone:
            block_p = next_power_of_2(resident)  # not of `programs`, which follows the number of rows
            block_n = min(512, max(16, 8192 // block_p))
            _add_partials[(cdiv(n, block_n), len(totals))](
                *sums, dweight, dbias, programs, N=n, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=8
            )
    return dx, dresidual, dweight, dbias
