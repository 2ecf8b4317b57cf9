"""cross_entropy of given logits: the Triton kernels, interpreted, and PyTorch's own, against the reference in float64."""

import functools
import itertools
import math
import os
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from wikigpt.kernels import cross_entropy
from wikigpt.kernels.cross_entropy import cross_entropy_reference

from tests import far
from tests.conftest import assert_as_accurate_as
from wikigpt import kernels

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
module = import_module("wikigpt.kernels.cross_entropy")

# One number, rows shorter than a block, rows of several blocks that end inside one; rows that do not fill a program's block.
SHAPES = [(1, 1), (5, 11), (70, 300), (33, 515)]
# None, one and all of (label_smoothing, softcap, z_loss, weighted).
OPTIONS = [c for c in itertools.product((0.0, 0.1), (0.0, 5.0), (0.0, 1e-2), (False, True)) if sum(map(bool, c)) in (0, 1, 4)]


@pytest.fixture
def triton():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is here: the tests marked gpu run on it")
    pytest.importorskip("triton", reason="triton is for Linux alone")
    with kernels.backend("triton"):
        yield


@pytest.fixture(params=["triton", "torch"])
def implementation(request):
    if request.param == "triton":
        request.getfixturevalue("triton")
    return request.param


def problem(n, v, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * n + v)
    z = (3 * torch.randn(n, v, generator=generator)).to(dtype)
    y = torch.randint(v, (n,), generator=generator)
    if n > 1:
        y[::3] = -100
    return z, y


def gradient(function, z, y, upstream, dtype, weight=None, **options):
    leaf = z.detach().to(dtype).requires_grad_()
    loss = function(leaf, y, None if weight is None else weight.to(dtype), **options)
    loss.backward(upstream.to(loss.dtype))
    return [loss.detach(), leaf.grad]


def check(z, y, **options):
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(y.shape if options.get("reduction") == "none" else (), generator=generator)
    ours = gradient(cross_entropy, z, y, upstream, z.dtype, **options)
    plain = gradient(cross_entropy_reference, z, y, upstream, z.dtype, **options)
    truth = gradient(cross_entropy_reference, z, y, upstream, torch.float64, **options)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == z.dtype
    for o, p, t in zip(ours, plain, truth):
        assert_as_accurate_as(o, p, t)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradient_are_as_accurate_as_plain_pytorch(implementation, shape, dtype, reduction):
    check(*problem(*shape, dtype), reduction=reduction)


@pytest.mark.parametrize(
    ("label_smoothing", "softcap", "z_loss", "weighted"),
    [c for c in itertools.product((0.0, 0.1), (0.0, 5.0), (0.0, 1e-2), (False, True)) if any(c)],
)
def test_options_are_as_accurate_as_plain_pytorch(triton, label_smoothing, softcap, z_loss, weighted):
    options = {"label_smoothing": label_smoothing, "softcap": softcap, "z_loss": z_loss}
    weight = torch.rand(301, generator=torch.Generator().manual_seed(3)) + 0.1 if weighted else None
    for reduction in ("mean", "none"):
        check(*problem(20, 301), reduction=reduction, weight=weight, **options)


