"""Cross-entropy of given logits, with what a language model adds to it: softcap, z-loss, and what to look at besides the loss.

Shapes: N tokens, V vocabulary entries. With z the logits after softcap and lse = log sum exp z, the loss of a token with
target y and class weights w is

    (1 - s) * w_y * (lse - z_y) + s / V * sum_v w_v (lse - z_v) + z_loss * lse^2

(s: label smoothing, Szegedy et al. 2016; z_loss: PaLM, Chowdhery et al. 2022, section 5). The Triton kernels, in
cross_entropy_triton.py, read the logits once for the loss and once for the gradient, which can take the logits' place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from ._autograd import call_in_place, register_autograd, register_vmap
from ._checks import FLOATS, as_float, as_int, check_float, is_expanded
from ._dispatch import NAMESPACE, Implementation, checks_values, choose, imported, refuse_forward_mode, register, why_not_triton


class CrossEntropyAux(NamedTuple):
    """What `return_aux=True` gives besides the loss, in the shape of target."""

    target_logits: Tensor
    """Logit of the target after softcap, float32; 0 where the target is ignored. It has a gradient."""
    lse: Tensor
    """Log-sum-exp of the logits after softcap, float32, of ignored tokens too. It has a gradient."""
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
    """The loss of logits (N, V) and target, (N) indices or (N, V) probabilities; with return_aux (loss, CrossEntropyAux)."""
    if softcap > 0.0:
        logits = softcap * torch.tanh(logits / softcap)
    probabilities = target.is_floating_point()
    logits = logits.to(wide(logits.dtype, target.dtype) if probabilities else wide(logits.dtype))
    loss = F.cross_entropy(
        logits,
        target.to(logits.dtype) if probabilities else target,
        None if weight is None else weight.to(logits.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if z_loss > 0.0:
        lse = logits.logsumexp(-1)
        loss = loss + z_penalty(
            lse, torch.ones_like(lse, dtype=torch.bool) if probabilities else target != ignore_index, z_loss, reduction
        )
    return (loss, _aux_reference(logits, target, ignore_index)) if return_aux else loss


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of a loss: float32, or float64 where one of these is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def z_penalty(lse: Tensor, valid: Tensor, z_loss: float, reduction: str) -> Tensor:
    # Where nothing is valid the mean is 0 / 0, but what is ignored gets no gradient of it.
    penalty = z_loss * torch.where(valid, lse, 0.0).square()
    if reduction == "none":
        return penalty
    return penalty.sum() / valid.sum() if reduction == "mean" else penalty.sum()


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
    total = torch.where(valid, weight.float()[target.clamp(0, weight.shape[0] - 1)], 0.0).sum()
    # Of targets that all weigh 0 it is 0 / 0, and so what label smoothing adds to it does not count.
    return loss.sum() / torch.where(total == 0, torch.nan, total)


def finished(
    loss: Tensor,
    aux: CrossEntropyAux,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    z_loss: float,
) -> Tensor:
    """`reduced`, and the z-loss where the kernels were to leave it out (`divided_twice`); 0.0 where it is in the loss."""
    loss = reduced(loss, target, weight, reduction, ignore_index)
    return loss if z_loss == 0.0 else loss + z_penalty(aux.lse, target != ignore_index, z_loss, reduction)


def check_options(reduction: str, label_smoothing: Any, softcap: Any, z_loss: Any) -> tuple[float, float, float]:
    """The numbers, of whatever types they are."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}, allowed are 'mean', 'sum' and 'none'")
    label_smoothing, softcap, z_loss = (
        as_float("label_smoothing", label_smoothing), as_float("softcap", softcap), as_float("z_loss", z_loss),
    )  # fmt: skip
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, must be between 0 and 1")
    for name, number in (("softcap", softcap), ("z_loss", z_loss)):
        if not number >= 0.0:
            raise ValueError(f"{name}: got {number}, must be 0 or more")
    return label_smoothing, softcap, z_loss


