"""Attention: reference and PyTorch's path against the formula in float64, and what cannot be computed."""

import contextlib
import functools
import inspect
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.utils._pytree import tree_map_only
from wikigpt.kernels import (
    alibi_slopes,
    attention_weights,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    scaled_dot_product_attention,
    varlen_attn,
)
from wikigpt.kernels._dispatch import interpreting
from wikigpt.kernels.attention import functional
from wikigpt.kernels.attention.op import attention
from wikigpt.kernels.attention.reference import attention_reference

from tests.attention_cases import Case, build
from tests.conftest import assert_as_accurate_as

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "grouped": {"enable_gqa": True, "is_causal": True},
    "boolean mask": {"attn_mask": torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) > 0.3},
    "additive mask": {"attn_mask": torch.randn(4, 7, 9, generator=torch.Generator().manual_seed(0))},
}


def by_hand(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """One query of one head at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            for i in range(q.shape[2]):
                scores = (k[b, g] @ q[b, h, i]) * (scale or 1 / math.sqrt(q.shape[-1]))
                if is_causal:
                    scores[i + 1 :] = -math.inf
                if attn_mask is not None and attn_mask.dtype == torch.bool:
                    scores[~attn_mask[i]] = -math.inf
                elif attn_mask is not None:
                    scores = scores + attn_mask[h, i]
                out[b, h, i] = torch.softmax(scores, 0) @ v[b, g]
    return out


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_formula_query_by_query(case, backend):
    torch.manual_seed(1)
    options = CASES[case]
    groups = 2 if case == "grouped" else 4
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, groups, 9, 8), torch.randn(2, groups, 9, 5)
    mask = options.get("attn_mask")
    wide = {**options, "attn_mask": mask.double() if mask is not None and mask.dtype != torch.bool else mask}
    truth = by_hand(q.double(), k.double(), v.double(), **wide)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    assert_as_accurate_as(scaled_dot_product_attention(q, k, v, **options, backend=backend), plain, truth)


@pytest.mark.parametrize(
    "backend",
    ["auto", "reference", pytest.param("triton", marks=pytest.mark.skipif(not interpreting(), reason="needs the interpreter"))],
)
@pytest.mark.parametrize("function", ["torch", "flash", "cache"])
def test_a_scale_of_zero_gives_the_mean_of_the_visible_values(function, backend):
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 1, 40, 2, 16).unbind()
    if function == "torch":
        q, k, v = (x.transpose(1, 2).requires_grad_() for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.0, backend=backend).transpose(1, 2)
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert (grad == 0).all()
        v = v.transpose(1, 2)
    elif function == "flash":
        out = flash_attn_func(q, k, v, causal=True, softmax_scale=0.0, backend=backend)
    else:
        out = flash_attn_with_kvcache(q, k, v, causal=True, softmax_scale=0.0, backend=backend)
    torch.testing.assert_close(out, v.cumsum(1) / torch.arange(1, 41).view(1, 40, 1, 1))


def test_rows_without_keys_give_zero_and_no_nan_gradients():
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, backend="reference")
    out.sum().backward()
    assert (out[:, :, 1] == 0).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_weights_sum_to_one_and_are_causal():
    weights = attention_weights(torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4), is_causal=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 6))
    assert (weights.triu(1) == 0).all()


def test_alibi_slopes_are_those_of_the_paper():
    torch.testing.assert_close(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    # Not a power of two: those of the next lower power, then every other one of the next higher.
    torch.testing.assert_close(alibi_slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))


def tensors(**shapes):
    return [torch.randn(*shapes.get(name, (1, 2, 3, 4))) for name in "qkv"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (tensors(q=(4,)), {}, "query: got 1 dimensions, need 2 or more"),
        (tensors(k=(1, 2, 3, 5)), {}, "key: got head_dim 5, query has 4"),
        (tensors(v=(1, 2, 2, 4)), {}, r"value: got shape \(1, 2, 2, 4\), key has"),
        (tensors(q=(1, 4, 3, 4)), {}, "key: got 2 heads for 4 query heads, they need enable_gqa=True"),
        (tensors(q=(1, 3, 3, 4)), {"enable_gqa": True}, "key: got 2 heads for 3 query heads, they must divide"),
        (tensors(), {"attn_mask": torch.ones(3, 3, dtype=torch.bool), "is_causal": True}, "is_causal: cannot be True"),
        (tensors(), {"attn_mask": torch.ones(3, 3, dtype=torch.int64)}, "attn_mask: got dtype torch.int64"),
        (tensors(), {"dropout_p": 1.1}, "dropout_p: got 1.1, must be from 0 to 1"),
        ([*tensors()[:2], torch.randn(1, 2, 3, 4, dtype=torch.float64)], {}, "value: got dtype torch.float64"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(*arguments, **options)


# --- what PyTorch accepts -------------------------------------------------------------------------------------------

INTERPRETED = pytest.mark.skipif(not interpreting(), reason="needs the interpreter")
TRITON = pytest.param("triton", marks=INTERPRETED)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))).to(dtype)


def of(q, k, v=None, dtype=torch.float32):
    return [normal(*shape, dtype=dtype) for shape in (q, k, k if v is None else v)]


Q, K = (2, 4, 5, 8), (2, 4, 7, 8)
INPUTS = {
    "four dimensions": of(Q, K),
    "float16": of(Q, K, dtype=torch.float16),
    "bfloat16": of(Q, K, dtype=torch.bfloat16),
    "float64": of(Q, K, dtype=torch.float64),
    "two dimensions": of(Q[2:], K[2:]),
    "three dimensions": of(Q[1:], K[1:]),
    "five dimensions": of((3, *Q), (3, *K)),
    "one dimension": of((8,), (8,)),
    "no dimension": of((), ()),
    "keys of fewer dimensions": of(Q, K[1:]),
    "keys of fewer dimensions, as many heads as batches": of((2, 2, 5, 8), (2, 7, 8)),
    "keys of one dimension, as many as batches": of((8, 2, 5, 8), (8,)),
    "queries of fewer dimensions": of(Q[2:], K),
    "one key head": of(Q, (2, 1, 7, 8)),
    "one key head in three dimensions": of(Q[1:], (1, 7, 8)),
    "one query head": of((2, 1, 5, 8), K),
    "one key head and all value heads": of(Q, (2, 1, 7, 8), K),
    "half the key heads": of(Q, (2, 2, 7, 8)),
    "half the key heads and one value head": of(Q, (2, 2, 7, 8), (2, 1, 7, 8)),
    "half the key heads and all value heads": of(Q, (2, 2, 7, 8), K),
    "half the key heads in five dimensions": of((3, *Q), (3, 2, 2, 7, 8)),
    "key heads that do not divide": of(Q, (2, 3, 7, 8)),
    "more key heads than query heads": of((2, 2, 5, 8), K),
    "one batch of keys": of(Q, (1, 4, 7, 8)),
    "one batch of values": of(Q, K, (1, 4, 7, 8)),
    "one batch of queries": of((1, 4, 5, 8), K),
    "batches that do not broadcast": of(Q, (3, 4, 7, 8)),
    "wider values": of(Q, K, (2, 4, 7, 16)),
    "values of no width": of(Q, K, (2, 4, 7, 0)),
    "head_dim 0": of((2, 4, 5, 0), (2, 4, 7, 0), K),
    "nothing of width": of((2, 4, 5, 0), (2, 4, 7, 0)),
    "wide": of((1, 1, 5, 264), (1, 1, 7, 264)),
    "wider than our kernels": of((1, 1, 5, 1032), (1, 1, 7, 1032)),
    "no keys": of(Q, (2, 4, 0, 8)),
    "no queries": of((2, 4, 0, 8), K),
    "no batch": of((0, 4, 5, 8), (0, 4, 7, 8)),
    "fewer values than keys": of(Q, K, (2, 4, 6, 8)),
    "another head_dim": of(Q, (2, 4, 7, 9), K),
    "another dtype": [normal(*Q), normal(*K).double(), normal(*K).double()],
    "integers": [tensor.int() for tensor in of(Q, K)],
    "complex numbers": [tensor + 0j for tensor in of(Q, K)],
    "booleans": [tensor > 0 for tensor in of(Q, K)],
    "8 bits": [tensor.to(torch.float8_e4m3fn) for tensor in of(Q, K)],
    "expanded": [normal(1, 4, 5, 8).expand(Q), *of(K, K)[:2]],
    "positions first": [tensor.transpose(1, 2) for tensor in of((2, 5, 4, 8), (2, 7, 4, 8))],
    "head_dim in columns": [tensor.mT for tensor in of((2, 4, 8, 5), (2, 4, 8, 7))],
    "every second number": [tensor[..., ::2] for tensor in of((2, 4, 5, 16), (2, 4, 7, 16))],
}
MASKS = {
    "boolean": normal(5, 7) > -0.5,
    "rows that see nothing": torch.arange(5)[:, None].expand(5, 7) > 2,
    "additive": normal(5, 7),
    "of no dimension": torch.tensor(0.5),
    "boolean of no dimension": torch.tensor(True),
    "of keys": normal(7),
    "boolean of keys": torch.arange(7) < 4,
    "of one number": normal(1),
    "of queries": normal(5, 1),
    "of heads": normal(4, 1, 1),
    "of everything": normal(2, 4, 5, 7),
    "of five dimensions": normal(3, 2, 4, 5, 7),
    "of more batches": normal(3, 1, 5, 7),
    "of other sizes": normal(4, 7),
    "float16": normal(5, 7).half(),
    "float64": normal(5, 7).double(),
    "integer": torch.ones(5, 7, dtype=torch.int64),
}
FLAGS = {
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3},
    "scale 0": {"scale": 0.0},
    "everything dropped": {"dropout_p": 1.0},
    "more than everything dropped": {"dropout_p": 1.5},
    "grouped": {"enable_gqa": True},
}
CALLS = (
    {"nothing": {}}
    | {f"mask {name}": {"attn_mask": mask} for name, mask in MASKS.items()}
    | FLAGS
    | {
        "grouped and causal": {"enable_gqa": True, "is_causal": True},
        "mask and causal": {"attn_mask": MASKS["additive"], "is_causal": True},
    }
    | {f"grouped, mask {name}": {"enable_gqa": True, "attn_mask": MASKS[name]} for name in ("boolean", "additive", "of keys")}
)
NAMED = re.compile(r"(query|key|value|attn_mask|dropout_p|is_causal|enable_gqa)\b.*: got |^(is_causal|enable_gqa): ")


def outcome(function, inputs, options):
    try:
        return function(*inputs, **options)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return error


SOME = ("nothing", "mask boolean", "mask of keys", "mask of five dimensions", "causal", "negative scale", "grouped")


@pytest.mark.parametrize(
    ("backend", "calls"),
    [
        ("auto", CALLS),
        ("reference", CALLS),
        ("torch", CALLS),
        pytest.param("triton", SOME, marks=INTERPRETED),
        pytest.param("triton", CALLS, marks=[INTERPRETED, pytest.mark.full]),
    ],
    ids=["auto", "reference", "torch", "triton", "triton in full"],
)
@pytest.mark.parametrize("name", INPUTS)
def test_it_takes_exactly_what_pytorchs_takes(name, backend, calls):
    """PyTorch's definition (SDPBackend.MATH) is the judge: its CPU kernel refuses masks of one dimension, and reads beyond a
    value that has fewer positions than the key."""
    for call in calls:
        options = CALLS[call]
        with sdpa_kernel(SDPBackend.MATH):
            expected = outcome(F.scaled_dot_product_attention, INPUTS[name], options)
        ours = outcome(functools.partial(scaled_dot_product_attention, backend=backend), INPUTS[name], options)
        if isinstance(expected, Exception):
            assert isinstance(ours, (ValueError, TypeError)), f"{call}: PyTorch says {expected}, ours {ours}"
            assert NAMED.search(str(ours)), call
        else:
            assert not isinstance(ours, Exception), f"{call}: {ours}"
            tolerance = {"rtol": 2e-2, "atol": 2e-2} if expected.dtype.itemsize == 2 else {}
            torch.testing.assert_close(ours, expected, msg=lambda text, call=call: f"{call}: {text}", **tolerance)


LEADS = [(), (2,), (1, 2), (2, 1), (2, 2), (3, 2)]


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("mask", [None, *LEADS], ids=str)
def test_dimensions_before_the_heads_broadcast_where_pytorchs_do(mask, backend):
    attn_mask = None if mask is None else torch.randn(*mask, 3, 4, 4)
    for leads in itertools.product(LEADS, repeat=3):
        inputs = [torch.randn(*lead, 3, 4, 8) for lead in leads]
        with sdpa_kernel(SDPBackend.MATH):
            expected = outcome(F.scaled_dot_product_attention, inputs, {"attn_mask": attn_mask})
        ours = outcome(functools.partial(scaled_dot_product_attention, backend=backend), inputs, {"attn_mask": attn_mask})
        if isinstance(expected, Exception):
            assert isinstance(ours, (ValueError, TypeError)), f"{leads}: PyTorch says {expected}, ours {ours}"
            assert NAMED.search(str(ours)), leads
        else:
            torch.testing.assert_close(ours, expected, msg=lambda text, leads=leads: f"{leads}: {text}")


@pytest.mark.parametrize(
    "options", [{}, {"enable_gqa": True}, {"attn_mask": MASKS["boolean"]}], ids=["plain", "grouped", "mask"]
)
@pytest.mark.parametrize("backend", ["auto", "reference", "torch", TRITON])
def test_no_heads_give_nothing_for_nothing(backend, options):
    """PyTorch 2.11 ends the process here."""
    q, k, v = (tensor.requires_grad_() for tensor in of((2, 0, 5, 8), (2, 0, 7, 8)))
    out = scaled_dot_product_attention(q, k, v, **options, backend=backend)
    assert out.shape == q.shape
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]
    assert flash_attn_func(*of((2, 5, 0, 8), (2, 7, 0, 8))).shape == (2, 5, 0, 8)


def test_no_key_heads_for_some_query_heads_are_refused():
    """PyTorch 2.11 ends the process there."""
    with pytest.raises(ValueError, match="key: got 0 heads for 4 query heads"):
        scaled_dot_product_attention(*of(Q, (2, 0, 7, 8)), enable_gqa=True)


# --- subclasses of Tensor -------------------------------------------------------------------------------------------


class Named(torch.Tensor):
    """Has nothing of its own."""


class Watched(torch.Tensor):
    """Computes PyTorch's functions as it likes: here as they are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)


class Wrapped(torch.Tensor):
    """Has no memory: its numbers are in another tensor."""

    @staticmethod
    def __new__(cls, inner):
        strides, dtype = inner.stride(), inner.dtype
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=strides, dtype=dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.inner, (args, kwargs or {}))
        return func(*args, **kwargs)


