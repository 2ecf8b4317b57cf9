"""GELU, SwiGLU and GEGLU with bias and dropout against their formulas in float64, output and every gradient."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from wikigpt.kernels import _dispatch, bias_gelu, geglu, gelu, swiglu
from wikigpt.kernels.activation import activation_reference

from tests import far
from tests.conftest import assert_as_accurate_as

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: Triton compiles")

BACKENDS = ["auto", "reference", "torch", pytest.param("triton", marks=interpreted)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FP8 = torch.float8_e4m3fn
ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    x = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)


def plain(activation, gate, up=None, gate_bias=None, up_bias=None):
    """The formula by PyTorch's operators, rounded after each one."""
    y = ACTIVATIONS[activation](gate if gate_bias is None else gate + gate_bias)
    return y if up is None else y * (up if up_bias is None else up + up_bias)


def ours(activation, gate, up=None, gate_bias=None, up_bias=None, *, backend="auto", packed=False):
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    if up is None:
        return bias_gelu(gate, gate_bias, approximate, backend=backend)
    both = (torch.cat((gate, up), dim=-1),) if packed else (gate, up)
    options = {"gate_bias": gate_bias, "up_bias": up_bias, "backend": backend}
    return swiglu(*both, **options) if activation == "silu" else geglu(*both, approximate=approximate, **options)


def with_gradients(function, inputs, grad, dtype, **options):
    leaves = [x if x is None else x.to(dtype).requires_grad_() for x in inputs]
    y = function(*leaves, **options)
    wanted = [x for x in leaves if x is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(dtype))]


