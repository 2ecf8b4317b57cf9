"""Attention in plain PyTorch: the truth that every other implementation is compared with.

Shapes: B batch, H query heads, G key/value heads (H a multiple of G), S query and T key positions, D head_dim.
out = softmax(score(query key^T)) value (Vaswani et al. 2017, eq. 1) with, in this order,

    s = softmax_scale * q k^T
    s = softcap * tanh(s / softcap)                  softcap > 0 (Gemma 2)
    s = s - slope_h * |i + diagonal - j|             alibi_slopes (Press et al. 2022)
    s = s + bias                                     bias
    s = -inf where mask is False or j is outside the window of row i
    lse = log(sum_j exp(s_j) + exp(s_aux_h))         s_aux: one more logit without a value, a "sink" (gpt-oss)
    out = sum_j exp(s_j - lse) * keep_ij / (1 - dropout_p) * v_j

The window of row i is i + diagonal - left <= j <= i + diagonal + right; causal is right = 0. The diagonal is T - S (bottom
right, as flash-attn) or 0 (top_left, as torch). A row without any key gives 0 and lse = -inf (or its sink), and no gradient.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._checks import as_float, check_tensors
from .._philox import MASK, philox

MAX_HEAD_DIM = 1024  # of the Triton kernel that decodes: it holds a row of the output in registers


@dataclass(frozen=True)
class Inputs:
    """One attention problem, checked, as every implementation receives it.

    q (B, S, H, D), k (B, T, G, D), v (B, T, G, Dv); packed (sum of S, H, D) and so on where cu_seqlens_q and cu_seqlens_k
    (B + 1, int32) are given; tokens behind the last sequence give 0 and lse -inf, and get no gradient. bias and mask (bool)
    broadcast to (B, H, S, T). alibi_slopes (H) or (B, H) and s_aux (H) are float32. seqused_k (B, int32): keys in use of each
    sequence. seed (2, int64): key and counter of Philox, for dropout. changing (2, float64, on the CPU): softmax_scale and
    softcap where torch.compile does not know them; the two fields then count for the plain PyTorch of this file alone.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    s_aux: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    seed: Tensor | None = None
    changing: Tensor | None = None
    max_seqlen_q: int = 0  # of the packed sequences; without cu_seqlens the lengths are those of the tensors
    max_seqlen_k: int = 0
    dropout_p: float = 0.0
    softmax_scale: float = 1.0
    window_left: int = -1  # -1: no limit
    window_right: int = -1
    top_left: bool = False
    softcap: float = 0.0

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def lengths(self) -> tuple[int, int]:
        """(S, T), for packed sequences the longest."""
        if self.cu_seqlens_q is None:
            return self.q.shape[1], self.k.shape[1]
        return self.max_seqlen_q, self.max_seqlen_k

    def lse_shape(self) -> tuple[int, ...]:
        """(B, H, S), packed (H, sum of S)."""
        if self.cu_seqlens_q is None:
            return self.q.shape[0], self.q.shape[2], self.q.shape[1]
        return self.q.shape[1], self.q.shape[0]

    def empty(self) -> tuple[Tensor, Tensor]:
        """Room for (out, lse). out is contiguous; for PyTorch's functions (top_left) its dimensions lie in memory in the order
        of q's, the last one dense."""
        q, shape = self.q, (*self.q.shape[:-1], self.v.shape[-1])
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = q.new_empty(self.lse_shape(), dtype=wide)
        if not self.top_left or q.is_contiguous():
            return q.new_empty(shape), lse
        if q.dim() == 4:
            (_, s, h, d), dv = q.shape, shape[-1]
            if q.stride() == (h * s * d, d, s * d, 1):  # (B, H, S, D), transposed, as nearly always
                return q.new_empty_strided(shape, (h * s * dv, dv, s * dv, 1)), lse
        order = memory_order(q)
        out = q.new_empty([shape[i] for i in order]).permute([order.index(i) for i in range(len(order))])
        return out, lse


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions of a tensor from the outermost in memory on, those that are broadcast first; the last stays the last."""
    strides = [stride or math.inf for stride in tensor.stride()[:-1]]
    order: list[int] = []
    for i, stride in enumerate(strides):  # not `sorted`, because torch.compile cannot sort numbers that change
        place = i
        while place > 0 and strides[order[place - 1]] < stride:
            place -= 1
        order.insert(place, i)
    return [*order, len(order)]


def laid_out_like(query: Tensor, out: Tensor) -> Tensor:
    """`out` with its dimensions in memory in the order of query's, which is what PyTorch's attention gives and `.view` in a
    model may count on."""
    if out.stride() == query.stride():
        return out
    order = memory_order(query)
    return out.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])


def keep_mask(
    seed: Tensor,
    dropout_p: float,
    batch: int,
    heads: int,
    s: int,
    t: int,
    first_batch: int = 0,
    first_row: int = 0,
    first_key: int = 0,
) -> Tensor:
    """Which weights dropout keeps, (batch, heads, s, t) bool: Philox4x32-7 (Salmon et al. 2011).

    key seed[0], counter (j // 4, i, b * heads + h, seed[1]); word j % 4 is compared with dropout_p in 24 bits. Every
    implementation draws these numbers, whatever its tiles. Batch, rows and keys count from first_batch, first_row and
    first_key (a multiple of 4).
    """
    device = seed.device
    shape = (batch * heads, s, (t + 3) // 4)
    c0 = (torch.arange(shape[2], device=device) + first_key // 4).expand(shape)
    c1 = (torch.arange(s, device=device) + first_row)[:, None].expand(shape)
    c2 = (torch.arange(shape[0], device=device) + first_batch * heads)[:, None, None].expand(shape)
    c3 = (seed[1] & MASK).expand(shape)
    k0, k1 = seed[0] & MASK, (seed[0] >> 32) & MASK
    words = torch.stack(philox(7, (c0, c1, c2, c3), k0, k1), dim=-1).flatten(-2)[..., :t]
    return (words >> 8 >= int(dropout_p * 2**24)).view(batch, heads, s, t)


def visible(s: int, t: int, left: int, right: int, diagonal: int, device: torch.device, first_row: int = 0) -> Tensor:
    """(s, t) bool: the keys inside the window of the rows first_row .. first_row + s."""
    i = torch.arange(first_row, first_row + s, device=device)[:, None] + diagonal
    j = torch.arange(t, device=device)
    inside = torch.ones(s, t, dtype=torch.bool, device=device)
    if left >= 0:
        inside &= j >= i - left
    if right >= 0:
        inside &= j <= i + right
    return inside


def _dense(x: Inputs, first_batch: int = 0) -> tuple[Tensor, Tensor]:
    q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v))  # (B, H, S, D)
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    s, t = q.shape[2], k.shape[2]
    diagonal = 0 if x.top_left else t - s
    scores = q @ k.transpose(-2, -1) * x.softmax_scale
    if x.softcap > 0:
        scores = x.softcap * torch.tanh(scores / x.softcap)
    if x.alibi_slopes is not None:
        i, j = torch.arange(s, device=q.device)[:, None], torch.arange(t, device=q.device)
        slopes = x.alibi_slopes.to(scores.dtype)[..., None, None]  # (H, 1, 1) or (B, H, 1, 1)
        scores = scores - slopes * (i + diagonal - j).abs()
    if x.bias is not None:
        scores = scores + x.bias
    seen = visible(s, t, x.window_left, x.window_right, diagonal, q.device)
    if x.mask is not None:
        seen = seen & x.mask
    scores = scores.masked_fill(~seen, -math.inf)
    if x.s_aux is not None:
        sink = x.s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    # Of a row without a key nothing may reach the gradient, so it is taken out before the softmax, not after.
    empty = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    wide = scores.double() if scores.dtype == torch.float64 else scores.float()
    # Not logsumexp, whose gradient exp(score - lse) is 1 for every key of a row that lies at -1e30.
    largest = wide.detach().amax(-1, keepdim=True) if wide.shape[-1] else wide.new_zeros(*wide.shape[:-1], 1)
    lse = ((wide - largest).exp().sum(-1).log() + largest[..., 0]).masked_fill(empty[..., 0], -math.inf)
    weights = torch.softmax(scores, -1).masked_fill(empty, 0.0)[..., :t]
    if x.dropout_p > 0:
        assert x.seed is not None
        keep = keep_mask(x.seed, x.dropout_p, q.shape[0], q.shape[1], s, t, first_batch)
        weights = weights * keep / (1 - x.dropout_p)
    # A bias may be wider than q.
    return (weights.to(v.dtype) @ v).transpose(1, 2), lse.to(torch.promote_types(q.dtype, torch.float32))


def _one(x: Inputs, b: int) -> Inputs:
    """Sequence b of the batch as a problem of its own."""
    q0 = k0 = 0
    q1, k1 = x.lengths
    if x.cu_seqlens_q is not None:
        assert x.cu_seqlens_k is not None
        (q0, q1), (k0, k1) = x.cu_seqlens_q[b : b + 2].tolist(), x.cu_seqlens_k[b : b + 2].tolist()
    # What is not checked on a GPU must not reach into another sequence.
    used = k1 - k0 if x.seqused_k is None else min(max(int(x.seqused_k[b]), 0), k1 - k0)

    def of(tensor: Tensor, start: int, end: int) -> Tensor:
        return (tensor[b] if x.cu_seqlens_q is None else tensor)[start:end][None]

    def keys(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor[(None,) * (4 - tensor.dim())]
        return (tensor[b : b + 1] if tensor.shape[0] > 1 else tensor)[..., :used]

    slopes = x.alibi_slopes
    return replace(
        x,
        q=of(x.q, q0, q1),
        k=of(x.k, k0, k0 + used),
        v=of(x.v, k0, k0 + used),
        bias=keys(x.bias),
        mask=keys(x.mask),
        alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_k=None,
    )


def attention_reference(x: Inputs) -> tuple[Tensor, Tensor]:
    """(out in the layout of q, lse) by autograd's own operators; lse in float32, in float64 for float64."""
    if x.cu_seqlens_q is None and x.seqused_k is None:
        return _dense(x)
    results = [_dense(_one(x, b), b) for b in range(x.batch)]
    if x.cu_seqlens_q is None:
        if not results:  # seqused_k of a batch of 0: nothing depends on it
            return _dense(replace(x, seqused_k=None))
        return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])
    # Tokens of no sequence see no key.
    nothing: dict[str, Tensor | None] = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "alibi_slopes", "s_aux"))
    tail = x.q[int(x.cu_seqlens_q[-1]) :][None]
    results.append(_dense(replace(x, q=tail, k=x.k[:0][None], v=x.v[:0][None], **nothing)))  # type: ignore[arg-type]
    out = torch.cat([out[0] for out, _ in results])
    if x.s_aux is not None and len(results) == 1:
        out = out + x.s_aux[:0].sum()  # without any sequence, too, sinks have a gradient
    return out, torch.cat([lse[0] for _, lse in results], dim=1)


