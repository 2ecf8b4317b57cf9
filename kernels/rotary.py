"""Rotary position embedding (Su et al. 2021, RoFormer, eq. 34): each pair of a head's dimensions turns by its angle.

    y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin

Pairs are (i, i + R / 2), the halves of the rotary dimensions (GPT-NeoX, Llama), or (2 i, 2 i + 1), interleaved (GPT-J).
The gradient is the rotation by the negative angle.

Shapes: B batch, H heads, S positions, D head_dim, R <= D rotary dimensions (even); dimensions from R on pass unchanged.

The Triton kernel is in rotary_triton.py, because this file is imported where there is no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._autograd import call_in_place, register_autograd, register_vmap
from ._checks import as_float, as_int, check_float, check_writable
from ._dispatch import (
    NAMESPACE,
    Implementation,
    choose,
    forced_backend,
    has_tangent,
    imported,
    refuse_forward_mode,
    register,
    watched,
    why_not_triton,
)

# --- reference ------------------------------------------------------------------------------------------------------


def rotary_cos_sin(
    positions: Tensor, head_dim: int, theta: float = 10_000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin (S, D / 2) of the angles position * theta^(-2i / D), computed in float32 (float64 if dtype is). ValueError or
    TypeError for a head_dim that is no whole number from 0 on, and a dtype that is not floating."""
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions: got {type(positions).__name__}, need a tensor")
    head_dim, theta = as_int("head_dim", head_dim), as_float("theta", theta)
    if head_dim < 0:
        raise ValueError(f"head_dim: got {head_dim}, must be 0 or more")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype}, allowed are floating-point dtypes")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, int(head_dim), 2, device=positions.device, dtype=torch.int64).to(wide) / int(head_dim)
    angle = positions.to(wide)[..., None] * (1.0 / float(theta) ** exponent)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rows(table: Tensor, positions: Tensor) -> Tensor:
    try:
        # index_select, unlike an index, counts no position from the end.
        rows = table.index_select(0, positions.flatten())
    except (IndexError, RuntimeError):
        outside = positions[(positions < 0) | (positions >= table.shape[0])]
        if outside.numel() == 0:
            raise
        raise IndexError(f"positions: got {int(outside[0])}, the table has 0 to {table.shape[0] - 1}") from None
    return rows.view(*positions.shape, table.shape[1])


def _angles(cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin that broadcast to (B, H, S, R / 2)."""
    if positions is not None:
        cos, sin = (_rows(table, positions) for table in (cos, sin))
    return (cos, sin) if cos.dim() == 2 else (cos[:, None], sin[:, None])


def _wide(x: Tensor, cos: Tensor) -> torch.dtype:
    """In which is computed: products of 16 bits would be rounded each, before they are added."""
    if x.dtype == cos.dtype == torch.float32:  # as nearly always on a CPU, where this takes as long as the products
        return torch.float32
    return torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)


def apply_rotary_emb_reference(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    dtype, wide = x.dtype, _wide(x, cos)
    if not dtype == cos.dtype == sin.dtype == wide:
        x, cos, sin = x.to(wide), cos.to(wide), sin.to(wide)
    cos, sin = _angles(cos, sin, positions)
    turning, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    x1, x2 = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, dim=-1)
    y1, y2 = torch.addcmul(x1 * cos, x2, sin, value=-1), torch.addcmul(x2 * cos, x1, sin)
    if wide != dtype:  # before they are joined, which then moves less memory
        y1, y2, rest = y1.to(dtype), y2.to(dtype), rest.to(dtype)
    y = torch.stack((y1, y2), dim=-1).flatten(-2) if interleaved else torch.cat((y1, y2), dim=-1)
    return torch.cat((y, rest), dim=-1) if rest.shape[-1] else y


# --- registered op --------------------------------------------------------------------------------------------------


def _kernel(name: str):  # type: ignore[no-untyped-def]  # triton is imported at first use
    return getattr(imported(".rotary_triton", __package__), name)


@torch.library.custom_op(f"{NAMESPACE}::rotary", mutates_args=())
def _rotary(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k (or an empty tensor) turned by the angles, or by the negative ones."""
    q_out, k_out = _kernel("turned")(q, k, cos, sin, positions, interleaved, inverse)
    return q_out, q.new_empty(0) if k_out is None else k_out


@_rotary.register_fake
def _(q, k, cos, sin, positions, interleaved, inverse):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # the types are torch's own
    _, k, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.has_k, ctx.has_positions = k is not None, positions is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin, *([] if positions is None else [positions]))


