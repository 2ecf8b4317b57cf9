"""Adam and AdamW in one pass over all parameters: clipping, decay, moments, averaging, rounding, zeroing.

Adam (Kingma & Ba 2015, algorithm 1) and AdamW (Loshchilov & Hutter 2019, algorithm 2, in torch's parametrisation, where the
decay is multiplied by lr). AMSGrad as torch has it. Clipping by the global norm (Pascanu et al. 2013) with the coefficient of
torch.nn.utils.clip_grad_norm_. csrc/optimizer.h has the formulas, the reference below says the same in plain PyTorch.

    grad_norm  one number on the device: the norm of all gradients, added up in a fixed order
    adamw      reads every gradient, parameter and moment once and writes parameters and moments once

Ours are in csrc/; optimizer_triton.py stands in where that is not built for the GPU, PyTorch's operators where nothing else is.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._checks import check_writable
from ._dispatch import (
    Implementation,
    choose,
    extension_fake,
    imported,
    in_extension,
    only_on,
    register,
    why_not_triton,
)
from ._philox import MASK, philox

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)


class Update(NamedTuple):
    """The arguments of torch.ops.wikigpt.adamw_: one step of N parameters of one dtype.

    params, grads            N tensors of any dense layout, which all lists below share
    exp_avgs, exp_avg_sqs    N, dtype of params; or float32 beside 16-bit params
    max_exp_avg_sqs          N, dtype of exp_avgs (amsgrad); or none
    masters                  N, float32 copies of 16-bit params, which the step then rounds into params; or none
    emas                     N, moving averages of params, float32 (float64 of float64 params); or none
    steps                    N float32 tensors of one element: the steps done, counted up here
    lrs                      a tensor of one element for each group, on the device of params, in place of lr in hyper; or none
    norm                     of all gradients, divided by grad_scale; clipped to max_norm. None: no clipping
    grad_scale, found_inf    float32, one element: gradients are divided by the one, and left so in grads (not clipped);
                             where the other is not 0 nothing changes
    ticket                   int32, one element, 0 before and after; on a GPU alone
    hyper                    (lr, beta1, beta2, eps, weight_decay, maximize) of each group, one after the other
    counts                   parameters of each group; they stand in the order of the groups
    indices                  N different numbers, from which stochastic rounding draws
    decoupled                AdamW; False: Adam, weight_decay is added to the gradient
    zero_grad                gradients become 0, even where found_inf says that nothing else changes
    stochastic               bfloat16 params and moments are rounded stochastically
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    masters: list[Tensor]
    emas: list[Tensor]
    steps: list[Tensor]
    lrs: list[Tensor]
    norm: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    ticket: Tensor | None
    hyper: list[float]
    counts: list[int]
    indices: list[int]
    max_norm: float = math.inf
    ema_decay: float = 0.0
    decoupled: bool = True
    zero_grad: bool = False
    stochastic: bool = False
    seed: int = 0

    def groups(self) -> Iterator[tuple[slice, Any, list[float]]]:
        """(its parameters, lr, (beta1, beta2, eps, weight_decay, maximize)) of each group."""
        begin = 0
        for i, count in enumerate(self.counts):
            lr, *rest = self.hyper[6 * i : 6 * i + 6]
            yield slice(begin, begin + count), self.lrs[i] if self.lrs else lr, rest
            begin += count

    def factor(self) -> Tensor | None:
        """What gradients are multiplied by, on the device, in float64 where that has it; None: nothing."""
        factor: Any = None
        if self.norm is not None:
            factor = (self.max_norm / (self.norm.to(_sum_dtype(self.norm.device)) + 1e-6)).clamp(max=1.0)
        if self.grad_scale is not None:
            factor = (1 if factor is None else factor) / self.grad_scale.to(_sum_dtype(self.grad_scale.device))
        return factor


def _check_alike(u: Update) -> None:
    """ValueError where tensors of one parameter have several shapes, or those of a list several dtypes, which kernels would
    take for memory that is there. The operators of csrc/ look for themselves."""
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "emas"):
        tensors = getattr(u, name)
        dtype = u.params[0].dtype if name == "grads" else tensors[0].dtype if tensors else None
        for i, (tensor, p) in enumerate(zip(tensors, u.params)):
            if tensor.shape != p.shape or tensor.dtype is not dtype:
                raise ValueError(
                    f"params: number {u.indices[i]} is of shape {tuple(p.shape)}, in {name} it has {tuple(tensor.shape)}, "
                    f"{tensor.dtype}; allowed are that shape and {dtype}"
                )


