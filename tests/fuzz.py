"""Random calls of the public functions, and what has to hold for each.

A call is plain data (`Call`, `T`), so that a failing one prints as Python which makes it again. It holds if the result agrees
with float64 by the numeric rule on every backend that this machine has, or if every backend refuses it with a ValueError or a
TypeError whose text names an argument. The strategies are in fuzz_calls.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import wikigpt.kernels
from torch import Tensor
from wikigpt.kernels import backend as forced
from wikigpt.kernels import explain

KERNELS = str(Path(wikigpt.kernels.__file__).parent)
FLOAT32 = torch.finfo(torch.float32).eps
SLOW = "triton"  # interpreted: a part of the examples


# --- a call as data -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class T:
    """A tensor. fill: "normal", or numbers to choose from; values: exactly these. The gaps of its memory hold NaN."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "dense"
    grad: bool = False
    fill: str | tuple[Any, ...] = "normal"
    values: tuple[Any, ...] | None = None
    device: str = "cpu"
    seed: int = 0

    def __repr__(self) -> str:
        given = [repr(self.shape)]
        for f in dataclasses.fields(self)[1:]:
            value = getattr(self, f.name)
            if value != f.default:
                given.append(f"{f.name}={_code(value)}")
        return f"T({', '.join(given)})"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def make(self, wide: bool = False, wobble: int = 0, eps: float = 0.0, device: str | None = None) -> Tensor:
        """wide: the same numbers in float64. wobble: a seed of changes of the numbers by `eps`, up or down."""
        device = device or self.device
        dtype = self.torch_dtype
        if device == "meta":
            dtype = torch.float64 if wide and dtype.is_floating_point else dtype
            return torch.empty(self.shape, dtype=dtype, device="meta").requires_grad_(self.grad and dtype.is_floating_point)
        rng = torch.Generator().manual_seed(self.seed)
        if self.values is not None:
            x = torch.tensor(self.values).to(dtype).reshape(self.shape)  # a narrow dtype wraps what it cannot hold
        elif self.fill == "normal":
            x = torch.randn(self.shape, generator=rng)
            x = x.to(dtype) if dtype.is_floating_point else (3 * x).to(dtype)
        else:
            choices = torch.tensor(self.fill).to(dtype)
            x = choices[torch.randint(len(choices), self.shape, generator=rng)]
        if wide and dtype.is_floating_point:
            x = x.double()
            if wobble:
                x = lay_out(x, "expanded") if self.layout == "expanded" else x
                signs = torch.randint(2, self.shape, generator=rng.manual_seed(self.seed + wobble)).double() * 2 - 1
                # Large numbers are masks: to add a score to one loses it in every dtype, which plain PyTorch shows.
                x = torch.where(x.abs() < 100, x * (1 + eps * signs), x)
        # Changed numbers are no longer equal along a dimension.
        x = lay_out(x, "dense" if wobble and self.layout == "expanded" else self.layout)
        return x.requires_grad_() if self.grad and x.is_floating_point() else x


