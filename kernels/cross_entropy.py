"""Cross-entropy of given logits, with what a language model adds to it: softcap, z-loss, and what to look at besides the loss.

Shapes: N tokens, V vocabulary entries. With z the logits after softcap and lse = log sum exp z, the loss of a token with
target y and class weights w is

    (1 - s) * w_y * (lse - z_y) + s / V * sum_v w_v (lse - z_v) + z_loss * lse^2

(s: label smoothing, Szegedy et al. 2016; z_loss: PaLM, Chowdhery et al. 2022, section 5). The Triton kernels, in
cross_entropy_triton.py, read the logits once for the loss and once for the gradient, which can take the logits' place.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import NAMESPACE, Implementation, checks_values, choose, refuse_forward_mode, register, why_not_triton


class CrossEntropyAux(NamedTuple):
    """What `return_aux=True` gives besides the loss, in the shape of target, without gradient."""

    target_logits: Tensor
    """Logit of the target after softcap, float32; 0 where the target is ignored."""
    lse: Tensor
    """Log-sum-exp of the logits after softcap, float32."""
    correct: Tensor
    """Whether the largest logit (the first of equal ones) is the target's, bool; False where the target is ignored."""


# --- reference ------------------------------------------------------------------------------------------------------


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    inplace_backward: bool = False,
    return_aux: bool = False,
) -> Any:
    """The loss of logits (N, V) and target (N); with return_aux (loss, CrossEntropyAux)."""
    if softcap > 0.0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(
        logits,
        target,
        None if weight is None else weight.to(logits.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if z_loss > 0.0:
        valid = target != ignore_index
        penalty = z_loss * logits.logsumexp(-1).square() * valid
        if reduction == "none":
            loss = loss + penalty
        else:
            loss = loss + (penalty.sum() / valid.sum() if reduction == "mean" else penalty.sum())
    return (loss, _aux_reference(logits.detach(), target, ignore_index)) if return_aux else loss


def _aux_reference(logits: Tensor, target: Tensor, ignore_index: int) -> CrossEntropyAux:
    valid = target != ignore_index
    target_logits = logits.gather(-1, torch.where(valid, target, 0)[:, None])[:, 0]
    correct = (logits.argmax(-1) == target) & valid
    return CrossEntropyAux(torch.where(valid, target_logits, 0.0).float(), logits.logsumexp(-1).float(), correct)


# --- what the ops of a loss share -----------------------------------------------------------------------------------


def reduced(loss: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int) -> Tensor:
    """The loss per token reduced as PyTorch does: a mean divides by the weights of the targets that are not ignored."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    valid = target != ignore_index
    if weight is None:
        return loss.sum() / valid.sum()
    return loss.sum() / torch.where(valid, weight.float()[target.clamp(0, weight.shape[0] - 1)], 0.0).sum()


def check_options(reduction: str, label_smoothing: float, softcap: float, z_loss: float) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}, allowed are 'mean', 'sum' and 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, must be between 0 and 1")
    for name, number in (("softcap", softcap), ("z_loss", z_loss)):
        if not number >= 0.0:
            raise ValueError(f"{name}: got {number}, must be 0 or more")


def check_devices(**tensors: Tensor | None) -> None:
    """All on the device of the first."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given))
    for name, tensor in given.items():
        if tensor.device != given[first].device:
            raise ValueError(f"{name}: got device {tensor.device}, {first} is on {given[first].device}")


def check_targets(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """IndexError for a target (N) outside the vocabulary; on a GPU only under `debug_checks`, because it waits."""
    outside = (target != ignore_index) & ((target < 0) | (target >= vocabulary))
    if outside.any():
        i = int(outside.nonzero()[0])
        raise IndexError(
            f"target: token {i} is {int(target[i])}, but the vocabulary has {vocabulary} entries "
            f"(allowed: 0 to {vocabulary - 1}, or ignore_index {ignore_index})"
        )


def shaped(loss: Tensor, aux: CrossEntropyAux | None, target: Tensor, reduction: str, return_aux: bool) -> Any:
    """What a public function returns: per-token results in the shape of target."""
    loss = loss.view(target.shape) if reduction == "none" else loss
    return (loss, CrossEntropyAux(*(part.view(target.shape) for part in aux))) if return_aux and aux is not None else loss


def kernels() -> Any:
    """The Triton half, imported at first use."""
    return importlib.import_module(".cross_entropy_triton", __package__)


# --- registered ops -------------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy", mutates_args=())
def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    aux: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, target_logits, correct) of each token."""
    k = kernels()
    rows = k.Rows.empty(target, aux, 1)
    z = logits if logits.stride(-1) == 1 else logits.contiguous()
    options = k.options(ignore_index, label_smoothing, softcap, z_loss, weight)
    k.forward(z, target.contiguous(), rows, 0, logits.shape[1], options)
    return rows.loss, rows.lse, rows.target_logits, rows.correct


@_forward.register_fake
def _(logits, target, weight, ignore_index, label_smoothing, softcap, z_loss, aux, inplace_backward):  # type: ignore[no-untyped-def]
    return empty_rows(target, aux)


def empty_rows(target: Tensor, aux: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for (loss, lse, target_logits, correct)."""
    some = target.shape[0] if aux else 0
    return (
        target.new_empty(target.shape[0], dtype=torch.float32),
        target.new_empty(target.shape[0], dtype=torch.float32),
        target.new_empty(some, dtype=torch.float32),
        target.new_empty(some, dtype=torch.bool),
    )


def _gradient(out: Tensor, z: Tensor, row_grad: Tensor, lse: Tensor, target: Tensor, options: Any) -> None:
    kernels().gradient(z, out, target.contiguous(), lse, row_grad, 0, z.shape[1], options)


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy_backward", mutates_args=())
def _grad(
    row_grad: Tensor,
    lse: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
) -> Tensor:
    z = logits if logits.stride(-1) == 1 else logits.contiguous()
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _gradient(out, z, row_grad, lse, target, kernels().options(ignore_index, label_smoothing, softcap, z_loss, weight))
    return out


@_grad.register_fake
def _(row_grad, lse, logits, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy_backward_", mutates_args=("logits",))
def _grad_(
    row_grad: Tensor,
    lse: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
) -> None:
    _gradient(logits, logits, row_grad, lse, target, kernels().options(ignore_index, label_smoothing, softcap, z_loss, weight))


@_grad_.register_fake
def _(*_):  # type: ignore[no-untyped-def]
    return None


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # the types are torch's own
    logits, target, weight, *ctx.options, _, ctx.inplace = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1], logits, target, weight)


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    nothing = (None,) * 8
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return None, *nothing
    lse, logits, target, weight = ctx.saved_tensors
    if ctx.inplace and logits.stride(-1) == 1:
        # Detached, it still counts as changed: a second backward over the same graph is refused by autograd.
        logits = logits.detach()
        _grad_(grad_loss, lse, logits, target, weight, *ctx.options)
        return logits, *nothing
    return _grad(grad_loss, lse, logits, target, weight, *ctx.options), *nothing


_forward.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx, *_):  # type: ignore[no-untyped-def]
    raise NotImplementedError("cross_entropy has no second derivative (use backend='reference' for create_graph=True)")


