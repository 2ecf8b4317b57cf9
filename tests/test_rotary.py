"""Rotary embedding: complex rotation by hand, the property it exists for, and every layout against float64."""

import os

import pytest
import torch
from wikigpt.kernels import apply_rotary_emb, apply_rotary_emb_qk, rotary_cos_sin
from wikigpt.kernels.rotary import apply_rotary_emb_reference

from tests import far
from tests.conftest import assert_as_accurate_as

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: Triton compiles")

BACKENDS = ["auto", "reference", "torch", pytest.param("triton", marks=interpreted)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x, cos, sin, positions=None, interleaved=False, backend="auto"):
    """Output and gradient by the numeric rule; plain PyTorch's is the reference in the same dtype."""
    grad = random(*x.shape, dtype=x.dtype, seed=9)

    def run(function, dtype, **options):
        leaf = x.detach().to(dtype).requires_grad_()
        y = function(leaf, cos.to(dtype), sin.to(dtype), positions=positions, interleaved=interleaved, **options)
        return y.detach(), torch.autograd.grad(y, leaf, grad.to(dtype))[0]

    truths, plains = run(apply_rotary_emb_reference, torch.float64), run(apply_rotary_emb_reference, x.dtype)
    for got, plain, truth in zip(run(apply_rotary_emb, x.dtype, backend=backend), plains, truths):
        assert got.dtype == x.dtype
        assert_as_accurate_as(got, plain, truth)


@pytest.mark.parametrize("interleaved", [False, True])
def test_each_pair_turns_by_position_times_frequency(interleaved):
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    cos, sin = rotary_cos_sin(torch.arange(5), 8, theta=100.0, dtype=torch.float64)
    turned = apply_rotary_emb(x, cos, sin, interleaved=interleaved)
    for s in range(5):
        for i in range(4):
            one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + 4)
            angle = torch.tensor(s * 100.0 ** (-2 * i / 8), dtype=torch.float64)
            expected = torch.complex(x[..., s, one], x[..., s, two]) * torch.polar(torch.ones((), dtype=torch.float64), angle)
            torch.testing.assert_close(torch.complex(turned[..., s, one], turned[..., s, two]), expected)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(m, n):
        a = apply_rotary_emb(q, *rotary_cos_sin(torch.tensor([m]), 16, dtype=torch.float64))
        b = apply_rotary_emb(k, *rotary_cos_sin(torch.tensor([n]), 16, dtype=torch.float64))
        return (a * b).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101))
    assert not torch.isclose(score(3, 1), score(3, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (64, 64), (24, 24), (80, 32), (7, 6), (10, 2)])
