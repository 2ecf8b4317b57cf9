"""Activations of the MLP, with bias and dropout in the same pass.

GELU (Hendrycks & Gimpel 2016), exact and tanh form; SwiGLU and GEGLU (Shazeer 2020, eq. 6 and 5):

    bias_gelu   y = drop(gelu(x + bias))
    swiglu      y = drop(silu(gate + gate_bias) * (up + up_bias))
    geglu       y = drop(gelu(gate + gate_bias) * (up + up_bias))

Shapes: inputs (..., F), biases (F). Gate and up may lie side by side in one tensor (..., 2 F), "packed", as a fused projection
gives them. Dropout keeps an element where reference.keep_mask of attention does for one head of (rows, F).

The Triton kernels are in activation_triton.py, because this file is imported where there is no Triton.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import register_autograd, register_vmap
from ._checks import as_float
from ._dispatch import (
    NAMESPACE,
    Implementation,
    choose,
    forced_backend,
    has_tangent,
    imported,
    refuse_forward_mode,
    register,
    why_not_triton,
)
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


# --- registered op --------------------------------------------------------------------------------------------------


def _kernel(direction: str):  # type: ignore[no-untyped-def]  # triton is imported at first use
    return getattr(imported(".activation_triton", __package__), direction)


@torch.library.custom_op(f"{NAMESPACE}::activation", mutates_args=())
def _activation(
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    packed: bool,
    dropout_p: float,
) -> Tensor:
    return _kernel("forward")(gate, up, gate_bias, up_bias, seed, activation, packed, dropout_p)


@_activation.register_fake
def _(gate, up, gate_bias, up_bias, seed, activation, packed, dropout_p):  # type: ignore[no-untyped-def]
    return gate.new_empty(*gate.shape[:-1], gate.shape[-1] // (2 if packed else 1))


@torch.library.custom_op(f"{NAMESPACE}::activation_backward", mutates_args=())
def _activation_backward(
    grad: Tensor,
    needs_gate_bias: bool,
    needs_up_bias: bool,
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    packed: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _kernel("backward")(
        grad, needs_gate_bias, needs_up_bias, gate, up, gate_bias, up_bias, seed, activation, packed, dropout_p
    )
    dgate, dup, dgate_bias, dup_bias = (gate.new_empty(0) if grad is None else grad for grad in grads)
    return dgate, dup, dgate_bias, dup_bias


@_activation_backward.register_fake
def _(grad, needs_gate_bias, needs_up_bias, gate, up, gate_bias, up_bias, *_):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(gate, memory_format=torch.contiguous_format),
        gate.new_empty(0) if up is None else torch.empty_like(up, memory_format=torch.contiguous_format),
        gate_bias.new_empty(gate_bias.shape) if needs_gate_bias else gate.new_empty(0),
        up_bias.new_empty(up_bias.shape) if needs_up_bias else gate.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # the types are torch's own
    tensors, ctx.options = inputs[:5], inputs[5:]
    ctx.present = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    left = iter(ctx.saved_tensors)
    tensors = [next(left) if present else None for present in ctx.present]
    needs = ctx.needs_input_grad
    grads = _call_activation_backward(grad, needs[2], needs[3], *tensors, *ctx.options)
    return *(gradient if needed else None for gradient, needed in zip(grads, needs)), None, None, None, None


_call_activation = register_autograd(_activation, _backward, _setup_context)
register_vmap(_activation)


def _no_second_derivative(ctx, *_):  # type: ignore[no-untyped-def]
    raise NotImplementedError("activations have no second derivative (use backend='reference' for create_graph=True)")


_call_activation_backward = register_autograd(_activation_backward, _no_second_derivative)
register_vmap(_activation_backward)

# --- implementations ------------------------------------------------------------------------------------------------


def _triton(
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    packed: bool,
    dropout_p: float,
) -> Tensor:
    seed = seed_for(dropout_p, gate.device)
    if gate.dtype == torch.float64:
        return activation_reference(gate, up, gate_bias, up_bias, seed, activation, packed, dropout_p)
    refuse_forward_mode("activation", gate, up, gate_bias, up_bias)
    return _call_activation(gate, up, gate_bias, up_bias, seed, activation, packed, dropout_p)


def _gelu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    return gelu_reference(x if x.dtype == torch.float64 else x.float(), approximate).to(x.dtype)


def _gelu_torch(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def _activate_torch(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _gate_torch(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = _activate_torch(gate, activation)
    # Without a gradient nothing needs the activation again; with one, autograd would copy it first.
    return y * up if torch.is_grad_enabled() else y.mul_(up)


class _Packed(torch.autograd.Function):
    """activation(gate) * up of one tensor that holds both, as autograd would do it, but for the concatenation of the two
    gradients: they are written where they belong."""

    @staticmethod
    def forward(ctx, x, activation):  # type: ignore[no-untyped-def]
        gate, up = x.chunk(2, dim=-1)
        y = _activate_torch(gate, activation)
        ctx.activation = activation
        ctx.save_for_backward(x, y)
        return y * up

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x, y), activation = ctx.saved_tensors, ctx.activation
        gate, up = x.chunk(2, dim=-1)
        if torch.is_grad_enabled():  # for a second derivative autograd has to see each step
            return torch.autograd.grad(_gate_torch(gate, up, activation), x, grad, create_graph=True)[0], None
        dx = torch.empty_like(x)
        dgate, dup = dx.chunk(2, dim=-1)
        torch.mul(grad, up, out=dgate)
        if activation == "silu":
            torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        else:
            form = "tanh" if activation == "gelu_tanh" else "none"
            torch.ops.aten.gelu_backward.grad_input(dgate, gate, approximate=form, grad_input=dgate)
        torch.mul(y, grad, out=dup)
        return dx, None


def _is_eager(*tensors: Tensor | None) -> bool:
    """Whether neither a compiler nor torch.func transforms what is called."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or has_tangent(*tensors))


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
    large = gate.is_cpu and gate.numel() >= 2**18  # below, calls count more than passes over memory
    if large and packed and gate_bias is None and up_bias is None and torch.is_grad_enabled() and _is_eager(gate):
        y = _Packed.apply(gate, activation)
        return F.dropout(y, dropout_p) if dropout_p > 0 else y
    if packed:
        gate, up = gate.chunk(2, dim=-1)
    x = gate if gate_bias is None else gate + gate_bias.to(gate.dtype)
    if up is None:
        y = _activate_torch(x, activation)
    else:
        y = _gate_torch(x, up if up_bias is None else up + up_bias.to(up.dtype), activation)
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


