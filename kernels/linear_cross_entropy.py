"""Linear layer + cross-entropy in one op that never holds the (tokens x vocabulary) matrix of logits.

Shapes: N tokens, D features, V vocabulary entries. The loss of the logits z = input @ weight^T + bias is that of
cross_entropy.py. It and its gradient with respect to z,

    row_grad * (softmax(z) * ((1 - s) * w_y + s * mean w + 2 * z_loss * lse) - (1 - s) * w_y * onehot(y) - s / V * w),

need lse and nothing else of the row, so pieces of the logits suffice. row_grad, d objective / d loss of a token, is a number
per token whatever the reduction.

On the CPU pieces are chunks of tokens, and the gradients of input, weight and bias are made in the same pass as the loss,
while the chunk is in cache: the backward only multiplies them by the incoming scalar. Where that is not enough (for
reduction="none", where lse or target logits are differentiated, under torch.func and for a second derivative) the backward
runs the chunks again. On a GPU pieces are chunks of the vocabulary
(linear_cross_entropy_triton.py, imported at first use), the forward leaves lse, and the backward makes the gradients for the
upstream gradients that come: one way for every reduction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import register_autograd, register_vmap
from ._checks import as_int, check_float
from ._dispatch import (
    NAMESPACE,
    Implementation,
    checks_values,
    choose,
    extension,
    imported,
    only_on,
    refuse_forward_mode,
    register,
    why_not_triton,
)
from .cross_entropy import (
    CrossEntropyAux,
    Tensors,
    check_devices,
    check_options,
    check_target_dtype,
    check_targets,
    check_weight,
    computed,
    cross_entropy_reference,
    divided_twice,
    empty_rows,
    finished,
    given_gradients,
    indices,
    of_one_row,
    per_token,
    present,
    reduced,
    second_derivative,
    shaped,
    with_nan_rows,
)
from .cross_entropy import kernels as row_kernels

# --- reference ------------------------------------------------------------------------------------------------------


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """F.linear, of factors of different dtypes too."""
    dtype = compute_dtype(input, linear_weight)
    return F.linear(input.to(dtype), linear_weight.to(dtype), None if linear_bias is None else linear_bias.to(dtype))


def compute_dtype(input: Tensor, linear_weight: Tensor) -> torch.dtype:
    """Of the matrix products: autocast's where it is on, as F.linear."""
    # PyTorch knows no autocast of meta tensors.
    if not input.is_meta and torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return torch.promote_types(input.dtype, linear_weight.dtype)


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
    logits = _logits(input, linear_weight, linear_bias)  # (N, V)
    return cross_entropy_reference(
        logits, target, weight, reduction, ignore_index, label_smoothing, softcap, z_loss, return_aux=return_aux
    )


# --- kernel: chunks of tokens on the CPU ----------------------------------------------------------------------------

# Logits of a chunk, and its tokens: small enough for the last-level cache, enough rows to keep the matrix products efficient.
_CHUNK_BYTES = 64 << 20
_CHUNK_ROWS = {torch.float32: 256, torch.bfloat16: 512}
# Products of what is near or below the smallest normal number are several times slower, and probabilities far apart are mostly
# that.
_LEAST_PROBABILITY = 1e-30


# Whether this CPU has units for products of bf16 matrices, which PyTorch's products then use. Without them products of float32
# are as fast, and more precise.
MULTIPLIES_BF16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _product_dtype(input: Tensor) -> torch.dtype:
    """Of the chunks' matrix products; linear_weight is rounded to it, as by plain PyTorch."""
    return torch.bfloat16 if input.dtype == torch.bfloat16 and MULTIPLIES_BF16 else torch.float32


