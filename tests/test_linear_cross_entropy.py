"""linear_cross_entropy against its reference in float64, under the numeric rule of conftest: C++, PyTorch's operators in
chunks, and Triton, interpreted, in chunks of the vocabulary."""

import itertools
import math
import os
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from wikigpt.kernels import _dispatch
from wikigpt.kernels import linear_cross_entropy as lce
from wikigpt.kernels.linear_cross_entropy import linear_cross_entropy_reference

from tests import far
from tests.conftest import assert_as_accurate_as
from wikigpt import kernels

module = import_module("wikigpt.kernels.linear_cross_entropy")
rows = pytest.importorskip("wikigpt.kernels.cross_entropy_triton", reason="triton is for Linux alone")
sweeps = pytest.importorskip("wikigpt.kernels.linear_cross_entropy_triton", reason="triton is for Linux alone")
# The interpreter computes with the columns between a row's end and the next row's beginning, whatever is in them.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
needs_extension = pytest.mark.skipif(
    import_module("wikigpt.kernels._dispatch").extension()[0] is None,
    reason="csrc/ is not built (no C++ compiler)",
)

# Rows: below, at and above one register tile and one chunk (256); features and vocabulary: not multiples of anything.
SHAPES = [(1, 1, 1), (5, 7, 11), (33, 20, 515), (130, 64, 96)]
CPU_SHAPES = [(256, 64, 96), (300, 40, 1000), (257, 130, 97)]


@pytest.fixture(params=["csrc", "chunked", "triton"])
def implementation(request, monkeypatch):
    """Both implementations for the CPU, C++ and the one in PyTorch's operators for machines without a compiler, and Triton. On
    every CPU alike: what changes with bf16 units is switched by `bf16_units`."""
    monkeypatch.setattr(module, "MULTIPLIES_BF16", False)
    if request.param == "triton":
        request.getfixturevalue("small_chunks")
        with kernels.backend("triton"):
            yield request.param
        return
    built = module.extension()[0] is not None
    if request.param == "chunked":
        monkeypatch.setattr(module, "extension", lambda: (None, "switched off by the test"))
    elif not built:
        pytest.skip("csrc/ is not built (no C++ compiler)")
    yield request.param


@pytest.fixture(params=[False, True], ids=["no units", "bf16 units"])
def bf16_units(implementation, request, monkeypatch):
    """What the CPU is taken for; PyTorch multiplies bf16 matrices on every one. Chunks of 40 tokens."""
    monkeypatch.setattr(module, "MULTIPLIES_BF16", request.param)
    monkeypatch.setattr(module, "_CHUNK_ROWS", dict.fromkeys(module._CHUNK_ROWS, 40))
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Three chunks of a vocabulary from 300 up, and logits made again in the backward."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is here: the tests marked gpu run on it")
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    monkeypatch.setattr(module, "MAX_CHUNKS", 3)
    monkeypatch.setattr(module, "KEEP_BYTES", 0)


def problem(n, d, v, *, bias=True, ignore=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * n + d)
    x = torch.randn(n, d, generator=generator).to(dtype)
    w = torch.randn(v, d, generator=generator)
    b = torch.randn(v, generator=generator) if bias else None
    y = torch.randint(v, (n,), generator=generator)
    if ignore and n > 1:
        y[::3] = -100
    return x, w, b, y


def gradients(function, x, w, b, y, upstream, dtype, **options):
    """loss and gradients of (x, w, b) for the given upstream gradient."""
    leaves = [t.detach().to(dtype).requires_grad_() if t is not None else None for t in (x, w, b)]
    loss = function(leaves[0], leaves[1], y, linear_bias=leaves[2], **options)
    loss.backward(upstream.to(loss.dtype))
    return [loss.detach(), *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("implementation", ["csrc", "chunked"], indirect=True)
@pytest.mark.parametrize("shape", CPU_SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunks_of_tokens_are_as_accurate_as_plain_pytorch(implementation, shape, bias, reduction):
    test_loss_and_gradients_are_as_accurate_as_plain_pytorch(implementation, shape, bias, reduction)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_are_as_accurate_as_plain_pytorch(implementation, shape, bias, reduction):
    x, w, b, y = problem(*shape, bias=bias)
    upstream = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) if reduction == "none" else torch.tensor(1.7)
    ours = gradients(lce, x, w, b, y, upstream, torch.float32, reduction=reduction)
    plain = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.float32, reduction=reduction)
    truth = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.float64, reduction=reduction)
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)


# A sum of many float32 numbers in one chain is off by more than PyTorch's, which adds blocks: each of the sums made long.
LONG = {"a vocabulary of 50,257": (16, 64, 50257), "4,096 features": (16, 4096, 700), "6,000 tokens": (6000, 32, 400)}


@pytest.mark.parametrize(
    ("implementation", "label_smoothing"), [("csrc", 0.0), ("csrc", 0.1), ("chunked", 0.0), ("triton", 0.0)],
    indirect=["implementation"],
)  # fmt: skip
@pytest.mark.parametrize("case", LONG)
@pytest.mark.parametrize("spread", [1.0, 3.0], ids="logits spread by {}".format)
def test_long_sums_are_as_accurate_as_plain_pytorch(implementation, label_smoothing, case, spread):
    n, d, v = LONG[case]
    x, w, b, y = problem(n, d, v, ignore=False)
    w *= spread * d**-0.5
    upstream = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(1))
    options = {"label_smoothing": label_smoothing, "reduction": "none"}
    ours = gradients(lce, x, w, b, y, upstream, torch.float32, **options)
    plain = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.float32, **options)
    truth = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.float64, **options)
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t, tiny=2e-7)


@pytest.mark.parametrize(
    ("label_smoothing", "softcap", "z_loss"),
    [c for c in itertools.product((0.0, 0.1), (0.0, 5.0), (0.0, 1e-2)) if any(c)],
)
def test_options_are_as_accurate_as_plain_pytorch(implementation, label_smoothing, softcap, z_loss):
    x, w, b, y = problem(70, 24, 301)
    options = {"label_smoothing": label_smoothing, "softcap": softcap, "z_loss": z_loss}
    one = torch.tensor(1.0)
    ours = gradients(lce, x, w, b, y, one, torch.float32, **options)
    plain = gradients(linear_cross_entropy_reference, x, w, b, y, one, torch.float32, **options)
    truth = gradients(linear_cross_entropy_reference, x, w, b, y, one, torch.float64, **options)
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)


