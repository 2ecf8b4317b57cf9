"""Attention for any device in plain PyTorch operators, without the S x T matrix: the implementation "cpu".

Shapes as in reference.py. One sequence at a time, in blocks of BLOCK_M queries and BLOCK_N keys; blocks outside the window
are skipped. The forward keeps a running maximum and sum of every row (Milakov & Gimelshein 2018, Dao et al. 2022), the
backward computes each block of weights again from lse:

    p = exp(s - lse),  dp = (dO V^T) * keep / (1 - dropout_p),  ds = p * (dp - delta),  delta = rowsum(dO * O) - dlse

The H query heads that share a key head lie below each other in one matrix, so keys and values are never repeated, and their
gradients add up inside the product. All is computed in float32 (float64 for float64) and rounded once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .reference import Inputs, _one, keep_mask, visible

# A block of scores of eight heads is 1 MiB, about a core's cache. BLOCK_N is a multiple of 4, as dropout draws by fours.
BLOCK_M, BLOCK_N = 128, 256


def _wide(tensor: Tensor) -> Tensor:
    """(1, positions, heads, head_dim) as (heads, positions, head_dim) in the dtype of the computation."""
    return tensor[0].transpose(0, 1).to(torch.promote_types(tensor.dtype, torch.float32))


def _part(tensor: Tensor, rows: slice, keys: slice) -> Tensor:
    """A block of what broadcasts to (H, S, T)."""
    return tensor[:, rows if tensor.shape[1] > 1 else slice(None), keys if tensor.shape[2] > 1 else slice(None)]


def _blocks(x: Inputs) -> Iterator[tuple[slice, list[slice]]]:
    """Every block of rows, with the blocks of keys inside its window."""
    s, t = x.lengths
    diagonal = 0 if x.top_left else t - s
    for i0 in range(0, s, BLOCK_M):
        i1 = min(i0 + BLOCK_M, s)
        first = max(i0 + diagonal - x.window_left, 0) if x.window_left >= 0 else 0
        last = min(i1 + diagonal + x.window_right, t) if x.window_right >= 0 else t
        starts = range(first // BLOCK_N * BLOCK_N, last, BLOCK_N)
        yield slice(i0, i1), [slice(j0, min(j0 + BLOCK_N, last)) for j0 in starts]


def _finite(tensor: Tensor) -> Tensor:
    """0 for -inf, so that exp(-inf - it) is 0 and not NaN."""
    return tensor.masked_fill(tensor == -math.inf, 0.0)


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """(H, m, n) as (G, H / G * m, n): the rows of all heads that share a key head below each other."""
    heads, m, n = tensor.shape
    return tensor.reshape(groups, heads * m // max(groups, 1), n)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (H, m, d) times b (G, d, n), which H / G heads share: (H, m, n)."""
    return (_grouped(a, b.shape[0]) @ b).view(*a.shape[:2], b.shape[2])


