"""Linear layer + cross-entropy in one op that never holds the (tokens x vocabulary) matrix of logits.

Shapes: N tokens, D features, V vocabulary entries. The loss of the logits z = input @ weight^T + bias is that of
cross_entropy.py. It and its gradient with respect to z,

    row_grad * (softmax(z) * ((1 - s) * w_y + s * mean w + 2 * z_loss * lse) - (1 - s) * w_y * onehot(y) - s / V * w),

need lse and nothing else of the row, so pieces of the logits suffice. row_grad, d objective / d loss of a token, is a number
per token whatever the reduction.

On the CPU pieces are chunks of tokens, and the gradients of input, weight and bias are made in the same pass as the loss,
while the chunk is in cache: the backward only multiplies them by the incoming scalar. For reduction="none" the upstream
gradients are not known yet, so the backward runs the chunks again. On a GPU pieces are chunks of the vocabulary
(linear_cross_entropy_triton.py, imported at first use), the forward leaves lse, and the backward makes the gradients for the
upstream gradients that come: one way for every reduction.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import (
    NAMESPACE,
    Implementation,
    checks_values,
    choose,
    extension,
    only_on,
    refuse_forward_mode,
    register,
    why_not_triton,
)
from .cross_entropy import (
    CrossEntropyAux,
    check_devices,
    check_options,
    check_targets,
    cross_entropy_reference,
    divided_twice,
    empty_rows,
    reduced,
    shaped,
)
from .cross_entropy import kernels as row_kernels

# --- reference ------------------------------------------------------------------------------------------------------


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    filter_gradients: bool = False,
    return_aux: bool = False,
) -> Any:
    """The loss of input (N, D) and target (N); with return_aux (loss, CrossEntropyAux). It filters nothing."""
    logits = F.linear(input, linear_weight, linear_bias)  # (N, V)
    return cross_entropy_reference(
        logits, target, weight, reduction, ignore_index, label_smoothing, softcap, z_loss, return_aux=return_aux
    )


# --- kernel: chunks of tokens on the CPU ----------------------------------------------------------------------------

# Logits of a chunk: small enough for the last-level cache, enough rows to keep the matrix products efficient.
_CHUNK_BYTES = 64 << 20


def _chunked_cpu(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    row_grad: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    needs: tuple[bool, bool, bool],
    aux: bool,
) -> tuple[Tensor, ...]:
    """Per-token loss (N) in float32 and the gradients asked for by `needs` (input, weight, bias), for the given
    d objective / d loss of each token, then lse, target logits and hits where `aux` asks for them. The C++ twin in
    csrc/linear_cross_entropy.cpp does the same in fewer passes, without the last three."""
    n, d = input.shape
    v = linear_weight.shape[0]
    loss, all_lse, target_logits, correct = empty_rows(target, aux)
    d_input = torch.empty_like(input) if needs[0] else input.new_empty(0)
    d_weight = torch.zeros(v, d) if needs[1] else torch.empty(0)
    d_bias = torch.zeros(v) if needs[2] else torch.empty(0)
    rows = max(16, min(256, _CHUNK_BYTES // (4 * v)))
    buffer = torch.empty(min(rows, n), v)
    matrix = linear_weight.float()
    for begin in range(0, n, rows):
        x = input[begin : begin + rows].float()
        y = target[begin : begin + rows]
        z = buffer[: x.shape[0]]  # (rows, V)
        torch.mm(x, matrix.t(), out=z)
        if linear_bias is not None:
            z += linear_bias
        if softcap > 0.0:
            z.div_(softcap).tanh_().mul_(softcap)
        valid = y != ignore_index
        y = torch.where(valid, y, 0)
        z_target = z.gather(1, y[:, None])[:, 0]
        z_mean = z.mean(1) if label_smoothing > 0.0 else 0.0
        slope = 1 - (z / softcap).square() if softcap > 0.0 and row_grad is not None else None
        if aux:
            target_logits[begin : begin + rows] = torch.where(valid, z_target, 0.0)
            correct[begin : begin + rows] = (z.argmax(1) == y) & valid
        z_max = z.amax(1)
        torch.softmax(z, 1, out=z)
        lse = z_max - z.amax(1).log()
        all_lse[begin : begin + rows] = lse
        token_loss = (1 - label_smoothing) * (lse - z_target) + label_smoothing * (lse - z_mean)
        loss[begin : begin + rows] = torch.where(valid, token_loss + z_loss * lse.square(), 0.0)
        if row_grad is None:
            continue
        up = torch.where(valid, row_grad[begin : begin + rows], 0.0)
        z *= (up * (1 + 2 * z_loss * lse))[:, None]
        if label_smoothing > 0.0:
            z -= (up * (label_smoothing / v))[:, None]
        z.scatter_add_(1, y[:, None], -((1 - label_smoothing) * up)[:, None])
        if slope is not None:
            z *= slope
        if needs[0]:
            d_input[begin : begin + rows] = z @ matrix
        if needs[1]:
            d_weight.addmm_(z.t(), x)
        if needs[2]:
            d_bias += z.sum(0)
    return loss, d_input, d_weight, d_bias, all_lse, target_logits, correct


def _cpu(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    row_grad: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    needs: tuple[bool, bool, bool],
    aux: bool,
) -> tuple[Tensor, ...]:
    check_targets(target, linear_weight.shape[0], ignore_index)
    if aux or extension()[0] is None or softcap > 0.0 or input.dtype not in (torch.float32, torch.bfloat16):
        return _chunked_cpu(
            input,
            linear_weight,
            linear_bias,
            target,
            row_grad,
            ignore_index,
            label_smoothing,
            softcap,
            z_loss,
            needs,
            aux,
        )
    loss, lse, d_input, d_weight, d_bias = torch.ops.wikigpt.linear_cross_entropy_cpu(
        input,
        linear_weight.float(),
        linear_bias,
        target,
        row_grad,
        ignore_index,
        label_smoothing,
        z_loss,
        *needs,
    )
    return loss, d_input, d_weight, d_bias, lse, *empty_rows(target, False)[2:]


# --- registered op: CPU --------------------------------------------------------------------------------------------------


def _row_grad(target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """d objective / d loss of each token for the reductions that fix it."""
    valid = (target != ignore_index).float()
    return valid / valid.sum() if reduction == "mean" else valid


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy", mutates_args=(), device_types="cpu")
def _op(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    upstream: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    aux: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = (needs_input, needs_weight, needs_bias)
    if upstream is not None:
        row_grad = torch.where(target != ignore_index, upstream.float(), 0.0)
    elif reduction != "none" and any(needs):
        row_grad = _row_grad(target, ignore_index, reduction)
    else:
        row_grad, needs = None, (False, False, False)
    loss, d_input, d_weight, d_bias, lse, target_logits, correct = _cpu(
        input,
        linear_weight,
        linear_bias,
        target,
        row_grad,
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
        needs,
        aux,
    )
    loss = reduced(loss, target, None, reduction, ignore_index)
    d_weight, d_bias = d_weight.to(linear_weight.dtype), d_bias.to(linear_weight.dtype)
    return loss, d_input, d_weight, d_bias, lse, target_logits, correct


@_op.register_fake
def _(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    upstream: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    aux: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = upstream is not None or reduction != "none"
    loss = input.new_empty(target.shape if reduction == "none" else (), dtype=torch.float32)
    d_input = input.new_empty(input.shape if needs_input and made else (0,))
    d_weight = linear_weight.new_empty(linear_weight.shape if needs_weight and made else (0,))
    d_bias = linear_weight.new_empty(linear_weight.shape[:1] if needs_bias and made else (0,))
    return loss, d_input, d_weight, d_bias, *empty_rows(target, aux)[1:]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # the types are torch's own
    input, linear_weight, linear_bias, target, _, ctx.reduction, *ctx.options, _, _, _, _ = inputs
    ctx.has_bias = linear_bias is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    if ctx.reduction == "none":
        ctx.save_for_backward(input, linear_weight, target, *([linear_bias] if ctx.has_bias else []))
    else:
        ctx.save_for_backward(*output[1:4])


def _times(grad: Tensor, scale: Tensor) -> Tensor:
    # Almost always the loss is what backward() starts from, and a pass over a gradient of the vocabulary's size is not free.
    if type(scale) is Tensor and scale.device.type == "cpu" and scale.item() == 1.0:
        return grad
    return grad * scale.to(grad.dtype)


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    nothing = (None,) * 10
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    if grad_loss is None:
        return None, None, None, None, *nothing
    if ctx.reduction == "none":
        input, linear_weight, target, *bias = ctx.saved_tensors
        _, d_input, d_weight, d_bias, *_ = _op(
            input,
            linear_weight,
            bias[0] if bias else None,
            target,
            grad_loss,
            "none",
            *ctx.options,
            needs_input,
            needs_weight,
            needs_bias,
            False,
        )
    else:
        d_input, d_weight, d_bias = (
            _times(grad, grad_loss) if needed else grad for grad, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:3])
        )
    return (
        d_input if needs_input else None,
        d_weight if needs_weight else None,
        d_bias if needs_bias and ctx.has_bias else None,
        None,
        *nothing,
    )


_op.register_autograd(_backward, setup_context=_setup_context)


def _fused(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    filter_gradients: bool = False,
    return_aux: bool = False,
) -> Any:
    if weight is not None or input.dtype == torch.float64:
        # Class weights and float64 are for small problems and for tests.
        return linear_cross_entropy_reference(
            input,
            linear_weight,
            target,
            linear_bias,
            weight,
            reduction,
            ignore_index,
            label_smoothing,
            softcap,
            z_loss,
            return_aux=return_aux,
        )
    refuse_forward_mode("linear_cross_entropy", input, linear_weight, linear_bias)
    grad = torch.is_grad_enabled()
    loss, _, _, _, lse, target_logits, correct = _op(
        input,
        linear_weight,
        linear_bias,
        target,
        None,
        reduction,
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
        grad and input.requires_grad,
        grad and linear_weight.requires_grad,
        grad and linear_bias is not None and linear_bias.requires_grad,
        return_aux,
    )
    return (loss, CrossEntropyAux(target_logits, lse, correct)) if return_aux else loss


# --- registered ops: Triton -----------------------------------------------------------------------------------------


# The buffer of logits takes this much, or 1/32 of all logits where that is more: products of enough columns for cuBLAS.
CHUNK_BYTES = 64 << 20
MAX_CHUNKS = 32
# All logits of a problem up to this size are kept for the backward, which then needs no product to make them again.
KEEP_BYTES = 256 << 20


def chunk_width(n: int, vocabulary: int, itemsize: int) -> int:
    """Columns of a chunk: chunks of equal size, a multiple of 128 where there are several."""
    wanted = max(CHUNK_BYTES // (max(n, 1) * itemsize), -(-vocabulary // MAX_CHUNKS))
    if wanted >= vocabulary:
        return vocabulary
    width = -(-vocabulary // -(-vocabulary // wanted))
    return -(-width // 128) * 128


def vocabulary_chunks(n: int, vocabulary: int, itemsize: int) -> Iterator[tuple[int, int, int]]:
    """(number, first column, columns) of each chunk."""
    width = chunk_width(n, vocabulary, itemsize)
    for i, first in enumerate(range(0, vocabulary, width)):
        yield i, first, min(width, vocabulary - first)


def buffers(input: Tensor, vocabulary: int, keep: bool) -> Tensor:
    """Room for one chunk of logits, or all, (chunks, N, columns): rows begin at multiples of 128 bytes, which vector loads and
    cuBLAS want."""
    n, width = input.shape[0], chunk_width(input.shape[0], vocabulary, input.element_size())
    return input.new_empty(-(-vocabulary // width) if keep else 1, n, -(-width // 64) * 64)


def _sweeps() -> Any:
    return importlib.import_module(".linear_cross_entropy_triton", __package__)


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy_forward", mutates_args=())
def _losses(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    aux: bool,
    keep: bool,
    filter_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, target_logits, correct) of each token, and the logits for the backward if it is to keep them.
    Matrix products are in the dtype of input."""
    options = row_kernels().options(ignore_index, label_smoothing, softcap, z_loss, weight)
    rows, logits = _sweeps().losses(input, linear_weight, linear_bias, target.contiguous(), options, keep, aux)
    return rows.loss, rows.lse, rows.target_logits, rows.correct, logits