def test_the_reference_equals_pytorchs_cross_entropy():
    x, w, b, y = problem(40, 8, 50)
    weight = torch.rand(50).double()
    for reduction in ("mean", "sum", "none"):
        ours = linear_cross_entropy_reference(x.double(), w.double(), y, b.double(), weight, reduction, label_smoothing=0.2)
        theirs = F.cross_entropy(
            F.linear(x.double(), w.double(), b.double()), y, weight, reduction=reduction, label_smoothing=0.2
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_bf16_input_gives_bf16_gradient_as_accurate_as_plain_pytorch(implementation):
    x, w, _, y = problem(64, 48, 200, dtype=torch.bfloat16, bias=False)
    one = torch.tensor(1.0)
    leaf = x.clone().requires_grad_()
    loss = lce(leaf, w, y)
    loss.backward()
    truth = gradients(linear_cross_entropy_reference, x, w, None, y, one, torch.float64)
    plain = gradients(linear_cross_entropy_reference, x, w.bfloat16(), None, y, one, torch.bfloat16)
    assert leaf.grad.dtype == torch.bfloat16
    assert_as_accurate_as(loss.detach(), plain[0], truth[0])
    assert_as_accurate_as(leaf.grad, plain[1], truth[1])


ON_CPU = pytest.mark.parametrize("implementation", ["csrc", "chunked"], indirect=True)
BF16_OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"softcap": 3.0}, {"label_smoothing": 0.2, "z_loss": 1e-2}]


@ON_CPU
@pytest.mark.parametrize("shape", [(41, 70, 110), (33, 20, 515), (130, 64, 96)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", BF16_OPTIONS, ids=str)
def test_bf16_on_a_cpu_is_as_accurate_as_plain_pytorch(implementation, bf16_units, shape, bias, reduction, options):
    x, w, b, y = (t.bfloat16() if t is not None and t.is_floating_point() else t for t in problem(*shape, bias=bias))
    upstream = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) if reduction == "none" else torch.tensor(1.7)
    options = options | {"reduction": reduction}
    ours = gradients(lce, x, w, b, y, upstream, torch.bfloat16, **options)
    plain = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.bfloat16, **options)
    truth = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.float64, **options)
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)


@ON_CPU
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_on_a_cpu_is_as_accurate_as_plain_pytorch(implementation, bf16_units, input_dtype, compiled):
    x, w, b, y = problem(100, 24, 300)

    def run(function, dtype, autocast):
        leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in (x.to(input_dtype), w, b)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(leaves[0].to(input_dtype if autocast else dtype), leaves[1], y, linear_bias=leaves[2])
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    function = torch.compile(lce, backend="aot_eager", fullgraph=True) if compiled else lce
    ours, plain = run(function, torch.float32, True), run(linear_cross_entropy_reference, torch.float32, True)
    truth = run(linear_cross_entropy_reference, torch.float64, False)
    assert [o.dtype for o in ours] == [torch.float32] * 4
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)


@ON_CPU
def test_products_are_bf16_under_autocast_where_the_cpu_has_units_for_it(implementation, bf16_units):
    """A number of 11 bits, which bf16 rounds to 1."""
    x, w = torch.ones(1, 1), torch.tensor([[1 + 2**-10], [0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        _, aux = lce(x, w, torch.tensor([0]), return_aux=True)
    assert aux.target_logits.item() == (1.0 if bf16_units else 1 + 2**-10)


@ON_CPU
def test_factors_of_different_dtypes_are_multiplied_in_float32_without_autocast(implementation, bf16_units):
    x, w = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([[1 + 2**-10], [0.0]])
    _, aux = lce(x, w, torch.tensor([0]), return_aux=True)
    assert aux.target_logits.item() == 1 + 2**-10


@ON_CPU
def test_chunks_do_not_round_the_sum_of_the_weight_gradient(implementation, bf16_units):
    """One step of bf16 is 1/128: a sum of 52 equal numbers in bf16 would be wrong, and of more than 256 stop growing."""
    n, d, v = 40 * 51, 1, 2
    x, w = torch.ones(n, d, dtype=torch.bfloat16), torch.zeros(v, d, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        lce(x, w, torch.zeros(n, dtype=torch.int64), reduction="sum").backward()
    assert w.grad.tolist() == [[-n / 2], [n / 2]]


@ON_CPU
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_reach_the_loss_of_their_token_in_bf16(implementation, bf16_units, bad):
    x, w, _, y = problem(50, 16, 70, bias=False, ignore=False, dtype=torch.bfloat16)
    x[7, 3] = bad
    x.requires_grad_()
    losses = lce(x, w.bfloat16(), y, reduction="none")
    losses.sum().backward()
    assert losses.isnan().nonzero().flatten().tolist() == [7]
    assert x.grad.isnan().any(1).nonzero().flatten().tolist() == [7]


def test_large_logits_do_not_overflow(implementation):
    x, w, b, y = problem(20, 16, 60)
    x = x * 200
    ours = gradients(lce, x, w, b, y, torch.tensor(1.0), torch.float32)
    plain = gradients(linear_cross_entropy_reference, x, w, b, y, torch.tensor(1.0), torch.float32)
    truth = gradients(linear_cross_entropy_reference, x, w, b, y, torch.tensor(1.0), torch.float64)
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_in_the_input_reach_the_loss(implementation, bad):
    x, w, _, y = problem(10, 8, 20, bias=False, ignore=False)
    x[3, 2] = bad
    assert torch.isnan(lce(x, w, y))


def test_two_calls_give_the_same_bits(implementation):
    x, w, b, y = problem(*((33, 20, 515) if implementation == "triton" else (300, 40, 1000)))
    first = gradients(lce, x, w, b, y, torch.tensor(1.0), torch.float32)
    second = gradients(lce, x, w, b, y, torch.tensor(1.0), torch.float32)
    assert all(torch.equal(a, c) for a, c in zip(first, second))


def test_ignored_tokens_get_no_gradient(implementation):
    x, w, b, y = problem(30, 8, 20)
    _, dx, _, _ = gradients(lce, x, w, b, y, torch.tensor(1.0), torch.float32)
    assert (dx[y == -100] == 0).all()
    assert (dx[y != -100] != 0).any(-1).all()


def test_with_every_target_ignored_mean_is_nan_and_sum_is_zero(implementation):
    x, w, _, y = problem(4, 8, 20, bias=False)
    y.fill_(-100)
    assert torch.isnan(lce(x, w, y))
    assert lce(x, w, y, reduction="sum") == 0
    assert (lce(x, w, y, reduction="none") == 0).all()


def test_no_token_at_all(implementation):
    x, w, y = (
        torch.randn(0, 8, requires_grad=True),
        torch.randn(20, 8, requires_grad=True),
        torch.empty(0, dtype=torch.int64),
    )
    loss = lce(x, w, y, reduction="sum")
    loss.backward()
    assert loss == 0
    assert x.grad.shape == (0, 8)
    assert (w.grad == 0).all()


def test_leading_dimensions_and_strides_do_not_matter(implementation):
    x, w, _, y = problem(24, 10, 31, bias=False)
    flat = lce(x, w, y, reduction="none")
    assert torch.equal(lce(x.view(2, 12, 10), w, y.view(2, 12), reduction="none"), flat.view(2, 12))
    strided = torch.stack([x, x], dim=-1)[..., 0]
    transposed = w.t().contiguous().t()
    torch.testing.assert_close(lce(strided, transposed, y, reduction="none"), flat)


def test_only_the_gradients_asked_for_are_made(implementation):
    x, w, _, y = problem(12, 6, 9, bias=False)
    leaf = w.clone().requires_grad_()
    lce(x, leaf, y).backward()
    both = gradients(lce, x, w, None, y, torch.tensor(1.0), torch.float32)
    torch.testing.assert_close(leaf.grad, both[2])


def test_a_second_backward_gives_the_same_gradient(implementation):
    x, w, _, y = problem(12, 6, 9, bias=False)
    leaf = x.clone().requires_grad_()
    loss = lce(leaf, w, y)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * first)


def test_opcheck():
    x, w, b, y = problem(12, 6, 9)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    for reduction in ("mean", "none"):
        arguments = (*leaves, y, reduction, -100, 0.1, 0.0, 0.0, True, True, True, False)
        torch.library.opcheck(torch.ops.wikigpt.linear_cross_entropy.default, arguments)
    per_token = [torch.rand(12) for _ in range(3)]
    for of_aux in ((None, None), per_token[1:]):
        arguments = (per_token[0], *leaves, y, -100, 0.1, 0.0, 0.0, True, True, True, *of_aux)
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.wikigpt.linear_cross_entropy_cpu_backward.default, arguments, test_utils=tests)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction):
    x, w, b, y = problem(12, 6, 9)
    upstream = torch.rand(y.shape) if reduction == "none" else torch.tensor(1.0)
    compiled = torch.compile(lambda *a, **k: lce(*a, **k) * 2, fullgraph=True, backend="aot_eager")
    ours = gradients(compiled, x, w, b, y, upstream, torch.float32, reduction=reduction)
    eager = gradients(lce, x, w, b, y, 2 * upstream, torch.float32, reduction=reduction)
    for o, e in zip(ours[1:], eager[1:]):
        torch.testing.assert_close(o, e)


def test_activation_checkpointing_gives_the_same_gradient():
    x, w, _, y = problem(12, 6, 9, bias=False)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    lce(a * 2, w, y).backward()
    torch.utils.checkpoint.checkpoint(lambda t: lce(t * 2, w, y), b, use_reentrant=False).backward()
    assert torch.equal(a.grad, b.grad)


def test_compiles_with_gradients_of_lse(implementation):
    x, w, b, y = problem(12, 6, 9)

    def step(x, w, y, linear_bias):
        loss, aux = lce(x, w, y, linear_bias=linear_bias, return_aux=True)
        return loss + aux.lse.square().sum(), aux.lse

    def compiled(*args, **kwargs):
        return torch.compile(step, fullgraph=True, backend="aot_eager")(*args, **kwargs)[0]

    one = torch.tensor(1.0)
    ours = gradients(compiled, x, w, b, y, one, torch.float32)
    eager = gradients(lambda *args, **kwargs: step(*args, **kwargs)[0], x, w, b, y, one, torch.float32)
    for o, e in zip(ours, eager):
        torch.testing.assert_close(o, e)


# --- what the gradients are made for: other graphs, scales and owners -----------------------------------------------

# None, one and all of (label_smoothing, softcap, z_loss, weighted).
OPTIONS = [c for c in itertools.product((0.0, 0.1), (0.0, 5.0), (0.0, 1e-2), (False, True)) if sum(map(bool, c)) in (0, 1, 4)]


def options_of(case, v):
    label_smoothing, softcap, z_loss, weighted = case
    weight = torch.rand(v, generator=torch.Generator().manual_seed(3)) + 0.1 if weighted else None
    return {"label_smoothing": label_smoothing, "softcap": softcap, "z_loss": z_loss, "weight": weight}


def objective(x, w, b, y, aux, **options):
    """A number made of everything that has a gradient, or of the loss alone."""
    result = lce(x, w, y, linear_bias=b, return_aux=aux, **options)
    if not aux:
        return result.square().sum()
    loss, more = result
    rising = torch.linspace(-1, 2, len(y))
    return loss.square().sum() + (more.lse.square() * rising).sum() + more.target_logits.sin().sum()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("aux", [False, True])
def test_the_second_derivative_is_that_of_the_reference(implementation, reduction, case, aux):
    x, w, b, y = problem(6, 5, 40)
    options = {"reduction": reduction, **options_of(case, 40)}

    def second(dtype, **backend):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, w, b)]
        grads = torch.autograd.grad(objective(*leaves, y, aux, **options, **backend), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    ours, plain, truth = (
        second(torch.float32),
        second(torch.float32, backend="reference"),
        second(torch.float64, backend="reference"),
    )
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)


