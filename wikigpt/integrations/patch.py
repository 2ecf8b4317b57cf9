"""patch(model): a transformers model computes its norms, MLP activations, rotary embedding and loss with our kernels.

What is swapped is found by behaviour: each candidate runs once, on the CPU, on random numbers and with random weights of
its own shape, and is swapped if it gave what our op gives. So there is no list of models, and what only looks alike (a
norm with another formula, an MLP with sparsity, logits that are scaled) is left alone.

A swap changes the module's class to a subclass of its class with another `forward`. Nothing is stored in the module:
parameters, state dict, hooks, `isinstance`, names and copies stay as they are, and `unpatch` sets the class back. Where a
call is not what our op computes (mixed dtypes, a LoRA on the head), the subclass hands it to the original `forward`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wikigpt.kernels import bias_gelu, geglu, layer_norm, linear_cross_entropy, rms_norm, swiglu
from wikigpt.kernels._dispatch import forced_backend
from wikigpt.kernels.rotary import apply_rotary_emb_qk

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


class _RMSNorm(_Swapped):
    _kind = "norm"
    weight: Tensor
    _eps: str
    _unit_offset: bool

    def forward(self, x: Tensor) -> Tensor:
        if _nothing_to_gain(x) or x.dtype != self.weight.dtype:  # which dtype comes out differs from model to model
            return super().forward(x)
        return rms_norm(x, self.weight, getattr(self, self._eps), unit_offset=self._unit_offset)


class _LayerNorm(_Swapped):
    _kind = "norm"
    weight: Tensor
    bias: Tensor | None
    _eps: str

    def forward(self, x: Tensor) -> Tensor:
        if _nothing_to_gain(x) or x.dtype != self.weight.dtype:
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, getattr(self, self._eps))


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
    act_fn: Any

    def forward(self, x: Tensor) -> Tensor:
        if _nothing_to_gain(x):
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden = swiglu(gate, up) if self._approximate is None else geglu(gate, up, self._approximate)
        return self.down_proj(hidden)


class _Rotary(_Swapped):
    """An attention whose forward finds ours under the name `_function`."""

    _kind = "rotary"
    _function: str


class _CausalLM(_Swapped):
    _kind = "loss"
    _base: str
    _arguments: tuple[str, ...]
    _output: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self
        # `_loss_function` is where transformers keeps what the user has set as model.loss_function.
        ours = self.training and model.config.return_dict and _is_plain(model.lm_head)
        if not ours or hasattr(self, "_loss_function"):
            return super().forward(*args, **kwargs)
        given = {**dict(zip(self._arguments, args)), **kwargs}
        labels, keep = given.pop("labels", None), given.pop("logits_to_keep", 0)
        if labels is None or not isinstance(keep, int) or keep != 0 or given.get("return_dict") is False:
            return super().forward(*args, **kwargs)
        outputs = getattr(self, self._base)(**given)
        loss = _next_token_loss(
            outputs.last_hidden_state,
            model.lm_head,
            labels,
            getattr(model.config, "final_logit_softcapping", None),
            given.get("num_items_in_batch"),
            given.get("ignore_index", -100),
            given.get("shift_labels"),
        )
        kept = {name: value for name, value in outputs.items() if name in self._output.__dataclass_fields__}
        return self._output(loss=loss, logits=None, **kept)


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


def _next_token_loss(
    hidden: Tensor,
    head: Any,
    labels: Tensor,
    softcap: float | None,
    num_items: Tensor | int | None,
    ignore_index: int,
    shift_labels: Tensor | None,
) -> Tensor:
    """transformers' ForCausalLMLoss of the logits that are not made. hidden (B, S, D), labels and shift_labels (B, S)."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    logits = shift_labels.numel() * head.out_features
    loss = linear_cross_entropy(
        hidden,
        head.weight,
        shift_labels.to(hidden.device),
        linear_bias=head.bias,
        reduction="mean" if num_items is None else "sum",
        ignore_index=ignore_index,
        softcap=softcap or 0.0,
        # 1 MiB of logits stays in the processor's cache, and the plain way has fewer calls around it.
        backend="reference" if _nothing_to_gain(hidden) and logits < 2**18 else None,
    )
    if num_items is None:
        return loss
    return loss / (num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items)


