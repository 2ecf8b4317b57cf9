"""Triton kernels of the activations: what activation.py imports at the first use of one.

Inputs are seen as rows of `features` columns, dense within a row. A program owns a tile of BLOCK_M rows and BLOCK_N columns,
loads what the formula reads, computes in float32 and stores the result: nothing passes through memory twice, and the backward
recomputes from the inputs. Where a bias gets a gradient a program owns a strip of rows instead and keeps the sum of its
gradients in registers; a second, ordered sum over the strips makes the result the same bits every time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, device_of, next_power_of_2
from .attention.tile import kept_by_dropout


@triton.jit
def _sigmoid(x):
    """(sigmoid, its derivative), from the one exponential that neither overflows nor cancels."""
    t = tl.exp2(-1.4426950408889634 * tl.abs(x))
    r = 1.0 / (1.0 + t)
    return tl.where(x >= 0, r, t * r), t * r * r


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, BITS: tl.constexpr):
    """(activation, its derivative) of float32 x that was stored in BITS bits; what the caller leaves unused is not computed."""
    if ACTIVATION == "silu":
        s, ds = _sigmoid(x)
        return x * s, s + x * ds
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 is sigmoid(2 u). Where the square is cut both are constant, and without the cut x^3 would overflow.
        square = tl.minimum(x * x, 1024.0)
        s, ds = _sigmoid(x * (1.5957691216057308 + 0.07135481282052128 * square))
        return x * s, s + x * ds * (1.5957691216057308 + 0.21406443846156384 * square)
    else:
        bell = tl.exp2(-0.7213475204444817 * x * x)
        if BITS == 32:
            cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        else:
            # The library's erf takes more instructions than a multiprocessor issues while 16-bit data arrive. This one
            # (Abramowitz and Stegun 7.1.26, error 1.5e-7) shares the exponential with the derivative.
            t = 1.0 / (1.0 + 0.23164188 * tl.abs(x))
            tail = t * (0.12741479 + t * (-0.14224838 + t * (0.71070687 + t * (-0.72657601 + t * 0.53070271)))) * bell
            cdf = tl.where(x >= 0, 1.0 - tail, tail)
        return x * cdf, cdf + x * (0.3989422804014327 * bell)


@triton.jit
def _tile(pid, n_tiles, BLOCK_N: tl.constexpr):
    """(row tile, first column) of a program. 64 bits: one row may be a whole tensor, and rows times stride overflow 32."""
    return (pid // n_tiles).to(tl.int64), (pid % n_tiles).to(tl.int64) * BLOCK_N


@triton.jit
def _rows_at(X, i, j0, stride, VECTOR: tl.constexpr):
    """Pointers to column j0 of rows i. Strides and columns come in units of VECTOR elements, so that the compiler knows how far
    rows are aligned; in elements a stride may pass 2^31."""
    return X + j0 + i * (stride.to(tl.int64) * VECTOR)


# Triton would compile a kernel anew where one of these is 1 or a multiple of 16. VECTOR says all that it gains from that.
_NUMBERS = [
    *("n_rows", "n_vectors", "n_tiles", "rows_per_program", "threshold"),
    *("stride_gate", "stride_up", "stride_out", "stride_grad_out", "stride_grad_gate", "stride_grad_up"),
]


@triton.jit(do_not_specialize=_NUMBERS)
def _forward(
    Gate,
    Up,
    GateBias,
    UpBias,
    Seed,
    Out,
    stride_gate,
    stride_up,
    stride_out,
    n_rows,
    n_vectors,
    n_tiles,
    threshold,
    keep_scale,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, j0 = _tile(tl.program_id(0), n_tiles, BLOCK_N)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    inside_j = j < (n_vectors - j0 // VECTOR) * VECTOR
    inside = (i < n_rows) & inside_j
    x = tl.load(_rows_at(Gate, i, j0, stride_gate, VECTOR) + j, mask=inside, other=0.0).to(tl.float32)
    if GateBias is not None:
        x += tl.load(GateBias + j0 + j, mask=inside_j, other=0.0).to(tl.float32)
    y, _ = _activate(x, ACTIVATION, Gate.dtype.element_ty.primitive_bitwidth)
    if Up is not None:
        u = tl.load(_rows_at(Up, i, j0, stride_up, VECTOR) + j, mask=inside, other=0.0).to(tl.float32)
        if UpBias is not None:
            u += tl.load(UpBias + j0 + j, mask=inside_j, other=0.0).to(tl.float32)
        y *= u
    if Seed is not None:
        keep = kept_by_dropout(
            tl.load(Seed), tl.load(Seed + 1).to(tl.uint32), 0, tile * BLOCK_M, j0, threshold, BLOCK_M, BLOCK_N
        )
        y = tl.where(keep, y * keep_scale, 0.0)
    tl.store(_rows_at(Out, i, j0, stride_out, VECTOR) + j, y.to(Out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS)
def _backward(
    Gate,
    Up,
    GateBias,
    UpBias,
    Seed,
    GradOut,
    GradGate,
    GradUp,
    SumGate,
    SumUp,
    stride_gate,
    stride_up,
    stride_grad_out,
    stride_grad_gate,
    stride_grad_up,
    n_rows,
    n_vectors,
    n_tiles,
    rows_per_program,
    threshold,
    keep_scale,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    strip, j0 = _tile(tl.program_id(0), n_tiles, BLOCK_N)
    j = tl.arange(0, BLOCK_N)[None, :]
    inside_j = j < (n_vectors - j0 // VECTOR) * VECTOR
    if GateBias is not None:
        gate_bias = tl.load(GateBias + j0 + j, mask=inside_j, other=0.0).to(tl.float32)
    if UpBias is not None:
        up_bias = tl.load(UpBias + j0 + j, mask=inside_j, other=0.0).to(tl.float32)
    if SumGate is not None:
        sum_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SumUp is not None:
        sum_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    SUMS: tl.constexpr = SumGate is not None or SumUp is not None
    for step in range(0, rows_per_program if SUMS else BLOCK_M, BLOCK_M):  # without sums one step, and no loop
        i0 = strip * rows_per_program + step
        i = i0 + tl.arange(0, BLOCK_M)[:, None]
        inside = (i < n_rows) & inside_j
        x = tl.load(_rows_at(Gate, i, j0, stride_gate, VECTOR) + j, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(_rows_at(GradOut, i, j0, stride_grad_out, VECTOR) + j, mask=inside, other=0.0).to(tl.float32)
        if Seed is not None:
            keep = kept_by_dropout(tl.load(Seed), tl.load(Seed + 1).to(tl.uint32), 0, i0, j0, threshold, BLOCK_M, BLOCK_N)
            g = tl.where(keep, g * keep_scale, 0.0)
        if GateBias is not None:
            x += gate_bias
        y, slope = _activate(x, ACTIVATION, Gate.dtype.element_ty.primitive_bitwidth)
        if Up is not None:
            u = tl.load(_rows_at(Up, i, j0, stride_up, VECTOR) + j, mask=inside, other=0.0).to(tl.float32)
            if UpBias is not None:
                u += up_bias
            grad_up = g * y
            tl.store(_rows_at(GradUp, i, j0, stride_grad_up, VECTOR) + j, grad_up.to(GradUp.dtype.element_ty), mask=inside)
            if SumUp is not None:
                sum_up += grad_up
            g *= u
        grad_gate = g * slope
        tl.store(_rows_at(GradGate, i, j0, stride_grad_gate, VECTOR) + j, grad_gate.to(GradGate.dtype.element_ty), mask=inside)
        if SumGate is not None:
            sum_gate += grad_gate
    out = strip * n_vectors * VECTOR + j0 + tl.arange(0, BLOCK_N)
    inside_out = tl.arange(0, BLOCK_N) < (n_vectors - j0 // VECTOR) * VECTOR
    if SumGate is not None:
        tl.store(SumGate + out, tl.sum(sum_gate, 0), mask=inside_out)
    if SumUp is not None:
        tl.store(SumUp + out, tl.sum(sum_up, 0), mask=inside_out)


# --- launch ---------------------------------------------------------------------------------------------------------

BYTES = 4096
"""Of one input that a program of 4 warps reads at a time: two loads of 16 bytes a thread."""
PROGRAMS = 2048
"""Aim of the backward with a bias gradient: a few waves of any GPU. A constant, so that sums agree from one GPU to the next."""
WARPS = 4


def blocks(features: int, elements: int, widest: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) of so many elements: the widest tile, up to `widest`, of those that waste the fewest columns. It does
    not follow the number of rows: each number would compile a kernel of its own."""
    if features <= 128:
        block_n = max(next_power_of_2(features), 16)
    else:
        block_n = min((128 << k for k in range((widest // 128).bit_length())), key=lambda n: (cdiv(features, n) * n, -n))
    return elements // block_n, block_n


def _rows(tensor: Tensor) -> Tensor:
    """As (rows, columns), dense within a row; a copy where the strides allow no such view."""
    tensor = tensor.reshape(-1, tensor.shape[-1])
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _one_row(*tensors: Tensor) -> bool:
    """Whether all are dense, so that they can be taken for one long row: then no row starts off a 16-byte boundary, whatever
    their width. Not `is_contiguous`, which any single row is: a part of a wider one would take other kernels than many are."""
    return all(tensor.stride() == (tensor.shape[1], 1) for tensor in tensors)


def _vector(*tensors: Tensor) -> int:
    """The number of elements, up to 16 bytes, that divides every row and row stride."""
    return math.gcd(16 // tensors[0].element_size(), *(n for x in tensors for n in (x.shape[1], x.stride(0))))


def _halves(tensor: Tensor, up: Tensor | None, packed: bool) -> tuple[Tensor, Tensor | None]:
    if packed:
        return tuple(_rows(tensor).chunk(2, dim=1))  # type: ignore[return-value]
    return _rows(tensor), None if up is None else _rows(up)


def _drop(dropout_p: float) -> tuple[int, float]:
    """(threshold, scale of what is kept)."""
    return int(dropout_p * 2**24), 1 / (1 - dropout_p)


def forward(
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    packed: bool,
    dropout_p: float,
) -> Tensor:
    """See activation.activation_reference; launches on the current stream."""
    out = gate.new_empty(*gate.shape[:-1], gate.shape[-1] // (2 if packed else 1))
    if out.numel() == 0:
        return out
    x, u = _halves(gate, up, packed)
    y = _rows(out)
    size = BYTES // y.element_size()
    if gate_bias is None and up_bias is None and seed is None and _one_row(*_given(x, u, y)):
        x, y, u = x.view(1, -1), y.view(1, -1), None if u is None else u.view(1, -1)
        block_m, block_n = 1, size
    else:
        block_m, block_n = blocks(y.shape[1], size, 1024)
    (rows, features), vector = y.shape, _vector(*_given(x, u, y))
    tiles = cdiv(features, block_n)
    threshold, keep_scale = _drop(dropout_p)
    with device_of(gate):
        _forward[(cdiv(rows, block_m) * tiles,)](
            x, u, _dense(gate_bias), _dense(up_bias), seed, y, x.stride(0) // vector, 0 if u is None else u.stride(0) // vector,
            y.stride(0) // vector, rows, features // vector, tiles, threshold, keep_scale, ACTIVATION=activation, VECTOR=vector,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=WARPS,
        )  # fmt: skip
    return out


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def backward(
    grad: Tensor,
    needs_gate_bias: bool,
    needs_up_bias: bool,
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    packed: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of gate (packed: of both halves in one tensor), up, gate_bias and up_bias."""
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grad_up = None if up is None else torch.empty_like(up, memory_format=torch.contiguous_format)
    wanted = [bias if needs else None for bias, needs in ((gate_bias, needs_gate_bias), (up_bias, needs_up_bias))]
    if grad.numel() == 0:
        return grad_gate, grad_up, *(None if bias is None else torch.zeros_like(bias) for bias in wanted)  # type: ignore[return-value]
    x, u = _halves(gate, up, packed)
    dx, du = _halves(grad_gate, grad_up, packed)
    g = _rows(grad)
    sums = needs_gate_bias or needs_up_bias
    # Sums and random words together are too many registers for the whole tile.
    size = (BYTES // 2 if sums and seed is not None else BYTES) // g.element_size()
    if gate_bias is None and up_bias is None and seed is None and _one_row(*_given(x, u, dx, du, g)):
        x, dx, g = x.view(1, -1), dx.view(1, -1), g.view(1, -1)
        u, du = (None if tensor is None else tensor.view(1, -1) for tensor in (u, du))
        block_m, block_n = 1, size
    else:
        block_m, block_n = blocks(g.shape[1], size, 256 if sums else 1024)
    (rows, features), vector = g.shape, _vector(*_given(x, u, dx, du, g))
    tiles, per_program = cdiv(features, block_n), block_m
    if sums:  # long strips, since each writes as many partial sums as a row of 4-byte numbers
        strips = cdiv(PROGRAMS, tiles)
        per_program = max(cdiv(cdiv(rows, strips), block_m), cdiv(32, block_m)) * block_m
    strips = cdiv(rows, per_program)
    partial = [
        None if bias is None else torch.empty(strips, features, dtype=torch.float32, device=gate.device) for bias in wanted
    ]
    threshold, keep_scale = _drop(dropout_p)
    with device_of(gate):
        _backward[(strips * tiles,)](
            x, u, _dense(gate_bias), _dense(up_bias), seed, g, dx, du, *partial, x.stride(0) // vector,
            0 if u is None else u.stride(0) // vector, g.stride(0) // vector, dx.stride(0) // vector,
            0 if du is None else du.stride(0) // vector, rows, features // vector, tiles, per_program, threshold,
            keep_scale, ACTIVATION=activation, VECTOR=vector, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=WARPS,
        )  # fmt: skip
    grads = [None if bias is None or sum_ is None else sum_.sum(0).to(bias.dtype) for bias, sum_ in zip(wanted, partial)]
    return grad_gate, grad_up, grads[0], grads[1]
