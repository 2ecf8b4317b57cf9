"""layer_norm and rms_norm: PyTorch's path and the reference against float64."""

import pytest
import torch
import torch.nn.functional as F
from wikigpt.kernels import LayerNorm, RMSNorm, layer_norm, rms_norm

from tests.conftest import assert_as_accurate_as
from wikigpt import kernels

SHAPES = [(1, 1), (3, 7), (2, 5, 40), (4, 257)]


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_is_as_accurate_as_pytorchs(shape, dtype, backend):
    torch.manual_seed(sum(shape))
    x, w, b = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1]).to(dtype)
    truth = F.layer_norm(x.double(), shape[-1:], w.double(), b.double(), 1e-5)
    assert_as_accurate_as(layer_norm(x, w, b, 1e-5, backend=backend), F.layer_norm(x, shape[-1:], w, b, 1e-5), truth)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_as_accurate_as_pytorchs(shape, dtype, backend):
    torch.manual_seed(sum(shape))
    x, w = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w.double()
    assert_as_accurate_as(rms_norm(x, w, 1e-6, backend=backend), F.rms_norm(x, shape[-1:], w, 1e-6), truth)


@pytest.mark.parametrize(("ours", "theirs"), [(LayerNorm, torch.nn.LayerNorm), (RMSNorm, torch.nn.RMSNorm)])
def test_the_modules_load_torchs_state_dicts(ours, theirs):
    source, target = theirs(12, eps=1e-5), ours(12, eps=1e-5)
    for p in source.parameters():
        torch.nn.init.normal_(p)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 12)
    torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize("function", [layer_norm, rms_norm])
def test_no_row_gives_no_row(function):
    assert function(torch.empty(0, 5)).shape == (0, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layer_norm(torch.ones(2, 3, dtype=torch.int64)), TypeError, "x: got dtype torch.int64"),
        (lambda: layer_norm(torch.ones(2, 0)), ValueError, r"x: got shape \(2, 0\)"),
        (lambda: layer_norm(torch.ones(())), ValueError, r"x: got shape \(\)"),
        (lambda: layer_norm(torch.ones(2, 3), torch.ones(4)), ValueError, r"weight: got shape \(4,\), x needs \(3,\)"),
        (lambda: layer_norm(torch.ones(2, 3), None, torch.ones(1)), ValueError, r"bias: got shape \(1,\)"),
        (lambda: rms_norm(torch.ones(2, 3), None, -1.0), ValueError, "eps: got -1.0"),
        (lambda: rms_norm(torch.ones(2, 3), None, float("nan")), ValueError, "eps: got nan"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_both_compile_without_a_graph_break():
    x, w = torch.randn(4, 8), torch.randn(8)
    compiled = torch.compile(lambda x, w: kernels.layer_norm(x, w) + kernels.rms_norm(x, w), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, w), layer_norm(x, w) + rms_norm(x, w))
