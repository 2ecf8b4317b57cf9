"""linear_cross_entropy on a GPU: vocabulary chunks, matrix products by cuBLAS, one memory-bound Triton kernel in between.

The forward makes the logits of a chunk of the vocabulary for all tokens, z = input W_c^T, in a buffer, takes them into the
running statistics of each token, and goes on to the next chunk in the same buffer. The backward knows lse, makes each chunk's
logits again, turns them in place into d objective / d z, and has two products left: dW_c = dz^T input, complete and
accumulated in float32 inside the one product, and dX += dz W_c, in a float32 accumulator (N, D). What that costs, and why no
other order costs less within the same memory, stands in docs/kernels/linear_cross_entropy.md. Imported at first use, because
it needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, device_of
from .attention.config import precision
from .cross_entropy_triton import FLAG_TILE, ROW_END, Options, Rows, forward, gradient
from .linear_cross_entropy import buffers, vocabulary_chunks

# --- products that leave out what a filter dropped ------------------------------------------------------------------


# Triton would compile a kernel anew where one of these is 1 or a multiple of 16. What it could gain, that A is read wide,
# the kernel says itself.
@triton.jit(do_not_specialize=["m_end", "k_end", "stride_fm", "stride_fk", "accumulate"])
def _filtered_product(
    A,
    B,
    C,
    Flags,
    stride_am,
    stride_ak,
    stride_bk,
    stride_cm,
    stride_fm,
    stride_fk,
    m_end,
    n_end,
    k_end,
    accumulate,
    FLAG_M: tl.constexpr,
    FLAG_K: tl.constexpr,
    PADDED_M: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C (+)= A B, skipping tiles of A whose flags are all zero: one flag for FLAG_M x FLAG_K numbers of A. A goes on, with
    zeros, to multiples of PADDED_M and PADDED_K."""
    # One dimension of programs, since another one ends at 65,535. Those that read the same rows of A follow each other.
    n_tiles = tl.cdiv(n_end, BLOCK_N)
    m0, n0 = tl.program_id(0) // n_tiles * BLOCK_M, tl.program_id(0) % n_tiles * BLOCK_N
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    m64 = m.to(tl.int64)
    flag_m = m0 // FLAG_M + tl.arange(0, BLOCK_M // FLAG_M)
    c_ptrs = C + m64[:, None] * stride_cm + n[None, :]
    m_read, k_read = tl.cdiv(m_end, PADDED_M) * PADDED_M, tl.cdiv(k_end, PADDED_K) * PADDED_K
    exists = (m < m_end)[:, None] & (n < n_end)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if accumulate:
        acc = tl.load(c_ptrs, mask=exists, other=0.0).to(tl.float32)
    for k0 in range(0, k_end, BLOCK_K):
        flag_k = k0 // FLAG_K + tl.arange(0, BLOCK_K // FLAG_K)
        flag_ptrs = Flags + flag_m.to(tl.int64)[:, None] * stride_fm + flag_k.to(tl.int64)[None, :] * stride_fk
        flags = tl.load(flag_ptrs, mask=(flag_m * FLAG_M < m_end)[:, None] & (flag_k * FLAG_K < k_end)[None, :], other=0)
        if tl.max(tl.max(flags, 1), 0) > 0:
            k = k0 + tl.arange(0, BLOCK_K)
            k64 = k.to(tl.int64)
            a_ptrs = A + m64[:, None] * stride_am + k64[None, :] * stride_ak
            a = tl.load(a_ptrs, mask=(m < m_read)[:, None] & (k < k_read)[None, :], other=0.0)
            b_ptrs = B + k64[:, None] * stride_bk + n[None, :]
            b = tl.load(b_ptrs, mask=(k < k_end)[:, None] & (n < n_end)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(c_ptrs, acc.to(C.dtype.element_ty), mask=exists)


# --- launch ---------------------------------------------------------------------------------------------------------


def _multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (+)= a b. Sums are float32 inside cuBLAS; a float32 `out` of 16-bit factors gets them unrounded."""
    if out.dtype != a.dtype and (out.dtype != torch.float32 or a.device.type == "cpu"):
        wide = torch.mm(a.float(), b.float(), out=a.new_empty(out.shape, dtype=torch.float32))
        out.copy_(out + wide if accumulate else wide)
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate and not out.is_meta:  # torch 2.11 cannot do this on meta tensors, which hold no sums
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _filtered(dz: Tensor, b: Tensor, out: Tensor, flags: Tensor, transposed: bool, accumulate: bool = False) -> None:
    """out (+)= dz b, or dz^T b, without the tiles of dz that its flags leave out."""
    a, flag_m, flag_k, padded_m, padded_k = dz, 1, FLAG_TILE, 1, ROW_END
    if transposed:
        a, flags, flag_m, flag_k, padded_m, padded_k = dz.t(), flags.t(), FLAG_TILE, 1, ROW_END, 1
    b = b if b.stride(1) == 1 else b.contiguous()
    (m_end, k_end), n_end = a.shape, b.shape[1]
    block_m, block_n, block_k, num_warps, num_stages = (64, 32, 64, 8, 2) if a.dtype == torch.float32 else (128, 128, 64, 8, 3)
    with device_of(a):
        _filtered_product[(cdiv(m_end, block_m) * cdiv(n_end, block_n),)](
            a, b, out, flags, a.stride(0), a.stride(1), b.stride(0), out.stride(0), flags.stride(0), flags.stride(1), m_end,
            n_end, k_end, int(accumulate), FLAG_M=flag_m, FLAG_K=flag_k, PADDED_M=padded_m, PADDED_K=padded_k,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PRECISION=precision(a.dtype), num_warps=num_warps,
            num_stages=num_stages,
        )  # fmt: skip


def _logits(input: Tensor, w: Tensor, bias: Tensor | None, first: int, out: Tensor) -> None:
    """out = input w^T + bias, rounded once."""
    if bias is None:
        torch.mm(input, w.t(), out=out)
    else:
        torch.addmm(bias[first : first + w.shape[0]].to(input.dtype), input, w.t(), out=out)


def losses(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, x: Options, keep: bool, aux: bool
) -> tuple[Rows, Tensor]:
    """(per-token results, the logits of all chunks where they are to be kept, else nothing)."""
    (n, _), vocabulary = input.shape, linear_weight.shape[0]
    logits = buffers(input, vocabulary, keep)
    chunks = list(vocabulary_chunks(n, vocabulary, input.element_size()))
    rows = Rows.empty(target, aux, len(chunks))
    for i, first, width in chunks:
        z = logits[i if keep else 0, :, :width]
        _logits(input, linear_weight[first : first + width].to(input.dtype), linear_bias, first, z)
        forward(z, target, rows, first, vocabulary, x, padded=True)
    return rows, logits if keep else input.new_empty(0)


def gradients(
    row_grad: Tensor,
    lse: Tensor,
    logits: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    x: Options,
    needs: tuple[bool, bool, bool],
    filtering: bool,
    of_lse: Tensor | None = None,
    of_target: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, linear_weight and linear_bias as `needs` asks for them, given d objective / d loss per token (N) and
    what the forward left; d objective / d lse and / d target logit too, both or none, and then nothing is filtered."""
    (n, _), vocabulary = input.shape, linear_weight.shape[0]
    d_weight = torch.empty_like(linear_weight, memory_format=torch.contiguous_format) if needs[1] else input.new_empty(0)
    d_bias = input.new_empty(vocabulary if needs[2] else 0, dtype=torch.float32)
    chunks = list(vocabulary_chunks(n, vocabulary, input.element_size()))
    d_input = input.new_empty(input.shape if needs[0] else 0, dtype=torch.float32 if len(chunks) > 1 else input.dtype)
    buffer = buffers(input, vocabulary, False)[0]
    flags = input.new_empty(n, cdiv(buffer.shape[1], FLAG_TILE), dtype=torch.int8) if filtering and of_lse is None else None
    for i, first, width in chunks:
        w = linear_weight[first : first + width].to(input.dtype)
        z = dz = buffer[:, :width]
        if logits.numel() > 0:
            z = logits[i, :, :width]
        else:
            _logits(input, w, linear_bias, first, z)
        gradient(z, dz, target, lse, row_grad, first, vocabulary, x, flags, padded=True, of_lse=of_lse, of_target=of_target)
        if needs[0]:
            if flags is None:
                _multiply(dz, w, d_input, accumulate=i > 0)
            else:
                _filtered(dz, w, d_input, flags, transposed=False, accumulate=i > 0)
        if needs[1]:
            if flags is None:
                _multiply(dz.t(), input, d_weight[first : first + width])
            else:
                _filtered(dz, input, d_weight[first : first + width], flags, transposed=True)
        if needs[2]:
            torch.sum(dz, 0, dtype=torch.float32, out=d_bias[first : first + width])
        del w  # a converted chunk of the weight goes before the next one comes
    del buffer, z, dz  # before a second d_input takes their place
    return d_input.to(input.dtype), d_weight, d_bias


__all__ = ["gradients", "losses"]
