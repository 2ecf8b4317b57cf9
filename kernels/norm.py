"""LayerNorm and RMSNorm.

LayerNorm (Ba et al. 2016, eq. 3-4): y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension.
RMSNorm (Zhang & Sennrich 2019, eq. 4): y = x / sqrt(mean(x^2) + eps) * weight.
Statistics are computed in float32 (float64 for float64 input) whatever the dtype of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._dispatch import Implementation, choose, register

# --- reference ------------------------------------------------------------------------------------------------------


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = _upcast(x)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = _upcast(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


# --- PyTorch's own --------------------------------------------------------------------------------------------------


def _layer_norm_torch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _rms_norm_torch(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        # PyTorch 2.11 to 2.13 square in the input's dtype outside its fused CUDA kernel.
        return rms_norm_reference(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


register(
    "layer_norm",
    Implementation("torch", _layer_norm_torch),
    Implementation("reference", layer_norm_reference),
)
register(
    "rms_norm",
    Implementation("torch", _rms_norm_torch),
    Implementation("reference", rms_norm_reference),
)

# --- public ---------------------------------------------------------------------------------------------------------


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    size = x.shape[-1:]
    # One expression for what is nearly always so: generation calls this thousands of times a second.
    fits = (weight is None or weight.shape == size) and (bias is None or bias.shape == size)
    if fits and eps >= 0 and x.is_floating_point() and size and size[0]:
        return
    if not x.is_floating_point():
        raise TypeError(f"x: got dtype {x.dtype}, allowed are floating-point dtypes")
    if not size or size[0] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, the last dimension must have at least one element")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != size:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, x needs ({size[0]},)")
    raise ValueError(f"eps: got {eps}, must be 0 or more")


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over the last dimension.

    x (..., hidden) of any floating dtype; weight and bias (hidden). Returns the shape and dtype of x.
    Raises TypeError for integer input, ValueError for shapes that do not match or a negative eps.
    """
    _check(x, weight, bias, eps)
    return choose("layer_norm", x.device.type, backend)(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """RMSNorm over the last dimension. Shapes, dtypes and errors as `layer_norm`."""
    _check(x, weight, None, eps)
    return choose("rms_norm", x.device.type, backend)(x, weight, eps)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` (same arguments, same state dict) over one dimension, computed by `layer_norm`."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5, bias: bool = True, backend: str | None = None):
        super().__init__(normalized_shape, eps=eps, bias=bias)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.weight, self.bias, self.eps, backend=self.backend)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` (same arguments, same state dict) over one dimension, computed by `rms_norm`."""

    def __init__(self, normalized_shape: int, eps: float = 1e-6, backend: str | None = None):
        super().__init__(normalized_shape, eps=eps)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps, backend=self.backend)


__all__ = ["LayerNorm", "RMSNorm", "layer_norm", "layer_norm_reference", "rms_norm", "rms_norm_reference"]