def _backward(ctx, grad_q, grad_k):  # type: ignore[no-untyped-def]
    cos, sin, *positions = ctx.saved_tensors
    grads = [grad for grad, needed in ((grad_q, True), (grad_k, ctx.has_k)) if needed and grad is not None]
    if grads:
        back = [*grads, None] if len(grads) == 1 else grads
        turned = list(_call_rotary(*back, cos, sin, positions[0] if positions else None, ctx.interleaved, not ctx.inverse))
    dq = turned.pop(0) if grad_q is not None else None
    dk = turned.pop(0) if ctx.has_k and grad_k is not None else None
    return dq, dk, None, None, None, None, None


_call_rotary = register_autograd(_rotary, _backward, _setup_context)
register_vmap(_rotary)


@torch.library.custom_op(f"{NAMESPACE}::rotary_", mutates_args=("q", "k"))
def _rotary_(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> None:
    _kernel("rotate")(q, k, q, k, cos, sin, positions, interleaved, False)


class _InPlace(torch.autograd.Function):
    """One tensor in place with its gradient: a registered op that writes into its argument can have none of its own."""

    @staticmethod
    def forward(ctx, x, cos, sin, positions, interleaved):  # type: ignore[no-untyped-def]
        _rotary_(x, None, cos, sin, positions, interleaved)
        ctx.mark_dirty(x)
        ctx.interleaved = interleaved
        ctx.save_for_backward(cos, sin, *([] if positions is None else [positions]))
        return x

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cos, sin, *positions = ctx.saved_tensors
        dx, _ = _call_rotary(grad, None, cos, sin, positions[0] if positions else None, ctx.interleaved, True)
        return dx, None, None, None, None


# --- implementations ------------------------------------------------------------------------------------------------


def _triton(
    tensors: tuple[Tensor, ...], cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inplace: bool
) -> tuple[Tensor, ...]:
    q, k = tensors[0], tensors[1] if len(tensors) == 2 else None
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if q.dtype == torch.float64:
        return _reference(tensors, cos, sin, positions, interleaved, inplace)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, which 'triton' does not compute (use backend='reference')")
    refuse_forward_mode("rotary", *tensors, cos, sin)
    if not inplace or transformed:  # the compiler itself finds what can be overwritten
        turned = _call_rotary(q, k, cos, sin, positions, interleaved, False)[: len(tensors)]
        return tuple(x.copy_(y) for x, y in zip(tensors, turned)) if inplace else tuple(turned)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        # One after the other: autograd lets no function with two results write into views.
        return tuple(_InPlace.apply(x, cos, sin, positions, interleaved) for x in tensors)
    call_in_place(_rotary_, (q,) if k is None else (q, k), q, k, cos, sin, positions, interleaved)
    return tensors


_IN_CACHE = 2**17  # numbers that are widened at a time


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = cos.shape[-1]
    y = torch.empty_like(x)
    if x.dtype != cos.dtype:  # of 16 bits: a few heads at a time, because the whole of them in float32 would not fit a cache
        heads = max(1, _IN_CACHE * x.shape[1] // x.numel())
        for some, turned in zip(x.split(heads, dim=1), y.split(heads, dim=1)):
            turned.copy_(_turn_halves(some.to(cos.dtype), cos, sin, sign))
        return y
    (x1, x2, rest), (y1, y2, y_rest) = (t.split((half, half, x.shape[-1] - 2 * half), dim=-1) for t in (x, y))
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    y_rest.copy_(rest)
    return y


class _Halves(torch.autograd.Function):
    """The reference's halves in four passes over half the data, where its separate products, sums and `cat` are seven."""

    @staticmethod
    def forward(ctx, x, cos, sin, sign):  # type: ignore[no-untyped-def]
        ctx.sign = sign
        ctx.save_for_backward(cos, sin)
        return _turn_halves(x, cos, sin, sign)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Halves.apply(grad, *ctx.saved_tensors, -ctx.sign), None, None, None


def _turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A pair is a complex number in memory, and PyTorch multiplies those in one pass."""
    turning, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    y = torch.view_as_complex(turning.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    y = torch.view_as_real(y).flatten(-2)
    return torch.cat((y, rest), dim=-1) if rest.shape[-1] else y


def _turn_on_cpu(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    """The reference by the fewest passes over memory that PyTorch's operators allow."""
    if not x.is_cpu or x.numel() == 0 or cos.shape[-1] == 0:
        return apply_rotary_emb_reference(x, cos, sin, positions, interleaved)
    if watched(x, cos, sin):
        return apply_rotary_emb_reference(x, cos, sin, positions, interleaved)
    dtype, wide = x.dtype, _wide(x, cos)
    if not dtype == cos.dtype == sin.dtype == wide:
        cos, sin = cos.to(wide), sin.to(wide)
    if interleaved:
        if dtype != wide:
            return _turn_on_cpu(x.to(wide), cos, sin, positions, interleaved).to(dtype)
        complex_view = x.stride(-1) == 1 and not any(n % 2 for n in (*x.stride()[:-1], x.storage_offset()))
        if complex_view:
            return _turn_pairs(x, *_angles(cos, sin, positions))
    # Below this size the calls count, not the passes.
    elif x.numel() >= 2**16 and not (cos.requires_grad or sin.requires_grad or has_tangent(x, cos, sin)):
        return _Halves.apply(x, *_angles(cos, sin, positions), 1)
    return apply_rotary_emb_reference(x, cos, sin, positions, interleaved)


def _kept(tensors: tuple[Tensor, ...], cos: Tensor, sin: Tensor, inplace: bool) -> tuple[Tensor, ...]:
    """Copies of what is to be overwritten, where the gradient of cos or sin has to read it."""
    needed = inplace and torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    return tuple(x.clone() for x in tensors) if needed else tensors


def _torch(
    tensors: tuple[Tensor, ...], cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inplace: bool
) -> tuple[Tensor, ...]:
    turned = [_turn_on_cpu(x, cos, sin, positions, interleaved) for x in _kept(tensors, cos, sin, inplace)]
    return tuple(x.copy_(y) for x, y in zip(tensors, turned)) if inplace else tuple(turned)


def _reference(
    tensors: tuple[Tensor, ...], cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inplace: bool
) -> tuple[Tensor, ...]:
    turned = [apply_rotary_emb_reference(x, cos, sin, positions, interleaved) for x in _kept(tensors, cos, sin, inplace)]
    return tuple(x.copy_(y) for x, y in zip(tensors, turned)) if inplace else tuple(turned)


register(
    "rotary",
    Implementation("triton", _triton, why_not_triton),
    Implementation("torch", _torch),
    Implementation("reference", _reference),
)


def _choose(x: Tensor, backend: str | None):  # type: ignore[no-untyped-def]
    """The implementation. In a compiled graph it is PyTorch's operators: the compiler makes one pass of them and of their
    neighbours (a norm of q and k, a copy into the cache), where a registered op would end its fusion."""
    if torch.compiler.is_compiling() and backend in (None, "auto") and forced_backend() is None:
        backend = "torch"
    return choose("rotary", x.device.type, backend)


# --- public ---------------------------------------------------------------------------------------------------------


def _check(name: str, x: Tensor, cos: Tensor, sin: Tensor, inplace: bool, positions: Tensor | None) -> None:
    for title, tensor in ((name, x), ("cos", cos), ("sin", sin)):
        check_float(title, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{title}: is on {tensor.device}, {name} on {x.device}")
    if x.dim() != 4:
        raise ValueError(f"{name}: got {x.dim()} dimensions, need 4: (batch, heads, positions, head_dim)")
    batch, _, length, head_dim = x.shape
    if positions is None:
        if tuple(cos.shape[:-1]) not in ((length,), (1, length), (batch, length)):
            raise ValueError(f"cos: got shape {tuple(cos.shape)}, {name} needs ({length}, R / 2) or ({batch}, {length}, R / 2)")
    else:
        if cos.dim() != 2:
            raise ValueError(f"cos: got shape {tuple(cos.shape)}, with positions a table (max_positions, R / 2)")
        if not isinstance(positions, Tensor):
            raise TypeError(f"positions: got {type(positions).__name__}, need a tensor")
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"positions: got dtype {positions.dtype}, allowed are int32 and int64")
        if tuple(positions.shape) not in ((length,), (batch, length)):
            raise ValueError(f"positions: got shape {tuple(positions.shape)}, {name} needs ({length},) or ({batch}, {length})")
        if positions.device != x.device:
            raise ValueError(f"positions: is on {positions.device}, {name} on {x.device}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin: got shape {tuple(sin.shape)}, cos has {tuple(cos.shape)}")
    if 2 * cos.shape[-1] > head_dim:
        raise ValueError(f"cos: turns {2 * cos.shape[-1]} dimensions, head_dim of {name} is {head_dim}")
    if inplace and x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise ValueError(f"inplace: {name} is a leaf that requires a gradient, which autograd lets nobody overwrite")
    if inplace:
        check_writable(f"inplace: {name}", x)


def _begin_together(a: Tensor, b: Tensor) -> bool:
    """Whether the first elements share one place in memory. The compiler cannot look and asks whether both are one tensor."""
    if torch.compiler.is_compiling():
        return a is b
    if a.numel() == 0 or b.numel() == 0:
        return False
    return torch._C._is_alias_of(a, b) and a.storage_offset() == b.storage_offset()  # type: ignore[attr-defined]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inplace: bool = False,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotate x (B, H, S, D) of any strides, as (B, S, H, D).transpose(1, 2), by cos, sin. Returns the shape and dtype of x.

    cos, sin: (S, R / 2) or (B, S, R / 2); with positions (S) or (B, S), int32 or int64, tables (max_positions, R / 2). Their
    dtype may differ from that of x. R <= D; the dimensions from R on stay as they are. interleaved: pairs (2 i, 2 i + 1), not
    halves. inplace writes into x and returns it. Autocast changes nothing: the dtype of x counts.
    cos and sin get a gradient under "reference" and "torch" alone. A position outside its table raises IndexError on the CPU;
    under "triton" its row becomes NaN.

    Raises ValueError where shapes or devices do not fit, and for an inplace x that is expanded or a leaf with a gradient;
    TypeError for other dtypes.
    """
    _check("x", x, cos, sin, inplace, positions)
    return _choose(x, backend)((x,), cos, sin, positions, interleaved, inplace)[0]


def apply_rotary_emb_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inplace: bool = False,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_emb` of q (B, H, S, D) and k (B, G, S, D) by the same angles, in one launch.

    Raises ValueError too where inplace is to turn one memory twice, k that lies where q lies.
    """
    _check("q", q, cos, sin, inplace, positions)
    _check("k", k, cos, sin, inplace, positions)
    for what, dim in (("batch", 0), ("head_dim", 3)):
        if k.shape[dim] != q.shape[dim]:
            raise ValueError(f"k: got shape {tuple(k.shape)}, its {what} is not that of q, {tuple(q.shape)}")
    if k.dtype != q.dtype:
        raise TypeError(f"k: got dtype {k.dtype}, q has {q.dtype}")
    if inplace and _begin_together(q, k):
        raise ValueError("inplace: k lies where q lies, and each of them would be turned twice")
    turned = _choose(q, backend)((q, k), cos, sin, positions, interleaved, inplace)
    return turned[0], turned[1]


__all__ = ["apply_rotary_emb", "apply_rotary_emb_qk", "apply_rotary_emb_reference", "rotary_cos_sin"]
