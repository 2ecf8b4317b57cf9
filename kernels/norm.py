"""LayerNorm and RMSNorm, with the residual sum and dropout in front of them.

h = dropout(x) + residual
LayerNorm (Ba et al. 2016, eq. 3-4): y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias over the last dimension.
RMSNorm (Zhang & Sennrich 2019, eq. 4): y = h / sqrt(mean(h^2) + eps) * weight + bias; (1 + weight) in Gemma.

h is summed in float32 and rounded once, to the dtype of the residual; y is the norm of what was rounded, so that the fused
op, its backward and a model that adds first and normalises after see the same h. Statistics are computed in float32 (float64
for float64 input) whatever the dtype of x, and autocast changes nothing: y has x's dtype, where PyTorch's norms would
widen x to float32 and return float32.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._autograd import register_autograd, register_vmap
from ._dispatch import NAMESPACE, Implementation, choose, refuse_forward_mode, register, why_not_triton
from .attention.op import seed_for
from .attention.reference import keep_mask

# --- reference ------------------------------------------------------------------------------------------------------


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sum_reference(x: Tensor, residual: Tensor | None, dropout_p: float) -> Tensor:
    """h. Dropout compares word (row, column) of Philox with dropout_p, as attention does with (query, key)."""
    h = _upcast(x)
    seed = seed_for(dropout_p, x.device)
    if seed is not None:
        columns = x.shape[-1]
        keep = keep_mask(seed, dropout_p, 1, 1, x.numel() // columns, columns).view(x.shape)
        h = torch.where(keep, h / (1 - dropout_p), 0.0)
    if residual is None:
        return h.to(x.dtype)
    return (h + residual).to(residual.dtype)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, unit_offset: bool) -> Tensor:
    if weight is not None:
        y = y * (1 + weight.to(y.dtype) if unit_offset else weight)
    return y if bias is None else y + bias


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    prenorm: bool = False,
) -> Any:
    h = _sum_reference(x, residual, dropout_p)
    wide = _upcast(h)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = _affine(y, weight, bias, False).to(x.dtype)
    return (y, h) if prenorm else y


def rms_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    prenorm: bool = False,
    *,
    bias: Tensor | None = None,
    unit_offset: bool = False,
) -> Any:
    h = _sum_reference(x, residual, dropout_p)
    wide = _upcast(h)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = _affine(y, weight, bias, unit_offset).to(x.dtype)
    return (y, h) if prenorm else y


# --- PyTorch's own --------------------------------------------------------------------------------------------------


def _sum_torch(x: Tensor, residual: Tensor | None, dropout_p: float) -> Tensor:
    if dropout_p > 0:
        h = F.dropout(_upcast(x), dropout_p)
        return h.to(x.dtype) if residual is None else (h + residual).to(residual.dtype)
    if residual is None:
        return x
    h = x + residual
    return h if h.dtype == residual.dtype else h.to(residual.dtype)


def _layer_norm_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    prenorm: bool,
) -> Any:
    h = x if residual is None and dropout_p == 0 else _sum_torch(x, residual, dropout_p)
    input, dtype = h, x.dtype
    if not (h.dtype == dtype and _is(weight, dtype) and _is(bias, dtype)):
        # PyTorch's kernels mix dtypes on some devices alone, and the result must not be rounded to a narrow h.
        input, weight, bias = _upcast(h), _upcast_like(h, weight), _upcast_like(h, bias)
    y = F.layer_norm(input, x.shape[-1:], weight, bias, eps)
    y = y if y.dtype == dtype else y.to(dtype)
    return (y, h) if prenorm else y


def _rms_norm_torch(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    prenorm: bool,
    *,
    bias: Tensor | None,
    unit_offset: bool,
) -> Any:
    h = x if residual is None and dropout_p == 0 else _sum_torch(x, residual, dropout_p)
    input, dtype = h, x.dtype
    if unit_offset or dtype not in (torch.float32, torch.float64) or not (h.dtype == dtype and _is(weight, dtype)):
        # In the wide dtype, because PyTorch 2.11 to 2.13 square in the input's outside their fused CUDA kernel.
        input, weight = _upcast(h), _upcast_like(h, weight)
        if unit_offset and weight is not None:
            weight = 1 + weight
    y = F.rms_norm(input, x.shape[-1:], weight, eps)
    y = y if bias is None else y + bias
    y = y if y.dtype == dtype else y.to(dtype)
    return (y, h) if prenorm else y


def _is(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    return tensor is None or tensor.dtype == dtype


def _upcast_like(h: Tensor, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float64 if h.dtype == torch.float64 else torch.float32)


# --- registered op: the kernels of norm_triton.py -------------------------------------------------------------------


def _kernels() -> Any:
    return importlib.import_module(".norm_triton", __package__)  # at first use, because it imports triton


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors alone: one of no element stands for None."""
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op(f"{NAMESPACE}::norm", mutates_args=())
def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    rms: bool,
    unit_offset: bool,
    keep_h: bool,
    keep_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd). h is kept only where it is not x itself."""
    y, *kept = _kernels().forward(
        x, weight, bias, residual, seed, eps, dropout_p, rms, unit_offset, keep_h, keep_statistics
    )  # fmt: skip
    h, mean, rstd = (_or_empty(tensor, x) for tensor in kept)
    return y, h, mean, rstd


@_norm.register_fake
def _(x, weight, bias, residual, seed, eps, dropout_p, rms, unit_offset, keep_h, keep_statistics):  # type: ignore[no-untyped-def]
    rows = x.shape[:-1].numel()
    empty, statistics = x.new_empty(0), x.new_empty(rows, dtype=torch.float32)
    h = torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        h if keep_h else empty,
        statistics if keep_statistics and not rms else x.new_empty(0),
        statistics.new_empty(rows) if keep_statistics else x.new_empty(0),
    )


@torch.library.custom_op(f"{NAMESPACE}::norm_backward", mutates_args=())
def _norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    unit_offset: bool,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    needs_residual: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx in dtype, d residual, dweight, dbias in bias_dtype), those not asked for of no element."""
    dx, *others = _kernels().backward(
        dy, dh, h, weight, mean, rstd, seed, dropout_p, unit_offset, dtype, bias_dtype, needs_residual, needs_weight
    )  # fmt: skip
    dresidual, dweight, dbias = (_or_empty(tensor, h) for tensor in others)
    return dx, dresidual, dweight, dbias