def test_output_and_gradient_are_as_accurate_as_plain_pytorch(head_dim, rotary_dim, dtype, interleaved, backend):
    cos, sin = rotary_cos_sin(torch.arange(11), rotary_dim, dtype=dtype)
    check(random(2, 3, 11, head_dim, dtype=dtype), cos, sin, interleaved=interleaved, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_dimensions_beyond_the_rotary_ones_pass_unchanged(interleaved, backend):
    x = random(2, 3, 5, 20)
    y = apply_rotary_emb(x, *rotary_cos_sin(torch.arange(1, 6), 12), interleaved=interleaved, backend=backend)
    assert torch.equal(y[..., 12:], x[..., 12:])
    assert not torch.isclose(y[..., :12], x[..., :12]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_any_strides(interleaved, backend):
    cos, sin = rotary_cos_sin(torch.arange(9), 8)
    for view in (
        random(2, 9, 5, 8).transpose(1, 2),  # (B, S, H, D)
        random(9, 2, 5, 8).permute(1, 2, 0, 3),  # (S, B, H, D)
        random(2, 9, 5, 24)[..., 8:16].transpose(1, 2),  # a third of a fused projection
        random(2, 5, 8, 9).transpose(2, 3),  # the last dimension is not dense
        random(1, 5, 9, 8).expand(2, 5, 9, 8),
    ):
        check(view, cos, sin, interleaved=interleaved, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_angles_of_each_sequence(backend):
    x, angles = random(2, 3, 5, 8), random(2, 5, 4)
    check(x, angles.cos(), angles.sin(), backend=backend)
    y = apply_rotary_emb(x, angles.cos(), angles.sin(), backend=backend)
    for b in range(2):
        torch.testing.assert_close(y[b : b + 1], apply_rotary_emb(x[b : b + 1], angles[b].cos(), angles[b].sin()))
    shared = apply_rotary_emb(x, angles[:1].cos(), angles[:1].sin(), backend=backend)
    torch.testing.assert_close(shared, apply_rotary_emb(x, angles[0].cos(), angles[0].sin()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_choose_rows_of_a_table(dtype, backend):
    x, (cos, sin) = random(2, 3, 5, 8), rotary_cos_sin(torch.arange(40), 8)
    shared = torch.tensor([7, 0, 39, 3, 3], dtype=dtype)
    own = torch.stack((shared, shared.flip(0)))
    for positions in (shared, own):
        check(x, cos, sin, positions=positions, backend=backend)
        expected = apply_rotary_emb(x, cos[positions], sin[positions])
        torch.testing.assert_close(apply_rotary_emb(x, cos, sin, positions=positions, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["halves", "pairs", "part", "in place", "qk", "large"])
@pytest.mark.parametrize(
    "dtypes", [(a, b) for a in DTYPES[:2] for b in DTYPES], ids=lambda pair: "-".join(str(d)[6:] for d in pair)
)
def test_16_bit_numbers_are_rounded_once(dtypes, form, backend):
    """Output and gradient are the 16-bit number next to the exact one, but for what float32 leaves open."""
    dtype, table = dtypes
    if form == "large" and backend == "triton":
        pytest.skip("a size at which PyTorch's operators take another way")
    cos, sin = rotary_cos_sin(torch.arange(9), 16, dtype=table)
    shape = (16, 29, 9, 16) if form == "large" else (2, 3, 9, 20 if form == "part" else 16)
    x, grad = random(*shape, dtype=dtype).requires_grad_(), random(*shape, dtype=dtype, seed=1)

    def turn(x, cos, sin, **options):
        if form == "qk":
            return apply_rotary_emb_qk(x, 2 * x, cos, sin, **options)[0]
        x = x * 1 if form == "in place" else x
        return apply_rotary_emb(x, cos, sin, interleaved=form == "pairs", inplace=form == "in place", **options)

    truth = x.detach().double().requires_grad_()
    exact = turn(truth, cos.double(), sin.double(), backend="reference")
    y = turn(x, cos, sin, backend=backend)
    pairs = [(y, exact), (torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(exact, truth, grad.double())[0])]
    for got, true in pairs:
        ulp = torch.finfo(dtype).eps * 2.0 ** true.abs().clamp(min=2**-14).log2().floor()
        assert got.dtype == dtype
        assert ((got.double() - true).abs() <= 0.5 * ulp + 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_angles_of_16_bit_inputs_leave_their_dtype(backend):
    cos, sin = rotary_cos_sin(torch.arange(9), 16)
    x = random(1, 2, 9, 16, dtype=torch.bfloat16)
    y = apply_rotary_emb(x, cos, sin, backend=backend)
    assert y.dtype == torch.bfloat16
    truth = apply_rotary_emb_reference(x.double(), cos.double(), sin.double())
    assert_as_accurate_as(y, truth.bfloat16(), truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_in_place_writes_into_x_and_has_the_same_gradient(interleaved, backend):
    cos, sin = rotary_cos_sin(torch.arange(9), 8)
    for base in (random(2, 5, 9, 12), random(2, 9, 5, 12).transpose(1, 2), random(2, 5, 12, 9).transpose(2, 3)):
        x, grad = base.clone(memory_format=torch.preserve_format), random(2, 5, 9, 12, seed=1)
        pointer = x.data_ptr()
        y = apply_rotary_emb(x, cos, sin, interleaved=interleaved, inplace=True, backend=backend)
        assert y is x
        assert y.data_ptr() == pointer
        torch.testing.assert_close(x, apply_rotary_emb_reference(base, cos, sin, interleaved=interleaved))

        leaf = base.clone().requires_grad_()
        turned = apply_rotary_emb(leaf * 2, cos, sin, interleaved=interleaved, inplace=True, backend=backend)
        expected = apply_rotary_emb_reference(leaf * 2, cos, sin, interleaved=interleaved)
        torch.testing.assert_close(torch.autograd.grad(turned, leaf, grad), torch.autograd.grad(expected, leaf, grad))


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learnt", [("sin",), ("cos", "sin"), ("x", "cos", "sin")], ids="-".join)
@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_the_angles_have_the_same_gradient(interleaved, learnt, dtype, backend):
    """Which reads the x that was overwritten."""
    tables = dict(zip(("cos", "sin"), rotary_cos_sin(torch.arange(9), 8)))
    leaves = {"x": random(2, 5, 9, 12, dtype=dtype), **tables}
    leaves = {name: leaf.requires_grad_(name in learnt) for name, leaf in leaves.items()}

    def gradients(**options):
        y = apply_rotary_emb(leaves["x"] * 1, leaves["cos"], leaves["sin"], interleaved=interleaved, **options)
        return torch.autograd.grad(y.float().square().sum(), [leaves[name] for name in learnt])

    torch.testing.assert_close(gradients(inplace=True, backend=backend), gradients(backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_on_a_view_of_a_projection_reaches_the_projections_gradient(backend):
    cos, sin = rotary_cos_sin(torch.arange(9), 8)
    leaf, grad = random(2, 9, 6, 8).requires_grad_(), random(2, 9, 6, 8, seed=1)

    def run(function):
        qkv = leaf * 1
        q, k = qkv[:, :, :3].transpose(1, 2), qkv[:, :, 3:5].transpose(1, 2)
        function(q, k)
        return qkv, torch.autograd.grad(qkv, leaf, grad)[0]

    def expect(q, k):
        for x in (q, k):
            x.copy_(apply_rotary_emb_reference(x.clone(), cos, sin))

    got = run(lambda q, k: apply_rotary_emb_qk(q, k, cos, sin, inplace=True, backend=backend))
    for one, two in zip(got, run(expect)):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_of_something_overwritten_by_in_place_is_refused(backend):
    cos, sin = rotary_cos_sin(torch.arange(9), 8)
    x = random(2, 5, 9, 8).requires_grad_().exp()  # exp keeps its output for the backward
    y = apply_rotary_emb(x, cos, sin, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_q_and_k_together_are_q_and_k_alone(inplace, backend):
    q, k = random(2, 6, 5, 16), random(2, 5, 2, 16, seed=1).transpose(1, 2)
    cos, sin = rotary_cos_sin(torch.arange(5), 16)
    expected = apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin)
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    grads = random(2, 6, 5, 16, seed=2), random(2, 2, 5, 16, seed=3)
    turned = apply_rotary_emb_qk(*[x * 1 for x in leaves], cos, sin, inplace=inplace, backend=backend)
    back = torch.autograd.grad(turned, leaves, grads)
    for got, want, gradient, grad in zip(turned, expected, back, grads):
        torch.testing.assert_close(got.detach(), want)
        torch.testing.assert_close(gradient, apply_rotary_emb(grad, cos, -sin))
    one = torch.autograd.grad(apply_rotary_emb_qk(*leaves, cos, sin, backend=backend)[1], leaves[1], grads[1])
    torch.testing.assert_close(one[0], back[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_second_derivative_is_that_of_a_rotation(backend):
    x = random(1, 2, 3, 8, dtype=torch.float64 if backend != "triton" else torch.float32).requires_grad_()
    cos, sin = rotary_cos_sin(torch.arange(3), 8, dtype=x.dtype)
    y = apply_rotary_emb(x, cos, sin, backend=backend)
    (grad,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((grad**2).sum(), x)
    plain = apply_rotary_emb_reference(x, cos, sin)
    (grad,) = torch.autograd.grad((plain**3).sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad((grad**2).sum(), x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8), (2, 2, 3, 0)])
@pytest.mark.parametrize("inplace", [False, True])
def test_empty_inputs(shape, inplace, backend):
    cos, sin = rotary_cos_sin(torch.arange(shape[2]), shape[3])
    x = torch.randn(shape).requires_grad_()
    y = apply_rotary_emb(x * 1, cos, sin, inplace=inplace, backend=backend)
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape
    nothing = torch.empty(3 if shape[2] == 3 else shape[2], 0)
    z = torch.randn(shape)
    assert torch.equal(apply_rotary_emb(z, nothing, nothing, backend=backend), z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_inputs_with_positions(backend):
    cos, sin = rotary_cos_sin(torch.arange(10), 8)
    x = torch.randn(2, 3, 0, 8)
    assert apply_rotary_emb(x, cos, sin, positions=torch.zeros(0, dtype=torch.int64), backend=backend).shape == x.shape


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_large_inputs_on_the_cpu_and_their_second_derivative(interleaved):
    x = random(2, 130, 8, 40).transpose(1, 2)
    cos, sin = rotary_cos_sin(torch.arange(200), 32)
    positions = torch.randint(200, (2, 130), generator=torch.Generator().manual_seed(1))
    check(x, cos, sin, positions=positions, interleaved=interleaved)
    leaf = x.clone().requires_grad_()

    def second(function):
        y = function(leaf, cos, sin, positions=positions, interleaved=interleaved)
        (grad,) = torch.autograd.grad((y**3).sum(), leaf, create_graph=True)
        return torch.autograd.grad((grad**2).sum(), leaf)

    torch.testing.assert_close(second(apply_rotary_emb), second(apply_rotary_emb_reference), rtol=1e-4, atol=1e-4)
    function = lambda x: apply_rotary_emb(x, cos[:130], sin[:130], interleaved=interleaved)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(function)(x[None])[0], function(x))


def test_bad_arguments_are_named():
    cos, sin = rotary_cos_sin(torch.arange(5), 8)
    x = torch.randn(2, 3, 5, 8)
    with pytest.raises(ValueError, match=r"x: got 3 dimensions, need 4: \(batch, heads, positions, head_dim\)"):
        apply_rotary_emb(x[0], cos, sin)
    with pytest.raises(ValueError, match="cos: turns 8 dimensions, head_dim of x is 7"):
        apply_rotary_emb(torch.randn(1, 1, 5, 7), cos, sin)
    with pytest.raises(ValueError, match=r"cos: got shape \(5, 4\), x needs \(6, R / 2\) or \(1, 6, R / 2\)"):
        apply_rotary_emb(torch.randn(1, 1, 6, 8), cos, sin)
    with pytest.raises(ValueError, match=r"sin: got shape \(5, 3\), cos has \(5, 4\)"):
        apply_rotary_emb(x, cos, sin[:, :3])
    with pytest.raises(TypeError, match=r"x: got dtype torch.int64"):
        apply_rotary_emb(x.long(), cos, sin)
    with pytest.raises(TypeError, match=r"sin: got dtype torch.int64"):
        apply_rotary_emb(x, cos, sin.long())
    with pytest.raises(ValueError, match="sin: is on meta, x on cpu"):
        apply_rotary_emb(x, cos, sin.to("meta"))
    with pytest.raises(TypeError, match=r"positions: got dtype torch.float32, allowed are int32 and int64"):
        apply_rotary_emb(x, cos, sin, positions=torch.zeros(5))
    with pytest.raises(ValueError, match=r"positions: got shape \(4,\), x needs \(5,\) or \(2, 5\)"):
        apply_rotary_emb(x, cos, sin, positions=torch.arange(4))
    with pytest.raises(ValueError, match="positions: is on meta, x on cpu"):
        apply_rotary_emb(x, cos, sin, positions=torch.arange(5, device="meta"))
    with pytest.raises(ValueError, match=r"cos: got shape \(2, 5, 4\), with positions a table"):
        apply_rotary_emb(x, cos.expand(2, 5, 4), sin, positions=torch.arange(5))
    with pytest.raises(ValueError, match="inplace: x is a leaf that requires a gradient"):
        apply_rotary_emb(x.clone().requires_grad_(), cos, sin, inplace=True)
    with pytest.raises(ValueError, match="inplace: x is expanded"):
        apply_rotary_emb(x[:1].expand(2, 3, 5, 8), cos, sin, inplace=True)
    with pytest.raises(ValueError, match="inplace: k lies where q lies"):
        apply_rotary_emb_qk(x, x[:, :2], cos, sin, inplace=True)
    qk = torch.randn(2, 3, 5, 16)
    apply_rotary_emb_qk(*qk.chunk(2, -1), cos, sin, inplace=True)
    apply_rotary_emb_qk(x[:0], x[:0], cos, sin, inplace=True)
    with pytest.raises(ValueError, match=r"k: got shape \(1, 3, 5, 8\), its batch is not that of q"):
        apply_rotary_emb_qk(x, x[:1], cos, sin)
    with pytest.raises(TypeError, match=r"k: got dtype torch.bfloat16, q has torch.float32"):
        apply_rotary_emb_qk(x, x.bfloat16(), cos, sin)


def test_on_the_cpu_a_position_outside_the_table_is_an_error():
    cos, sin = rotary_cos_sin(torch.arange(5), 8)
    for outside in (5, -1):
        with pytest.raises(IndexError):
            apply_rotary_emb(torch.randn(1, 1, 1, 8), cos, sin, positions=torch.tensor([outside]))


@interpreted
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_compiled_in_one_graph(inplace, interleaved):
    q, k = random(2, 5, 3, 16).requires_grad_(), random(2, 5, 2, 16, seed=1).requires_grad_()
    cos, sin = rotary_cos_sin(torch.arange(5), 8)
    grads = random(2, 3, 5, 16, seed=2), random(2, 2, 5, 16, seed=3)
    for backend in ("triton", "auto"):

        def run(q, k, backend=backend):
            heads = (x.transpose(1, 2) * 2 for x in (q, k))
            return apply_rotary_emb_qk(*heads, cos, sin, interleaved=interleaved, inplace=inplace, backend=backend)

        got, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k), run(q, k)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, (q, k), grads), torch.autograd.grad(expected, (q, k), grads))


@interpreted
@pytest.mark.parametrize("with_k", [False, True], ids=["q", "q and k"])
def test_registered_operator_passes_opcheck(with_k):
    q = random(2, 5, 3, 16).transpose(1, 2).detach().requires_grad_()
    k = random(2, 2, 5, 16, seed=1).requires_grad_() if with_k else None
    cos, sin = rotary_cos_sin(torch.arange(9), 8)
    positions = torch.tensor([3, 0, 8, 1, 1])
    torch.library.opcheck(torch.ops.wikigpt.rotary.default, (q, k, cos, sin, positions, True, False))
    inputs = (q.detach(), None if k is None else k.detach(), cos, sin, positions, True)
    torch.library.opcheck(torch.ops.wikigpt.rotary_.default, inputs)


@interpreted
def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x, (cos, sin) = random(1, 2, 5, 8).requires_grad_(), rotary_cos_sin(torch.arange(5), 8)
    function = lambda x: apply_rotary_emb(x * 2, cos, sin, inplace=True, backend="triton").square()  # noqa: E731
    expected = torch.autograd.grad(function(x).sum(), x)
    assert torch.equal(torch.autograd.grad(checkpoint(function, x, use_reentrant=False).sum(), x)[0], expected[0])


@interpreted
def test_the_output_is_laid_out_in_memory_as_the_input():
    cos, sin = rotary_cos_sin(torch.arange(5), 8)
    x = random(2, 5, 3, 8).transpose(1, 2)
    y = apply_rotary_emb(x, cos, sin, backend="triton")
    assert y.stride() == x.stride()


@interpreted
def test_in_triton_a_position_outside_the_table_gives_nan_and_reads_nothing():
    cos, sin = rotary_cos_sin(torch.arange(5), 8)
    y = apply_rotary_emb(random(1, 1, 4, 8), cos, sin, positions=torch.tensor([4, 5, -1, 0]), backend="triton")
    assert y.isnan().all(-1).flatten().tolist() == [False, True, True, False]
    assert not y[:, :, [0, 3]].isnan().any()


@interpreted
def test_what_triton_does_not_compute_is_refused():
    x, (cos, sin) = random(1, 1, 5, 8), rotary_cos_sin(torch.arange(5), 8)
    with pytest.raises(ValueError, match="sin: requires a gradient, which 'triton' does not compute"):
        apply_rotary_emb(x, cos, sin.requires_grad_(), backend="triton")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            apply_rotary_emb(dual, cos, sin.detach(), backend="triton")


def test_angles_get_a_gradient_from_pytorchs_operators():
    x = random(1, 2, 5, 8).double()
    cos, sin = (angle.requires_grad_() for angle in rotary_cos_sin(torch.arange(5), 8, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda cos, sin: apply_rotary_emb(x, cos, sin), (cos, sin))


@interpreted
@pytest.mark.parametrize("shape", [(40, 3, 1, 8), (1, 20, 70, 6), (2, 1, 33, 128)])
def test_many_sequences_heads_and_positions(shape):
    cos, sin = rotary_cos_sin(torch.arange(shape[2]) + 1, shape[3])
    x = random(*shape)
    y = apply_rotary_emb(x, cos, sin, backend="triton")
    torch.testing.assert_close(y, apply_rotary_emb_reference(x, cos, sin))


@interpreted
def test_several_heads_of_one_program(monkeypatch):
    from wikigpt.kernels import rotary_triton

    monkeypatch.setattr(rotary_triton, "PROGRAMS", 1)
    cos, sin = rotary_cos_sin(torch.arange(5), 16)
    q, k = random(2, 13, 5, 16), random(2, 3, 5, 16, seed=1)
    turned = apply_rotary_emb_qk(q, k, cos, sin, backend="triton")
    for got, x in zip(turned, (q, k)):
        torch.testing.assert_close(got, apply_rotary_emb_reference(x, cos, sin))


@interpreted
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("apart", ["sequences", "heads", "positions"])
def test_sequences_heads_and_positions_may_lie_more_than_2_to_the_31_elements_apart(apart, inplace, monkeypatch):
    from wikigpt.kernels import rotary_triton

    monkeypatch.setattr(rotary_triton, "PROGRAMS", 1)  # one program for all heads
    far.leave_memory_alone(monkeypatch)
    shape = tuple(2 if apart == name else 1 for name in ("sequences", "heads", "positions"))
    x, (cos, sin) = random(*shape, 16, dtype=torch.bfloat16), rotary_cos_sin(torch.arange(shape[2]) + 1, 16)
    expected = apply_rotary_emb(x, cos, sin, backend="triton")
    distant = far.strided(x, (*(2**31 + 64 if n == 2 else 64 for n in shape), 1))
    y = apply_rotary_emb(distant, cos, sin, inplace=inplace, backend="triton")
    assert (y is distant) == inplace
    assert torch.equal(y, expected)


@interpreted
def test_more_heads_than_a_grid_has_places_in_its_second_dimension(monkeypatch):
    from wikigpt.kernels import rotary_triton

    grids = far.note_grids(monkeypatch, rotary_triton, "_rotary")
    x = torch.empty(1, 10**6, 1, 8, device="meta")
    rotary_triton.turned(x, x, *(torch.empty(1, 4, device="meta") for _ in range(2)), None, False, False)
    assert [far.fits(grid) for grid in grids] == [True]


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 128), (80, 32)])
def test_gpu_a_layer_of_heads_is_accurate_and_repeats_bit_for_bit(head_dim, rotary_dim, interleaved):
    cos, sin = rotary_cos_sin(torch.arange(2048, device="cuda"), rotary_dim)
    q = torch.randn(4, 2048, 32, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k = torch.randn(4, 2048, 8, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    once, twice = (apply_rotary_emb_qk(q, k, cos, sin, interleaved=interleaved, backend="triton") for _ in range(2))
    for one, two, x in zip(once, twice, (q, k)):
        assert torch.equal(one, two)
        truth = apply_rotary_emb_reference(x.double(), cos.double(), sin.double(), interleaved=interleaved)
        assert_as_accurate_as(one, apply_rotary_emb_reference(x, cos, sin, interleaved=interleaved), truth)
        written = x.clone(memory_format=torch.preserve_format)
        apply_rotary_emb(written, cos, sin, interleaved=interleaved, inplace=True, backend="triton")
        assert torch.equal(written, one)


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements(monkeypatch):
    guards = far.Guards(monkeypatch)
    cos, sin = rotary_cos_sin(torch.arange(4096, device="cuda"), 128)
    x = guards.empty((130, 4096, 32, 128), torch.bfloat16, torch.device("cuda")).normal_().transpose(1, 2)
    sequences = [0, 57, 127, 128, 129]  # from 128 on they lie behind 2^31 elements
    expected = apply_rotary_emb_reference(x[sequences], cos, sin)
    apply_rotary_emb(x, cos, sin, inplace=True, backend="triton")
    torch.testing.assert_close(x[sequences], expected)
    guards.check()