def test_a_gradient_penalty_reaches_what_lies_before_the_loss(implementation):
    x, w, _, y = problem(6, 5, 40, bias=False)
    scale = torch.tensor(1.5, requires_grad=True)

    def penalty(**backend):
        hidden = x * scale
        (grad,) = torch.autograd.grad(lce(hidden, w, y, **backend), hidden, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), scale)[0]

    torch.testing.assert_close(penalty(), penalty(backend="reference"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", OPTIONS)
def test_lse_and_target_logits_have_the_gradient_of_the_reference(implementation, reduction, case):
    x, w, b, y = problem(33, 20, 301)  # a third of the targets is ignored, and these tokens have an lse all the same
    options = {"reduction": reduction, **options_of(case, 301)}

    def first(dtype, **backend):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, w, b)]
        return torch.autograd.grad(objective(*leaves, y, True, **options, **backend), leaves)

    ours = first(torch.float32)
    plain, truth = (first(dtype, backend="reference") for dtype in (torch.float32, torch.float64))
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)


def test_a_z_loss_made_of_lse_is_the_option(implementation):
    x, w, b, y = problem(33, 20, 301)

    def by_hand(x, w, y, linear_bias):
        loss, aux = lce(x, w, y, linear_bias=linear_bias, return_aux=True)
        valid = y != -100
        return loss + 0.01 * aux.lse[valid].square().sum() / valid.sum()

    option = gradients(lce, x, w, b, y, torch.tensor(1.0), torch.float32, z_loss=0.01)
    for o, h in zip(option, gradients(by_hand, x, w, b, y, torch.tensor(1.0), torch.float32)):
        torch.testing.assert_close(o, h)


def test_a_filter_keeps_the_gradient_of_lse(small_chunks):
    x, w, b, y = problem(33, 20, 301)
    leaves = [tensor.requires_grad_() for tensor in (x, w, b)]
    with kernels.backend("triton"):
        ours, exact = (
            torch.autograd.grad(objective(*leaves, y, True, filter_gradients=filtering), leaves) for filtering in (True, False)
        )
    assert all(torch.equal(o, e) for o, e in zip(ours, exact))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("aux", [False, True])
