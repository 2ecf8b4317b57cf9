"""Attention on the CPU in blocks: the numeric rule, memory, PyTorch's transformations, and every bad input by its message."""

import contextlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from wikigpt.kernels import (
    debug_checks,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    scaled_dot_product_attention,
)
from wikigpt.kernels.attention import blocked, functional
from wikigpt.kernels.attention.functional import check as check_inputs
from wikigpt.kernels.attention.op import attention
from wikigpt.kernels.attention.reference import Inputs

from tests.attention_cases import Case, build, check, grid, outputs

GRID = list(grid(seed=2026, n_random=60))


@pytest.fixture
def small_blocks(monkeypatch):
    """Sizes of a few dozen positions have several blocks, the last of them not full."""
    monkeypatch.setattr(blocked, "BLOCK_M", 24)
    monkeypatch.setattr(blocked, "BLOCK_N", 16)


def leaves(x: Inputs) -> Inputs:
    names = [name for name in ("q", "k", "v", "bias", "s_aux") if getattr(x, name) is not None]
    return replace(x, **{name: getattr(x, name).detach().clone().requires_grad_() for name in names})


def arguments(x: Inputs) -> tuple:
    return tuple(getattr(x, name) for name in Inputs.__dataclass_fields__)


def qkv(*shape: int, seed: int = 0, requires_grad: bool = True) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=rng).requires_grad_(requires_grad) for _ in range(3)]


def gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    out = function(*inputs)
    rng = torch.Generator().manual_seed(3)
    return [out, *torch.autograd.grad(out, inputs, torch.randn(out.shape, generator=rng).to(out))]


def assert_all_close(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GRID[::2], ids=str)
def test_outputs_and_gradients_are_as_accurate_as_plain_pytorch(case, small_blocks):
    check(case, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID[1::2], ids=str)
def test_the_other_half_of_the_grid_is_as_accurate_as_plain_pytorch(case, small_blocks):
    check(case, "cpu")


