"""Attention in plain PyTorch: the truth that every other implementation is compared with.

Shapes: B batch, H query heads, G key/value heads (H a multiple of G), S query and T key positions, D head_dim.
softmax(query key^T * scale + mask) value (Vaswani et al. 2017, eq. 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The softmax weights (B, H, S, T). Arguments as `scaled_dot_product_attention`; rows without a key are 0.

    As in PyTorch, is_causal aligns the diagonal at the top left: query i sees keys 0..i.
    """
    if key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale  # (B, H, S, T)
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    without_key = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(without_key, 0.0), dim=-1).masked_fill(without_key, 0.0)


def scaled_dot_product_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    weights = attention_weights(query, key, attn_mask, is_causal, scale)
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, train=True)
    if value.shape[-3] != query.shape[-3]:
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    return weights.to(value.dtype) @ value


def alibi_slopes(n_heads: int) -> Tensor:
    """The slopes (n_heads) of ALiBi (Press et al. 2022): a geometric sequence from 2^(-8/n); float32."""

    def powers(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    closest = 2 ** math.floor(math.log2(n_heads))
    return torch.tensor(powers(closest) + powers(2 * closest)[0::2][: n_heads - closest])