@_norm_backward.register_fake
def _(dy, dh, h, weight, mean, rstd, seed, dropout_p, unit_offset, dtype, bias_dtype, needs_residual, needs_weight):  # type: ignore[no-untyped-def]
    n = h.shape[-1]
    return (
        torch.empty_like(h, dtype=dtype, memory_format=torch.contiguous_format),
        torch.empty_like(h, memory_format=torch.contiguous_format) if needs_residual else h.new_empty(0),
        h.new_empty(n, dtype=weight.dtype) if needs_weight else h.new_empty(0),
        h.new_empty(0) if bias_dtype is None else h.new_empty(n, dtype=bias_dtype),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # the types are torch's own
    x, weight, bias, _, seed, _, ctx.dropout_p, ctx.rms, ctx.unit_offset, ctx.keep_h, _ = inputs
    _, h, mean, rstd = output
    ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(h if ctx.keep_h else x, weight, mean, rstd, seed)


def _backward(ctx, dy, dh, *_):  # type: ignore[no-untyped-def]
    nothing = (None,) * 7
    if dy is None and dh is None:
        return (None,) * 4 + nothing
    h, weight, mean, rstd, seed = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    # Without dropout both summands of h have one gradient, which one tensor holds if they have one dtype.
    shared = seed is None and ctx.dtype == h.dtype
    dx, dresidual, dweight, dbias = _call_norm_backward(
        torch.zeros_like(h, dtype=ctx.dtype) if dy is None else dy, dh if ctx.keep_h else None, h, weight,
        None if ctx.rms else mean, rstd, seed, ctx.dropout_p, ctx.unit_offset, ctx.dtype,
        ctx.bias_dtype if needs_bias else None, needs_residual and not shared, needs_weight,
    )  # fmt: skip
    return (
        dx if needs_x else None,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        (dx if shared else dresidual) if needs_residual else None,
        *nothing,
    )


_call_norm = register_autograd(_norm, _backward, _setup_context)
register_vmap(_norm)


def _no_second_derivative(ctx, *_):  # type: ignore[no-untyped-def]
    raise NotImplementedError("layer_norm and rms_norm have no second derivative (use backend='reference')")


_call_norm_backward = register_autograd(_norm_backward, _no_second_derivative)
register_vmap(_norm_backward)


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    prenorm: bool,
    rms: bool,
    unit_offset: bool,
) -> Any:
    tensors = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    refuse_forward_mode("rms_norm" if rms else "layer_norm", *tensors)
    grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    summed = residual is not None or dropout_p > 0
    seed = seed_for(dropout_p, x.device)
    y, h, _, _ = _call_norm(
        x, weight, bias, residual, seed, eps, dropout_p, rms, unit_offset, summed and (prenorm or grad), grad
    )  # fmt: skip
    return (y, h if summed else x) if prenorm else y


def _layer_norm_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    prenorm: bool,
) -> Any:
    if not _for_triton(x, weight, bias, residual):
        return layer_norm_reference(x, weight, bias, eps, residual, dropout_p, prenorm)
    return _run(x, weight, bias, eps, residual, dropout_p, prenorm, False, False)


def _rms_norm_triton(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    prenorm: bool,
    *,
    bias: Tensor | None,
    unit_offset: bool,
) -> Any:
    if not _for_triton(x, weight, bias, residual):
        return rms_norm_reference(x, weight, eps, residual, dropout_p, prenorm, bias=bias, unit_offset=unit_offset)
    return _run(x, weight, bias, eps, residual, dropout_p, prenorm, True, unit_offset)


_WIDEST = 2**26  # numbers of a row; the kernels count columns in 32 bits, and a norm of more has no use


