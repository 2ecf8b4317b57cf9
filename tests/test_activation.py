"""GELU and SwiGLU against their formulas in float64."""

import pytest
import torch
from wikigpt.kernels import gelu, swiglu

from tests.conftest import assert_as_accurate_as


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_as_accurate_as_pytorchs(approximate, backend):
    x = 3 * torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.functional.gelu(x, approximate=approximate)
    truth = torch.nn.functional.gelu(x.double(), approximate=approximate)
    assert_as_accurate_as(gelu(x, approximate, backend=backend), plain, truth)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_swiglu_is_silu_of_the_gate_times_up(backend):
    gate, up = torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.functional.silu(gate) * up
    truth = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    assert_as_accurate_as(swiglu(gate, up, backend=backend), plain, truth)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="approximate: got 'sigmoid'"):
        gelu(torch.ones(2), "sigmoid")
    with pytest.raises(ValueError, match=r"up: got shape \(3,\), gate has \(2,\)"):
        swiglu(torch.ones(2), torch.ones(3))
