"""The public functions of wikigpt.kernels as the fuzz test calls them: strategies, PyTorch's counterparts, known limits."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import wikigpt.kernels as K
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from wikigpt.kernels import layers

from tests.fuzz import FLOAT32, FUNCTIONS, LAYOUTS, Call, Finding, Fuzzed, Outcome, T, built, check, evaluate

NAN, INF = math.nan, math.inf
Draw = Callable[[st.SearchStrategy[Any]], Any]
STRATEGIES: dict[str, st.SearchStrategy[Call]] = {}

# What a call takes part of its time for in no test: these names compute nothing, or give what others compute.
NO_CALLS = {"BACKENDS", "CrossEntropyAux", "backend", "debug_checks", "explain", "layers", "ops"}


# --- parts ----------------------------------------------------------------------------------------------------------


def one(*values: Any) -> st.SearchStrategy[Any]:
    """The first is what a failing call is shrunk to."""
    return st.sampled_from(values)


@dataclass(frozen=True)
class Option:
    """Values that an option may have, and wrong ones."""

    good: tuple[Any, ...]
    wrong: tuple[Any, ...]


def seldom(draw: Draw, n: int = 8) -> bool:
    """Once in n times."""
    return draw(st.integers(0, n - 1)) == n - 1


FLOATING = ("float32", "float16", "bfloat16", "float64")
ODD = ("int64", "int32", "bool", "complex64", "float8_e4m3fn", "uint8", "int16", "int8", "complex128", "float8_e5m2")
DTYPES, ODD_DTYPES = one(*FLOATING), one(*ODD)
SIZES = one(2, 1, 3, 5, 8, 17, 33, 0)
LENGTHS = one(3, 1, 2, 5, 17, 33, 40, 0)
FEATURES = one(4, 1, 2, 3, 5, 7, 16, 17, 33, 64, 100, 0)
HEAD_DIMS = one(4, 16, 1, 2, 3, 8, 17, 33, 64, 80)
PROBABILITIES = Option((0.2, 0.5, 0.0), (1.0, -0.1, NAN, 2.0))
TINY = 2.0**-20


def otherwise(t: T, **change: Any) -> T:
    """The tensor with another dtype, shape, layout or device, and numbers that there are then."""
    if t.values is not None and "shape" in change:
        change |= {"values": None, "fill": (0, 1)}
    if change.get("dtype") in ODD:
        change["grad"] = False
        if t.values is None:
            change["fill"] = "normal"  # numbers to choose from may not exist in this dtype
    return dataclasses.replace(t, **change)


def neighbours(call: Call) -> Iterator[Call]:
    """The call with one of its tensors otherwise in one way: each dtype, size, rank and layout, and another device."""
    for name, t in call.arguments.items():
        if not isinstance(t, T):
            continue
        shape = t.shape
        shapes = {(), (1, *shape), (1, 1, *shape), shape[1:], shape[:-1], (*shape, 1)}
        for i, n in enumerate(shape):
            shapes |= {(*shape[:i], other, *shape[i + 1 :]) for other in (0, 1, max(n - 1, 0), n + 1, 2 * n)}
        changes: list[dict[str, Any]] = [{"dtype": dtype} for dtype in (*FLOATING, *ODD)]
        changes += [{"shape": shape} for shape in sorted(shapes)]
        changes += [{"layout": layout} for layout in LAYOUTS]
        for change in (*changes, {"device": "meta"}):
            other = otherwise(t, **change)
            if other != t:
                yield dataclasses.replace(call, arguments=call.arguments | {name: other})


class Arguments:
    """The arguments of one call, drawn one after the other. One call of four is spoiled: only there something is invalid."""

    def __init__(self, draw: Draw):
        self.draw = draw
        self.dtype = draw(DTYPES)
        self.spoiled = draw(st.integers(0, 3)) == 3
        self.found: dict[str, Any] = {}
        self.seed = draw(st.integers(0, 3))

    def tensor(self, name: str, shape: Sequence[int], dtype: str | None = None, *, grad: bool = False, **more: Any) -> None:
        draw, dtype = self.draw, dtype or self.dtype
        self.seed += 1
        layout = draw(st.sampled_from(LAYOUTS)) if draw(st.booleans()) else "dense"
        grad = grad and draw(one(False, True, True))
        self.found[name] = T(tuple(shape), dtype, layout, grad, seed=self.seed, **more)

    def maybe(self, name: str, option: Option | st.SearchStrategy[Any], n: int = 4) -> None:
        if seldom(self.draw, n):
            self.found[name] = self.value(option) if isinstance(option, Option) else self.draw(option)

    def value(self, option: Option) -> Any:
        return self.draw(one(*(option.wrong if self.wrong(2) else option.good)))

    def wrong(self, n: int) -> bool:
        """Once in n times of the spoiled calls."""
        return self.spoiled and seldom(self.draw, n)

    def spoil(self, *names: str) -> None:
        """Makes one of the tensors wrong: rank, size, dtype, device."""
        present = [n for n in names if isinstance(self.found.get(n), T)]
        if not self.spoiled or not present:
            return
        draw = self.draw
        name = draw(st.sampled_from(present))
        t = self.found[name]
        how = draw(
            one("size", "rank", "more rank", "dtype", "other float", "scalar", *(["device"] if len(present) > 1 else []))
        )
        shape, change = t.shape, dict[str, Any]()
        if how == "size" and shape:
            i = draw(st.integers(0, len(shape) - 1))
            change["shape"] = (*shape[:i], draw(one(shape[i] + 1, 0, 1, 2 * shape[i])), *shape[i + 1 :])
        elif how == "rank" and shape:
            change["shape"] = shape[1:]
        elif how == "more rank":
            change["shape"] = (1, *shape)
        elif how == "scalar":
            change["shape"] = ()
        elif how == "dtype":
            change["dtype"] = draw(ODD_DTYPES)
        elif how == "other float":
            change["dtype"] = draw(DTYPES)
        elif how == "device":
            change["device"] = "meta"
        self.found[name] = otherwise(t, **change)

    def call(self, function: str, upstream: int = 1) -> Call:
        chosen = None
        if upstream > 1:
            chosen = self.draw(one(None, (0,), tuple(range(1, upstream))))
        return Call(function, self.found, chosen)


def calls(function: str) -> Callable[[Callable[[Arguments], int | None]], None]:
    """Enters a strategy: a function that fills in Arguments and gives the number of outputs with a gradient."""

    def enter(fill: Callable[[Arguments], int | None]) -> None:
        @st.composite
        def strategy(draw: Draw) -> Call:
            a = Arguments(draw)
            return a.call(function, fill(a) or 1)

        STRATEGIES[function] = strategy()

    return enter


def broadcast(draw: Draw, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape that broadcasts to this one."""
    kept = [n if draw(st.booleans()) else 1 for n in shape]
    return tuple(kept[draw(st.integers(0, len(shape))) :]) if draw(st.booleans()) else tuple(kept)


# --- attention ------------------------------------------------------------------------------------------------------

SCALES = Option((0.5, 0.0, 1.0, 8.0, 1e4), (-0.5, NAN, INF))
WINDOWS = Option(
    ((0, 0), (3, -1), (-1, 2), (5, 1), (10**6, 10**6), (np.int64(2), 0)),
    ((-2, 0), (1.5, 0), (1,), None, (None, None), (0, -3)),
)
SOFTCAPS = Option((1.5, 30.0, 0.0, 1e-3), (-1.0, NAN, INF, None))
BIAS = (0.0, 1.0, -2.5, 0.3)
BIASES = one(
    "normal", (*BIAS, -INF), (*BIAS, -1e4), (-1e4,), (*BIAS, -1e9, -1e30), (-1e30,), (-3.3e38,), (*BIAS, -3.3e38), (-INF, -1e9)
)
MASK = (True, True, False)


def sizes(draw: Draw) -> dict[str, int]:
    groups = draw(one(1, 2, 3))
    n = {
        "batch": draw(one(1, 2, 3, 0) if seldom(draw, 6) else one(1, 2)),
        "s": draw(LENGTHS),
        "t": draw(LENGTHS),
        "groups": groups,
        "heads": groups * draw(one(1, 2, 3)),
        "dim": draw(HEAD_DIMS),
    }
    n["v_dim"] = draw(HEAD_DIMS) if seldom(draw, 4) else n["dim"]
    if seldom(draw, 12):
        n["dim"] = n["v_dim"] = draw(one(264, 256, 320, 0))
    if seldom(draw, 20):
        n["heads"] = draw(one(0, 5))
    return n


