"""layer_norm and rms_norm on a CUDA device: real sizes, 100 equal runs, 64-bit offsets, CUDA graphs."""

import pytest
import torch
from wikigpt.kernels import layer_norm, rms_norm

from tests.norm_cases import FUNCTIONS, Case, check, outputs

pytestmark = pytest.mark.gpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EVERYTHING = {"prenorm": True, "dropout_p": 0.2}
WIDTHS = (1, 64, 100, 512, 768, 2048, 4096, 5120, 8192, 12288, 16384, 32768, 65536, 70000)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_every_width_is_as_accurate_as_plain_pytorch(op, n, dtype, everything):
    rows = max(3, min(20_000, 2**22 // n)) + 1
    residual, options = (F32, EVERYTHING) if everything else (None, {})
    check(Case(op, (rows, n), dtype, dtype, F32, residual, options, device="cuda"), "triton")


@pytest.mark.parametrize("rows", [1, 2, 131, 133, 4099])
@pytest.mark.parametrize("n", [64, 1000, 4096, 16384])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_any_number_of_rows_is_as_accurate(op, n, rows):
    check(Case(op, (rows, n), BF16, BF16, BF16, BF16, {"prenorm": True}, device="cuda"), "triton")


@pytest.mark.parametrize("n", [64, 768, 4096, 8192, 16384, 65536])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_100_runs_are_equal_bit_for_bit(op, n):
    case = Case(op, (2**22 // n, n), BF16, BF16, BF16, F32, EVERYTHING, device="cuda")
    inputs = case.inputs()
    first = outputs(case, "triton", inputs)
    for _ in range(99):
        again = outputs(case, "triton", inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("n", [256, 4096, 65536])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_more_than_two_to_the_31_elements(op, n):
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    rows = 2**31 // n + 5
    x = torch.randn(rows, n, device="cuda", dtype=BF16).requires_grad_()
    y = FUNCTIONS[op](x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for part in (slice(0, 3), slice(rows - 3, rows)):
        leaf = x[part].detach().double().requires_grad_()
        expected = FUNCTIONS[op](leaf, backend="reference")
        torch.testing.assert_close(y[part].double(), expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(
            dx[part].double(), torch.autograd.grad(expected, leaf, torch.ones_like(expected))[0], rtol=2e-2, atol=2e-2
        )


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


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("n", [40, 1000, 9000])
def test_a_small_set_for_compute_sanitizer(op, n):
    case = Case(op, (37, n), BF16, F32, BF16, F32, EVERYTHING, device="cuda")
    assert all(tensor.isfinite().all() for tensor in outputs(case, "triton", case.inputs()).values())
