"""Logits that are made when somebody looks at them.

A model that trains needs its logits for the loss alone, and `linear_cross_entropy` gives the loss without them. `LazyLogits`
stand for the product in the meantime. They are no Tensor, but answer like one:

    cross_entropy               of them, or of rows of them, is linear_cross_entropy; a factor and a softcap may lie between
    rows and casts              x[:, :-1], x[mask], x.view(-1, V), split, float, detach: LazyLogits of those rows
    argmax over the vocabulary  in pieces, without the whole
    anything else               makes the logits, once, and goes on with an ordinary Tensor
    a change in place           does so where they were taken from, as rows of a Tensor share its memory

so code that computes token accuracy, entropy or another loss from `outputs.logits` gets what it got from the Tensor.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from wikigpt.kernels import linear_cross_entropy
from wikigpt.kernels._dispatch import forced_backend

_PIECE = 1 << 24  # logits that argmax holds at a time


class LazyLogits:
    """The logits hidden @ weight.T + bias, (..., V) of hidden (..., D) and weight (V, D), not made yet.

    `tensor()` gives them as a Tensor, with the gradient that a model's logits have. It raises RuntimeError once the weight was
    changed, as logits of the new weight would be others: read them before optimizer.step().
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        product_dtype: torch.dtype,
        steps: tuple[tuple[str, Any], ...] = (),
        grad: bool = True,
        version: int | None = None,
        may_be_made: bool = True,
    ):
        self._hidden, self._weight, self._bias, self._product_dtype = hidden, weight, bias, product_dtype
        self._steps, self._grad, self._version = steps, grad, version  # steps: what was done to them elementwise
        self._hidden_version = None if version is None else hidden._version
        self._may_be_made = may_be_made
        self._made: Tensor | None = None
        self._view: tuple[LazyLogits, Callable[[Tensor], Tensor]] | None = None

    def _but(
        self,
        *,
        hidden: Tensor | None = None,
        step: tuple[str, Any] | None = None,
        view: Callable[[Tensor], Tensor] | None = None,
    ) -> LazyLogits:
        """The same with other rows or one step more. view: how they are taken from this, where they share its memory."""
        self._check_versions()
        other = LazyLogits(
            self._hidden if hidden is None else hidden,
            self._weight,
            self._bias,
            self._product_dtype,
            self._steps if step is None else (*self._steps, step),
            self._grad,
            self._version,
            self._may_be_made,
        )
        if not torch.is_grad_enabled():
            other = other.detach()
        other._view = None if view is None else (self, view)
        return other

    def _is_made(self) -> bool:
        if self._view is not None and self._view[0]._is_made():
            base, view = self._view
            with torch.set_grad_enabled(self._grad):
                self._made, self._view = view(base.tensor()), None  # from now on in the memory of the whole
        return self._made is not None

    def _to_write(self) -> Tensor:
        """The logits as a Tensor, in the memory of those that they were taken from: for what changes them."""
        if self._view is not None:
            self._view[0]._to_write()
        return self.tensor()

    def tensor(self) -> Tensor:
        """The logits as a Tensor. Made once and kept."""
        if not self._is_made():
            if not self._may_be_made:
                raise RuntimeError("the loss needs the logits")
            self._check_versions()
            with torch.set_grad_enabled(self._grad), torch.autocast(self._hidden.device.type, enabled=False):
                given = (None if t is None else t.to(self._product_dtype) for t in (self._hidden, self._weight, self._bias))
                logits = F.linear(*given)  # type: ignore[arg-type]
                for name, argument in self._steps:
                    logits = _STEPS[name](logits, argument)
            self._made = logits
        return self._made  # type: ignore[return-value]

    def _check_versions(self) -> None:
        if self._version is None:
            return
        for what, before, now in (
            ("head's weight", self._version, _version(self._weight, self._bias)),
            ("last hidden state", self._hidden_version, self._hidden._version),
        ):
            if before != now:
                raise RuntimeError(
                    f"outputs.logits: the {what} has changed since the forward pass, and in training logits are made when they "
                    "are used. Read them before optimizer.step(), or keep them with patch(model, loss=False)"
                )

    # --- what stays lazy

    @property
    def shape(self) -> torch.Size:
        if self._made is not None:
            return self._made.shape
        return torch.Size((*self._hidden.shape[:-1], self._weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return next((argument for name, argument in reversed(self._steps) if name == "to"), self._product_dtype)

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tensor())

    def __getitem__(self, index: Any) -> Any:
        if not self._is_made() and _takes_rows(index, self.dim()):
            copies = any(isinstance(i, Tensor) for i in (index if isinstance(index, tuple) else (index,)))
            return self._but(hidden=self._hidden[index], view=None if copies else lambda logits: logits[index])
        return self.tensor()[index]

    def reshape(self, *shape: Any) -> Any:
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if not self._is_made() and len(wanted) > 1 and wanted[-1] == self.shape[-1]:
            hidden = self._hidden.reshape(*wanted[:-1], self._hidden.shape[-1])
            copies = not self._hidden.is_contiguous()
            return self._but(hidden=hidden, view=None if copies else lambda logits: logits.reshape(wanted))
        return self.tensor().reshape(wanted)

    def view(self, *shape: Any) -> Any:
        if len(shape) == 1 and isinstance(shape[0], torch.dtype):
            return self.tensor().view(shape[0])
        return self.reshape(*shape)

    def split(self, split_size: Any, dim: int = 0) -> Any:
        if not self._is_made() and dim % self.dim() < self.dim() - 1:

            def part(i: int, rows: Tensor) -> LazyLogits:
                return self._but(hidden=rows, view=lambda logits: logits.split(split_size, dim)[i])

            return tuple(part(i, rows) for i, rows in enumerate(self._hidden.split(split_size, dim % self.dim())))
        return self.tensor().split(split_size, dim)

    def contiguous(self, **options: Any) -> Any:
        return self.tensor().contiguous(**options) if options else self

    def float(self) -> Any:
        return self.to(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        wanted = args[0] if len(args) == 1 and not kwargs else None
        if self._is_made():
            return self.tensor().to(*args, **kwargs)
        if isinstance(wanted, torch.dtype) and wanted.is_floating_point:
            return self if wanted == self.dtype else self._but(step=("to", wanted))
        if isinstance(wanted, (torch.device, str)) and torch.device(wanted) == self.device:
            return self
        return self.tensor().to(*args, **kwargs)

    def detach(self) -> Any:
        if self._is_made():
            return self.tensor().detach()
        self._check_versions()
        bias = None if self._bias is None else self._bias.detach()
        parts = (self._hidden.detach(), self._weight.detach(), bias, self._product_dtype, self._steps)
        return LazyLogits(*parts, False, self._version, self._may_be_made)

    def __truediv__(self, other: Any) -> Any:
        return self._step("div", other) if isinstance(other, (int, float)) else self.tensor() / other

    def __mul__(self, other: Any) -> Any:
        return self._step("mul", other) if isinstance(other, (int, float)) else self.tensor() * other

    __rmul__ = __mul__

    def tanh(self) -> Any:
        return self._step("tanh", None)

    def _step(self, name: str, argument: Any) -> Any:
        return _STEPS[name](self.tensor(), argument) if self._is_made() else self._but(step=(name, argument))

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        if self._is_made() or dim is None or keepdim or dim % self.dim() != self.dim() - 1:
            return self.tensor().argmax(dim, keepdim)
        rows = self.detach().reshape(-1, self.shape[-1])
        pieces = [piece.tensor().argmax(-1) for piece in rows.split(max(1, _PIECE // self.shape[-1]))]
        return torch.cat(pieces).view(self.shape[:-1])

    # --- what does not

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _FIELDS:  # asked of what is no Tensor, or of what __init__ has not made yet
            raise AttributeError(name)
        return getattr(self._to_write() if name.endswith("_") else self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        lazy = _LAZY.get(function)
        if lazy is not None and args and isinstance(args[0], LazyLogits) and (not kwargs or _fits(lazy, args, kwargs)):
            return lazy(*args, **kwargs)
        writes = function.__name__.endswith("_") or "out" in kwargs or bool(kwargs.get("inplace"))
        made = LazyLogits._to_write if writes else LazyLogits.tensor
        args, kwargs = tree_map_only(LazyLogits, made, (args, kwargs))
        return function(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self.tensor(),)  # a copy or a pickle is a Tensor

    def __repr__(self) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    __hash__ = object.__hash__


_FIELDS = {
    "_hidden", "_weight", "_bias", "_product_dtype", "_steps", "_grad", "_version", "_hidden_version", "_may_be_made", "_made",
    "_view",
}  # fmt: skip


def _itself(x: Any) -> Any:
    return x


def _version(weight: Tensor, bias: Tensor | None) -> int:
    return weight._version + (0 if bias is None else bias._version)


def _of_tensor(name: str) -> Any:
    def method(self: LazyLogits, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*args)

    return method


def _fits(method: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    try:
        inspect.signature(method).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _or_tensors(name: str) -> Any:
    """The lazy method, but for arguments that only a Tensor's takes: reshape(shape=...), argmax(axis=...)."""
    lazy = getattr(LazyLogits, name)

    @functools.wraps(lazy)
    def method(self: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        if kwargs and not _fits(lazy, (self, *args), kwargs):
            return getattr(self.tensor(), name)(*args, **kwargs)
        return lazy(self, *args, **kwargs)

    return method


def _in_place(name: str) -> Any:
    def method(self: LazyLogits, *args: Any) -> LazyLogits:
        getattr(self._to_write(), name)(*args)
        return self

    return method


# Python looks these up on the class and not by __getattr__.
_OPERATORS = """add radd sub rsub rtruediv pow rpow matmul rmatmul floordiv rfloordiv mod rmod neg abs invert and or xor
eq ne lt le gt ge contains bool float int complex array"""
for _name in _OPERATORS.split():
    setattr(LazyLogits, f"__{_name}__", _of_tensor(f"__{_name}__"))
for _name in ("setitem", "iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod"):
    setattr(LazyLogits, f"__{_name}__", _in_place(f"__{_name}__"))
for _name in ("reshape", "view", "split", "argmax"):
    setattr(LazyLogits, _name, _or_tensors(_name))

_STEPS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "to": lambda logits, dtype: logits.to(dtype),
    "div": lambda logits, number: logits / number,
    "mul": lambda logits, number: logits * number,
    "tanh": lambda logits, _: torch.tanh(logits),
}
_LAZY: dict[Any, Callable[..., Any]] = {
    torch.tanh: LazyLogits.tanh,
    torch.argmax: LazyLogits.argmax,
    torch.reshape: LazyLogits.reshape,
    torch.split: LazyLogits.split,
    torch.div: LazyLogits.__truediv__,
    torch.mul: LazyLogits.__mul__,
}


def _takes_rows(index: Any, dim: int) -> bool:
    """Whether the index leaves the last dimension whole."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is Ellipsis or type(i) in (int, slice, Tensor) for i in index):
        return False
    last_whole = len(index) > 0 and isinstance(index[-1], slice) and index[-1] == slice(None)
    if any(i is Ellipsis for i in index):
        return last_whole
    taken = sum(
        0 if i is None else i.dim() if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) else 1 for i in index
    )
    return taken < dim or (last_whole and taken == dim)


def _scale_and_softcap(steps: tuple[tuple[str, Any], ...]) -> tuple[float, float] | None:
    """What the steps amount to (1.0 and 0.0 for nothing); None where that is something else."""
    match [step for step in steps if step[0] != "to"]:
        case [*scales, ("div", cap), ("tanh", _), ("mul", again)] if cap == again and cap > 0:
            softcap = float(cap)
        case scales:
            softcap = 0.0
    scale = 1.0
    for name, number in scales:
        if name == "tanh" or number == 0:
            return None
        scale = scale * number if name == "mul" else scale / number
    return scale, softcap


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy, without the logits where the op covers it."""
    known = _scale_and_softcap(input._steps) if isinstance(input, LazyLogits) and not input._is_made() else None
    fused = (
        known is not None
        and weight is None
        and size_average is None
        and reduce is None
        and type(target) is Tensor
        and target.dtype == torch.int64
        and input.dim() == 2
        and target.shape == input.shape[:1]
        and target.device == input.device
        and (input._hidden.dtype == input._weight.dtype or torch.is_autocast_enabled(input.device.type))
    )
    if not fused or known is None:
        input, target, weight = tree_map_only(LazyLogits, lambda logits: logits.tensor(), (input, target, weight))
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    input._check_versions()
    scale, softcap = known
    hidden, bias = input._hidden, input._bias
    if scale != 1.0:
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    # On a CPU 1 MiB of logits stays in the processor's cache, and the plain way has fewer calls around it.
    plain = input.device.type == "cpu" and forced_backend() is None and input.numel() < 2**18
    loss: Tensor = linear_cross_entropy(
        hidden,
        input._weight,
        target,
        linear_bias=bias,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        backend="reference" if plain else None,
    )
    # Under autocast PyTorch's loss is float32, whatever the logits are.
    autocast = torch.is_autocast_enabled(input.device.type)
    return loss.to(torch.promote_types(input.dtype, torch.float32) if autocast else input.dtype)


class LazyHead:
    """Stands for a head (nn.Linear) and gives LazyLogits where that is a product of two plain matrices."""

    def __init__(self, head: nn.Linear, may_be_made: bool = True):
        self._head, self._may_be_made = head, may_be_made

    def __call__(self, hidden: Any) -> Any:
        head = self._head
        kind = hidden.device.type if isinstance(hidden, Tensor) else ""
        if type(hidden) is not Tensor or hidden.is_meta or head.weight.device != hidden.device:
            return head(hidden)
        autocast = torch.is_autocast_enabled(kind)
        if hidden.shape[-1] != head.in_features or not (autocast or hidden.dtype == head.weight.dtype):
            return head(hidden)  # raises
        dtype = torch.get_autocast_dtype(kind) if autocast and hidden.dtype != torch.float64 else hidden.dtype
        # Neither a compiled graph nor inference mode has versions to ask for.
        unknown = torch.compiler.is_compiling() or head.weight.is_inference() or hidden.is_inference()
        version = None if unknown else _version(head.weight, head.bias)
        logits = LazyLogits(hidden, head.weight, head.bias, dtype, (), True, version, self._may_be_made)
        return logits if torch.is_grad_enabled() else logits.detach()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)


__all__ = ["LazyHead", "LazyLogits"]