@pytest.mark.parametrize("features", [("causal", "sinks"), ("window", "dropout", "bias"), ("varlen", "used_keys", "top_left")])
def test_long_sequences_are_as_accurate_as_plain_pytorch(features):
    s = 2 * blocked.BLOCK_M + 7
    check(Case(features, batch=1, s=s, t=2 * blocked.BLOCK_N + 5, heads=2), "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_that_cancel_are_not_the_rounding_of_the_output(dtype):
    # With a single key the weights do not depend on q and k; dropout's factor 1.25 makes the output one that is rounded.
    x = leaves(build(Case(("dropout",), dtype, s=40, t=1)))
    out, _ = attention(x, "cpu")
    dq, dk = torch.autograd.grad(out.sum(), (x.q, x.k))
    assert dq.abs().max() < 1e-5
    assert dk.abs().max() < 1e-5


def test_float64_is_computed_in_float64(small_blocks):
    x = build(Case(("causal", "dropout", "bias", "sinks", "lse_gradient"), torch.float64))
    assert_all_close(*(list(outputs(x, backend, torch.float64, True).values()) for backend in ("cpu", "reference")))


def test_blocks_outside_the_window_are_not_computed(monkeypatch):
    computed = []
    scores = blocked._scores

    def counted(x, q, k, rows, keys):
        computed.append((rows, keys))
        return scores(x, q, k, rows, keys)

    monkeypatch.setattr(blocked, "_scores", counted)
    monkeypatch.setattr(blocked, "BLOCK_M", 16)
    monkeypatch.setattr(blocked, "BLOCK_N", 16)
    x = Inputs(*qkv(1, 160, 2, 16))
    blocks = {}
    for name, window in (("all", (-1, -1)), ("causal", (-1, 0)), ("sliding", (15, 0))):
        computed.clear()
        attention(replace(x, window_left=window[0], window_right=window[1]), "cpu")
        blocks[name] = len(computed)
    assert blocks == {"all": 100, "causal": 55, "sliding": 19}


def test_rows_without_a_key_give_zero_and_no_gradient(small_blocks):
    x = leaves(replace(build(Case(("window",), s=50, t=20)), window_left=3, window_right=0))  # rows 0..29 end before key 0
    out, lse = attention(x, "cpu")
    # As from merging two lse by logsumexp: its gradient is NaN where both are -inf.
    grad_lse = torch.ones_like(lse).masked_fill(lse == -torch.inf, torch.nan)
    grads = torch.autograd.grad((out, lse), (x.q, x.k, x.v), (torch.ones_like(out), grad_lse))
    assert (out[:, :30] == 0).all()
    assert (lse[..., :30] == -torch.inf).all()
    assert lse[..., 30:].isfinite().all()
    assert (grads[0][:, :30] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_what_lies_behind_the_keys_in_use_is_never_read(small_blocks):
    x = build(Case(t=40))
    used = torch.tensor([0, 21], dtype=torch.int32)
    unused = (torch.arange(40) >= used[:, None])[..., None, None]
    x = leaves(replace(x, k=x.k.masked_fill(unused, torch.nan), v=x.v.masked_fill(unused, torch.inf), seqused_k=used))
    out, _ = attention(x, "cpu")
    dq, dk, dv = torch.autograd.grad(out.sum(), (x.q, x.k, x.v))
    assert out.isfinite().all()
    assert dq.isfinite().all()
    for grad in (dk, dv):
        assert (grad.masked_select(unused) == 0).all()
        assert grad.isfinite().all()


@pytest.mark.parametrize(("batch", "s", "t", "heads"), [(0, 3, 3, 2), (2, 0, 3, 2), (2, 3, 0, 2), (2, 3, 3, 0)])
def test_empty_tensors_give_empty_outputs_and_zero_gradients(batch, s, t, heads):
    q = torch.randn(batch, s, heads, 16, requires_grad=True)
    k, v = (torch.randn(batch, t, heads, 16, requires_grad=True) for _ in range(2))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, backend="cpu")
    assert out.shape == q.shape
    assert lse.shape == (batch, heads, s)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all((grad == 0).all() and grad.shape == tensor.shape for grad, tensor in zip(grads, (q, k, v)))


def test_a_batch_of_no_sequences_is_empty():
    q, ends = torch.randn(0, 2, 16), torch.zeros(1, dtype=torch.int32)
    assert flash_attn_varlen_func(q, q, q, ends, ends, 0, 0, backend="cpu").shape == (0, 2, 16)


def test_a_sink_takes_its_share_where_there_is_no_key():
    x = leaves(Inputs(torch.randn(1, 3, 2, 8), *torch.randn(2, 1, 0, 2, 8), s_aux=torch.tensor([0.5, -1.0])))
    out, lse = attention(x, "cpu")
    assert (out == 0).all()
    torch.testing.assert_close(lse, x.s_aux.view(1, 2, 1).expand(1, 2, 3))
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), x.s_aux)[0], torch.full((2,), 3.0))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_bias_may_be_wider_than_the_queries_and_its_gradient_has_its_dtype(backend):
    q, k, v = (tensor.bfloat16() for tensor in qkv(1, 20, 2, 16))
    bias = torch.randn(20, 20, requires_grad=True)
    out = flash_attn_func(q, k, v, attn_bias=bias, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), bias)[0].dtype == torch.float32


MEASURE = """
import resource, torch
from wikigpt.kernels import flash_attn_func
torch.set_num_threads(1)
def peak(s, dtype, dropout_p):
    q, k, v = (torch.randn(1, s, 1, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = torch.randn(s, dtype=dtype, requires_grad=True)
    flash_attn_func(q, k, v, dropout_p, causal=True, softcap=5.0, attn_bias=bias, backend="cpu").sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak(600, torch.bfloat16, 0.1)
print(peak(4096, torch.float32, 0.1) - before, peak(8192, torch.bfloat16, 0.0) - before)
"""