def flash_options(a: Arguments, n: dict[str, int], sequences: int, packed: bool = False) -> int:
    """The options that flash_attn_func and its relatives have in common; how many outputs have a gradient."""
    draw = a.draw
    a.maybe("dropout_p", PROBABILITIES, 6)
    a.maybe("softmax_scale", SCALES, 5)
    if draw(st.booleans()):
        a.found["causal"] = True
    a.maybe("window_size", WINDOWS, 4)
    a.maybe("softcap", SOFTCAPS, 6)
    if seldom(draw, 5):
        shape = (n["heads"],) if draw(st.booleans()) else (sequences, n["heads"])
        a.tensor("alibi_slopes", shape, draw(one("float32", a.dtype)), fill=(0.5, 0.25, 0.0, 1.0), grad=seldom(draw, 10))
    a.maybe("deterministic", one(True), 8)
    if draw(st.booleans()):
        a.found["return_attn_probs"] = True
    if seldom(draw, 5):
        a.tensor("s_aux", (n["heads"],), draw(one("float32", a.dtype)), grad=True)
    return 2 if "return_attn_probs" in a.found else 1


def masks(a: Arguments, n: dict[str, int]) -> None:
    full = (n["batch"], n["heads"], n["s"], n["t"])
    if seldom(a.draw, 5):
        a.tensor("attn_bias", broadcast(a.draw, full), a.draw(one(a.dtype, "float32")), grad=True, fill=a.draw(BIASES))
    if seldom(a.draw, 5):
        a.tensor("attn_mask", broadcast(a.draw, full), "bool", fill=a.draw(one(MASK, (True, False), (False,))))


def used_keys(a: Arguments, most: Sequence[int]) -> None:
    if seldom(a.draw, 5):
        values = [a.draw(st.integers(0, m)) for m in most]
        if values and a.wrong(3):
            values[-1] = a.draw(one(-1, most[-1] + 1, 2**31 - 1))
        a.found["seqused_k"] = T((len(values),), "int32", values=tuple(values))


def more_of_attention(call: Call) -> dict[str, float]:
    """The error in gradients from keeping `out` in its dtype between forward and backward, as every flash attention does:
    d score is p * (dO.V - rowsum(dO * O)), so a rounding of O enters as a gradient of lse. It is the larger of the two where
    rows have one key or two and d score cancels to nearly 0."""
    spec, tensors = FUNCTIONS[call.function], call.tensors()
    if not any(t.grad for t in tensors.values()):
        return {}
    first = next(iter(tensors.values()))
    eps = max(torch.finfo(first.torch_dtype).eps, FLOAT32) if first.dtype != "float64" else 1e-13
    if call.function == "scaled_dot_product_attention":
        return _more_of_sdpa(call, eps)
    with_lse = {**call.arguments, "return_attn_probs": True}
    arguments = built(Call(call.function, with_lse), wide=True)
    torch.manual_seed(0)
    with K.backend("reference"):
        out, lse, _ = spec.function(**arguments)
    lse = lse.T if lse.dim() == 2 else lse.transpose(1, 2)
    found = _saving(out, lse, {n: x for n, x in arguments.items() if isinstance(x, Tensor)}, call, eps)
    if call.arguments.get("softcap") and found:
        # Near 1 a tanh in float32 is off by 2^-25, and so 1 - tanh^2 by 2^-24, times a weight's d score of 1/4; the scale
        # multiplies it, and the other factor of the score.
        factors = [arguments[name] for name in ("q", "k", "qkv", "kv") if name in arguments]
        largest = max(float(x.detach().abs().max()) for x in factors if x.numel())
        capped = FLOAT32 / 8 * abs(call.arguments.get("softmax_scale") or 1.0) * largest
        found = {name: error + capped for name, error in found.items()}
    return found


def _saving(out: Tensor, lse: Tensor, tensors: dict[str, Tensor], call: Call, eps: float) -> dict[str, float]:
    leaves = {name: x for name, x in tensors.items() if x.requires_grad}
    if not leaves or out.numel() == 0:
        return {}
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(100)).to(out)
    errors = (upstream * out).abs().sum(-1).detach()
    lse = lse.expand(errors.shape)
    # lse is kept in float32: of a row that lies at -1e4 it says less of the weights, and from some size on nothing.
    of_weights = 2 * (FLOAT32 * lse.detach().abs().nan_to_num(0, 0, 0)).clamp(max=0.02)
    errors = errors * (eps + of_weights)
    result = {f"grad of {name}": 4 * float((of_weights * upstream.abs().amax(-1)).max()) for name in leaves}
    if not lse.requires_grad:
        return result
    for seed in (1, 2):  # of either sign, since the errors of many rows meet in dk and dv
        signs = torch.randint(2, lse.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        loss = (lse.masked_fill(lse.isinf(), 0) * errors * signs).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, retain_graph=True)
        for name, grad in zip(leaves, grads):
            if grad is not None and grad.numel():
                key = f"grad of {name}"
                result[key] = max(result[key], 2 * float(grad.nan_to_num(0, 0, 0).abs().max()))
    return result


def _more_of_sdpa(call: Call, eps: float) -> dict[str, float]:
    a = built(call, wide=True)
    q, k, v, mask = a["query"], a["key"], a["value"], a.get("attn_mask")
    if any(isinstance(x, Tensor) and x.numel() == 0 for x in a.values()):
        return {}
    if a.get("enable_gqa"):
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scale = a.get("scale")
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if a.get("is_causal"):
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -INF)
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
    empty = (scores == -INF).all(-1, keepdim=True)
    lse = scores.masked_fill(empty, 0).logsumexp(-1)
    out = scores.masked_fill(empty, 0).softmax(-1) @ v
    return _saving(out, lse, {n: x for n, x in a.items() if isinstance(x, Tensor)}, call, eps)


def _flash(name: str, function: Callable[..., Any], **options: Any) -> None:
    names = tuple(
        name
        for flash in (K.flash_attn_func, K.flash_attn_varlen_func)
        for name in inspect.signature(flash).parameters
        if name != "backend"
    )
    FUNCTIONS[name] = Fuzzed(function, "flash_attention", names=names, more=more_of_attention, **options)


_flash("flash_attn_func", K.flash_attn_func)
_flash("flash_attn_qkvpacked_func", K.flash_attn_qkvpacked_func)
_flash("flash_attn_kvpacked_func", K.flash_attn_kvpacked_func)
_flash("flash_attn_varlen_func", K.flash_attn_varlen_func)
_flash("flash_attn_varlen_qkvpacked_func", K.flash_attn_varlen_qkvpacked_func)


@calls("flash_attn_func")
def _(a: Arguments) -> int:
    n = sizes(a.draw)
    a.tensor("q", (n["batch"], n["s"], n["heads"], n["dim"]), grad=True)
    a.tensor("k", (n["batch"], n["t"], n["groups"], n["dim"]), grad=True)
    a.tensor("v", (n["batch"], n["t"], n["groups"], n["v_dim"]), grad=True)
    outputs = flash_options(a, n, n["batch"])
    masks(a, n)
    used_keys(a, [n["t"]] * n["batch"])
    a.spoil("q", "k", "v", "alibi_slopes", "s_aux", "attn_bias", "attn_mask", "seqused_k")
    return outputs


@calls("flash_attn_qkvpacked_func")
def _(a: Arguments) -> int:
    n = sizes(a.draw)
    n["t"], n["heads"] = n["s"], n["groups"]
    a.tensor("qkv", (n["batch"], n["s"], 3, n["heads"], n["dim"]), grad=True)
    outputs = flash_options(a, n, n["batch"])
    masks(a, n)
    a.spoil("qkv", "alibi_slopes", "s_aux", "attn_bias", "attn_mask")
    return outputs


@calls("flash_attn_kvpacked_func")
def _(a: Arguments) -> int:
    n = sizes(a.draw)
    a.tensor("q", (n["batch"], n["s"], n["heads"], n["dim"]), grad=True)
    a.tensor("kv", (n["batch"], n["t"], 2, n["groups"], n["dim"]), grad=True)
    outputs = flash_options(a, n, n["batch"])
    masks(a, n)
    a.spoil("q", "kv", "alibi_slopes", "s_aux", "attn_bias", "attn_mask")
    return outputs


