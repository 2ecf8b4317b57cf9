"""Attention at the limits of 32 bits, of CUDA's grids and of what a caller may hand over: strides, windows, padded batches."""

import math
import os
from dataclasses import replace

import pytest
import torch
from wikigpt.kernels import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    scaled_dot_product_attention,
    varlen_attn,
)
from wikigpt.kernels._launch import GRID_X, grid_x
from wikigpt.kernels.attention import backward, config, forward, tile
from wikigpt.kernels.attention.config import Row, Rows
from wikigpt.kernels.attention.op import attention
from wikigpt.kernels.attention.reference import MAX_HEAD_DIM, Inputs

from tests.attention_cases import Case, build, check, check_problem, outputs
from tests.conftest import assert_as_accurate_as

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
BACKENDS = [pytest.param("triton", marks=interpreted), "cpu", "reference"]


# --- offsets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def far(monkeypatch, tmp_path):
    """far(tensor, stride): the same numbers with positions `stride` apart, in a file with holes, which takes no memory."""
    from triton.runtime.interpreter import GridExecutor

    # The interpreter copies every argument's whole storage to a device of its own and back.
    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)

    def move(tensor, stride):
        b, s, h, d = tensor.shape
        size = (s - 1) * stride + b * h * d
        storage = torch.from_file(str(tmp_path / "far"), shared=True, size=size, dtype=tensor.dtype)
        return storage.as_strided(tensor.shape, (h * d, stride, d, 1)).copy_(tensor)

    return move


@interpreted
@pytest.mark.parametrize("stride", [2**28, 2**31 + 16], ids=["the tile passes 2^31", "a stride passes 2^31"])
def test_positions_may_lie_any_distance_apart(far, stride):
    """(S, B, H, D) layouts: a tile of keys in the forward and in dq, of queries in dkdv, spans more than 2^31 numbers."""
    near = [torch.randn(1, n, 1, 16).bfloat16() for n in (10, 11, 11, 10)]

    def run(q, k, v, grad):
        x = Inputs(q, k, v, softmax_scale=0.25, window_right=0)
        out, lse = forward.forward(x)
        return [out, lse, *backward.backward(x, out, lse, grad, None, False)[:3]]

    expected = run(*near)
    for moved in range(4):
        tensors = [far(tensor, stride) if i == moved else tensor for i, tensor in enumerate(near)]
        for got, wanted in zip(run(*tensors), expected):
            assert torch.equal(got, wanted)


@interpreted
@pytest.mark.parametrize("name", ["bias", "mask"])
def test_the_columns_of_a_mask_may_lie_any_distance_apart(far, name):
    q, k = torch.randn(1, 6, 1, 16), torch.randn(1, 9, 1, 16)
    near = torch.randn(6, 9) if name == "bias" else torch.rand(6, 9) > 0.4
    wide = far(near.T[None, :, None].contiguous(), 2**28)[0, :, 0].T
    x = Inputs(q, k, k, softmax_scale=0.25)
    assert torch.equal(forward.forward(replace(x, **{name: wide}))[0], forward.forward(replace(x, **{name: near}))[0])


def test_a_section_of_heads_counts_its_work_in_32_bits():
    # One key of 1 + 1 numbers for all heads: 2^23 groups of them fit the cache, and there are 2^20 tiles of queries.
    k = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16, device="meta")
    heads, n_tiles = 2**14, 2**20
    section = config.section(k, k, group=heads, n_k=1, n_heads=heads, n_tiles=n_tiles)
    assert section >= 1
    assert section * n_tiles < 2**31


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("n_work", [1, 1000, 2**30 + 1, 2**31 - 1, 2**31, 2**40])
def test_any_number_of_tiles_has_a_grid_that_counts_without_overflow(n_work, persistent):
    programs, takes_several = config.grid(n_work, Row(64, 64, 4, 2, persistent=persistent), torch.device("cpu"))
    assert programs <= GRID_X
    assert takes_several or programs == n_work
    # The loop of a program steps over the end of the work once; Triton types numbers above 2^31 - 1 as 64 bits.
    assert not takes_several or n_work > GRID_X or n_work + programs <= GRID_X


@interpreted
def test_more_units_of_work_than_a_grid_has_programs_are_all_done(monkeypatch):
    """As for 2^31 and more, where a program takes several although the row is not persistent."""
    x = build(Case(("causal",), batch=5, s=33, t=17))
    expected = outputs(x, "triton", torch.float32, False)
    monkeypatch.setattr(config, "GRID_X", 8)
    assert all(torch.equal(got, expected[name]) for name, got in outputs(x, "triton", torch.float32, False).items())


