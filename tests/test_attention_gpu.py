"""Attention on a CUDA device: the grid of the interpreter, real sizes, every kind of row, 100 equal runs, 64-bit offsets."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
from wikigpt.kernels import debug_checks, flash_attn_func, flash_attn_varlen_func
from wikigpt.kernels.attention import blocked, config
from wikigpt.kernels.attention.config import Row, Rows
from wikigpt.kernels.attention.op import attention
from wikigpt.kernels.attention.reference import Inputs, attention_reference

from tests.attention_cases import Case, build, check, covering, grid, outputs
from tests.conftest import assert_as_accurate_as

pytestmark = pytest.mark.gpu

HALF = (torch.float16, torch.bfloat16)
GRID = [replace(case, device="cuda") for case in grid(seed=2026, n_random=60)]
SIZES = (
    ((2, 1024, 1024), 64, torch.bfloat16),
    ((1, 2048, 2048), 128, torch.float16),
    ((1, 1000, 2047), 128, torch.bfloat16),
    ((1, 1111, 999), 96, torch.float16),
    ((1, 1024, 1024), 192, torch.bfloat16),
    ((1, 777, 1500), 256, torch.bfloat16),
    ((1, 513, 600), 64, torch.float32),
)
ALONE = ((), ("causal",), ("window",), ("causal", "softcap", "sinks"), ("varlen", "causal"), ("dropout",))
OTHERS = ("alibi", "bias", "bias_of_keys", "mask", "block_mask", "lse_gradient", "used_keys", "packed_layout")


def real(features, size):
    (batch, s, t), head_dim, dtype = size
    return Case(features, dtype, batch, s, t, 4, 2, head_dim, device="cuda", seed=s + head_dim)


# Every size with one set of features, every feature with one size; the product of both is under the marker `full`.
REAL = [real(ALONE[i % len(ALONE)], size) for i, size in enumerate(SIZES)] + [
    Case((feature, "causal"), torch.bfloat16, 1, 1500, 1500, 4, 2, (64, 128)[i % 2], device="cuda")
    for i, feature in enumerate(OTHERS)
]
SMALL = [replace(case, device="cuda") for case in covering(seed=2026, beside=REAL)]
PRODUCT = [real(features, size) for features in ALONE for size in SIZES] + [
    Case((feature, "causal"), torch.bfloat16, 1, 1500, 1500, 4, 2, head_dim, device="cuda")
    for feature in OTHERS
    for head_dim in (64, 128)
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_two_features_hold_together_on_the_gpu(case):
    check(case, "triton")


@pytest.mark.full
@pytest.mark.parametrize("case", GRID, ids=str)
def test_the_grid_of_the_interpreter_holds_on_the_gpu(case):
    check(case, "triton")


@pytest.mark.parametrize("case", REAL, ids=str)
def test_real_sizes_are_as_accurate_as_plain_pytorch(case):
    check(case, "triton")


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in PRODUCT if case not in REAL], ids=str)
def test_all_real_sizes_are_as_accurate_as_plain_pytorch(case):
    check(case, "triton")


@pytest.mark.big
@pytest.mark.parametrize("head_dim", [64, 128])
def test_32k_positions_are_as_accurate_as_plain_pytorch(head_dim):
    s = 32768
    q, k, v, grad = (torch.randn(1, s, 1, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    x = Inputs(q, k, v, softmax_scale=head_dim**-0.5, window_right=0)

    def run(function, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)]
        out = function(replace(x, q=leaves[0], k=leaves[1], v=leaves[2]))
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    wide = replace(x, q=q.double(), k=k.double(), v=v.double())
    out, lse = blocked.forward(wide)
    truth = [out, *blocked.backward(wide, out, lse, grad.double(), None, False)[:3]]
    plain = run(lambda x: attention_reference(x)[0], torch.bfloat16)
    ours = run(lambda x: attention(x, "triton")[0], torch.bfloat16)
    for got, simple, true in zip(ours, plain, truth):
        assert_as_accurate_as(got, simple, true, absolute=torch.finfo(torch.bfloat16).eps / 4)


KINDS = {
    "pointers": Rows(*(Row(64, 64, 4, 2),) * 3),
    "descriptors": Rows(*(Row(64, 64, 4, 2, tma=True),) * 3),
    "wide descriptors": Rows(Row(128, 128, 8, 2, tma=True), Row(128, 64, 8, 2, tma=True), Row(64, 128, 8, 2, tma=True)),
    "persistent": Rows(*(Row(64, 64, 4, 2, persistent=True),) * 3),
    "persistent descriptors": Rows(*(Row(128, 64, 8, 2, persistent=True, tma=True),) * 3),
}


def tiled(features):
    return Case(features, torch.bfloat16, 2, 1000, 1100, 4, 2, 64, device="cuda")


@pytest.mark.parametrize(
    "features",
    [("causal",), *(pytest.param(features, marks=pytest.mark.full) for features in ((), ("window", "sinks")))],
    ids=lambda f: "-".join(f) or "plain",
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row_is_as_accurate(kind, features):
    if "descriptors" in kind and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")
    with config.force(KINDS[kind]):
        check(tiled(features), "triton")


@pytest.mark.parametrize("head_dim", [64, 128])
def test_100_runs_are_equal_bit_for_bit(head_dim):
    x = build(Case(("causal", "dropout", "sinks"), torch.bfloat16, 2, 1000, 1000, 8, 2, head_dim, device="cuda"))
    first = outputs(x, "triton", torch.bfloat16, True)
    for _ in range(99):
        again = outputs(x, "triton", torch.bfloat16, True)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.big
def test_more_than_two_to_the_31_elements():
    """All of them: each part of the batch gives by itself, with offsets that fit 32 bits, the same bits as in the whole; both
    ends are compared with the formula too."""
    shape, part = (66_000, 8, 32, 128), 1_000
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))

    def run(q, k, v):
        out = flash_attn_func(q, k, v, causal=True)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    whole = run(q, k, v)
    for first in range(0, shape[0], part):
        rows = slice(first, first + part)
        alone = run(*(tensor.detach()[rows].clone().requires_grad_() for tensor in (q, k, v)))
        assert all(torch.equal(of_whole[rows], of_part) for of_whole, of_part in zip(whole, alone)), f"from {first} on"
    for rows in (slice(0, 2), slice(65_998, 66_000)):
        leaves = [tensor.detach()[rows].double().requires_grad_() for tensor in (q, k, v)]
        expected = attention_reference(Inputs(*leaves, softmax_scale=128**-0.5, window_right=0))[0]
        torch.testing.assert_close(whole[0][rows].double(), expected, rtol=2e-2, atol=2e-2)
        for got, true in zip(whole[1:], torch.autograd.grad(expected, leaves, torch.ones_like(expected))):
            torch.testing.assert_close(got[rows].double(), true, rtol=3e-2, atol=3e-2)


def test_positions_may_lie_any_distance_apart():
    """As in (S, B, H, D) layouts: one tile spans more than 2^31 numbers."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    t, stride = 140, 2**24 + 2**18
    q, k, grad = (torch.randn(1, t, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    memory = torch.empty((t - 1) * stride + 64, device="cuda", dtype=torch.bfloat16)
    far = memory.as_strided(k.shape, (64, stride, 64, 1)).copy_(k)

    def run(k):
        leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
        out = flash_attn_func(leaves[0], leaves[1], leaves[1])
        return out, *torch.autograd.grad(out, leaves, grad)

    assert all(torch.equal(got, expected) for got, expected in zip(run(far), run(k)))


def test_a_padded_batch_gives_zeros_behind_its_last_sequence():
    tokens, used = 3000, 1700
    q, grad = (torch.randn(tokens, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ends = torch.tensor([0, 700, used], dtype=torch.int32, device="cuda")
    leaves = [q.clone().requires_grad_() for _ in range(3)]
    out, lse, _ = flash_attn_varlen_func(*leaves, ends, ends, 1000, 1000, causal=True, return_attn_probs=True)
    grads = torch.autograd.grad(out, leaves, grad)
    assert all((tensor[used:] == 0).all() for tensor in (out, *grads))
    assert (lse[:, used:] == -torch.inf).all()
    assert all(tensor[:used].isfinite().all() for tensor in (out, *grads))


def test_torch_compile_takes_it_whole_and_gives_the_same():
    q, k, v = (torch.randn(2, 500, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    compiled = torch.compile(lambda q, k, v: flash_attn_func(q * 2, k, v, causal=True).sum(), fullgraph=True)
    expected = torch.autograd.grad(flash_attn_func(q * 2, k, v, causal=True).sum(), (q, k, v))
    for got, eager in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), expected):
        torch.testing.assert_close(got, eager, rtol=2e-2, atol=2e-2)


def test_a_cuda_graph_draws_new_dropout_at_each_replay():
    q = torch.randn(1, 256, 4, 64, device="cuda", dtype=torch.bfloat16)
    flash_attn_func(q, q, q, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, q, q, 0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


def test_pytorchs_attention_runs_ours_once_activated():
    q, k, v = (torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    activate_flash_attention_impl("wikigpt")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ours = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.cuda.synchronize()
    finally:
        restore_flash_attention_impl()
    assert any(event.key == "_forward" for event in profile.key_averages())
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_the_values_of_cu_seqlens_are_checked_under_debug_checks():
    q = torch.randn(10, 2, 64, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([0, 7, 11], dtype=torch.int32, device="cuda")
    with debug_checks(), pytest.raises(ValueError, match="cu_seqlens_q: got"):
        flash_attn_varlen_func(q, q, q, ends, ends, 7, 7)


SANITIZED = [
    Case(features, torch.bfloat16, 1, 130, 150, 2, 1, 64, device="cuda")
    for features in (("causal", "sinks"), ("varlen", "window"), ("bias", "mask"), ("used_keys", "dropout"))
]


@pytest.mark.parametrize("case", SANITIZED, ids=str)
def test_a_small_set_for_compute_sanitizer(case):
    """Run under memcheck and racecheck by `make gpu-check`."""
    x = build(case)
    assert all(
        tensor.isfinite().all() for name, tensor in outputs(x, "triton", torch.bfloat16, False).items() if name != "empty"
    )