def ends(a: Arguments, sequences: int) -> tuple[list[int], int]:
    """(cu_seqlens, tokens): now and then with tokens behind the last sequence, or wrong."""
    draw = a.draw
    lengths = [draw(one(3, 1, 0, 5, 17)) for _ in range(sequences)]
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)
    tokens = cu[-1] + (draw(one(1, 4, 20)) if seldom(draw, 5) else 0)
    if a.wrong(4):
        cu[draw(st.integers(0, len(cu) - 1))] = draw(one(-1, tokens + 1, 10**6))
    return cu, tokens


def longest(a: Arguments, cu: list[int]) -> int:
    most = max((b - a for a, b in itertools.pairwise(cu)), default=0)
    if a.wrong(4):
        return a.draw(one(most - 1, -1))
    return most + 10 if seldom(a.draw, 6) else most


def packed_problem(a: Arguments, n: dict[str, int], sequences: int, names: str) -> list[int]:
    """Packed q, k and v, where their sequences end and the longest of each, under seven names; the keys of each sequence."""
    q_name, k_name, v_name, *lengths = names.split()
    (cu_q, q), (cu_k, k) = ends(a, sequences), ends(a, sequences)
    a.tensor(q_name, (q, n["heads"], n["dim"]), grad=True)
    a.tensor(k_name, (k, n["groups"], n["dim"]), grad=True)
    a.tensor(v_name, (k, n["groups"], n["v_dim"]), grad=True)
    a.found[lengths[0]], a.found[lengths[1]] = (T((len(cu),), "int32", values=tuple(cu)) for cu in (cu_q, cu_k))
    a.found[lengths[2]], a.found[lengths[3]] = longest(a, cu_q), longest(a, cu_k)
    return [max(y - x, 0) for x, y in itertools.pairwise(cu_k)]