def _rows_cpu(
    z: Tensor,
    target: Tensor,
    up: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    aux: bool,
    of_lse: Tensor | None,
    of_target: Tensor | None,
) -> tuple[Tensor, ...]:
    """(loss, lse) and with `aux` (target logit, hit) of each row of z, the logits (rows, V) in float32. Where `up` is given,
    d objective / d loss of each row, z becomes d objective / d logits."""
    valid = target != ignore_index
    y = torch.where(valid, target, 0)
    if softcap > 0.0:
        z.div_(softcap).tanh_().mul_(softcap)
    z_target = z.gather(1, y[:, None])[:, 0]
    z_mean = z.mean(1) if label_smoothing > 0.0 else 0.0
    slope = 1 - (z / softcap).square() if softcap > 0.0 and up is not None else None
    of_logits = (torch.where(valid, z_target, 0.0), (z.max(1).indices == y) & valid) if aux else ()
    z_max = z.amax(1)
    torch.softmax(z, 1, out=z)
    lse = z_max - z.amax(1).log()
    loss = (1 - label_smoothing) * (lse - z_target) + label_smoothing * (lse - z_mean) + z_loss * lse.square()
    rows = torch.where(valid, loss, 0.0), lse, *of_logits
    if up is None:
        return rows
    torch.threshold_(z, _LEAST_PROBABILITY, 0.0)
    up = torch.where(valid, up, 0.0)
    of_softmax, at_target = up * (1 + 2 * z_loss * lse), (label_smoothing - 1) * up
    if of_lse is not None and of_target is not None:
        of_softmax = of_softmax + of_lse
        at_target = at_target + torch.where(valid, of_target, 0.0)
    z *= of_softmax[:, None]
    if label_smoothing > 0.0:
        z -= (up * (label_smoothing / z.shape[1]))[:, None]
    z.scatter_add_(1, y[:, None], at_target[:, None])
    if slope is not None:
        z *= slope
    return rows


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
    of_lse: Tensor | None = None,
    of_target: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Per-token loss (N) in float32 and the gradients asked for by `needs` (input, weight, bias), for the given
    d objective / d loss of each token (and, both or none, of its lse and target logit), then lse, and target logits and hits
    where `aux` asks for them. What lies between the products csrc/linear_cross_entropy.cpp does for logits in bf16, and for
    those in float32 also the products, without what is of lse and target logits."""
    n, d = input.shape
    v = linear_weight.shape[0]
    dtype = _product_dtype(input)
    loss, all_lse, target_logits, correct = empty_rows(target, aux)
    d_input = input.new_empty(input.shape if needs[0] else 0, dtype=_held(input.dtype))
    d_weight = torch.zeros(v, d) if needs[1] else torch.empty(0)
    d_bias = torch.zeros(v) if needs[2] else torch.empty(0)
    rows = max(16, min(_CHUNK_ROWS[dtype], _CHUNK_BYTES // (dtype.itemsize * v)))
    buffer = torch.empty(min(rows, n), v, dtype=dtype)
    of_chunk = torch.empty(v, d, dtype=dtype) if needs[1] and dtype != torch.float32 else None
    matrix = linear_weight.to(dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    # An extension of an older version has no such operator.
    built = extension()[0] is not None and hasattr(torch.ops.wikigpt, "cross_entropy_rows_cpu")
    in_csrc = built and dtype == torch.bfloat16 and softcap == 0.0 and not aux and of_lse is None
    for begin in range(0, n, rows):
        chunk = slice(begin, begin + rows)
        x = input[chunk].to(dtype)
        z = buffer[: x.shape[0]]  # (rows, V)
        if bias is None:
            torch.mm(x, matrix.t(), out=z)
        else:
            torch.addmm(bias, x, matrix.t(), out=z)
        up, *of_others = (None if of is None else of[chunk] for of in (row_grad, of_lse, of_target))
        if in_csrc:
            loss[chunk], all_lse[chunk] = torch.ops.wikigpt.cross_entropy_rows_cpu(
                z, target[chunk], up, ignore_index, label_smoothing, z_loss
            )
        else:
            logits = z.float()  # z itself, if it is that already
            found = _rows_cpu(logits, target[chunk], up, ignore_index, label_smoothing, softcap, z_loss, aux, *of_others)
            for all_rows, of_chunk_rows in zip((loss, all_lse, target_logits, correct), found):
                all_rows[chunk] = of_chunk_rows
            if z is not logits and row_grad is not None:
                z.copy_(logits)
        if row_grad is None:
            continue
        if needs[0]:
            d_input[chunk] = z @ matrix
        if of_chunk is not None:
            d_weight += torch.mm(z.t(), x, out=of_chunk)
        elif needs[1]:
            d_weight.addmm_(z.t(), x)
        if needs[2]:
            d_bias += z.sum(0, dtype=torch.float32)
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
    of_lse: Tensor | None = None,
    of_target: Tensor | None = None,
) -> tuple[Tensor, ...]:
    check_targets(target, linear_weight.shape[0], ignore_index)
    if (
        aux
        or of_lse is not None
        or extension()[0] is None
        or softcap > 0.0
        or input.dtype not in (torch.float32, torch.bfloat16)
        or _product_dtype(input) != torch.float32
    ):
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
            of_lse,
            of_target,
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


# --- registered ops: CPU -------------------------------------------------------------------------------------------------


def _held(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient that waits for the loss's own: a loss scale brings what float16 cannot hold yet, or no longer, into it."""
    return torch.float32 if dtype == torch.float16 else dtype