def _for_triton(x: Tensor, *others: Tensor | None) -> bool:
    tensors = [x, *(tensor for tensor in others if tensor is not None)]
    return x.shape[-1] <= _WIDEST and all(tensor.dtype != torch.float64 for tensor in tensors)


register(
    "layer_norm",
    Implementation("triton", _layer_norm_triton, why_not_triton),
    Implementation("torch", _layer_norm_torch),
    Implementation("reference", layer_norm_reference),
)
register(
    "rms_norm",
    Implementation("triton", _rms_norm_triton, why_not_triton),
    Implementation("torch", _rms_norm_torch),
    Implementation("reference", rms_norm_reference),
)

# --- public ---------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None, dropout_p: float
) -> None:
    size = x.shape[-1:]
    # One expression for what is nearly always so: generation calls this thousands of times a second.
    device = x.device
    if (
        (weight is None or (weight.shape == size and weight.device == device and weight.is_floating_point()))
        and (bias is None or (bias.shape == size and bias.device == device and bias.is_floating_point()))
        and (
            residual is None
            or (residual.shape == x.shape and residual.device == device and residual.is_floating_point())
        )
        and eps >= 0 and 0 <= dropout_p < 1 and x.is_floating_point() and size and size[0]
    ):  # fmt: skip
        return
    if not x.is_floating_point():
        raise TypeError(f"x: got dtype {x.dtype}, allowed are floating-point dtypes")
    if not size or size[0] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, the last dimension must have at least one element")
    for name, tensor, shape in (("weight", weight, size), ("bias", bias, size), ("residual", residual, x.shape)):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, x needs {tuple(shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: got dtype {tensor.dtype}, allowed are floating-point dtypes")
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, x is on {x.device}")
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, must be 0 or more")
    raise ValueError(f"dropout_p: got {dropout_p}, must be at least 0 and below 1")


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    prenorm: bool = False,
    *,
    backend: str | None = None,
) -> Any:
    """y = LayerNorm(h) over the last dimension, h = dropout(x) + residual; with prenorm=True (y, h).

    x (..., hidden) and residual (of x's shape) of any floating dtype; weight and bias (hidden), of a dtype of their own. y
    has the shape and dtype of x, h the dtype of the residual (of x without one). dropout_p is the probability to drop an
    element of x; the random numbers come from a seed drawn from PyTorch's generator of the device, once a call.
    Raises TypeError for integer input, ValueError for shapes and devices that do not match, a negative eps or a dropout_p
    outside 0 <= p < 1.
    """
    _check(x, weight, bias, eps, residual, dropout_p)
    return choose("layer_norm", x.device.type, backend)(x, weight, bias, eps, residual, dropout_p, prenorm)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    prenorm: bool = False,
    *,
    bias: Tensor | None = None,
    unit_offset: bool = False,
    backend: str | None = None,
) -> Any:
    """y = RMSNorm(h) over the last dimension, h = dropout(x) + residual; with prenorm=True (y, h).

    unit_offset multiplies by 1 + weight (Gemma), computed in float32. Everything else as in `layer_norm`.
    """
    _check(x, weight, bias, eps, residual, dropout_p)
    function = choose("rms_norm", x.device.type, backend)
    return function(x, weight, eps, residual, dropout_p, prenorm, bias=bias, unit_offset=unit_offset)


def _one_dimension(normalized_shape: int | list[int] | tuple[int, ...] | torch.Size) -> int:
    sizes = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if len(sizes) != 1:
        raise ValueError(f"normalized_shape: got {sizes}, only the last dimension can be normalised")
    return sizes[0]


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` (same arguments, same state dict) over one dimension, computed by `layer_norm`."""

    def __init__(
        self,
        normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ):
        super().__init__(_one_dimension(normalized_shape), eps, elementwise_affine, bias, device, dtype)
        self.backend = backend

    def forward(  # type: ignore[override]  # torch's takes x alone
        self, input: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0, prenorm: bool = False
    ) -> Any:
        return layer_norm(
            input, self.weight, self.bias, self.eps, residual, dropout_p, prenorm, backend=self.backend
        )  # fmt: skip


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` (same arguments, same state dict) over one dimension, computed by `rms_norm`.

    eps=None is the machine epsilon of x's dtype, as in torch. unit_offset multiplies by 1 + weight, and weight starts at 0.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
        eps: float | None = 1e-6,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        unit_offset: bool = False,
        backend: str | None = None,
    ):
        self.unit_offset = unit_offset  # before torch's constructor, which calls reset_parameters
        super().__init__(_one_dimension(normalized_shape), eps, elementwise_affine, device, dtype)
        self.backend = backend

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def forward(  # type: ignore[override]  # torch's takes x alone
        self, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0, prenorm: bool = False
    ) -> Any:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(
            x, self.weight, eps, residual, dropout_p, prenorm, unit_offset=self.unit_offset, backend=self.backend
        )  # fmt: skip


__all__ = ["LayerNorm", "RMSNorm", "layer_norm", "layer_norm_reference", "rms_norm", "rms_norm_reference"]