def nested(tensor, layout=torch.strided):
    return torch.nested.as_nested_tensor(list(torch.atleast_2d(tensor)), layout=layout)


# What makes a tensor of each type from a plain one. The first three give the numbers to those who ask as for any tensor.
AS_THEY_ARE = {
    "Parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "of no functions": lambda tensor: tensor.as_subclass(Named),
    "without memory": Wrapped,
}
WITH_FUNCTIONS = {
    "CausalBias at the upper left": lambda tensor: causal_upper_left(*(1, 1, *tensor.shape)[-2:]),
    "CausalBias at the lower right": lambda tensor: causal_lower_right(*(1, 1, *tensor.shape)[-2:]),
    "MaskedTensor": lambda tensor: torch.masked.masked_tensor(tensor, torch.ones_like(tensor, dtype=torch.bool)),
    "watched": lambda tensor: tensor.as_subclass(Watched),
    "nested": nested,
    "jagged": functools.partial(nested, layout=torch.jagged),
}
NESTED_WARNINGS = pytest.mark.filterwarnings("ignore:.*(nested|MaskedTensor|maskedtensor)")


@NESTED_WARNINGS
@pytest.mark.parametrize("backend", ["auto", "reference", "torch", TRITON])
@pytest.mark.parametrize("argument", ["query", "key", "value", "attn_mask"])
@pytest.mark.parametrize("kind", AS_THEY_ARE | WITH_FUNCTIONS)
def test_any_subclass_is_to_our_attention_what_it_is_to_pytorchs(kind, argument, backend):
    arguments = dict(zip(("query", "key", "value"), of(Q, K))) | {"attn_mask": normal(5, 7)}
    arguments[argument] = (AS_THEY_ARE | WITH_FUNCTIONS)[kind](arguments[argument])
    expected = outcome(F.scaled_dot_product_attention, (), arguments)
    ours = outcome(functools.partial(scaled_dot_product_attention, backend=backend), (), arguments)
    assert isinstance(ours, Exception) == isinstance(expected, Exception), f"{ours}, PyTorch: {expected}"
    assert not isinstance(ours, AttributeError)
    if not isinstance(expected, Exception):
        assert type(ours) is type(expected)
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


