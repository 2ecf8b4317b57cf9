"""linear_cross_entropy against its reference in float64, under the numeric rule of conftest: C++, PyTorch's operators in chunks,
and Triton, interpreted, in chunks of the vocabulary."""

import itertools
import math
import os
import weakref
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from wikigpt.kernels import linear_cross_entropy as lce
from torch.utils._python_dispatch import TorchDispatchMode
from wikigpt.kernels import debug_checks
from wikigpt.kernels.linear_cross_entropy import linear_cross_entropy_reference

from tests.conftest import assert_as_accurate_as
from wikigpt import kernels

module = import_module("wikigpt.kernels.linear_cross_entropy")
sweeps = pytest.importorskip("wikigpt.kernels.linear_cross_entropy_triton", reason="triton is for Linux alone")
needs_extension = pytest.mark.skipif(
    import_module("wikigpt.kernels._dispatch").extension()[0] is None,
    reason="csrc/ is not built (no C++ compiler)",
)

# Rows: below, at and above one register tile and one chunk (256); features and vocabulary: not multiples of anything.
SHAPES = [(1, 1, 1), (5, 7, 11), (33, 20, 515), (130, 64, 96)]
CPU_SHAPES = [(256, 64, 96), (300, 40, 1000), (257, 130, 97)]


@pytest.fixture(params=["csrc", "chunked", "triton", "triton, logits kept"])
def implementation(request, monkeypatch):
    """Both implementations for the CPU: C++, and the one in PyTorch's operators for machines without a compiler. And the Triton
    kernels, with and without the logits kept for the backward."""
    if request.param.startswith("triton"):
        request.getfixturevalue("small_chunks")
        if request.param.endswith("kept"):
            monkeypatch.setattr(sweeps, "KEEP_BYTES", 1 << 30)
        with kernels.backend("triton"):
            yield request.param
        return
    built = module.extension()[0] is not None
    if request.param == "chunked":
        monkeypatch.setattr(module, "extension", lambda: (None, "switched off by the test"))
    elif not built:
        pytest.skip("csrc/ is not built (no C++ compiler)")
    yield request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Three chunks of a vocabulary from 300 up, and logits made again in the backward."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is here: the tests marked gpu run on it")
    monkeypatch.setattr(sweeps, "CHUNK_BYTES", 1)
    monkeypatch.setattr(sweeps, "MAX_CHUNKS", 3)
    monkeypatch.setattr(sweeps, "KEEP_BYTES", 0)


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
    upstream = torch.rand(y.shape) if reduction == "none" else torch.tensor(1.7)
    ours = gradients(lce, x, w, b, y, upstream, torch.float32, reduction=reduction)
    plain = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.float32, reduction=reduction)
    truth = gradients(linear_cross_entropy_reference, x, w, b, y, upstream, torch.float64, reduction=reduction)
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)


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
    x, w, b, y = problem(*((33, 20, 515) if implementation.startswith("triton") else (300, 40, 1000)))
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
        arguments = (*leaves, y, None, reduction, -100, 0.1, 0.0, 0.0, True, True, True, False)
        torch.library.opcheck(torch.ops.wikigpt.linear_cross_entropy.default, arguments)


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