def _row_grad(target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """d objective / d loss of each token for the reductions that fix it."""
    valid = (target != ignore_index).float()
    return valid / valid.sum().clamp(min=1.0) if reduction == "mean" else valid


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy", mutates_args=(), device_types="cpu")
def _op(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
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
    """(loss, gradients of it where they are needed and the reduction fixes them, lse, target logits, hits)."""
    needs = (needs_input, needs_weight, needs_bias)
    row_grad = _row_grad(target, ignore_index, reduction) if any(needs) and reduction != "none" else None
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
        needs if row_grad is not None else (False, False, False),
        aux,
    )
    loss = reduced(loss, target, None, reduction, ignore_index)
    d_bias = d_bias if linear_bias is None else d_bias.to(_held(linear_bias.dtype))
    return loss, d_input, d_weight.to(_held(linear_weight.dtype)), d_bias, lse, target_logits, correct


@_op.register_fake
def _(input, linear_weight, linear_bias, target, reduction, *rest):  # type: ignore[no-untyped-def]
    *_, needs_input, needs_weight, needs_bias, aux = rest
    now = reduction != "none"
    loss, lse, target_logits, correct = empty_rows(target, aux)
    return (
        loss if reduction == "none" else input.new_empty((), dtype=torch.float32),
        input.new_empty(input.shape if needs_input and now else 0, dtype=_held(input.dtype)),
        input.new_empty(linear_weight.shape if needs_weight and now else 0, dtype=_held(linear_weight.dtype)),
        input.new_empty(
            linear_weight.shape[0] if needs_bias and now else 0,
            dtype=torch.float32 if linear_bias is None else _held(linear_bias.dtype),
        ),
        lse,
        target_logits,
        correct,
    )


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy_cpu_backward", mutates_args=(), device_types="cpu")
def _cpu_gradients_op(
    row_grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    of_lse: Tensor | None = None,
    of_target: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, linear_weight and linear_bias, given those of each token's loss, lse and target logit."""
    needs = (needs_input, needs_weight, needs_bias)
    _, d_input, d_weight, d_bias, *_ = _cpu(
        input,
        linear_weight,
        linear_bias,
        target,
        torch.where(target != ignore_index, row_grad.float(), 0.0),
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
        needs,
        False,
        of_lse,
        of_target,
    )
    d_bias = d_bias if linear_bias is None else d_bias.to(linear_bias.dtype)
    return d_input.to(input.dtype), d_weight.to(linear_weight.dtype), d_bias


@_cpu_gradients_op.register_fake
def _(row_grad, input, linear_weight, linear_bias, *rest):  # type: ignore[no-untyped-def]
    needs_input, needs_weight, needs_bias = rest[5:8]
    bias = row_grad.float() if linear_bias is None else linear_bias
    return (
        input.new_empty(input.shape if needs_input else 0),
        linear_weight.new_empty(linear_weight.shape if needs_weight else 0),
        bias.new_empty(linear_weight.shape[0] if needs_bias else 0),
    )


def _again(leaves: Tensors, upstream: Tensors, grads: Tensors, target: Tensor, weight: Tensor | None, *options: Any) -> Any:
    """Gradients of a backward: of its upstream gradients and of input, linear_weight and linear_bias."""

    every: Any = *options, False, True

    def losses(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None = None) -> Tensors:
        # In float32: in 16 bits the first derivative inside would be rounded.
        input, linear_weight = input.float(), linear_weight.float()
        bias = None if linear_bias is None else linear_bias.float()
        return per_token(linear_cross_entropy_reference(input, linear_weight, target, bias, weight, "none", *every))

    return second_derivative(losses, upstream, leaves, grads)


def _setup_gradients(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # the types are torch's own
    row_grad, input, linear_weight, linear_bias, target, *rest, of_lse, of_target = inputs
    ctx.options, ctx.needs = rest[:4], rest[4:]
    ctx.save_for_backward(row_grad, of_lse, of_target, input, linear_weight, linear_bias, target)


def _gradients_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    row_grad, of_lse, of_target, input, linear_weight, linear_bias, target = ctx.saved_tensors
    leaves = present(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    upstream = present(loss=row_grad, lse=of_lse, target_logits=of_target)
    given = {
        name: grad if need else torch.zeros_like(leaf) for (name, leaf), grad, need in zip(leaves.items(), grads, ctx.needs)
    }
    up, of = _again(leaves, upstream, given, target, None, *ctx.options)
    return up["loss"], *(of.get(name) for name in _LEAVES), *(None,) * 8, up.get("lse"), up.get("target_logits")


_LEAVES = ("input", "linear_weight", "linear_bias")
_cpu_gradients = register_autograd(_cpu_gradients_op, _gradients_backward, _setup_gradients)
register_vmap(_cpu_gradients_op)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, linear_weight, linear_bias, target, ctx.reduction, *ctx.options, _, _, _, _ = inputs
    ctx.made = tuple(need and ctx.reduction != "none" for need in inputs[-4:-1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:4], *(output[6:] if inputs[-1] else output[4:]))
    ctx.save_for_backward(*output[1:4], input, linear_weight, linear_bias, target)


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient that was made in the forward, times that of the loss. While the graph lives on, what is saved is never
    handed out, because whoever gets it may change it."""
    # Almost always the loss is what backward() starts from, and a pass over a gradient of the vocabulary's size is not free.
    functorch = torch._C._functorch
    batched = functorch.is_functorch_wrapped_tensor(scale) or functorch.is_legacy_batchedtensor(scale)  # of is_grads_batched
    if type(scale) is Tensor and scale.device.type == "cpu" and not batched and scale.item() == 1.0:
        return grad.to(dtype, copy=torch._C._autograd._get_current_graph_task_keep_graph())
    return (grad * scale).to(dtype)


def _backward(ctx, grad_loss, *of_others):  # type: ignore[no-untyped-def]
    nothing = (None,) * 10
    of_lse, of_target = of_others[3:5]
    if grad_loss is None and of_lse is None and of_target is None:
        return None, None, None, *nothing
    *held, input, linear_weight, linear_bias, target = ctx.saved_tensors
    leaves, needs = (input, linear_weight, linear_bias), ctx.needs_input_grad[:3]
    ready = all(made or not need for made, need in zip(ctx.made, needs)) and of_lse is None and of_target is None
    if ready and not torch.is_grad_enabled():  # grad mode is on where the gradient itself will be differentiated
        grads = [_scaled(grad, grad_loss, x.dtype) if need else None for grad, x, need in zip(held, leaves, needs)]
        return *grads, *nothing
    if ctx.reduction != "none" and grad_loss is not None:
        grad_loss = grad_loss * _row_grad(target, ctx.options[0], ctx.reduction)
    per_token = target.new_empty(target.shape, dtype=torch.float32)
    grad_loss, of_lse, of_target = given_gradients(per_token, grad_loss, of_lse, of_target)
    grads = _cpu_gradients(grad_loss, *leaves, target, *ctx.options, *needs, of_lse, of_target)
    return *(grad if need else None for grad, need in zip(grads, needs)), *nothing


_loss = register_autograd(_op, _backward, _setup_context)
register_vmap(_op)


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
    if weight is not None or torch.float64 in (input.dtype, linear_weight.dtype):
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
    if torch.bfloat16 in (input.dtype, dtype := compute_dtype(input, linear_weight)) and MULTIPLIES_BF16:
        input = input.to(dtype)  # says in what dtype the products are, to the backward too
    # Under torch.func the backward is asked for a gradient that can be differentiated, which is made there.
    ahead = torch.is_grad_enabled() and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
    loss, _, _, _, lse, target_logits, correct = _loss(
        input,
        linear_weight,
        linear_bias,
        target,
        reduction,
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
        ahead and input.requires_grad,
        ahead and linear_weight.requires_grad,
        ahead and linear_bias is not None and linear_bias.requires_grad,
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
    return imported(".linear_cross_entropy_triton", __package__)


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy_forward", mutates_args=())
def _losses_op(
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


@_losses_op.register_fake
def _(input, linear_weight, linear_bias, weight, target, *rest):  # type: ignore[no-untyped-def]
    *_, aux, keep, _ = rest
    return *empty_rows(target, aux), buffers(input, linear_weight.shape[0], True) if keep else input.new_empty(0)


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy_backward", mutates_args=())
def _gradients_op(
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
    of_lse: Tensor | None = None,
    of_target: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = row_kernels().options(ignore_index, label_smoothing, softcap, z_loss, weight)
    needs = (needs_input, needs_weight, needs_bias)
    d_input, d_weight, d_bias = _sweeps().gradients(
        row_grad, lse, logits, input, linear_weight, linear_bias, target.contiguous(), options, needs, filter_gradients,
        of_lse, of_target,
    )  # fmt: skip
    return d_input, d_weight, d_bias if linear_bias is None else d_bias.to(linear_bias.dtype)


@_gradients_op.register_fake
def _(row_grad, lse, logits, input, linear_weight, linear_bias, *rest):  # type: ignore[no-untyped-def]
    needs_input, needs_weight, needs_bias = rest[7:10]
    bias = lse if linear_bias is None else linear_bias
    return (
        input.new_empty(input.shape if needs_input else 0),
        linear_weight.new_empty(linear_weight.shape) if needs_weight else input.new_empty(0),
        bias.new_empty(linear_weight.shape[0] if needs_bias else 0),
    )


def _setup_triton_gradients(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    row_grad, _, _, *tensors = inputs[:8]
    _, *ctx.needs, of_lse, of_target = inputs[12:]
    ctx.options = inputs[8:12]
    ctx.save_for_backward(row_grad, of_lse, of_target, *tensors)


def _triton_gradients_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    row_grad, of_lse, of_target, input, linear_weight, linear_bias, weight, target = ctx.saved_tensors
    leaves = present(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    upstream = present(loss=row_grad, lse=of_lse, target_logits=of_target)
    given = {
        name: grad if need else torch.zeros_like(leaf) for (name, leaf), grad, need in zip(leaves.items(), grads, ctx.needs)
    }
    up, of = _again(leaves, upstream, given, target, weight, *ctx.options)
    # What it says of lse and of the logits that are kept is in the gradients of what they are made of.
    return up["loss"], None, None, *(of.get(name) for name in _LEAVES), *(None,) * 10, up.get("lse"), up.get("target_logits")


_gradients = register_autograd(_gradients_op, _triton_gradients_backward, _setup_triton_gradients)
register_vmap(_gradients_op)


def _setup_triton(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, linear_weight, linear_bias, weight, target, *ctx.options, _, _, ctx.filtering = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(output[3:] if inputs[9] else output[1:]))
    ctx.save_for_backward(output[1], output[4], input, linear_weight, linear_bias, weight, target)


def _backward_triton(ctx, grad_loss, *of_aux):  # type: ignore[no-untyped-def]
    nothing = (None,) * 9
    of_lse, of_target = of_aux[:2]
    if grad_loss is None and of_lse is None and of_target is None:
        return None, None, None, *nothing
    lse, *saved = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grad_loss, of_lse, of_target = given_gradients(lse, grad_loss, of_lse, of_target)
    grads = _gradients(grad_loss, lse, *saved, *ctx.options, ctx.filtering, *needs, of_lse, of_target)
    return *(grad if needed else None for grad, needed in zip(grads, needs)), *nothing


_losses = register_autograd(_losses_op, _backward_triton, _setup_triton)
register_vmap(_losses_op)


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
    dtype = compute_dtype(input, linear_weight)
    if torch.float64 in (input.dtype, dtype):
        input, target = with_nan_rows(input, target, linear_weight.shape[0], ignore_index)
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
    apart = divided_twice(weight, reduction, z_loss)
    loss, lse, target_logits, correct, _ = _losses(
        input,
        linear_weight,
        linear_bias,
        weight,
        target,
        ignore_index,
        label_smoothing,
        softcap,
        0.0 if apart else z_loss,
        return_aux or apart,
        keep,
        filter_gradients,
    )
    aux = CrossEntropyAux(target_logits, lse, correct)
    loss = finished(loss, aux, target, weight, reduction, ignore_index, z_loss if apart else 0.0)
    return (loss, aux) if return_aux else loss


register(
    "linear_cross_entropy",
    Implementation("triton", _triton, why_not_triton),
    Implementation("cpu", _fused, only_on("cpu")),
    Implementation("torch", linear_cross_entropy_reference),
    Implementation("reference", linear_cross_entropy_reference),
)

# --- public ---------------------------------------------------------------------------------------------------------


def _packed(matrix: Tensor) -> Tensor:
    """Without room between its rows: there, on processors with AMX, PyTorch's products of 16-bit numbers let NaN in."""
    if matrix.element_size() != 2 or matrix.is_contiguous() or matrix.device.type != "cpu" or matrix.t().is_contiguous():
        return matrix
    return matrix.contiguous()


def _by_pytorch(
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
    return_aux: bool,
) -> Any:
    """What PyTorch's linear_cross_entropy takes besides: weights (V, d1, ..., D), which make logits (N, V, d1, ...), and class
    probabilities. It makes the logits."""
    if input.dim() != 2 and (input.dim() != 1 or linear_weight.dim() > 2):
        wanted = "(N, D)" if linear_weight.dim() > 2 else "(D) or (N, D)"
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, need {wanted} with linear_weight {tuple(linear_weight.shape)} and "
            f"target {tuple(target.shape)} of {target.dtype}"
        )
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = _logits(_packed(input), _packed(linear_weight.flatten(0, -2)), bias)
    logits = logits.view(*input.shape[:-1], *linear_weight.shape[:-1])  # (N, V, d1, ...)
    classes = min(logits.dim() - 1, 1)
    expected = logits.shape if target.is_floating_point() else logits.shape[:classes] + logits.shape[classes + 1 :]
    if target.shape != expected:
        raise ValueError(f"target: got shape {tuple(target.shape)} of {target.dtype}, need {tuple(expected)}")
    return computed(
        cross_entropy_reference,
        logits,
        target,
        classes,
        weight,
        reduction,
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
        False,
        return_aux,
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    filter_gradients: bool = False,
    return_aux: bool = False,
    backend: str | None = None,
) -> Any:
    """`cross_entropy(input @ linear_weight.T + linear_bias, target)` without the matrix of logits.

    input (..., D) floating; linear_weight (V, D); target (...) int64 or uint8 with values 0..V-1 or ignore_index (None:
    -100); linear_bias (V); weight (V) rescales classes as in `F.cross_entropy`; softcap c > 0 replaces logits z by
    c tanh(z / c); z_loss adds z_loss * logsumexp(z)^2 per token. Returns a float32 (float64 for float64 input) scalar, or one
    loss per token in the shape of target for reduction="none". With every target ignored the mean is NaN and its gradient 0,
    as in PyTorch. return_aux=True returns (loss, CrossEntropyAux): target logit and log-sum-exp, which have gradients, and
    whether the prediction is right, per token, from the same pass.

    What else `torch.nn.functional.linear_cross_entropy` takes, it takes, and makes the logits for it: linear_weight
    (V, d1, ..., D) and linear_bias (V, d1, ...) with input (N, D) and target (N, d1, ...), and class probabilities, a floating
    target of the shape of the logits, for input (D) or (N, D). `options`, how PyTorch is to cut chunks, has no effect here.

    filter_gradients=True lets the Triton backward skip tiles of the logits' gradient in which nothing reaches 2^-12 of the
    token's (bfloat16; finfo.eps / 32). It biases the gradients of rare words' weights, so it is off by default.

    On a GPU, matrix products are in autocast's dtype where it is on, else in that of input and linear_weight; gradients have
    the dtypes of their tensors, and that of linear_weight is summed in float32. On the CPU that holds for bf16 where the
    processor multiplies matrices of it (AMX, AVX512-BF16); elsewhere, and for float16, the products are float32, which is more
    precise and faster there.

    Raises ValueError or TypeError for shapes, dtypes, devices and options that do not fit. A target out of range raises
    IndexError on the CPU and under `debug_checks()`; otherwise its loss and gradients are NaN on a GPU.
    """
    check_devices(input, {"linear_weight": linear_weight, "target": target}, {"linear_bias": linear_bias, "weight": weight})
    if ignore_index is not None and target.is_floating_point():
        raise ValueError(f"ignore_index: got {ignore_index}, but class probabilities (a floating target) ignore nothing")
    ignore_index = -100 if ignore_index is None else as_int("ignore_index", ignore_index)
    for name, matrix in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if matrix is not None:
            check_float(name, matrix)
    if input.dim() == 0:
        raise ValueError("input: got a scalar, need (..., D)")
    target = of_one_row(linear_weight.shape[:1] if input.dim() == 1 else (), target)
    plain = linear_weight.dim() == 2 and target.shape == input.shape[:-1]
    if target.is_floating_point() and plain:
        raise TypeError(f"target: got dtype {target.dtype}, class indices in this shape are int64 or uint8")
    if target.dtype != torch.int64:
        check_target_dtype(target, ignore_index, return_aux)
    if linear_weight.dim() < 2 or input.shape[-1:] != linear_weight.shape[-1:]:
        raise ValueError(
            f"linear_weight: got shape {tuple(linear_weight.shape)}, input {tuple(input.shape)} needs (V, {input.shape[-1]})"
        )
    if 0 in linear_weight.shape[:-1]:
        raise ValueError(f"linear_weight: got shape {tuple(linear_weight.shape)}, need a vocabulary of at least 1")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        wanted = tuple(linear_weight.shape[:-1])
        raise ValueError(f"linear_bias: got shape {tuple(linear_bias.shape)}, linear_weight needs {wanted}")
    if weight is not None:
        check_weight(weight, linear_weight.shape[0], target)
    label_smoothing, softcap, z_loss = check_options(reduction, label_smoothing, softcap, z_loss)
    function = choose("linear_cross_entropy", input.device.type, backend)
    if target.is_floating_point() or linear_weight.dim() > 2:
        return _by_pytorch(
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
            return_aux,
        )
    if not plain:
        raise ValueError(f"target: got shape {tuple(target.shape)}, input needs {tuple(input.shape[:-1])}")
    token_targets = indices(target)
    if function is linear_cross_entropy_reference and checks_values(input.device.type):
        check_targets(token_targets, linear_weight.shape[0], ignore_index)  # PyTorch's error names no argument
    result = function(
        # Not -1, which has no answer for D = 0.
        _packed(input.reshape(target.numel(), input.shape[-1])),
        _packed(linear_weight),
        token_targets,
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
    return shaped(result, target.shape, reduction, return_aux)


__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
