"""Derivatives of the registered operators, under torch.func too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_autograd(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> Any:
    """Gives a custom op its backward, and returns what to call in the op's place.

    PyTorch makes an autograd.Function of `backward` which torch.func refuses. Under grad, vjp, jacrev and vmap the returned
    function goes through one that torch.func takes, with the same backward; otherwise it is the op.
    """
    op.register_autograd(backward, setup_context=setup_context)

    def forward(*args: Any) -> Any:
        return op(*args)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    methods = {"forward": forward, "setup_context": setup, "backward": backward}
    function: Any = type(
        op._name,
        (torch.autograd.Function,),
        {**{name: staticmethod(method) for name, method in methods.items()}, "generate_vmap_rule": True},
    )

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return op(*args)

    return call


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


__all__ = ["one_by_one", "register_autograd", "register_vmap"]