_grad.register_autograd(_no_second_derivative)


def _triton(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    inplace_backward: bool,
    return_aux: bool,
) -> Any:
    if logits.dtype == torch.float64 or divided_twice(weight, reduction, z_loss):
        return cross_entropy_reference(
            logits, target, weight, reduction, ignore_index, label_smoothing, softcap, z_loss, False, return_aux
        )
    refuse_forward_mode("cross_entropy", logits)
    # Under torch.compile it is the compiler that decides what memory is used again.
    inplace = inplace_backward and not torch.compiler.is_compiling()
    loss, lse, target_logits, correct = _forward(
        logits, target, weight, ignore_index, label_smoothing, softcap, z_loss, return_aux, inplace
    )
    loss = reduced(loss, target, weight, reduction, ignore_index)
    return (loss, CrossEntropyAux(target_logits, lse, correct)) if return_aux else loss


def divided_twice(weight: Tensor | None, reduction: str, z_loss: float) -> bool:
    """A mean with class weights divides the two parts of the loss by different numbers: left to the reference."""
    return weight is not None and z_loss > 0.0 and reduction == "mean"


register(
    "cross_entropy",
    Implementation("triton", _triton, why_not_triton),
    Implementation("torch", cross_entropy_reference),
    Implementation("reference", cross_entropy_reference),
)

# --- public ---------------------------------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    inplace_backward: bool = False,
    return_aux: bool = False,
    backend: str | None = None,
) -> Any:
    """`torch.nn.functional.cross_entropy` of class indices, with softcap, z-loss and a gradient that can take no memory.

    logits (..., V) floating, classes last; target (...) int64 with values 0..V-1 or ignore_index; weight (V) rescales
    classes; softcap c > 0 replaces logits z by c tanh(z / c); z_loss adds z_loss * logsumexp(z)^2 per token. Computed in
    float32 whatever autocast says; returns a float32 (float64 for float64 logits) scalar, or one loss per token in the shape
    of target for reduction="none". With every target ignored the mean is NaN, as in PyTorch. return_aux=True returns
    (loss, CrossEntropyAux): target logit, log-sum-exp and whether the prediction is right, per token.

    inplace_backward=True lets the Triton backward write the gradient over the logits: nothing may read them afterwards, and
    autograd refuses a second backward. Other implementations and compiled graphs ignore it.

    Raises ValueError or TypeError for shapes, dtypes, devices and options that do not fit. A target out of range raises
    IndexError on the CPU and under `debug_checks()`; otherwise its loss and its gradient are NaN on a GPU.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits: got dtype {logits.dtype}, allowed are floating-point dtypes")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, need (..., V) with V at least 1")
    if target.dtype != torch.int64:
        raise TypeError(f"target: got dtype {target.dtype}, allowed is int64")
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"target: got shape {tuple(target.shape)}, logits need {tuple(logits.shape[:-1])}")
    if weight is not None and weight.shape != logits.shape[-1:]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, logits need ({logits.shape[-1]},)")
    check_options(reduction, label_smoothing, softcap, z_loss)
    check_devices(logits=logits, target=target, weight=weight)
    function = choose("cross_entropy", logits.device.type, backend)
    flat = target.reshape(-1)
    if checks_values(logits.device.type):
        check_targets(flat, logits.shape[-1], ignore_index)
    result = function(
        logits.reshape(-1, logits.shape[-1]),
        flat,
        weight,
        reduction,
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
        inplace_backward,
        return_aux,
    )
    loss, aux = result if return_aux else (result, None)
    return shaped(loss, aux, target, reduction, return_aux)


__all__ = ["CrossEntropyAux", "cross_entropy", "cross_entropy_reference"]
