"""The public attention functions: they validate, choose an implementation and document."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import Implementation, choose, register
from .reference import scaled_dot_product_attention_reference


def _torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


register(
    "attention",
    Implementation("torch", _torch),
    Implementation("reference", scaled_dot_product_attention_reference),
)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name}: got {tensor.dim()} dimensions, need 4: (batch, heads, positions, head_dim)")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, query has {query.dtype}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key: got head_dim {key.shape[-1]}, query has {query.shape[-1]}")
    if key.shape[-2] != value.shape[-2] or key.shape[-3] != value.shape[-3]:
        raise ValueError(f"value: got shape {tuple(value.shape)}, key has {tuple(key.shape)}")
    heads, groups = query.shape[-3], key.shape[-3]
    if heads != groups and (not enable_gqa or groups == 0 or heads % groups):
        way_out = "must divide the query's" if enable_gqa else "need enable_gqa=True"
        raise ValueError(f"key: got {groups} heads for {heads} query heads, they {way_out}")
    if attn_mask is not None and is_causal:
        raise ValueError("is_causal: cannot be True when attn_mask is given")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        raise ValueError(f"attn_mask: got dtype {attn_mask.dtype}, allowed are bool and query's {query.dtype}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, must be at least 0 and below 1")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with our choice of implementation.

    query (B, H, S, D), key (B, G, T, D), value (B, G, T, Dv); attn_mask boolean (True: takes part) or additive,
    broadcastable to (B, H, S, T); scale defaults to 1 / sqrt(D). Returns (B, H, S, Dv).
    Raises ValueError where ranks, head counts or dtypes do not fit, or where attn_mask and is_causal are both given.
    """
    q, k = query.shape, key.shape
    # One comparison for what is nearly always so: generation calls this thousands of times a second.
    simple = attn_mask is None and 0.0 <= dropout_p < 1.0 and query.dtype == key.dtype == value.dtype
    if not (simple and len(q) == 4 and value.shape == k and q[:2] == k[:2] and q[3] == k[3]):
        _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    function = choose("attention", query.device.type, backend)
    return function(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


__all__ = ["scaled_dot_product_attention"]