@pytest.mark.parametrize("backend", ["auto", "reference", "torch", TRITON])
@pytest.mark.parametrize("sizes", [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("causal", [causal_upper_left, causal_lower_right])
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_a_causal_bias_is_the_mask_that_it_stands_for(causal, sizes, backend):
    s, t = sizes
    q, k, v = of((2, 4, s, 8), (2, 4, t, 8))
    bias = causal(s, t)
    dense = torch.ones(s, t, dtype=torch.bool).tril(0 if causal is causal_upper_left else t - s)
    out = scaled_dot_product_attention(q, k, v, bias, backend=backend)
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, dense, backend="reference"))


@NESTED_WARNINGS
@pytest.mark.parametrize("backend", ["auto", "reference", TRITON])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_go_to_pytorch(layout, backend):
    parts = [normal(n, 2, 8) for n in (3, 5)]
    q = torch.nested.nested_tensor(parts if layout == torch.jagged else [part.transpose(0, 1) for part in parts], layout=layout)
    q = q.transpose(1, 2) if layout == torch.jagged else q
    ours = scaled_dot_product_attention(q, q, q, backend=backend)
    for one, other in zip(ours.unbind(), F.scaled_dot_product_attention(q, q, q).unbind()):
        torch.testing.assert_close(one, other)


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