def check_weight(weight: Tensor, vocabulary: int, target: Tensor) -> None:
    """weight (V); PyTorch gives it no derivative either, but with class probabilities."""
    if weight.is_floating_point() or weight.is_complex():  # integers do, as in PyTorch
        check_float("weight", weight)
    if weight.shape != (vocabulary,):
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, need ({vocabulary},), one number for each class")
    if weight.requires_grad and torch.is_grad_enabled() and not target.is_floating_point():
        raise ValueError("weight: it requires a gradient, but the loss of class indices has none for it (give weight.detach())")


def check_target_dtype(target: Tensor, ignore_index: int, return_aux: bool) -> None:
    """Class indices or, of a floating dtype, class probabilities."""
    if target.dtype in FLOATS:
        if ignore_index >= 0:
            raise ValueError(f"ignore_index: got {ignore_index}, but class probabilities (a floating target) ignore nothing")
        if return_aux:
            raise ValueError("return_aux: class probabilities (a floating target) have no target logit")
    elif target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"target: got dtype {target.dtype}, allowed are int64 and uint8, or floating for class probabilities")


def of_one_row(shape: Sequence[int], target: Tensor) -> Tensor:
    """target () where it is that of logits of this shape, (V), in PyTorch's other way of writing it, (1)."""
    one = len(shape) == 1 and shape[0] != 1 and target.shape == (1,) and not target.is_floating_point()
    return target[0] if one else target