@interpreted
@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("window", [(2**31 - 1, 2**31 - 1), (2**31 - 1, 3), (5, 2**31 - 1), (2**40, 2**40)])
def test_a_window_may_be_wider_than_any_sequence(window, backend):
    q, k = torch.randn(1, 20, 1, 16), torch.randn(1, 30, 1, 16)
    wide = tuple(-1 if n > 30 else n for n in window)
    expected = flash_attn_func(q, k, k, window_size=wide, backend="reference")
    torch.testing.assert_close(flash_attn_func(q, k, k, window_size=window, backend=backend), expected)


# --- grids ----------------------------------------------------------------------------------------------------------


@interpreted
def test_every_grid_is_inside_cudas_limits_for_any_number_of_heads(monkeypatch):
    """The second dimension of a grid ends at 65,535; 70,000 heads and their masks and biases must not be counted there."""
    grids = []

    def record(kernel):
        monkeypatch.setattr(type(kernel), "__getitem__", lambda self, grid: lambda *a, **k: grids.append(grid))

    record(tile.block_list)
    q = torch.empty(1, 1, 70_000, 16, device="meta")
    bias, mask = torch.empty(1, 70_000, 1, 1, device="meta"), torch.empty(1, 70_000, 1, 1, dtype=torch.bool, device="meta")
    x = Inputs(q, q, q, bias=bias, mask=mask)
    out, lse = forward.forward(x)
    backward.backward(x, out, lse, out, None, True)
    assert len(grids) == 7  # three lists of tiles, the forward, dq, dkdv and the gradient of the bias
    assert all(len(grid) == 1 and grid[0] <= GRID_X for grid in grids)


def test_a_grid_that_cuda_cannot_count_is_refused():
    assert grid_x(GRID_X) == (GRID_X,)
    with pytest.raises(ValueError, match="divide the batch"):
        grid_x(GRID_X + 1)


# --- strides --------------------------------------------------------------------------------------------------------

