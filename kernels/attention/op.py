"""The registered operators of attention, and what is common to its implementations.

The operator attention takes one checked problem (reference.Inputs, flattened) and gives (out, lse), both with a
gradient; attention_backward is its backward. `implementation` names who computes: "triton" or "cpu".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .._autograd import one_by_one, register_autograd
from .._dispatch import (
    NAMESPACE,
    Implementation,
    check_backend,
    choose,
    imported,
    only_on,
    refuse_forward_mode,
    register,
    why_not_triton,
)
from .fused import fused, why_not
from .reference import Inputs, attention_reference

_TENSORS = (
    "q", "k", "v", "bias", "mask", "alibi_slopes", "s_aux", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "seed", "changing",
)  # fmt: skip
_NAMES = tuple(field.name for field in fields(Inputs))  # here, because torch.compile cannot trace fields()
assert _NAMES[: len(_TENSORS)] == _TENSORS


def _function(implementation: str, direction: str):  # type: ignore[no-untyped-def]  # triton is imported at first use
    module = direction if implementation == "triton" else "blocked"
    return getattr(imported(f".{module}", __package__), direction)


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
    changing: Tensor | None,
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
        q, k, v, bias, mask, alibi_slopes, s_aux, cu_seqlens_q, cu_seqlens_k, seqused_k, seed, changing,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, window_left, window_right, top_left, softcap,
    )  # fmt: skip
    out, lse = _function(implementation, "forward")(_with_numbers(x))
    return out, lse


def _with_numbers(x: Inputs) -> Inputs:
    """The same problem with softmax_scale and softcap as numbers."""
    if x.changing is None:
        return x
    softmax_scale, softcap = changed(x.changing)
    return replace(x, softmax_scale=softmax_scale, softcap=softcap, changing=None)


def changed(changing: Tensor) -> tuple[float, float]:
    """softmax_scale and softcap of `reference.Inputs.changing`. ValueError for what the checks could not see in a symbol."""
    softmax_scale, softcap = changing.tolist()
    for name, number in (("softmax_scale", softmax_scale), ("softcap", softcap)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{name}: got {number}, must be finite and 0 or more")
    return softmax_scale, softcap


@_attention.register_fake
def _(q, k, v, bias, mask, alibi_slopes, s_aux, cu_seqlens_q, *rest):  # type: ignore[no-untyped-def]
    *_, top_left, _, _ = rest
    out, lse = Inputs(q, k, v, cu_seqlens_q=cu_seqlens_q, top_left=top_left).empty()
    return out, lse


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
    changing: Tensor | None,
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
        q, k, v, bias, mask, alibi_slopes, s_aux, cu_seqlens_q, cu_seqlens_k, seqused_k, seed, changing,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, window_left, window_right, top_left, softcap,
    )  # fmt: skip
    x = _with_numbers(x)
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
    grads = _differentiable_backward(
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


_differentiable = register_autograd(_attention, _backward, _setup_context)


def _no_second_derivative(ctx, *_):  # type: ignore[no-untyped-def]
    raise NotImplementedError("attention has no second derivative (use backend='reference' for create_graph=True)")


_differentiable_backward = register_autograd(_attention_backward, _no_second_derivative)


# --- torch.func.vmap ------------------------------------------------------------------------------------------------


class _Joined:
    """A mapped dense problem as one of a batch that is n times as large, where `possible`."""

    def __init__(self, info: Any, in_dims: Sequence[int | None], tensors: Sequence[Tensor | None]) -> None:
        self.n, self.tensors, self.in_dims = info.batch_size, tensors, in_dims
        # Packed sequences have no batch, sinks a gradient for each problem, and dropout counts the sequences.
        self.possible = all(tensor is None for tensor in tensors[_TENSORS.index("cu_seqlens_q") :])
        if tensors[_TENSORS.index("s_aux")] is not None:
            self.possible = False
        self.batch = self.first(tensors[0], in_dims[0]).shape[1]

    def first(self, tensor: Any, dim: int | None) -> Tensor:
        """(n, ...)"""
        return tensor.expand(self.n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def join(self, tensor: Tensor, dim: int | None) -> Tensor:
        """(n * batch, ...) of what has a batch."""
        return self.first(tensor, dim).flatten(0, 1)

    def inputs(self) -> list[Tensor | None]:
        joined: list[Tensor | None] = []
        for name, tensor, dim in zip(_TENSORS, self.tensors, self.in_dims):
            if tensor is None:
                joined.append(None)
            elif name in ("bias", "mask", "alibi_slopes"):  # these broadcast over the batch
                wide, rank = self.first(tensor, dim), 2 if name == "alibi_slopes" else 4
                wide = wide[(slice(None), *(None,) * (rank + 1 - wide.dim()))]
                joined.append(wide.expand(self.n, self.batch, *wide.shape[2:]).flatten(0, 1))
            else:
                joined.append(self.join(tensor, dim))
        return joined

    def split(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (self.n, self.batch))


def _vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
    joined = _Joined(info, in_dims[: len(_TENSORS)], args[: len(_TENSORS)])
    if not joined.possible:
        return one_by_one(_attention, info, in_dims, *args)
    out, lse = _attention(*joined.inputs(), *args[len(_TENSORS) :])
    return (joined.split(out), joined.split(lse)), (0, 0)


_attention.register_vmap(_vmap)


def _vmap_backward(info, in_dims, out, lse, grad_out, grad_lse, needs_bias, *args):  # type: ignore[no-untyped-def]
    first, in_dims = in_dims[:4], in_dims[5:]
    joined = _Joined(info, in_dims[: len(_TENSORS)], args[: len(_TENSORS)])
    if not joined.possible:
        every = (out, lse, grad_out, grad_lse, needs_bias, *args)
        return one_by_one(_attention_backward, info, (*first, None, *in_dims), *every)
    rows = [None if t is None else joined.join(t, dim) for t, dim in zip((out, lse, grad_out, grad_lse), first)]
    grads = _attention_backward(*rows, needs_bias, *joined.inputs(), *args[len(_TENSORS) :])
    *qkv, dbias, dsink = grads
    if needs_bias:
        shape = joined.first(args[3], in_dims[3]).shape  # of the bias of each problem
        dbias = joined.split(dbias)
        if len(shape) < 5 or shape[1] == 1:
            dbias = dbias.sum(1)
        dbias = dbias.reshape(shape)
    else:
        dbias = dbias.expand(joined.n, *dbias.shape)
    results = (*map(joined.split, qkv), dbias, dsink.expand(joined.n, *dsink.shape))
    return results, (0,) * len(results)


_attention_backward.register_vmap(_vmap_backward)


# --- implementations ------------------------------------------------------------------------------------------------


def _run(x: Inputs, implementation: str) -> tuple[Tensor, Tensor]:
    if x.q.dtype == torch.float64 and implementation == "triton":
        return attention_reference(x)
    if x.changing is not None:
        x = replace(x, softmax_scale=1.0, softcap=0.0)
    refuse_forward_mode("attention", x.q, x.k, x.v, x.bias, x.s_aux)
    out, lse = _differentiable(*[getattr(x, name) for name in _NAMES], implementation)
    return out, lse


def _triton(x: Inputs, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    return _run(x, "triton")


def _cpu(x: Inputs, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    s, t = x.lengths
    # PyTorch's builds the S x T matrix for dropout, and needs one to hold slopes.
    small = x.dropout_p == 0 and x.changing is None and (x.alibi_slopes is None or max(s, t) <= 2048)
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
    if x.q.device.type == "meta":  # shapes alone, which are the same for all
        check_backend(backend or "auto")
        return _run(x, "cpu")
    out, lse = choose("flash_attention", x.q.device.type, backend)(x, need_lse)
    return out, lse


def seed_for(dropout_p: float, device: torch.device) -> Tensor | None:
    """Philox key and counter from PyTorch's generator of that device: checkpointing and CUDA graphs replay it, and no
    value reaches the host."""
    return torch.randint(2**31 - 1, (2,), device=device) if dropout_p > 0 else None


__all__: Sequence[str] = ["attention", "seed_for"]
