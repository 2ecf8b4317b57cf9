"""Activations of the MLP, with bias and dropout in the same pass.

GELU (Hendrycks & Gimpel 2016), exact and tanh form; SwiGLU and GEGLU (Shazeer 2020, eq. 6 and 5):

    bias_gelu   y = drop(gelu(x + bias))
    swiglu      y = drop(silu(gate + gate_bias) * (up + up_bias))
    geglu       y = drop(gelu(gate + gate_bias) * (up + up_bias))

Shapes: inputs (..., F), biases (F). Gate and up may lie side by side in one tensor (..., 2 F), "packed", as a fused projection
gives them. Dropout keeps an element where reference.keep_mask of attention does for one head of (rows, F).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import Implementation, choose, register
from .attention.op import seed_for
from .attention.reference import keep_mask

# --- reference ------------------------------------------------------------------------------------------------------


def gelu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def silu_reference(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return silu_reference(x)
    return gelu_reference(x, "tanh" if activation == "gelu_tanh" else "none")


def activation_reference(
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    packed: bool,
    dropout_p: float,
) -> Tensor:
    """drop(activation(gate + gate_bias) * (up + up_bias)); without `up` the factor is left out, or packed in `gate`.

    activation is "gelu", "gelu_tanh" or "silu". 16-bit inputs are computed in float32 and rounded once, as the kernels do.
    """
    dtype = gate.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if packed:
        gate, up = gate.chunk(2, dim=-1)
    y = _activate(gate.to(wide) if gate_bias is None else gate.to(wide) + gate_bias.to(wide), activation)
    if up is not None:
        y = y * (up.to(wide) if up_bias is None else up.to(wide) + up_bias.to(wide))
    if seed is not None:
        rows = y.numel() // max(y.shape[-1], 1)
        keep = keep_mask(seed, dropout_p, 1, 1, rows, y.shape[-1]).view(y.shape)
        y = torch.where(keep, y / (1 - dropout_p), 0.0)
    return y.to(dtype)


# --- implementations ------------------------------------------------------------------------------------------------


def _gelu_torch(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def _torch(
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    packed: bool,
    dropout_p: float,
) -> Tensor:
    """PyTorch's own operators."""
    if packed:
        gate, up = gate.chunk(2, dim=-1)
    x = gate if gate_bias is None else gate + gate_bias.to(gate.dtype)
    y = F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if up is not None:
        factor = up if up_bias is None else up + up_bias.to(up.dtype)
        # Without a gradient nothing needs the activation again; with one, autograd would copy it first.
        y = y * factor if torch.is_grad_enabled() else y.mul_(factor)
    return F.dropout(y, dropout_p) if dropout_p > 0 else y


def _reference(
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    packed: bool,
    dropout_p: float,
) -> Tensor:
    seed = seed_for(dropout_p, gate.device)
    return activation_reference(gate, up, gate_bias, up_bias, seed, activation, packed, dropout_p)


register("gelu", Implementation("torch", _gelu_torch), Implementation("reference", gelu_reference))
for _op in ("bias_gelu", "swiglu", "geglu"):
    register(_op, Implementation("torch", _torch), Implementation("reference", _reference))

# --- public ---------------------------------------------------------------------------------------------------------


def _check_approximate(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: got {approximate!r}, allowed are 'none' and 'tanh'")


def _check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, allowed are float16, bfloat16, float32 and float64")


def _check_bias(name: str, bias: Tensor | None, x: Tensor, features: int) -> None:
    if bias is None:
        return
    _check_float(name, bias)
    if tuple(bias.shape) != (features,):
        raise ValueError(f"{name}: got shape {tuple(bias.shape)}, need ({features},)")
    if bias.device != x.device:
        raise ValueError(f"{name}: is on {bias.device}, the input on {x.device}")


def _check_dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, must be at least 0 and below 1")


def _gated(
    op: str,
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    dropout_p: float,
    backend: str | None,
) -> Tensor:
    _check_float("gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate: got a scalar, need a last dimension of features")
    features = gate.shape[-1]
    if up is None:
        if features % 2:
            raise ValueError(f"gate: got {features} features without up; gate and up side by side are an even number")
        features //= 2
    elif gate.shape != up.shape:
        raise ValueError(f"up: got shape {tuple(up.shape)}, gate has {tuple(gate.shape)}")
    elif gate.dtype != up.dtype:
        raise TypeError(f"up: got dtype {up.dtype}, gate has {gate.dtype}")
    elif gate.device != up.device:
        raise ValueError(f"up: is on {up.device}, gate on {gate.device}")
    _check_bias("gate_bias", gate_bias, gate, features)
    _check_bias("up_bias", up_bias, gate, features)
    _check_dropout(dropout_p)
    function = choose(op, gate.device.type, backend)
    return function(gate, up, gate_bias, up_bias, activation, up is None, dropout_p)


def gelu(x: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """GELU of x, any shape. approximate: "none" (erf) or "tanh". Raises ValueError for another."""
    _check_approximate(approximate)
    return choose("gelu", x.device.type, backend)(x, approximate)


def bias_gelu(
    x: Tensor,
    bias: Tensor | None = None,
    approximate: str = "none",
    dropout_p: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """dropout(gelu(x + bias)) of x (..., F) with bias (F), in one pass; shape and dtype of x.

    x and bias: float16, bfloat16, float32 or float64, each its own. approximate: "none" (erf) or "tanh". Autocast changes
    nothing: the dtype of x counts. The gradient of bias is the same bits every time. Raises ValueError for another
    approximate, a bias of another shape or device, dropout_p outside [0, 1); TypeError for other dtypes.
    """
    _check_approximate(approximate)
    _check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x: got a scalar, need a last dimension of features")
    _check_bias("bias", bias, x, x.shape[-1])
    _check_dropout(dropout_p)
    function = choose("bias_gelu", x.device.type, backend)
    return function(x, None, bias, None, "gelu_tanh" if approximate == "tanh" else "gelu", False, dropout_p)


def swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """dropout(silu(gate + gate_bias) * (up + up_bias)), gate and up (..., F), biases (F); shape and dtype of gate.

    Without `up`, gate (..., 2 F) holds both side by side, gate first, and its gradient comes back as one tensor. dtypes,
    autocast and bias gradients as in `bias_gelu`; gate and up have one dtype. Raises ValueError where shapes or devices differ,
    for an odd packed width, for dropout_p outside [0, 1); TypeError for other dtypes.
    """
    return _gated("swiglu", gate, up, gate_bias, up_bias, "silu", dropout_p, backend)


def geglu(
    gate: Tensor,
    up: Tensor | None = None,
    approximate: str = "tanh",
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """dropout(gelu(gate + gate_bias) * (up + up_bias)); everything else as in `swiglu` and `bias_gelu`."""
    _check_approximate(approximate)
    activation = "gelu_tanh" if approximate == "tanh" else "gelu"
    return _gated("geglu", gate, up, gate_bias, up_bias, activation, dropout_p, backend)


__all__ = ["activation_reference", "bias_gelu", "geglu", "gelu", "gelu_reference", "silu_reference", "swiglu"]