SMALL = {
    "alibi_slopes of every second head": {"alibi_slopes": torch.rand(8)[::2]},
    "alibi_slopes in columns": {"alibi_slopes": torch.rand(4, 2).T},
    "alibi_slopes of one number": {"alibi_slopes": torch.rand(1).expand(2, 4)},
    "s_aux of every second head": {"s_aux": torch.rand(8)[::2]},
    "seqused_k of one number": {"seqused_k": torch.tensor([5], dtype=torch.int32).expand(2)},
    "seqused_k of every second": {"seqused_k": torch.tensor([5, 0, 7, 0], dtype=torch.int32)[::2]},
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_small_tensors_may_be_strided_or_expanded(name, backend):
    q, k = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 4, 16)
    dense = {option: tensor.clone(memory_format=torch.contiguous_format) for option, tensor in SMALL[name].items()}
    expected = flash_attn_func(q, k, k, **dense, backend="reference")
    torch.testing.assert_close(flash_attn_func(q, k, k, **SMALL[name], backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_cu_seqlens_may_be_strided(backend):
    q = torch.randn(9, 2, 16)
    ends = torch.tensor([0, -7, 4, -7, 9, -7], dtype=torch.int32)[::2]
    expected = flash_attn_varlen_func(q, q, q, ends.contiguous(), ends.contiguous(), 5, 5, backend="reference")
    torch.testing.assert_close(flash_attn_varlen_func(q, q, q, ends, ends, 5, 5, backend=backend), expected)


@interpreted
def test_the_backward_takes_an_output_and_lse_of_any_strides():
    x = build(Case(("causal", "lse_gradient"), s=20, t=20))
    out, lse = forward.forward(x)
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    expected = backward.backward(x, out, lse, grad, grad_lse, False)
    strided = [tensor.transpose(1, -1).contiguous().transpose(1, -1) for tensor in (out, lse, grad, grad_lse)]
    for got, wanted in zip(backward.backward(x, *strided, False), expected):
        assert got is wanted or torch.equal(got, wanted)


def one_head(tensor, stride):
    """The same tensor, with another stride in its dimension of size 1."""
    return tensor.as_strided(tensor.shape, (*tensor.stride()[:2], stride, 1))


DESCRIBED = {
    "dense rows": (torch.empty(2, 8, 4, 64), True),
    "one head, whatever its stride": (one_head(torch.empty(2, 8, 1, 64), 1), True),
    "one sequence, whatever its stride": (torch.empty(1, 8, 4, 64).as_strided((1, 8, 4, 64), (3, 256, 64, 1)), True),
    "rows of 17 numbers": (torch.empty(2, 8, 4, 17), False),
    "head_dim 1": (torch.empty(2, 8, 4, 1), False),
    "head_dim 1 with a stride": (torch.empty(2, 8, 4, 64)[..., :1].transpose(1, 3).contiguous().transpose(1, 3), True),
    "an expanded batch": (torch.empty(1, 8, 4, 64).expand(2, 8, 4, 64), False),
    "an address between 16 bytes": (torch.empty(2 * 8 * 4 * 64 + 1)[1:].view(2, 8, 4, 64), False),
    "no keys": (torch.empty(2, 0, 4, 64), False),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_descriptors_are_made_of_what_cuda_can_describe(name):
    tensor, wanted = DESCRIBED[name]
    tensor = forward.contiguous_rows(tensor)
    x = Inputs(tensor, tensor, tensor)
    assert config.describable(x, tensor) == (wanted and name != "head_dim 1 with a stride")
    if config.describable(x, tensor):
        described = config.descriptor(tensor, 16)  # it checks address and strides itself
        assert described.strides[-1] == 1
        assert all(stride > 0 for stride in described.strides)


@interpreted
@pytest.mark.parametrize("name", [name for name, (tensor, _) in DESCRIBED.items() if tensor.numel()])
def test_rows_with_descriptors_compute_what_cannot_be_described(name):
    tensor = DESCRIBED[name][0].normal_() if "expanded" not in name else torch.randn(1, 8, 4, 64).expand(2, 8, 4, 64)
    with config.force(Rows(*(Row(16, 16, 1, 1, tma=True),) * 3)):
        out = flash_attn_func(tensor, tensor, tensor, backend="triton")
    torch.testing.assert_close(out, flash_attn_func(tensor, tensor, tensor, backend="reference"))


# --- batches that are padded to a fixed size ------------------------------------------------------------------------


def padded_batch(q_tail, k_tail, **options):
    """Packed sequences of 5 and 3 queries and of 4 and 6 keys, with garbage behind them, and the same without."""
    q_ends, k_ends = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 5, 8], [0, 4, 10]))
    short = [torch.randn(n, 2, 16) for n in (8, 10, 10)]
    long = [torch.cat((t, torch.full((n, 2, 16), math.nan))) for t, n in zip(short, (q_tail, k_tail, k_tail))]
    sizes = {"cu_seqlens_q": q_ends, "cu_seqlens_k": k_ends, "max_seqlen_q": 5, "max_seqlen_k": 6}
    return [Inputs(*tensors, softmax_scale=0.25, **sizes, **options) for tensors in (long, short)]


