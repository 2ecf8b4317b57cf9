"""patch(model): a transformers model computes its norms, MLP activations, rotary embedding and loss with our kernels.

What is swapped is found by behaviour: each candidate runs on the CPU, on random numbers and with random weights of its own
shape, and is swapped if it gave what our op gives: on inputs of several ranks, in training and eval mode, in float32 and
bfloat16. So there is no list of models, and what only looks alike (a norm over other dimensions, an MLP with sparsity, logits
that are scaled) is left alone.

A swap changes the module's class to a subclass of its class with another `forward`. Nothing is stored in the module:
parameters, state dict, hooks, `isinstance`, names and copies stay as they are, and `unpatch` sets the class back. Where a
call is not what our op computes (mixed dtypes, a LoRA on the head), the subclass hands it to the original `forward`.

The loss needs no forward of ours: the model's own runs, over a head that gives `LazyLogits`. They are a product that has not
been made, and the cross-entropy of them is `linear_cross_entropy`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wikigpt.kernels import backend, bias_gelu, geglu, layer_norm, rms_norm, swiglu
from wikigpt.kernels._dispatch import forced_backend
from wikigpt.kernels.rotary import apply_rotary_emb_qk

from .lazy_logits import LazyHead, LazyLogits

# --- classes that take a module's place -----------------------------------------------------------------------------


class _Swapped(nn.Module):
    """Base of the classes that `patch` puts in the place of `_original`; `_options` are further attributes of the class."""

    _kind: str
    _original: Any
    _swap: Any
    _options: tuple[tuple[str, Any], ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are made by name, and the class has the name of the original.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (self._original, self._swap, self._options), *reduced[2:])


def _new(original: Any, swap: Any, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    made = _class_of(original, swap, options)
    return made.__new__(made)


@functools.cache
def _class_of(original: Any, swap: Any, options: tuple[tuple[str, Any], ...]) -> Any:
    """The subclass of `original` that computes as `swap` does. Its name is the original's: transformers writes class names
    into configurations and looks models up by them."""
    attributes: dict[str, Any] = {"_original": original, "_swap": swap, "_options": options, **dict(options)}
    attributes |= {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    if swap is _Rotary:
        attributes["forward"] = _with_our_rotary(original.forward, attributes["_function"])
    if swap is _CausalLM:  # Trainer and generate() read the signature
        attributes["forward"] = forward = _copy_of(swap.forward, swap.forward.__globals__)
        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    return type(original.__name__, (swap, original), attributes)


def _copy_of(function: Any, namespace: dict[str, Any]) -> types.FunctionType:
    copied = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _nothing_to_gain(x: Tensor) -> bool:
    """On a CPU our op would call the operators of PyTorch that the module's own forward calls, with more around them."""
    return x.is_cpu and forced_backend() is None


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Of other dtypes, which one comes out differs from model to model; of other sizes, some norms broadcast."""
    return x.dtype == weight.dtype and x.shape[-1:] == weight.shape


class _RMSNorm(_Swapped):
    _kind = "norm"
    weight: Tensor
    _eps: str
    _unit_offset: bool

    def forward(self, x: Tensor) -> Tensor:
        if _nothing_to_gain(x) or not _fits(x, self.weight):
            return super().forward(x)
        return rms_norm(x, self.weight, getattr(self, self._eps), unit_offset=self._unit_offset)


class _LayerNorm(_Swapped):
    _kind = "norm"
    weight: Tensor
    _eps: str

    def forward(self, x: Tensor) -> Tensor:
        if _nothing_to_gain(x) or not _fits(x, self.weight):
            return super().forward(x)
        return layer_norm(x, self.weight, self._parameters.get("bias"), getattr(self, self._eps))


class _GELU(_Swapped):
    _kind = "activation"
    _approximate: str

    def forward(self, x: Tensor) -> Tensor:
        return bias_gelu(x, approximate=self._approximate)


class _GatedMLP(_Swapped):
    _kind = "activation"
    _approximate: str | None  # of GELU; None: SiLU
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if _nothing_to_gain(x):
            return super().forward(x)
        return self.down_proj(_gated(self._approximate, self.gate_proj(x), self.up_proj(x)))


class _PackedMLP(_Swapped):
    """Gate and up in one projection, gate first."""

    _kind = "activation"
    _approximate: str | None
    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if _nothing_to_gain(x):
            return super().forward(x)
        return self.down_proj(_gated(self._approximate, self.gate_up_proj(x)))


def _gated(approximate: str | None, gate: Tensor, up: Tensor | None = None) -> Tensor:
    return swiglu(gate, up) if approximate is None else geglu(gate, up, approximate)


class _Rotary(_Swapped):
    """An attention whose forward finds ours under the name `_function`."""

    _kind = "rotary"
    _function: str


class _CausalLM(_Swapped):
    """A model whose own forward runs, over a head that gives LazyLogits where the model trains."""

    _kind = "loss"
    _head: str
    _arguments: tuple[str, ...]
    _stand_in: Any
    _has_default_loss: bool  # loss_function is PreTrainedModel's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self
        given = {**dict(zip(self._arguments, args)), **kwargs}
        keep = given.get("logits_to_keep", 0)
        if (
            not self.training
            or given.get("labels") is None
            or not (isinstance(keep, int) and keep == 0)
            or not (model.config.return_dict and given.get("return_dict") is not False)
            or not _is_plain(self._modules[self._head])
            or hasattr(self, "_loss_function")  # where transformers keeps what the user has set as model.loss_function
            or _is_exporting()
            or (self._stand_in is _AsInstance and torch.compiler.is_compiling())
        ):
            return super().forward(*args, **kwargs)
        outputs = self._original.forward(self._stand_in(self, self._head), *args, **kwargs)
        if not hasattr(self, "_is_replica"):
            return outputs
        # nn.DataParallel gathers tensors and nothing else.
        return type(outputs)(**{name: value for name, value in outputs.items() if not isinstance(value, LazyLogits)})


# Older ones say is_exporting() inside torch.compile too (2.11).
_TELLS_EXPORT_FROM_COMPILE = torch.__version__ >= "2.13"  # a TorchVersion


def _is_exporting() -> bool:
    """torch.export knows outputs of its own types only."""
    return torch.compiler.is_exporting() and (_TELLS_EXPORT_FROM_COMPILE or not torch.compiler.is_dynamo_compiling())


class _WithLazyHead:
    """Stands for a model in its own forward: all is the model's, but its head gives LazyLogits. So nothing changes in the
    model, and everywhere else its head is what it is."""

    def __init__(self, model: Any, head: str, may_be_made: bool = True):
        self._wikigpt = (model, head, may_be_made)

    def __getattr__(self, name: str) -> Any:
        model, head, may_be_made = self._wikigpt
        if name == head:
            return LazyHead(model._modules[head], may_be_made)
        if name == "loss_function" and getattr(model, "_has_default_loss", False):
            # The same without its warning of an unknown loss_type (GPT-2's), which breaks a compiled graph.
            from transformers.loss.loss_utils import LOSS_MAPPING

            return LOSS_MAPPING.get(str(getattr(model, "loss_type", None)), LOSS_MAPPING["ForCausalLM"])
        return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_wikigpt":
            object.__setattr__(self, name, value)
        else:
            setattr(self._wikigpt[0], name, value)


class _AsInstance(_WithLazyHead):
    """For a forward that calls super(). torch.compile does not know it."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._wikigpt[0])