@_losses.register_fake
def _(input, linear_weight, linear_bias, weight, target, *rest):  # type: ignore[no-untyped-def]
    *_, aux, keep, _ = rest
    return *empty_rows(target, aux), buffers(input, linear_weight.shape[0], True) if keep else input.new_empty(0)


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy_backward", mutates_args=())
def _gradients(
    row_grad: Tensor,
    lse: Tensor,
    logits: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    filter_gradients: bool,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = row_kernels().options(ignore_index, label_smoothing, softcap, z_loss, weight)
    needs = (needs_input, needs_weight, needs_bias)
    d_input, d_weight, d_bias = _sweeps().gradients(
        row_grad, lse, logits, input, linear_weight, linear_bias, target.contiguous(), options, needs, filter_gradients
    )
    return d_input, d_weight, d_bias if linear_bias is None else d_bias.to(linear_bias.dtype)


@_gradients.register_fake
def _(row_grad, lse, logits, input, linear_weight, linear_bias, *rest):  # type: ignore[no-untyped-def]
    *_, needs_input, needs_weight, needs_bias = rest
    bias = lse if linear_bias is None else linear_bias
    return (
        input.new_empty(input.shape if needs_input else 0),
        linear_weight.new_empty(linear_weight.shape) if needs_weight else input.new_empty(0),
        bias.new_empty(linear_weight.shape[0] if needs_bias else 0),
    )


def _setup_triton(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, linear_weight, linear_bias, weight, target, *ctx.options, _, _, ctx.filtering = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1], output[4], input, linear_weight, linear_bias, weight, target)