FLASH = {
    flash_attn_func: {
        "q": normal(2, 5, 2, 16), "k": normal(2, 7, 2, 16), "v": normal(2, 7, 2, 16), "alibi_slopes": normal(2),
        "s_aux": normal(2), "attn_bias": normal(5, 7), "attn_mask": normal(5, 7) > -1, "seqused_k": ints(4, 7),
    },
    flash_attn_varlen_func: {
        "q": normal(5, 2, 16), "k": normal(7, 2, 16), "v": normal(7, 2, 16), "alibi_slopes": normal(2), "s_aux": normal(2),
        "cu_seqlens_q": ints(0, 2, 5), "cu_seqlens_k": ints(0, 3, 7), "seqused_k": ints(3, 2), "max_seqlen_q": 3,
        "max_seqlen_k": 4,
    },
    flash_attn_with_kvcache: {
        "q": normal(2, 1, 2, 16), "k_cache": normal(4, 16, 2, 16), "v_cache": normal(4, 16, 2, 16), "k": normal(2, 1, 2, 16),
        "v": normal(2, 1, 2, 16), "rotary_cos": normal(40, 8), "rotary_sin": normal(40, 8), "cache_seqlens": ints(4, 7),
        "cache_leftpad": ints(0, 1), "block_table": ints(1, 0, 3, 2).view(2, 2), "alibi_slopes": normal(2), "s_aux": normal(2),
    },
}  # fmt: skip
TENSORS = [(f, name) for f, given in FLASH.items() for name, value in given.items() if isinstance(value, torch.Tensor)]


def copies(function):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in FLASH[function].items()}


@NESTED_WARNINGS
@pytest.mark.parametrize("backend", ["auto", "reference", TRITON])
@pytest.mark.parametrize("kind", WITH_FUNCTIONS)
@pytest.mark.parametrize(("function", "name"), TENSORS)
def test_flash_functions_refuse_a_subclass_with_functions_of_its_own(function, name, kind, backend):
    arguments = copies(function)
    arguments[name] = WITH_FUNCTIONS[kind](arguments[name])
    with pytest.raises(TypeError, match=f"{name}: got a "):
        function(**arguments, backend=backend)


PACKED = {
    flash_attn_qkvpacked_func: lambda qkv: flash_attn_qkvpacked_func(qkv(normal(2, 5, 3, 2, 16))),
    flash_attn_kvpacked_func: lambda kv: flash_attn_kvpacked_func(normal(2, 5, 2, 16), kv(normal(2, 5, 2, 2, 16))),
    flash_attn_varlen_qkvpacked_func: lambda qkv: flash_attn_varlen_qkvpacked_func(qkv(normal(5, 3, 2, 16)), ints(0, 5), 5),
    attention_weights: lambda attn_mask: attention_weights(*of(Q, K)[:2], attn_mask(normal(5, 7))),
    varlen_attn: lambda query: varlen_attn(query(normal(5, 2, 16)), *of((5, 2, 16), (5, 2, 16))[:2], *[ints(0, 5)] * 2, 5, 5),
}


@NESTED_WARNINGS
@pytest.mark.parametrize("kind", WITH_FUNCTIONS)
@pytest.mark.parametrize("function", PACKED)
def test_the_other_functions_refuse_it_too(function, kind):
    call = PACKED[function]
    with pytest.raises(TypeError, match=f"{inspect.signature(call).parameters.copy().popitem()[0]}: got a "):
        call(WITH_FUNCTIONS[kind])


@pytest.mark.parametrize("backend", ["auto", "reference", TRITON])
@pytest.mark.parametrize("kind", AS_THEY_ARE)
@pytest.mark.parametrize(("function", "name"), TENSORS)
def test_flash_functions_take_a_subclass_that_is_as_any_tensor(function, name, kind, backend):
    if kind == "without memory" and name.endswith("_cache"):
        pytest.skip("a cache is written in place")
    arguments = copies(function)
    expected = function(**arguments, backend=backend)
    arguments = copies(function)
    arguments[name] = AS_THEY_ARE[kind](arguments[name])
    torch.testing.assert_close(function(**arguments, backend=backend).as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize(("function", "name"), [*TENSORS, (scaled_dot_product_attention, "query")])
def test_what_is_no_tensor_is_named(function, name):
    arguments = copies(function) if function in FLASH else dict(zip(("query", "key", "value"), of(Q, K)))
    with pytest.raises(TypeError, match=f"{name}: got ndarray, (need a|allowed are int and an int32) tensor"):
        function(**arguments | {name: arguments[name].numpy()})


# --- layouts, devices, options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference", "torch", TRITON])
@pytest.mark.parametrize("mask", [None, MASKS["boolean"]], ids=["no mask", "mask"])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)], ids=["BHS", "BSH", "SBH", "HBS"])
def test_the_output_lies_in_memory_as_the_query_does(order, mask, backend):
    query = torch.randn([Q[i] for i in order] + [8]).permute(*(order.index(i) for i in range(3)), 3)
    _, k, v = of(Q, K)
    assert scaled_dot_product_attention(query, k, v, mask, backend=backend).stride() == query.stride()