def _is_plain(head: Any) -> bool:
    """Whether calling it is a product with its weight: no LoRA, quantisation, shards (FSDP2, ZeRO-3) or hooks."""
    return (
        type(head) is nn.Linear
        and type(head.weight) in (Tensor, nn.Parameter)
        and head.weight.dim() == 2
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and "forward" not in head.__dict__
    )


def _with_our_rotary(forward: Any, name: str) -> Any:
    """The same forward, with other globals: those of its module stay, for the models that are not patched."""
    if hasattr(forward, "__wrapped__"):  # decorated: the same decorator around ours
        return _around(forward, _with_our_rotary(forward.__wrapped__, name))
    theirs = forward.__globals__[name]

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Under autocast q and k are narrower than cos; theirs gives the wider dtype, and attention narrows it again.
        plain = q.dtype == cos.dtype or torch.is_autocast_enabled(q.device.type)
        rows = q.dim() == 4 and cos.dim() == 3 and cos.shape[1] == q.shape[2]
        if args or kwargs or not plain or not rows or _nothing_to_gain(q):
            return theirs(q, k, cos, sin, *args, **kwargs)
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]  # (B or 1, S, R / 2)
        if cos.shape[0] == 1:
            cos, sin = cos[0], sin[0]
        return apply_rotary_emb_qk(q, k, cos, sin)

    # Without __name__, or torch.compile would look for the function in their module.
    return _copy_of(forward, {**{k: v for k, v in forward.__globals__.items() if k != "__name__"}, name: rotate})