@calls("flash_attn_varlen_func")
def _(a: Arguments) -> int:
    draw, n = a.draw, sizes(a.draw)
    sequences = draw(one(2, 1, 3, 0))
    keys = packed_problem(a, n, sequences, "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k")
    outputs = flash_options(a, n, sequences)
    used_keys(a, keys)
    a.spoil("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "s_aux", "seqused_k")
    return outputs


@calls("flash_attn_varlen_qkvpacked_func")
def _(a: Arguments) -> int:
    draw, n = a.draw, sizes(a.draw)
    n["heads"] = n["groups"]
    sequences = draw(one(2, 1, 3, 0))
    cu, tokens = ends(a, sequences)
    a.tensor("qkv", (tokens, 3, n["heads"], n["dim"]), grad=True)
    a.found["cu_seqlens"] = T((len(cu),), "int32", values=tuple(cu))
    a.found["max_seqlen"] = longest(a, cu)
    outputs = flash_options(a, n, sequences)
    a.spoil("qkv", "cu_seqlens", "alibi_slopes", "s_aux")
    return outputs


def _torch_varlen(call: Call, a: dict[str, Any]) -> Any:
    return NotImplemented  # PyTorch's runs on CUDA alone


def varlen_attn(*args: Any, aux: bool = False, **kwargs: Any) -> Any:
    from torch.nn.attention.varlen import AuxRequest

    return K.varlen_attn(*args, **kwargs, return_aux=AuxRequest(lse=True) if aux else None)


FUNCTIONS["varlen_attn"] = Fuzzed(
    varlen_attn,
    "flash_attention",
    more=lambda call: _more_of_varlen(call),
    names=(
        "query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "return_aux", "scale", "window_size", "enable_gqa",
        "seqused_k", "block_table", "num_splits",
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "max_seqlen", "softmax_scale",
    ),
    skip=lambda call, name, base: name == "torch",  # it gives no lse, which this function always computes
)  # fmt: skip


def _more_of_varlen(call: Call) -> dict[str, float]:
    names = {
        "query": "q", "key": "k", "value": "v", "cu_seq_q": "cu_seqlens_q", "cu_seq_k": "cu_seqlens_k",
        "max_q": "max_seqlen_q", "max_k": "max_seqlen_k", "scale": "softmax_scale", "window_size": "window_size",
        "seqused_k": "seqused_k",
    }  # fmt: skip
    if "block_table" in call.arguments:
        return {}
    same = Call("flash_attn_varlen_func", {names[n]: x for n, x in call.arguments.items() if n in names})
    back = {new: old for old, new in names.items()}
    return {f"grad of {back[n.removeprefix('grad of ')]}": x for n, x in more_of_attention(same).items()}


@calls("varlen_attn")
def _(a: Arguments) -> int:
    draw, n = a.draw, sizes(a.draw)
    sequences = draw(one(2, 1, 3, 0))
    keys = packed_problem(a, n, sequences, "query key value cu_seq_q cu_seq_k max_q max_k")
    if n["heads"] != n["groups"] and not a.wrong(4):
        a.found["enable_gqa"] = True
    a.maybe("scale", SCALES, 5)
    a.maybe("window_size", WINDOWS, 4)
    a.maybe("num_splits", Option((1, 3), (0, -1)), 10)
    if draw(st.booleans()):
        a.found["aux"] = True
    used_keys(a, keys)
    a.spoil("query", "key", "value", "cu_seq_q", "cu_seq_k", "seqused_k")
    return 2 if "aux" in a.found else 1


def _torch_sdpa(call: Call, a: dict[str, Any]) -> Any:
    if not 0 <= (a.get("dropout_p") or 0.0) <= 1:
        return NotImplemented  # PyTorch computes with NaN
    if any(isinstance(x, Tensor) and x.numel() == 0 for x in a.values()):
        return NotImplemented  # of nothing it takes any shapes
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(**a)


FUNCTIONS["scaled_dot_product_attention"] = Fuzzed(
    K.scaled_dot_product_attention,
    "attention",
    torch=_torch_sdpa,
    more=more_of_attention,
    accepts=True,
    compare=lambda call, name: name != "torch",  # PyTorch's kernel, with its errors at masks far from 0
)


@calls("scaled_dot_product_attention")
def _(a: Arguments) -> int:
    draw, n = a.draw, sizes(a.draw)
    lead = draw(one((n["batch"],), (), (n["batch"], 2)) if seldom(draw, 6) else one((n["batch"],)))
    heads, groups = (n["heads"],), (n["groups"],)
    if seldom(draw, 10):
        heads = groups = ()
    a.tensor("query", (*lead, *heads, n["s"], n["dim"]), grad=True)
    a.tensor("key", (*lead, *groups, n["t"], n["dim"]), grad=True)
    a.tensor("value", (*lead, *groups, n["t"], n["v_dim"]), grad=True)
    full = (*lead, *heads, n["s"], n["t"])
    if seldom(draw, 3):
        if draw(st.booleans()):
            a.tensor("attn_mask", broadcast(draw, full), "bool", fill=draw(one(MASK, (True, False), (False,))))
        else:
            dtype = draw(one(a.dtype, a.dtype, "float32"))
            a.tensor("attn_mask", broadcast(draw, full), dtype, grad=True, fill=draw(BIASES))
    elif draw(st.booleans()):
        a.found["is_causal"] = True
    a.maybe("dropout_p", PROBABILITIES, 8)
    a.maybe("scale", SCALES, 5)
    if heads != groups and not seldom(draw, 8):
        a.found["enable_gqa"] = True
    a.spoil("query", "key", "value", "attn_mask")
    return 1


FUNCTIONS["attention_weights"] = Fuzzed(K.attention_weights)


@calls("attention_weights")
def _(a: Arguments) -> int:
    draw, n = a.draw, sizes(a.draw)
    a.tensor("query", (n["batch"], n["heads"], n["s"], n["dim"]), grad=True)
    a.tensor("key", (n["batch"], n["groups"], n["t"], n["dim"]), grad=True)
    full = (n["batch"], n["heads"], n["s"], n["t"])
    if seldom(draw, 3):
        if draw(st.booleans()):
            a.tensor("attn_mask", broadcast(draw, full), "bool", fill=draw(one(MASK, (True, False), (False,))))
        else:
            a.tensor("attn_mask", broadcast(draw, full), grad=True, fill=draw(BIASES))
    if draw(st.booleans()):
        a.found["is_causal"] = True
    a.maybe("scale", SCALES, 5)
    if seldom(draw, 5):
        a.tensor("alibi_slopes", (n["heads"],), "float32", fill=(0.5, 0.25, 0.0, 1.0))
    a.spoil("query", "key", "attn_mask", "alibi_slopes")
    return 1


FUNCTIONS["alibi_slopes"] = Fuzzed(K.alibi_slopes, truth=lambda call: False, meta=False)
calls("alibi_slopes")(lambda a: a.found.update(n_heads=a.draw(one(1, 2, 3, 8, 12, 100, 0, -1, 2.5, None, np.int64(4), True))))


def _caches(call: Call) -> tuple[str, ...]:
    return ("k_cache", "v_cache") if "k" in call.arguments else ()


FUNCTIONS["flash_attn_with_kvcache"] = Fuzzed(
    K.flash_attn_with_kvcache, "flash_attn_with_kvcache", written=_caches, names=("window_size",)
)


@calls("flash_attn_with_kvcache")
def _(a: Arguments) -> int:
    draw, n = a.draw, sizes(a.draw)
    batch, t = n["batch"], max(n["t"], 1) if not seldom(draw, 10) else n["t"]
    n["s"] = draw(one(1, 2, 5, 0)) if seldom(draw, 4) else 1
    paged = seldom(draw, 3)
    a.tensor("q", (batch, n["s"], n["heads"], n["dim"]))
    if paged:
        size, pages = draw(one(4, 1, 3, 16)), draw(one(3, 1, 2))
        stored = max(batch * pages + draw(one(0, 2)), 1)
        a.tensor("k_cache", (stored, size, n["groups"], n["dim"]))
        a.tensor("v_cache", (stored, size, n["groups"], n["v_dim"]))
        table = draw(st.permutations(range(stored)))[: batch * pages]
        if table and a.wrong(4):
            table = [*table[:-1], draw(one(-1, stored, 2**31 - 1))]
        a.found["block_table"] = T((batch, pages), "int32", values=tuple(table))
        t = size * pages
    else:
        rows = batch + (draw(one(0, 1, 2)) if seldom(draw, 4) else 0)
        a.tensor("k_cache", (rows, t, n["groups"], n["dim"]))
        a.tensor("v_cache", (rows, t, n["groups"], n["v_dim"]))
        if seldom(draw, 5):
            chosen = draw(st.permutations(range(max(rows, batch))))[:batch]
            if chosen and a.wrong(3):
                chosen = [*chosen[:-1], draw(one(-1, rows))]
            a.found["cache_batch_idx"] = T((batch,), "int32", values=tuple(chosen))
    for name in ("k_cache", "v_cache"):
        if a.found[name].layout in ("expanded", "transposed", "every_second", "batch_last"):  # documented: the last one dense
            a.found[name] = T(a.found[name].shape, a.dtype, "sliced", seed=a.found[name].seed)
    new = draw(one(1, 2, 0, 5)) if seldom(draw, 2) else None
    if new is not None:
        a.tensor("k", (batch, new, n["groups"], n["dim"]))
        a.tensor("v", (batch, new, n["groups"], n["v_dim"]))
        if seldom(draw, 3) and n["dim"] >= 2:
            shape = (t + n["s"] + draw(one(0, 5)), draw(one(n["dim"] // 2, 1)))
            dtype = draw(one("float32", a.dtype))
            for name, seed in (("rotary_cos", 1), ("rotary_sin", 2)):
                a.found[name] = T(shape, dtype, fill=(0.6, 0.8, -0.6, 1.0), seed=seed)
            a.maybe("rotary_interleaved", one(False), 2)
    room = max(t - (new or 0), 0)
    if new is not None or draw(st.booleans()):
        lengths = [draw(st.integers(0, room)) for _ in range(batch)]
        if lengths and seldom(draw, 6):
            lengths[-1] = -1  # a sequence that is idle
        if lengths and a.wrong(3):
            lengths[-1] = draw(one(room + 1, t + 5))
        if seldom(draw, 4):
            a.found["cache_seqlens"] = a.value(Option((room, 0), (t + 1, -1)))
        else:
            a.found["cache_seqlens"] = T((batch,), "int32", values=tuple(lengths))
    if seldom(draw, 6):
        values = tuple(draw(st.integers(0, t)) for _ in range(batch))
        a.found["cache_leftpad"] = T((batch,), "int32", values=values)
    a.maybe("softmax_scale", SCALES, 5)
    if draw(st.booleans()):
        a.found["causal"] = True
    a.maybe("window_size", WINDOWS, 5)
    a.maybe("softcap", SOFTCAPS, 6)
    if seldom(draw, 5):
        shape = (n["heads"],) if draw(st.booleans()) else (batch, n["heads"])
        a.tensor("alibi_slopes", shape, "float32", fill=(0.5, 0.25, 0.0, 1.0))
    a.maybe("num_splits", Option((1, 2, 5, 128), (129, -1)), 5)
    if draw(st.booleans()):
        a.found["return_softmax_lse"] = True
    if seldom(draw, 5):
        a.tensor("s_aux", (n["heads"],), "float32")
    a.spoil("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx",
            "cache_leftpad", "block_table", "alibi_slopes", "s_aux")  # fmt: skip
    return 1


# --- norms ----------------------------------------------------------------------------------------------------------

EPS = Option((1e-5, 1e-12, 1.0, 0.0), (-1e-5, NAN, INF))


def _sum_before_norm(x: Tensor, a: dict[str, Any]) -> Any:
    """x + residual where PyTorch's sum has a norm's shape and dtype; takes residual and prenorm out of the arguments."""
    residual = a.pop("residual", None)
    if residual is None:
        return x
    fits = isinstance(residual, Tensor) and (residual.shape, residual.dtype) == (x.shape, x.dtype)
    return x + residual if fits else NotImplemented


def _torch_norm(call: Call, a: dict[str, Any]) -> Any:
    prenorm = a.pop("prenorm", False)
    x = _sum_before_norm(a["x"], a)
    if x is NotImplemented or set(a) - {"x", "weight", "bias", "eps"} or ("bias" in a and call.function == "rms_norm"):
        return NotImplemented
    if not (a.get("eps") or 0) >= 0:
        return NotImplemented  # nonsense that ours refuses and PyTorch computes with
    weight, bias = a.get("weight"), a.get("bias")
    some = weight if weight is not None else bias
    shape = tuple(x.shape[-1:]) if some is None else tuple(some.shape)
    if call.function == "rms_norm":
        y = F.rms_norm(x, shape, weight, a.get("eps", 1e-6))
    else:
        y = F.layer_norm(x, shape, weight, bias, a.get("eps", 1e-5))
    return (y, x) if prenorm else y


def _more_of_norm(call: Call) -> dict[str, float]:
    """A difference from the mean is divided by the deviation: of few features, nearly equal ones above all, it is rounding."""
    a = {name: x.detach() if isinstance(x, Tensor) else x for name, x in built(call, wide=True).items()}
    x = a.get("x", a.get("input", a.get("hidden_states")))
    if not x.numel() or x.is_complex():
        return {}
    if a.get("dropout_p"):  # as every backend drops it, from the seed of `evaluate`
        torch.manual_seed(0)
        _, x = K.layer_norm(x, residual=a.get("residual"), dropout_p=a["dropout_p"], prenorm=True, backend="reference")
    elif a.get("residual") is not None:
        x = x + a["residual"]
    eps = a.get("eps", a.get("variance_epsilon", 1e-6)) or FLOAT32
    spread = x.square().mean(-1) if "rms" in call.function.lower() else x.var(-1, correction=0)
    used = [one for one in (x, a.get("weight")) if one is not None and one.numel() and not one.is_meta]
    large = [1 + float(one.double().abs().max()) for one in used]
    double = all(t.dtype == "float64" for t in call.tensors().values())
    error = (1e-14 if double else 8 * FLOAT32) * math.prod(large) * float((spread + eps).rsqrt().max())
    if not math.isfinite(error):
        return {}
    names = ("x", "input", "hidden_states", "weight", "residual")
    of_grad = error
    if x.shape[-1] <= 3:
        # Their gradient is a difference of nearly equal numbers, and PyTorch rounds mean and deviation to 16 bits.
        narrow = torch.finfo(call.tensors().get("x", next(iter(call.tensors().values()))).torch_dtype).eps
        of_grad = max(error, error / (8 * FLOAT32) * 4 * narrow)
    return {"out": error, "out.0": error, **{f"grad of {name}": of_grad for name in names}}


def _norm_widens(call: Call) -> bool:
    """Ours takes any mixture of dtypes, PyTorch's does not."""
    return len({t.dtype for t in call.tensors().values()}) > 1


def _one_dtype(theirs: Callable[[Call, dict[str, Any]], Any]) -> Callable[[Call, dict[str, Any]], Any]:
    def function(call: Call, a: dict[str, Any]) -> Any:
        return NotImplemented if _norm_widens(call) else theirs(call, a)

    return function


for _name in ("layer_norm", "rms_norm"):
    FUNCTIONS[_name] = Fuzzed(
        getattr(K, _name), _name, torch=_one_dtype(_torch_norm), accepts=True, more=_more_of_norm,
        same_dropout=("reference", "triton"),
    )  # fmt: skip


def norm_arguments(a: Arguments, biased: bool = True) -> None:
    draw = a.draw
    hidden = draw(FEATURES)
    shape = (*draw(one((3,), (), (1,), (2, 3), (0,), (2, 1, 3))), hidden)
    a.tensor("x", shape, grad=True)
    other = draw(one(a.dtype, "float32"))
    if draw(st.booleans()):
        several = len(shape) > 1 and seldom(draw, 10)
        a.tensor("weight", shape[-2:] if several else (hidden,), other, grad=True)
    if biased and draw(st.booleans()):
        a.tensor("bias", a.found["weight"].shape if "weight" in a.found else (hidden,), other, grad=True)


@calls("layer_norm")
def _(a: Arguments) -> int:
    norm_arguments(a)
    return norm_options(a)


def norm_options(a: Arguments) -> int:
    a.maybe("eps", EPS, 5)
    if seldom(a.draw, 3):
        a.tensor("residual", a.found["x"].shape, a.draw(one(a.dtype, "float32")), grad=True)
    a.maybe("dropout_p", PROBABILITIES, 6)
    a.maybe("prenorm", one(True), 3)
    a.spoil("x", "weight", "bias", "residual")
    return 2 if "prenorm" in a.found else 1


@calls("rms_norm")
def _(a: Arguments) -> int:
    norm_arguments(a, biased=seldom(a.draw, 4))
    a.maybe("unit_offset", one(True), 5)
    outputs = norm_options(a)
    if seldom(a.draw, 20):
        a.found["eps"] = None
    return outputs


def _module(name: str) -> Callable[..., Any]:
    """The module's constructor and its forward as one function."""

    def function(x: Tensor, size: Any, weight: Tensor | None = None, bias: Tensor | None = None, **options: Any) -> Any:
        residual, dropout_p, prenorm = (
            options.pop("residual", None),
            options.pop("dropout_p", 0.0),
            options.pop("prenorm", False),
        )
        module = getattr(K, name)(size, **options)
        for key, value in (("weight", weight), ("bias", bias)):
            if value is not None and getattr(module, key, None) is not None:
                del module._parameters[key]
                setattr(module, key, value)
        return module(x, residual, dropout_p, prenorm)

    return function


def _torch_module(call: Call, a: dict[str, Any]) -> Any:
    """PyTorch's kernels, which ours may be as wrong as: of few features in 16 bits, quite."""
    name = call.function.removeprefix("layers.")
    x = a.get("x", a.get("input", a.get("hidden_states")))
    if a.pop("elementwise_affine", True) is False:
        a = {**a, "weight": None, "bias": None}
    if len({t.dtype for t in a.values() if isinstance(t, Tensor)}) > 1:
        return NotImplemented
    prenorm = a.pop("prenorm", False)
    x = _sum_before_norm(x, a)
    if x is NotImplemented or {"dropout_p", "unit_offset"} & set(a):
        return NotImplemented
    eps = a.get("eps", a.get("variance_epsilon", 1e-5 if name == "LayerNorm" else 1e-6))
    if name == "RMSNorm":
        y = F.rms_norm(x, x.shape[-1:], a.get("weight"), eps)
    else:
        y = F.layer_norm(x, x.shape[-1:], a.get("weight"), a.get("bias"), eps)
    return (y, x) if prenorm else y


_NORM_NAMES = (
    "normalized_shape",
    "eps",
    "elementwise_affine",
    "bias",
    "dtype",
    "device",
    "residual",
    "dropout_p",
    "unit_offset",
)
for _name, _op in (("LayerNorm", "layer_norm"), ("RMSNorm", "rms_norm")):
    FUNCTIONS[_name] = Fuzzed(
        _module(_name), _op, torch=_torch_module, names=_NORM_NAMES, more=_more_of_norm,
        same_dropout=("reference", "triton"), meta=False,
    )  # fmt: skip


def _norm_module(name: str) -> None:
    @calls(name)
    def _(a: Arguments) -> int:
        draw = a.draw
        norm_arguments(a, biased=name == "LayerNorm")
        hidden = a.found["x"].shape[-1]
        a.found["size"] = a.value(Option((hidden, (hidden,), [hidden]), (hidden + 1, (2, hidden))))
        a.maybe("elementwise_affine", one(False), 5)
        outputs = norm_options(a)
        if name == "RMSNorm":
            a.maybe("unit_offset", one(True), 5)
            if seldom(draw, 6):
                a.found["eps"] = None
        return outputs


_norm_module("LayerNorm")
_norm_module("RMSNorm")


# --- losses ---------------------------------------------------------------------------------------------------------


def loss_options(a: Arguments, classes: int, target: tuple[int, ...]) -> int:
    draw = a.draw
    if classes:
        values = [
            draw(one(0, classes - 1, classes // 2, -100)) if seldom(draw, 4) else 0 for _ in range(min(math.prod(target), 6))
        ]
        fill = tuple(values) if values else (0,)
        if a.wrong(3):
            fill = (*fill, draw(one(classes, -1, 2**40)))
        a.found["target"] = T(target, "int64", fill=fill, layout=draw(one("dense", "rows", "every_second")), seed=a.seed)
    else:
        a.found["target"] = T(target, "int64", fill=(0,))
    if seldom(draw, 4):
        a.tensor("weight", (classes,), draw(one("float32", a.dtype)), fill=(1.0, 0.5, 2.0, 0.0))
    a.maybe("reduction", Option(("sum", "none", "mean"), ("max", None)), 2)
    a.maybe("ignore_index", one(0, 1, -1, -100, 10**6), 5)
    a.maybe("label_smoothing", Option((0.1, 1.0, 0.0), (-0.1, 1.5, NAN)), 4)
    a.maybe("softcap", Option((5.0, 30.0, 0.0, 0.01), (-1.0, NAN, INF)), 5)
    a.maybe("z_loss", Option((1e-4, 0.1, 0.0), (-1.0, NAN, INF)), 5)
    a.maybe("return_aux", one(True), 4)
    return 3 if "return_aux" in a.found else 1


def _of_one_row(logits: Sequence[int], target: Tensor) -> Tensor:
    """PyTorch takes a target (1) with logits (V), and has no backward for it."""
    one = len(logits) == 1 and logits[0] != 1 and target.shape == (1,) and not target.is_floating_point()
    return target[0] if one else target


def _complex_weight(weight: Tensor | None) -> bool:
    """PyTorch refuses it too, but beside class probabilities, where the loss comes out complex."""
    return weight is not None and weight.is_complex()


def _torch_cross_entropy(call: Call, a: dict[str, Any]) -> Any:
    if set(a) & {"softcap", "z_loss", "return_aux", "inplace_backward"}:
        return NotImplemented
    if not 0 <= a.get("label_smoothing", 0.0) <= 1 or a["target"].dtype == torch.uint8:
        return NotImplemented  # PyTorch looks at the one only where there are rows, and takes the other in some of its kernels
    logits, target = a.pop("input"), a.pop("target")
    if logits.dim() > 2 and target.shape == logits.shape[:-1]:
        return NotImplemented  # classes last, as PyTorch does not have them
    if 0 in logits.shape:
        return NotImplemented  # it takes no classes where there are no rows; ours wants one at least
    if not logits.is_floating_point():
        return NotImplemented  # PyTorch computes with them where there are no rows
    if any(isinstance(x, Tensor) and x.is_floating_point() and x.itemsize == 1 for x in (logits, target, a.get("weight"))):
        return NotImplemented  # PyTorch takes none either, but what follows would widen them
    target = _of_one_row(logits.shape, target)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weight = a.pop("weight", None)
    if _complex_weight(weight):
        return NotImplemented
    if weight is not None and weight.dim() != 1:
        return NotImplemented  # with logits of more than two dimensions it counts the weights, whatever their shape
    target = target.to(wide) if target.is_floating_point() else target
    return F.cross_entropy(logits.to(wide), target, None if weight is None else weight.to(wide), **a)


def _ignores_what_is_closed(call: Call) -> bool:
    """Whether an ignored token may have logits of nothing but -inf: its gradient is 0 times NaN in PyTorch, and 0 in ours,
    which does not read them."""
    logits, target = call.arguments["input"], call.arguments["target"]
    ignored = call.arguments.get("ignore_index", -100)
    return -INF in tuple(logits.fill) and ignored in tuple(target.fill)


FUNCTIONS["cross_entropy"] = Fuzzed(
    K.cross_entropy, "cross_entropy", torch=_torch_cross_entropy, accepts=True, narrow=False, index_errors=True,
    compare=lambda call, name: not _ignores_what_is_closed(call),
    # The logits of an in-place backward are its gradient afterwards.
    written=lambda call: ("input",) if call.arguments.get("inplace_backward") else (),
)  # fmt: skip


@calls("cross_entropy")
def _(a: Arguments) -> int:
    draw = a.draw
    rows = draw(one((3,), (), (1,), (2, 3), (0,), (2, 0), (2, 1, 2)))
    classes = draw(one(5, 1, 2, 3, 17, 100, 0) if seldom(draw, 2) else one(5, 17))
    fill = draw(one("normal", (0.0, 1.0, -1e4), (0.0, -INF, 2.0), (60.0, -60.0, 0.5))) if seldom(draw, 4) else "normal"
    second = len(rows) > 1 and draw(st.booleans())  # as PyTorch has them; otherwise the classes are last
    shape = (rows[0], classes, *rows[1:]) if second else (*rows, classes)
    a.tensor("input", shape, grad=True, fill=fill)
    outputs = loss_options(a, classes, rows)
    if seldom(draw, 8):  # probabilities of the classes
        a.tensor("target", shape, draw(one("float32", a.dtype)), fill=(0.2, 0.0, 0.5))
    elif seldom(draw, 10):
        t = a.found["target"]
        a.found["target"] = T(t.shape, draw(one("uint8", "int32")), fill=tuple(max(x, 0) % 200 for x in t.fill))
    a.spoil("input", "target", "weight")
    return outputs


def _torch_linear_cross_entropy(call: Call, a: dict[str, Any]) -> Any:
    if set(a) & {"softcap", "z_loss", "return_aux", "filter_gradients"} or not hasattr(F, "linear_cross_entropy"):
        return NotImplemented
    if _complex_weight(a.get("weight")):
        return NotImplemented
    if 0 in a["linear_weight"].shape:
        return NotImplemented  # it takes no classes where every target is ignored; ours wants one at least
    if (
        not 0 <= a.get("label_smoothing", 0.0) <= 1
        or a["input"].dim() > 2
        or _norm_widens(Call("", {n: x for n, x in call.arguments.items() if n != "target"}))
    ):
        return NotImplemented
    if a["input"].dim() == 1 and a["linear_weight"].dim() == 2:
        a["target"] = _of_one_row(a["linear_weight"].shape[:1], a["target"])
    if not all(x.is_floating_point() for n, x in a.items() if isinstance(x, Tensor) and n != "target"):
        return F.linear_cross_entropy(**a)
    return F.linear_cross_entropy(**a).to(torch.float64 if a["input"].dtype == torch.float64 else torch.float32)


FUNCTIONS["linear_cross_entropy"] = Fuzzed(
    K.linear_cross_entropy, "linear_cross_entropy", torch=_torch_linear_cross_entropy, accepts=True, index_errors=True,
    compare=lambda call, name: not call.arguments.get("filter_gradients"),
)  # fmt: skip


@calls("linear_cross_entropy")
def _(a: Arguments) -> int:
    draw = a.draw
    shape = draw(one((3,), (), (1,), (2, 3), (0,), (17,)))
    classes = draw(one(5, 1, 2, 3, 17, 100, 0) if seldom(draw, 2) else one(5, 17))
    features = draw(one(4, 1, 3, 16, 17, 0))
    a.tensor("input", (*shape, features), grad=True)
    a.tensor("linear_weight", (classes, features), draw(one(a.dtype, "float32")) if seldom(draw, 5) else None, grad=True)
    outputs = loss_options(a, classes, shape)
    if seldom(draw, 4):
        a.tensor("linear_bias", (classes,), a.found["linear_weight"].dtype, grad=True)
    a.maybe("filter_gradients", one(True), 8)
    if seldom(draw, 10):  # probabilities of the classes
        a.tensor("target", (*shape, classes), draw(one("float32", a.dtype)), fill=(0.2, 0.0, 0.5))
    a.spoil("input", "linear_weight", "target", "weight", "linear_bias")
    return outputs


# --- activations ----------------------------------------------------------------------------------------------------

APPROXIMATE = Option(("tanh", "none"), ("erf", None))
FUNCTIONS["gelu"] = Fuzzed(K.gelu, "gelu", torch=lambda call, a: F.gelu(a["x"], approximate=a.get("approximate", "none")))


def _plain_bias_gelu(call: Call, a: dict[str, Any]) -> Any:
    x, bias = a["x"], a.get("bias")
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=a.get("approximate", "none"))


def _plain_gated(default: str | None) -> Callable[[Call, dict[str, Any]], Any]:
    """gelu with this default of `approximate`, or silu."""

    def plain(call: Call, a: dict[str, Any]) -> Any:
        gate, up = a["gate"].chunk(2, -1) if a.get("up") is None else (a["gate"], a["up"])
        gate, up = (x if b is None else x + b.to(x.dtype) for x, b in ((gate, a.get("gate_bias")), (up, a.get("up_bias"))))
        return (F.silu(gate) if default is None else F.gelu(gate, approximate=a.get("approximate", default))) * up

    return plain


for _name, _plain in (("bias_gelu", _plain_bias_gelu), ("swiglu", _plain_gated(None)), ("geglu", _plain_gated("tanh"))):
    FUNCTIONS[_name] = Fuzzed(getattr(K, _name), _name, torch=_plain, same_dropout=("reference", "triton"))


def activation_shape(draw: Draw, even: bool = False) -> tuple[int, ...]:
    features = draw(FEATURES)
    lead = draw(one((3,), (), (1,), (2, 3), (0,)))
    return (*lead, 2 * features if even and not seldom(draw, 20) else features)


@calls("gelu")
def _(a: Arguments) -> int:
    a.tensor("x", activation_shape(a.draw), grad=True)
    a.maybe("approximate", APPROXIMATE, 2)
    a.spoil("x")
    return 1


@calls("bias_gelu")
def _(a: Arguments) -> int:
    shape = activation_shape(a.draw)
    a.tensor("x", shape, grad=True)
    if a.draw(st.booleans()):
        a.tensor("bias", shape[-1:], a.draw(one(a.dtype, "float32")), grad=True)
    a.maybe("approximate", APPROXIMATE, 3)
    a.maybe("dropout_p", PROBABILITIES, 5)
    a.spoil("x", "bias")
    return 1


def _gated(name: str) -> None:
    @calls(name)
    def _(a: Arguments) -> int:
        draw = a.draw
        packed = draw(st.booleans())
        shape = activation_shape(draw, even=packed)
        a.tensor("gate", shape, grad=True)
        if not packed:
            a.tensor("up", shape, grad=True)
        features = shape[-1] // 2 if packed else shape[-1]
        for bias in ("gate_bias", "up_bias"):
            if seldom(draw, 3):
                a.tensor(bias, (features,), draw(one(a.dtype, "float32")), grad=True)
        if name == "geglu":
            a.maybe("approximate", APPROXIMATE, 3)
        a.maybe("dropout_p", PROBABILITIES, 5)
        a.spoil("gate", "up", "gate_bias", "up_bias")
        return 1


_gated("swiglu")
_gated("geglu")


# --- rotary ---------------------------------------------------------------------------------------------------------


def _rotated(call: Call) -> tuple[str, ...]:
    return ("x", "q", "k") if call.arguments.get("inplace") else ()


def _beyond(call: Call, name: str, base: Any) -> bool:
    """A position outside its table is an error with the reference and NaN with Triton."""
    return name == "triton" and isinstance(base.error, IndexError)


for _name in ("apply_rotary_emb", "apply_rotary_emb_qk"):
    FUNCTIONS[_name] = Fuzzed(getattr(K, _name), "rotary", written=_rotated, index_errors=True, skip=_beyond)


def rotary_arguments(a: Arguments, batch: int, length: int, dim: int) -> None:
    draw = a.draw
    pairs = draw(one(dim // 2, 1, 0)) if seldom(draw, 3) else dim // 2
    table = length
    dtype = draw(one(a.dtype, "float32"))
    if seldom(draw, 3):
        table = length + draw(one(0, 4))
        positions = draw(one((length,), (batch, length)))
        fill = tuple(range(table)) or (0,)
        a.found["positions"] = T(positions, draw(one("int64", "int32")), fill=(*fill, -1, table) if a.wrong(3) else fill)
        shape = (table, pairs)
    else:
        shape = draw(one((length, pairs), (batch, length, pairs), (1, length, pairs)))
    grad = seldom(draw, 6)
    a.tensor("cos", shape, dtype, grad=grad)
    a.tensor("sin", shape, dtype, grad=grad)
    a.maybe("interleaved", one(True), 2)
    if seldom(draw, 5):
        a.found["inplace"] = True
        for name in ("x", "q", "k"):
            if name in a.found and not a.wrong(3):
                t = a.found[name]
                a.found[name] = T(t.shape, t.dtype, t.layout, seed=t.seed)


@calls("apply_rotary_emb")
def _(a: Arguments) -> int:
    draw = a.draw
    batch, heads, length, dim = draw(one(2, 1, 0)), draw(one(2, 1, 3, 0)), draw(LENGTHS), draw(one(4, 8, 2, 16, 1, 3, 64, 0))
    a.tensor("x", (batch, heads, length, dim), grad=True)
    rotary_arguments(a, batch, length, dim)
    a.spoil("x", "cos", "sin", "positions")
    return 1


@calls("apply_rotary_emb_qk")
def _(a: Arguments) -> int:
    draw = a.draw
    batch, heads, length, dim = draw(one(2, 1, 0)), draw(one(2, 1, 3, 0)), draw(LENGTHS), draw(one(4, 8, 2, 16, 1, 3, 64, 0))
    a.tensor("q", (batch, heads, length, dim), grad=True)
    a.tensor("k", (batch, draw(one(1, heads)), length, dim), grad=True)
    rotary_arguments(a, batch, length, dim)
    a.spoil("q", "k", "cos", "sin", "positions")
    return 2


def rotary_cos_sin(positions: Tensor, head_dim: int, dtype: str = "float32", **more: Any) -> Any:
    return K.rotary_cos_sin(positions, head_dim, dtype=getattr(torch, dtype), **more)


FUNCTIONS["rotary_cos_sin"] = Fuzzed(rotary_cos_sin, names=("theta",), truth=lambda call: False)


@calls("rotary_cos_sin")
def _(a: Arguments) -> int:
    draw = a.draw
    dtype = draw(one("int64", "int32", a.dtype, "bool"))
    a.tensor("positions", draw(one((3,), (), (0,), (2, 3))), dtype, fill=(0, 1))
    a.found["head_dim"] = a.value(Option((4, 2, 64, 0, np.int64(4)), (3, 1, -2, 2.5, None)))
    a.maybe("theta", Option((1e6, 1.0, 1e-6), (0.0, -1.0, NAN, INF)), 3)
    a.maybe("dtype", Option(("float16", "bfloat16", "float64"), ("int64",)), 2)
    return 1


# --- sampling -------------------------------------------------------------------------------------------------------


def _ids_beside(call: Call, change: float) -> Tensor:
    """What the reference gives for another top_p."""

    def function(**a: Any) -> Any:
        p = a.get("top_p")
        a["top_p"] = p if p is None else (p.double() * change).clamp(max=1) if isinstance(p, Tensor) else min(p * change, 1.0)
        return FUNCTIONS[call.function].function(**a)

    return evaluate(call, function, "reference").values["out"]


def _ids(call: Call, outcomes: dict[str, Outcome]) -> None:
    """Every id is one that the filters keep, as float64 sees it; -1 never comes on the CPU. Backends that say so agree."""
    base = outcomes["reference"].values["out"]
    a = built(call)
    vocabulary = a["logits"].shape[-1]
    for name, outcome in outcomes.items():
        ids = outcome.values["out"]
        if ids.dtype != torch.int64 or ((ids < 0) | (ids >= vocabulary)).any():
            raise Finding(call, "no token id", f"{ids.tolist()}", name)
        fixed = a.get("seed") is not None or (not isinstance(a.get("temperature"), Tensor) and a.get("temperature") == 0)
        if not (fixed and name in ("cpu", "auto") and a["logits"].dtype != torch.float64) or torch.equal(ids, base):
            continue
        # Where the mass of some tokens is top_p to the last digits of float32, as of equal ones, rounding keeps one more.
        known = [base, *(_ids_beside(call, change) for change in (1 - 1e-6, 1 + 1e-6))]
        if not torch.stack([ids == one for one in known]).any(0).all():
            raise Finding(call, "other tokens than the reference's", f"{ids.tolist()}, the reference has {base.tolist()}", name)
        logits = a["logits"] if a.get("indices") is None else a["logits"][a["indices"]]
        drawn = logits.double().gather(-1, ids[..., None])[..., 0]
        if (drawn == -INF).any():
            raise Finding(call, "a token of no probability", f"{ids.tolist()}", name)
        top_k = a.get("top_k")
        if top_k is not None:
            rank = (logits.double() > drawn[..., None]).sum(-1)
            if (rank >= torch.as_tensor(top_k)).any():
                raise Finding(call, "a token beyond top_k", f"{ids.tolist()}", name)


_SAMPLING = {"truth": lambda call: False, "exact": True, "extra": _ids, "meta": False}
FUNCTIONS["sample"] = Fuzzed(K.sample, "sample", **_SAMPLING)
FUNCTIONS["top_k_top_p_sampling_from_logits"] = Fuzzed(K.top_k_top_p_sampling_from_logits, "sample", **_SAMPLING)

FILLS = one("normal", (1.0,), (1e4, -1e4, 0.0), (-3e38, 3e38, 0.0))
WRONG_FILLS = one((0.0, NAN), (INF, 0.0), (-INF,), (0.0, 1.0, -INF))  # the last one for most rows right


def parameter(a: Arguments, name: str, option: Option, rows: tuple[int, ...], dtype: str) -> None:
    """A number, or a tensor with one number or one for each row."""
    draw = a.draw
    if draw(st.booleans()):
        a.found[name] = a.value(option)
    else:
        fill = option.good[: draw(st.integers(1, len(option.good)))]
        fill += tuple(x for x in option.wrong if isinstance(x, (int, float)) and abs(x) < 2**40)[:1] if a.wrong(3) else ()
        fill = tuple(x for x in fill if x is not None and not isinstance(x, bool))
        a.found[name] = T(draw(one(rows, ())), dtype, fill=fill, layout=draw(one("dense", "every_second")))


TEMPERATURES = Option((1.0, 0.0, 0.7, 1e-20, 100.0, 1), (-1.0, NAN, INF, None, "1"))
TOP_KS = Option((1, 3, 5, 1000, np.int64(2)), (0, -1, 2.0, True, "3"))
TOP_PS = Option((0.5, 0.9, 1.0, 1e-6, np.float32(0.5)), (0.0, 1.5, NAN, True))
MIN_PS = Option((0.1, 0.0, 1.0), (-0.5, 2, NAN))
SEEDS = Option((0, 1, 2**40, 17), (2**64, 2**70, 1.5, "1"))


@calls("sample")
def _(a: Arguments) -> int:
    draw = a.draw
    rows = draw(one((3,), (1,), (), (2, 2), (0,)))
    vocabulary = draw(one(5, 1, 2, 17, 300))
    a.tensor("logits", (*rows, vocabulary), grad=True, fill=draw(WRONG_FILLS if a.wrong(3) else FILLS))
    if draw(st.booleans()):
        parameter(a, "temperature", TEMPERATURES, rows, draw(one("float32", "float64")))
    if seldom(draw, 3):
        parameter(a, "top_k", TOP_KS, rows, draw(one("int64", "int32")))
    if seldom(draw, 3):
        parameter(a, "top_p", TOP_PS, rows, draw(one("float32", "float64")))
    if seldom(draw, 4):
        parameter(a, "min_p", MIN_PS, rows, "float32")
    if draw(st.booleans()):
        parameter(a, "seed", SEEDS, rows, "int64")
        if seldom(draw, 3):
            parameter(a, "offset", SEEDS, rows, "int64")
    a.maybe("check_nan", one(True), 6)
    a.spoil("logits", "temperature", "top_k", "top_p", "min_p", "seed", "offset")
    return 1


@calls("top_k_top_p_sampling_from_logits")
def _(a: Arguments) -> int:
    draw = a.draw
    batch, vocabulary = draw(one(3, 1, 0)), draw(one(5, 17, 1))
    a.tensor("logits", (batch, vocabulary), fill=draw(WRONG_FILLS if a.wrong(3) else FILLS))
    rows = (batch,)
    if seldom(draw, 4):
        rows = (draw(one(2, 4)),)
        fill = tuple(range(batch)) or (0,)
        a.found["indices"] = T(rows, draw(one("int64", "int32")), fill=(*fill, batch, -1) if a.wrong(3) else fill)
    parameter(a, "top_k", TOP_KS, rows, "int64")
    parameter(a, "top_p", TOP_PS, rows, "float32")
    a.maybe("filter_apply_order", Option(("joint", "top_k_first"), ("last", None)), 3)
    parameter(a, "seed", SEEDS, rows, "int64")
    a.spoil("logits", "indices", "top_k", "top_p", "seed")
    return 1


# --- optimisers -----------------------------------------------------------------------------------------------------


def _steps(make: Callable[..., Any]) -> Callable[..., Any]:
    """Two steps of an optimiser; the parameters, and the gradients that are left, are the result."""

    def function(params: Sequence[Tensor], grads: Sequence[Tensor | None], **options: Any) -> Any:
        leaves = [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in params]
        optimizer = make(leaves, **options)
        for step in range(2):
            for p, g in zip(leaves, grads):
                p.grad = None if g is None else g.detach().clone() * (1 - 0.5 * step)
            optimizer.step()
        return tuple(p.detach() for p in leaves)

    return function


def _torch_adam(name: str) -> Callable[[Call, dict[str, Any]], Any]:
    def theirs(call: Call, a: dict[str, Any]) -> Any:
        if set(a) & {"max_grad_norm", "ema_decay", "master_weights", "stochastic_rounding", "zero_grad"}:
            return NotImplemented
        if a.get("differentiable"):
            return NotImplemented
        return _steps(getattr(torch.optim, name.removeprefix("Fused")))(**a)

    return theirs


def _optimizer(name: str) -> None:
    function = getattr(K, name)
    names = (*function.__init__.__code__.co_varnames, "params", "betas", "grads")
    FUNCTIONS[name] = Fuzzed(
        _steps(function), "adamw", torch=_torch_adam(name), names=names, meta=False,
        truth=lambda call: not call.arguments.get("stochastic_rounding"),
    )  # fmt: skip

    @calls(name)
    def _(a: Arguments) -> int:
        draw = a.draw
        count = draw(one(1, 2, 3))
        params, grads = [], []
        for i in range(count):
            shape = draw(one((3,), (), (1,), (0,), (2, 3), (17, 5), (2, 1, 3)))
            dtype = draw(one("float32", "bfloat16", "float16", "float64")) if seldom(draw, 4) else a.dtype
            layout = draw(one("dense", "dense", "transposed", "offset", "rows", "sliced"))
            params.append(T(shape, dtype, layout, seed=2 * i))
            fill = draw(one("normal", (1e-4,), (1e-30, 1.0), (1e4, -1e4, 1.0), (0.0,), (1e20, 1.0), (1e30, -1e38)))
            grads.append(
                None if seldom(draw, 8) else T(shape, dtype, draw(one("dense", "transposed")), fill=fill, seed=2 * i + 1)
            )
        a.found |= {"params": params, "grads": grads}
        a.maybe("lr", Option((0.1, 0.0, 1.0), (-0.1, NAN, INF)), 3)
        a.maybe("betas", Option(((0.5, 0.9), (0.0, 0.0)), ((0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), (0.9,))), 5)
        a.maybe("eps", Option((1e-6, 0.0, 1.0), (-1.0, NAN)), 5)
        a.maybe("weight_decay", Option((0.1, 0.0, 1.0), (-0.1, NAN)), 4)
        a.maybe("amsgrad", one(True), 4)
        a.maybe("maximize", one(True), 6)
        a.maybe("max_grad_norm", Option((1.0, 0.01, 100.0), (0.0, -1.0, NAN, INF)), 6)
        a.maybe("ema_decay", Option((0.9, 0.0), (1.0, NAN)), 8)
        a.maybe("master_weights", one(True), 6)
        a.maybe("stochastic_rounding", one(True), 10)
        a.maybe("zero_grad", one(True), 8)
        a.maybe("foreach", one(True, False), 12)
        a.maybe("fused", one(True, False), 12)
        a.maybe("capturable", one(True), 12)
        if a.wrong(6):
            a.found["differentiable"] = True
        return 1


_optimizer("FusedAdamW")
_optimizer("FusedAdam")


# --- layers ---------------------------------------------------------------------------------------------------------


def _layer(name: str) -> Callable[..., Any]:
    def function(*args: Tensor, **arguments: Any) -> Any:
        module = nn.Module()
        module.__class__ = getattr(layers, name)  # as `kernelize` does: it has no constructor of its own
        attributes = {n: arguments.pop(n, None) for n in ("weight", "bias", "variance_epsilon", "eps") if name.endswith("Norm")}
        if attributes.get("weight") is not None:
            attributes["normalized_shape"] = tuple(attributes["weight"].shape)
        for key, value in attributes.items():
            object.__setattr__(module, key, value)
        return module(*args, **arguments)

    return function


def _gelu_of(form: str) -> Callable[[Call, dict[str, Any]], Any]:
    return lambda call, a: F.gelu(a["input"], approximate=form) if a["input"].is_floating_point() else NotImplemented


def _packed(function: Callable[[Tensor], Tensor]) -> Callable[[Call, dict[str, Any]], Any]:
    def plain(call: Call, a: dict[str, Any]) -> Any:
        gate, up = a["x"].chunk(2, -1)
        return function(gate) * up

    return plain


_LAYERS = {
    "GeLU": ("gelu", "input", _gelu_of("none")),
    "GeluTanh": ("gelu", "input", _gelu_of("tanh")),
    "NewGELU": ("gelu", "input", _gelu_of("tanh")),
    "SiluAndMul": ("swiglu", "x", _packed(F.silu)),
    "GeluAndMul": ("geglu", "x", _packed(F.gelu)),
    "GeluTanhAndMul": ("geglu", "x", _packed(functools.partial(F.gelu, approximate="tanh"))),
    "RMSNorm": ("rms_norm", "hidden_states", _torch_module),
    "LayerNorm": ("layer_norm", "input", _torch_module),
}
_LAYER_NAMES = ("input", "x", "hidden_states", "gate", "up", "weight", "bias", "eps", "q", "k", "cos", "sin")


def _of_layer(name: str) -> None:
    op, argument, theirs = _LAYERS[name]
    key = f"layers.{name}"
    more = _more_of_norm if name.endswith("Norm") else lambda call: {}
    FUNCTIONS[key] = Fuzzed(_layer(name), op, names=_LAYER_NAMES, torch=theirs, more=more)

    @calls(key)
    def _(a: Arguments) -> int:
        draw = a.draw
        shape = activation_shape(draw, even=name.endswith("AndMul"))
        a.tensor(argument, shape, grad=True)
        if name.endswith("Norm"):
            a.tensor("weight", shape[-1:], draw(one(a.dtype, "float32")), grad=True)
            a.found["variance_epsilon" if name == "RMSNorm" else "eps"] = 1e-5
            if name == "LayerNorm" and draw(st.booleans()):
                a.tensor("bias", shape[-1:], a.found["weight"].dtype, grad=True)
        a.spoil(argument, "weight", "bias")
        return 1


for _name in _LAYERS:
    _of_layer(_name)

FUNCTIONS["layers.rotary_pos_emb"] = Fuzzed(_layer("rotary_pos_emb"), "rotary", names=_LAYER_NAMES)


@calls("layers.rotary_pos_emb")
def _(a: Arguments) -> int:
    draw = a.draw
    batch, heads, length, dim = draw(one(2, 1)), draw(one(2, 1, 3)), draw(one(3, 1, 17)), draw(one(4, 8, 2, 16))
    a.tensor("q", (batch, heads, length, dim), grad=True)
    a.tensor("k", (batch, draw(one(1, heads)), length, dim), grad=True)
    for name in ("cos", "sin"):
        a.tensor(name, (draw(one(1, batch)), length, dim), draw(one(a.dtype, "float32")))
    if draw(st.booleans()):
        a.found["unsqueeze_dim"] = 2
        for name in ("q", "k"):
            t = a.found[name]
            a.found[name] = T((t.shape[0], t.shape[2], t.shape[1], dim), t.dtype, t.layout, t.grad, seed=t.seed)
    a.spoil("q", "k", "cos", "sin")
    return 2


__all__ = ["FUNCTIONS", "INF", "NAN", "NO_CALLS", "STRATEGIES", "Call", "T", "check", "evaluate"]