@pytest.mark.parametrize("backend", ["auto", "reference", "torch", TRITON])
@pytest.mark.parametrize(
    "options", [{}, {"attn_mask": MASKS["additive"]}, {"dropout_p": 0.3}], ids=["plain", "mask", "dropout"]
)
def test_the_output_of_a_contiguous_query_has_a_view_of_fewer_dimensions(options, backend):
    out = scaled_dot_product_attention(*of(Q, K), **options, backend=backend)
    assert out.view(8, 5, 8).shape == (8, 5, 8)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch", TRITON])
def test_a_query_without_heads_that_fits_nothing_is_named(backend):
    with pytest.raises(ValueError, match=r"query: got shape \(0, 3, 4\)"):
        scaled_dot_product_attention(torch.randn(0, 3, 4), *[torch.randn(1, 2, 3, 4)] * 2, enable_gqa=True, backend=backend)


META = {flash_attn_func: ["q", "k", "v"], flash_attn_varlen_func: ["q", "k", "v"], flash_attn_with_kvcache: []}


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("function", META)
def test_tensors_without_numbers_give_the_shapes_and_gradients_of_those_with_them(function, kind):
    arguments = copies(function)
    lse = "return_softmax_lse" if function is flash_attn_with_kvcache else "return_attn_probs"
    expected = function(**copies(function), **{lse: True})[:2]
    with FakeTensorMode() if kind == "fake" else contextlib.nullcontext():
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = torch.empty(value.shape, dtype=value.dtype, device="meta" if kind == "meta" else None)
        leaves = [arguments[name].requires_grad_() for name in META[function]]
        got = function(**arguments, **{lse: True})[:2]
        grads = torch.autograd.grad(got[0].sum(), leaves) if leaves else []
    for ours, wanted in zip(got, expected):
        assert (ours.shape, ours.dtype, ours.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        assert kind == "fake" or ours.is_meta
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize(
    "function",
    [scaled_dot_product_attention, flash_attn_qkvpacked_func, flash_attn_kvpacked_func, flash_attn_varlen_qkvpacked_func],
)
def test_the_other_functions_take_meta_tensors(function):
    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    if function is scaled_dot_product_attention:
        assert function(meta(*Q), meta(*K), meta(2, 4, 7, 16), is_causal=True).shape == (2, 4, 5, 16)
    elif function is flash_attn_qkvpacked_func:
        assert function(meta(2, 5, 3, 4, 8), dropout_p=0.1).shape == (2, 5, 4, 8)
    elif function is flash_attn_kvpacked_func:
        assert function(meta(2, 5, 4, 8), meta(2, 7, 2, 2, 8)).shape == (2, 5, 4, 8)
    else:
        assert function(meta(9, 3, 4, 8), meta(3, dtype=torch.int32), 5).shape == (9, 4, 8)


DEFAULTS = (
    "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic", "rotary_interleaved",
    "num_splits", "s_aux", "return_attn_probs", "return_softmax_lse", "backend",
)  # fmt: skip


OPTIONS = [(f, name) for f in FLASH for name in DEFAULTS if name in inspect.signature(f).parameters]


@pytest.mark.parametrize(("function", "name"), OPTIONS)
def test_an_option_of_none_has_its_default(function, name):
    default = inspect.signature(function).parameters[name].default
    given = {key: value for key, value in copies(function).items() if key != name}
    expected = function(**given, **{name: default})
    given = {key: value for key, value in copies(function).items() if key != name}
    assert torch.equal(function(**given, **{name: None}), expected)


@pytest.mark.parametrize(
    ("window", "means"), [(None, (-1, -1)), ((None, None), (-1, -1)), ((2, None), (2, -1)), ([None, 1], (-1, 1))]
)
@pytest.mark.parametrize("function", FLASH)
def test_a_window_of_none_is_no_limit(function, window, means):
    assert torch.equal(function(**copies(function), window_size=window), function(**copies(function), window_size=means))


@pytest.mark.parametrize("window", [5, "ab", (1,), (1, 2, 3), (1.5, 0), (-2, 0), (math.inf, 0), (math.nan, 0)])
@pytest.mark.parametrize("function", FLASH)
def test_a_window_that_is_none_is_named(function, window):
    with pytest.raises(ValueError, match=r"window_size: got .*, need \(left, right\)"):
        function(**copies(function), window_size=window)


NEEDED = {
    flash_attn_func: ("q", "k", "v"),
    flash_attn_varlen_func: ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    flash_attn_with_kvcache: ("q", "k_cache", "v_cache"),
    scaled_dot_product_attention: ("query", "key", "value", "dropout_p"),
}


@pytest.mark.parametrize(("function", "name"), [(function, name) for function, names in NEEDED.items() for name in names])
def test_none_for_what_has_no_default_is_named(function, name):
    given = copies(function) if function in FLASH else dict(zip(("query", "key", "value"), of(Q, K)))
    with pytest.raises(TypeError, match=f"{name}: got None"):
        function(**given | {name: None})


@pytest.mark.parametrize("backend", ["auto", "reference", TRITON])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 1), (2, 1, 1)])
@pytest.mark.parametrize("kind", ["attn_bias", "attn_mask"])
def test_a_mask_of_any_number_of_dimensions_broadcasts_and_gets_its_gradient(kind, shape, backend):
    q, k, v = of((2, 5, 2, 16), (2, 7, 2, 16))
    given = normal(*shape) if kind == "attn_bias" else normal(*shape) > 0

    def run(mask, backend):
        mask = mask.clone().requires_grad_(kind == "attn_bias")
        out = flash_attn_func(q, k, v, **{kind: mask}, return_attn_probs=True, backend=backend)[0]
        # The gradient of a mask that is the same for all keys cancels to 0.
        return out, *(torch.autograd.grad(out.square().sum(), mask) if kind == "attn_bias" else ())

    out, *grads = run(given, backend)
    expected, *whole = run(given.expand(2, 2, 5, 7), "reference")
    torch.testing.assert_close(out, expected)
    for grad, wide in zip(grads, whole):
        assert grad.shape == shape
        torch.testing.assert_close(grad, wide.sum_to_size(shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference", TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["no sequence", "no sequence, some tokens", "no batch"])
def test_a_batch_of_nothing_has_gradients_of_zero(case, dtype, backend):
    if case == "no batch":
        q, k, v = (normal(0, n, 2, 16, dtype=dtype).requires_grad_() for n in (5, 7, 7))
        sizes = {"seqused_k": ints()}
    else:
        q, k, v = (normal(3 if "tokens" in case else 0, 2, 16, dtype=dtype).requires_grad_() for _ in range(3))
        sizes = {"cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0), "max_seqlen_q": 0, "max_seqlen_k": 0}
    sinks = normal(2).requires_grad_()
    function = flash_attn_func if case == "no batch" else flash_attn_varlen_func
    out, lse, _ = function(q, k, v, **sizes, s_aux=sinks, return_attn_probs=True, backend=backend)
    assert out.shape == q.shape
    assert lse.dtype == dtype
    assert (out == 0).all()
    for tensor, grad in zip((q, k, v, sinks), torch.autograd.grad(out.sum(), (q, k, v, sinks))):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu", TRITON])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_keys_in_use_that_nobody_checked_do_not_reach_beyond_the_sequence(packed, masked, backend, monkeypatch):
    """As on a GPU, where reading them would wait for the device."""
    monkeypatch.setattr(functional, "checks_values", lambda device_type: False)
    function = flash_attn_varlen_func if packed else flash_attn_func
    arguments = copies(function)
    if not masked or packed:
        arguments = {name: value for name, value in arguments.items() if name not in ("attn_mask", "attn_bias")}

    def run(used):
        leaves = {name: arguments[name].clone().requires_grad_() for name in ("q", "k", "v")}
        out = function(**arguments | leaves | {"seqused_k": used}, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))

    for ours, expected in zip(run(ints(-5, 100)), run(ints(0, 4 if packed else 7))):
        assert torch.equal(ours, expected)


# --- torch.compile, torch.func, autocast ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "changing"),
    [("auto", "softmax_scale"), ("auto", "softcap"), ("auto", "both"), pytest.param("triton", "both", marks=INTERPRETED)],
)
@pytest.mark.parametrize("function", FLASH)
def test_numbers_that_change_are_compiled_once(function, backend, changing):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(scale, softcap, arguments):
        options = {"softmax_scale": scale} if changing != "softcap" else {}
        options |= {"softcap": softcap} if changing != "softmax_scale" else {}
        return function(**arguments, **options, backend=backend)

    compiled = torch.compile(call, dynamic=True, fullgraph=True, backend=counter)
    frames = set()
    for numbers in ((0.3, 2.0), (0.4, 3.5), (0.7, 1.5)):
        torch.testing.assert_close(compiled(*numbers, copies(function)), call(*numbers, copies(function)))
        frames.add(counter.frame_count)
    assert len(frames) == 1


@pytest.mark.parametrize("backend", ["auto", "reference", TRITON])
def test_slices_of_packed_tensors_are_compiled_with_lengths_that_change(backend):
    torch.compiler.reset()

    def attend(packed):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in packed.chunk(3, -1))
        return scaled_dot_product_attention(q, k, v, is_causal=True, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for length in (4, 5, 7):
        packed = torch.randn(2, length, 48)
        torch.testing.assert_close(compiled(packed), attend(packed))


@pytest.mark.parametrize("backend", ["auto", "reference", TRITON])
@pytest.mark.parametrize("bias", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_dtypes_that_q_asks_for_whatever_the_bias_has(dtype, bias, backend):
    q, k, v = of((1, 3, 2, 16), (1, 5, 2, 16), dtype=dtype)
    out, lse, _ = flash_attn_func(q, k, v, attn_bias=normal(3, 5, dtype=bias), return_attn_probs=True, backend=backend)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch", TRITON])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 1, 1, 1), (3, 17), (1, 17)])
def test_a_float32_mask_beside_float64(shape, backend):
    q, k, v = torch.randn(1, 2, 3, 4).double(), *torch.randn(2, 1, 2, 17, 4).double()
    mask = torch.randn(shape)
    expected = scaled_dot_product_attention(q, k, v, mask.double(), backend="reference")
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask, backend=backend), expected)


