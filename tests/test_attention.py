"""Attention: reference and PyTorch's path against the formula in float64, and what cannot be computed."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
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
        (tensors(q=(2, 3, 4)), {}, "query: got 3 dimensions, need 4"),
        (tensors(k=(1, 2, 3, 5)), {}, "key: got head_dim 5, query has 4"),
        (tensors(v=(1, 2, 2, 4)), {}, r"value: got shape \(1, 2, 2, 4\), key has"),
        (tensors(k=(1, 1, 3, 4), v=(1, 1, 3, 4)), {}, "key: got 1 heads for 2 query heads, they need enable_gqa=True"),
        (tensors(q=(1, 3, 3, 4)), {"enable_gqa": True}, "key: got 2 heads for 3 query heads, they must divide"),
        (tensors(), {"attn_mask": torch.ones(3, 3, dtype=torch.bool), "is_causal": True}, "is_causal: cannot be True"),
        (tensors(), {"attn_mask": torch.ones(3, 3, dtype=torch.int64)}, "attn_mask: got dtype torch.int64"),
        (tensors(), {"dropout_p": 1.0}, "dropout_p: got 1.0"),
        ([*tensors()[:2], torch.randn(1, 2, 3, 4, dtype=torch.float64)], {}, "value: got dtype torch.float64"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(*arguments, **options)


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