def test_whoever_changes_a_gradient_does_not_change_the_next_one(implementation, reduction, dtype, scale, aux):
    leaves = [t.to(dtype).requires_grad_() for t in problem(12, 6, 40)[:3]]
    y = problem(12, 6, 40)[3]
    loss = objective(*leaves, y, True, reduction=reduction) if aux else lce(*leaves[:2], y, linear_bias=leaves[2]).sum()
    once = torch.tensor(scale)
    first = torch.autograd.grad(loss, leaves, once, retain_graph=True)
    kept = [grad.clone() for grad in first]
    torch._foreach_mul_(first, 7.0)
    second = torch.autograd.grad(loss, leaves, once, retain_graph=True)
    for grad in second:
        grad.data.fill_(math.nan)
    third = torch.autograd.grad(loss, leaves, once)
    assert all(torch.equal(a, b) for a, b in zip(kept, third))


@needs_extension
def test_the_last_backward_of_a_graph_copies_nothing():
    """The gradient of a large vocabulary's weight is not read and written once more."""
    x, w, _, y = problem(12, 6, 40, bias=False)
    loss = lce(x, w.requires_grad_(), y)
    held = loss.grad_fn.saved_tensors[1].data_ptr()
    loss.backward()
    assert w.grad.data_ptr() == held


SCALES = [2.0**k for k in (-20, -8, 0, 1, 8, 15, 16)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.float32, torch.float16), (torch.bfloat16,) * 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_scale_comes_before_gradients_are_rounded(implementation, dtypes, reduction, scale):
    """Multiples of what float16 holds of the scaled gradient, not of the gradient."""
    x, w, b, y = problem(64, 16, 301)
    x, w, b = (x / 4).to(dtypes[0]), (w / 4).to(dtypes[1]), b.to(dtypes[1])
    upstream = torch.full(y.shape if reduction == "none" else (), scale)
    if reduction != "mean":
        upstream /= 1024
    leaves = [tensor.clone().requires_grad_() for tensor in (x, w, b)]
    lce(*leaves[:2], y, linear_bias=leaves[2], reduction=reduction).backward(upstream)
    truth = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.float64, reduction=reduction)
    for leaf, true in zip(leaves, truth[1:]):
        rounded = true.to(leaf.dtype)
        assert torch.isfinite(rounded).all()
        step = max(2 * torch.finfo(leaf.dtype).eps, 1e-5)
        if implementation == "triton":  # its products have rounded factors, as PyTorch's do
            step *= 4
        tiny = (
            2
            * torch.finfo(leaf.dtype).smallest_normal
            * torch.finfo(leaf.dtype).eps
            * (64 if implementation == "triton" else 1)
        )
        torch.testing.assert_close(leaf.grad.double(), true, rtol=step, atol=tiny + step * float(true.abs().max()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_float16_flushes_without_its_scale_is_there_with_it(implementation, reduction):
    n = 1024 if reduction == "mean" else 16
    x, w = torch.full((n, 2), 0.5, dtype=torch.float16, requires_grad=True), torch.zeros(3, 2, dtype=torch.float16)
    w[0] = 1e-5 if reduction == "mean" else 1e-4
    scale = 2.0**16 if reduction == "mean" else 1.0
    lce(x, w, torch.zeros(n, dtype=torch.int64), reduction=reduction).backward(torch.tensor(scale))
    expected = -2 / 3 * float(w[0, 0]) * scale / (n if reduction == "mean" else 1)
    torch.testing.assert_close(x.grad.float(), torch.full((n, 2), expected), rtol=1e-2, atol=0)


# --- torch.func -----------------------------------------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda f, x, w, b, y: torch.func.grad(f, argnums=(0, 1, 2))(x[0], w, b, y[0]),
    "jacrev": lambda f, x, w, b, y: torch.func.jacrev(f, argnums=(0, 1, 2))(x[0], w, b, y[0]),
    "vmap": lambda f, x, w, b, y: torch.func.vmap(f, (0, None, None, 0))(x, w, b, y),
    "vmap(grad)": lambda f, x, w, b, y: torch.func.vmap(torch.func.grad(f, argnums=(0, 1, 2)), (0, None, None, 0))(x, w, b, y),
    "vmap(grad), one target": lambda f, x, w, b, y: torch.func.vmap(torch.func.grad(f, 1), (0, None, None, None))(
        x, w, b, y[0]
    ),
    "grad(vmap)": lambda f, x, w, b, y: torch.func.grad(lambda w: torch.func.vmap(f, (0, None, None, 0))(x, w, b, y).sum())(w),
    "jacrev(jacrev)": lambda f, x, w, b, y: torch.func.jacrev(torch.func.jacrev(f))(x[0], w, b, y[0]),
}


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "label_smoothing": 0.1}, {"aux": True}])
def test_torch_func_gives_what_it_gives_of_the_reference(implementation, transform, options):
    x, w, b = torch.randn(3, 4, 5), torch.randn(11, 5), torch.randn(11)
    y = torch.tensor([[0, -100, 3, 8], [10, -100, 1, 2], [3, 3, 7, -100]])
    options = {"aux": False, **options}

    def function(**backend):
        return lambda x, w, b, y: objective(x, w, b, y, **options, **backend)

    ours = TRANSFORMS[transform](function(), x, w, b, y)
    torch.testing.assert_close(ours, TRANSFORMS[transform](function(backend="reference"), x, w, b, y), rtol=1e-4, atol=1e-5)


# --- what else PyTorch takes ----------------------------------------------------------------------------------------


def pytorchs(x, w, y, linear_bias=None, **options):
    """torch.nn.functional.linear_cross_entropy, which torch 2.11 lacks."""
    logits = F.linear(x, w.flatten(0, -2), None if linear_bias is None else linear_bias.flatten())
    return F.cross_entropy(logits.view(*x.shape[:-1], *w.shape[:-1]), y, **options)


PYTORCH = {
    "one token": ((6,), (5, 6), torch.tensor(3)),
    "tokens": ((4, 6), (5, 6), torch.tensor([0, -100, 2, 4])),
    "uint8": ((4, 6), (5, 6), torch.tensor([0, 1, 2, 4], dtype=torch.uint8)),
    "heads": ((2, 6), (5, 3, 6), torch.tensor([[0, 1, -100], [4, 2, 2]])),
    "more heads": ((2, 6), (5, 3, 4, 6), torch.arange(24).view(2, 3, 4) % 5),
    "as many heads as classes": ((2, 6), (5, 5, 6), torch.arange(10).view(2, 5) % 5),
    "probabilities of one token": ((6,), (5, 6), torch.arange(5.0) / 10),
    "probabilities": ((4, 6), (5, 6), torch.rand(4, 5)),
    "probabilities of heads": ((2, 6), (5, 3, 6), torch.rand(2, 5, 3)),
}


@pytest.mark.parametrize("name", PYTORCH)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_pytorch_takes_gives_what_pytorch_gives(implementation, name, reduction, bias, weighted):
    shape, weights, y = PYTORCH[name]
    x, w, b = torch.randn(shape), torch.randn(weights), torch.randn(weights[:-1]) if bias else None
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": torch.rand(5) if weighted else None}
    upstream = torch.tensor(1.0) if reduction == "mean" else torch.ones_like(lce(x, w, y, reduction="none"))
    ours = gradients(lce, x, w, b, y, upstream, torch.float32, **options)
    theirs = gradients(pytorchs, x, w, b, y.long() if y.dtype == torch.uint8 else y, upstream, torch.float32, **options)
    for o, t in zip(ours, theirs):
        torch.testing.assert_close(o, t)