@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
@pytest.mark.parametrize("function", FLASH)
def test_a_compiled_function_refuses_an_infinite_number_that_it_did_not_know(function, name):
    torch.compiler.reset()
    compiled = torch.compile(lambda number: function(**copies(function), **{name: number}), dynamic=True, backend="eager")
    for number in (0.3, 0.4):
        compiled(number)
    with pytest.raises(ValueError, match=f"{name}: got inf, must be finite"):
        compiled(math.inf)


@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_the_gradient_of_a_compiled_function_follows_a_number_that_changes(backend):
    torch.compiler.reset()
    q, k, v = (tensor.requires_grad_() for tensor in of((2, 5, 2, 16), (2, 7, 2, 16)))

    def grads(function, scale):
        return torch.autograd.grad(
            function(q, k, v, softmax_scale=scale, softcap=2.0, backend=backend).square().sum(), (q, k, v)
        )

    compiled = torch.compile(flash_attn_func, dynamic=True, fullgraph=True, backend="aot_eager")
    for scale in (0.3, 0.9):
        torch.testing.assert_close(grads(compiled, scale), grads(flash_attn_func, scale))


FUNCTIONAL = {
    "plain": {},
    "causal and softcap": {"causal": True, "softcap": 2.0},
    "slopes and window": {"alibi_slopes": torch.rand(2), "window_size": (3, 1)},
    "mask": {"attn_mask": torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.3},
    "bias": {"attn_bias": normal(2, 1, 5, 7)},
    "sinks": {"s_aux": normal(2)},
    "keys in use": {"seqused_k": ints(4, 7)},
}