def _scores(x: Inputs, q: Tensor, k: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
    """(scores, -inf where a key is not seen; the capped product of q and k), both (H, rows, keys)."""
    s, t = x.lengths
    diagonal = 0 if x.top_left else t - s
    capped = _product(q, k.mT)
    if x.softcap > 0:
        capped = x.softcap * torch.tanh(capped / x.softcap)
    scores = capped
    i, j = (torch.arange(part.start, part.stop, device=q.device) for part in (rows, keys))
    if x.alibi_slopes is not None:
        scores = scores - x.alibi_slopes.to(q.dtype)[:, None, None] * (i[:, None] + diagonal - j).abs()
    if x.bias is not None:
        bias = _part(x.bias[0], rows, keys)
        if bias.dtype.itemsize > q.dtype.itemsize:  # float64's lowest number is not -inf in float32 either
            bias = bias.clamp(min=torch.finfo(q.dtype).min).where(bias != -math.inf, bias)
        scores = scores + bias.to(q.dtype)
    seen = visible(len(i), len(j), x.window_left, x.window_right, diagonal - keys.start, q.device, rows.start)
    if x.mask is not None:
        seen = seen & _part(x.mask[0], rows, keys)
    return scores.masked_fill(~seen, -math.inf), capped


def _far_from_zero(lse: Tensor) -> bool:
    """Whether lse has lost digits of the logarithm of a row's sum. A bias can put a whole row anywhere: in float32, from 2^25
    on, exp(s - lse) adds up to as much as the number of keys."""
    return bool((lse.abs() * torch.finfo(lse.dtype).eps > 1e-5).any())


def _sums(x: Inputs, q: Tensor, k: Tensor, lse: Tensor, rows: slice, blocks: list[slice]) -> Tensor:
    """What exp(s - lse) adds up to in each row, (H, rows): 1 but for the digits that lse has lost."""
    total = torch.zeros_like(lse) if x.s_aux is None else torch.exp(x.s_aux.to(lse.dtype)[:, None] - lse)
    for keys in blocks:
        scores, _ = _scores(x, q[:, rows], k[:, keys], rows, keys)
        total = total + torch.exp(scores - lse[..., None]).sum(-1)
    return total.where(total > 0, 1.0)


def _keep(x: Inputs, b: int, rows: slice, keys: slice) -> Tensor:
    """What dropout multiplies the weights (H, rows, keys) of sequence b by."""
    assert x.seed is not None
    sizes = x.q.shape[2], rows.stop - rows.start, keys.stop - keys.start
    keep = keep_mask(x.seed, x.dropout_p, 1, *sizes, first_batch=b, first_row=rows.start, first_key=keys.start)
    return keep[0] / (1 - x.dropout_p)


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked problem."""
    out, lse = x.empty()
    wide = lse.dtype
    if x.cu_seqlens_q is not None:  # tokens behind the last sequence see no key
        end = int(x.cu_seqlens_q[-1])
        out[end:], lse[:, end:] = 0.0, -math.inf
    for b in range(x.batch):
        one = _one(x, b)
        # A problem of its own is also the view of sequence b of what has a row for each query.
        out_b, lse_b = (_one(replace(x, q=tensor), b).q[0].transpose(0, 1) for tensor in (out, lse.mT))
        q, k, v = _wide(one.q) * x.softmax_scale, _wide(one.k), _wide(one.v)
        for rows, blocks in _blocks(one):
            acc = out_b.new_zeros(out_b[:, rows].shape, dtype=wide)
            top = acc.new_full(acc.shape[:2], -math.inf) if x.s_aux is None else x.s_aux.to(wide)[:, None].expand(acc.shape[:2])
            total = torch.exp(top - _finite(top))  # of the sink, which has no value
            for keys in blocks:
                scores, _ = _scores(one, q[:, rows], k[:, keys], rows, keys)
                new_top = torch.maximum(top, scores.amax(-1))
                weights = torch.exp(scores - _finite(new_top)[..., None])
                shrink = torch.exp(top - _finite(new_top))
                total = total * shrink + weights.sum(-1)
                if x.dropout_p > 0:
                    weights = weights * _keep(one, b, rows, keys)
                acc = acc * shrink[..., None] + _product(weights, v[:, keys])
                top = new_top
            out_b[:, rows] = (acc / total.where(total > 0, 1.0)[..., None]).to(out.dtype)
            lse_b[:, rows] = top + total.log()
    return out, lse


def backward(
    x: Inputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """(dq, dk, dv, dbias or None, delta) of a checked problem; dbias in the shape of x.bias, delta in that of lse, as
    backward.py gives it."""
    dq, dk, dv = (torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (x.q, x.k, x.v))
    if out.dtype != lse.dtype:  # its rounding would be the largest error of delta, and so of small gradients
        out, _ = forward(replace(x, q=x.q.to(lse.dtype), k=x.k.to(lse.dtype), v=x.v.to(lse.dtype)))
    delta = (grad_out.to(lse.dtype) * out).sum(-1).mT
    if grad_lse is not None:
        delta = delta - grad_lse
    delta = delta.masked_fill(lse == -math.inf, 0.0)
    sinks_delta = delta if x.bias is None else delta.clone()
    dbias = x.bias.new_zeros(x.bias.shape, dtype=lse.dtype) if x.bias is not None and needs_bias else None
    for b in range(x.batch):
        one = _one(x, b)
        grads = _one(replace(x, q=dq, k=dk, v=dv, bias=dbias), b)  # views of what belongs to sequence b
        do, lse_b, delta_b = (_one(replace(x, q=tensor), b).q[0].transpose(0, 1) for tensor in (grad_out, lse.mT, delta.mT))
        q, k, v, do, lse_b = _wide(one.q) * x.softmax_scale, _wide(one.k), _wide(one.v), do.to(lse.dtype), _finite(lse_b)
        dq_b, dk_b, dv_b = (torch.zeros_like(tensor) for tensor in (q, k, v))
        for rows, blocks in _blocks(one):
            inverse = None
            if x.bias is not None and _far_from_zero(lse_b[:, rows]):
                inverse = 1 / _sums(one, q, k, lse_b[:, rows], rows, blocks)
                sinks_delta[b, :, rows] *= inverse
            for keys in blocks:
                scores, capped = _scores(one, q[:, rows], k[:, keys], rows, keys)
                weights = torch.exp(scores - lse_b[:, rows, None])
                if inverse is not None:
                    weights = weights * inverse[..., None]
                dp = _product(do[:, rows], v[:, keys].mT)
                kept = weights
                if x.dropout_p > 0:
                    keep = _keep(one, b, rows, keys)
                    kept, dp = weights * keep, dp * keep
                dv_b[:, keys] += _grouped(kept, len(k)).mT @ _grouped(do[:, rows], len(k))
                ds = weights * (dp - delta_b[:, rows, None])
                if grads.bias is not None:
                    part = _part(grads.bias[0], rows, keys)
                    part += ds.sum_to_size(part.shape)
                if x.softcap > 0:
                    ds = ds * (1 - (capped / x.softcap) ** 2)
                dq_b[:, rows] += _product(ds, k[:, keys])
                dk_b[:, keys] += _grouped(ds, len(k)).mT @ _grouped(q[:, rows], len(k))
        for grad, total in ((grads.q, dq_b * x.softmax_scale), (grads.k, dk_b), (grads.v, dv_b)):
            grad[0] = total.transpose(0, 1)
    return dq, dk, dv, None if dbias is None or x.bias is None else dbias.to(x.bias.dtype), sinks_delta