def _check_weights(query: Tensor, key: Tensor, attn_mask: Tensor | None, alibi_slopes: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("attn_mask", attn_mask), ("alibi_slopes", alibi_slopes)):
        if tensor is None:
            continue
        if tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, query is on {query.device}")
        boolean = name == "attn_mask" and tensor.dtype == torch.bool
        if not boolean and (not tensor.is_floating_point() or tensor.element_size() == 1):
            raise TypeError(f"{name}: got dtype {tensor.dtype}, allowed are float16, bfloat16, float32 and float64")
    if query.dim() != 4:
        raise ValueError(f"query: got {query.dim()} dimensions, need 4: (batch, heads, positions, head_dim)")
    batch, heads, s, dim = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != dim or key.dtype != query.dtype:
        raise ValueError(f"key: got shape {tuple(key.shape)} of {key.dtype}, query has {tuple(query.shape)} of {query.dtype}")
    groups, t = key.shape[1:3]
    if heads != groups and (groups == 0 or heads % groups):
        raise ValueError(f"key: got {groups} heads for {heads} query heads, they must divide the query's")
    if attn_mask is not None:
        full = (batch, heads, s, t)
        if attn_mask.dim() > 4 or any(n not in (1, m) for n, m in zip(reversed(attn_mask.shape), reversed(full))):
            raise ValueError(f"attn_mask: got shape {tuple(attn_mask.shape)}, must broadcast to {full}")
    if alibi_slopes is not None and tuple(alibi_slopes.shape) != (heads,):
        raise ValueError(f"alibi_slopes: got shape {tuple(alibi_slopes.shape)}, need ({heads},)")


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The softmax weights (B, H, S, T). Arguments as `scaled_dot_product_attention`; rows without a key are 0.

    As in PyTorch, is_causal aligns the diagonal at the top left: query i sees keys 0..i; alibi_slopes (H) count from there.
    Fewer key heads than query heads are shared. Raises ValueError or TypeError for what does not fit.
    """
    check_tensors("query key attn_mask alibi_slopes", (query, key), (attn_mask, alibi_slopes))
    _check_weights(query, key, attn_mask, alibi_slopes)
    if key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    elif not isinstance(scale, Tensor):  # which keeps its gradient
        scale = as_float("scale", scale)
    scores = query @ key.transpose(-2, -1) * scale  # (B, H, S, T)
    if alibi_slopes is not None:
        i, j = (torch.arange(n, device=query.device) for n in scores.shape[-2:])
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * (i[:, None] - j).abs()
    if is_causal:
        s, t = scores.shape[-2:]
        scores = scores.masked_fill(~visible(s, t, -1, 0, 0, scores.device), -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    without_key = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(without_key, 0.0), dim=-1).masked_fill(without_key, 0.0)


def alibi_slopes(n_heads: int) -> Tensor:
    """The slopes (n_heads) of ALiBi (Press et al. 2022): a geometric sequence from 2^(-8/n); float32. ValueError or TypeError
    unless n_heads is a whole number from 1 on."""
    if not hasattr(n_heads, "__index__"):
        raise TypeError(f"n_heads: got {n_heads!r}, need a whole number")
    n_heads = operator.index(n_heads)
    if n_heads < 1:
        raise ValueError(f"n_heads: got {n_heads}, need 1 or more")

    def powers(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    closest = 2 ** math.floor(math.log2(n_heads))
    return torch.tensor(powers(closest) + powers(2 * closest)[0::2][: n_heads - closest])
