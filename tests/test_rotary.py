"""Rotary embedding: complex rotation by hand, and the property it exists for."""

import pytest
import torch
from wikigpt.kernels import apply_rotary_emb, rotary_cos_sin


def test_each_pair_turns_by_position_times_frequency():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    cos, sin = rotary_cos_sin(torch.arange(5), 8, theta=100.0, dtype=torch.float64)
    turned = apply_rotary_emb(x, cos, sin)
    for s in range(5):
        for i in range(4):
            angle = torch.tensor(s * 100.0 ** (-2 * i / 8), dtype=torch.float64)
            expected = torch.complex(x[..., s, i], x[..., s, i + 4]) * torch.polar(torch.ones((), dtype=torch.float64), angle)
            torch.testing.assert_close(torch.complex(turned[..., s, i], turned[..., s, i + 4]), expected)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(m, n):
        a = apply_rotary_emb(q, *rotary_cos_sin(torch.tensor([m]), 16, dtype=torch.float64))
        b = apply_rotary_emb(k, *rotary_cos_sin(torch.tensor([n]), 16, dtype=torch.float64))
        return (a * b).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101))
    assert not torch.isclose(score(3, 1), score(3, 2))


def test_bad_arguments_are_named():
    cos, sin = rotary_cos_sin(torch.arange(5), 8)
    with pytest.raises(ValueError, match="x: head_dim is 7"):
        apply_rotary_emb(torch.randn(1, 1, 5, 7), cos, sin)
    with pytest.raises(ValueError, match=r"cos: got shape \(5, 4\), x needs \(6, 4\)"):
        apply_rotary_emb(torch.randn(1, 1, 6, 8), cos, sin)
