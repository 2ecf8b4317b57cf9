"""The Triton kernels of attention, interpreted on the CPU: the numeric rule over a grid of features, dtypes and shapes."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wikigpt.kernels import flash_attn_func
from wikigpt.kernels.attention import config
from wikigpt.kernels.attention.config import Row, Rows
from wikigpt.kernels.attention.op import attention
from wikigpt.kernels.attention.reference import Inputs, keep_mask

from tests.attention_cases import FEATURES, Case, build, check, combines, covering, grid, outputs

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: test_gpu.py runs the grid on it"
)

GRID = list(grid(seed=2026, n_random=60))


def test_the_grid_has_at_least_300_different_cases():
    assert len({str(case) for case in GRID}) >= 300


@pytest.mark.parametrize("case", GRID, ids=str)
def test_outputs_and_gradients_are_as_accurate_as_plain_pytorch(case):
    check(case, "triton")


@pytest.mark.full
@pytest.mark.parametrize("case", list(grid(seed=7, n_random=600)), ids=str)
def test_the_full_product_is_as_accurate_as_plain_pytorch(case):
    check(case, "triton")


@pytest.mark.full
@pytest.mark.parametrize("case", covering(seed=2026), ids=str)
def test_every_two_features_hold_together_at_every_head_dim(case):
    """The cases of the GPU, where they are checked by default."""
    check(case, "triton")


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    features=st.lists(st.sampled_from(FEATURES), max_size=4, unique=True).map(tuple).filter(combines),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
    s=st.integers(1, 70),
    t=st.integers(1, 70),
    groups=st.integers(1, 2),
    ratio=st.integers(1, 3),
    head_dim=st.integers(1, 48),
    v_head_dim=st.integers(1, 48),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape_is_as_accurate_as_plain_pytorch(features, dtype, s, t, groups, ratio, head_dim, v_head_dim, seed):
    check(Case(features, dtype, 1, s, t, groups * ratio, groups, head_dim, v_head_dim, seed), "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [(), ("dropout",)], ids=["", "dropout"])
@pytest.mark.parametrize("case", [Case(t=1), Case(("bias_of_queries",))], ids=["one key", "bias of queries"])
def test_what_cancels_to_zero_is_rounding(case, dtype, dropout):
    """Softmax of one key is 1, and a bias common to all keys changes nothing: d score is dO.V - rowsum(dO * O) = 0. What
    remains is the rounding of the output that was saved, and of the two sums in float32."""
    if dropout and case.t > 1:
        dropout = ("softcap",)  # with dropout it would not cancel
    case = replace(case, features=(*case.features, *dropout), dtype=dtype)
    x = build(case)
    ours, truth = outputs(x, "triton", dtype, False), outputs(x, "reference", torch.float64, False)
    grad_out = torch.randn(truth["out"].shape, generator=torch.Generator().manual_seed(1)).double()
    roundings = (grad_out * truth["out"]).abs().sum(-1).max() * (
        torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    )
    if case.t > 1:
        assert truth["dbias"].abs().max() < 1e-12
        assert ours["dbias"].abs().max() <= case.batch * roundings
    else:
        reach = x.softmax_scale * roundings
        assert truth["dq"].abs().max() == truth["dk"].abs().max() == 0
        assert ours["dq"].abs().max() <= reach * x.k.abs().max()
        assert ours["dk"].abs().max() <= case.s * case.heads * reach * x.q.abs().max()


TILES = {
    "wide": Rows(Row(64, 64, 1, 1), Row(64, 64, 1, 1), Row(64, 64, 1, 1)),
    "tall": Rows(Row(16, 64, 1, 1), Row(64, 16, 1, 1), Row(16, 64, 1, 1)),
    "descriptors": Rows(*(Row(32, 32, 1, 1, tma=True),) * 3),
    "persistent": Rows(*(Row(16, 16, 1, 1, persistent=True),) * 3),
}
TILED = [
    ("causal", "dropout", "sinks"),
    ("window", "bias_of_keys"),
    ("block_mask", "causal"),
    ("varlen", "used_keys", "alibi"),
    ("packed_layout", "softcap"),
    ("heads_first_layout", "mask"),
]


@pytest.mark.parametrize("features", TILED, ids="-".join)
@pytest.mark.parametrize("tiles", TILES)
def test_every_kind_of_tiling_gives_the_same(tiles, features, monkeypatch):
    monkeypatch.setattr(config, "multiprocessors", lambda device: 3)
    with config.force(TILES[tiles]):
        check(Case(features, torch.float16, s=70, t=75, heads=4, groups=2, head_dim=24, v_head_dim=40), "triton")


def test_what_a_descriptor_cannot_address_comes_through_pointers():
    odd = build(Case(head_dim=17))  # rows of 68 bytes
    assert not config.describable(odd, odd.k)
    with config.force(TILES["descriptors"]):
        check(Case(head_dim=17), "triton")


def test_two_runs_are_equal_bit_for_bit():
    x = build(Case(("causal", "dropout", "bias_of_keys", "sinks"), torch.float16, groups=1, heads=4))
    first, second = (outputs(x, "triton", torch.float16, True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_drops_the_weights_that_the_reference_drops():
    # With V the identity the output is the matrix of weights itself.
    t = 40
    q, k = torch.randn(2, 33, 2, 16), torch.randn(2, t, 2, 16)
    v = torch.eye(t).view(1, t, 1, t).expand(2, t, 2, t)
    seed = torch.tensor([987654321, 3])
    x = Inputs(q, k, v, seed=seed, dropout_p=0.4, softmax_scale=0.1)
    weights = attention(x, "triton")[0].transpose(1, 2)
    assert torch.equal(weights > 0, keep_mask(seed, 0.4, 2, 2, 33, t))


def test_dropout_keeps_each_weight_with_its_probability():
    keep = keep_mask(torch.tensor([1, 2]), 0.3, 4, 8, 128, 128)
    # Standard deviation of the mean of 524,288 draws: 0.00063.
    assert abs(keep.double().mean().item() - 0.7) < 4 * 0.00063
    neighbours = (keep[..., 1:] & keep[..., :-1]).double().mean().item()
    assert abs(neighbours - 0.49) < 0.004
    assert not torch.equal(keep, keep_mask(torch.tensor([1, 3]), 0.3, 4, 8, 128, 128))


def test_dropout_follows_pytorchs_generator():
    q = torch.randn(1, 20, 2, 16)
    torch.manual_seed(5)
    first = flash_attn_func(q, q, q, 0.5, backend="triton")
    second = flash_attn_func(q, q, q, 0.5, backend="triton")
    torch.manual_seed(5)
    assert torch.equal(first, flash_attn_func(q, q, q, 0.5, backend="triton"))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=["no batch", "no queries", "no keys"])
@pytest.mark.parametrize("sinks", [False, True])
def test_empty_tensors_give_zeros_and_finite_gradients(shape, sinks):
    b, s, t = shape
    x = build(Case(("sinks", "bias") if sinks else (), batch=b, s=s, t=t))
    ours = outputs(x, "triton", torch.float32, True)
    truth = outputs(x, "reference", torch.float64, True)
    assert torch.equal(ours.pop("empty"), truth.pop("empty"))
    for name, expected in truth.items():
        torch.testing.assert_close(ours[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_rows_without_keys_are_zero_with_lse_minus_infinity_and_without_nan():
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for n in (30, 10, 10))
    # Bottom right: query i sees key i - 20 at most, so the first 20 rows see none.
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, backend="triton")
    assert (out[:, :20] == 0).all()
    assert (lse[..., :20] == -torch.inf).all()
    (out.sum() + lse[..., 20:].sum()).backward()
    assert (q.grad[:, :20] == 0).all()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v))


def test_rows_that_a_bias_of_minus_infinity_hides_are_like_masked_rows():
    q, k, v = (torch.randn(1, 20, 2, 16, requires_grad=True) for _ in range(3))
    bias = torch.zeros(20, 20)
    bias[3] = -torch.inf
    out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, return_attn_probs=True, backend="triton")
    assert (out[:, 3] == 0).all()
    assert (lse[..., 3] == -torch.inf).all()
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v))


def test_nan_reaches_the_rows_that_see_it_and_no_others():
    x = build(Case(("causal", "top_left"), s=40, t=40))
    x.k.view(2, 40, 16)[0, 21, 3] = torch.nan
    out = outputs(x, "triton", torch.float32, False)["out"]
    assert out[0, 21:].isnan().all()
    assert not out[0, :21].isnan().any()
    assert not out[1].isnan().any()


def test_keys_that_are_not_in_use_may_hold_anything():
    x = build(Case(("used_keys",), s=20, t=50))
    x = replace(x, seqused_k=torch.tensor([13, 40], dtype=torch.int32))
    clean = outputs(x, "triton", torch.float32, True)
    for tensor in (x.k, x.v):
        tensor[0, 13:] = torch.nan
        tensor[1, 40:] = torch.inf
    dirty = outputs(x, "triton", torch.float32, True)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@pytest.mark.parametrize(("s", "causal", "window", "share"), [(256, True, (-1, -1), 0.6), (256, False, (16, 16), 0.3)])
def test_masked_tiles_are_never_visited(s, causal, window, share):
    q, k, v = (torch.randn(1, s, 1, 16) for _ in range(3))
    calls = visits(lambda: flash_attn_func(q, k, v, causal=causal, window_size=window, backend="triton"))
    full = visits(lambda: flash_attn_func(q, k, v, backend="triton"))
    assert calls <= share * full


def test_tiles_that_a_boolean_mask_empties_are_never_visited():
    q, k, v = (torch.randn(1, 128, 1, 16) for _ in range(3))
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[:, 32:48] = True
    assert visits(lambda: flash_attn_func(q, k, v, attn_mask=mask, backend="triton")) == 128 // 32


def visits(run) -> int:
    """How many tiles of scores the forward computes: two products each, counted in the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    count, dot = 0, InterpreterBuilder.create_dot

    def counted(*args):
        nonlocal count
        count += 1
        return dot(*args)

    InterpreterBuilder.create_dot = counted
    try:
        run()
    finally:
        InterpreterBuilder.create_dot = dot
    return count // 2