# --- reference ------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def random_bits(seed: int, step: int | Tensor, index: int, stream: int, count: int, device: torch.device) -> Tensor:
    """16 random bits for each of `count` elements, int64: Philox4x32-7 (Salmon et al. 2011).

    Key (seed, step), counter (i // 8, 0, index, stream): element i takes half i % 2 (low first) of word i % 8 // 2. `step` may
    be an int64 tensor of one element, which stays on its device.
    """
    block = torch.arange((count + 7) // 8, device=device)
    counter = (block & MASK, block >> 32, torch.full_like(block, index), torch.full_like(block, stream))
    words = torch.stack(philox(7, counter, seed & MASK, step & MASK), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten()[:count]


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16: up or down with probabilities that make the result right on average. bits: 0 .. 65535 for each
    element in the order of memory. What is not finite stays."""
    flat = x.as_strided((x.numel(),), (1,))
    up = (flat.view(torch.int32).long() + bits >> 16 << 16).int().view(torch.float32)
    rounded = torch.empty_like(x, dtype=torch.bfloat16)
    rounded.as_strided((x.numel(),), (1,)).copy_(torch.where(flat.isfinite(), up, flat))
    return rounded


def grad_norm_reference(grads: Sequence[Tensor], grad_scale: Tensor | None = None, ticket: Tensor | None = None) -> Tensor:
    """The norm of all gradients as one vector, divided by grad_scale; float32, or float64 where a gradient is."""
    total = torch.stack([grad.to(_sum_dtype(grad.device)).square().sum() for grad in grads]).sum().sqrt()
    return (total if grad_scale is None else total / grad_scale).to(_norm_dtype(grads))


def _sum_dtype(device: torch.device) -> torch.dtype:
    """Of sums of squares, which leave float32 where a gradient is above 1.8e19: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _norm_dtype(grads: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32


def adamw_reference(u: Update) -> None:
    _check_alike(u)
    factor = u.factor()
    if u.found_inf is None or not u.found_inf:
        for part, lr, hyper in u.groups():
            for i in range(part.start, part.stop):
                _adamw_of_one(u, i, factor, lr, *hyper)
        if u.grad_scale is not None:
            for grad in u.grads:
                grad.copy_(_wide(grad) / u.grad_scale)
    if u.zero_grad:
        for grad in u.grads:
            grad.zero_()


def _adamw_of_one(
    u: Update, i: int, factor: Tensor | None, lr: Any, beta1: float, beta2: float, eps: float, decay: float, maximize: float
) -> None:
    u.steps[i].add_(1)
    step = int(u.steps[i])
    w = u.masters[i] if u.masters else _wide(u.params[i])
    g = _wide(u.grads[i])
    # A number times a number, of no dimension both, would have the dtype of the wider.
    g = g if factor is None else (g * factor).to(g.dtype)
    g = -g if maximize else g
    if decay and not u.decoupled:
        g = g + decay * w
    m = beta1 * _wide(u.exp_avgs[i]) + (1 - beta1) * g
    v = beta2 * _wide(u.exp_avg_sqs[i]) + (1 - beta2) * g * g  # in this order: g * g alone leaves float32 above 1.8e19
    largest = torch.maximum(_wide(u.max_exp_avg_sqs[i]), v) if u.max_exp_avg_sqs else v
    change = lr / (1 - beta1**step) * (m / (largest.sqrt() / math.sqrt(1 - beta2**step) + eps))
    if decay and u.decoupled:
        change = change + lr * decay * w.where(w.isfinite(), 0)  # a parameter of -inf stays one, as in torch
    w = w - change.to(w.dtype)

    def store(to: Tensor, value: Tensor, stream: int) -> None:
        if u.stochastic:
            bits = random_bits(u.seed, step, u.indices[i], stream, value.numel(), value.device)
            value = round_stochastically(value, bits)
        to.copy_(value)

    store(u.exp_avgs[i], m, 1)
    store(u.exp_avg_sqs[i], v, 2)
    if u.max_exp_avg_sqs:  # the larger of two stored numbers needs no rounding of its own
        u.max_exp_avg_sqs[i].copy_(torch.maximum(u.max_exp_avg_sqs[i], u.exp_avg_sqs[i]))
    store(u.params[i], w, 0)
    if u.masters:
        u.masters[i].copy_(w)
    if u.emas:
        u.emas[i].lerp_(w if u.masters else u.params[i].to(u.emas[i].dtype), 1 - u.ema_decay)


# --- PyTorch's own --------------------------------------------------------------------------------------------------


def _grad_norm_torch(grads: Sequence[Tensor], grad_scale: Tensor | None = None, ticket: Tensor | None = None) -> Tensor:
    def norm(dtype: torch.dtype) -> Tensor:
        norms = torch.stack(torch._foreach_norm(list(grads), 2, dtype))
        return torch.linalg.vector_norm(norms, dtype=_sum_dtype(norms.device))

    if grads[0].device.type == "cpu":
        total = norm(_norm_dtype(grads))
        if not total.isfinite():  # float64 takes ten times as long here, and costs a GPU nothing
            total = norm(torch.float64)
    else:
        total = norm(_sum_dtype(grads[0].device))
    return (total if grad_scale is None else total / grad_scale).to(_norm_dtype(grads))


def _adamw_torch(u: Update) -> None:
    """torch._fused_adamw_ and _fused_adam_ on the CPU, torch._foreach operators elsewhere, with other passes around them."""
    _check_alike(u)
    if u.params[0].device.type == "cpu":
        unscaled = _step_fused(u)
    else:
        _step_foreach(u)
        unscaled = False
    for ema, w in zip(u.emas, u.masters or u.params):
        weight: Any = 1 - u.ema_decay
        if u.found_inf is not None:
            weight = (u.found_inf == 0).to(ema.dtype) * weight  # a bool times a number would be of the default dtype
        ema.lerp_(w.to(ema.dtype), weight)
    if u.zero_grad:
        torch._foreach_zero_(u.grads)
    elif u.grad_scale is not None and not unscaled:
        divisor = u.grad_scale if u.found_inf is None else u.grad_scale.where(u.found_inf == 0, 1)
        torch._foreach_div_(u.grads, divisor)


def _step_fused(u: Update) -> bool:
    """Whether the gradients have been divided by grad_scale on the way."""
    widened = bool(u.masters) or u.stochastic
    # These operators leave what they have divided by `scale` in the gradients. A copy is for what is clipped or wide there.
    grads, scale = u.grads, u.grad_scale
    if u.norm is not None:
        factor: Any = u.factor()
        if not widened and grads[0].dtype in (torch.float64, torch.float16):  # 1 / factor may leave float32, or float16
            scale = None
        else:
            grads = [grad.float() for grad in grads] if widened else grads
            # 1 / factor leaves float32 where it is below 2^-126. A power of two rounds nothing.
            first = torch.where(factor < 2.0**-100, torch.full_like(factor, 2.0**-64), torch.ones_like(factor))
            factor, scale = first, (first / factor).float()
        # A number times a number, of no dimension both, would have the dtype of the wider.
        grads = [product.to(grad.dtype) for product, grad in zip(torch._foreach_mul(grads, factor), grads)]
    lists = [u.masters or u.params, grads, u.exp_avgs, u.exp_avg_sqs, u.max_exp_avg_sqs]
    if widened:
        lists = [[tensor.float() for tensor in tensors] for tensors in lists]  # masters stay themselves
    torch._foreach_add_(u.steps, 1)
    for part, lr, (beta1, beta2, eps, decay, maximize) in u.groups():
        if part.start == part.stop:
            continue
        function: Any = torch._fused_adamw_ if u.decoupled else torch._fused_adam_
        function(
            *(tensors[part] for tensors in lists), u.steps[part], lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps,
            amsgrad=bool(u.max_exp_avg_sqs), maximize=bool(maximize), grad_scale=scale, found_inf=u.found_inf,
        )  # fmt: skip
    if u.found_inf is not None:
        torch._foreach_sub_(u.steps, [u.found_inf] * len(u.steps))
    if u.stochastic:
        changed = None if u.found_inf is None else u.found_inf == 0
        _store_stochastically(u, lists[0], lists[2], lists[3], changed)
    elif u.masters:
        torch._foreach_copy_(u.params, u.masters)
    return lists[1] is u.grads


TOGETHER = 64  # parameters of one call of the torch._foreach operators: copies and temporaries are of these alone


def _step_foreach(u: Update) -> None:
    """What adamw_reference says, up to the moving averages, without waiting for the device.

    torch._fused_adamw_ would be one pass instead of nine, but on a GPU (torch 2.11) it squares gradients before it multiplies
    by 1 - beta2: NaN above 1.8e19. It has that number in float32 as well.
    """
    factor = u.factor()
    lists = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "steps", "indices")
    for part, lr, hyper in u.groups():
        for begin in range(part.start, part.stop, TOGETHER):
            some = slice(begin, min(begin + TOGETHER, part.stop))
            _foreach_of_some(u._replace(**{name: getattr(u, name)[some] for name in lists}), factor, lr, *hyper)


def _foreach_of_some(
    u: Update, factor: Tensor | None, lr: Any, beta1: float, beta2: float, eps: float, decay: float, maximize: float
) -> None:
    stored = (u.params, u.exp_avgs, u.exp_avg_sqs, u.max_exp_avg_sqs)
    written = [*itertools.chain(*stored, u.masters, u.steps)]
    before = [] if u.found_inf is None else [tensor.clone() for tensor in written]
    torch._foreach_add_(u.steps, 1)

    g: Any = _widened(u.grads)
    w, m, v, largest = wide = (u.masters or _widened(u.params), *map(_widened, stored[1:]))
    dtype = g[0].dtype
    if factor is not None:
        g = torch._foreach_mul(g, factor.to(dtype))
    if maximize:
        g = torch._foreach_neg(g)
    if decay and not u.decoupled:
        g = torch._foreach_add(g, w, alpha=decay)
    torch._foreach_mul_(m, beta1)
    torch._foreach_add_(m, g, alpha=1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, torch._foreach_mul(g, 1 - beta2), g)
    if largest:
        torch._foreach_maximum_(largest, v)

    lr, _, step_size, root = _rates(u.steps, lr, beta1, beta2)
    change = torch._foreach_sqrt(largest or v)
    torch._foreach_mul_(change, list(root.to(dtype).unbind()))
    torch._foreach_add_(change, eps)
    change = torch._foreach_div(m, change)
    if decay and u.decoupled:
        kept = 1 - lr * decay
        torch._foreach_mul_(w, kept.to(dtype) if isinstance(kept, Tensor) else kept)
    torch._foreach_addcmul_(w, change, list(step_size.neg().to(dtype).unbind()))

    if u.stochastic:
        _store_stochastically(u, w, m, v)
    else:
        for to, values in zip(stored, wide):
            if to is not values and to:
                torch._foreach_copy_(to, values)
    if u.found_inf is not None:
        for tensor, old in zip(written, before):
            torch.where(u.found_inf == 0, tensor, old, out=tensor)


def _widened(tensors: list[Tensor]) -> list[Tensor]:
    """float32 copies of 16-bit tensors, others as they are."""
    if not tensors or tensors[0].dtype not in NARROW:
        return tensors
    wide = [torch.empty_like(tensor, dtype=torch.float32) for tensor in tensors]
    torch._foreach_copy_(wide, tensors)
    return wide


def _rates(steps: list[Tensor], lr: Any, beta1: float, beta2: float) -> tuple[Any, Tensor, Tensor, Tensor]:
    """lr, and t, lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) of each parameter: it has done its own number t of steps, which
    only the device knows."""
    t = torch.stack([step.reshape(()) for step in steps])
    t = t.to(_sum_dtype(t.device))
    if isinstance(lr, Tensor):
        lr = lr.to(t).reshape(())

    def correction(beta: float) -> Tensor:  # keeps its digits in float32 too
        return -torch.special.expm1(t * (math.log(beta) if beta else -math.inf))

    return lr, t, lr / correction(beta1), correction(beta2).rsqrt()


def _store_stochastically(u: Update, w: list[Tensor], m: list[Tensor], v: list[Tensor], changed: Tensor | None = None) -> None:
    """changed: one bool on the device; where it is False nothing is stored."""
    for stream, stored, values in ((0, u.params, w), (1, u.exp_avgs, m), (2, u.exp_avg_sqs, v)):
        for to, value, step, index in zip(stored, values, u.steps, u.indices):
            bits = random_bits(u.seed, step.long().reshape(()), index, stream, value.numel(), value.device)
            rounded = round_stochastically(value, bits)
            to.copy_(rounded if changed is None else torch.where(changed, rounded, to))
    for to, value in zip(u.max_exp_avg_sqs, u.exp_avg_sqs):
        to.copy_(torch.maximum(to, value))


# --- Triton: optimizer_triton.py ------------------------------------------------------------------------------------


def _adamw_triton(u: Update) -> None:
    if u.params[0].dtype == torch.float64:  # numbers of a launch are float32
        return _adamw_torch(u)
    _check_alike(u)
    kernel = imported(".optimizer_triton", __package__)
    factor, live = u.factor(), None if u.found_inf is None else (u.found_inf == 0).float()
    torch._foreach_add_(u.steps, 1 if live is None else live)
    lists = (u.params, u.grads, u.exp_avgs, u.exp_avg_sqs, u.max_exp_avg_sqs, u.masters, u.emas, u.indices)
    for part, lr, (beta1, beta2, eps, decay, maximize) in u.groups():
        if part.start == part.stop:
            continue
        lr, t, step_size, root = _rates(u.steps[part], lr, beta1, beta2)
        row: dict[str, Any] = {
            "factor": 1.0 if factor is None else factor, "step_size": step_size, "root": root,
            "decay": lr * decay if u.decoupled else 0.0, "step": t, "grad_scale": u.grad_scale, "live": live,
        }  # fmt: skip
        if maximize:
            row["factor"] = -row["factor"]
        table = torch.ones(len(kernel.TABLE), len(t), dtype=torch.float32, device=t.device)
        for values, name in zip(table, kernel.TABLE):
            if row[name] is not None:
                values.copy_(row[name]) if isinstance(row[name], Tensor) else values.fill_(row[name])
        numbers = (
            u.seed & MASK, beta1, 1 - beta1, beta2, 1 - beta2, eps, 0.0 if u.decoupled else decay, u.ema_decay, 1 - u.ema_decay,
            u.grad_scale is not None, u.zero_grad, u.stochastic,
        )  # fmt: skip
        kernel.update(*(values[part] for values in lists), table, numbers)


# --- registered ops: csrc/optimizer.cpp -----------------------------------------------------------------------------


_OPERATORS = torch.ops.wikigpt  # of the extension, whatever the namespace of this package
extension_fake("grad_norm", lambda grads, grad_scale, ticket: grads[0].new_empty((), dtype=_norm_dtype(grads)))
extension_fake("adamw_", lambda *arguments: None)


def _grad_norm_ext(grads: Sequence[Tensor], grad_scale: Tensor | None = None, ticket: Tensor | None = None) -> Tensor:
    return _OPERATORS.grad_norm(grads, grad_scale, ticket)


def _adamw_ext(u: Update) -> None:
    _OPERATORS.adamw_(*u)


register(
    "grad_norm",
    Implementation("cuda", _grad_norm_ext, in_extension("cuda", "grad_norm")),
    Implementation("cpu", _grad_norm_ext, in_extension("cpu", "grad_norm")),
    Implementation("triton", _grad_norm_torch, why_not_triton),  # one pass as well
    Implementation("torch", _grad_norm_torch),
    Implementation("reference", grad_norm_reference),
)
register(
    "adamw",
    Implementation("cuda", _adamw_ext, in_extension("cuda", "adamw_")),
    Implementation("cpu", _adamw_ext, in_extension("cpu", "adamw_")),
    Implementation("triton", _adamw_triton, why_not_triton),
    Implementation("torch", _adamw_torch, only_on("cpu", "cuda", "mps")),
    Implementation("reference", adamw_reference),
)


# --- optimisers -----------------------------------------------------------------------------------------------------


@dataclass
class _Bucket:
    """Parameters that one Update holds: of one dtype, with the same kinds of state."""

    lr_on_device: bool  # a tensor beside the parameters, not a number
    amsgrad: bool
    decoupled: bool
    master: bool
    stochastic: bool
    states: list[dict[str, Tensor]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # in the list of all parameters
    groups: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    keys: tuple[str, ...] = ()


class _Plan:
    """What stays the same from step to step: which parameters have gradients, how they are laid out, in which buckets."""

    def __init__(self, optimizer: FusedAdam, params: list[Tensor], present: list[bool]):
        self.params, self.present = params, present
        self.changed = [p for p, here in zip(params, present) if here]
        self.lists = [(group["params"], len(group["params"])) for group in optimizer.param_groups]
        self.state: Any = optimizer.state
        self.flags = _flags(optimizer)
        self.distributed = any(hasattr(p, "to_local") for p in params)
        buckets: dict[Any, _Bucket] = {}
        position = 0
        for number, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if present[position]:
                    state = optimizer._state_of(p, group)
                    narrow = p.dtype in NARROW
                    kind = (
                        _on_device(group["lr"]), bool(group["amsgrad"]), bool(group["decoupled_weight_decay"]),
                        narrow and optimizer.master_weights, p.dtype == torch.bfloat16 and optimizer.stochastic_rounding,
                    )  # fmt: skip
                    bucket = buckets.setdefault((p.dtype, *kind), _Bucket(*kind))
                    if not bucket.groups or bucket.groups[-1] != number:
                        bucket.groups.append(number)
                        bucket.counts.append(0)
                    bucket.counts[-1] += 1
                    bucket.states.append(state)
                    bucket.positions.append(position)
                position += 1
        self.buckets = list(buckets.values())
        averaged = optimizer.ema_decay is not None
        for b in self.buckets:
            wanted = {"max_exp_avg_sq": b.amsgrad, "master": b.master, "ema": averaged}
            b.keys = ("step", "exp_avg", "exp_avg_sq", *(key for key, keep in wanted.items() if keep))
        self.entries = len(optimizer.state)
        self.states = [optimizer.state[p] for p in self.changed]
        self.strides = [torch.empty_like(_local(p), device="meta").stride() for p in params]

    def holds(self, optimizer: FusedAdam) -> bool:
        groups = optimizer.param_groups
        return (
            self.state is optimizer.state
            and self.entries == len(optimizer.state)
            and len(self.lists) == len(groups)
            and all(g["params"] is params and len(params) == n for g, (params, n) in zip(groups, self.lists))
            and self.flags == _flags(optimizer)
            and all(self.states)
            and all(map(operator.is_, map(self.state.get, self.changed), self.states))
        )


def _flags(optimizer: FusedAdam) -> list[Any]:
    """What a plan depends on beside the parameters: everything may be changed between steps."""
    return [
        optimizer.ema_decay is None,
        optimizer.master_weights,
        optimizer.stochastic_rounding,
        *((_on_device(g["lr"]), g["amsgrad"], g["decoupled_weight_decay"]) for g in optimizer.param_groups),
    ]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a DTensor's shard on this process


def _on_device(lr: Any) -> bool:
    """Whether lr is a tensor that the host cannot read without waiting."""
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _one_float(x: Any, device: torch.device) -> Tensor | None:
    return None if x is None else torch.as_tensor(x, dtype=torch.float32, device=device).reshape(())


def _plain_norm(function: Callable[..., Tensor], grads: list[Tensor], *rest: Any) -> Tensor:
    return function(grads, *rest)


def _distributed_norm(wholes: list[Any], function: Callable[..., Tensor], grads: list[Tensor], *rest: Any) -> Tensor:
    """The norm where some of `wholes` are DTensors, of which `grads` are the shards on this process."""
    parts: dict[Any, list[Tensor]] = {}
    for whole, grad in zip((whole for whole in wholes if whole is not None), grads):
        parts.setdefault((whole.device_mesh, whole.placements) if hasattr(whole, "to_local") else None, []).append(grad)
    squares = []
    for where, tensors in parts.items():
        square = function(tensors, *rest).double().square()
        if where is not None:
            mesh, placements = where
            for i, placement in enumerate(placements):
                if placement.is_partial():
                    raise ValueError("params: got the gradient of a DTensor that is still to be summed (Partial)")
                if placement.is_shard():
                    torch.distributed.all_reduce(square, group=mesh.get_group(i))
        squares.append(square)
    return torch.stack(squares).sum().sqrt().to(_norm_dtype(grads))


def _in_layout(
    i: int, p: Tensor, grad: Tensor, strides: tuple[int, ...], back: list[tuple[Tensor, Tensor]], written: bool
) -> tuple[Tensor, Tensor]:
    """(p, grad), each as it is or a copy with `strides`, which `back` then notes. ValueError for what no copy mends."""
    if grad.layout is not torch.strided:
        raise ValueError(f"params: the gradient of number {i} is {grad.layout}, allowed are dense ones")
    if grad.dtype is not p.dtype:
        raise ValueError(f"params: number {i} is {p.dtype}, its gradient {grad.dtype}; allowed is one dtype")

    def copied(what: str, x: Tensor, returns: bool) -> Tensor:
        if x.stride() == strides and not x.is_neg():
            return x
        if returns:
            check_writable(f"params: {what} {i}", x)
        copy = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
        if returns:
            back.append((x, copy))
        return copy

    return copied("number", p, True), copied("the gradient of number", grad, written)


def _in_range(name: str, value: Any, low: float, high: float, allowed: str) -> Any:
    """The number, of Python where it is numpy's: a checkpoint can hold no other. A tensor stays one."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is {allowed}")
    if not _on_device(value) and not low <= float(value) < high:
        raise ValueError(f"{name}: got {value!r}, allowed is {allowed}")
    return value if type(value) in (int, float) or isinstance(value, Tensor) else float(value)


def _check_group(group: dict[str, Any]) -> None:
    """Raises for numbers that are none or out of range, and puts Python's in the place of numpy's."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: got a tensor of {lr.numel()} elements, allowed is one")
    finite = (0.0, math.inf, "a finite number from 0")
    group |= {name: _in_range(name, group[name], *finite) for name in ("lr", "eps", "weight_decay")}
    if len(betas) != 2 or any(isinstance(beta, Tensor) for beta in betas):
        raise ValueError(f"betas: got {betas!r}, allowed are two numbers")
    below_one = (0.0, 1.0, "a number from 0 to below 1")
    group["betas"] = tuple(_in_range(f"betas[{i}]", beta, *below_one) for i, beta in enumerate(betas))
    if group["differentiable"]:
        raise ValueError("differentiable: got True, allowed is False (torch.optim.AdamW has a differentiable step)")


class FusedAdam(torch.optim.Adam):
    """torch.optim.Adam in one pass over all parameters. Options, state and errors: `FusedAdamW`."""

    _step_supports_amp_scaling = True  # for GradScaler: step() reads self.grad_scale and self.found_inf

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        zero_grad: bool = False,
    ) -> None:
        group: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "differentiable": differentiable,
        }
        _check_group(group)
        if max_grad_norm is not None:
            allowed = "a finite number above 0, or None"
            max_grad_norm = float(_in_range("max_grad_norm", max_grad_norm, 5e-324, math.inf, allowed))
        if ema_decay is not None:
            ema_decay = float(_in_range("ema_decay", ema_decay, 0.0, 1.0, "a number from 0 to below 1, or None"))
        if master_weights and stochastic_rounding:
            raise ValueError("stochastic_rounding: got True beside master_weights=True, allowed is one of the two")
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.master_weights, self.stochastic_rounding, self.zeroes_grad = master_weights, stochastic_rounding, zero_grad
        self.grad_norm: Tensor | None = None
        self._plan: _Plan | None = None
        self._ticket: Tensor | None = None
        self._loading: dict[str, Any] | None = None
        # foreach and fused choose between torch's implementations, capturable is what this one always is. fused=True makes
        # torch.optim.AdamW, when it loads a checkpoint of ours, keep its steps on the device.
        torch.optim.Adam.__init__(
            self, params, group["lr"], group["betas"], group["eps"], group["weight_decay"], amsgrad, maximize=maximize,
            capturable=capturable, fused=True, decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        if stochastic_rounding:
            dtypes = {p.dtype for group in self.param_groups for p in group["params"]}
            if torch.bfloat16 not in dtypes or torch.float16 in dtypes:
                names = ", ".join(sorted(str(dtype) for dtype in dtypes))
                raise ValueError(
                    f"stochastic_rounding: got parameters of {names}, allowed are bfloat16, with float32 or float64 beside them"
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. ValueError for a parameter that is expanded or no dense floating-point tensor, numbers out of range."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            for i, p in enumerate(group["params"]):
                if p.dtype not in DTYPES or p.layout != torch.strided:
                    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                    raise ValueError(f"params: number {i} is {p.dtype}, {p.layout}, allowed are dense tensors of {names}")
                check_writable(f"params: number {i}", p)
        except ValueError:
            del self.param_groups[-1]
            raise
        self._plan = None

    # --- state ---

    def _dtypes(self, p: Tensor) -> dict[str, torch.dtype]:
        wide = torch.float32 if p.dtype in NARROW else p.dtype
        moment = wide if self.master_weights else p.dtype
        moments = dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), moment)
        return {"step": torch.float32, **moments, "master": wide, "ema": wide}

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's state, with everything in it that the options need."""
        state, dtypes = self.state[p], self._dtypes(p)
        strides = torch.empty_like(_local(p), device="meta").stride()
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
            if key not in state:
                state[key] = torch.zeros_like(p, dtype=dtypes[key], memory_format=torch.preserve_format)
        for key, wanted in (("master", self.master_weights and p.dtype in NARROW), ("ema", self.ema_decay is not None)):
            if wanted and key not in state:
                state[key] = torch.empty_like(p, dtype=dtypes[key]).copy_(p)
        for key, value in state.items():
            # A checkpoint may have other strides, or dtypes where the options were others.
            if key in dtypes and key != "step" and (value.dtype != dtypes[key] or _local(value).stride() != strides):
                state[key] = torch.empty_like(p, dtype=dtypes[key]).copy_(value)
        return state

    def __getstate__(self) -> dict[str, Any]:
        names = ("max_grad_norm", "ema_decay", "master_weights", "stochastic_rounding", "zeroes_grad", "grad_norm")
        nothing = {"_plan": None, "_ticket": None, "_loading": None}
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}, **nothing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Adam.__setstate__(self, state)
        self._plan = None
        for group in self.param_groups:
            group.update(foreach=None, fused=True)
        loading = self._loading
        if loading is not None:
            # torch has cast everything to the parameter's dtype: take the original again.
            numbers = itertools.chain.from_iterable(group["params"] for group in loading["param_groups"])
            params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
            for number, p in zip(numbers, params):
                self._take(p, loading["state"].get(number))

    def _take(self, p: Tensor, saved: dict[str, Any] | None) -> None:
        """A parameter's state from a checkpoint, in the dtypes that the options ask for."""
        if saved is None:
            return
        dtypes, dropped = self._dtypes(p), {"master"} if not (self.master_weights and p.dtype in NARROW) else set()
        dropped |= {"ema"} if self.ema_decay is None else set()  # a copy that no step keeps up would be wrong soon
        for key in dropped:
            self.state[p].pop(key, None)
        for key, value in saved.items():
            if key in dtypes and key not in dropped:
                value = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float32)
                self.state[p][key] = value.to(device=p.device, dtype=dtypes[key])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, of checkpoints of this class and of torch's; moments, master weights and averages keep their dtype
        where torch would cast them to the parameter's."""

        def remember(_: Any, state: dict[str, Any]) -> None:
            self._loading = state

        hook = self.register_load_state_dict_pre_hook(remember)  # the last one: it sees what the others made of it
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._loading = None

    # --- moving averages ---

    def ema_parameters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, its moving average) for all parameters; before its first step a parameter is its own average.
        RuntimeError without ema_decay."""
        if self.ema_decay is None:
            raise RuntimeError("ema_decay is None: no moving averages are kept")
        for group in self.param_groups:
            for p in group["params"]:
                yield p, self.state[p]["ema"] if "ema" in self.state.get(p, {}) else p.detach()

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Inside the with block every parameter holds its moving average (rounded to its dtype)."""
        pairs = list(self.ema_parameters())
        kept = [p.detach().clone() for p, _ in pairs]
        with torch.no_grad():
            for p, ema in pairs:
                p.copy_(ema)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), before in zip(pairs, kept):
                    p.copy_(before)

    # --- one step ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient; returns what `closure`, called first, returns.

        Raises ValueError, before anything changes, for gradients that are sparse or have another dtype than their parameter,
        for expanded ones that are to be written (zero_grad, a GradScaler), for parameters or an lr on several devices.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._plan
        if plan is None or not plan.holds(self):
            plan = self._make_plan()
        grads: list[Any] = [p.grad for p in plan.params]
        if [grad is not None for grad in grads] != plan.present:
            plan = self._make_plan()
        if not plan.buckets:
            return loss
        params = list(plan.params)
        norm_of: Callable[..., Tensor] = _plain_norm
        if plan.distributed:
            params = [_local(p) for p in params]
            norm_of = functools.partial(_distributed_norm, grads)
            grads = [grad if grad is None else _local(grad) for grad in grads]
        self._step(plan, params, grads, norm_of)
        return loss

    def _make_plan(self) -> _Plan:
        params = [p for group in self.param_groups for p in group["params"]]
        present = [p.grad is not None for p in params]
        device = next((p.device for p in params if p.grad is not None), None)
        for i, p in enumerate(params):
            if p.grad is not None and p.device != device:
                raise ValueError(f"params: number {i} is on {p.device}, the first one on {device}; allowed is one device")
        for group in self.param_groups:
            lr = group["lr"]
            if device is not None and _on_device(lr) and lr.device != device:
                raise ValueError(f"lr: got a tensor on {lr.device}, allowed are {device} (of the parameters) and the cpu")
        self._plan = _Plan(self, params, present)
        if self._ticket is None or self._ticket.device != device:
            self._ticket = torch.zeros(1, dtype=torch.int32, device=device) if device and device.type == "cuda" else None
        return self._plan

    def _step(self, plan: _Plan, params: list[Tensor], grads: list[Any], norm_of: Callable[..., Tensor]) -> None:
        device = params[plan.buckets[0].positions[0]].device
        grad_scale, found_inf = (_one_float(getattr(self, name, None), device) for name in ("grad_scale", "found_inf"))
        writes_grads = self.zeroes_grad or grad_scale is not None
        back: list[tuple[Tensor, Tensor]] = []  # (tensor, the copy of another layout in its place)
        for i, (p, grad, strides) in enumerate(zip(params, grads, plan.strides)):
            if grad is not None and not (
                grad.layout is torch.strided
                and grad.dtype is p.dtype
                and grad.stride() == strides == p.stride()
                and not grad.is_neg()
            ):
                params[i], grads[i] = _in_layout(i, p, grad, strides, back, writes_grads)
        norm = None
        if self.max_grad_norm is not None:
            present = [grad for grad in grads if grad is not None]
            norm = self.grad_norm = norm_of(choose("grad_norm", device.type), present, grad_scale, self._ticket)
        update = choose("adamw", device.type)
        for b in plan.buckets:
            state = {key: [s[key] for s in b.states] for key in b.keys}
            if plan.distributed:
                state = {key: [_local(tensor) for tensor in tensors] for key, tensors in state.items()}
            groups = [self.param_groups[number] for number in b.groups]
            update(
                Update(
                    [params[i] for i in b.positions],
                    [grads[i] for i in b.positions],
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state.get("max_exp_avg_sq", []),
                    state.get("master", []),
                    state.get("ema", []),
                    state["step"],
                    [group["lr"] for group in groups] if b.lr_on_device else [],
                    norm,
                    grad_scale,
                    found_inf,
                    self._ticket,
                    [
                        float(x)
                        for g in groups
                        for x in (0.0 if b.lr_on_device else g["lr"], *g["betas"], g["eps"], g["weight_decay"], g["maximize"])
                    ],
                    b.counts,
                    b.positions,
                    math.inf if self.max_grad_norm is None else self.max_grad_norm,
                    0.0 if self.ema_decay is None else self.ema_decay,
                    b.decoupled,
                    self.zeroes_grad,
                    b.stochastic,
                    0,
                )
            )
        for tensor, copy in back:
            tensor.copy_(copy)
        # The extension writes behind autograd's back, which is to refuse a backward through what was changed, as after torch's.
        written = [p.grad for p in plan.changed if p.grad is not None] if writes_grads else []
        torch.autograd.graph.increment_version(plan.changed + written)