def _with_our_rotary(forward: Any, name: str) -> types.FunctionType:
    """The same forward, with other globals: those of its module stay, for the models that are not patched."""
    theirs = forward.__globals__[name]

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Under autocast q and k are narrower than cos; theirs gives the wider dtype, and attention narrows it again.
        plain = q.dtype == cos.dtype or torch.is_autocast_enabled(q.device.type)
        if args or kwargs or not plain or q.dim() != 4 or _nothing_to_gain(q):
            return theirs(q, k, cos, sin, *args, **kwargs)
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]  # (B or 1, S, R / 2)
        if cos.shape[0] == 1:
            cos, sin = cos[0], sin[0]
        return apply_rotary_emb_qk(q, k, cos, sin)

    # Without __name__, or torch.compile would look for the function in their module.
    return _copy_of(forward, {**{k: v for k, v in forward.__globals__.items() if k != "__name__"}, name: rotate})


# --- recognising them -----------------------------------------------------------------------------------------------

Swap = tuple[Any, dict[str, Any]]  # a class of the above and its attributes


def _same(theirs: Any, ours: Tensor) -> bool:
    return (
        isinstance(theirs, Tensor)
        and theirs.shape == ours.shape
        and theirs.dtype == ours.dtype
        and torch.allclose(theirs, ours, rtol=2e-5, atol=2e-5)
    )


def _run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the class's forward gives; None where it fails. _parameters and _modules take the place of the module's."""
    probe = copy.copy(module)
    parts = {name: kwargs.pop(name) for name in ("_parameters", "_modules") if name in kwargs}
    probe.__dict__.update(_buffers=dict(module._buffers), **parts)
    try:
        return type(module).forward(probe, *args, **kwargs)
    except Exception:  # code of any kind, asked whether it is something that we know
        return None


def _takes_one_argument(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2


def _norm(module: nn.Module) -> Swap | None:
    given = {name: p for name, p in module._parameters.items() if p is not None}
    if "weight" not in given or given.keys() - {"weight", "bias"} or module._buffers or module._modules:
        return None
    eps = next((name for name in ("eps", "variance_epsilon") if isinstance(getattr(module, name, None), float)), None)
    if eps is None or given["weight"].dim() != 1 or not _takes_one_argument(module):
        return None
    n = given["weight"].shape[0]
    # Rows of this size show where eps is added.
    x = torch.randn(4, n) * torch.tensor([[getattr(module, eps) ** 0.5], [1.0], [1.0], [30.0]]) + torch.randn(4, 1)
    x[0] -= x[0].mean()
    weights: dict[str, Any] = {**dict.fromkeys(module._parameters), **{name: torch.randn(n) for name in given}}
    theirs = _run(module, x, _parameters=weights)
    weight, bias, number = weights["weight"], weights.get("bias"), getattr(module, eps)
    if bias is None:
        for unit_offset in (False, True):
            if _same(theirs, rms_norm(x, weight, number, unit_offset=unit_offset, backend="reference")):
                return _RMSNorm, {"_eps": eps, "_unit_offset": unit_offset}
    if hasattr(module, "bias") and _same(theirs, layer_norm(x, weight, bias, number, backend="reference")):
        return _LayerNorm, {"_eps": eps}
    return None


_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: F.silu,
    "none": F.gelu,
    "tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _activation(module: nn.Module) -> Swap | None:
    if not _takes_one_argument(module):
        return None
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= module._modules.keys():
        gate, up, down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        x = 3 * torch.randn(64, 8)
        theirs = _run(module, x, _modules={**module._modules, "gate_proj": gate, "up_proj": up, "down_proj": down})
        for approximate, function in _ACTIVATIONS.items():
            if _same(theirs, down(function(gate(x)) * up(x))):
                return _GatedMLP, {"_approximate": approximate}
    if not (module._modules or module._parameters or module._buffers):
        x = 3 * torch.randn(1024)
        theirs = _run(module, x)
        for approximate in ("none", "tanh"):
            if _same(theirs, _ACTIVATIONS[approximate](x)):
                return _GELU, {"_approximate": approximate}
    return None


def _rotary(module: nn.Module) -> Swap | None:
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType):
        return None
    for name in forward.__code__.co_names:
        theirs = forward.__globals__.get(name)
        if "rotary" not in name or not callable(theirs):
            continue
        q, k, cos, sin = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
        try:
            turned = theirs(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
        except Exception:  # a function of another kind
            continue
        if all(map(_same, turned, apply_rotary_emb_qk(q, k, cos, sin, backend="reference"))):
            return _Rotary, {"_function": name}
    return None


def _halves_repeat(model: nn.Module) -> bool:
    """Whether all that makes cos and sin in the model makes them of two equal halves: our op reads the first."""
    found = False
    for module in model.modules():
        frequencies = [buffer for name, buffer in module._buffers.items() if name.endswith("inv_freq") and buffer is not None]
        if not frequencies:
            continue
        x = torch.randn(1, 4, 8, device=frequencies[0].device)
        positions = torch.arange(4, device=x.device)[None]
        for layer_type in getattr(module, "layer_types", [None]):
            given = {} if layer_type is None else {"layer_type": layer_type}
            made = _run(module, x, positions, **given)
            if not (isinstance(made, tuple) and len(made) == 2 and all(torch.equal(*t.chunk(2, -1)) for t in made)):
                return False
        found = True
    return found


class _GivesHidden(nn.Module):
    """Stands for the transformer under a head."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)


