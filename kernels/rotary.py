"""Rotary position embedding (Su et al. 2021, RoFormer, eq. 34), GPT-NeoX layout: the two halves of a head rotate together.

Shapes: B batch, H heads, S positions, D head_dim (even).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import Implementation, choose, register


def rotary_cos_sin(
    positions: Tensor, head_dim: int, theta: float = 10_000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin (S, D / 2) of the angles position * theta^(-2i / D), computed in float32 (float64 if dtype is)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.int64).to(wide) / head_dim
    angle = positions.to(wide)[..., None] * (1.0 / theta**exponent)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary_emb_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


register(
    "rotary",
    Implementation("torch", apply_rotary_emb_reference),
    Implementation("reference", apply_rotary_emb_reference),
)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """Rotate x (B, H, S, D) by cos, sin (S, D / 2). Returns the shape and dtype of x.

    Raises ValueError where D is odd or cos and sin do not fit.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x: head_dim is {x.shape[-1]}, rotary embedding needs an even one")
    expected = (x.shape[-2], x.shape[-1] // 2)
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, x needs {expected}")
    return choose("rotary", x.device.type, backend)(x, cos, sin)


__all__ = ["apply_rotary_emb", "apply_rotary_emb_reference", "rotary_cos_sin"]