def check_devices(input: Tensor, needed: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    """Tensors on the device of the first."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: got {type(input).__name__}, need a tensor")
    device = input.device
    for name, tensor in (needed | optional).items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, need a tensor")
        if tensor.device != device:
            raise ValueError(f"{name}: got device {tensor.device}, input is on {device}")


def check_targets(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """IndexError for a target (N) outside the vocabulary; on a GPU only under `debug_checks`, because it waits."""
    while torch._C._functorch.is_functorch_wrapped_tensor(target):  # the values of all samples, under vmap
        target = torch._C._functorch.get_unwrapped(target)
    target = target if target.dim() == 1 else target.reshape(-1)
    outside = (target != ignore_index) & ((target < 0) | (target >= vocabulary))
    if outside.any():
        i = int(outside.nonzero()[0])
        raise IndexError(
            f"target: token {i} is {int(target[i])}, but the vocabulary has {vocabulary} entries "
            f"(allowed: 0 to {vocabulary - 1}, or ignore_index {ignore_index})"
        )


def indices(target: Tensor) -> Tensor:
    """(N) of int64."""
    flat = target.reshape(-1)
    return flat if flat.dtype == torch.int64 else flat.long()


def shaped(result: Any, shape: Sequence[int], reduction: str, return_aux: bool) -> Any:
    """What a public function returns: per-token results in the shape of the tokens."""
    loss, aux = result if return_aux else (result, None)
    loss = loss.view(shape) if reduction == "none" else loss
    return loss if aux is None else (loss, CrossEntropyAux(*(part.view(shape) for part in aux)))


def with_nan_rows(rows: Tensor, target: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(rows, targets that exist): for PyTorch's own loss where values are not checked, so that a target out of range makes its
    row NaN and reads nothing."""
    if checks_values(rows.device.type):
        return rows, target
    outside = (target != ignore_index) & ((target < 0) | (target >= vocabulary))
    return rows + torch.where(outside, torch.nan, 0.0)[:, None], torch.where(outside, 0, target)


Tensors = dict[str, Tensor]


def second_derivative(losses: Callable[..., Tensors], upstream: Tensors, leaves: Tensors, grads: Tensors) -> Any:
    """Gradients of (upstream, leaves), given those of what the backward makes for the leaves: by plain PyTorch, to any
    order, with all logits in memory. losses(**leaves) gives what upstream has gradients of, by name."""

    def backward(upstream: Tensors, leaves: Tensors) -> Tensors:
        def chosen(leaves: Tensors) -> Tensors:
            every = losses(**leaves)
            return {name: every[name] for name in upstream}

        return torch.func.vjp(chosen, leaves)[1](upstream)[0]  # type: ignore[no-any-return]

    return torch.func.vjp(backward, upstream, leaves)[1](grads)


def present(**tensors: Tensor | None) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def per_token(result: tuple[Tensor, CrossEntropyAux]) -> Tensors:
    """What a loss gives with reduction="none" and return_aux=True, by the names of `second_derivative`."""
    loss, aux = result
    return {"loss": loss, "lse": aux.lse, "target_logits": aux.target_logits}


def kernels() -> Any:
    """The Triton half, imported at first use."""
    return imported(".cross_entropy_triton", __package__)


# --- registered ops -------------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy", mutates_args=())
def _forward_op(
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


@_forward_op.register_fake
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


def _gradient(
    out: Tensor,
    z: Tensor,
    row_grad: Tensor,
    lse: Tensor,
    target: Tensor,
    options: Any,
    of_lse: Tensor | None,
    of_target: Tensor | None,
) -> None:
    kernels().gradient(z, out, target.contiguous(), lse, row_grad, 0, z.shape[1], options, of_lse=of_lse, of_target=of_target)


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy_backward", mutates_args=())
def _grad_op(
    row_grad: Tensor,
    lse: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    of_lse: Tensor | None = None,
    of_target: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits, given those of each token's loss, lse and target logit."""
    z = logits if logits.stride(-1) == 1 else logits.contiguous()
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    options = kernels().options(ignore_index, label_smoothing, softcap, z_loss, weight)
    _gradient(out, z, row_grad, lse, target, options, of_lse, of_target)
    return out


@_grad_op.register_fake
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
    of_lse: Tensor | None = None,
    of_target: Tensor | None = None,
) -> None:
    options = kernels().options(ignore_index, label_smoothing, softcap, z_loss, weight)
    _gradient(logits, logits, row_grad, lse, target, options, of_lse, of_target)


@_grad_.register_fake
def _(*_):  # type: ignore[no-untyped-def]
    return None


def _setup_grad(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # the types are torch's own
    row_grad, _, logits, target, weight, *ctx.options, of_lse, of_target = inputs
    ctx.save_for_backward(row_grad, of_lse, of_target, logits, target, weight)


def _grad_backward(ctx, grad):  # type: ignore[no-untyped-def]
    row_grad, of_lse, of_target, logits, target, weight = ctx.saved_tensors

    options: Any = *ctx.options, False, True

    def losses(logits: Tensor) -> Tensors:
        return per_token(cross_entropy_reference(logits, target, weight, "none", *options))

    upstream = present(loss=row_grad, lse=of_lse, target_logits=of_target)
    up, of = second_derivative(losses, upstream, {"logits": logits}, {"logits": grad})
    # What it says of lse is in the gradient of the logits already.
    return up["loss"], None, of["logits"], *(None,) * 6, up.get("lse"), up.get("target_logits")


_grad = register_autograd(_grad_op, _grad_backward, _setup_grad)
register_vmap(_grad_op)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, target, weight, *ctx.options, aux, ctx.inplace = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(output[3:] if aux else output[1:]))
    ctx.save_for_backward(output[1], logits, target, weight)


def given_gradients(
    lse: Tensor, of_loss: Tensor | None, of_lse: Tensor | None, of_target: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a kernel takes: those of the loss of each token, and of lse and the target logit both or none."""
    of_loss = torch.zeros_like(lse) if of_loss is None else of_loss
    if of_lse is None and of_target is None:
        return of_loss, None, None
    of_lse, of_target = (torch.zeros_like(lse) if grad is None else grad.contiguous() for grad in (of_lse, of_target))
    return of_loss, of_lse, of_target


def _backward(ctx, grad_loss, *of_aux):  # type: ignore[no-untyped-def]
    nothing = (None,) * 8
    of_lse, of_target = of_aux[:2]
    if not ctx.needs_input_grad[0] or (grad_loss is None and of_lse is None and of_target is None):
        return None, *nothing
    lse, logits, target, weight = ctx.saved_tensors
    grad_loss, of_lse, of_target = given_gradients(lse, grad_loss, of_lse, of_target)
    # Where the gradient itself is differentiated the logits are still wanted.
    if ctx.inplace and logits.stride(-1) == 1 and not is_expanded(logits) and not torch.is_grad_enabled():
        # Detached, it still counts as changed: a second backward over the same graph is refused by autograd.
        logits = logits.detach()
        call_in_place(_grad_, (logits,), grad_loss, lse, logits, target, weight, *ctx.options, of_lse, of_target)
        return logits, *nothing
    return _grad(grad_loss, lse, logits, target, weight, *ctx.options, of_lse, of_target), *nothing


_forward = register_autograd(_forward_op, _backward, _setup_context)
register_vmap(_forward_op)


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
    if logits.dtype == torch.float64:
        logits, target = with_nan_rows(logits, target, logits.shape[1], ignore_index)
        return cross_entropy_reference(
            logits, target, weight, reduction, ignore_index, label_smoothing, softcap, z_loss, False, return_aux
        )
    refuse_forward_mode("cross_entropy", logits)
    # Under torch.compile it is the compiler that decides what memory is used again.
    inplace = inplace_backward and not torch.compiler.is_compiling()
    apart = divided_twice(weight, reduction, z_loss)
    loss, lse, target_logits, correct = _forward(
        logits, target, weight, ignore_index, label_smoothing, softcap, 0.0 if apart else z_loss, return_aux or apart, inplace
    )
    aux = CrossEntropyAux(target_logits, lse, correct)
    loss = finished(loss, aux, target, weight, reduction, ignore_index, z_loss if apart else 0.0)
    return (loss, aux) if return_aux else loss


def divided_twice(weight: Tensor | None, reduction: str, z_loss: float) -> bool:
    """A mean with class weights divides the two parts of the loss by different numbers: the second one is made of lse."""
    return weight is not None and z_loss > 0.0 and reduction == "mean"


register(
    "cross_entropy",
    Implementation("triton", _triton, why_not_triton),
    Implementation("torch", cross_entropy_reference),
    Implementation("reference", cross_entropy_reference),
)

# --- public ---------------------------------------------------------------------------------------------------------


def class_dimension(shape: Sequence[int], target: Tensor) -> int:
    """Where logits of this shape have their classes: last, or second, as PyTorch has them. The target says which."""
    last = len(shape) - 1
    fits_one = last <= 1 or shape[1:last] != shape[2:]
    if last >= 0 and fits_one and target.shape == shape[:last] and not target.is_floating_point():
        return last
    as_indices = {c for c in (1, last) if 0 <= c <= last and target.shape == (*shape[:c], *shape[c + 1 :])}
    if target.is_floating_point():
        if as_indices:
            raise TypeError(f"target: got dtype {target.dtype}, class indices in this shape are int64 or uint8")
        fits = {min(last, 1)} if target.shape == shape and shape else set()
    else:
        fits = as_indices
    if not fits:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, logits {tuple(shape)} need class indices {tuple(shape[:-1])}, with the "
            f"classes last, or without the second dimension, as PyTorch has them, or probabilities {tuple(shape)}"
        )
    if len(fits) > 1 and shape[-1] != 1 and 0 not in shape:  # of a single class both readings say the same
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, and logits {tuple(shape)} have their classes last or, as PyTorch has "
            "them, second: both fit. Say which with a row for each target: input.flatten(0, -2), or "
            "input.movedim(1, -1).flatten(0, -2), and target.flatten()"
        )
    return max(fits)


def computed(
    function: Callable[..., Any],
    input: Tensor,
    target: Tensor,
    classes: int,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    inplace_backward: bool,
    return_aux: bool,
) -> Any:
    """`function` of logits whose classes are dimension `classes`, as rows."""
    if classes != input.dim() - 1:
        input = input.movedim(classes, -1)
        target = target.movedim(classes, -1) if target.is_floating_point() else target
    vocabulary, shape = input.shape[-1], input.shape[:-1]
    if target.is_floating_point():
        function, target = cross_entropy_reference, target.reshape(-1, vocabulary)
        checked = False
    else:
        target = indices(target)
        checked = checks_values(input.device.type)
    # PyTorch's own on the CPU looks at every target; a look before would take half as long as a small loss.
    checks_itself = function is cross_entropy_reference and input.device.type == "cpu"
    if checked and not checks_itself:
        check_targets(target, vocabulary, ignore_index)
    rows = input.reshape(-1, vocabulary)
    try:
        result = function(
            rows,
            target,
            weight,
            reduction,
            ignore_index,
            label_smoothing,
            softcap,
            z_loss,
            inplace_backward,
            return_aux,
        )
    except (IndexError, RuntimeError):
        if checked and checks_itself:
            check_targets(target, vocabulary, ignore_index)
        raise
    return shaped(result, shape, reduction, return_aux)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    inplace_backward: bool = False,
    return_aux: bool = False,
    backend: str | None = None,
) -> Any:
    """`torch.nn.functional.cross_entropy`, with softcap, z-loss and a gradient that can take no memory.

    input (..., V) floating, logits with their classes last; target (...) int64 or uint8 with values 0..V-1 or ignore_index;
    weight (V) rescales classes; softcap c > 0 replaces logits z by c tanh(z / c); z_loss adds z_loss * logsumexp(z)^2 per
    token. Computed in float32 whatever autocast says; returns a float32 (float64 for float64 logits) scalar, or one loss per
    token in the shape of target for reduction="none". With every target ignored the mean is NaN and its gradient 0, as in
    PyTorch. return_aux=True returns (loss, CrossEntropyAux): target logit and log-sum-exp, which have gradients, and whether
    the prediction is right, per token.

    What else PyTorch takes, it takes: input (N, V, d1, ...) with target (N, d1, ...), and class probabilities, a floating
    target of the shape of input, (V), (N, V) or (N, V, d1, ...), by PyTorch's own operators. Where more than two dimensions
    fit both readings, such as (N, V, V) with (N, V), it raises ValueError.

    inplace_backward=True lets the Triton backward write the gradient over the logits: nothing may read them afterwards, and
    autograd refuses a second backward. Other implementations and compiled graphs ignore it.

    Raises ValueError or TypeError for shapes, dtypes, devices and options that do not fit. A target out of range raises
    IndexError on the CPU and under `debug_checks()`; otherwise its loss and its gradient are NaN on a GPU.
    """
    check_devices(input, {"target": target}, {"weight": weight})
    check_float("input", input)
    ignore_index = as_int("ignore_index", ignore_index)
    if size_average is not None or reduce is not None:  # PyTorch's of old, which override `reduction` and warn
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if target.dtype != torch.int64:
        check_target_dtype(target, ignore_index, return_aux)
    target = of_one_row(input.shape, target)
    classes = class_dimension(input.shape, target)
    if input.shape[classes] == 0:
        raise ValueError(f"input: got shape {tuple(input.shape)}, need at least 1 class")
    if weight is not None:
        check_weight(weight, input.shape[classes], target)
    label_smoothing, softcap, z_loss = check_options(reduction, label_smoothing, softcap, z_loss)
    function = choose("cross_entropy", input.device.type, backend)
    return computed(
        function,
        input,
        target,
        classes,
        weight,
        reduction,
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
        inplace_backward,
        return_aux,
    )


__all__ = ["CrossEntropyAux", "cross_entropy", "cross_entropy_reference"]