register("gelu", Implementation("torch", _gelu_torch), Implementation("reference", _gelu_reference))
for _op in ("bias_gelu", "swiglu", "geglu"):
    register(
        _op,
        Implementation("triton", _triton, why_not_triton),
        Implementation("torch", _torch),
        Implementation("reference", _reference),
    )

# --- public ---------------------------------------------------------------------------------------------------------


def _check_approximate(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: got {approximate!r}, allowed are 'none' and 'tanh'")


def _check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, allowed are tensors")
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


def _check_dropout(dropout_p: float) -> float:
    dropout_p = as_float("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, must be at least 0 and below 1")
    return dropout_p


def _choose(op: str, x: Tensor, backend: str | None, *biases: Tensor | None):  # type: ignore[no-untyped-def]
    """The implementation. In a compiled graph it is PyTorch's operators, which the compiler fuses with each other and with
    their neighbours into the same one pass as ours; only the gradient of a bias, which it sums in a pass of its own, makes our
    op, at which its fusion ends, worth having."""
    compiling = torch.compiler.is_compiling() and backend in (None, "auto") and forced_backend() is None
    if compiling and not (torch.is_grad_enabled() and any(bias is not None and bias.requires_grad for bias in biases)):
        backend = "torch"
    return choose(op, x.device.type, backend)


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
    elif not isinstance(up, Tensor):
        raise TypeError(f"up: got {type(up).__name__}, allowed are tensors")
    elif gate.shape != up.shape:
        raise ValueError(f"up: got shape {tuple(up.shape)}, gate has {tuple(gate.shape)}")
    elif gate.dtype != up.dtype:
        raise TypeError(f"up: got dtype {up.dtype}, gate has {gate.dtype}")
    elif gate.device != up.device:
        raise ValueError(f"up: is on {up.device}, gate on {gate.device}")
    _check_bias("gate_bias", gate_bias, gate, features)
    _check_bias("up_bias", up_bias, gate, features)
    dropout_p = _check_dropout(dropout_p)
    function = _choose(op, gate, backend, gate_bias, up_bias)
    return function(gate, up, gate_bias, up_bias, activation, up is None, dropout_p)


def gelu(x: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """GELU of x, any shape. approximate: "none" (erf) or "tanh". Raises ValueError for another, TypeError for other dtypes than
    float16, bfloat16, float32 and float64."""
    _check_approximate(approximate)
    _check_float("x", x)
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
    dropout_p = _check_dropout(dropout_p)
    function = _choose("bias_gelu", x, backend, bias)
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