def _holds(cell: types.CellType, function: Any) -> bool:
    try:
        return cell.cell_contents is function
    except ValueError:  # an empty one
        return False


def _around(decorated: Any, function: Any) -> Any:
    """A copy of the decorated function that calls `function` in the place of what it was put around."""
    cells = decorated.__closure__ or ()
    closure = tuple(types.CellType(function) if _holds(cell, decorated.__wrapped__) else cell for cell in cells)
    made = types.FunctionType(decorated.__code__, decorated.__globals__, decorated.__name__, decorated.__defaults__, closure)
    made.__kwdefaults__ = decorated.__kwdefaults__
    return functools.wraps(function)(made)


# --- recognising them -----------------------------------------------------------------------------------------------

Swap = tuple[Any, dict[str, Any]]  # a class of the above and its attributes


def _same(theirs: Any, ours: Tensor) -> bool:
    tolerance = 2e-5 if ours.dtype == torch.float32 else 5e-2  # which of the steps round to 16 bits differs
    return (
        isinstance(theirs, Tensor)
        and theirs.shape == ours.shape
        and theirs.dtype == ours.dtype
        and torch.allclose(theirs, ours, rtol=tolerance, atol=tolerance)
    )


Parts = dict[str, dict[str, Any]]  # {"_modules": {name: module}, ...}


def _run(module: nn.Module, *args: Any, training: bool = False, parts: Parts | None = None, **kwargs: Any) -> Any:
    """What the class's forward gives; None where it fails. `parts` take the place of parts of the module."""
    probe = _probe(module, training, parts)
    try:
        return type(module).forward(probe, *args, **kwargs)
    except Exception:  # code of any kind, asked whether it is something that we know
        return None


def _probe(module: nn.Module, training: bool, parts: Parts | None = None) -> nn.Module:
    """A shallow copy, and of its modules too, in training or eval mode."""
    probe, parts = copy.copy(module), parts or {}
    children = {
        name: child and _probe(child, training)
        for name, child in module._modules.items()
        if name not in parts.get("_modules", ())
    }
    probe.__dict__.update(
        training=training,
        _parameters={**module._parameters, **parts.get("_parameters", {})},
        _buffers={**module._buffers, **parts.get("_buffers", {})},
        _modules={**children, **parts.get("_modules", {})},
    )
    return probe


def _agrees(module: nn.Module, ours: Callable[[Tensor], Tensor], inputs: list[Tensor], parts: Parts | None = None) -> bool:
    """Whether the module gives what `ours` gives for all the inputs, in training as in eval mode."""
    return all(
        _same(_run(module, x.clone(), training=training, parts=parts), ours(x)) for x in inputs for training in (False, True)
    )


