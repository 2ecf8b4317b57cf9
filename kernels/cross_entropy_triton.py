"""The Triton kernels of cross_entropy, which linear_cross_entropy runs on each chunk of its logits.

A row of logits may come in pieces: each launch sees `width` columns of it, from `first` on, and the state of the row (running
maximum and sum of exponentials, target logit, weighted sum, argmax) waits in memory in between. Plain cross_entropy is the case
of one piece. Imported at first use, because it needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, device_of, next_power_of_2
from .attention.tile import _tanh


@triton.jit
def _capped(z, softcap, SOFTCAP: tl.constexpr):
    z = z.to(tl.float32)
    if SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


# Triton would compile a kernel anew where one of these is 1 or a multiple of 16. It gains nothing from that, unlike from
# `row_end` and the rows' strides, which say how wide it may load.
_NUMBERS = ["stride_row_grad", "stride_flags", "width", "n_rows", "vocabulary", "ignore_index"]


@triton.jit(do_not_specialize=_NUMBERS)
def _forward(
    Z,
    ClassWeight,
    WeightSum,
    Target,
    State,
    Index,
    Loss,
    Lse,
    TargetLogit,
    Correct,
    stride_zm,
    first,
    width,
    row_end,
    n_rows,
    vocabulary,
    ignore_index,
    smoothing,
    softcap,
    z_loss,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns BLOCK_M rows and walks over their columns. State is (4, n_rows). What lies between `width` and `row_end`
    may be read, of ClassWeight too, and written in `_gradient`, which keeps accesses wide where the width is odd."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row64 = row.to(tl.int64)  # tokens x vocabulary passes 2^31, and so may tokens x 3
    some = row < n_rows
    z_row = Z + row64 * stride_zm
    y = tl.load(Target + row, mask=some, other=0)
    inside = (y >= 0) & (y < vocabulary)

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    target_logit = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    index = tl.zeros((BLOCK_M,), tl.int32)
    if first > 0:
        row_max = tl.load(State + row, mask=some, other=0.0)
        row_sum = tl.load(State + n_rows + row64, mask=some, other=0.0)
        target_logit = tl.load(State + 2 * n_rows.to(tl.int64) + row, mask=some, other=0.0)
        if SMOOTHING:
            total = tl.load(State + 3 * n_rows.to(tl.int64) + row, mask=some, other=0.0)
        if Index is not None:
            index = tl.load(Index + row, mask=some, other=0)

    has_target = some & (y >= first) & (y < first + width)
    z_target = tl.load(z_row + (y - first), mask=has_target, other=0.0)
    target_logit = tl.where(has_target, _capped(z_target, softcap, SOFTCAP), target_logit)

    for begin in range(0, width, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        exists = column < width
        reads = column < row_end
        z = tl.load(z_row[:, None] + column[None, :], mask=some[:, None] & reads[None, :], other=0.0)
        z = _capped(z, softcap, SOFTCAP)
        if SMOOTHING:
            weighted = z
            if ClassWeight is not None:
                weighted = z * tl.load(ClassWeight + first + column, mask=reads, other=0.0)[None, :]
            total += tl.sum(tl.where(exists[None, :], weighted, 0.0), 1)
        z = tl.where(exists[None, :], z, float("-inf"))
        block_max = tl.max(z, 1)
        if Index is not None:
            found = tl.min(tl.where(z == block_max[:, None], column[None, :], width), 1) + first
            index = tl.where(block_max > row_max, found, index)
        new_max = tl.maximum(row_max, block_max)
        # Nothing but -inf so far (a vocabulary closed by a bias of -inf): -inf - -inf would be NaN.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - safe_max) + tl.sum(tl.exp(z - safe_max[:, None]), 1)
        row_max = new_max

    if first + width < vocabulary:
        tl.store(State + row, row_max, mask=some)
        tl.store(State + n_rows + row64, row_sum, mask=some)
        tl.store(State + 2 * n_rows.to(tl.int64) + row, target_logit, mask=some)
        if SMOOTHING:
            tl.store(State + 3 * n_rows.to(tl.int64) + row, total, mask=some)
        if Index is not None:
            tl.store(Index + row, index, mask=some)
    else:
        valid = y != ignore_index
        lse = row_max + tl.log(row_sum)
        loss = lse - target_logit
        if ClassWeight is not None:
            loss *= tl.load(ClassWeight + y, mask=some & inside, other=0.0)
        if SMOOTHING:
            weight_sum = tl.load(WeightSum) if ClassWeight is not None else vocabulary * 1.0
            loss = (1 - smoothing) * loss + smoothing / vocabulary * (weight_sum * lse - total)
        loss += z_loss * lse * lse
        loss = tl.where(valid, tl.where(inside, loss, float("nan")), 0.0)
        tl.store(Loss + row, loss, mask=some)
        tl.store(Lse + row, lse, mask=some)
        if Index is not None:
            known = valid & inside
            tl.store(TargetLogit + row, tl.where(known, target_logit, 0.0), mask=some)
            tl.store(Correct + row, (known & (index == y)).to(tl.int8), mask=some)


@triton.jit(do_not_specialize=_NUMBERS)
def _gradient(
    Z,
    Out,
    ClassWeight,
    WeightSum,
    Target,
    Lse,
    RowGrad,
    OfLse,
    OfTarget,
    Flags,
    stride_zm,
    stride_om,
    stride_row_grad,
    stride_flags,
    first,
    width,
    row_end,
    n_rows,
    vocabulary,
    ignore_index,
    smoothing,
    softcap,
    z_loss,
    threshold,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program turns BLOCK_M x BLOCK_N logits into d objective / d z, given d objective / d loss of each row. Out may be Z.
    Behind `width` it writes zeros, because a matrix product may read there. Flags says of each run of TILE columns whether
    anything in it reaches `threshold`, relative to the row's."""
    # One dimension of programs, since another one ends at 65,535.
    column_tiles = tl.cdiv(width, BLOCK_N)
    column_tile = tl.program_id(0) % column_tiles
    row = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row64 = row.to(tl.int64)
    some = row < n_rows
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = column < width
    y = tl.load(Target + row, mask=some, other=ignore_index)
    valid = y != ignore_index  # other rows are not read: their gradient is exactly zero, whatever the logits hold
    inside = (y >= 0) & (y < vocabulary)
    wanted = valid
    if OfLse is not None:
        of_lse = tl.load(OfLse + row, mask=some, other=0.0)
        wanted = valid | (of_lse != 0.0)  # an ignored token has a log-sum-exp all the same

    lse = tl.load(Lse + row, mask=wanted, other=0.0)
    at_target = tl.full((BLOCK_M,), 1.0, tl.float32) - smoothing
    if ClassWeight is not None:
        at_target *= tl.load(ClassWeight + y, mask=valid & inside, other=0.0)
    of_softmax = at_target + 2 * z_loss * lse
    if SMOOTHING:
        weight_sum = tl.load(WeightSum) if ClassWeight is not None else vocabulary * 1.0
        of_softmax += smoothing / vocabulary * weight_sum
    row_grad = tl.load(RowGrad + row64 * stride_row_grad, mask=valid, other=0.0).to(tl.float32)
    row_grad = tl.where(valid & ~inside, float("nan"), row_grad)

    reads = column < row_end
    z = tl.load(Z + row64[:, None] * stride_zm + column[None, :], mask=wanted[:, None] & reads[None, :], other=0.0)
    z = _capped(z, softcap, SOFTCAP)
    probability = tl.exp(z - lse[:, None])
    grad = of_softmax[:, None] * probability
    if SMOOTHING:
        uniform = smoothing / vocabulary
        if ClassWeight is not None:
            grad -= uniform * tl.load(ClassWeight + first + column, mask=reads, other=0.0)[None, :]
        else:
            grad -= uniform
    grad = tl.where(column[None, :] == (y - first)[:, None], grad - at_target[:, None], grad)
    if SOFTCAP:
        capped = z / softcap
        grad *= 1 - capped * capped
    grad = tl.where(valid[:, None], grad, 0.0)
    if column_tile * BLOCK_N + BLOCK_N > width:  # the last tile: other ones need no register for what exists
        grad = tl.where(exists[None, :], grad, 0.0)
    if Flags is not None:
        counts = tl.where(tl.abs(grad) < threshold, 0, 1).to(tl.int8)  # this way round NaN counts
        counts = tl.max(tl.reshape(counts, (BLOCK_M, BLOCK_N // TILE, TILE)), 2)
        tile = column_tile * (BLOCK_N // TILE) + tl.arange(0, BLOCK_N // TILE)
        flag_ptrs = Flags + row64[:, None] * stride_flags + tile[None, :]
        tl.store(flag_ptrs, counts, mask=some[:, None] & (tile * TILE < width)[None, :])
    grad *= row_grad[:, None]  # which is 0 where `valid` is not
    if OfLse is not None:
        of_target = tl.load(OfTarget + row, mask=valid, other=0.0)
        more = of_lse[:, None] * probability
        more = tl.where(column[None, :] == (y - first)[:, None], more + of_target[:, None], more)
        if SOFTCAP:
            capped = z / softcap
            more *= 1 - capped * capped
        grad += tl.where(wanted[:, None] & exists[None, :], more, 0.0)
    out_ptrs = Out + row64[:, None] * stride_om + column[None, :]
    tl.store(out_ptrs, grad.to(Out.dtype.element_ty), mask=some[:, None] & reads[None, :])


# --- launch ---------------------------------------------------------------------------------------------------------

FLAG_TILE = 64  # columns for which `gradient` leaves one flag
# Padded rows of logits, and class weights, go on to a multiple of so many columns: a kernel reads them in vectors of 16, and
# products of bfloat16 on processors with AMX read 32 at a time, whatever a row's length.
ROW_END = 32


@dataclass(frozen=True)
class Options:
    """What a loss is made of, besides its tensors. class_weight, float32, V and zeros up to a multiple of ROW_END, and
    weight_sum () go together."""

    ignore_index: int
    label_smoothing: float
    softcap: float
    z_loss: float
    class_weight: Tensor | None = None
    weight_sum: Tensor | None = None


def options(ignore_index: int, label_smoothing: float, softcap: float, z_loss: float, weight: Tensor | None) -> Options:
    if weight is None:
        return Options(ignore_index, label_smoothing, softcap, z_loss)
    weight = F.pad(weight.float(), (0, -weight.shape[0] % ROW_END))
    return Options(ignore_index, label_smoothing, softcap, z_loss, weight, weight.sum())


def block(width: int, plain: bool = True) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps): 16 numbers a thread and up to 4,096 of a row in a program; half of both with class
    weights, softcap, an argmax or gradients of what goes with the loss, which take registers. Short rows share a program."""
    if triton.knobs.runtime.interpret:
        return 32, 128, 1
    most, each = (4096, 16) if plain else (2048, 8)
    block_n = min(max(next_power_of_2(width), FLAG_TILE), most)
    block_m = max(2048 // block_n, 1)
    return block_m, block_n, block_m * block_n // (32 * each)


@dataclass(frozen=True)
class Rows:
    """Per token: what the forward gives. state and index hold what is known of a row between its pieces."""

    loss: Tensor
    lse: Tensor
    target_logits: Tensor
    correct: Tensor
    state: Tensor
    index: Tensor | None

    @staticmethod
    def empty(target: Tensor, aux: bool, pieces: int) -> Rows:
        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return target.new_empty(shape, dtype=dtype)

        n = target.shape[0]
        state = new(4 if pieces > 1 else 0, n)
        index = new(n, dtype=torch.int32) if aux else None
        return Rows(new(n), new(n), new(n if aux else 0), new(n if aux else 0, dtype=torch.bool), state, index)


def _row_end(width: int, padded: bool) -> int:
    return cdiv(width, ROW_END) * ROW_END if padded else width


def _block_of(z: Tensor, padded: bool, plain: bool = True) -> tuple[int, int, int]:
    """Of padded logits the last chunk may be narrow: it takes the block of the whole buffer, since each compiles anew."""
    return block(z.stride(0) if padded else z.shape[1], plain)


def forward(z: Tensor, target: Tensor, rows: Rows, first: int, vocabulary: int, x: Options, padded: bool = False) -> None:
    """Take columns first.. of every row, z (N, width), into `rows`; the last ones give the results. `padded`: each row goes on
    to a multiple of ROW_END columns, with anything in them."""
    n, width = z.shape
    if n == 0:
        return
    plain = x.class_weight is None and x.softcap == 0 and rows.index is None
    block_m, block_n, num_warps = _block_of(z, padded, plain)
    with device_of(z):
        _forward[(cdiv(n, block_m),)](
            z, x.class_weight, x.weight_sum, target, rows.state, rows.index, rows.loss, rows.lse, rows.target_logits,
            rows.correct.view(torch.int8), z.stride(0), first, width, _row_end(width, padded), n, vocabulary, x.ignore_index,
            x.label_smoothing, x.softcap or 1.0, x.z_loss, SMOOTHING=x.label_smoothing > 0, SOFTCAP=x.softcap > 0,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
        )  # fmt: skip


def gradient(
    z: Tensor,
    out: Tensor,
    target: Tensor,
    lse: Tensor,
    row_grad: Tensor,
    first: int,
    vocabulary: int,
    x: Options,
    flags: Tensor | None = None,
    padded: bool = False,
    of_lse: Tensor | None = None,
    of_target: Tensor | None = None,
) -> None:
    """Logits z (N, width) of columns first.. to their gradient in out, which may be z, given that of each token's loss and,
    both or none, of its lse and its target logit. flags (N, tiles) int8 are filled for `FLAG_TILE` columns each where given."""
    n, width = z.shape
    if n == 0:
        return
    block_m, block_n, num_warps = _block_of(z, padded, of_lse is None)
    with device_of(z):
        _gradient[(cdiv(n, block_m) * cdiv(width, block_n),)](
            z, out, x.class_weight, x.weight_sum, target, lse, row_grad, of_lse, of_target, flags, z.stride(0), out.stride(0),
            row_grad.stride(0), 0 if flags is None else flags.stride(0), first, width, _row_end(width, padded), n, vocabulary,
            x.ignore_index, x.label_smoothing, x.softcap or 1.0, x.z_loss, resolution(out.dtype),
            SMOOTHING=x.label_smoothing > 0, SOFTCAP=x.softcap > 0, TILE=FLAG_TILE, BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=num_warps,
        )  # fmt: skip


def resolution(dtype: torch.dtype) -> float:
    """What a sum of the size of 1 in this format hardly sees any more: 2^-12 in bfloat16."""
    return torch.finfo(dtype).eps / 32


__all__ = ["FLAG_TILE", "ROW_END", "Options", "Rows", "block", "forward", "gradient", "options", "resolution"]