def test_memory_does_not_hold_the_matrix_of_scores():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    with_dropout, long = map(int, done.stdout.split())
    assert with_dropout < 16 * 2**20  # the matrix has 64 MiB, a tensor of 4096 positions in float32 1/4 MiB
    assert long < 32 * 2**20  # the matrix has 256 MiB, a tensor of 8192 positions 1/2 MiB


# --- PyTorch's transformations --------------------------------------------------------------------------------------


def flash(*args, **options) -> torch.Tensor:
    """The registered op: only where no lse is asked for may PyTorch's own kernel answer."""
    return flash_attn_func(*args, **options, return_attn_probs=True)[0]


OPS = [
    ("causal", "bias_of_keys", "sinks", "dropout"),
    ("varlen", "alibi", "used_keys"),
    ("mask", "softcap", "window"),
]


@pytest.mark.parametrize("features", OPS, ids="-".join)
def test_the_registered_op_passes_opcheck(features):
    x = leaves(build(Case(features, s=9, t=11)))
    torch.library.opcheck(torch.ops.wikigpt.attention.default, (*arguments(x), "cpu"))


@pytest.mark.parametrize("features", OPS, ids="-".join)
def test_the_registered_backward_passes_opcheck(features):
    x = build(Case(features, s=9, t=11))
    if x.bias is not None:
        x = replace(x, bias=x.bias.bfloat16())  # its gradient is not of q's dtype
    out, lse = attention(x, "cpu")
    args = (out, lse, torch.randn(out.shape), torch.randn(lse.shape), x.bias is not None, *arguments(x), "cpu")
    torch.library.opcheck(torch.ops.wikigpt.attention_backward.default, args)


def test_flash_attn_func_compiles_without_a_break():
    def function(q, k, v):
        out, lse, _ = flash_attn_func(q, k, v, causal=True, softcap=3.0, return_attn_probs=True)
        return out * lse.transpose(1, 2)[..., None]

    inputs = qkv(2, 20, 2, 16)
    assert_all_close(gradients(torch.compile(function, fullgraph=True), *inputs), gradients(function, *inputs))


def test_flash_attn_varlen_func_compiles_without_a_break():
    ends = torch.tensor([0, 4, 20], dtype=torch.int32)

    def function(q, k, v):
        return flash_attn_varlen_func(q, k, v, ends, ends, 16, 16, window_size=(5, 0))

    inputs = qkv(20, 2, 16)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_all_close(gradients(compiled, *inputs), gradients(function, *inputs))


def test_attention_with_dropout_and_the_gradient_of_a_mask_compiles_without_a_break():
    def function(q, k, v, mask):
        torch.manual_seed(11)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.3)

    inputs = (*qkv(2, 2, 20, 16), torch.randn(20, 20, requires_grad=True))

    def compiled(*inputs):
        torch.manual_seed(11)
        call = torch.compile(
            lambda *args: scaled_dot_product_attention(*args, dropout_p=0.3), fullgraph=True, backend="aot_eager"
        )
        return call(*inputs)

    assert_all_close(gradients(compiled, *inputs), gradients(function, *inputs))


def test_an_exported_program_calls_the_op():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return flash(q, k, v, causal=True)

    inputs = tuple(qkv(2, 9, 2, 16, requires_grad=False))
    program = torch.export.export(Attention(), inputs)
    assert "wikigpt.attention" in program.graph_module.code
    torch.testing.assert_close(program.module()(*inputs), flash(*inputs, causal=True))


def test_activation_checkpointing_replays_dropout():
    def function(q, k, v):
        return flash(q, k, v, 0.4, causal=True)

    inputs = qkv(2, 20, 2, 16)
    torch.manual_seed(1)
    expected = gradients(function, *inputs)
    torch.manual_seed(1)
    ours = gradients(lambda *args: checkpoint(function, *args, use_reentrant=False), *inputs)
    assert all(torch.equal(one, other) for one, other in zip(ours, expected))


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch", "reference"])
def test_autocast_decides_the_dtype_of_the_output(backend):
    q, k, v = qkv(1, 2, 9, 16)
    mask = torch.randn(9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        # As where rotary embeddings leave q and k in float32 beside a v in bfloat16.
        out = scaled_dot_product_attention(q, k, v.bfloat16(), attn_mask=mask, backend=backend)
        assert out.dtype == torch.bfloat16
        assert flash_attn_func(q, k, v.bfloat16(), backend=backend).dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, None, None, None), (1, 0, 2, None)])
