"""Attention: reference and PyTorch's path against the formula in float64, and what cannot be computed."""

import math

import pytest
import torch
from wikigpt.kernels import alibi_slopes, attention_weights, scaled_dot_product_attention

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