def test_the_target_of_one_token_may_have_a_dimension_as_in_pytorch(implementation):
    x, w = torch.randn(6), torch.randn(5, 6)
    loss = lce(x, w, torch.tensor([3]), reduction="none")
    torch.testing.assert_close(loss, pytorchs(x, w, torch.tensor([3]), None, reduction="none"))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch.nn.functional has it from 2.13 on")
@pytest.mark.parametrize("ignore_index", [None, 2])
@pytest.mark.parametrize("options", [None, "chunks"])
def test_the_names_of_arguments_are_pytorchs(ignore_index, options):
    chunks = torch.nn.LinearCrossEntropyOptions() if options else None
    arguments = {
        "input": torch.randn(3, 6),
        "linear_weight": torch.randn(5, 6),
        "target": torch.tensor([0, 2, 4]),
        "linear_bias": torch.randn(5),
        "weight": None,
        "reduction": "sum",
        "ignore_index": ignore_index,
        "label_smoothing": 0.0,
        "options": chunks,
    }
    torch.testing.assert_close(lce(**arguments), F.linear_cross_entropy(**arguments))


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference", "torch"])
def test_factors_may_have_different_dtypes(small_chunks, backend):
    x, w, b, y = problem(12, 6, 40)
    x, w = x.bfloat16(), w.half()
    leaves = [tensor.requires_grad_() for tensor in (x, w, b)]
    truth = gradients(linear_cross_entropy_reference, x, w, b, y, torch.tensor(1.0), torch.float64)
    loss = lce(*leaves[:2], y, linear_bias=b, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), truth[0], rtol=1e-2, atol=1e-2)
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.float16, torch.float32]


# --- what lies between the rows -------------------------------------------------------------------------------------


def with_nan_behind_rows(matrix, room=21):
    whole = torch.full((matrix.shape[0], matrix.shape[1] + room), math.nan, dtype=matrix.dtype)
    rows = whole[:, : matrix.shape[1]]
    rows.copy_(matrix)
    return rows


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("d", [33, 64, 203])
def test_what_lies_behind_the_rows_of_input_and_weight_is_not_read(small_chunks, backend, dtype, which, d):
    """PyTorch's products of bfloat16 read it on processors with AMX."""
    x, w, b, y = (t.to(dtype) if t.is_floating_point() else t for t in problem(40, d, 301))
    expected = gradients(lce, x, w, b, y, torch.tensor(1.0), dtype, backend=backend)
    leaves = [x, w, b]
    for i in which:
        leaves[i] = with_nan_behind_rows(leaves[i])
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    loss = lce(*leaves[:2], y, linear_bias=leaves[2], backend=backend)
    for o, e in zip((loss.detach(), *torch.autograd.grad(loss, leaves)), expected):
        torch.testing.assert_close(o, e)


# --- class weights, auxiliary outputs, ignored targets: every implementation ----------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.0), (0.2, 1e-2)])
def test_class_weights_are_as_accurate_as_plain_pytorch(implementation, reduction, label_smoothing, z_loss):
    x, w, b, y = problem(20, 12, 301)
    options = {"weight": torch.rand(301) + 0.1, "reduction": reduction, "label_smoothing": label_smoothing, "z_loss": z_loss}
    upstream = torch.randn(y.shape) if reduction == "none" else torch.tensor(-0.7)
    ours = gradients(lce, x, w, b, y, upstream, torch.float32, **options)
    plain = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.float32, **options)
    truth = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.float64, **options)
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_target_logits_lse_and_hits_are_those_of_the_logits(implementation, softcap):
    x, w, b, y = problem(36, 12, 301)
    y[1] = (x @ w.t() + b).argmax(-1)[1]
    y = y.view(4, 9)
    loss, aux = lce(x.view(4, 9, 12).requires_grad_(), w, y, linear_bias=b, softcap=softcap, return_aux=True)
    _, truth = linear_cross_entropy_reference(x, w, y.flatten(), b, softcap=softcap, return_aux=True)
    for ours, true in zip(aux, truth):
        assert ours.shape == y.shape
        torch.testing.assert_close(ours.flatten(), true)
    assert aux.correct.dtype == torch.bool
    assert aux.correct[0, 1]
    assert loss.requires_grad
    assert [part.requires_grad for part in aux] == [True, True, False]
    torch.testing.assert_close(loss, lce(x, w, y.flatten(), linear_bias=b, softcap=softcap))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 0.01}, {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01, "weight": torch.ones(20)}]
)
def test_with_every_target_ignored_gradients_are_those_of_pytorch(implementation, reduction, options):
    x, w, b, y = problem(4, 8, 20)
    y.fill_(-100)
    upstream = torch.ones(4) if reduction == "none" else torch.tensor(1.0)
    ours = gradients(lce, x, w, b, y, upstream, torch.float32, reduction=reduction, **options)

    def pytorch(x, w, y, linear_bias, reduction):
        return F.cross_entropy(F.linear(x, w, linear_bias), y, reduction=reduction)

    theirs = gradients(pytorch, x, w, b, y, upstream, torch.float32, reduction=reduction)
    for o, t in zip(ours, theirs):
        torch.testing.assert_close(o, t, equal_nan=True)


def test_another_ignore_index_may_lie_inside_the_vocabulary(implementation):
    x, w, b, y = problem(20, 8, 30, ignore=False)
    y[::4] = 7
    ours = gradients(lce, x, w, b, y, torch.tensor(1.0), torch.float32, ignore_index=7)
    plain = gradients(linear_cross_entropy_reference, x, w, b, y, torch.tensor(1.0), torch.float32, ignore_index=7)
    for o, p in zip(ours, plain):
        torch.testing.assert_close(o, p)


def test_upstream_gradients_may_be_anything(implementation):
    """The upstream gradient of reduction="none" that other packages forget, scale twice or take for constant."""
    x, w, b, y = problem(24, 8, 40)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, w, b)]
    for make in (
        lambda loss: (loss * torch.linspace(-3, 3, 24)).sum(),  # signs, and one exact zero nearby
        lambda loss: loss.sum() * 5,  # expanded from a scalar: stride 0
        lambda loss: (loss.view(4, 6).t() * torch.arange(24.0).view(6, 4)).sum(),  # not contiguous
        lambda loss: loss[3:20:2].square().sum(),  # depends on the loss; zero elsewhere
    ):
        ours = torch.autograd.grad(make(lce(leaves[0], leaves[1], y, linear_bias=leaves[2], reduction="none")), leaves)
        plain = torch.autograd.grad(make(linear_cross_entropy_reference(*leaves[:2], y, leaves[2], reduction="none")), leaves)
        for o, p in zip(ours, plain):
            torch.testing.assert_close(o, p, rtol=1e-4, atol=1e-5)