def _code(value: Any) -> str:
    """Python that makes the value again."""
    if isinstance(value, float) and value != value:
        return 'float("nan")'
    if isinstance(value, float) and abs(value) == float("inf"):
        return f'float("{value}")'
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        inside = ", ".join(map(_code, value)) + ("," if isinstance(value, tuple) and len(value) == 1 else "")
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    return repr(value)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in memory of another order, or with gaps, in which nothing may be read."""

    def gap(*shape: int) -> Tensor:
        if x.is_floating_point():
            return torch.full(shape, float("nan"), dtype=x.dtype)
        return torch.full(shape, 1 if x.dtype == torch.bool else 99, dtype=x.dtype)

    if layout == "expanded" and x.dim() and x.shape[0] > 1:
        return x[:1].clone().expand(x.shape)
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "heads_first" and x.dim() >= 4:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "batch_last" and x.dim() >= 2:
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "offset":
        buffer = gap(x.numel() + 1)[1:].view(x.shape)
    elif layout == "sliced" and x.dim():
        buffer = gap(*x.shape[:-1], x.shape[-1] + 3)[..., 1 : 1 + x.shape[-1]]
    elif layout == "rows" and x.dim() >= 2:
        buffer = gap(*x.shape[:-2], 2 * x.shape[-2], x.shape[-1])[..., ::2, :]
    elif layout == "every_second" and x.dim():
        buffer = gap(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
    else:
        return x
    return buffer.copy_(x)


LAYOUTS = ("dense", "transposed", "heads_first", "batch_last", "offset", "sliced", "rows", "every_second", "expanded")


@dataclass(frozen=True)
class Call:
    """function(**arguments). upstream: which of the outputs that have a gradient get one from above."""

    function: str
    arguments: dict[str, Any]
    upstream: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={_code(value)}" for name, value in self.arguments.items())
        upstream = "" if self.upstream is None else f", upstream={self.upstream}"
        return f'Call("{self.function}", dict({inside}){upstream})'

    def snippet(self) -> str:
        return f"from tests.fuzz_calls import *\ncheck({self!r})"

    def tensors(self) -> dict[str, T]:
        """By name, those in lists too."""
        found = {}
        for name, value in self.arguments.items():
            for i, one in enumerate(value if isinstance(value, (list, tuple)) else [value]):
                if isinstance(one, T):
                    found[f"{name}[{i}]" if isinstance(value, (list, tuple)) else name] = one
        return found


@dataclass
class Fuzzed:
    """A public function as the fuzz test sees it."""

    function: Callable[..., Any]
    op: str | None = None  # its row in the table of implementations
    torch: Callable[[Call, dict[str, Any]], Any] | None = None  # PyTorch's; NotImplemented: it has no such options
    accepts: bool = False  # what PyTorch's accepts, and nothing more
    truth: Callable[[Call], bool] = lambda call: True  # whether the reference says what is right
    names: tuple[str, ...] = ()  # of arguments beyond the signature's
    written: Callable[[Call], tuple[str, ...]] = lambda call: ()  # arguments that the call writes into, by its documentation
    index_errors: bool = False
    narrow: bool = True  # whether it computes in the dtype of its input; False: in float32 at least
    same_dropout: tuple[str, ...] = ("reference", "cpu", "triton")
    more: Callable[[Call], dict[str, float]] = lambda call: {}  # further error to be allowed, by output
    exact: bool = False  # results are compared exactly, and only between the backends of `same_dropout`
    meta: bool = True
    extra: Callable[[Call, dict[str, Any]], None] = lambda call, results: None  # what else has to hold
    compare: Callable[[Call, str], bool] = lambda call, backend: True
    skip: Callable[[Call, str, Any], bool] = lambda call, backend, base: False  # documented differences between backends
    parameters: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = [n for n in inspect.signature(self.function).parameters if n not in ("args", "kwargs", "backend")]
        self.parameters = (*names, *self.names)

    def backends(self) -> list[str]:
        if self.op is None:
            return ["reference"]
        return [name for name, missing in explain(self.op, "cpu") if missing is None]


FUNCTIONS: dict[str, Fuzzed] = {}


# --- what a call gives ----------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    error: Exception | None = None
    stage: str = "forward"
    values: dict[str, Tensor] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)  # arguments that the call wrote into
    warned: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.error is not None:
            text = str(self.error).strip().split("\n")[0]
            return f"{type(self.error).__name__} in the {self.stage}: {text}"
        return ", ".join(f"{n} {str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" for n, v in self.values.items())


def flatten(result: Any, prefix: str = "out") -> Iterator[tuple[str, Tensor]]:
    if isinstance(result, Tensor):
        yield prefix, result
    elif isinstance(result, (tuple, list)):
        fields = getattr(result, "_fields", range(len(result)))
        for name, one in zip(fields, result):
            yield from flatten(one, f"{prefix}.{name}")


def _bytes(x: Tensor) -> Tensor:
    storage = x.detach().untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage).clone()  # type: ignore[call-overload]


def built(call: Call, **how: Any) -> dict[str, Any]:
    def one(name: str, value: Any) -> Any:
        if isinstance(value, T):
            return value.make(**how)
        if isinstance(value, list) and any(isinstance(v, T) for v in value):
            return [one(name, v) for v in value]
        return value

    return {name: one(name, value) for name, value in call.arguments.items()}


def _tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, list):
            found |= {f"{name}[{i}]": v for i, v in enumerate(value) if isinstance(v, Tensor)}
    return found


def evaluate(call: Call, function: Callable[..., Any], backend: str | None = None, **how: Any) -> Outcome:
    """Forward and backward. `how` goes to T.make."""
    outcome = Outcome()
    arguments = built(call, **how)
    tensors = _tensors(arguments)
    before = {name: _bytes(x) for name, x in tensors.items() if x.device.type == "cpu"}
    with warnings.catch_warnings(record=True) as warned, forced(backend) if backend else contextlib.nullcontext():
        warnings.simplefilter("always")
        torch.manual_seed(0)
        try:
            result = function(**arguments)
            if result is NotImplemented:
                outcome.error = NotImplementedError("PyTorch has no such options")
                return outcome
            outputs = dict(flatten(result))
            outcome.values = {name: x.detach() for name, x in outputs.items()}
            outcome.changed = [name for name, was in before.items() if not torch.equal(_bytes(tensors[name]), was)]
            spec = FUNCTIONS[call.function]
            for name in spec.written(call):
                outcome.values.update({n: x.detach().clone() for n, x in tensors.items() if n.split("[")[0] == name})
            outcome.stage = "backward"
            _differentiate(call, outcome, outputs, tensors)
        except Exception as error:
            outcome.error = error
    outcome.warned = [str(w.message) for w in warned if str(w.filename).startswith(KERNELS)]
    return outcome


def _differentiate(call: Call, outcome: Outcome, outputs: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    leaves = {name: x for name, x in tensors.items() if x.requires_grad and x.is_leaf}
    with_gradient = [(i, name) for i, name in enumerate(outputs) if outputs[name].requires_grad]
    chosen = [(i, name) for i, name in with_gradient if call.upstream is None or i in call.upstream]
    outcome.values |= {f"grad of {name}": torch.zeros_like(leaf) for name, leaf in leaves.items()}
    if not leaves or not chosen:
        return
    grads = []
    for i, name in chosen:
        x = outputs[name]
        if x.is_meta:
            grads.append(torch.empty_like(x))
        else:
            # In float16's numbers, so that every dtype gets the same ones.
            g = torch.randn(x.shape, generator=torch.Generator().manual_seed(100 + i)).half().to(x.dtype)
            grads.append(torch.where(x.detach().float().isinf(), torch.zeros_like(g), g))
    found = torch.autograd.grad([outputs[n] for _, n in chosen], list(leaves.values()), grads, allow_unused=True)
    for name, grad in zip(leaves, found):
        if grad is not None:
            outcome.values[f"grad of {name}"] = grad.detach()


# --- what has to hold -----------------------------------------------------------------------------------------------


class Finding(AssertionError):
    """One property that a call breaks. `key` tells one fault from another."""

    def __init__(self, call: Call, what: str, details: str, backend: str = ""):
        self.call, self.what, self.backend, self.details = call, what, backend, details
        words = re.sub(r"\(.*?\)|\[.*?\]|'.*?'|torch\.\w+|c10::\w+|-?[\d.]\S*", "", details.split("\n")[0].split(";")[0])
        self.key = (call.function, what, "" if backend == "auto" else backend, words[:80])
        where = f" [{backend}]" if backend else ""
        super().__init__(f"{call.function}{where}: {what}: {details}\n\n{call.snippet()}")


def _names_an_argument(spec: Fuzzed, text: str) -> bool:
    return bool(set(re.findall(r"[A-Za-z_]\w*", text)) & set(spec.parameters))


def _check_refusal(call: Call, spec: Fuzzed, outcome: Outcome, backend: str) -> None:
    error = outcome.error
    assert error is not None
    allowed: tuple[type[Exception], ...] = (ValueError, TypeError, *((IndexError,) if spec.index_errors else ()))
    if outcome.stage == "backward":
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        raise Finding(call, "the backward fails", f"{type(error).__name__}: {error}\n{where}", backend)
    if spec.accepts and isinstance(error, RuntimeError):
        allowed = (*allowed, RuntimeError)  # PyTorch's own, of what it was handed
    if not isinstance(error, allowed):
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        raise Finding(call, "another error than ValueError or TypeError", f"{type(error).__name__}: {error}\n{where}", backend)
    if not _names_an_argument(spec, str(error)):
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        raise Finding(call, "an error that names no argument", f"{type(error).__name__}: {error}\n{where}", backend)


def documented(error: Exception | None) -> bool:
    """A refusal of one backend that names another which computes it, or that says why it cannot run on such a device."""
    return error is not None and bool(re.search(r"backend=|'torch' was asked for|cannot compute \w+ on meta", str(error)))


def check(call: Call, slow: bool = True) -> None:
    """Finding, if a property is broken. slow: also the backend that is interpreted."""
    spec = FUNCTIONS[call.function]
    base = evaluate(call, spec.function, "reference" if "reference" in spec.backends() and spec.op else None)
    if base.error is not None:
        _check_refusal(call, spec, base, "reference")
    backends = [name for name in spec.backends() if name != "reference" and (slow or name != SLOW)]
    outcomes = {"reference": base}
    if spec.op:
        outcomes["auto"] = evaluate(call, spec.function)
    outcomes |= {name: evaluate(call, spec.function, name) for name in backends}
    for name, outcome in outcomes.items():
        if spec.skip(call, name, base) or (name != "reference" and documented(outcome.error)):
            continue
        if outcome.error is not None and base.error is None:
            _check_refusal(call, spec, outcome, name)
            raise Finding(call, "refused by one backend alone", f"{outcome}; the reference gives {base}", name)
        if base.error is not None and outcome.error is None:
            raise Finding(call, "the reference alone refuses", f"{base}; it gives {outcome}", name)
        if type(outcome.error) is not type(base.error):
            raise Finding(call, "another type of error than the reference's", f"{outcome}; the reference: {base}", name)
        if outcome.warned:
            raise Finding(call, "a warning", outcome.warned[0], name)
        wrong = [n for n in outcome.changed if n.split("[")[0] not in spec.written(call)]
        if wrong:
            raise Finding(call, "an input is changed", ", ".join(wrong), name)
    _against_torch(call, spec, base)
    if base.error is not None or any(x.is_meta for x in base.values.values()):
        return
    outcomes = {n: o for n, o in outcomes.items() if o.error is None and not spec.skip(call, n, base)}
    _numbers(call, spec, outcomes)
    spec.extra(call, outcomes)
    if spec.meta:
        _against_meta(call, spec, base)


def _against_torch(call: Call, spec: Fuzzed, base: Outcome) -> None:
    if spec.torch is None or not spec.accepts or len({t.device for t in call.tensors().values()}) > 1:
        return
    theirs = evaluate(call, lambda **arguments: spec.torch(call, arguments))  # type: ignore[misc]
    if isinstance(theirs.error, NotImplementedError) and "no such options" in str(theirs.error):
        return
    if theirs.error is None and base.error is not None:
        raise Finding(call, "PyTorch accepts it", f"{base}; PyTorch gives {theirs}")
    if theirs.error is not None and base.error is None:
        raise Finding(call, "PyTorch refuses it", f"{theirs}; ours gives {base}")


def _against_meta(call: Call, spec: Fuzzed, base: Outcome) -> None:
    meta = evaluate(call, spec.function, device="meta")
    if meta.error is not None:
        where = "".join(traceback.format_tb(meta.error.__traceback__)[-2:])
        raise Finding(call, "no result on meta tensors", f"{meta}\n{where}", "meta")
    for name, x in base.values.items():
        other = meta.values.get(name)
        if other is None or (other.shape, other.dtype) != (x.shape, x.dtype):
            raise Finding(call, "another result on meta tensors", f"{name}: {meta}; on the CPU {base}", "meta")


def _numbers(call: Call, spec: Fuzzed, outcomes: dict[str, Outcome]) -> None:
    plain = outcomes["reference"]
    dropout = call.arguments.get("dropout_p") or 0.0
    for name, outcome in outcomes.items():
        if list(outcome.values) != list(plain.values):
            raise Finding(call, "other results", f"{outcome}; the reference gives {plain}", name)
        for key, x in plain.values.items():
            if (outcome.values[key].dtype, outcome.values[key].shape) != (x.dtype, x.shape):
                raise Finding(call, "another dtype or shape", f"{key}: {outcome}; the reference gives {plain}", name)
    random = ("auto", "torch") if dropout > 0 else ()
    if "auto" in random and "triton" not in outcomes and "cpu" in spec.backends():
        random = ("torch",)
    if spec.exact:
        return
    if not spec.truth(call):
        return
    truth, wobbles = _truth(call, spec)
    if truth.error is not None:
        raise Finding(call, "float64 is refused", str(truth))
    more = spec.more(call)
    dtypes = [t.dtype for t in call.tensors().values() if t.torch_dtype.is_floating_point]
    tiny = 1e-11 if set(dtypes) == {"float64"} else 32 * FLOAT32  # float64 beside narrower tensors may be computed in float32
    theirs = evaluate(call, lambda **a: spec.torch(call, a)) if spec.torch is not None and not dropout else None  # type: ignore[misc]
    narrowed = _in_the_dtype_of_scores(call)
    if narrowed is not call:
        theirs = evaluate(narrowed, spec.function, "reference")
    for name, outcome in outcomes.items():
        if name == "reference" or name in random or not spec.compare(call, name):
            continue
        for key, expected in truth.values.items():
            near = [w.values[key] for w in wobbles if key in w.values]
            beside = [plain.values[key]]
            if theirs is not None and key in theirs.values and theirs.values[key].shape == expected.shape:
                beside.append(theirs.values[key])
            message = disagreement(outcome.values[key], beside, expected, near, more.get(key, 0.0), tiny)
            if message:
                raise Finding(call, "a wrong number", f"{key}: {message}", name)
    # The reference itself, against PyTorch's float64.
    if spec.torch is not None and not dropout:
        wide = evaluate(call, lambda **a: spec.torch(call, a), wide=True)  # type: ignore[misc]
        for key, expected in wide.values.items() if wide.error is None else ():
            near = [w.values[key] for w in wobbles]
            if key in truth.values and truth.values[key].shape == expected.shape:
                message = disagreement(truth.values[key], [truth.values[key]], _wide(expected), near, 0.0, 1e-11)
                if message:
                    raise Finding(call, "another number than PyTorch's", f"{key}: {message}", "reference")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128) if x.is_complex() else x.double()


def _in_the_dtype_of_scores(call: Call) -> Call:
    """Scores are float32 but of float64 queries, and take a bias in float64 as float32. PyTorch would promote them."""
    tensors = call.tensors()
    wide = [n for n in ("attn_bias", "alibi_slopes", "s_aux") if n in tensors and tensors[n].dtype == "float64"]
    if not wide or next(iter(tensors.values())).dtype == "float64":
        return call
    return dataclasses.replace(
        call, arguments={n: dataclasses.replace(x, dtype="float32") if n in wide else x for n, x in call.arguments.items()}
    )


def _truth(call: Call, spec: Fuzzed) -> tuple[Outcome, list[Outcome]]:
    """(float64, the same of inputs that differ by the rounding of their dtype: how much the problem itself amplifies it)."""
    name = "reference" if spec.op else None
    truth = evaluate(call, spec.function, name, wide=True)
    dtypes = [t.torch_dtype for t in call.tensors().values() if t.torch_dtype.is_floating_point]
    eps = max((torch.finfo(d).eps for d in dtypes), default=FLOAT32)
    if not spec.narrow:
        eps = FLOAT32
    if dtypes and all(d == torch.float64 for d in dtypes):
        eps = torch.finfo(torch.float64).eps
    return truth, [evaluate(call, spec.function, name, wide=True, wobble=i, eps=eps) for i in (1, 2)]


def disagreement(ours: Tensor, beside: list[Tensor], truth: Tensor, near: list[Tensor], more: float, tiny: float) -> str | None:
    """The numeric rule: the error against float64 is at most twice plain PyTorch's or what a rounding of the inputs makes, plus
    the rounding of the result and a tiny term. Where plain PyTorch or the rounded problem is not finite nothing is asked; where
    the truth is not finite, ours is not."""
    if truth.is_complex():
        ours, truth = torch.view_as_real(ours), torch.view_as_real(truth).double()
        beside, near = ([torch.view_as_real(x) for x in tensors] for tensors in (beside, near))
    if not truth.is_floating_point():
        # Which of two nearly equal numbers is the larger hangs on their rounding.
        known = torch.stack([ours == x for x in (beside[0], truth, *near)]).any(0)
        return None if known.all() else f"got {ours.tolist()}, the reference has {beside[0].tolist()}"
    if truth.numel() == 0:
        return None
    ours64, dtype = ours.double(), ours.dtype
    plains = [x.double() for x in beside] + near
    limit = 0.9 * torch.finfo(dtype).max
    agree = torch.ones_like(truth, dtype=torch.bool)
    for x in plains:
        agree &= (x.isfinite() & truth.isfinite() & (truth.abs() < limit)) | ((x == truth) | (x.isnan() & truth.isnan()))
    infinite = agree & ~truth.isfinite()
    different = infinite & ~((ours64 == truth) | (ours64.isnan() & truth.isnan()))
    if different.any():
        at = tuple(different.nonzero()[0].tolist())
        return f"not the same infinity or NaN: got {float(ours64[at])}, float64 has {float(truth[at])} at {at}"
    at_all = agree & truth.isfinite()
    if not at_all.any():
        return None
    zero = torch.zeros_like(truth)
    worst = max(float(torch.where(at_all, x - truth, zero).abs().max()) for x in plains)
    error = torch.where(at_all, ours64 - truth, zero).abs()
    largest = float(torch.where(at_all, truth, zero).abs().max())
    eps = torch.finfo(dtype).eps
    allowed = 2 * worst + (eps + tiny) * largest + tiny + eps / 4 + more + torch.finfo(dtype).smallest_normal
    if allowed > limit:
        return None
    if not ours64[at_all].isfinite().all():
        at = tuple((at_all & ~ours64.isfinite()).nonzero()[0].tolist())
        return f"not finite: got {float(ours64[at])}, float64 has {float(truth[at]):.4g} at {at}"
    if float(error.max()) <= allowed:
        return None
    at = tuple((error == error.max()).nonzero()[0].tolist())
    return (
        f"error {float(error.max()):.3g}, allowed {allowed:.3g}: got {float(ours64[at]):.6g}, float64 has "
        f"{float(truth[at]):.6g} at {at} (largest {largest:.3g}, plain PyTorch's error {worst:.3g})"
    )
