"""The registered operators of attention, and what is common to its implementations.

The operator attention takes one checked problem (reference.Inputs, flattened) and gives (out, lse), both with a
gradient; attention_backward is its backward. `implementation` names who computes: "triton" or "cpu".
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from .._dispatch import NAMESPACE, Implementation, choose, only_on, refuse_forward_mode, register, why_not_triton
from .fused import fused, why_not
from .reference import Inputs, attention_reference

_TENSORS = ("q", "k", "v", "bias", "mask", "alibi_slopes", "s_aux", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "seed")
_NAMES = tuple(field.name for field in fields(Inputs))  # here, because torch.compile cannot trace fields()
assert _NAMES[: len(_TENSORS)] == _TENSORS


def _function(implementation: str, direction: str):  # type: ignore[no-untyped-def]  # triton is imported at first use
    module = direction if implementation == "triton" else "blocked"
    return getattr(importlib.import_module(f".{module}", __package__), direction)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    s_aux: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    x = Inputs(
        q, k, v, bias, mask, alibi_slopes, s_aux, cu_seqlens_q, cu_seqlens_k, seqused_k, seed,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, window_left, window_right, top_left, softcap,
    )  # fmt: skip
    out, lse = _function(implementation, "forward")(x)
    return out, lse


@_attention.register_fake
def _(q, k, v, bias, mask, alibi_slopes, s_aux, cu_seqlens_q, *_):  # type: ignore[no-untyped-def]
    out, lse = _empty(Inputs(q, k, v, cu_seqlens_q=cu_seqlens_q))
    return out, lse


def _empty(x: Inputs) -> tuple[Tensor, Tensor]:
    """Room for (out, lse)."""
    out = x.q.new_empty(*x.q.shape[:-1], x.v.shape[-1])
    return out, x.q.new_empty(x.lse_shape(), dtype=torch.float64 if x.q.dtype == torch.float64 else torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def _attention_backward(
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs_bias: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    s_aux: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = Inputs(
        q, k, v, bias, mask, alibi_slopes, s_aux, cu_seqlens_q, cu_seqlens_k, seqused_k, seed,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, window_left, window_right, top_left, softcap,
    )  # fmt: skip
    dq, dk, dv, dbias, delta = _function(implementation, "backward")(x, out, lse, grad_out, grad_lse, needs_bias)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias, _sink_grad(x, lse, delta)


def _sink_grad(x: Inputs, lse: Tensor, delta: Tensor) -> Tensor:
    """The sink takes part in the softmax with no value, so its ds is -p * delta (delta = rowsum(dO * O) - dlse)."""
    if x.s_aux is None:
        return delta.new_empty(0)
    heads = lse.transpose(0, 1).flatten(1) if x.cu_seqlens_q is None else lse  # (H, rows)
    deltas = delta.transpose(0, 1).flatten(1) if x.cu_seqlens_q is None else delta
    # A row without a key and a packed token of no sequence have no share, and the latter's delta is whatever memory held.
    return -(torch.exp(x.s_aux[:, None] - heads) * deltas).where(heads != -torch.inf, 0.0).sum(1)


@_attention_backward.register_fake
def _(out, lse, grad_out, grad_lse, needs_bias, q, k, v, bias, mask, alibi_slopes, s_aux, *_):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(v, memory_format=torch.contiguous_format),
        bias.new_empty(bias.shape) if needs_bias else q.new_empty(0),
        lse.new_empty((0,) if s_aux is None else s_aux.shape),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # the types are torch's own
    tensors, ctx.options = inputs[: len(_TENSORS)], inputs[len(_TENSORS) :]
    ctx.present = [tensor is not None for tensor in tensors]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *(tensor for tensor in tensors if tensor is not None))


def _backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    nothing = (None,) * (len(_TENSORS) - 7 + len(ctx.options))
    if grad_out is None and grad_lse is None:
        return (None,) * 7 + nothing
    out, lse, *saved = ctx.saved_tensors
    left = iter(saved)
    tensors = [next(left) if present else None for present in ctx.present]
    needs = ctx.needs_input_grad
    grads = _attention_backward(
        out, lse, torch.zeros_like(out) if grad_out is None else grad_out, grad_lse, needs[3], *tensors, *ctx.options
    )
    dq, dk, dv, dbias, dsink = grads
    return (
        dq if needs[0] else None,
        dk if needs[1] else None,
        dv if needs[2] else None,
        dbias if needs[3] else None,
        None,
        None,
        dsink if needs[6] else None,
        *nothing,
    )


_attention.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx, *_):  # type: ignore[no-untyped-def]
    raise NotImplementedError("attention has no second derivative (use backend='reference' for create_graph=True)")


_attention_backward.register_autograd(_no_second_derivative)


def _vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
    """torch.func.vmap over dense batches: the mapped dimension joins the batch."""
    tensors, options = list(args[: len(_TENSORS)]), args[len(_TENSORS) :]
    if any(tensor is not None for tensor in tensors[7:]):
        raise NotImplementedError("attention under vmap takes neither cu_seqlens, seqused_k nor dropout")
    n, batch = info.batch_size, None
    mapped = {
        name: (tensor, dim) for name, tensor, dim in zip(_TENSORS, tensors, in_dims[: len(_TENSORS)]) if tensor is not None
    }
    if mapped.get("s_aux", (None, None))[1] is not None:
        raise NotImplementedError("attention under vmap takes one s_aux for all")
    q, dim = mapped["q"]
    batch = q.shape[0] if dim is None else q.movedim(dim, 0).shape[1]

    def join(name: str) -> Tensor | None:
        if name not in mapped:
            return None
        tensor, dim = mapped[name]
        tensor = tensor.unsqueeze(0).expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        if name == "alibi_slopes" and tensor.dim() == 2:
            tensor = tensor[:, None].expand(n, batch, -1)
        elif name in ("bias", "mask"):
            tensor = tensor[(slice(None),) + (None,) * (5 - tensor.dim())]  # (n, batch or 1, ...)
            tensor = tensor.expand(n, batch, *tensor.shape[2:])
        return tensor.flatten(0, 1)

    inputs = [join(name) if name != "s_aux" else tensors[6] for name in _TENSORS]
    out, lse = _attention(*inputs, *options)
    return (out.unflatten(0, (n, batch)), lse.unflatten(0, (n, batch))), (0, 0)


_attention.register_vmap(_vmap)


def _run(x: Inputs, implementation: str) -> tuple[Tensor, Tensor]:
    if x.q.dtype == torch.float64 and implementation == "triton":
        return attention_reference(x)
    refuse_forward_mode("attention", x.q, x.k, x.v, x.bias, x.s_aux)
    out, lse = _attention(*[getattr(x, name) for name in _NAMES], implementation)
    return out, lse


def _triton(x: Inputs, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    return _run(x, "triton")


def _cpu(x: Inputs, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    s, t = x.lengths
    # PyTorch's builds the S x T matrix for dropout, and needs one to hold slopes.
    small = x.dropout_p == 0 and (x.alibi_slopes is None or max(s, t) <= 2048)
    return (fused(x), None) if small and why_not(x, need_lse) is None else _run(x, "cpu")


def _torch(x: Inputs, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    reason = why_not(x, need_lse)
    if reason is not None:
        raise ValueError(f"backend: 'torch' was asked for, and PyTorch's own attention does not cover {reason}")
    return fused(x), None


def _reference(x: Inputs, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    return attention_reference(x)


register(
    "flash_attention",
    Implementation("triton", _triton, why_not_triton),
    Implementation("cpu", _cpu, only_on("cpu")),
    Implementation("reference", _reference),
    Implementation("torch", _torch),
)


def attention(x: Inputs, backend: str | None = None, need_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of a checked problem by the implementation that `backend`, the device and the machine choose. lse may be None
    where it is not needed."""
    out, lse = choose("flash_attention", x.q.device.type, backend)(x, need_lse)
    return out, lse


def seed_for(dropout_p: float, device: torch.device) -> Tensor | None:
    """Philox key and counter from PyTorch's generator of that device: checkpointing and CUDA graphs replay it, and no
    value reaches the host."""
    return torch.randint(2**31 - 1, (2,), device=device) if dropout_p > 0 else None


__all__: Sequence[str] = ["attention", "seed_for"]
