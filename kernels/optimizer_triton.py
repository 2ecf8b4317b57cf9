"""Triton kernel of AdamW: what optimizer.py imports where Triton is and csrc/ is not built for the GPU.

One launch for each parameter, one pass over it: gradient, parameter and moments are read once and written once. Numbers that
only the device knows come in a table, a column for each parameter. csrc/optimizer.cu does many parameters in a launch, because
CUDA C++ can pass a table of pointers in the launch itself.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, device_of, grid_x

TABLE = ("factor", "step_size", "root", "decay", "step", "grad_scale", "live")
"""Rows of the table: what the gradient is multiplied by, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), lr * weight_decay, t, what
the gradient is left divided by, and 0 where nothing is to change."""


@triton.jit
def _random_bits(at, seed, step, index, stream):
    """optimizer.random_bits of 8 elements a row, from the first of each row: 16 bits in uint32, (ROWS, 8)."""
    block = at // 8
    zero = (block * 0).to(tl.uint32)
    key = seed.to(tl.uint64) | (step.to(tl.uint64) << 32)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, zero + index, zero + stream, 7)
    column = tl.arange(0, 8)[None, :]
    word = tl.where(column < 4, tl.where(column < 2, w0, w1), tl.where(column < 6, w2, w3))
    return tl.where(column % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _rounded(x, at, seed, step, index, stream, STOCHASTIC: tl.constexpr, dtype: tl.constexpr):
    """x in a narrower dtype, with the stream's random bits or to the nearest."""
    if STOCHASTIC:
        bits = x.to(tl.uint32, bitcast=True) + _random_bits(at, seed, step, index, stream)
        up = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), up, x)  # what is not finite stays so
    return x.to(dtype)


@triton.jit
def _larger(a, b):
    """torch.maximum: NaN where one is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit(do_not_specialize=["column", "columns", "index", "seed"])
def _adamw(
    Param,
    Grad,
    ExpAvg,
    ExpAvgSq,
    MaxExpAvgSq,
    Master,
    Ema,
    Table,
    column,
    columns,
    numel,
    index,
    seed,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    l2,
    ema_decay,
    one_minus_ema_decay,
    UNSCALE: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
):
    factor = tl.load(Table + column)
    step_size = tl.load(Table + columns + column)
    root = tl.load(Table + 2 * columns + column)
    decay = tl.load(Table + 3 * columns + column)
    step = tl.load(Table + 4 * columns + column).to(tl.int32)
    live = tl.load(Table + 6 * columns + column).to(tl.int64)

    # Eight elements a row, which share the words of one call of Philox.
    row = tl.program_id(0).to(tl.int64) * (8 * ROWS) + tl.arange(0, ROWS)[:, None] * 8
    at = row + tl.arange(0, 8)[None, :]
    changes = at < numel * live
    raw = tl.load(Grad + at, mask=changes, other=0.0).to(tl.float32)
    w = tl.load((Param if Master is None else Master) + at, mask=changes, other=0.0).to(tl.float32)
    m = tl.load(ExpAvg + at, mask=changes, other=0.0).to(tl.float32)
    v = tl.load(ExpAvgSq + at, mask=changes, other=0.0).to(tl.float32)

    finite = tl.where(tl.abs(w) < float("inf"), w, 0.0)  # a parameter of -inf stays one, as in torch
    g = factor * raw + l2 * finite
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + (one_minus_beta2 * g) * g  # in this order: g * g alone leaves float32 above 1.8e19
    largest = v
    if MaxExpAvgSq is not None:
        before = tl.load(MaxExpAvgSq + at, mask=changes, other=0.0).to(tl.float32)
        largest = _larger(v, before)
    w -= step_size * tl.div_rn(m, tl.sqrt_rn(largest) * root + eps) + decay * finite

    param = _rounded(w, row, seed, step, index, 0, STOCHASTIC, Param.dtype.element_ty)
    exp_avg = _rounded(m, row, seed, step, index, 1, STOCHASTIC, ExpAvg.dtype.element_ty)
    exp_avg_sq = _rounded(v, row, seed, step, index, 2, STOCHASTIC, ExpAvgSq.dtype.element_ty)
    tl.store(Param + at, param, mask=changes)
    tl.store(ExpAvg + at, exp_avg, mask=changes)
    tl.store(ExpAvgSq + at, exp_avg_sq, mask=changes)
    if MaxExpAvgSq is not None:  # the larger of two stored numbers needs no rounding of its own
        stored = _larger(exp_avg_sq.to(tl.float32), before)
        tl.store(MaxExpAvgSq + at, stored.to(MaxExpAvgSq.dtype.element_ty), mask=changes)
    if Master is not None:
        tl.store(Master + at, w, mask=changes)
    if Ema is not None:
        now = param.to(tl.float32) if Master is None else w
        average = tl.load(Ema + at, mask=changes, other=0.0)
        # From the nearer end, as torch.lerp: the rounded coefficient is the smaller one.
        if one_minus_ema_decay < 0.5:
            average += one_minus_ema_decay * (now - average)
        else:
            average = now - ema_decay * (now - average)
        tl.store(Ema + at, average, mask=changes)
    if ZERO_GRAD:
        tl.store(Grad + at, tl.zeros_like(raw).to(Grad.dtype.element_ty), mask=at < numel)
    elif UNSCALE:
        unscaled = tl.div_rn(raw, tl.load(Table + 5 * columns + column))
        tl.store(Grad + at, unscaled.to(Grad.dtype.element_ty), mask=changes)


# --- launch ---------------------------------------------------------------------------------------------------------

BLOCK = 1024
"""Elements of a program of 4 warps: two loads of 16 bytes a thread and float32 tensor, all in flight together."""


def update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    emas: list[Tensor],
    indices: list[int],
    table: Tensor,
    numbers: tuple[Any, ...],
) -> None:
    """One launch for each parameter. table: float32, a row for each of TABLE, a column for each parameter. numbers: what the
    kernel takes from seed to STOCHASTIC."""
    columns, nothing = len(params), [None] * len(params)
    lists: Any = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs or nothing, masters or nothing, emas or nothing)
    kernel: Any = None
    with device_of(table):
        for i, tensors in enumerate(zip(*lists)):
            numel = tensors[0].numel()
            if numel == 0:
                continue
            grid = grid_x(cdiv(numel, BLOCK))
            arguments = (*tensors, table, i, columns, numel, indices[i], *numbers, BLOCK // 8)
            # Triton takes 40 us to find the kernel for its arguments. These are all that it compiles anew for.
            addresses = functools.reduce(operator.or_, (tensor.data_ptr() for tensor in tensors if tensor is not None))
            regular = addresses % 16 == 0 and numel % 16 == 0 and numel < 2**31
            if regular and kernel is not None:
                kernel[(*grid, 1, 1)](*arguments)
            else:
                launched = _adamw[grid](*arguments, num_warps=4)
                kernel = launched if regular else kernel