def test_without_the_additions_it_is_pytorchs_cross_entropy(implementation):
    z, y = problem(20, 50)
    weight = torch.rand(50)
    ours = cross_entropy(z.view(4, 5, 50), y.view(4, 5), weight, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(ours.flatten(), F.cross_entropy(z, y, weight, reduction="none", label_smoothing=0.2))


def test_the_gradient_can_take_the_place_of_the_logits(triton):
    z, y = problem(20, 301)
    separate = gradient(cross_entropy, z, y, torch.tensor(2.0), torch.float32)
    leaf = z.clone().requires_grad_()
    logits = leaf * 1
    loss = cross_entropy(logits, y, inplace_backward=True)
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    (2 * loss).backward()
    assert seen == [logits.data_ptr()]
    assert torch.equal(leaf.grad, separate[1])
    assert torch.equal(logits.detach(), separate[1])


def test_the_gradient_does_not_take_the_place_of_logits_that_share_theirs(triton):
    z, y = problem(20, 301)
    z = z[:1].clone()
    gradients = []
    for inplace in (False, True):
        leaf = z.clone().requires_grad_()
        logits = (leaf * 1).expand(20, 301)
        cross_entropy(logits, y, inplace_backward=inplace).backward()
        gradients.append(leaf.grad)
        assert torch.equal(logits[0].detach(), z[0])
    assert torch.equal(*gradients)


def test_a_second_backward_over_logits_that_are_gone_is_refused(triton):
    z, y = problem(20, 301)
    loss = cross_entropy(z.requires_grad_() * 1, y, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_over_logits_that_are_kept_gives_the_same(triton):
    z, y = problem(20, 301)
    z.requires_grad_()
    loss = cross_entropy(z, y)
    loss.backward(retain_graph=True)
    first = z.grad.clone()
    loss.backward()
    assert torch.equal(z.grad, 2 * first)


@pytest.mark.parametrize("inplace", [False, True])
def test_strides_do_not_matter(triton, inplace):
    z, y = problem(20, 301)
    flat = gradient(cross_entropy, z, y, torch.tensor(1.0), torch.float32)
    layouts = {
        "a slice of a padded vocabulary": torch.randn(20, 320)[:, :301],
        "transposed": torch.randn(301, 20).t(),
        "every other": torch.randn(20, 602)[:, ::2],
    }
    for layout in layouts.values():
        hidden = layout.copy_(z)
        leaf = hidden.detach().requires_grad_()
        loss = cross_entropy(leaf * 1 if inplace else leaf, y, inplace_backward=inplace)
        (grad,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(loss.detach(), flat[0])
        torch.testing.assert_close(grad, flat[1])


def test_what_lies_beside_a_slice_is_not_touched(triton):
    whole = torch.randn(8, 64)
    before = whole.clone()
    logits = whole[:, :37].requires_grad_()
    cross_entropy(logits, torch.randint(37, (8,)), inplace_backward=True).backward()
    assert torch.equal(whole[:, 37:], before[:, 37:])
    assert torch.equal(logits.grad, whole[:, :37])


def test_target_logit_lse_and_hits_are_those_of_the_logits(implementation):
    z, y = problem(20, 301)
    y[1] = z[1].argmax()
    z[2, 5] = z[2, 200] = 50.0  # of equal logits the first is the prediction
    y[2] = 200
    y[4] = z[4].argmax()
    loss, aux = cross_entropy(z.view(4, 5, 301), y.view(4, 5), return_aux=True)
    _, truth = cross_entropy_reference(z, y, return_aux=True)
    for ours, true in zip(aux, truth):
        assert ours.shape == (4, 5)
        torch.testing.assert_close(ours.flatten(), true)
    assert aux.correct[0].tolist() == [False, True, False, False, True]
    torch.testing.assert_close(loss, F.cross_entropy(z, y))


def through_aux(z, y, dtype, by_hand, **options):
    """Gradient of an objective of everything that has one, with another sign and size for each token."""
    leaf = z.detach().to(dtype).requires_grad_()
    if by_hand:
        loss = cross_entropy_reference(leaf, y, reduction="none", **options)
        capped = options["softcap"] * torch.tanh(leaf / options["softcap"]) if options["softcap"] else leaf
        lse = capped.logsumexp(-1)
        target_logits = torch.where(y != -100, capped.gather(1, y.clamp(0)[:, None])[:, 0], 0.0)
    else:
        loss, (target_logits, lse, _) = cross_entropy(leaf, y, reduction="none", return_aux=True, **options)
    rising = torch.linspace(-1, 2, len(y), dtype=dtype)
    return torch.autograd.grad((loss * rising + lse.square() * rising.flip(0) + target_logits.sin()).sum(), leaf)[0]


@pytest.mark.parametrize(("label_smoothing", "softcap", "z_loss", "weighted"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lse_and_target_logits_have_the_gradients_of_their_formulas(
    implementation, dtype, label_smoothing, softcap, z_loss, weighted
):
    z, y = problem(35, 301, dtype)  # a third of the targets is ignored, and these tokens have an lse all the same
    weight = torch.rand(301, generator=torch.Generator().manual_seed(3)) + 0.1 if weighted else None
    options = {"label_smoothing": label_smoothing, "softcap": softcap, "z_loss": z_loss, "weight": weight}
    plain, truth = (through_aux(z, y, t, True, **options) for t in (dtype, torch.float64))
    assert_as_accurate_as(through_aux(z, y, dtype, False, **options), plain, truth)


@pytest.mark.parametrize("part", ["lse", "target_logits"])
def test_one_of_them_alone_has_a_gradient(implementation, part):
    z, y = problem(20, 301)
    ours, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
    getattr(cross_entropy(ours, y, return_aux=True)[1], part).sum().backward()
    getattr(cross_entropy(plain, y, return_aux=True, backend="reference")[1], part).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_a_z_loss_made_of_lse_is_the_option(implementation):
    z, y = problem(20, 301)
    option = gradient(cross_entropy, z, y, torch.tensor(1.0), torch.float32, z_loss=0.01)

    def by_hand(z, y, weight):
        loss, aux = cross_entropy(z, y, weight, return_aux=True)
        valid = y != -100
        return loss + 0.01 * aux.lse[valid].square().sum() / valid.sum()

    for a, b in zip(option, gradient(by_hand, z, y, torch.tensor(1.0), torch.float32)):
        torch.testing.assert_close(a, b)


def test_ignored_rows_are_not_read(triton):
    z, y = problem(6, 40)
    z[0] = math.nan
    loss, grad = gradient(cross_entropy, z, y, torch.tensor(1.0), torch.float32)
    assert y[0] == -100
    assert torch.isfinite(loss)
    assert (grad[0] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_reach_the_loss(implementation, bad):
    z, y = problem(6, 40)
    z[1, 3] = bad
    assert torch.isnan(cross_entropy(z, y))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 0.01}, {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01, "weight": torch.ones(40)}]
)
def test_with_every_target_ignored_it_is_as_pytorch(implementation, reduction, options):
    z, y = problem(6, 40)
    y.fill_(-100)
    upstream = torch.ones(6) if reduction == "none" else torch.tensor(1.0)
    ours = gradient(cross_entropy, z, y, upstream, torch.float32, reduction=reduction, **options)
    theirs = gradient(F.cross_entropy, z, y, upstream, torch.float32, reduction=reduction)
    for o, t in zip(ours, theirs):
        torch.testing.assert_close(o, t, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mean_of_targets_that_weigh_nothing_is_as_pytorch(implementation, smoothing):
    z, y = problem(6, 40)
    y.fill_(3)
    weight = torch.rand(40)
    weight[3] = 0.0
    options = {"weight": weight, "label_smoothing": smoothing}
    ours, theirs = (gradient(f, z, y, torch.tensor(1.0), torch.float32, **options) for f in (cross_entropy, F.cross_entropy))
    for o, t in zip(ours, theirs):
        torch.testing.assert_close(o, t, equal_nan=True)


def test_no_token_at_all(implementation):
    z = torch.randn(0, 20, requires_grad=True)
    loss = cross_entropy(z, torch.empty(0, dtype=torch.int64), reduction="sum")
    loss.backward()
    assert loss == 0
    assert z.grad.shape == (0, 20)


@pytest.mark.parametrize("outside", [40, -1, 2**40])
def test_a_target_out_of_range_raises_or_gives_nan_but_reads_nothing(triton, monkeypatch, outside):
    z, y = problem(6, 40)
    y[1] = outside
    with pytest.raises(IndexError, match=rf"target: token 1 is {outside}.*allowed: 0 to 39"):
        cross_entropy(z, y)
    monkeypatch.setattr(module, "checks_values", lambda device_type: False)
    loss, grad = gradient(cross_entropy, z, y, torch.ones(6), torch.float32, weight=torch.ones(40), reduction="none")
    assert torch.isnan(loss).tolist() == [False, True, False, False, False, False]
    assert torch.isnan(grad[1]).all()
    assert torch.isfinite(grad[2:]).all()


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"weight": torch.ones(40), "z_loss": 0.1}])
def test_a_target_out_of_range_gives_nan_where_kernels_compute_a_part_or_nothing(triton, monkeypatch, options):
    monkeypatch.setattr(module, "checks_values", lambda device_type: False)
    z, y = problem(6, 40)
    y[1] = 40
    loss, grad = gradient(cross_entropy, z, y, torch.tensor(1.0), **{"dtype": torch.float32, **options})
    assert torch.isnan(loss)
    assert torch.isnan(grad[1]).all()


def test_two_calls_give_the_same_bits(triton):
    z, y = problem(33, 515, torch.bfloat16)
    first, second = (gradient(cross_entropy, z, y, torch.tensor(1.0), torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_float64_is_computed_in_float64(triton):
    z, y = problem(6, 40)
    loss = cross_entropy(z.double(), y)
    assert loss.dtype == torch.float64
    assert torch.equal(loss, cross_entropy_reference(z.double(), y))


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_changes_nothing(triton, enabled):
    z, y = problem(6, 40)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert torch.equal(cross_entropy(z, y), cross_entropy(z, y))
    check(z, y)


def test_rows_may_lie_more_than_2_to_the_31_logits_apart(triton, monkeypatch):
    far.leave_memory_alone(monkeypatch)
    z, y = problem(2, 300, torch.bfloat16)
    y[0] = 7
    one = torch.tensor(1.0)
    apart = gradient(cross_entropy, far.strided(z, (2**31 + 64, 1)), y, one, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(apart, gradient(cross_entropy, z, y, one, torch.bfloat16)))


def test_what_is_known_of_800_million_rows_between_their_pieces(triton, monkeypatch):
    """The state of a row has four numbers, so that its offsets pass 2^31 long before the number of rows does."""
    kernels = import_module("wikigpt.kernels.cross_entropy_triton")
    far.leave_memory_alone(monkeypatch)
    far.run_only(monkeypatch, kernels, "_forward", lambda n: [0, n - 1])
    n, v = 800_000_000, 64
    z, y = problem(32, 2 * v)
    options = kernels.options(-100, 0.1, 0.0, 0.0, None)
    try:
        target = torch.empty(n, dtype=torch.int64)
        rows = kernels.Rows.empty(target, True, 2)
    except RuntimeError:
        pytest.skip("this machine lends no 29 GiB of addresses")
    target[:32] = target[-32:] = y
    for first in (0, v):
        kernels.forward(z[:1, first : first + v].expand(n, v), target, rows, first, 2 * v, options)
        if first == 0:  # the fourth number is the sum of the logits so far
            torch.testing.assert_close(rows.state[3, -32:], z[0, :v].sum().expand(32))
    expected = F.cross_entropy(z[:1].expand(32, 2 * v), y, reduction="none", label_smoothing=0.1)
    for part in (slice(0, 32), slice(n - 32, n)):
        torch.testing.assert_close(rows.loss[part], expected)


@pytest.mark.parametrize("shape", [(1, 10**9), (10**9, 1), (70_000, 10**6)])
def test_any_number_of_rows_and_columns_makes_a_grid_that_cuda_takes(triton, monkeypatch, shape):
    kernels = import_module("wikigpt.kernels.cross_entropy_triton")
    monkeypatch.setattr(kernels, "block", lambda width, plain=True: (1, 4096, 8))  # of a GPU's, those with the most programs
    grids = far.note_grids(monkeypatch, kernels, "_forward", "_gradient")
    z, y = torch.empty(shape, dtype=torch.bfloat16, device="meta"), torch.empty(shape[0], dtype=torch.int64, device="meta")
    options, rows = kernels.options(-100, 0.0, 0.0, 0.0, None), kernels.Rows.empty(y, False, 1)
    kernels.forward(z, y, rows, 0, shape[1], options)
    kernels.gradient(z, z, y, rows.lse, rows.loss, 0, shape[1], options)
    assert [far.fits(grid) for grid in grids] == [True, True]


def test_opcheck(triton):
    z, y = problem(5, 9)
    options = (torch.rand(9), -100, 0.1, 3.0, 0.01)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (z.clone().requires_grad_(), y, *options, True, False)
    torch.library.opcheck(torch.ops.wikigpt.cross_entropy.default, arguments, test_utils=tests)
    arguments = (torch.rand(5), torch.rand(5), z, y, *options)
    for op in (torch.ops.wikigpt.cross_entropy_backward, torch.ops.wikigpt.cross_entropy_backward_):
        torch.library.opcheck(op.default, arguments, test_utils=tests[:2])


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_a_graph_break(triton, inplace):
    z, y = problem(8, 40)

    def step(leaf):
        return cross_entropy(leaf * 2, y, inplace_backward=inplace) * 3

    leaf = z.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (ours,), (eager,) = torch.autograd.grad(compiled(leaf), leaf), torch.autograd.grad(step(leaf), leaf)
    torch.testing.assert_close(ours, eager)


def test_activation_checkpointing_gives_the_same_gradient(triton):
    z, y = problem(8, 40)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    cross_entropy(a * 2, y).backward()
    torch.utils.checkpoint.checkpoint(lambda t: cross_entropy(t * 2, y), b, use_reentrant=False).backward()
    assert torch.equal(a.grad, b.grad)


def test_there_is_no_forward_mode_derivative_and_it_says_so(triton):
    logits, target = torch.randn(3, 7), torch.randint(7, (3,))
    with pytest.raises(NotImplementedError, match="cross_entropy has no forward-mode derivative"):
        torch.func.jvp(lambda z: cross_entropy(z, target), (logits,), (torch.ones_like(logits),))


def second_derivative(function, leaves, dtype):
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("label_smoothing", "softcap", "z_loss", "weighted"), OPTIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_second_derivative_is_that_of_the_reference(
    implementation, reduction, label_smoothing, softcap, z_loss, weighted, inplace
):
    z, y = problem(7, 40)
    weight = torch.rand(40, generator=torch.Generator().manual_seed(3)) + 0.1 if weighted else None

    def penalty(z, **options):
        loss = cross_entropy(
            z * 1, y, weight, reduction=reduction, label_smoothing=label_smoothing, softcap=softcap, z_loss=z_loss, **options
        )
        return loss.square().sum()

    (ours,) = second_derivative(functools.partial(penalty, inplace_backward=inplace), [z], torch.float32)
    (plain,) = second_derivative(functools.partial(penalty, backend="reference"), [z], torch.float32)
    (truth,) = second_derivative(functools.partial(penalty, backend="reference"), [z], torch.float64)
    assert_as_accurate_as(ours, plain, truth)


# --- what torch.func does with it -----------------------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda f, z, y: torch.func.grad(lambda z: f(z, y[0]).sum())(z[0]),
    "jacrev": lambda f, z, y: torch.func.jacrev(f)(z[0], y[0]),
    "vmap": lambda f, z, y: torch.func.vmap(f)(z, y),
    "vmap(grad)": lambda f, z, y: torch.func.vmap(torch.func.grad(lambda z, y: f(z, y).sum()))(z, y),
    "vmap(grad), one target": lambda f, z, y: torch.func.vmap(torch.func.grad(lambda z: f(z, y[0]).sum()))(z),
    "grad(vmap)": lambda f, z, y: torch.func.grad(lambda z: torch.func.vmap(f)(z, y).sum())(z),
    "jacrev(jacrev)": lambda f, z, y: torch.func.jacrev(torch.func.jacrev(f))(z[0, :1], y[0, :1]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_func_gives_what_it_gives_of_pytorchs(implementation, transform, reduction):
    z, y = torch.randn(3, 4, 9), torch.randint(9, (3, 4))
    y[:, 1] = -100
    ours = TRANSFORMS[transform](functools.partial(cross_entropy, reduction=reduction), z, y[:, [0, 2, 3, 1]])
    theirs = TRANSFORMS[transform](functools.partial(F.cross_entropy, reduction=reduction), z, y[:, [0, 2, 3, 1]])
    torch.testing.assert_close(ours, theirs)


def test_a_target_out_of_range_is_found_among_the_samples_of_vmap(implementation):
    z, y = torch.randn(3, 4, 9), torch.zeros(3, 4, dtype=torch.int64)
    y[1, 2] = 9
    with pytest.raises(IndexError, match="target: token 6 is 9"):
        torch.func.vmap(cross_entropy)(z, y)


# --- what else PyTorch takes ----------------------------------------------------------------------------------------


def probabilities(*shape, dim=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)).softmax(dim)


def indices(*shape):
    y = torch.randint(5, shape, generator=torch.Generator().manual_seed(5))
    return torch.where(torch.arange(y.numel()).view(shape) % 3 == 1, -100, y) if y.numel() > 1 else y


PYTORCH = {
    "one row": ((5,), indices()),
    "rows": ((4, 5), indices(4)),
    "no row": ((0, 5), indices(0)),
    "pictures": ((2, 5, 3), indices(2, 3)),
    "more pictures": ((2, 5, 3, 4), indices(2, 3, 4)),
    "uint8": ((4, 5), indices(4).clamp(0).byte()),
    "probabilities of one row": ((5,), probabilities(5, dim=0)),
    "probabilities": ((4, 5), probabilities(4, 5)),
    "probabilities of pictures": ((2, 5, 3), probabilities(2, 5, 3)),
    "probabilities where both readings fit": ((2, 5, 5), probabilities(2, 5, 5)),
    "probabilities of pictures of one class": ((2, 1, 3), probabilities(2, 1, 3)),
    "one class both ways": ((2, 1, 1), torch.zeros(2, 1, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", PYTORCH)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": "some", "label_smoothing": 0.1}])
def test_what_pytorch_takes_gives_what_pytorch_gives(implementation, name, reduction, options):
    shape, y = PYTORCH[name]
    z = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    if "weight" in options:
        options = {**options, "weight": torch.rand(z.shape[min(1, z.dim() - 1)]) + 0.1}
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    a = cross_entropy(ours, y, reduction=reduction, **options)
    b = F.cross_entropy(theirs, y.long() if y.dtype == torch.uint8 else y, reduction=reduction, **options)
    torch.testing.assert_close(a, b, equal_nan=True)
    a.sum().backward()
    b.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)


def test_the_target_of_one_row_may_have_a_dimension_as_in_pytorch(implementation):
    z = torch.randn(5, requires_grad=True)
    loss = cross_entropy(z, torch.tensor([3]), reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(z, torch.tensor([3]), reduction="none"))
    (ours,) = torch.autograd.grad(loss, z)
    # PyTorch's own has no backward with that dimension.
    torch.testing.assert_close(ours, *torch.autograd.grad(F.cross_entropy(z, torch.tensor(3)), z))
    with pytest.raises(ValueError, match="target: got shape"):
        cross_entropy(torch.randn(1), torch.tensor([0]))


def test_class_probabilities_have_a_gradient_of_their_own(implementation):
    z, p = torch.randn(4, 5), probabilities(4, 5)
    ours, theirs = (torch.func.grad(lambda p, f=f: f(z, p, label_smoothing=0.1))(p) for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("ignore_index", [-1, 0, 3, 2**40, -(2**40)])
def test_any_number_may_be_the_ignored_one(implementation, ignore_index):
    z, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    y[1] = ignore_index
    ours = cross_entropy(z, y, ignore_index=ignore_index)
    torch.testing.assert_close(ours, F.cross_entropy(z, y, ignore_index=ignore_index))


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("old", list(itertools.product((None, False, True), repeat=2)))
def test_arguments_are_where_pytorch_has_them(implementation, old):
    z, y = torch.randn(4, 5), torch.tensor([0, -1, 2, 3])
    arguments = (z, y, torch.rand(5), old[0], -1, old[1], "sum", 0.1)
    torch.testing.assert_close(cross_entropy(*arguments), F.cross_entropy(*arguments))
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    torch.testing.assert_close(cross_entropy(**dict(zip(names, arguments))), F.cross_entropy(*arguments))


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 5, 5, 5)])
def test_logits_with_classes_last_or_second_are_refused_and_flat_ones_are_not(implementation, shape):
    z, y = torch.randn(shape), torch.randint(5, shape[:-1])
    with pytest.raises(ValueError, match=r"target: .*both fit.*input.flatten\(0, -2\)"):
        cross_entropy(z, y)
    last = cross_entropy(z.flatten(0, -2), y.flatten())
    second = cross_entropy(z.movedim(1, -1).flatten(0, -2), y.flatten())
    torch.testing.assert_close(last, F.cross_entropy(z.movedim(-1, 1), y))
    torch.testing.assert_close(second, F.cross_entropy(z, y))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(2, 20, dtype=torch.int64)}, TypeError, r"input: got dtype torch.int64"),
        ({"input": torch.ones(2, 0)}, ValueError, r"input: got shape \(2, 0\)"),
        ({"input": torch.tensor(1.0)}, ValueError, r"target: got shape \(2,\), logits \(\)"),
        ({"target": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, r"target: got dtype torch.int32"),
        ({"target": torch.zeros(2, 20, dtype=torch.int64)}, ValueError, r"target: got shape \(2, 20\)"),
        ({"target": torch.rand(2, 3)}, ValueError, r"target: got shape \(2, 3\)"),
        ({"target": torch.rand(2, 20), "ignore_index": 3}, ValueError, r"ignore_index: got 3"),
        ({"target": torch.rand(2, 20), "return_aux": True}, ValueError, r"return_aux: class probabilities"),
        ({"weight": torch.ones(20, requires_grad=True)}, ValueError, r"weight: it requires a gradient"),
        ({"target": torch.tensor([0.0, 1.0])}, TypeError, r"target: got dtype torch.float32"),
        ({"target": torch.tensor([0])}, ValueError, r"target: got shape \(1,\)"),
        ({"target": torch.tensor([0, 20])}, IndexError, r"target: token 1 is 20"),
        ({"weight": torch.ones(8)}, ValueError, r"weight: got shape \(8,\)"),
        ({"weight": torch.ones(20, device="meta")}, ValueError, r"weight: got device meta, input is on cpu"),
        ({"reduction": "avg"}, ValueError, r"reduction: got 'avg'"),
        ({"label_smoothing": -0.5}, ValueError, r"label_smoothing: got -0.5"),
        ({"z_loss": -1.0}, ValueError, r"z_loss: got -1.0"),
        ({"softcap": math.nan}, ValueError, r"softcap: got nan"),
    ],
)
def test_bad_arguments_are_named(implementation, change, error, message):
    arguments = {"input": torch.randn(2, 20), "target": torch.tensor([0, 1]), **change}
    with pytest.raises(error, match=message):
        cross_entropy(**arguments)


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [256, 33278, 50257, 128256])
def test_real_sizes_are_as_accurate_as_plain_pytorch(dtype, v):
    z, y = problem(1000, v, dtype)
    check(z.cuda(), y.cuda(), label_smoothing=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [True, pytest.param(False, marks=pytest.mark.big)], ids=["in place", ""])
def test_more_than_two_to_the_31_logits(inplace, monkeypatch):
    n, v = 16900, 128256  # 2^31 logits end inside row 16,743
    guards = far.Guards(monkeypatch)
    z = guards.empty((n, v), torch.bfloat16, torch.device("cuda")).normal_()
    y = torch.randint(v, (n,), device="cuda")
    some = torch.cat((torch.arange(4), torch.randint(n, (24,)), torch.arange(16740, 16748), torch.arange(n - 4, n))).cuda()
    few = z[some].requires_grad_()
    expected = cross_entropy_reference(few, y[some], reduction="none")
    (grad,) = torch.autograd.grad(expected.sum(), few)
    leaf = z.requires_grad_()
    loss = cross_entropy(leaf, y, reduction="none", inplace_backward=inplace)
    loss.sum().backward()
    torch.testing.assert_close(loss[some], expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(leaf.grad[some], grad, rtol=2e-2, atol=1e-5)
    guards.check()