def _backward_triton(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    nothing = (None,) * 9
    if grad_loss is None:
        return None, None, None, *nothing
    needs = ctx.needs_input_grad[:3]
    grads = _gradients(grad_loss, *ctx.saved_tensors, *ctx.options, ctx.filtering, *needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs)), *nothing


_losses.register_autograd(_backward_triton, setup_context=_setup_triton)


def _no_second_derivative(ctx, *_):  # type: ignore[no-untyped-def]
    raise NotImplementedError("linear_cross_entropy has no second derivative (use backend='reference' for create_graph=True)")


_gradients.register_autograd(_no_second_derivative)


def _compute_dtype(input: Tensor, linear_weight: Tensor) -> torch.dtype:
    """Of the matrix products: autocast's where it is on, as F.linear."""
    if torch.is_autocast_enabled(input.device.type):
        return torch.get_autocast_dtype(input.device.type)
    return torch.promote_types(input.dtype, linear_weight.dtype)


def _triton(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    filter_gradients: bool,
    return_aux: bool,
) -> Any:
    dtype = _compute_dtype(input, linear_weight)
    if torch.float64 in (input.dtype, dtype) or divided_twice(weight, reduction, z_loss):
        return linear_cross_entropy_reference(
            input,
            linear_weight,
            target,
            linear_bias,
            weight,
            reduction,
            ignore_index,
            label_smoothing,
            softcap,
            z_loss,
            return_aux=return_aux,
        )
    if checks_values(input.device.type):
        check_targets(target, linear_weight.shape[0], ignore_index)
    refuse_forward_mode("linear_cross_entropy", input, linear_weight, linear_bias)
    leaves = [tensor for tensor in (input, linear_weight, linear_bias) if tensor is not None]
    grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves)
    input = input.to(dtype)
    keep = grad and input.shape[0] * linear_weight.shape[0] * input.element_size() <= KEEP_BYTES
    loss, lse, target_logits, correct, _ = _losses(
        input,
        linear_weight,
        linear_bias,
        weight,
        target,
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
        return_aux,
        keep,
        filter_gradients,
    )
    loss = reduced(loss, target, weight, reduction, ignore_index)
    return (loss, CrossEntropyAux(target_logits, lse, correct)) if return_aux else loss


