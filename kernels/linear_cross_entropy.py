"""Linear layer + cross-entropy in one op that never holds the (tokens x vocabulary) matrix of logits.

Shapes: N tokens, D features, V vocabulary entries.

With z = input @ weight^T + bias and lse = log sum exp z, the loss of one token with target y is

    (1 - s) * (lse - z_y) + s * (lse - mean z) + z_loss * lse^2          (s: label smoothing, Szegedy et al. 2016;
                                                                          z_loss: PaLM, Chowdhery et al. 2022, section 5)

and its gradient with respect to z is softmax(z) * (1 + 2 * z_loss * lse) - (1 - s) * onehot(y) - s / V. Both need lse
alone, so a chunk of tokens at a time suffices, and the gradients of input, weight and bias are made in the same pass as
the loss, while the chunk is in cache: the backward only multiplies them by the incoming scalar (as in Liger and in
cut-cross-entropy). For reduction="none" the upstream gradients are not known yet, so the backward runs the chunks again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import NAMESPACE, Implementation, choose, extension, only_on, register

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
) -> Tensor:
    logits = F.linear(input, linear_weight, linear_bias)  # (N, V)
    if softcap > 0.0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if z_loss > 0.0:
        valid = target != ignore_index
        penalty = z_loss * logits.logsumexp(-1).square() * valid
        if reduction == "none":
            return loss + penalty
        loss = loss + (penalty.sum() / valid.sum() if reduction == "mean" else penalty.sum())
    return loss


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-token loss (N) in float32 and the gradients asked for by `needs` (input, weight, bias), for the given
    d objective / d loss of each token. The C++ twin in csrc/linear_cross_entropy.cpp does the same in fewer passes."""
    n, d = input.shape
    v = linear_weight.shape[0]
    outside = (target != ignore_index) & ((target < 0) | (target >= v))
    if outside.any():
        i = int(outside.nonzero()[0])
        raise IndexError(
            f"target: token {i} is {int(target[i])}, but the vocabulary has {v} entries "
            f"(allowed: 0 to {v - 1}, or ignore_index {ignore_index})"
        )
    loss = torch.empty(n)
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
        z_max = z.amax(1)
        torch.softmax(z, 1, out=z)
        lse = z_max - z.amax(1).log()
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
    return loss, d_input, d_weight, d_bias


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if extension()[0] is None or softcap > 0.0 or input.dtype not in (torch.float32, torch.bfloat16):
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
        )
    loss, _, d_input, d_weight, d_bias = torch.ops.wikigpt.linear_cross_entropy_cpu(
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
    return loss, d_input, d_weight, d_bias


# --- registered op --------------------------------------------------------------------------------------------------


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = (needs_input, needs_weight, needs_bias)
    if upstream is not None:
        row_grad = torch.where(target != ignore_index, upstream.float(), 0.0)
    elif reduction != "none" and any(needs):
        row_grad = _row_grad(target, ignore_index, reduction)
    else:
        row_grad, needs = None, (False, False, False)
    loss, d_input, d_weight, d_bias = _cpu(
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
    )
    if reduction == "mean":
        loss = loss.sum() / (target != ignore_index).sum()
    elif reduction == "sum":
        loss = loss.sum()
    d_weight, d_bias = d_weight.to(linear_weight.dtype), d_bias.to(linear_weight.dtype)
    return loss, d_input, d_weight, d_bias


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = upstream is not None or reduction != "none"
    loss = input.new_empty(target.shape if reduction == "none" else (), dtype=torch.float32)
    d_input = input.new_empty(input.shape if needs_input and made else (0,))
    d_weight = linear_weight.new_empty(linear_weight.shape if needs_weight and made else (0,))
    d_bias = linear_weight.new_empty(linear_weight.shape[:1] if needs_bias and made else (0,))
    return loss, d_input, d_weight, d_bias


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # the types are torch's own
    input, linear_weight, linear_bias, target, _, ctx.reduction, *ctx.options, _, _, _ = inputs
    ctx.has_bias = linear_bias is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    if ctx.reduction == "none":
        ctx.save_for_backward(input, linear_weight, target, *([linear_bias] if ctx.has_bias else []))
    else:
        ctx.save_for_backward(*output[1:])


def _times(grad: Tensor, scale: Tensor) -> Tensor:
    # Almost always the loss is what backward() starts from, and a pass over a gradient of the vocabulary's size is not free.
    if type(scale) is Tensor and scale.device.type == "cpu" and scale.item() == 1.0:
        return grad
    return grad * scale.to(grad.dtype)


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    nothing = (None,) * 9
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    if grad_loss is None:
        return None, None, None, None, *nothing
    if ctx.reduction == "none":
        input, linear_weight, target, *bias = ctx.saved_tensors
        _, d_input, d_weight, d_bias = torch.ops.wikigpt.linear_cross_entropy(
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
) -> Tensor:
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
        )
    grad = torch.is_grad_enabled()
    return _op(
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
    )[0]


register(
    "linear_cross_entropy",
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
    backend: str | None = None,
) -> Tensor:
    """`cross_entropy(input @ linear_weight.T + linear_bias, target)` without the matrix of logits.

    input (..., D) floating; linear_weight (V, D); target (...) int64 with values 0..V-1 or ignore_index; linear_bias (V);
    weight (V) rescales classes as in `F.cross_entropy`; softcap c > 0 replaces logits z by c tanh(z / c); z_loss adds
    z_loss * logsumexp(z)^2 per token. Returns a float32 (float64 for float64 input) scalar, or one loss per token in the
    shape of target for reduction="none". With every target ignored the mean is NaN, as in PyTorch.

    Under autocast, input keeps its dtype and the CPU op computes the products in float32, which is as precise and, without
    a bf16 matrix unit, faster. Raises ValueError or TypeError for shapes, dtypes and options that do not fit; a target out
    of range raises IndexError on the CPU.
    """
    if not input.is_floating_point():
        raise TypeError(f"input: got dtype {input.dtype}, allowed are floating-point dtypes")
    if target.dtype != torch.int64:
        raise TypeError(f"target: got dtype {target.dtype}, allowed is int64")
    if linear_weight.dim() != 2 or input.shape[-1:] != linear_weight.shape[1:]:
        raise ValueError(
            f"linear_weight: got shape {tuple(linear_weight.shape)}, input {tuple(input.shape)} needs (V, {input.shape[-1]})"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(f"target: got shape {tuple(target.shape)}, input needs {tuple(input.shape[:-1])}")
    for name, vector in (("linear_bias", linear_bias), ("weight", weight)):
        if vector is not None and vector.shape != linear_weight.shape[:1]:
            raise ValueError(f"{name}: got shape {tuple(vector.shape)}, linear_weight needs ({linear_weight.shape[0]},)")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}, allowed are 'mean', 'sum' and 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, must be between 0 and 1")
    for name, number in (("softcap", softcap), ("z_loss", z_loss)):
        if not number >= 0.0:
            raise ValueError(f"{name}: got {number}, must be 0 or more")
    function = choose("linear_cross_entropy", input.device.type, backend)
    loss = function(
        input.reshape(-1, input.shape[-1]),
        linear_weight,
        target.reshape(-1),
        linear_bias,
        weight,
        reduction,
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
    )
    return loss.view(target.shape) if reduction == "none" else loss


__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
