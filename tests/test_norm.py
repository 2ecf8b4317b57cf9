"""layer_norm and rms_norm on every backend: PyTorch's path and the reference against float64; the Triton kernels, in the
interpreter, are in test_norm_triton.py."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from wikigpt.kernels import LayerNorm, RMSNorm, layer_norm, rms_norm
from wikigpt.kernels._dispatch import why_not_triton

from tests.conftest import assert_as_accurate_as
from tests.norm_cases import FUNCTIONS, Case, check, outputs
from wikigpt import kernels

interpreted = pytest.mark.skipif(why_not_triton("cpu") is not None, reason=str(why_not_triton("cpu")))
BACKENDS = ["auto", "reference", "torch", pytest.param("triton", marks=interpreted)]
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


MODULES = [(LayerNorm, torch.nn.LayerNorm), (RMSNorm, torch.nn.RMSNorm)]
SIZES = [8, (8,), [8], torch.Size([8]), (4, 8), [4, 8], (3, 4, 8), np.int64(8), 0, (4, 0)]
CONSTRUCTIONS = [
    *((size, {}) for size in SIZES),
    *((size, {"elementwise_affine": False}) for size in SIZES),
    ((4, 8), {"dtype": torch.float64}),
    ((4, 8), {"bias": False}),
    (8, {"bias": False, "dtype": torch.bfloat16}),
    (8, {"device": "meta"}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "options"), CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), MODULES)
def test_the_modules_are_made_and_called_as_torchs(ours, theirs, size, options, backend):
    if (theirs is torch.nn.RMSNorm and "bias" in options) or (backend == "triton" and "device" in options):
        pytest.skip("RMSNorm has no bias, and Triton no meta tensors")
    a, b = ours(size, eps=1e-5, **options, backend=backend), theirs(size, eps=1e-5, **options)
    assert [(name, p.shape, p.dtype, p.device) for name, p in a.named_parameters()] == [
        (name, p.shape, p.dtype, p.device) for name, p in b.named_parameters()
    ]
    x = torch.randn(2, 3, 4, *b.normalized_shape[-1:], dtype=options.get("dtype"), device=options.get("device"))
    y, expected = a(x), b(x)
    assert (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, expected.device)
    if not y.is_meta:
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), MODULES)
def test_the_modules_refuse_what_torchs_refuse(ours, theirs, affine):
    for size, shape in (((8,), (2, 7)), ((4, 8), (2, 4, 7)), ((4, 8), (8,)), ((), (2, 8)), ((8,), ())):
        x = torch.randn(shape)
        for module in (theirs, ours):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                module(size, elementwise_affine=affine)(x)


# ---- what PyTorch's functions take ----

TORCHS = {"layer_norm": lambda x, shape, w, b, eps: F.layer_norm(x, shape, w, b, eps),
          "rms_norm": lambda x, shape, w, b, eps: F.rms_norm(x, shape, w, eps)}  # fmt: skip
OURS = {"layer_norm": lambda x, shape, w, b, eps, **o: layer_norm(x, w, b, eps, normalized_shape=shape, **o),
        "rms_norm": lambda x, shape, w, b, eps, **o: rms_norm(x, w, eps, normalized_shape=shape, **o)}  # fmt: skip
EPS = [
    1e-5,
    0,
    1,
    -0.5,
    math.nan,
    math.inf,
    np.float32(1e-5),
    np.float64(1e-5),
    torch.tensor(1e-5),
    None,
    "x",
    1j,
    torch.ones(2),
]
SHAPED = [  # x, normalized_shape
    ((3,), (3,)), ((2, 3), (3,)), ((2, 3), (2, 3)), ((2, 3, 4), (3, 4)), ((2, 3, 4), (2, 3, 4)), ((2, 0), (0,)), ((0, 3), (3,)),
    ((0, 0), (0,)), ((0,), (0,)), ((2, 3, 0), (3, 0)), ((2, 0, 3), (0, 3)), ((2, 0, 3), (3,)), ((), ()), ((2, 3), ()),
    ((2, 3), (2,)), ((2, 3), (1,)), ((3, 4), (2, 3, 4)), ((2, 3, 4), (4, 3)),
]  # fmt: skip
KINDS = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.bool,
    torch.complex64,
]
CALLS = [
    *(((2, 3), (3,), torch.float32, None, eps) for eps in EPS),
    *((*shapes, torch.float32, weight, 1e-5) for shapes in SHAPED for weight in (None, torch.float32)),
    *(((2, 3), (3,), kind, weight, 1e-5) for kind in KINDS for weight in (None, kind)),
    *(((2, 3), (3,), kind, weight, 1e-5) for kind in KINDS[:3] for weight in KINDS),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_what_pytorchs_take_is_taken_and_what_they_refuse_is_refused(op, call, backend):
    """But for dtypes of weights: x of any floating dtype goes with weights of any."""
    shape, normalized_shape, dtype, weight_dtype, eps = call
    x, w = torch.randn(shape).to(dtype), None if weight_dtype is None else torch.randn(normalized_shape).to(weight_dtype)
    b = w if op == "layer_norm" else None
    try:
        expected = TORCHS[op](x, normalized_shape, w, b, eps)
    except (RuntimeError, TypeError, ValueError, IndexError):
        if weight_dtype != dtype and {dtype, weight_dtype} <= set(KINDS[:4]):
            assert OURS[op](x, normalized_shape, w, b, eps, backend=backend).dtype == dtype
            return
        with pytest.raises((TypeError, ValueError), match=r"x: got|weight: got|normalized_shape: got|eps: got"):
            OURS[op](x, normalized_shape, w, b, eps, backend=backend)
        return
    y = OURS[op](x, normalized_shape, w, b, eps, backend=backend)
    wide = {torch.float64: 1e-12, torch.complex64: 1e-5}.get(dtype, 1e-5 if dtype == torch.float32 else 2e-2)
    torch.testing.assert_close(y, expected, rtol=wide, atol=wide, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, HALF, torch.float16])
def test_rms_norm_without_eps_is_pytorchs(dtype, backend):
    """The epsilon of float32 for 16 bits too: that of the dtype would be 0.008 in bfloat16."""
    x = (torch.randn(3, 12) * 1e-3).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(rms_norm(x, None, None, backend=backend), F.rms_norm(x, (12,)), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        RMSNorm(12, eps=None, dtype=dtype, backend=backend)(x), F.rms_norm(x, (12,)), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nested_tensors_are_pytorchs(backend, layout):
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(5, 8)], layout=layout)
    w, b = torch.randn(2, 8)
    y = layer_norm(x, w, b, backend=backend)
    for mine, theirs in zip(y.unbind(), F.layer_norm(x, (8,), w, b).unbind()):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_several_dimensions_with_everything_on_are_one_of_their_product(op, backend):
    x, residual, w = torch.randn(5, 3, 4), torch.randn(5, 3, 4), torch.randn(3, 4)
    options = {"eps": 1e-3, "prenorm": True, "backend": backend}
    y, h = FUNCTIONS[op](x, w, bias=w, residual=residual, **options)
    flat = FUNCTIONS[op](x.flatten(1), w.flatten(), bias=w.flatten(), residual=residual.flatten(1), **options)
    assert torch.equal(y.flatten(1), flat[0])
    assert torch.equal(h.flatten(1), flat[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 0), (0, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_their_gradients_have_the_shapes_of_the_inputs(op, shape, backend):
    x = torch.randn(5, *shape, requires_grad=True)
    w, residual = torch.randn(shape, requires_grad=True), torch.randn(5, *shape, requires_grad=True)
    y, h = FUNCTIONS[op](x, w, residual=residual, prenorm=True, backend=backend)
    grads = torch.autograd.grad((y.sum() + h.sum()), (x, w, residual))
    assert [g.shape for g in grads] == [x.shape, w.shape, residual.shape]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_changed_gradients_change_no_other_and_no_second_backward(op, backend):
    """As gradient clipping by task does: the graph is kept, .grad is changed in place."""
    x, residual, w = (
        torch.randn(4, 8, requires_grad=True),
        torch.randn(4, 8, requires_grad=True),
        torch.randn(8, requires_grad=True),
    )
    y, h = FUNCTIONS[op](x, w, residual=residual, prenorm=True, backend=backend)
    loss = y.square().sum() + h.sum()
    first = [g.clone() for g in torch.autograd.grad(loss, (x, residual, w), retain_graph=True)]
    loss.backward(retain_graph=True)
    x.grad.data.fill_(7.0)
    assert torch.equal(residual.grad, first[1])
    for leaf in (residual, w):
        leaf.grad.data.fill_(7.0)
    again = torch.autograd.grad(loss, (x, residual, w))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


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
        (lambda: layer_norm(torch.ones(())), ValueError, r"x: got shape \(\)"),
        (lambda: layer_norm(torch.ones(2, 3), torch.ones(4)), ValueError, r"weight: got shape \(4,\), x needs \(3,\)"),
        (lambda: layer_norm(torch.ones(2, 3), None, torch.ones(1)), ValueError, r"bias: got shape \(1,\)"),
        (lambda: rms_norm(torch.ones(2, 3), bias=torch.ones(1)), ValueError, r"bias: got shape \(1,\)"),
        (lambda: layer_norm(torch.ones(2, 3), torch.ones(3).int()), TypeError, "weight: got dtype torch.int32"),
        (lambda: rms_norm(torch.ones(2, 3), None, bias=torch.ones(3).int()), TypeError, "bias: got dtype torch.int32"),
        (lambda: layer_norm([1.0]), TypeError, "x: got list, allowed are tensors"),
        (lambda: layer_norm(torch.ones(2, 3), [1.0]), TypeError, "weight: got list, allowed are tensors"),
        (lambda: layer_norm(torch.ones(2, 3), torch.tensor(1.0)), ValueError, r"weight: got shape \(\), must have"),
        (lambda: layer_norm(torch.ones(2, 3), torch.ones(3, 3)), ValueError, r"weight: got shape \(3, 3\), x needs \(2, 3\)"),
        (lambda: layer_norm(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)), ValueError, r"bias: got shape \(3,\), x needs"),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(4).long()), ValueError, r"weight: got shape \(4,\), x needs \(3,\)"),
        (lambda: rms_norm(torch.ones(2, 3) * 1j, normalized_shape=(2,)), ValueError, r"normalized_shape: got \(2,\), the last"),
        (lambda: rms_norm(torch.ones(2, 3), normalized_shape=(2,)), ValueError, r"normalized_shape: got \(2,\), the last"),
        (lambda: rms_norm(torch.ones(2, 3), META), ValueError, "weight: is on meta, x is on cpu"),
        (lambda: rms_norm(torch.ones(2, 3), residual=META), ValueError, r"residual: got shape \(3,\), x needs \(2, 3\)"),
        (lambda: layer_norm(torch.ones(2, 3), eps=None), TypeError, "eps: got NoneType, allowed is float"),
        (lambda: rms_norm(torch.ones(2, 3), None, "1e-5"), TypeError, "eps: got str, allowed is float"),
        (lambda: layer_norm(torch.ones(2, 3), dropout_p=None), TypeError, "dropout_p: got NoneType"),
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


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("function", [layer_norm, rms_norm])
def test_lengths_that_change_are_compiled_once(function, backend):
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x: function(x, backend=backend), fullgraph=True, dynamic=True, backend=counter)
    for length in (3, 4, 7, 12):
        x = torch.randn(2, length, 8, requires_grad=True)
        torch.testing.assert_close(compiled(x), function(x, backend=backend))
    assert counter.frame_count == 1


def test_meta_tensors_give_shapes_and_dtypes():
    x = torch.empty(3, 8, dtype=HALF, device="meta")
    y, h = layer_norm(x, residual=x.float(), prenorm=True)
    assert (y.shape, y.dtype, h.shape, h.dtype) == (x.shape, HALF, x.shape, torch.float32)


def test_outputs_of_a_case_are_reproducible():
    case = Case("layer_norm", (3, 8), residual=torch.float32, options={"dropout_p": 0.5})
    first, second = (outputs(case, "reference", case.inputs()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