register(
    "linear_cross_entropy",
    Implementation("triton", _triton, why_not_triton),
    Implementation("cpu", _fused, only_on("cpu")),
    Implementation("torch", linear_cross_entropy_reference),
    Implementation("reference", linear_cross_entropy_reference),
)

# --- public ---------------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    filter_gradients: bool = False,
    return_aux: bool = False,
    backend: str | None = None,
) -> Any:
    """`cross_entropy(input @ linear_weight.T + linear_bias, target)` without the matrix of logits.

    input (..., D) floating; linear_weight (V, D); target (...) int64 with values 0..V-1 or ignore_index; linear_bias (V);
    weight (V) rescales classes as in `F.cross_entropy`; softcap c > 0 replaces logits z by c tanh(z / c); z_loss adds
    z_loss * logsumexp(z)^2 per token. Returns a float32 (float64 for float64 input) scalar, or one loss per token in the
    shape of target for reduction="none". With every target ignored the mean is NaN, as in PyTorch. return_aux=True returns
    (loss, CrossEntropyAux): target logit, log-sum-exp and whether the prediction is right, per token, from the same pass.

    filter_gradients=True lets the Triton backward skip tiles of the logits' gradient in which nothing reaches 2^-12 of the
    token's (bfloat16; finfo.eps / 32). It biases the gradients of rare words' weights, so it is off by default.

    On a GPU, matrix products are in autocast's dtype where it is on, else in that of input and linear_weight; gradients have
    the dtypes of their tensors, and that of linear_weight is summed in float32. On the CPU, input keeps its dtype under
    autocast and the products are float32, which is as precise and, without a bf16 matrix unit, faster.

    Raises ValueError or TypeError for shapes, dtypes, devices and options that do not fit. A target out of range raises
    IndexError on the CPU and under `debug_checks()`; otherwise its loss and gradients are NaN on a GPU.
    """
    if not input.is_floating_point():
        raise TypeError(f"input: got dtype {input.dtype}, allowed are floating-point dtypes")
    if target.dtype != torch.int64:
        raise TypeError(f"target: got dtype {target.dtype}, allowed is int64")
    if linear_weight.dim() != 2 or input.shape[-1:] != linear_weight.shape[1:]:
        raise ValueError(
            f"linear_weight: got shape {tuple(linear_weight.shape)}, input {tuple(input.shape)} needs (V, {input.shape[-1]})"
        )
    if linear_weight.shape[0] == 0:
        raise ValueError(f"linear_weight: got shape {tuple(linear_weight.shape)}, need a vocabulary of at least 1")
    if target.shape != input.shape[:-1]:
        raise ValueError(f"target: got shape {tuple(target.shape)}, input needs {tuple(input.shape[:-1])}")
    for name, vector in (("linear_bias", linear_bias), ("weight", weight)):
        if vector is not None and vector.shape != linear_weight.shape[:1]:
            raise ValueError(f"{name}: got shape {tuple(vector.shape)}, linear_weight needs ({linear_weight.shape[0]},)")
    check_options(reduction, label_smoothing, softcap, z_loss)
    check_devices(input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight)
    function = choose("linear_cross_entropy", input.device.type, backend)
    result = function(
        # Not -1, which has no answer for D = 0.
        input.reshape(target.numel(), input.shape[-1]),
        linear_weight,
        target.reshape(-1),
        linear_bias,
        weight,
        reduction,
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
        filter_gradients,
        return_aux,
    )
    loss, aux = result if return_aux else (result, None)
    return shaped(loss, aux, target, reduction, return_aux)


__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