def assert_trees_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", TRITON])
@pytest.mark.parametrize("name", FUNCTIONAL)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
class TestFunctionalTransforms:
    @pytest.fixture
    def loss(self, name, backend):
        def loss(q, k, v):
            out, lse, _ = flash_attn_func(q, k, v, **FUNCTIONAL[name], return_attn_probs=True, backend=backend)
            return out.square().sum() + lse.sum()

        return loss

    @pytest.fixture
    def qkv(self):
        return of((2, 5, 2, 16), (2, 7, 2, 16), (2, 7, 2, 8))

    def test_grad_is_that_of_autograd(self, loss, qkv):
        leaves = [tensor.requires_grad_() for tensor in qkv]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        assert_trees_close(torch.func.grad(loss, (0, 1, 2))(*(leaf.detach() for leaf in leaves)), expected)

    @pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 2)])
    def test_gradients_per_sample_are_those_of_a_loop(self, loss, qkv, in_dims):
        n = 3
        inputs = [t if dim is None else torch.stack([t * (i + 1) / 2 for i in range(n)], dim) for t, dim in zip(qkv, in_dims)]
        grad = torch.func.grad(loss, (0, 1, 2))
        got = torch.func.vmap(grad, in_dims)(*inputs)
        each = [grad(*(t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims))) for i in range(n)]
        assert_trees_close(got, tuple(map(torch.stack, zip(*each))))

    def test_jacrev_is_the_jacobian_of_autograd(self, qkv, name, backend):
        q, k, v = qkv

        def function(q):
            return flash_attn_func(q, k, v, **FUNCTIONAL[name], return_attn_probs=True, backend=backend)[0][:, 0, 0, :2]

        assert_trees_close(torch.func.jacrev(function)(q), torch.autograd.functional.jacobian(function, q))


@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_the_gradient_of_a_bias_is_mapped(backend):
    q, k, v = of((2, 5, 2, 16), (2, 7, 2, 16))
    for shape in ((5, 7), (1, 2, 1, 7), (2, 2, 5, 7)):
        bias = normal(3, *shape)

        def loss(bias):
            return flash_attn_func(q, k, v, attn_bias=bias, return_attn_probs=True, backend=backend)[0].square().sum()

        got = torch.func.vmap(torch.func.grad(loss))(bias)
        assert_trees_close(got, torch.stack([torch.func.grad(loss)(each) for each in bias]))


@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_packed_sequences_are_mapped(backend):
    arguments = copies(flash_attn_varlen_func)
    q, sinks = normal(3, 5, 2, 16), normal(3, 2)

    def function(q, sinks):
        return flash_attn_varlen_func(**arguments | {"q": q, "s_aux": sinks}, backend=backend)

    expected = torch.stack([function(*each) for each in zip(q, sinks)])
    assert_trees_close(torch.func.vmap(function)(q, sinks), expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_dropout_is_mapped_with_the_same_numbers_or_others(backend, randomness):
    q, k, v = of((2, 5, 2, 16), (2, 7, 2, 16))

    def function(q):
        return flash_attn_func(q, k, v, 0.5, backend=backend)

    first, second = torch.func.vmap(function, randomness=randomness)(torch.stack([q, q]))
    assert torch.equal(first, second) == (randomness == "same")


@pytest.mark.parametrize("backend", ["auto", "reference", TRITON])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_scaled_dot_product_attention_is_mapped_and_differentiated(backend):
    q, k, v = (torch.stack([tensor, tensor / 2]) for tensor in of(Q, K))

    def loss(function, *qkv):
        return function(*qkv, is_causal=True).square().sum()

    ours = functools.partial(loss, functools.partial(scaled_dot_product_attention, backend=backend))
    expected = torch.func.vmap(torch.func.grad(functools.partial(loss, F.scaled_dot_product_attention), (0, 1, 2)))(q, k, v)
    assert_trees_close(torch.func.vmap(torch.func.grad(ours, (0, 1, 2)))(q, k, v), expected)


@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_a_second_derivative_by_a_transform_is_refused(backend):
    q, k, v = of((1, 5, 2, 16), (1, 7, 2, 16))

    def function(q):
        return flash_attn_func(q, k, v, return_attn_probs=True, backend=backend)[0].square().sum()

    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda q: torch.func.grad(function)(q).sum())(q)


