"""Derivatives of the registered operators, under torch.func too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._dispatch import no_forward_mode, watched


def register_autograd(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> Any:
    """Gives a custom op its backward, and returns what to call in the op's place.

    PyTorch makes an autograd.Function of `backward` which torch.func refuses, and whose forward reads the schema of the op for
    0.2 us times the square of the number of its arguments. So eager calls that need a gradient go through a Function of our
    own, and those under grad, vjp, jacrev and vmap through one that torch.func takes, with the same backward; all others are
    the op.
    """
    op.register_autograd(backward, setup_context=setup_context)

    def forward(*args: Any) -> Any:
        return op(*args)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    def forward_and_setup(ctx: Any, *args: Any) -> Any:
        output = op(*args)
        setup(ctx, args, output)
        return output

    def jvp(ctx: Any, *tangents: Any) -> Any:
        # refuse_forward_mode does not see tangents below a torch.func.grad.
        raise no_forward_mode(op._name)

    def function(**members: Any) -> Any:
        members |= {"backward": staticmethod(backward), "jvp": staticmethod(jvp)}
        return type(op._name, (torch.autograd.Function,), members)

    # PyTorch inspects the signature at each call of one that has a setup_context.
    mapped = function(forward=staticmethod(forward), setup_context=staticmethod(setup), generate_vmap_rule=True)
    eager = function(forward=staticmethod(forward_and_setup))

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return mapped.apply(*args)
        if torch.is_grad_enabled() and not watched(*args) and torch._C._any_requires_grad(*args):
            return eager.apply(*args)
        return op(*args)

    return call


_COUNTING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def call_in_place(op: Callable[..., Any], changed: Sequence[Tensor], *args: Any) -> Any:
    """op(*args), which writes into `changed`, for the square of its arguments less than PyTorch's own counting of the changes
    takes (as in `register_autograd`)."""
    if watched(*args):
        return op(*args)
    torch.autograd.graph.increment_version(changed)
    with torch._C._ExcludeDispatchKeyGuard(_COUNTING):
        return op(*args)


def one_by_one(op: Callable[..., Any], info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """A rule for torch.func.vmap: a call of the op for each sample."""

    def sample(i: int) -> Any:
        return op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims)))

    n = info.batch_size
    if n == 0:
        one = [arg if dim is None else arg.new_zeros(arg.movedim(dim, 0).shape[1:]) for arg, dim in zip(args, in_dims)]
        samples = [op(*one)]
    else:
        samples = [sample(i) for i in range(n)]
    if isinstance(samples[0], Tensor):
        return torch.stack(samples)[:n], 0
    return tuple(torch.stack(parts)[:n] for parts in zip(*samples)), (0,) * len(samples[0])


def register_vmap(op: Any) -> None:
    """`one_by_one` for ops that have no cheaper way; PyTorch's own loop warns."""
    op.register_vmap(functools.partial(one_by_one, op))


__all__ = ["call_in_place", "one_by_one", "register_autograd", "register_vmap"]
