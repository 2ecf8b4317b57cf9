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

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._autograd import register_autograd, register_vmap
from ._checks import FLOATS, as_float
from ._dispatch import NAMESPACE, Implementation, choose, imported, refuse_forward_mode, register, why_not_triton
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
    return imported(".norm_triton", __package__)  # at first use, because it imports triton


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
    rows = math.prod(x.shape[:-1])  # not numel(), which makes one number of a size that changes
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


def _is_usual(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: Any,
    residual: Tensor | None,
    dropout_p: Any,
    normalized_shape: Any,
) -> bool:
    """Whether the implementations take it as it is: one dimension, floating-point tensors that fit, Python's floats. One
    expression, because generation asks thousands of times a second."""
    if not isinstance(x, Tensor) or x.is_nested:
        return False
    size, device = x.shape[-1:], x.device
    return (
        (
            weight is None
            or (isinstance(weight, Tensor) and weight.shape == size and weight.device == device and weight.dtype in FLOATS)
        )
        and (
            bias is None
            or (isinstance(bias, Tensor) and bias.shape == size and bias.device == device and bias.dtype in FLOATS)
        )
        and (
            residual is None
            or (isinstance(residual, Tensor)
            and (residual.shape == x.shape and residual.device == device and residual.dtype in FLOATS))
        )
        and (normalized_shape is None or (isinstance(normalized_shape, (tuple, list)) and tuple(normalized_shape) == size))
        and type(eps) in (float, int) and type(dropout_p) in (float, int) and 0 <= dropout_p < 1
        and x.dtype in FLOATS and len(size) == 1 and size[0] != 0
    )  # fmt: skip


def _check_tensors(x: Tensor, others: dict[str, Tensor | None], shape: tuple[int, ...]) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"x: got dtype {x.dtype}, allowed are float16, bfloat16, float32 and float64")
    _check_shapes_and_devices(x, others, shape)
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, allowed are float16, bfloat16, float32 and float64")


def _check_shapes_and_devices(x: Tensor, others: dict[str, Tensor | None], shape: tuple[int, ...]) -> None:
    if x.dim() == 0 or not shape:
        what = "x" if x.dim() == 0 else next((name for name, t in others.items() if t is not None), "normalized_shape")
        raise ValueError(f"{what}: got shape (), must have at least one dimension")
    end = tuple(x.shape[-len(shape) :])
    for name, tensor in others.items():
        if tensor is None:
            continue
        needed = tuple(x.shape) if name == "residual" else end
        if tuple(tensor.shape) != needed:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, x needs {needed}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, x is on {x.device}")
    if shape != end:
        raise ValueError(f"normalized_shape: got {shape}, the last dimensions of x are {end}")


