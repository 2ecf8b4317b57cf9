"""The Triton kernels of layer_norm and rms_norm, interpreted, against the reference in float64 by the numeric rule."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from wikigpt.kernels import LayerNorm, RMSNorm, layer_norm, rms_norm
from wikigpt.kernels._dispatch import why_not_triton

from tests import far
from tests.norm_cases import FUNCTIONS, Case, check, outputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(why_not_triton(DEVICE) is not None, reason=str(why_not_triton(DEVICE)))

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def blocks(block_m: int, block_n: int, programs: int = 1):
    from wikigpt.kernels.norm_triton import Blocks

    return Blocks(block_m, block_n, 4, 2, programs)


# One row and several in a tile, a padded and an exact width, more rows than a tile, more tiles than programs.
SHAPES = [(1, 1), (5, 3), (300, 7), (2, 3, 16), (9, 40), (37, 64), (3, 257), (2, 2500)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_any_shape_is_as_accurate_as_plain_pytorch(op, shape):
    check(Case(op, shape, device=DEVICE), "triton")


DTYPES = [  # x, weight, bias, residual
    (BF16, BF16, None, BF16),
    (BF16, F32, F32, F32),
    (F32, BF16, F16, BF16),
    (F16, F16, F16, None),
    (F16, F32, None, F32),
    (BF16, None, BF16, BF16),
    (F32, None, None, None),
    (torch.float64, F32, None, torch.float64),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_every_input_may_have_a_dtype_of_its_own(op, prenorm, dtypes):
    check(Case(op, (7, 50), *dtypes, options={"prenorm": prenorm}, device=DEVICE), "triton")


@pytest.mark.parametrize("residual", [None, F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_dropout_drops_the_elements_that_the_reference_drops(op, dtype, residual):
    options = {"dropout_p": 0.3, "prenorm": True}
    check(Case(op, (13, 50), dtype, residual=residual, options=options, device=DEVICE), "triton")


@pytest.mark.parametrize("bias", [None, F32])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rms_norm_multiplies_by_one_plus_weight(dtype, bias):
    check(Case("rms_norm", (13, 50), dtype, BF16, bias, options={"unit_offset": True}, device=DEVICE), "triton")


EVERYTHING = {"prenorm": True, "dropout_p": 0.2}


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("shape", [(5, 32), (3, 50), (9, 70)], ids=str)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_rows_that_do_not_fit_the_registers_are_as_accurate(op, shape, options, monkeypatch):
    from wikigpt.kernels import norm_triton

    monkeypatch.setattr(norm_triton, "_BACKWARD_MEANS", blocks(1, 16))
    case = Case(op, shape, BF16, residual=F32 if options else None, options=options, device=DEVICE)
    with norm_triton.force(blocks(1, 16), blocks(1, 16)):
        check(case, "triton")


@pytest.mark.parametrize("op", FUNCTIONS)
def test_rows_of_20000_take_the_kernels_for_wide_rows(op, monkeypatch):
    from wikigpt.kernels import norm_triton

    wide = []
    for name in ("_forward_wide", "_backward_means"):
        monkeypatch.setattr(norm_triton, name, Noted(getattr(norm_triton, name), wide, name))
    check(Case(op, (2, 20000), BF16, residual=BF16, options={"prenorm": True}, device=DEVICE), "triton")
    assert wide == ["_forward_wide", "_backward_means"]


class Noted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, launches, name):
        self.kernel, self.launches, self.name = kernel, launches, name

    def __getitem__(self, grid):
        self.launches.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize("block_m", [1, 2, 8])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_any_tiling_gives_the_same(op, block_m):
    from wikigpt.kernels.norm_triton import force

    case = Case(op, (45, 20), residual=F32, options=EVERYTHING, device=DEVICE)
    with force(blocks(block_m, 32), blocks(block_m, 32)):
        check(case, "triton")


def test_a_mean_far_from_zero_costs_no_digits():
    from wikigpt.kernels import norm_triton

    case = Case("layer_norm", (4, 100), device=DEVICE)
    inputs = case.inputs()
    inputs["x"] += 1000
    check(case, "triton", inputs)
    with norm_triton.force(blocks(1, 16), blocks(1, 16)):
        check(case, "triton", inputs)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_two_runs_are_equal_bit_for_bit(op):
    case = Case(op, (1000, 60), residual=F32, options=EVERYTHING, device=DEVICE)  # 16 tiles, 4 programs
    first, second = (outputs(case, "triton", case.inputs()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


LAYOUTS = {
    "columns of a wider matrix": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "one position of a sequence": lambda x: torch.stack((x, x), 1)[:, 0],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "column-major": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_any_layout_gives_what_contiguous_tensors_give(op, layout):
    x, residual = (LAYOUTS[layout](torch.randn(4, 6, 20, device=DEVICE)) for _ in range(2))
    grad = LAYOUTS[layout](torch.randn(4, 6, 20, device=DEVICE))
    results = []
    for change in (lambda t: t, torch.Tensor.contiguous):
        leaves = [change(t).detach().requires_grad_() for t in (x, residual)]
        y, h = FUNCTIONS[op](leaves[0], residual=leaves[1], prenorm=True, backend="triton")
        results.append([y, h, *torch.autograd.grad((y, h), leaves, (change(grad), change(grad)))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_weight_and_bias_may_have_any_stride(op):
    inputs = Case(op, (4, 20), device=DEVICE).inputs()
    for name in ("weight", "bias"):
        inputs[name] = torch.stack((inputs[name], inputs[name]), 1)[:, 0]
    check(Case(op, (4, 20), device=DEVICE), "triton", inputs)


def test_rows_at_equal_distances_are_read_without_a_copy():
    from wikigpt.kernels.norm_triton import _matrix

    wide = torch.randn(4, 6, 60)
    assert _matrix(wide[..., 20:40]).data_ptr() == wide[..., 20:40].data_ptr()


@pytest.mark.parametrize("op", FUNCTIONS)
def test_rows_may_lie_more_than_2_to_the_31_elements_apart(op, monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("a GPU is here: tests/test_norm_gpu.py has it")
    far.leave_memory_alone(monkeypatch)
    near = Case(op, (2, 40), BF16, residual=BF16, options=EVERYTHING).inputs()
    apart = {name: far.strided(t, (2**31 + 64, 1)) if t.dim() == 2 else t for name, t in near.items()}
    results = []
    for inputs in (near, apart):
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
        torch.manual_seed(0)
        y, h = FUNCTIONS[op](**leaves, **EVERYTHING, backend="triton")
        grads = torch.autograd.grad((y, h), leaves.values(), (inputs["x"].detach(), inputs["residual"].detach()))
        results.append([y, h, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("shape", [(10**9, 1), (70_000, 20_000), (1, 2**26)])
def test_any_number_of_rows_and_columns_makes_a_grid_that_cuda_takes(op, shape, monkeypatch):
    from wikigpt.kernels import norm_triton

    names = ("_forward", "_forward_wide", "_backward_means", "_backward", "_add_partials")
    grids = far.note_grids(monkeypatch, norm_triton, *names)
    x, rms = torch.empty(shape, dtype=BF16, device="meta"), op == "rms_norm"
    weight, (_, _, mean, rstd) = x[0], norm_triton.forward(x, x[0], None, None, None, 0.0, 0.0, rms, False, False, True)
    norm_triton.backward(x, None, x, weight, mean, rstd, None, 0.0, False, BF16, None, False, True)
    assert len(grids) >= 2
    assert [grid for grid in grids if not far.fits(grid)] == []


@pytest.mark.parametrize("op", FUNCTIONS)
def test_rows_so_wide_that_32_bits_do_not_count_them_are_left_to_the_reference(op, monkeypatch):
    from wikigpt.kernels import norm_triton

    monkeypatch.setattr("wikigpt.kernels.norm._WIDEST", 40)
    grids = far.note_grids(monkeypatch, norm_triton, "_forward")
    x = torch.randn(3, 41, device=DEVICE)
    assert torch.equal(FUNCTIONS[op](x, backend="triton"), FUNCTIONS[op](x, backend="reference"))
    assert grids == []


@pytest.mark.parametrize("op", FUNCTIONS)
def test_no_row_gives_no_row_and_zero_gradients(op):
    case = Case(op, (0, 5), residual=F32, options=EVERYTHING, device=DEVICE)
    found = outputs(case, "triton", case.inputs())
    assert found["y"].shape == found["h"].shape == found["dx"].shape == (0, 5)
    assert (found["dweight"] == 0).all()
    assert (found["dbias"] == 0).all()


@pytest.mark.parametrize("op", FUNCTIONS)
def test_nan_stays_in_its_row(op):
    x = torch.randn(4, 20, device=DEVICE)
    x[1, 3] = torch.nan
    nan = FUNCTIONS[op](x, backend="triton").isnan()
    assert nan[1].all()
    assert not nan[[0, 2, 3]].any()


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_what_needs_no_gradient_gets_none(op, needed):
    inputs = Case(op, (5, 20), BF16, residual=F32, device=DEVICE).inputs()
    inputs[needed].requires_grad_()
    truth = {name: t.detach().double().requires_grad_(name == needed) for name, t in inputs.items()}
    FUNCTIONS[op](**inputs, backend="triton").sum().backward()
    FUNCTIONS[op](**truth, backend="reference").sum().backward()
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name == needed)
    torch.testing.assert_close(inputs[needed].grad.double(), truth[needed].grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_gradient_through_the_sum_alone_is_enough(op):
    leaves = [torch.randn(5, 20, device=DEVICE, requires_grad=True) for _ in range(2)]
    h = FUNCTIONS[op](leaves[0], residual=leaves[1], prenorm=True, backend="triton")[1]
    grad = torch.randn_like(h)
    for found in torch.autograd.grad(h, leaves, grad):
        torch.testing.assert_close(found, grad)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_without_gradients_a_sum_that_nobody_asks_for_is_not_stored(op, monkeypatch):
    from wikigpt.kernels import norm_triton

    kept = []
    run = norm_triton.forward
    monkeypatch.setattr(norm_triton, "forward", lambda *args: kept.append(run(*args)) or kept[-1])
    x = torch.randn(5, 20, device=DEVICE)
    y = FUNCTIONS[op](x, residual=x, backend="triton")
    assert kept[0][1:] == (None, None, None)
    torch.testing.assert_close(y, FUNCTIONS[op](x, residual=x, backend="reference"))


# --- with PyTorch's machinery ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_the_registered_operators_pass_opcheck(prenorm, rms):
    x = torch.randn(3, 20, device=DEVICE, requires_grad=True)
    w, b = (torch.randn(20, device=DEVICE, requires_grad=True) for _ in range(2))
    seed = torch.tensor([3, 4], device=DEVICE)
    residual = x.detach().clone().requires_grad_() if prenorm else None
    arguments = (x, w, b, residual, seed if prenorm else None, 1e-5, 0.3 if prenorm else 0.0, rms, rms, prenorm, True)
    torch.library.opcheck(torch.ops.wikigpt.norm, arguments)
    with torch.no_grad():
        y, h, mean, rstd = torch.ops.wikigpt.norm(*arguments)
    arguments = (
        y, h if prenorm else None, h if prenorm else x.detach(), w.detach(), None if rms else mean, rstd, seed, 0.3, rms,
        torch.float32, torch.float32, True, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.wikigpt.norm_backward, arguments)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_torch_compile_takes_it_whole_and_gives_the_same(op):
    inputs = Case(op, (3, 20), residual=F32, device=DEVICE).inputs()

    def run(function):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        y, h = function(**leaves)
        (y.square().sum() + h.sum()).backward()
        return [y, h, *(leaf.grad for leaf in leaves.values())]

    def call(**tensors):
        return FUNCTIONS[op](**tensors, prenorm=True, backend="triton")

    for got, expected in zip(run(torch.compile(call, fullgraph=True, backend="aot_eager")), run(call)):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_activation_checkpointing_replays_dropout(op):
    def run(use):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        call = lambda x: FUNCTIONS[op](x, residual=x, dropout_p=0.4, backend="triton")  # noqa: E731
        (checkpoint(call, leaf, use_reentrant=False) if use else call(leaf)).square().sum().backward()
        return leaf.grad

    x = torch.randn(6, 24, device=DEVICE)
    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_autocast_changes_nothing(op):
    x, w = torch.randn(4, 16, device=DEVICE), torch.randn(16, device=DEVICE)
    with torch.autocast(DEVICE, BF16):
        y = FUNCTIONS[op](x, w, backend="triton")
        assert FUNCTIONS[op](x.to(BF16), w, backend="triton").dtype == BF16
    assert torch.equal(y, FUNCTIONS[op](x, w, backend="triton"))


def test_a_second_derivative_raises_and_says_what_has_one():
    x = torch.randn(3, 20, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(layer_norm(x, backend="triton").square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_a_forward_mode_derivative_raises_and_says_what_has_one():
    x = torch.randn(3, 20, device=DEVICE)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: rms_norm(x, backend="triton"), (x,), (x,))


@pytest.mark.parametrize("module", [LayerNorm, RMSNorm])
def test_the_modules_take_their_backend_and_a_residual(module):
    x, residual = (torch.randn(3, 12, device=DEVICE) for _ in range(2))
    ours, plain = (module(12, backend=backend, device=DEVICE)(x, residual, prenorm=True) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, plain)