def _takes_one_argument(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2


def _norm(module: nn.Module) -> Swap | None:
    given = {name: p for name, p in module._parameters.items() if p is not None}
    if "weight" not in given or given.keys() - {"weight", "bias"} or module._buffers or module._modules:
        return None
    eps = next((name for name in ("eps", "variance_epsilon") if isinstance(getattr(module, name, None), float)), None)
    if eps is None or given["weight"].dim() != 1 or not _takes_one_argument(module):
        return None
    n, number = given["weight"].shape[0], getattr(module, eps)
    weights = {name: torch.randn(n) for name in given}
    inputs = _rows(n, number)

    def agrees(norm: Callable[..., Tensor], *names: str, **options: Any) -> bool:
        def in_dtype(dtype: torch.dtype, inputs: list[Tensor]) -> bool:
            w = {name: weight.to(dtype) for name, weight in weights.items()}
            given = [w.get(name) for name in names]
            return _agrees(
                module,
                lambda x: norm(x, *given, number, backend="reference", **options),
                [x.to(dtype) for x in inputs],
                {"_parameters": w},
            )

        return in_dtype(torch.float32, inputs) and in_dtype(torch.bfloat16, inputs[1:2])

    if "bias" not in given:
        for unit_offset in (False, True):
            if agrees(rms_norm, "weight", unit_offset=unit_offset):
                return _RMSNorm, {"_eps": eps, "_unit_offset": unit_offset}
    return (_LayerNorm, {"_eps": eps}) if agrees(layer_norm, "weight", "bias") else None


def _rows(n: int, eps: float) -> list[Tensor]:
    """Inputs of a norm over the last dimension, of every rank: over others, a norm refuses them or gives something else."""
    # Rows of this size show where eps is added.
    x = torch.randn(12, n) * torch.tensor([eps**0.5, 1.0, 1.0, 30.0, 1e4, 1.0]).repeat(2)[:, None] + torch.randn(12, 1)
    x[::6] -= x[::6].mean(1, keepdim=True)
    inputs = [x, x[:6].view(2, 3, n), x.view(2, 3, 2, n), x[:1], x[:1].view(1, 1, n)]
    # Where the other dimensions have the size of the last, shapes tell nothing.
    return inputs if n > 128 else [*inputs, torch.randn(2, n, n), torch.randn(1, n, 1, n)]


_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: F.silu,
    "none": F.gelu,
    "tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _activation(module: nn.Module) -> Swap | None:
    if not _takes_one_argument(module):
        return None
    # Far from 0 too, where some are clipped.
    x = torch.cat((3 * torch.randn(1000), torch.linspace(-60, 60, 24)))
    if not (module._modules or module._parameters or module._buffers):
        inputs = [x, x.view(8, 128), x.view(2, 4, 128), x.view(1, 1024, 1, 1), x.bfloat16()]
        for approximate in ("none", "tanh"):
            if _agrees(module, _ACTIVATIONS[approximate], inputs):
                return _GELU, {"_approximate": approximate}
        return None
    inputs = [x.view(128, 8), x.view(4, 32, 8), x.view(2, 4, 16, 8), x[:8].view(1, 1, 8)]
    return next((found for swap in (_GatedMLP, _PackedMLP) if (found := _mlp(module, swap, inputs)) is not None), None)


def _mlp(module: nn.Module, swap: Any, inputs: list[Tensor]) -> Swap | None:
    *into, down = [name for name in swap.__annotations__ if name.endswith("_proj")]
    if not all(isinstance(module._modules.get(name), nn.Module) for name in (*into, down)):
        return None
    small = {**{name: nn.Linear(8, 32 // len(into)) for name in into}, down: nn.Linear(16, 8)}
    narrow = copy.deepcopy(nn.ModuleDict(small)).bfloat16()

    def agrees(function: Callable[[Tensor], Tensor], projections: Any, inputs: list[Tensor]) -> bool:
        def mlp(x: Tensor) -> Tensor:
            gate, up = torch.cat([projections[name](x) for name in into], -1).chunk(2, -1)
            return projections[down](function(gate) * up)

        return _agrees(module, mlp, inputs, {"_modules": dict(projections.items())})

    for approximate, function in _ACTIVATIONS.items():
        if agrees(function, small, inputs) and agrees(function, narrow, [inputs[1].bfloat16()]):
            return swap, {"_approximate": approximate}
    return None


def _rotary(module: nn.Module) -> Swap | None:
    forward = type(module).forward
    while isinstance(forward, types.FunctionType) and hasattr(forward, "__wrapped__"):
        if not any(_holds(cell, forward.__wrapped__) for cell in forward.__closure__ or ()):
            return None  # a decorator that cannot be put around another function
        forward = forward.__wrapped__
    if not isinstance(forward, types.FunctionType):
        return None
    for name in forward.__code__.co_names:
        theirs = forward.__globals__.get(name)
        if "rotary" in name and callable(theirs) and _is_our_rotary(theirs):
            return _Rotary, {"_function": name}
    return None


def _is_our_rotary(theirs: Any) -> bool:
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8)
    for size in (8, 4):  # all of head_dim, and a part of it, which some refuse
        cos, sin = torch.randn(2, 2, 5, size // 2)
        try:
            turned = theirs(q.clone(), k.clone(), torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
        except Exception:  # a function of another kind
            if size == 8:
                return False
            continue
        ours = apply_rotary_emb_qk(q, k, cos, sin, backend="reference")
        if not (isinstance(turned, tuple) and len(turned) == 2 and all(map(_same, turned, ours))):
            return False
    return True


def _halves_repeat(model: nn.Module) -> bool:
    """Whether all that makes cos and sin in the model makes them of two equal halves: our op reads the first."""
    found = False
    for module in model.modules():
        frequencies = {name: b for name, b in module._buffers.items() if name.endswith("inv_freq") and b is not None}
        if not frequencies:
            continue
        # The frequencies themselves may be on any device, or on none.
        parts = {"_buffers": {name: torch.rand(b.shape) for name, b in frequencies.items()}}
        x, positions = torch.randn(1, 4, 8), torch.arange(4)[None]
        for layer_type in getattr(module, "layer_types", None) or [None]:
            given = {} if layer_type is None else {"layer_type": layer_type}
            made = _run(module, x, positions, parts=parts, **given)
            if not (isinstance(made, tuple) and len(made) == 2 and all(torch.equal(*t.chunk(2, -1)) for t in made)):
                return False
        found = True
    return found


class _GivesHidden(nn.Module):
    """Stands for what a model computes before its head."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return self.__dict__.get(name, self)  # its parts too: self.model.decoder(...)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _hidden_output()(last_hidden_state=self.hidden)


@functools.cache
def _hidden_output() -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    class Hidden(BaseModelOutput):
        """The last hidden state, and None for whatever else a model's own output has."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Hidden


def _loss(module: Any) -> Swap | None:
    head = _head_of(module)
    if head is None or not _is_plain(module._modules[head]) or hasattr(module, "_loss_function"):
        return None
    signature = inspect.signature(type(module).forward).parameters
    arguments = tuple(signature)[1:]
    if "labels" not in arguments:
        return None
    vocab = module._modules[head].out_features
    hidden, labels = 10 * torch.randn(2, 6, 8), torch.randint(vocab, (2, 6))
    given: dict[str, Any] = {"input_ids": labels.clone(), "labels": labels, "return_dict": True}
    given |= {"use_cache": False, "output_router_logits": False}
    if not any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        given = {name: value for name, value in given.items() if name in arguments}
    labels[0, 2:4] = -100
    before = {name: _GivesHidden(hidden) for name in module._modules if name != head}
    small = nn.Linear(8, vocab, bias=module._modules[head].bias is not None)
    parts: Parts = {"_modules": {**before, head: small}}
    theirs = _run(module, training=True, parts=parts, **given)
    for stand_in in (_WithLazyHead, _AsInstance):
        try:
            ours = type(module).forward(stand_in(_probe(module, True, parts), head, may_be_made=False), **given)
        except Exception:  # it needs the logits
            continue
        if _same(getattr(ours, "loss", None), getattr(theirs, "loss", torch.empty(0))):
            options = {"_head": head, "_arguments": arguments, "_stand_in": stand_in}
            return _CausalLM, {**options, "_has_default_loss": _has_default_loss(type(module))}
    return None


def _has_default_loss(model: type) -> bool:
    from transformers import PreTrainedModel

    return inspect.getattr_static(model, "loss_function", None) is inspect.getattr_static(PreTrainedModel, "loss_function")


def _head_of(module: Any) -> str | None:
    """The name of the child that gives a transformers model's logits."""
    if not hasattr(module, "get_output_embeddings") or not hasattr(module, "config"):
        return None
    try:
        head = module.get_output_embeddings()
    except Exception:  # where a model has none
        return None
    return next((name for name, child in module._modules.items() if child is not None and child is head), None)


_RECOGNISE: dict[str, Callable[[nn.Module], Swap | None]] = {
    "norm": _norm,
    "activation": _activation,
    "rotary": _rotary,
    "loss": _loss,
}

# --- public ---------------------------------------------------------------------------------------------------------


def patch(
    model: nn.Module, *, norm: bool = True, activation: bool = True, rotary: bool = True, loss: bool = True
) -> dict[str, list[str]]:
    """Let our kernels compute a transformers model's norms, MLP activations, rotary embedding and loss, in place.

    Returns the names of the modules by what was swapped ("norm", "activation", "rotary", "loss"), those that an earlier
    call swapped included. The model may be wrapped (PEFT, DDP); a module whose forward another library has replaced on the
    instance is left alone. Other models of the process do not change. `unpatch` undoes it.

    The loss is swapped in models that take a cross-entropy of what their head (`get_output_embeddings()`) gives. While such a
    model is in training mode and gets labels, its logits are not made: outputs.logits is a `LazyLogits`, which makes them when
    something is computed from it, and only until the weights change. In eval mode, without labels, with logits_to_keep, or
    with another `model.loss_function`, all is as before; loss=False makes the logits in training too.

    Raises TypeError where model is not a module, ValueError where nothing was found to swap.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, allowed is a torch.nn.Module")
    wanted = {"norm": norm, "activation": activation, "rotary": rotary, "loss": loss}
    kinds = [kind for kind, on in wanted.items() if on]
    swapped: dict[str, list[str]] = {kind: [] for kind in kinds}
    with _probing():
        if rotary and not _halves_repeat(model):
            kinds.remove("rotary")
        inner: set[int] = set()
        for name, module in model.named_modules():
            found = None if isinstance(module, _Swapped) else _recognise(module, kinds, inner)
            if found is not None:
                original: Any = type(module)
                module.__class__ = _class_of(original, found[0], tuple(found[1].items()))
            if isinstance(module, (_GatedMLP, _PackedMLP)):
                inner.update(id(child) for child in module.children())  # its activation is not called any more
            if isinstance(module, _Swapped) and module._kind in swapped:
                swapped[module._kind].append(name)
    if not any(swapped.values()):
        raise ValueError(f"model: found nothing to swap in {type(model).__name__} (looked for {', '.join(swapped)})")
    return swapped


@contextlib.contextmanager
def _probing() -> Iterator[None]:
    """What is found depends on the model alone: not on default dtype and device, autocast or a forced backend. Random numbers
    of its own: the run that follows must not change."""
    dtype = torch.get_default_dtype()
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        backend("auto"),
    ):
        torch.default_generator.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _recognise(module: nn.Module, kinds: list[str], inner: set[int]) -> Swap | None:
    if "forward" in module.__dict__ or id(module) in inner:
        return None
    return next((found for kind in kinds if (found := _RECOGNISE[kind](module)) is not None), None)


def unpatch(model: nn.Module) -> None:
    """Give every module that `patch` swapped its own class back. Harmless where nothing is swapped.

    Raises ValueError, and changes nothing, where something was wrapped around a swapped forward since (accelerate's mixed
    precision and hooks, FSDP2, parametrizations): that must be undone first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, need a torch.nn.Module")
    swapped = [(name, module) for name, module in model.named_modules() if isinstance(module, _Swapped)]
    for name, module in swapped:
        # accelerate, when it unwraps, leaves the class's forward on the instance.
        own = getattr(module.forward, "__func__", None) is type(module).forward
        if "_original" not in vars(type(module)) or not own:
            raise ValueError(
                f"model: {name or type(module).__name__} was wrapped after patch(); undo that first "
                "(accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
            )
    for _, module in swapped:
        module.__dict__.pop("forward", None)
        module.__class__ = type(module)._original


__all__ = ["patch", "unpatch"]