def test_a_weight_tied_to_the_embedding_gets_both_gradients(implementation):
    _, w, _, y = problem(12, 6, 40, bias=False)
    ids = torch.randint(40, (12,))

    def grad(function):
        table = w.clone().requires_grad_()
        function(F.embedding(ids, table), table, y).backward()
        return table.grad

    torch.testing.assert_close(grad(lce), grad(linear_cross_entropy_reference))


def test_a_part_of_the_vocabulary_may_be_closed_by_a_bias_of_minus_infinity(implementation):
    x, w, b, y = problem(9, 6, 1000, ignore=False)
    closed = torch.arange(1000) < 700  # the first chunk of three, whole tiles of C++, and more
    b[closed] = -math.inf
    y = y.clamp(700)
    ours = gradients(lce, x, w, b, y, torch.tensor(1.0), torch.float32)
    plain = gradients(linear_cross_entropy_reference, x, w, b, y, torch.tensor(1.0), torch.float32)
    for o, p in zip(ours, plain):
        torch.testing.assert_close(o, p)
    assert (ours[2][closed] == 0).all()


# --- Triton ---------------------------------------------------------------------------------------------------------


def triton_lce(*args, **kwargs):
    return kernels.linear_cross_entropy(*args, backend="triton", **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_16_bit_inputs_are_as_accurate_as_plain_pytorch(small_chunks, monkeypatch, dtype, reduction, chunks):
    monkeypatch.setattr(module, "MAX_CHUNKS", chunks)
    x, w, b, y = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in problem(40, 48, 300))
    upstream = torch.randn(y.shape) if reduction == "none" else torch.tensor(64.0)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    ours = gradients(triton_lce, x, w, b, y, upstream, dtype, **options)
    plain = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, dtype, **options)
    truth = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.float64, **options)
    assert ours[0].dtype == torch.float32
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)
    assert all(o.dtype == dtype for o in ours[1:])


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_products_are_bf16_and_gradients_have_the_dtypes_of_their_tensors(small_chunks, input_dtype):
    x, w, b, y = problem(40, 24, 300, dtype=input_dtype)

    def run(function, dtype=None):
        leaves = [tensor.to(dtype or tensor.dtype).detach().requires_grad_() for tensor in (x, w, b)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            loss = function(leaves[0], leaves[1], y, linear_bias=leaves[2])
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    ours, plain = run(triton_lce), run(linear_cross_entropy_reference)
    truth = run(linear_cross_entropy_reference, torch.float64)
    assert [o.dtype for o in ours] == [torch.float32, input_dtype, torch.float32, torch.float32]
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)


def test_the_weight_gradient_is_summed_in_float32(small_chunks):
    """One step of bf16 is 1/128: a sum of 2,048 equal numbers in bf16 would stop growing at 256 of them."""
    n, d, v = 2048, 1, 2
    x, w = torch.ones(n, d, dtype=torch.bfloat16), torch.zeros(v, d, dtype=torch.bfloat16, requires_grad=True)
    triton_lce(x, w, torch.zeros(n, dtype=torch.int64), reduction="sum").backward()
    assert w.grad.tolist() == [[-1024.0], [1024.0]]