def _loss(module: Any) -> Swap | None:
    base = getattr(module, "base_model_prefix", None)
    if not base or module._modules.keys() != {base, "lm_head"} or not _is_plain(module.lm_head):
        return None
    if hasattr(module, "_loss_function"):  # the user has set model.loss_function
        return None
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if not {"labels", "logits_to_keep"} <= set(arguments):
        return None
    vocab = module.lm_head.out_features
    hidden, labels = 10 * torch.randn(2, 6, 8), torch.randint(vocab, (2, 6))
    labels[0, 2:4] = -100
    head = nn.Linear(8, vocab, bias=module.lm_head.bias is not None)
    theirs = _run(
        module,
        labels=labels,
        num_items_in_batch=7,
        return_dict=True,
        _modules={base: _GivesHidden(hidden), "lm_head": head},
    )
    softcap = getattr(module.config, "final_logit_softcapping", None)
    ours = _next_token_loss(hidden, head, labels, softcap, 7, -100, None)
    if not _same(getattr(theirs, "loss", None), ours):
        return None
    options = {"_base": base, "_arguments": arguments, "_output": type(theirs)}
    return _CausalLM, options


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

    The loss is swapped in models whose forward is transformer, `lm_head`, next-token cross-entropy. While such a model is in
    training mode and gets labels, its logits are never made: outputs.logits is None. In eval mode, without labels, with
    logits_to_keep, or with another `model.loss_function`, all is as before; loss=False keeps the logits in training too.

    Raises TypeError where model is not a module, ValueError where nothing was found to swap.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, allowed is a torch.nn.Module")
    wanted = {"norm": norm, "activation": activation, "rotary": rotary, "loss": loss}
    kinds = [kind for kind, on in wanted.items() if on]
    swapped: dict[str, list[str]] = {kind: [] for kind in kinds}
    # Random numbers of its own: the run that follows must not change. On the CPU whatever the default device is.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.default_generator.manual_seed(0)
        if rotary and not _halves_repeat(model):
            kinds.remove("rotary")
        inner: set[int] = set()
        for name, module in model.named_modules():
            found = None if isinstance(module, _Swapped) else _recognise(module, kinds, inner)
            if found is not None:
                original: Any = type(module)
                module.__class__ = _class_of(original, found[0], tuple(found[1].items()))
            if isinstance(module, _GatedMLP):
                inner.add(id(module.act_fn))
            if isinstance(module, _Swapped) and module._kind in swapped:
                swapped[module._kind].append(name)
    if not any(swapped.values()):
        raise ValueError(f"model: found nothing to swap in {type(model).__name__} (looked for {', '.join(swapped)})")
    return swapped


def _recognise(module: nn.Module, kinds: list[str], inner: set[int]) -> Swap | None:
    if "forward" in module.__dict__ or id(module) in inner:
        return None
    return next((found for kind in kinds if (found := _RECOGNISE[kind](module)) is not None), None)


def unpatch(model: nn.Module) -> None:
    """Give every module that `patch` swapped its own class back. Harmless where nothing is swapped.

    Raises ValueError, and changes nothing, where something was wrapped around a swapped forward since (accelerate's mixed
    precision and hooks, FSDP2, parametrizations): that must be undone first.
    """
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