@pytest.mark.parametrize("bias_shape", [(9, 9), (2, 1, 1, 9)])
def test_vmap_equals_a_loop(in_dims, bias_shape):
    n = 3
    shapes = [(2, 9, 2, 16)] * 3 + [bias_shape]
    rng = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(*(shape if dim is None else (*shape[:dim], n, *shape[dim:])), generator=rng, requires_grad=True)
        for shape, dim in zip(shapes, in_dims)
    ]

    def function(q, k, v, bias):
        return flash(q, k, v, attn_bias=bias, causal=True)

    def loop(*inputs):
        at = ([t if dim is None else t.select(dim, i) for t, dim in zip(inputs, in_dims)] for i in range(n))
        return torch.stack([function(*each) for each in at])

    assert_all_close(gradients(torch.func.vmap(function, in_dims), *inputs), gradients(loop, *inputs))


def test_vmap_maps_masks_slopes_and_shared_sinks():
    q, k, v = qkv(3, 2, 9, 2, 16, requires_grad=False)
    mask, slopes, sinks = torch.rand(3, 9, 9) > 0.3, torch.rand(3, 2), torch.randn(2)

    def function(q, k, v, mask, slopes):
        return flash(q, k, v, attn_mask=mask, alibi_slopes=slopes, s_aux=sinks)

    expected = torch.stack([function(*each) for each in zip(q, k, v, mask, slopes)])
    torch.testing.assert_close(torch.func.vmap(function)(q, k, v, mask, slopes), expected)