@pytest.fixture
def dirty_memory(monkeypatch):
    """What is allocated and not written holds NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("options", [{}, {"window_right": 0, "s_aux": torch.tensor([0.3, -0.2])}], ids=["plain", "sinks"])
@pytest.mark.parametrize("tails", [(3, 7), (40, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_behind_the_last_sequence_give_nothing_and_get_no_gradient(backend, tails, options, dirty_memory):
    def run(x, grad):
        names = [name for name in ("q", "k", "v", "s_aux") if getattr(x, name) is not None]
        leaves = {name: getattr(x, name).clone().requires_grad_() for name in names}
        out, lse = attention(replace(x, **leaves), backend)
        return {"out": out, "lse": lse.T, **dict(zip(names, torch.autograd.grad(out, list(leaves.values()), grad)))}

    long, short = padded_batch(*tails, **options)
    grad = torch.randn(8, 2, 16)
    expected = run(short, grad)
    ours = run(long, torch.cat((grad, torch.full((tails[0], 2, 16), math.nan))))
    for name, wanted in expected.items():
        used = len(wanted)
        torch.testing.assert_close(ours[name][:used], wanted)
        assert (ours[name][used:] == (-math.inf if name == "lse" else 0.0)).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_padding_alone_gives_zeros(backend, dirty_memory):
    q = torch.randn(6, 2, 16)
    ends = torch.zeros(3, dtype=torch.int32)
    out, lse, _ = flash_attn_varlen_func(q, q, q, ends, ends, 4, 4, return_attn_probs=True, backend=backend)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_varlen_attn_takes_a_padded_batch(dirty_memory):
    long, short = padded_batch(3, 7)
    out, expected = (varlen_attn(x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, 5, 6) for x in (long, short))
    torch.testing.assert_close(out[:8], expected, rtol=1e-5, atol=1e-5)
    assert (out[8:] == 0).all()


def test_the_padding_of_a_batch_does_not_reach_a_loss_with_the_lse(dirty_memory):
    long, _ = padded_batch(3, 7)
    leaves = [tensor.requires_grad_() for tensor in (long.q, long.k, long.v)]
    out, lse = attention(replace(long, q=leaves[0], k=leaves[1], v=leaves[2]), "cpu")
    (out.sum() + lse[:, :8].square().sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


# --- biases far from 0 ----------------------------------------------------------------------------------------------

FAR = (-1e4, -1e9, -1e30, -3e38, 1e9, "min", "max")
SPREAD = {
    "a whole row": lambda value, other: (value, value),
    "half of a row": lambda value, other: (value, 0.0),
    "beside -inf": lambda value, other: (value, -math.inf),
    "beside another": lambda value, other: (value, other),
}


def rows_far_from_zero(dtype, value, spread, sinks=False):
    """Three rows have a bias of `value` in the first half of their keys, and in the second what SPREAD says."""
    x = build(Case(("bias", "sinks") if sinks else ("bias",), dtype, batch=1, s=8, t=20))
    low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    value = {"min": low, "max": high}.get(value, value)
    value = min(max(value, low), high)
    first, second = SPREAD[spread](value, value * 0.9)
    x.bias[..., 3:6, :9], x.bias[..., 3:6, 9:] = first, second
    return x


@pytest.mark.parametrize(
    ("spread", "dtype"),
    [*((spread, torch.float32) for spread in SPREAD), ("a whole row", torch.bfloat16), ("a whole row", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("value", FAR, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_bias_may_put_rows_any_distance_from_zero(backend, value, spread, dtype):
    """Attention masks hold finfo.min, whole rows of it for queries that are padding. Of a row at -1e30 lse cannot hold the
    logarithm of its sum; the backward needs it all the same."""
    check_problem(rows_far_from_zero(dtype, value, spread), backend)


@pytest.mark.parametrize("sink", [-math.inf, 0.0, -1e9], ids=str)
@pytest.mark.parametrize("value", [-1e9, "min", "max"], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_sink_takes_part_in_rows_far_from_zero(backend, value, sink):
    x = rows_far_from_zero(torch.float32, value, "a whole row", sinks=True)
    check_problem(replace(x, s_aux=torch.full_like(x.s_aux, sink)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_of_minus_infinity_is_none_in_rows_without_keys_too(backend):
    q, k = (torch.randn(1, n, 2, 16) for n in (9, 4))
    x = Inputs(q, k, k, softmax_scale=0.25, window_right=0)  # the first five rows have no key
    expected = attention(x, "reference")
    got = attention(replace(x, s_aux=torch.full((2,), -math.inf)), backend)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("value", [-1e4, -1e9, "min", 1e9], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_the_mask_of_scaled_dot_product_attention_may_put_rows_any_distance_from_zero(backend, value):
    """On the CPU PyTorch's fused kernel computes it otherwise, whose gradient is wrong for such rows."""
    mask = torch.randn(1, 1, 8, 20)
    mask[..., 3:6, :] = torch.finfo(torch.float32).min if value == "min" else value
    numbers = [torch.randn(1, 2, n, 16) for n in (8, 20, 20)]

    def gradients(backend, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in numbers]
        out = scaled_dot_product_attention(*leaves, mask.to(dtype), backend=backend)
        return torch.autograd.grad(out.square().sum(), leaves)

    results = [gradients(*of) for of in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64))]
    for ours, plain, truth in zip(*results):
        assert_as_accurate_as(ours, plain, truth, absolute=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_row_of_the_lowest_number_takes_the_mean_of_its_values(backend, dtype):
    q, v = torch.randn(1, 3, 1, 16), torch.randn(1, 5, 1, 16)
    bias = torch.full((3, 5), torch.finfo(dtype).min, dtype=dtype)
    bias[1, 2:] = -math.inf
    out, lse, _ = flash_attn_func(q, v, v, attn_bias=bias, return_attn_probs=True, backend=backend)
    torch.testing.assert_close(out[0, :, 0], torch.stack([v[0, :n, 0].mean(0) for n in (5, 2, 5)]))
    assert (lse == torch.finfo(torch.float32).min).all()


# --- head_dim above 256 ---------------------------------------------------------------------------------------------


def wide_calls(d, dv, dtype):
    """Each public function as call(backend, dtype), on the same numbers."""
    rng = torch.Generator().manual_seed(d + dv)
    q, k, v = (torch.randn(2, n, h, w, generator=rng).to(dtype) for n, h, w in ((3, 2, d), (20, 1, d), (20, 1, dv)))
    ends = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 20], dtype=torch.int32)
    pages = torch.tensor([[0, 2], [3, 1]], dtype=torch.int32)

    def to(dtype, *tensors):
        return [tensor.to(dtype) for tensor in tensors]

    def first(*tensors):
        return [tensor.transpose(1, 2) for tensor in tensors]

    def cached(backend, dtype):
        new_q, cache_k, cache_v = to(dtype, q, k.reshape(4, 10, 1, d), v.reshape(4, 10, 1, dv))
        lengths = torch.tensor([17, 9], dtype=torch.int32)
        return flash_attn_with_kvcache(
            new_q, cache_k, cache_v, cache_seqlens=lengths, block_table=pages, causal=True, num_splits=2, backend=backend
        )

    return {
        "flash_attn_func": lambda backend, dtype: flash_attn_func(*to(dtype, q, k, v), causal=True, backend=backend),
        "scaled_dot_product_attention": lambda backend, dtype: scaled_dot_product_attention(
            *first(*to(dtype, q, k, v)), enable_gqa=True, backend=backend
        ),
        "flash_attn_varlen_func": lambda backend, dtype: flash_attn_varlen_func(
            *to(dtype, q[0], k[0], v[0]), *ends, 3, 20, window_size=(9, 0), backend=backend
        ),
        "flash_attn_with_kvcache": cached,
    }


