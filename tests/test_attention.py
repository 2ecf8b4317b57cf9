"""Attention: reference and PyTorch's path against the formula in float64, and what cannot be computed."""

import functools
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from wikigpt.kernels import (
    alibi_slopes,
    attention_weights,
    flash_attn_func,
    flash_attn_with_kvcache,
    scaled_dot_product_attention,
)
from wikigpt.kernels._dispatch import interpreting
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
    "no key heads": of(Q, (2, 0, 7, 8)),
    "one batch of keys": of(Q, (1, 4, 7, 8)),
    "one batch of values": of(Q, K, (1, 4, 7, 8)),
    "one batch of queries": of((1, 4, 5, 8), K),
    "batches that do not broadcast": of(Q, (3, 4, 7, 8)),
    "wider values": of(Q, K, (2, 4, 7, 16)),
    "values of no width": of(Q, K, (2, 4, 7, 0)),
    "head_dim 0": of((2, 4, 5, 0), (2, 4, 7, 0), K),
    "nothing of width": of((2, 4, 5, 0), (2, 4, 7, 0)),
    "wide": of((1, 1, 5, 264), (1, 1, 7, 264)),
    "no keys": of(Q, (2, 4, 0, 8)),
    "no queries": of((2, 4, 0, 8), K),
    "no batch": of((0, 4, 5, 8), (0, 4, 7, 8)),
    "no heads": of((2, 0, 5, 8), (2, 0, 7, 8)),
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
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
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
