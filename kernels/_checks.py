"""Checks of arguments that ops share."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""The floating dtypes that operators compute in, PyTorch's too: those of 8 bits are for storage."""


def as_float(name: str, value: Any) -> Any:
    """A number of any type, numpy's included. TypeError that names the argument for what is none, and for a tensor with a
    gradient, which would be lost."""
    if isinstance(value, (int, float, torch.SymFloat)):
        return value
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise TypeError(f"{name}: got a tensor that requires a gradient, which it has none of: give float({name})")
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name}: got {type(value).__name__}, allowed is float")


def as_int(name: str, value: Any) -> Any:
    """A whole number of any type, numpy's and a tensor's included. TypeError that names the argument for what is none."""
    if isinstance(value, (int, torch.SymInt, Tensor)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is int") from None


def check_float(name: str, tensor: Any) -> None:
    """TypeError for what is no tensor, or has a dtype that is not in FLOATS."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, need a tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, allowed are float16, bfloat16, float32 and float64")


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements share one place in memory, as after `expand`: nobody can write them one by one."""
    strides = tensor.stride()
    return 0 in strides and any(stride == 0 and size > 1 for stride, size in zip(strides, tensor.shape))


def check_writable(what: str, tensor: Tensor) -> None:
    """ValueError for a tensor that is expanded. `what` begins the sentence."""
    if is_expanded(tensor):
        raise ValueError(f"{what} is expanded, several of its elements share one place in memory")


def has_functions(tensor: Tensor) -> bool:
    """Whether the tensor's type computes PyTorch's functions in its own way (CausalBias, MaskedTensor, nested tensors). What
    lies in the memory of such a tensor need not be its numbers: that of a CausalBias is uninitialised."""
    if type(tensor) in _PLAIN:
        return tensor.is_nested
    function = type(tensor).__torch_function__
    inherited = getattr(function, "__func__", None) is Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    return tensor.is_nested or not (inherited or function is torch._C._disabled_torch_function_impl)


def check_tensors(names: str, needed: tuple[Tensor, ...], optional: tuple[Tensor | None, ...] = ()) -> None:
    """TypeError for what is missing, no tensor, or one whose memory need not hold its numbers. `names` of both, in order."""
    for i, tensor in enumerate((*needed, *optional)):
        if tensor is None and i >= len(needed):
            continue
        if type(tensor) is Tensor and not tensor.is_nested:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{names.split()[i]}: got {type(tensor).__name__}, need a tensor")
        if has_functions(tensor):
            kind = "nested tensor" if tensor.is_nested else type(tensor).__name__
            raise TypeError(
                f"{names.split()[i]}: got a {kind}, need a dense tensor without torch functions of its own: convert it first"
            )


__all__ = ["FLOATS", "as_float", "as_int", "check_float", "check_tensors", "check_writable", "has_functions", "is_expanded"]