CALLS = [(function, dims) for function in wide_calls(1, 1, torch.float32) for dims in ((264, 264), (576, 512))]


@pytest.mark.parametrize(("function", "dims"), [*CALLS, ("flash_attn_with_kvcache", (MAX_HEAD_DIM, MAX_HEAD_DIM))], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dims_above_256_are_computed_by_every_function(backend, function, dims):
    call = wide_calls(*dims, torch.bfloat16)[function]
    truth, plain = call("reference", torch.float64), call("reference", torch.bfloat16)
    assert_as_accurate_as(call(backend, torch.bfloat16), plain, truth, absolute=torch.finfo(torch.bfloat16).eps / 4)


WIDE = [
    Case(("causal",), torch.float32, head_dim=264),
    Case(("varlen", "alibi"), torch.float16, head_dim=320),
    Case(("mask", "softcap"), torch.bfloat16, head_dim=512),
    Case(("bias", "sinks", "dropout"), torch.bfloat16, head_dim=576, v_head_dim=512),
    Case(("window", "lse_gradient"), torch.bfloat16, head_dim=64, v_head_dim=320),
    Case(("bias_of_keys", "used_keys"), torch.bfloat16, head_dim=320, v_head_dim=24),
]


@pytest.mark.parametrize("case", WIDE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_gradients_at_head_dims_above_256_are_as_accurate_as_plain_pytorch(backend, case):
    check(replace(case, batch=1, s=12, t=20), backend)


@interpreted
def test_rows_of_any_width_may_lie_any_distance_apart(far):
    near = [torch.randn(1, n, 1, 264).bfloat16() for n in (3, 4, 4, 3)]

    def run(q, k, v, grad):
        x = Inputs(q, k, v, softmax_scale=0.06)
        out, lse = forward.forward(x)
        return [out, lse, *backward.backward(x, out, lse, grad, None, False)[:3]]

    expected = run(*near)
    for moved in range(4):
        tensors = [far(tensor, 2**30) if i == moved else tensor for i, tensor in enumerate(near)]
        assert all(torch.equal(got, wanted) for got, wanted in zip(run(*tensors), expected))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_head_dim_above_the_limit_is_refused(name):
    tensors = {key: torch.randn(1, 2, 1, MAX_HEAD_DIM + (key == name or (name != "v" and key == "k"))) for key in "qkv"}
    with pytest.raises(ValueError, match=f"head_dim .*{MAX_HEAD_DIM}"):
        flash_attn_func(**tensors)