def test_a_second_derivative_is_refused():
    q, k, v = qkv(1, 9, 2, 16)
    (dq,) = torch.autograd.grad(flash(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.sum().backward()


def test_a_forward_mode_derivative_is_refused():
    q, k, v = qkv(1, 9, 2, 16, requires_grad=False)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda v: flash(q, k, v), (v,), (v,))


# --- bad input ------------------------------------------------------------------------------------------------------


def dense(**changes) -> Inputs:
    """B 2, S 3, T 5, H 4, G 2, D 8."""
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    return replace(Inputs(q, k, v), **changes)


def packed(**changes) -> Inputs:
    """Sequences of 3 and 4 queries, 2 and 5 keys."""
    x = Inputs(
        torch.randn(7, 4, 8),
        torch.randn(7, 2, 8),
        torch.randn(7, 2, 8),
        cu_seqlens_q=ints(0, 3, 7),
        cu_seqlens_k=ints(0, 2, 7),
        max_seqlen_q=4,
        max_seqlen_k=5,
    )
    return replace(x, **changes)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


rand = torch.randn
WRONG_VALUES = {
    "q of three dimensions": (dense(q=rand(3, 4, 8)), r"q: got 3 dimensions, need 4: \(batch"),
    "k of three dimensions": (dense(k=rand(5, 2, 8)), "k: got 3 dimensions, need 4"),
    "packed q of four dimensions": (packed(q=rand(1, 7, 4, 8)), r"q: got 4 dimensions, need 3: \(tokens"),
    "k on another device": (dense(k=meta(2, 5, 2, 8)), "k: got device meta, q is on cpu"),
    "v on another device": (dense(v=meta(2, 5, 2, 8)), "v: got device meta, q is on cpu"),
    "head_dim above 1024": (dense(q=rand(2, 3, 4, 1025), k=rand(2, 5, 2, 1025)), "q: got head_dim 1025, allowed are 1 to 1024"),
    "no head_dim": (dense(q=rand(2, 3, 4, 0), k=rand(2, 5, 2, 0)), "q: got head_dim 0"),
    "head_dim of v above 1024": (dense(v=rand(2, 5, 2, 1100)), "v: got head_dim 1100"),
    "head_dim of k": (dense(k=rand(2, 5, 2, 16)), "k: got head_dim 16, q has 8"),
    "positions of v": (dense(v=rand(2, 4, 2, 8)), r"v: got shape \(2, 4, 2, 8\), k has \(2, 5, 2, 8\)"),
    "heads of v": (dense(v=rand(2, 5, 1, 8)), "v: got shape"),
    "batch of k": (dense(k=rand(3, 5, 2, 8), v=rand(3, 5, 2, 8)), "k: got batch 3, q has 2"),
    "heads that do not divide": (dense(q=rand(2, 3, 5, 8)), "k: got 2 heads for 5 query heads, they must divide"),
    "no key heads": (dense(k=rand(2, 5, 0, 8), v=rand(2, 5, 0, 8)), "k: got 0 heads for 4"),
    "negative scale": (dense(softmax_scale=-1.0), "softmax_scale: got -1.0, must be finite and 0 or more"),
    "scale NaN": (dense(softmax_scale=torch.nan), "softmax_scale: got nan"),
    "scale infinite": (dense(softmax_scale=torch.inf), "softmax_scale: got inf"),
    "negative softcap": (dense(softcap=-2.0), "softcap: got -2.0, must be finite and 0 or more"),
    "softcap NaN": (dense(softcap=torch.nan), "softcap: got nan"),
    "softcap infinite": (dense(softcap=torch.inf), "softcap: got inf"),
    "dropout of 1": (dense(dropout_p=1.0), "dropout_p: got 1.0, must be at least 0 and below 1"),
    "negative dropout": (dense(dropout_p=-0.1), "dropout_p: got -0.1"),
    "dropout NaN": (dense(dropout_p=torch.nan), "dropout_p: got nan"),
    "slopes of key heads": (dense(alibi_slopes=rand(2)), r"alibi_slopes: got shape \(2,\), need \(4,\) or \(2, 4\)"),
    "slopes of another batch": (dense(alibi_slopes=rand(3, 4)), r"alibi_slopes: got shape \(3, 4\)"),
    "slopes of packed sequences": (packed(alibi_slopes=rand(3, 4)), r"need \(4,\) or \(2, 4\)"),
    "integer slopes": (
        dense(alibi_slopes=ints(1, 2, 3, 4)),
        "alibi_slopes: got torch.int32 on cpu, need floating point",
    ),
    "slopes on another device": (dense(alibi_slopes=meta(4)), "alibi_slopes: got torch.float32 on meta"),
    "slopes that want a gradient": (dense(alibi_slopes=rand(4, requires_grad=True)), "alibi_slopes: requires_grad is set"),
    "sinks per sequence": (dense(s_aux=rand(2, 4)), r"s_aux: got shape \(2, 4\), need \(4,\)"),
    "integer sinks": (dense(s_aux=ints(1, 2, 3, 4)), "s_aux: got torch.int32"),
    "sinks on another device": (dense(s_aux=meta(4)), "s_aux: got torch.float32 on meta"),
    "bias that does not broadcast": (
        dense(bias=rand(2, 5)),
        r"attn_bias: got shape \(2, 5\), must broadcast to \(2, 4, 3",
    ),
    "bias of key heads": (dense(bias=rand(2, 2, 3, 5)), "attn_bias: got shape"),
    "bias of five dimensions": (dense(bias=rand(1, 2, 4, 3, 5)), "attn_bias: got shape"),
    "bias on another device": (dense(bias=meta(3, 5)), "attn_bias: got device meta"),
    "bias of packed sequences": (packed(bias=rand(4, 5)), "attn_bias: does not combine with cu_seqlens"),
    "mask that does not broadcast": (dense(mask=rand(3, 4) > 0), r"attn_mask: got shape \(3, 4\)"),
    "mask on another device": (dense(mask=meta(3, 5, dtype=torch.bool)), "attn_mask: got device meta"),
    "mask of packed sequences": (packed(mask=rand(4, 5) > 0), "attn_mask: does not combine with cu_seqlens"),
    "cu_seqlens_q alone": (packed(cu_seqlens_k=None), "cu_seqlens_q and cu_seqlens_k: got one of them"),
    "cu_seqlens_k alone": (dense(cu_seqlens_k=ints(0, 2, 7)), "cu_seqlens_q and cu_seqlens_k: got one of them"),
    "cu_seqlens of two dimensions": (packed(cu_seqlens_q=ints(0, 3, 7)[None]), r"got shape \(1, 3\), need \(batch \+ 1,\)"),
    "cu_seqlens of no dimension": (packed(cu_seqlens_q=ints(7)[0]), r"cu_seqlens_q: got shape \(\), need \(batch \+ 1,\)"),
    "cu_seqlens of nothing": (packed(cu_seqlens_q=ints()), r"cu_seqlens_q: got shape \(0,\), need \(batch \+ 1,\)"),
    "slopes beside cu_seqlens of nothing": (packed(cu_seqlens_q=ints(7)[0], alibi_slopes=rand(4)), "cu_seqlens_q: got shape"),
    "another number of sequences": (packed(cu_seqlens_k=ints(0, 7)), r"cu_seqlens_k: got shape \(2,\), need \(3,\)"),
    "cu_seqlens on another device": (packed(cu_seqlens_k=meta(3, dtype=torch.int32)), "cu_seqlens_k: got device meta"),
    "cu_seqlens from 1": (
        packed(cu_seqlens_q=ints(1, 3, 7)),
        r"cu_seqlens_q: got \[1, 3, 7\], must rise from 0 to .* 7",
    ),
    "cu_seqlens that falls": (packed(cu_seqlens_q=ints(0, 8, 7)), r"cu_seqlens_q: got \[0, 8, 7\], must rise"),
    "cu_seqlens beyond the tokens": (packed(cu_seqlens_k=ints(0, 2, 8)), r"cu_seqlens_k: got \[0, 2, 8\], must rise"),
    "max_seqlen_q too small": (packed(max_seqlen_q=3), "max_seqlen_q: got 3, cu_seqlens_q has a sequence of 4"),
    "max_seqlen_k too small": (packed(max_seqlen_k=4), "max_seqlen_k: got 4, cu_seqlens_k has a sequence of 5"),
    "negative max_seqlen": (packed(max_seqlen_q=-1), "max_seqlen_q, max_seqlen_k: got -1 and 5, must be 0 or more"),
    "seqused_k of no dimension": (dense(seqused_k=ints(1)[0]), r"seqused_k: got shape \(\), need \(batch,\)"),
    "seqused_k of another batch": (dense(seqused_k=ints(1, 2, 3)), r"seqused_k: got shape \(3,\), need \(2,\)"),
    "seqused_k on another device": (dense(seqused_k=meta(2, dtype=torch.int32)), "seqused_k: got device meta"),
    "seqused_k beyond the keys": (dense(seqused_k=ints(1, 6)), r"seqused_k: got \[1, 6\], must be .* at most \[5, 5\]"),
    "negative seqused_k": (dense(seqused_k=ints(-1, 5)), r"seqused_k: got \[-1, 5\]"),
    "seqused_k beyond its sequence": (packed(seqused_k=ints(3, 5)), r"seqused_k: got \[3, 5\], .* \[2, 5\]"),
}
WRONG_TYPES = {
    "integer q": (dense(q=torch.ones(2, 3, 4, 8, dtype=torch.int64)), "q: got dtype torch.int64, allowed are float16"),
    "q in 8 bits": (dense(q=rand(2, 3, 4, 8).to(torch.float8_e4m3fn)), "q: got dtype torch.float8_e4m3fn"),
    "complex q": (dense(q=rand(2, 3, 4, 8).to(torch.complex64)), "q: got dtype torch.complex64"),
    "k in another dtype": (dense(k=rand(2, 5, 2, 8).half()), "k: got dtype torch.float16, q has torch.float32"),
    "v in another dtype": (dense(v=rand(2, 5, 2, 8).double()), "v: got dtype torch.float64, q has torch.float32"),
    "additive mask as attn_mask": (dense(mask=rand(3, 5)), "attn_mask: got dtype torch.float32, allowed is bool"),
    "boolean bias": (dense(bias=rand(3, 5) > 0), "attn_bias: got dtype torch.bool, allowed are float16"),
    "bias in 8 bits": (dense(bias=rand(3, 5).to(torch.float8_e4m3fn)), "attn_bias: got dtype torch.float8_e4m3fn"),
    "cu_seqlens in int64": (packed(cu_seqlens_q=ints(0, 3, 7).long()), "cu_seqlens_q: got dtype torch.int64, allowed is int32"),
    "seqused_k in int64": (dense(seqused_k=ints(1, 2).long()), "seqused_k: got dtype torch.int64, allowed is int32"),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_is_named(name):
    x, message = WRONG_VALUES[name]
    with pytest.raises(ValueError, match=message):
        check_inputs(x)


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_wrong_dtype_is_named(name):
    x, message = WRONG_TYPES[name]
    with pytest.raises(TypeError, match=message):
        check_inputs(x)


@pytest.mark.parametrize("x", [dense(), packed(), dense(seqused_k=ints(0, 5)), packed(seqused_k=ints(2, 0))])
def test_what_the_bad_inputs_are_made_from_is_accepted(x):
    assert check_inputs(x) is x


@pytest.mark.parametrize("window", [(-2, 0), (0, -3), (1.5, 0), (3,), (1, 2, 3)])
def test_a_wrong_window_is_named(window):
    x = dense()
    with pytest.raises(ValueError, match=r"window_size: got .* need \(left, right\)"):
        flash_attn_func(x.q, x.k, x.v, window_size=window)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flash_attn_qkvpacked_func(rand(2, 3, 2, 4, 8)), r"qkv: got shape \(2, 3, 2, 4, 8\), need \(batch"),
        (lambda: flash_attn_kvpacked_func(rand(2, 3, 4, 8), rand(2, 3, 4, 8)), r"kv: got shape \(2, 3, 4, 8\), need \(batch"),
        (lambda: flash_attn_varlen_qkvpacked_func(rand(7, 2, 4, 8), ints(0, 7), 7), r"qkv: got shape .* need \(tokens"),
        (lambda: flash_attn_func(*qkv(2, 3, 4, 8), 1.0), "dropout_p: got 1.0"),
        (lambda: flash_attn_varlen_func(*qkv(7, 4, 8), ints(0, 8), ints(0, 7), 8, 7), "cu_seqlens_q: got"),
        (lambda: flash_attn_func(rand(2, 3, 4, 0), *rand(2, 2, 5, 2, 0)), "q: got head_dim 0"),
        (lambda: flash_attn_func(rand(3, 4, 8, requires_grad=True), *qkv(2, 3, 4, 8)[1:]), "q: got 3 dimensions"),
        (lambda: scaled_dot_product_attention(*qkv(2, 3, 4, 8), backend="cpu", dropout_p=1.1), "dropout_p: got 1.1"),
    ],
)
def test_the_public_functions_check(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_slopes_that_want_a_gradient_are_accepted_where_none_is_taken():
    with torch.no_grad():
        check_inputs(dense(alibi_slopes=rand(4, requires_grad=True)))


def test_debug_checks_look_at_values_on_every_device(monkeypatch):
    looked: list[Inputs] = []
    monkeypatch.setattr(functional, "check_values", looked.append)
    x = Inputs(meta(7, 4, 8), meta(7, 2, 8), meta(7, 2, 8), cu_seqlens_q=meta(3, dtype=torch.int32))
    x = replace(x, cu_seqlens_k=x.cu_seqlens_q)
    check_inputs(x)
    assert looked == []
    with contextlib.suppress(KeyError), debug_checks():
        check_inputs(x)
        raise KeyError
    assert looked == [x]
    check_inputs(x)
    assert looked == [x]