def test_kept_logits_and_logits_made_again_give_the_same_bits(small_chunks, monkeypatch):
    x, w, b, y = problem(40, 24, 300)
    again = gradients(triton_lce, x, w, b, y, torch.tensor(1.0), torch.float32)
    monkeypatch.setattr(module, "KEEP_BYTES", 1 << 30)
    kept = gradients(triton_lce, x, w, b, y, torch.tensor(1.0), torch.float32)
    assert all(torch.equal(a, k) for a, k in zip(again, kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_behind_the_end_of_a_row_of_gradients_there_are_zeros(small_chunks, monkeypatch, dtype):
    """Products may read there: PyTorch's of bfloat16 does on CPUs with AMX, 32 columns at a time, and a filtered one does."""
    x, w, b, y = problem(20, 8, 301, dtype=dtype)
    seen = []

    def gradient(z, out, *rest, **options):
        out.as_strided((out.shape[0], out.stride(0)), out.stride()).fill_(math.nan)
        run_gradient(z, out, *rest, **options)
        width = -(-out.shape[1] // 32) * 32
        seen.append(out.as_strided((out.shape[0], width), out.stride())[:, out.shape[1] :].clone())

    run_gradient = sweeps.gradient
    monkeypatch.setattr(sweeps, "gradient", gradient)
    monkeypatch.setattr(module, "KEEP_BYTES", 1 << 30)  # so that logits lie in other memory than their gradients
    gradients(triton_lce, x, w, b, y, torch.tensor(1.0), dtype)
    assert sum(part.numel() for part in seen) > 0
    assert all((part == 0).all() for part in seen)


@pytest.mark.parametrize("sizes", [(1000, 10**7, 3000), (10**6, 10**6, 64)])
def test_any_size_of_a_filtered_product_makes_a_grid_that_cuda_takes(small_chunks, monkeypatch, sizes):
    n, d, width = sizes
    grids = far.note_grids(monkeypatch, sweeps, "_filtered_product")
    dz, flags = torch.empty(n, width, device="meta"), torch.empty(n, 1, dtype=torch.int8, device="meta")
    for transposed in (False, True):
        b, out = (torch.empty(rows, d, device="meta") for rows in ((n, width) if transposed else (width, n)))
        sweeps._filtered(dz, b, out, flags, transposed)
    assert [far.fits(grid) for grid in grids] == [True, True]


@pytest.mark.parametrize("n", [1, 100, 8192, 10**6])
@pytest.mark.parametrize("v", [1, 127, 33278, 50257, 128256])
def test_chunks_cover_the_vocabulary_and_there_are_at_most_32(n, v):
    chunks = list(module.vocabulary_chunks(n, v, 2))
    assert [first for _, first, _ in chunks] == [0, *itertools.accumulate(width for _, _, width in chunks)][:-1]
    assert sum(width for _, _, width in chunks) == v
    assert len(chunks) <= 32
    assert all(width % 128 == 0 for _, _, width in chunks[:-1])


def test_targets_out_of_range_raise_where_values_are_checked(small_chunks):
    x, w, _, y = problem(6, 8, 20, bias=False, ignore=False)
    y[2] = 20
    with pytest.raises(IndexError, match=r"target: token 2 is 20.*allowed: 0 to 19"):
        triton_lce(x, w, y)
    assert not _dispatch.checks_values("cuda")
    with kernels.debug_checks():
        assert _dispatch.checks_values("cuda")


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference", "torch"])
@pytest.mark.parametrize("ignore_index", [-1, 255, 256])
def test_an_ignored_target_is_compared_as_a_number_not_in_8_bits(small_chunks, backend, ignore_index):
    """As uint8 -1 is 255, and 256 is 0."""
    x, w, _, _ = problem(3, 4, 20)
    y = torch.tensor([0, 255, 3], dtype=torch.uint8)
    if ignore_index == 255:
        y_int = torch.tensor([0, -100, 3])
        assert torch.equal(lce(x, w, y, ignore_index=255, backend=backend), lce(x, w, y_int, backend=backend))
        return
    with pytest.raises(IndexError, match="target: token 1 is 255"):
        lce(x, w, y, ignore_index=ignore_index, backend=backend)
    y[1] = 4
    assert torch.equal(lce(x, w, y, ignore_index=ignore_index, backend=backend), lce(x, w, y.long(), backend=backend))


@pytest.mark.parametrize("outside", [20, -1, 2**40])
def test_targets_out_of_range_give_nan_where_values_are_not_checked(small_chunks, monkeypatch, outside):
    monkeypatch.setattr(module, "checks_values", lambda device_type: False)
    x, w, _, y = problem(6, 8, 20, bias=False, ignore=False)
    y[2] = outside
    leaf = x.clone().requires_grad_()
    weight = torch.ones(20)
    loss = triton_lce(leaf, w, y, weight=weight, reduction="none")
    loss.sum().backward()
    other = torch.arange(6) != 2
    assert torch.isnan(loss[2])
    assert torch.isnan(leaf.grad[2]).all()
    assert torch.isfinite(loss[other]).all()
    assert torch.isfinite(leaf.grad[other]).all()
    assert torch.isnan(triton_lce(x, w, y))


def test_float64_is_computed_in_float64(small_chunks):
    x, w, b, y = problem(6, 8, 20)
    ours = gradients(triton_lce, x, w, b, y, torch.tensor(1.0), torch.float64)
    truth = gradients(linear_cross_entropy_reference, x, w, b, y, torch.tensor(1.0), torch.float64)
    assert all(torch.equal(o, t) for o, t in zip(ours, truth))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_filter_leaves_out_what_is_below_the_resolution(small_chunks, dtype):
    """Words 128 to 255 have probabilities around e^-40, and none is a target."""
    x, w, b, y = problem(70, 24, 300, ignore=True)
    b[128:256] -= 40
    y = torch.where((y >= 128) & (y < 256), 5, y)
    x, w, b = (tensor.to(dtype) for tensor in (x, w / 5, b))
    one = torch.tensor(1.0)
    exact = gradients(triton_lce, x, w, b, y, one, dtype)
    filtered = gradients(triton_lce, x, w, b, y, one, dtype, filter_gradients=True)
    assert torch.equal(exact[0], filtered[0])
    assert (filtered[2][128:256] == 0).all()
    assert (exact[2][128:256] != 0).any()
    for e, f in zip(exact[1:], filtered[1:]):
        torch.testing.assert_close(f, e, rtol=2 * torch.finfo(dtype).eps, atol=rows.resolution(dtype))


def test_a_filter_does_not_hide_nan(small_chunks):
    x, w, _, y = problem(6, 8, 20, bias=False, ignore=False)
    x[2, 0] = math.nan
    leaf = x.clone().requires_grad_()
    triton_lce(leaf, w, y, filter_gradients=True).backward()
    assert torch.isnan(leaf.grad[2]).all()


def test_the_triton_operators_pass_opcheck(small_chunks):
    x, w, b, y = problem(5, 6, 9)
    leaves = [tensor.requires_grad_() for tensor in (x, w, b)]
    weight = torch.rand(9)
    for keep in (False, True):
        torch.library.opcheck(
            torch.ops.wikigpt.linear_cross_entropy_forward.default,
            (*leaves, weight, y, -100, 0.1, 3.0, 0.01, True, keep, False),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
    plain = [leaf.detach() for leaf in leaves]
    torch.library.opcheck(
        torch.ops.wikigpt.linear_cross_entropy_backward.default,
        (torch.rand(5), torch.rand(5), torch.empty(0), *plain, weight, y, -100, 0.1, 3.0, 0.01, False, True, False, True),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"return_aux": True, "reduction": "none"}])
def test_triton_compiles_without_a_graph_break(small_chunks, options):
    x, w, b, y = problem(8, 6, 9)

    def step(x, w, b):
        out = triton_lce(x * 2, w, y, linear_bias=b, **options)
        return (out[0] * out[1].lse).sum() if options else out * 3

    leaves = [tensor.requires_grad_() for tensor in (x, w, b)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, eager = torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(step(*leaves), leaves)
    for o, e in zip(ours, eager):
        torch.testing.assert_close(o, e)


def test_there_is_no_forward_mode_derivative_and_it_says_so(implementation):
    x, w, _, y = problem(5, 6, 40, bias=False)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy has no forward-mode derivative"):
        torch.func.jvp(lambda x: lce(x, w, y), (x,), (torch.ones_like(x),))


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once among the tensors made inside, besides those given."""

    def __init__(self, *given):
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.given:
                    self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.parametrize(("n", "d", "v"), [(8192, 4096, 128256), (8192, 2048, 128256), (65536, 4096, 128256)])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_what_is_held_besides_the_gradients_is_less_than_a_twentieth_of_the_logits(monkeypatch, n, d, v, weight_dtype):
    """Logits in float32, as plain PyTorch has them under autocast. On meta tensors, with kernels that do nothing, what is
    allocated is the same. They have no values to wait for: nothing is read back from the device, either."""
    launch = type("Launch", (), {"__getitem__": lambda self, grid: lambda *args, **kwargs: None})()
    monkeypatch.setattr(rows, "_forward", launch)
    monkeypatch.setattr(rows, "_gradient", launch)
    x = torch.empty(n, d, dtype=torch.bfloat16, device="meta")
    w, b = (torch.empty(*shape, dtype=weight_dtype, device="meta") for shape in ((v, d), (v,)))
    y = torch.empty(n, dtype=torch.int64, device="meta")
    options = rows.options(-100, 0.1, 30.0, 1e-4, None)
    with LiveBytes(x, w, b, y) as live:
        made, logits = sweeps.losses(x, w, b, y, options, False, True)
        grads = sweeps.gradients(made.loss, made.lse, logits, x, w, b, y, options, (True, True, True), False)
    extra = live.peak - sum(grad.numel() * grad.element_size() for grad in grads)
    assert extra < 0.05 * 4 * n * v
    if d <= 2048 and weight_dtype == torch.bfloat16:
        assert extra < 0.05 * 2 * n * v


# --- on a GPU -------------------------------------------------------------------------------------------------------


def on_gpu(n, d, v, dtype):
    x, w, b, y = problem(n, d, v)
    return (*(tensor.to("cuda", dtype) for tensor in (x, w / d**0.5, b)), y.cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 20.0, "z_loss": 1e-3}, {"reduction": "none"}])
@pytest.mark.parametrize("keep", [0, 1 << 40])
def test_real_sizes_are_as_accurate_as_plain_pytorch(monkeypatch, dtype, options, keep):
    monkeypatch.setattr(module, "KEEP_BYTES", keep)
    monkeypatch.setattr(module, "CHUNK_BYTES", 8 << 20)
    x, w, b, y = on_gpu(2000, 512, 33278, dtype)
    upstream = torch.randn(y.shape, device="cuda") if "reduction" in options else torch.tensor(64.0, device="cuda")
    ours = gradients(lce, x, w, b, y, upstream, dtype, **options)
    plain = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, dtype, **options)
    truth = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.float64, **options)
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)


@pytest.mark.gpu
def test_filtered_products_on_a_gpu_are_close_to_all_of_them():
    x, w, b, y = on_gpu(2000, 512, 33278, torch.bfloat16)
    one = torch.tensor(1.0, device="cuda")
    exact = gradients(lce, x, w, b, y, one, torch.bfloat16, reduction="sum")
    filtered = gradients(lce, x, w, b, y, one, torch.bfloat16, reduction="sum", filter_gradients=True)
    for e, f in zip(exact, filtered):
        assert (e - f).float().norm() <= 0.1 * e.float().norm()


@pytest.mark.gpu
def test_100_runs_are_equal_bit_for_bit():
    x, w, b, y = on_gpu(2000, 512, 33278, torch.bfloat16)
    one = torch.tensor(1.0, device="cuda")
    first = gradients(lce, x, w, b, y, one, torch.bfloat16)
    for _ in range(99):
        assert all(torch.equal(a, c) for a, c in zip(first, gradients(lce, x, w, b, y, one, torch.bfloat16)))


@pytest.mark.gpu
def test_runs_inside_a_cuda_graph():
    """Which a wait of the host for the device would break."""
    x, w, b, y = on_gpu(512, 256, 20000, torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in (x, w, b)]

    def step():
        loss, aux = lce(leaves[0], leaves[1], y, linear_bias=leaves[2], return_aux=True)
        return loss, *aux, *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    assert all(torch.equal(r, e) for r, e in zip(results, expected))


@pytest.mark.gpu
def test_a_target_out_of_range_on_a_gpu_gives_nan_and_raises_under_debug_checks():
    x, w, _, y = on_gpu(64, 32, 1000, torch.bfloat16)
    y[3] = 10**9
    loss = lce(x, w, y, reduction="none")
    assert torch.isnan(loss).nonzero().flatten().tolist() == [3]
    with kernels.debug_checks(), pytest.raises(IndexError, match="target: token 3 is 1000000000"):
        lce(x, w, y)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [2048, 4096])
def test_peak_memory_of_8k_tokens_and_128k_words_is_a_twentieth_of_the_logits(d):
    n, v = 8192, 128256
    x = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(v, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(v, (n,), device="cuda")
    lce(x[:128], w, y[:128]).backward()  # cuBLAS takes its workspace
    x.grad = w.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(lce(x, w, y), (x, w))
    extra = torch.cuda.max_memory_allocated() - before - 2 * (n + v) * d
    assert extra < 0.05 * 4 * n * v


# --- CPU ------------------------------------------------------------------------------------------------------------


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_too_small_to_matter_are_zero_before_the_products(implementation, bf16_units, dtype):
    """Products of numbers below the smallest normal one are several times slower."""
    x, w = torch.zeros(40, 8, dtype=dtype), torch.zeros(200, 8, dtype=dtype)
    x[:, 0], w[:, 0] = 1.0, -torch.arange(200.0)  # probabilities of e^0 to e^-199
    w.requires_grad_()
    lce(x, w, torch.zeros(40, dtype=torch.int64), reduction="sum").backward()
    grad = w.grad[:, 0].float()
    expected = 40 * w.detach().float()[:, 0].softmax(0)[1:69]
    torch.testing.assert_close(grad[1:69], expected, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=0)
    assert (grad[71:] == 0).all()


@needs_extension
def test_memory_stays_far_below_that_of_the_logits():
    import resource

    n, d, v = 4096, 16, 20000
    x, w, _, y = problem(n, d, v, bias=False)
    lce(x[:256].requires_grad_(), w, y[:256]).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lce(x.detach().requires_grad_(), w.requires_grad_(), y).backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 0.25 * 4 * n * v


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.tensor([0, 20])}, IndexError, r"target: token 1 is 20.*allowed: 0 to 19"),
        ({"target": torch.tensor([0.0, 1.0])}, TypeError, r"target: got dtype torch.float32"),
        ({"target": torch.tensor([0])}, ValueError, r"target: got shape \(1,\)"),
        ({"input": torch.ones(2, 8, dtype=torch.int64)}, TypeError, r"input: got dtype torch.int64"),
        ({"input": torch.ones(2, 7)}, ValueError, r"linear_weight: got shape \(20, 8\)"),
        ({"linear_bias": torch.ones(8)}, ValueError, r"linear_bias: got shape \(8,\)"),
        ({"target": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, r"target: got dtype torch.int32"),
        ({"target": torch.rand(2, 3)}, ValueError, r"target: got shape \(2, 3\)"),
        ({"target": torch.rand(2, 20), "ignore_index": 3}, ValueError, r"ignore_index: got 3"),
        ({"target": torch.rand(2, 20), "ignore_index": -1}, ValueError, r"ignore_index: got -1, but class probabilities"),
        ({"target": torch.rand(2, 20), "return_aux": True}, ValueError, r"return_aux: class probabilities"),
        ({"input": torch.rand(1, 2, 8), "target": torch.rand(1, 2, 20)}, ValueError, r"input: got shape \(1, 2, 8\)"),
        ({"input": torch.rand(8), "linear_weight": torch.rand(20, 3, 8)}, ValueError, r"input: got shape \(8,\)"),
        ({"linear_weight": torch.rand(20, 3, 8)}, ValueError, r"target: got shape \(2,\)"),
        ({"linear_weight": torch.ones(20, 8, dtype=torch.int64)}, TypeError, r"linear_weight: got dtype torch.int64"),
        ({"weight": torch.ones(20, requires_grad=True)}, ValueError, r"weight: it requires a gradient"),
        ({"reduction": "avg"}, ValueError, r"reduction: got 'avg'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: got 1.5"),
        ({"z_loss": -1.0}, ValueError, r"z_loss: got -1.0"),
        ({"softcap": math.nan}, ValueError, r"softcap: got nan"),
        ({"linear_weight": torch.empty(0, 8)}, ValueError, r"linear_weight: got shape \(0, 8\)"),
        ({"weight": torch.ones(8)}, ValueError, r"weight: got shape \(8,\)"),
        ({"linear_bias": torch.ones(20, device="meta")}, ValueError, r"linear_bias: got device meta, input is on cpu"),
    ],
)
def test_bad_arguments_are_named(implementation, change, error, message):
    arguments = {
        "input": torch.randn(2, 8),
        "linear_weight": torch.randn(20, 8),
        "target": torch.tensor([0, 1]),
        **change,
    }
    first = [arguments.pop(k) for k in ("input", "linear_weight", "target")]
    with pytest.raises(error, match=message):
        kernels.linear_cross_entropy(*first, **arguments)