def _unusual(
    rms: bool,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: Any,
    residual: Tensor | None,
    dropout_p: Any,
    prenorm: bool,
    unit_offset: bool,
    normalized_shape: Any,
    backend: str | None,
) -> Any:
    """Everything else that PyTorch takes, and the errors. Several dimensions are one, of their product."""
    function: Any = choose("rms_norm" if rms else "layer_norm", x.device.type if isinstance(x, Tensor) else "cpu", backend)
    others = {"weight": weight, "bias": bias, "residual": residual}
    for name, tensor in (("x", x), *others.items()):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "x"):
            shape_here = name == "weight" and isinstance(tensor, (tuple, list, int))  # as PyTorch's functions have it
            way_out = "; the shape to normalise over is normalized_shape=..., or may be left out" if shape_here else ""
            raise TypeError(f"{name}: got {type(tensor).__name__}, allowed are tensors{way_out}")
    if rms and eps is None:
        eps = torch.finfo(torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32).eps
    eps, dropout_p = as_float("eps", eps), as_float("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p}, must be at least 0 and below 1")
    if normalized_shape is not None:
        if not isinstance(normalized_shape, (tuple, list)):
            raise TypeError(f"normalized_shape: got {type(normalized_shape).__name__}, allowed are tuples and lists of int")
        shape = tuple(normalized_shape)
    else:
        like = weight if weight is not None else bias
        shape = tuple(x.shape[-1:] if like is None else like.shape)
    plain = residual is None and dropout_p == 0 and not (rms and bias is not None) and not unit_offset
    odd_weight = rms and x.dtype in FLOATS and weight is not None and not weight.is_floating_point()
    if plain and (x.is_nested or (rms and x.is_complex()) or odd_weight):
        if not x.is_nested:
            _check_shapes_and_devices(x, others, shape)
        y = F.rms_norm(x, shape, weight, eps) if rms else F.layer_norm(x, shape, weight, bias, eps)
        return (y, x) if prenorm else y
    _check_tensors(x, others, shape)
    if math.prod(shape) == 0:  # no number to normalise
        function = _rms_norm_torch if rms else _layer_norm_torch
    flat = [None if t is None else t.flatten(-len(shape)) for t in (x, weight, bias, residual)]
    x_flat, weight, bias, residual = flat
    if rms:
        made = function(x_flat, weight, eps, residual, dropout_p, prenorm, bias=bias, unit_offset=unit_offset)
    else:
        made = function(x_flat, weight, bias, eps, residual, dropout_p, prenorm)
    return tuple(part.view(x.shape) for part in made) if prenorm else made.view(x.shape)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    prenorm: bool = False,
    *,
    normalized_shape: Sequence[int] | None = None,
    backend: str | None = None,
) -> Any:
    """y = LayerNorm(h) over the last dimension, h = dropout(x) + residual; with prenorm=True (y, h).

    x (..., hidden) and residual (of x's shape) of any floating dtype; weight and bias (hidden), of a dtype of their own. y
    has the shape and dtype of x, h the dtype of the residual (of x without one). The norm is over as many last dimensions as
    weight, or bias, has: `normalized_shape` says so where there is neither. What `torch.nn.functional.layer_norm` takes is
    taken, nested tensors, numbers of any type and dimensions of no element included, alike on every backend. dropout_p is the
    probability to drop an element of x; the random numbers come from a seed drawn from PyTorch's generator of the device,
    once a call.
    Raises TypeError for integer input and what is no tensor or number, ValueError for shapes and devices that do not match or
    a dropout_p outside 0 <= p < 1.
    """
    if not _is_usual(x, weight, bias, eps, residual, dropout_p, normalized_shape):
        return _unusual(False, x, weight, bias, eps, residual, dropout_p, prenorm, False, normalized_shape, backend)
    return choose("layer_norm", x.device.type, backend)(x, weight, bias, eps, residual, dropout_p, prenorm)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = 1e-6,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    prenorm: bool = False,
    *,
    bias: Tensor | None = None,
    unit_offset: bool = False,
    normalized_shape: Sequence[int] | None = None,
    backend: str | None = None,
) -> Any:
    """y = RMSNorm(h) over the last dimension, h = dropout(x) + residual; with prenorm=True (y, h).

    eps=None is the machine epsilon in which statistics are computed, as in torch: float32's, of float64 float64's.
    unit_offset multiplies by 1 + weight (Gemma), computed in float32. Everything else as in `layer_norm`.
    """
    if not _is_usual(x, weight, bias, eps, residual, dropout_p, normalized_shape):
        return _unusual(True, x, weight, bias, eps, residual, dropout_p, prenorm, unit_offset, normalized_shape, backend)
    function = choose("rms_norm", x.device.type, backend)
    return function(x, weight, eps, residual, dropout_p, prenorm, bias=bias, unit_offset=unit_offset)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` (same arguments, same state dict), computed by `layer_norm`."""

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
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)  # type: ignore[arg-type]
        self.backend = backend

    def forward(  # type: ignore[override]  # torch's takes x alone
        self, input: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0, prenorm: bool = False
    ) -> Any:
        return layer_norm(
            input, self.weight, self.bias, self.eps, residual, dropout_p, prenorm,
            normalized_shape=self.normalized_shape, backend=self.backend,
        )  # fmt: skip


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` (same arguments, same state dict; eps is 1e-6 unless it is given), computed by `rms_norm`.

    unit_offset multiplies by 1 + weight, and weight starts at 0.
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
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)  # type: ignore[arg-type]
        self.backend = backend

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def forward(  # type: ignore[override]  # torch's takes x alone
        self, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0, prenorm: bool = False
    ) -> Any:
        return rms_norm(
            x, self.weight, self.eps, residual, dropout_p, prenorm, unit_offset=self.unit_offset,
            normalized_shape=self.normalized_shape, backend=self.backend,
        )  # fmt: skip


__all__ = ["LayerNorm", "RMSNorm", "layer_norm", "layer_norm_reference", "rms_norm", "rms_norm_reference"]