def check(activation, inputs, dtype, **options):
    """Output and gradients by the numeric rule. The inputs are already rounded to dtype."""
    grad = random(*inputs[0].shape, dtype=dtype, seed=99)
    run = lambda function, as_dtype, **more: with_gradients(  # noqa: E731
        lambda *x, **o: function(activation, *x, **o), inputs, grad, as_dtype, **more
    )
    truths, plains, got = run(plain, torch.float64), run(plain, dtype), run(ours, dtype, **options)
    for one, simple, truth in zip(got, plains, truths):
        assert one.dtype == dtype
        assert_as_accurate_as(one, simple, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_as_accurate_as_pytorchs(approximate, backend):
    if backend == "triton":
        pytest.skip("PyTorch's gelu is one kernel already")
    x = 3 * random(5, 33)
    truth = F.gelu(x.double(), approximate=approximate)
    assert_as_accurate_as(gelu(x, approximate, backend=backend), F.gelu(x, approximate=approximate), truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_bias_gelu_is_as_accurate_as_pytorchs(activation, bias, dtype, backend):
    x, b = random(3, 7, 72, dtype=dtype, scale=3), random(72, dtype=dtype, seed=1)
    check(activation, (x, None, b if bias else None), dtype, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activations_are_as_accurate_as_pytorchs(activation, bias, packed, dtype, backend):
    gate, up = random(21, 40, dtype=dtype, scale=3), random(21, 40, dtype=dtype, seed=1)
    biases = (random(40, dtype=dtype, seed=2), random(40, dtype=dtype, seed=3)) if bias else (None, None)
    check(activation, (gate, up, *biases), dtype, packed=packed, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", [1, 7, 100, 515])
def test_any_number_of_features(features, backend):
    x, b = random(5, features, scale=3), random(features, seed=1)
    check("gelu", (x, None, b), torch.float32, backend=backend)
    check("silu", (x, random(5, features, seed=2)), torch.float32, packed=True, backend=backend)
    check("silu", (x, random(5, features, seed=2), b, None), torch.float32, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_and_small_inputs(activation, backend):
    x = torch.tensor([-1e4, -100.0, -12.0, -5.0, -1e-4, -1e-20, 0.0, 1e-20, 1e-4, 12.0, 100.0, 1e4]).requires_grad_()
    y = ours(activation, x, torch.ones_like(x), backend=backend)
    wide = x.detach().double().requires_grad_()
    truth = plain(activation, wide, torch.ones_like(wide))
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-6)
    got, expected = torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(truth.sum(), wide)[0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_strides_and_columns_are_taken_as_they_come(backend):
    wide = random(6, 128)
    gate, up = wide.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(gate, up, backend=backend), F.silu(gate) * up)
    torch.testing.assert_close(swiglu(wide.t(), wide.t(), backend=backend), F.silu(wide.t()) * wide.t())
    columns = wide.view(2, 3, 128).transpose(0, 1)
    torch.testing.assert_close(bias_gelu(columns, wide[0], backend=backend), F.gelu(columns + wide[0]))
    one = wide[0, ::2]
    torch.testing.assert_close(bias_gelu(one, backend=backend), F.gelu(one))
    expanded = wide[:1].expand(6, 128)
    torch.testing.assert_close(swiglu(expanded, backend=backend), (F.silu(gate[:1]) * up[:1]).expand(6, 64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_gradient(backend):
    x, b = random(6, 40).requires_grad_(), random(40, seed=1).requires_grad_()
    got = torch.autograd.grad(bias_gelu(x, b, backend=backend).sum(), (x, b))
    torch.testing.assert_close(got, torch.autograd.grad(F.gelu(x + b).sum(), (x, b)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_empty_inputs(shape, backend):
    x, b = torch.randn(shape).requires_grad_(), torch.randn(shape[-1]).requires_grad_()
    y = bias_gelu(x, b, backend=backend)
    assert y.shape == shape
    dx, db = torch.autograd.grad(y.sum(), (x, b))
    assert dx.shape == shape
    assert torch.equal(db, torch.zeros_like(b))
    assert swiglu(x, x, backend=backend).shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_computed_for_what_asks_for_one(backend):
    gate, up = random(4, 16), random(4, 16, seed=1)
    a, b = random(16, seed=2), random(16, seed=3)
    for wanted in range(4):
        leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate((gate, up, a, b))]
        got = torch.autograd.grad(
            swiglu(*leaves[:2], gate_bias=leaves[2], up_bias=leaves[3], backend=backend).sum(), leaves[wanted]
        )
        expected = torch.autograd.grad(plain("silu", *leaves).sum(), leaves[wanted])
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_bias_of_16_bit_inputs_leaves_their_dtype(backend):
    x, b = random(8, 64, dtype=torch.bfloat16).requires_grad_(), random(64, seed=1).requires_grad_()
    y = bias_gelu(x, b, backend=backend)
    dx, db = torch.autograd.grad(y.sum(), (x, b))
    assert (y.dtype, dx.dtype, db.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bias_gelu(x, b, backend=backend), y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", [64, 61])
def test_dropout_keeps_the_right_share_scales_it_and_depends_on_the_generator(features, backend):
    x = random(64, features).abs() + 1

    def draw(seed):
        torch.manual_seed(seed)
        return swiglu(x, x, dropout_p=0.25, backend=backend)

    y, whole = draw(0), swiglu(x, x)
    kept = y != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.03
    torch.testing.assert_close(y[kept], whole[kept] / 0.75)
    assert torch.equal(y, draw(0))
    assert not torch.equal(y, draw(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_of_dropout_drops_what_the_forward_dropped(backend):
    x, b = random(16, 40).abs().add(1).requires_grad_(), random(40, seed=1).abs().requires_grad_()
    y = bias_gelu(x, b, dropout_p=0.5, backend=backend)
    keep = (y != 0).detach()
    got = torch.autograd.grad(y, (x, b), random(16, 40, seed=2))
    expected = torch.autograd.grad(F.gelu(x + b) * keep * 2, (x, b), random(16, 40, seed=2))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_inputs_on_the_cpu_and_their_second_derivative(activation, packed):
    gate, up = random(600, 250), random(600, 250, seed=1)
    check(activation, (gate, up), torch.float32, packed=packed)
    leaves = [x.clone().requires_grad_() for x in (gate, up)]

    def second(function, **options):
        y = function(activation, *leaves, **options)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    torch.testing.assert_close(second(ours, packed=packed), second(plain), rtol=1e-4, atol=1e-4)
    only_up = [gate, up.clone().requires_grad_()]
    (grad,) = torch.autograd.grad(ours(activation, *only_up, packed=packed).sum(), only_up[1:])
    torch.testing.assert_close(grad, ACTIVATIONS[activation](gate))
    jacobian = torch.func.grad(lambda x: ours(activation, x, up, packed=packed).sum())(gate)
    torch.testing.assert_close(jacobian, torch.func.grad(lambda x: plain(activation, x, up).sum())(gate))


def test_bad_arguments_are_named():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="approximate: got 'sigmoid'"):
        gelu(torch.ones(2), "sigmoid")
    with pytest.raises(ValueError, match="approximate: got 'erf'"):
        bias_gelu(x, approximate="erf")
    with pytest.raises(ValueError, match="approximate: got 'erf'"):
        geglu(x, approximate="erf")
    with pytest.raises(ValueError, match=r"up: got shape \(3,\), gate has \(2,\)"):
        swiglu(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="gate: got 3 features without up"):
        swiglu(torch.ones(2, 3))
    with pytest.raises(ValueError, match="gate: got a scalar"):
        swiglu(torch.ones(()))
    with pytest.raises(ValueError, match="x: got a scalar"):
        bias_gelu(torch.ones(()))
    with pytest.raises(TypeError, match=r"x: got dtype torch.int64, allowed are float16"):
        bias_gelu(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"up: got dtype torch.bfloat16, gate has torch.float32"):
        geglu(x, x.bfloat16())
    with pytest.raises(ValueError, match=r"bias: got shape \(3,\), need \(4,\)"):
        bias_gelu(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"up_bias: got shape \(4,\), need \(2,\)"):
        swiglu(x, up_bias=torch.ones(4))
    with pytest.raises(TypeError, match=r"gate_bias: got dtype torch.int64"):
        swiglu(x, x, gate_bias=torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="bias: is on meta, the input on cpu"):
        bias_gelu(x, torch.ones(4, device="meta"))
    with pytest.raises(ValueError, match="up: is on meta, gate on cpu"):
        swiglu(x, x.to("meta"))
    with pytest.raises(ValueError, match=r"dropout_p: got 1.0, must be at least 0 and below 1"):
        bias_gelu(x, dropout_p=1.0)


@pytest.mark.parametrize("function", [gelu, bias_gelu, swiglu, geglu])
@pytest.mark.parametrize(
    "wrong", [1.0, [1.0], np.ones(4), *(torch.ones(4).to(d) for d in (torch.int32, torch.bool, torch.complex64, FP8))], ids=str
)
def test_what_is_no_tensor_of_floats_is_named(function, wrong):
    with pytest.raises(TypeError, match=r"(x|gate): got (dtype|float|list|ndarray)"):
        function(wrong)


def test_an_up_or_a_bias_that_is_no_tensor_is_named():
    x = torch.ones(2, 4)
    with pytest.raises(TypeError, match="up: got list, allowed are tensors"):
        swiglu(x, [1.0])
    with pytest.raises(TypeError, match="bias: got list, allowed are tensors"):
        bias_gelu(x, [1.0])


CALLS = {
    "bias_gelu": lambda x, **o: bias_gelu(x, **o),
    "swiglu": lambda x, **o: swiglu(x, **o),
    "geglu": lambda x, **o: geglu(x, x, **o),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_dropout_p_may_be_a_number_of_any_type(call, backend):
    x, seen = random(3, 8), []
    for p in (0.25, np.float32(0.25), np.float64(0.25), np.array(0.25), torch.tensor(0.25)):
        torch.manual_seed(0)
        seen.append(CALLS[call](x, dropout_p=p, backend=backend))
    assert all(torch.equal(y, seen[0]) for y in seen)
    for wrong in (None, "0.25", [0.25], 1j):
        with pytest.raises(TypeError, match=f"dropout_p: got {type(wrong).__name__}, allowed is float"):
            CALLS[call](x, dropout_p=wrong, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_reference_of_gelu_rounds_once(approximate, dtype):
    x = random(1000, dtype=dtype, scale=3.0)
    truth = F.gelu(x.double(), approximate=approximate)
    assert_as_accurate_as(gelu(x, approximate, backend="reference"), truth.to(dtype), truth)


def test_the_reference_is_the_formula_in_float64():
    gate, up, a, b = (
        random(3, 5).double(),
        random(3, 5, seed=1).double(),
        random(5, seed=2).double(),
        random(5, seed=3).double(),
    )
    x = gate + a
    expected = x / (1 + (-x).exp()) * (up + b)
    torch.testing.assert_close(activation_reference(gate, up, a, b, None, "silu", False, 0.0), expected)
    expected = x * torch.distributions.Normal(0.0, 1.0).cdf(x) * (up + b)
    torch.testing.assert_close(activation_reference(gate, up, a, b, None, "gelu", False, 0.0), expected)


FORMS = {
    "bias": lambda x, b: bias_gelu(x, b, "tanh", backend="triton"),
    "gated": lambda x, b: swiglu(x, x.detach(), up_bias=b, backend="triton"),
    "packed": lambda x, b: geglu(torch.cat((x, x), dim=-1), gate_bias=b, backend="triton"),
}


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_compiled_in_one_graph(form):
    x, b, grad = random(6, 40).requires_grad_(), random(40, seed=1).requires_grad_(), random(6, 40, seed=2)
    compiled = torch.compile(FORMS[form], fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, b), FORMS[form](x, b)
    assert torch.equal(y, expected)
    for got, want in zip(torch.autograd.grad(y, (x, b), grad), torch.autograd.grad(expected, (x, b), grad)):
        assert torch.equal(got, want)


def calls_in_graph(function, *inputs):
    """Names of the registered operators of this library in the compiled graph of a function."""
    names = []

    def record(graph, example_inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("wikigpt"))
        return graph.forward

    torch.compile(function, fullgraph=True, backend=record)(*inputs)
    return names


def test_a_compiled_graph_keeps_our_op_only_where_a_bias_gets_a_gradient(monkeypatch):
    # As on a GPU: without TRITON_INTERPRET's exception for the CPU, the first of the table is taken.
    first = lambda op, device, name: _dispatch._table[op][int(name == "torch")].function  # noqa: E731
    monkeypatch.setattr("wikigpt.kernels.activation.choose", first)
    x, b = random(6, 40).requires_grad_(), random(40, seed=1)
    assert calls_in_graph(lambda x, b: bias_gelu(x, b), x, b) == []
    assert calls_in_graph(lambda x: swiglu(x), x) == []
    assert calls_in_graph(lambda x, b: bias_gelu(x, b), x, b.requires_grad_()) == ["wikigpt.activation.default"]
    with torch.no_grad():
        assert calls_in_graph(lambda x, b: bias_gelu(x, b), x, b) == []


@interpreted
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_registered_operator_passes_opcheck(packed, dropout_p):
    seed = torch.tensor([5, 7]) if dropout_p else None
    gate = random(3, 4, 16 if packed else 8).requires_grad_()
    up = None if packed else random(3, 4, 8, seed=1).requires_grad_()
    biases = random(8, seed=2).requires_grad_(), random(8, seed=3).requires_grad_()
    inputs = (gate, up, *biases, seed, "gelu", packed, dropout_p)
    torch.library.opcheck(torch.ops.wikigpt.activation.default, inputs)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    torch.library.opcheck(torch.ops.wikigpt.activation_backward.default, (random(3, 4, 8, seed=4), True, False, *detached))


@interpreted
def test_checkpointing_draws_the_same_dropout_again():
    from torch.utils.checkpoint import checkpoint

    x, b = random(6, 40).requires_grad_(), random(40, seed=1).requires_grad_()
    function = lambda x, b: bias_gelu(x, b, dropout_p=0.5, backend="triton")  # noqa: E731
    torch.manual_seed(3)
    expected = torch.autograd.grad(function(x, b).sum(), (x, b))
    torch.manual_seed(3)
    got = torch.autograd.grad(checkpoint(function, x, b, use_reentrant=False).sum(), (x, b))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@interpreted
def test_triton_drops_what_the_reference_drops():
    x, up = random(9, 61), random(9, 61, seed=1)
    draw = []
    for backend in ("reference", "triton"):
        torch.manual_seed(3)
        draw.append(swiglu(x, up, dropout_p=0.4, backend=backend))
    torch.testing.assert_close(*draw)
    assert 0.3 < (draw[0] == 0).float().mean() < 0.5


@interpreted
def test_a_bias_gradient_over_several_strips():
    x, b = random(150, 20, scale=2), random(20, seed=1)
    check("gelu_tanh", (x, None, b), torch.float32, backend="triton")
    check("silu", (x, random(150, 20, seed=2), b, random(20, seed=3)), torch.float32, packed=True, backend="triton")


@interpreted
def test_derivatives_that_do_not_exist_are_refused():
    x = random(3, 8).requires_grad_()
    (grad,) = torch.autograd.grad(swiglu(x, x, backend="triton").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), x.detach())
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            swiglu(dual, dual, backend="triton")


@interpreted
def test_float64_is_computed_in_float64():
    x, b = random(3, 8).double().requires_grad_(), random(8, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: bias_gelu(x, b, backend="triton"), (x, b))
    assert torch.autograd.gradcheck(lambda x, b: swiglu(x, gate_bias=b[:4], backend="triton"), (x, b))


@interpreted
def test_extreme_inputs_give_no_nan():
    x = torch.tensor([-3e38, -1e30, -1e10, 1e10, 1e30, 3e38]).requires_grad_()
    for activation in ACTIVATIONS:
        y = ours(activation, x, torch.ones_like(x), backend="triton")
        assert torch.equal(y, x.clamp(min=0))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], (x > 0).float())


@interpreted
def test_nan_stays_nan():
    x = torch.tensor([float("nan"), 1.0]).requires_grad_()
    for activation in ACTIVATIONS:
        y = ours(activation, x, torch.ones_like(x), backend="triton")
        assert y.isnan().tolist() == [True, False]
        assert torch.autograd.grad(y.sum(), x)[0].isnan().tolist() == [True, False]


@interpreted
def test_tiles_cover_every_size_with_few_wasted_columns():
    from wikigpt.kernels.activation_triton import blocks

    for features in [*range(1, 300), 1000, 1536, 3072, 4096, 11008, 14336, 18944]:
        block_m, block_n = blocks(features, 2048, 1024)
        assert block_m * block_n == 2048
        assert -(-features // block_n) * block_n <= max(features * 2, 16)
        if features >= 1000:
            assert -(-features // block_n) * block_n <= 1.03 * features


@interpreted
@pytest.mark.parametrize("form", ["bias", "gated", "packed"])
def test_rows_may_lie_more_than_2_to_the_31_elements_apart(form, monkeypatch):
    far.leave_memory_alone(monkeypatch)
    x, b, grad = random(2, 64, dtype=torch.bfloat16), random(64, seed=1), random(2, 64, dtype=torch.bfloat16, seed=2)
    apart = far.strided(x, (2**31 + 64, 1))

    def run(x, grad):
        x = x.detach().requires_grad_()
        if form == "packed":
            y, grad = swiglu(x, backend="triton"), grad[:, :32]
        else:
            y = bias_gelu(x, b, backend="triton") if form == "bias" else swiglu(x, x.detach(), backend="triton")
        return y, torch.autograd.grad(y, x, grad)[0]

    for one, two in zip(run(apart, far.strided(grad, (2**31 + 64, 1))), run(x, grad)):
        assert torch.equal(one, two)


@interpreted
@pytest.mark.parametrize("n", [2**31, 2**31 + 1016])
def test_more_than_2_to_the_31_elements(n, monkeypatch):
    """Of a million programs the first, those around the middle and the last ones run."""
    from wikigpt.kernels import activation_triton

    far.leave_memory_alone(monkeypatch)
    guards = far.Guards(monkeypatch)
    for name in ("_forward", "_backward"):
        far.run_only(monkeypatch, activation_triton, name, lambda n: [0, n // 2, n - 2, n - 1])
    x, grad = (torch.empty(n, dtype=torch.bfloat16) for _ in range(2))
    middle = -(-n // 2048) // 2 * 2048
    for part in (parts := (slice(0, 2048), slice(middle, middle + 2048), slice(n - 2048, n))):
        x[part], grad[part] = random(2048, dtype=torch.bfloat16), random(2048, dtype=torch.bfloat16, seed=1)
    leaf = x.requires_grad_()
    y = bias_gelu(leaf, backend="triton")
    (dx,) = torch.autograd.grad(y, leaf, grad)
    for part in parts:
        few = x[part].detach().requires_grad_()
        expected = F.gelu(few)
        torch.testing.assert_close(y[part], expected)
        torch.testing.assert_close(dx[part], torch.autograd.grad(expected, few, grad[part])[0])
    guards.check()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("activation", "shape"),
    [
        # Each row compiles two kernels: by default every activation once and every tile and width of loads once.
        pytest.param(activation, shape, marks=[] if activation == default else pytest.mark.full)
        for activation in ACTIVATIONS
        for shape, default in (((8192, 11008), "silu"), ((16384, 3072), "gelu_tanh"), ((4099, 1001), "gelu"))
    ],
)
def test_gpu_large_inputs_are_accurate_and_repeat_bit_for_bit(shape, activation):
    rows, features = shape
    x, up = (torch.randn(rows, features, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    biases = [torch.randn(features, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    grad = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16)
    run = lambda function, dtype, **o: with_gradients(  # noqa: E731
        lambda *t, **p: function(activation, *t, **p), (x, up, *biases), grad, dtype, **o
    )
    first, second = run(ours, torch.bfloat16, backend="triton"), run(ours, torch.bfloat16, backend="triton")
    for one, two, simple, truth in zip(first, second, run(plain, torch.bfloat16), run(plain, torch.float64)):
        assert torch.equal(one, two)
        assert_as_accurate_as(one, simple, truth)


@pytest.mark.gpu
@pytest.mark.big
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_gpu_more_than_2_to_the_31_elements(bias, monkeypatch):
    guards = far.Guards(monkeypatch)
    x = torch.randn(2**16 + 3, 2**15, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(2**15, device="cuda", dtype=torch.bfloat16) if bias else None
    y = bias_gelu(x, b, backend="triton")
    guards.check()
    for part in far.seams(x.numel()):
        columns = torch.arange(part.start, part.stop, device="cuda") % x.shape[1]
        expected = F.gelu(x.view(-1)[part].float() + (b[columns].float() if bias else 0)).to(x.dtype)
        torch.testing.assert_close(y.view(-1)[part], expected)
