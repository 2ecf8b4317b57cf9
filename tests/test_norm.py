"""layer_norm and rms_norm on every backend: PyTorch's path and the reference against float64; the Triton kernels, in the
interpreter, are in test_norm_triton.py."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from wikigpt.kernels import LayerNorm, RMSNorm, layer_norm, rms_norm

from tests.conftest import assert_as_accurate_as
from tests.norm_cases import FUNCTIONS, Case, check, outputs
from wikigpt import kernels

SHAPES = [(1, 1), (3, 7), (2, 5, 40), (4, 257)]
HALF = torch.bfloat16


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


DTYPES = [  # x, weight, bias, residual
    (torch.float32, torch.float32, torch.float32, torch.float32),
    (HALF, HALF, None, HALF),
    (HALF, torch.float32, torch.float32, torch.float32),
    (torch.float32, HALF, HALF, HALF),
    (torch.float16, torch.float32, None, HALF),
    (HALF, None, torch.float32, None),  # not HALF: PyTorch's own sums the gradient of such a bias in bfloat16
    (torch.float64, torch.float64, None, torch.float64),
]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_sum_norm_and_gradients_are_as_accurate_as_the_references(op, prenorm, dtypes, backend):
    check(Case(op, (3, 5, 40), *dtypes, options={"prenorm": prenorm}), backend)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("bias", [None, torch.float32])
def test_rms_norm_multiplies_by_one_plus_weight(bias, backend):
    x, w = torch.randn(4, 9), torch.randn(9)
    torch.testing.assert_close(rms_norm(x, w, unit_offset=True, backend=backend), rms_norm(x, 1 + w, backend="reference"))
    check(Case("rms_norm", (4, 9), HALF, HALF, bias, options={"unit_offset": True}), backend)


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_the_sum_is_rounded_once_to_the_residuals_dtype_and_y_is_its_norm(backend, op):
    norm = FUNCTIONS[op]
    x, residual = torch.randn(6, 32, dtype=HALF), torch.randn(6, 32)
    y, h = norm(x, residual=residual, prenorm=True, backend=backend)
    assert (y.dtype, h.dtype) == (HALF, torch.float32)
    assert torch.equal(h, x.float() + residual)
    y, h = norm(x.float(), residual=residual.to(HALF), prenorm=True, backend=backend)
    assert (y.dtype, h.dtype) == (torch.float32, HALF)
    assert torch.equal(h, (x.float() + residual.to(HALF).float()).to(HALF))
    torch.testing.assert_close(y, norm(h.float(), backend="reference"))


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_without_residual_and_dropout_the_sum_is_x(backend, op):
    x = torch.randn(3, 8)
    y, h = FUNCTIONS[op](x, prenorm=True, backend=backend)
    assert torch.equal(h, x)
    assert torch.equal(y, FUNCTIONS[op](x, backend=backend))


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout_drops_elements_of_x_and_keeps_the_residual(backend, op):
    x, residual = torch.randn(400, 100), torch.randn(400, 100)
    h = FUNCTIONS[op](x, residual=residual, dropout_p=0.3, prenorm=True, backend=backend)[1]
    dropped = h == residual
    # Standard deviation of the mean of 40,000 draws: 0.0023.
    assert abs(dropped.double().mean().item() - 0.3) < 4 * 0.0023
    torch.testing.assert_close((h - residual)[~dropped], x[~dropped] / 0.7, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout_follows_pytorchs_generator(backend, op):
    def run():
        return FUNCTIONS[op](x, dropout_p=0.5, backend=backend)

    x = torch.randn(10, 20)
    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(first, run())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_activation_checkpointing_replays_dropout(op):
    def run(use):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        call = lambda x: FUNCTIONS[op](x, residual=x, dropout_p=0.4, backend="reference")  # noqa: E731
        (checkpoint(call, leaf, use_reentrant=False) if use else call(leaf)).square().sum().backward()
        return leaf.grad

    x = torch.randn(6, 24)
    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize(("ours", "theirs"), [(LayerNorm, torch.nn.LayerNorm), (RMSNorm, torch.nn.RMSNorm)])
@pytest.mark.parametrize("affine", [True, False])
def test_the_modules_load_torchs_state_dicts(ours, theirs, affine):
    source, target = theirs(12, eps=1e-5, elementwise_affine=affine), ours(12, eps=1e-5, elementwise_affine=affine)
    for p in source.parameters():
        torch.nn.init.normal_(p)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 12)
    torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize(("module", "function"), [(LayerNorm, layer_norm), (RMSNorm, rms_norm)])
def test_the_modules_take_a_residual(module, function):
    x, residual = torch.randn(3, 12), torch.randn(3, 12)
    y, h = module(12, eps=1e-5)(x, residual, prenorm=True)
    expected = function(x, torch.ones(12), eps=1e-5, residual=residual, prenorm=True)
    torch.testing.assert_close((y, h), expected)


def test_rms_norm_without_eps_takes_the_machine_epsilon_as_torch_does():
    x = torch.randn(3, 12) * 1e-3
    torch.testing.assert_close(RMSNorm(12, eps=None)(x), torch.nn.RMSNorm(12, eps=None)(x))


def test_a_fresh_unit_offset_module_multiplies_by_one():
    x, module = torch.randn(3, 12), RMSNorm(12, unit_offset=True)
    assert (module.weight == 0).all()
    torch.testing.assert_close(module(x), rms_norm(x))


@pytest.mark.parametrize("module", [LayerNorm, RMSNorm])
def test_the_modules_normalise_one_dimension(module):
    assert module((8,))(torch.randn(2, 8)).shape == (2, 8)
    with pytest.raises(ValueError, match=r"normalized_shape: got \(4, 8\), only the last dimension"):
        module((4, 8))


@pytest.mark.parametrize("function", [layer_norm, rms_norm])
def test_no_row_gives_no_row(function):
    assert function(torch.empty(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_autocast_changes_nothing(op, backend):
    x, w = torch.randn(4, 16), torch.randn(16)
    with torch.autocast("cpu", torch.bfloat16):
        y = FUNCTIONS[op](x, w, backend=backend)
        assert FUNCTIONS[op](x.to(HALF), w, backend=backend).dtype == HALF
    assert torch.equal(y, FUNCTIONS[op](x, w, backend=backend))


META = torch.ones(3, device="meta")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layer_norm(torch.ones(2, 3, dtype=torch.int64)), TypeError, "x: got dtype torch.int64"),
        (lambda: layer_norm(torch.ones(2, 0)), ValueError, r"x: got shape \(2, 0\)"),
        (lambda: layer_norm(torch.ones(())), ValueError, r"x: got shape \(\)"),
        (lambda: layer_norm(torch.ones(2, 3), torch.ones(4)), ValueError, r"weight: got shape \(4,\), x needs \(3,\)"),
        (lambda: layer_norm(torch.ones(2, 3), None, torch.ones(1)), ValueError, r"bias: got shape \(1,\)"),
        (lambda: rms_norm(torch.ones(2, 3), bias=torch.ones(1)), ValueError, r"bias: got shape \(1,\)"),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(3).int()), TypeError, "weight: got dtype torch.int32"),
        (lambda: rms_norm(torch.ones(2, 3), META), ValueError, "weight: is on meta, x is on cpu"),
        (lambda: rms_norm(torch.ones(2, 3), residual=META), ValueError, r"residual: got shape \(3,\), x needs \(2, 3\)"),
        (lambda: rms_norm(torch.ones(2, 3), None, -1.0), ValueError, "eps: got -1.0"),
        (lambda: rms_norm(torch.ones(2, 3), None, float("nan")), ValueError, "eps: got nan"),
        (lambda: layer_norm(torch.ones(2, 3), dropout_p=1.0), ValueError, "dropout_p: got 1.0, must be at least 0 and below 1"),
        (lambda: layer_norm(torch.ones(2, 3), dropout_p=-0.1), ValueError, "dropout_p: got -0.1"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_both_compile_without_a_graph_break():
    x, w = torch.randn(4, 8), torch.randn(8)
    compiled = torch.compile(lambda x, w: kernels.layer_norm(x, w) + kernels.rms_norm(x, w), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, w), layer_norm(x, w) + rms_norm(x, w))


def test_meta_tensors_give_shapes_and_dtypes():
    x = torch.empty(3, 8, dtype=HALF, device="meta")
    y, h = layer_norm(x, residual=x.float(), prenorm=True)
    assert (y.shape, y.dtype, h.shape, h.dtype) == (x.shape, HALF, x.shape, torch.float32)


def test_outputs_of_a_case_are_reproducible():
    case = Case("layer_norm", (3, 8), residual=torch.float32, options={"dropout_p": 0.5})
    first, second = (outputs(case, "reference", case.inputs()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