@pytest.mark.parametrize("backend", ["auto", "reference", TRITON])
@pytest.mark.parametrize("wide", [("q",), ("k", "v"), ("q", "k", "v"), ("q", "v")], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_casts_to_the_dtype_of_the_cache(dtype, wide, backend):
    """As where rotary embeddings leave q and k in float32 beside a v in bfloat16."""
    arguments = copies(flash_attn_with_kvcache)
    for name in ("q", "k", "v"):
        arguments[name] = arguments[name].bfloat16().to(torch.float32 if name in wide else torch.bfloat16)
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attn_with_kvcache(**arguments, backend=backend)
    assert out.dtype == dtype
    narrow = copies(flash_attn_with_kvcache)
    narrow |= {name: narrow[name].bfloat16().to(dtype) for name in ("q", "k", "v")}
    narrow |= {name: narrow[name].to(dtype) for name in ("k_cache", "v_cache")}
    assert torch.equal(out, flash_attn_with_kvcache(**narrow, backend=backend))


def test_a_negative_scale_is_refused_with_the_way_out():
    for function in FLASH:
        with pytest.raises(ValueError, match=r"softmax_scale: got -0.5, .* \(for a negative one negate q\)"):
            function(**copies(function), softmax_scale=-0.5)


# --- the reference of every feature against three oracles ----------------------------------------------------------


@pytest.mark.parametrize(
    "features",
    [
        ("causal", "softcap", "bias", "sinks"),
        ("window", "alibi", "dropout"),
        ("varlen", "alibi_per_batch", "used_keys", "causal"),
        ("mask", "bias_of_keys", "top_left"),
    ],
    ids="-".join,
)
def test_the_reference_has_the_gradients_of_finite_differences(features):
    x = build(Case(features, torch.float64, batch=2, s=5, t=6, heads=2, groups=1, head_dim=3, v_head_dim=2, seed=3))
    names = [name for name in ("q", "k", "v", "bias", "s_aux") if getattr(x, name) is not None]

    def function(*tensors):
        out, lse = attention_reference(replace(x, **dict(zip(names, tensors))))
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(function, [getattr(x, name).double().requires_grad_() for name in names])


def flex_modifications(x):
    """The same problem in FlexAttention's terms: (score_mod, mask_mod)."""
    diagonal = 0 if x.top_left else x.k.shape[1] - x.q.shape[1]

    def score_mod(score, b, h, i, j):
        if x.softcap > 0:
            score = x.softcap * torch.tanh(score / x.softcap)
        if x.alibi_slopes is not None:
            score = score - x.alibi_slopes[h].double() * (i + diagonal - j).abs()
        if x.bias is not None:
            score = score + x.bias.expand(2, 2, *x.bias.shape[-2:])[b, h, i, j]
        return score

    def mask_mod(b, h, i, j):
        keep = (i >= 0) & (j >= 0)
        if x.window_left >= 0:
            keep = keep & (j >= i + diagonal - x.window_left)
        if x.window_right >= 0:
            keep = keep & (j <= i + diagonal + x.window_right)
        if x.mask is not None:
            keep = keep & x.mask.expand(2, 2, *x.mask.shape[-2:])[b, h, i, j]
        return keep

    return score_mod, mask_mod


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "features",
    [(), ("causal",), ("top_left", "causal"), ("window",), ("softcap",), ("alibi", "causal"), ("bias",), ("mask",)],
    ids=lambda features: "-".join(features) or "plain",
)
def test_the_reference_equals_flex_attention(features):
    x = build(Case(features, torch.float64, s=17, t=23, heads=2, groups=1, seed=5))
    score_mod, mask_mod = flex_modifications(x)
    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in (x.q, x.k, x.v))
    mask = create_block_mask(mask_mod, 2, 2, 17, 23, device="cpu")
    expected, aux = flex_attention(
        q, k, v, score_mod, mask, scale=x.softmax_scale, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    out, our_lse = attention_reference(x)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    torch.testing.assert_close(our_lse, aux.lse)


@pytest.mark.parametrize("features", [(), ("top_left", "causal"), ("mask",), ("bias",)], ids=lambda f: "-".join(f) or "plain")
def test_the_reference_equals_pytorchs_attention_and_its_gradients(features):
    x = build(Case(features, torch.float64, s=17, t=23, heads=4, groups=2, seed=6))
    leaves = [tensor.clone().requires_grad_() for tensor in (x.q, x.k, x.v)]
    q, k, v = (tensor.transpose(1, 2) for tensor in leaves)
    mask = x.mask if x.bias is None else x.bias
    expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=x.window_right == 0, enable_gqa=True).transpose(1, 2)
    out, _ = attention_reference(replace(x, q=leaves[0], k=leaves[1], v=leaves[2]))
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, leaves, weight), torch.autograd.grad(expected, leaves, weight)):
        torch.testing.assert_close(ours, theirs)


# --- which of PyTorch's kernels covers what -------------------------------------------------------------------------


@pytest.mark.parametrize(("s", "t"), [(1, 9), (5, 9), (9, 9)])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_pytorchs_fused_attention_takes_flash_attentions_alignment(s, t, alibi, causal):
    x = build(Case(("alibi",) if alibi else (), torch.float32, s=s, t=t, heads=4, groups=2))
    x = replace(x, window_right=0 if causal else -1)
    wide = replace(x, q=x.q.double(), k=x.k.double(), v=x.v.double())
    out, _ = attention(x, "torch", need_lse=False)
    assert_as_accurate_as(out, attention_reference(x)[0], attention_reference(wide)[0], absolute=1e-7)


@pytest.mark.parametrize(
    ("features", "missing"),
    [
        (("softcap",), "softcap"),
        (("sinks",), "s_aux"),
        (("varlen",), "cu_seqlens"),
        (("window",), "window_size"),
        (("mask",), "attn_mask"),
    ],
)
def test_pytorchs_backend_names_what_it_does_not_cover(features, missing):
    with pytest.raises(ValueError, match=f"'torch' was asked for, and PyTorch's own attention does not cover {missing}"):
        attention(build(Case(features)), "torch", need_lse=False)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("keys", [40, 300])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_on_few_keys_in_bf16_is_computed_in_float32_on_a_cpu_without_amx(monkeypatch, amx, keys, autocast):
    """PyTorch's backward in bf16 takes up to 2.4 times as long there."""
    monkeypatch.setattr(functional, "AMX", amx)
    seen = []

    def look(query, *rest):
        seen.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return torch_attention(query, *rest)

    torch_attention = functional._torch
    monkeypatch.setattr(functional, "_torch", look)
    gen = torch.Generator().manual_seed(0)
    q, k, v, up = (torch.randn(2, 3, keys, 16, generator=gen).bfloat16() for _ in range(4))

    def run(function, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            out = function(*leaves, is_causal=True)
        return [out, *torch.autograd.grad(out, leaves, up.to(dtype))]

    ours, plain = (run(f, torch.bfloat16) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    truth = run(F.scaled_dot_product_attention, torch.float64)
    wide = keys == 40 and not amx
    assert seen == [(torch.float32, False) if wide else (torch.bfloat16, autocast)]
    for o, p, t in zip(ours, plain, truth):
        assert o.dtype == torch.bfloat16
        assert_as_accurate_as(o, p, t)
    with torch.no_grad():
        scaled_dot_product_attention(q, k, v)
    assert seen[-1][0] == torch.bfloat16
