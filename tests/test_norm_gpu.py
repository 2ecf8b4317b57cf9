"""layer_norm and rms_norm on a CUDA device: real sizes, 100 equal runs, 64-bit offsets, CUDA graphs."""

import pytest
import torch
from wikigpt.kernels import layer_norm, rms_norm

from tests import far
from tests.norm_cases import FUNCTIONS, Case, check, outputs

pytestmark = pytest.mark.gpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EVERYTHING = {"prenorm": True, "dropout_p": 0.2}
WIDTHS = (1, 64, 100, 512, 768, 2048, 4096, 5120, 8192, 12288, 16384, 32768, 65536, 70000)
DTYPES = (BF16, F32, F16)


def thinned(full, default):
    """Each width compiles two to four kernels for each row here, at some two seconds a kernel."""
    return [case if case in default else pytest.param(*case, marks=pytest.mark.full) for case in full]


# By default each width in one dtype, for one op with everything and for the other without; the next width the other way round.
EVERY_WIDTH = [
    (op, n, dtype, everything) for op in FUNCTIONS for n in WIDTHS for dtype in DTYPES for everything in (False, True)
]
SOME = [(op, n, DTYPES[i % 3], (i + j) % 2 == 0) for i, n in enumerate(WIDTHS) for j, op in enumerate(FUNCTIONS)]


@pytest.mark.parametrize(("op", "n", "dtype", "everything"), thinned(EVERY_WIDTH, SOME))
def test_every_width_is_as_accurate_as_plain_pytorch(op, n, dtype, everything):
    rows = max(3, min(20_000, 2**22 // n)) + 1
    residual, options = (F32, EVERYTHING) if everything else (None, {})
    check(Case(op, (rows, n), dtype, dtype, F32, residual, options, device="cuda"), "triton")


ROWS = [(op, n) for op in FUNCTIONS for n in (64, 1000, 4096, 16384)]
SOME_ROWS = [("layer_norm", 64), ("rms_norm", 1000), ("layer_norm", 4096), ("rms_norm", 16384)]


@pytest.mark.parametrize("rows", [1, 2, 131, 133, 4099])
@pytest.mark.parametrize(("op", "n"), thinned(ROWS, SOME_ROWS))
def test_any_number_of_rows_is_as_accurate(op, n, rows):
    check(Case(op, (rows, n), BF16, BF16, BF16, BF16, {"prenorm": True}, device="cuda"), "triton")


RUNS = [(op, n) for op in FUNCTIONS for n in (64, 768, 4096, 8192, 16384, 65536)]


@pytest.mark.parametrize(("op", "n"), thinned(RUNS, [("layer_norm", 768), ("rms_norm", 8192), ("layer_norm", 65536)]))
def test_100_runs_are_equal_bit_for_bit(op, n):
    case = Case(op, (2**22 // n, n), BF16, BF16, BF16, F32, EVERYTHING, device="cuda")
    inputs = case.inputs()
    first = outputs(case, "triton", inputs)
    for _ in range(99):
        again = outputs(case, "triton", inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


LARGE = [(op, n) for op in FUNCTIONS for n in (256, 4096, 65536)]


@pytest.mark.big
@pytest.mark.parametrize(("op", "n"), thinned(LARGE, [("layer_norm", 256), ("rms_norm", 65536)]))
def test_more_than_two_to_the_31_elements(op, n, monkeypatch):
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    guards = far.Guards(monkeypatch)
    rows, seam = 2**31 // n + 5, 2**31 // n
    x = torch.randn(rows, n, device="cuda", dtype=BF16).requires_grad_()
    y = FUNCTIONS[op](x)
    (dx,) = torch.autograd.grad(y, x, x.detach())
    guards.check()
    random = torch.randint(rows, (24,), generator=torch.Generator().manual_seed(0))
    some = torch.cat((torch.arange(3), random, torch.arange(seam - 2, seam + 2), torch.arange(rows - 3, rows))).cuda()
    few = x[some].detach().double().requires_grad_()
    expected = FUNCTIONS[op](few, backend="reference")
    torch.testing.assert_close(y[some].double(), expected, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(expected, few, few.detach())[0]
    torch.testing.assert_close(dx[some].double(), grads, rtol=2e-2, atol=2e-2)


def test_rows_far_apart_need_64_bits_too():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x = torch.empty(3, 2**30 + 8, device="cuda", dtype=BF16)[:, :4096].normal_()
    torch.testing.assert_close(layer_norm(x), layer_norm(x.contiguous(), backend="torch"), rtol=2e-2, atol=2e-2)


def test_torch_compile_takes_it_whole_and_gives_the_same():
    x = torch.randn(512, 1024, device="cuda", dtype=BF16, requires_grad=True)
    w = torch.ones(1024, device="cuda", requires_grad=True)

    def run(x, w):
        y, h = rms_norm(x * 2, w, residual=x, prenorm=True)
        return (y.float().square() + h).sum()

    expected = torch.autograd.grad(run(x, w), (x, w))
    for got, eager in zip(torch.autograd.grad(torch.compile(run, fullgraph=True)(x, w), (x, w)), expected):
        torch.testing.assert_close(got, eager, rtol=2e-2, atol=2e-2)


def test_a_cuda_graph_draws_new_dropout_at_each_replay():
    x = torch.randn(256, 512, device="cuda", dtype=BF16)
    layer_norm(x, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer_norm(x, dropout_p=0.5)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


@pytest.mark.parametrize(("op", "n"), [("layer_norm", 40), ("rms_norm", 1000), ("layer_norm", 9000)])
def test_a_small_set_for_compute_sanitizer(op, n):
    case = Case(op, (37, n), BF16, F32, BF16, F32, EVERYTHING, device="cuda")
    assert all(tensor.isfinite().all() for tensor in outputs(case, "triton", case.inputs()).values())
