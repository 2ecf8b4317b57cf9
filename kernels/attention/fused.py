"""PyTorch's own fused attention, for the problems of `flash_attn_func` that it covers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import Inputs, visible


def why_not(x: Inputs, need_lse: bool) -> str | None:
    """The argument that PyTorch's attention does not have, or None. A row without any key counts as one: what it gives there
    depends on the kernel it takes."""
    s, t = x.lengths
    has = {
        "return_attn_probs": need_lse,
        "softcap": x.softcap > 0,
        "s_aux": x.s_aux is not None,
        "cu_seqlens": x.cu_seqlens_q is not None,
        "seqused_k": x.seqused_k is not None,
        "attn_bias": x.bias is not None,
        "attn_mask": x.mask is not None,
        "window_size": x.window_left >= 0 or x.window_right > 0,
        "more queries than keys": x.window_right == 0 and s > t,
        "no keys": t == 0,
        "no heads": x.q.shape[-2] == 0,
        "softmax_scale 0": x.softmax_scale == 0,  # it makes -inf * 0 = NaN of masked scores
    }
    return next((name for name, present in has.items() if present), None)


def fused(x: Inputs) -> Tensor:
    """The output (B, S, H, Dv) of a problem for which `why_not` is None; dropout draws PyTorch's numbers."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v))
    (s, t), mask = x.lengths, None
    diagonal = 0 if x.top_left else t - s
    causal = x.window_right == 0 and (s > 1 or diagonal < t - 1)  # the last query sees every key
    if x.alibi_slopes is not None or (causal and diagonal > 0):
        mask = visible(s, t, -1, x.window_right, diagonal, q.device)
        if x.alibi_slopes is not None:
            i, j = torch.arange(s, device=q.device)[:, None], torch.arange(t, device=q.device)
            bias = -x.alibi_slopes.to(q.dtype)[..., None, None] * (i + diagonal - j).abs()  # (H, S, T) or (B, H, S, T)
            mask = bias.masked_fill(~mask, -math.inf)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, x.dropout_p, causal and mask is None, scale=x.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