class FusedAdamW(FusedAdam, torch.optim.AdamW):
    """torch.optim.AdamW in one pass over all parameters.

    Takes what torch.optim.AdamW takes, writes and reads its checkpoints, works with its schedulers, GradScaler and FSDP2.
    foreach, fused and capturable are accepted and change nothing: the step is always fused, counts on the device and can be
    captured in a CUDA graph (after one step outside; with lr as a tensor on the device, where it is to change).

    params: float32, bfloat16, float16 or float64, of any dense strides (others are copied there and back), on one device.
    max_grad_norm: clip gradients by their global norm, as torch.nn.utils.clip_grad_norm_ does before a step; the norm stays on
        the device as `grad_norm`. p.grad itself is not clipped. GradScaler.step() leaves it unscaled, as with torch's, except
        in a step that it skips.
    ema_decay: keep state "ema" <- ema_decay * ema + (1 - ema_decay) * parameter, in float32 for 16-bit parameters
        (`ema_parameters`, `swap_ema`).
    master_weights: for 16-bit parameters keep state "master", float32, which is what is trained; moments are float32 too.
    stochastic_rounding: round bfloat16 parameters and their moments stochastically. The bits are a function of step,
        parameter and element: a resumed run repeats.
    zero_grad: leave zeros in the gradients.

    ValueError for numbers out of range, differentiable=True, parameters that are not dense and floating-point or are expanded,
    master_weights and stochastic_rounding together, stochastic_rounding without bfloat16 or with float16 parameters.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        zero_grad: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable,
            differentiable=differentiable, decoupled_weight_decay=True, max_grad_norm=max_grad_norm, ema_decay=ema_decay,
            master_weights=master_weights, stochastic_rounding=stochastic_rounding, zero_grad=zero_grad,
        )  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
