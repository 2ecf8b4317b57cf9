"""Activations of the MLP: GELU (Hendrycks & Gimpel 2016), exact and tanh form, and SwiGLU (Shazeer 2020, eq. 6)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import Implementation, choose, register

# --- reference ------------------------------------------------------------------------------------------------------


def gelu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


# --- PyTorch's own --------------------------------------------------------------------------------------------------


def _gelu_torch(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def _swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


register("gelu", Implementation("torch", _gelu_torch), Implementation("reference", gelu_reference))
register("swiglu", Implementation("torch", _swiglu_torch), Implementation("reference", swiglu_reference))

# --- public ---------------------------------------------------------------------------------------------------------


def gelu(x: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """GELU of x, any shape. approximate: "none" (erf) or "tanh". Raises ValueError for another."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: got {approximate!r}, allowed are 'none' and 'tanh'")
    return choose("gelu", x.device.type, backend)(x, approximate)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up, elementwise. Raises ValueError where the shapes differ."""
    if gate.shape != up.shape:
        raise ValueError(f"up: got shape {tuple(up.shape)}, gate has {tuple(gate.shape)}")
    return choose("swiglu", gate.device.type, backend)(gate, up)


__all__ = ["gelu", "gelu_reference", "swiglu", "swiglu_reference"]
