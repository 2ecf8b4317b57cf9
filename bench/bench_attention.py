"""Attention, forward and backward, and decoding from a cache: ours against PyTorch's attention, FlexAttention and flash-attn.

    pytest bench/bench_attention.py [--sizes smoke|default|full] [--device cpu|cuda]

16k tokens in all, 2,048 wide, head_dim 64 and 128, bf16 (on a CPU smaller, float32). TFLOP/s by FlashAttention's formula:
4 S^2 D per head, half of it when causal, 2.5 times as much for the backward. "of matmul" is the fraction of what a product of
square matrices reaches on the same machine in the same run; "of copy" that of a copy's bandwidth. Every result is compared
with float64 before it is timed.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from wikigpt.kernels import flash_attn_func, flash_attn_with_kvcache
from wikigpt.kernels.attention.op import attention
from wikigpt.kernels.attention.reference import Inputs, attention_reference

from tests.conftest import assert_as_accurate_as

from .conftest import Summary
from .timing import peak_bytes, replay, take_turns

Function = Callable[..., Tensor]

# device, sizes -> (tokens, width, head_dims, lengths)
SHAPES = {
    ("cuda", "smoke"): (2048, 512, (64,), (512,)),
    ("cuda", "default"): (16384, 2048, (64, 128), (512, 2048, 8192, 16384)),
    ("cuda", "full"): (16384, 2048, (64, 128), (512, 1024, 2048, 4096, 8192, 16384)),
    ("cpu", "smoke"): (256, 64, (32,), (128,)),
    ("cpu", "default"): (2048, 256, (64,), (512, 2048)),
    ("cpu", "full"): (4096, 512, (64,), (512, 1024, 2048, 4096)),
}
# device, sizes -> [(batch, context)], heads, key heads
DECODE = {
    ("cuda", "smoke"): ([(2, 1024)], 8, 2),
    ("cuda", "default"): ([(1, 131072), (4, 32768), (16, 8192), (64, 8192)], 32, 8),
    ("cuda", "full"): ([(b, n) for b in (1, 4, 16, 64) for n in (8192, 32768, 131072) if b * n <= 2**21], 32, 8),
    ("cpu", "smoke"): ([(2, 64)], 4, 2),
    ("cpu", "default"): ([(1, 4096), (8, 512)], 8, 2),
    ("cpu", "full"): ([(1, 16384), (8, 4096)], 8, 2),
}
ROUNDS = {"smoke": 3, "default": 15, "full": 25}
COMPILED_LENGTHS = (2048, 16384)  # each length compiles FlexAttention anew, a quarter of a minute


def sdpa(backend: SDPBackend) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return run


@functools.cache
def flex(causal: bool, s: int) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, s, s) if causal else None
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def implementations(device: str, s: int) -> dict[str, Function]:
    """Each of (q, k, v, causal), (B, S, H, D)."""
    both: dict[str, Function] = {"ours": lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)}
    if device == "cpu":
        return {
            **both,
            "ours, blocked": lambda q, k, v, causal: attention(
                Inputs(q, k, v, softmax_scale=q.shape[-1] ** -0.5, window_right=0 if causal else -1), "cpu"
            )[0],
            "SDPA": sdpa(SDPBackend.FLASH_ATTENTION),
            "SDPA math": sdpa(SDPBackend.MATH),
        }
    peers = {
        "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    }
    if s in COMPILED_LENGTHS:
        peers["FlexAttention"] = lambda q, k, v, causal: flex(causal, s)(q, k, v)
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_func as theirs

        peers["flash-attn"] = lambda q, k, v, causal: theirs(q, k, v, causal=causal)
    return both | peers


def check(name: str, function: Function, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool) -> None:
    """Output and gradients of one head by the numeric rule."""

    def run(function: Function, dtype: torch.dtype, heads: int) -> list[Tensor]:
        leaves = [x.detach()[:1, :, :heads].to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, causal)
        grads = torch.autograd.grad(out, leaves, grad[:1, :, :heads].to(dtype))
        return [x[:, :, :1] for x in (out.detach(), *grads)]

    def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return attention_reference(Inputs(q, k, v, softmax_scale=q.shape[-1] ** -0.5, window_right=0 if causal else -1))[0]

    truth, plain = run(reference, torch.float64, 1), run(reference, q.dtype, 1)
    ours = run(function, q.dtype, q.shape[2])
    for got, simple, true in zip(ours, plain, truth):
        if name.startswith("ours"):
            assert_as_accurate_as(got, simple, true, absolute=torch.finfo(q.dtype).eps / 4)
        else:  # a peer's accuracy is not ours to judge, but it has to compute the same
            torch.testing.assert_close(got.double(), true, rtol=5e-2, atol=5e-2)


@functools.cache
def matmul_flops(device: str, dtype: torch.dtype) -> float:
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / statistics.median(take_turns({"matmul": lambda: a @ a}, device, 9)["matmul"])


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second."""
    a = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / statistics.median(take_turns({"copy": lambda: b.copy_(a)}, device, 9)["copy"])


@functools.cache
def measure(
    device: str, sizes: str, s: int, dim: int, causal: bool, backward: bool
) -> dict[str, tuple[list[float], int] | str]:
    """Implementation -> (seconds of each round, peak bytes), or why it cannot."""
    tokens, width, _, _ = SHAPES[device, sizes]
    rng = torch.Generator(device).manual_seed(s + dim)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (tokens // s, s, width // dim, dim)
    q, k, v, grad = (torch.randn(shape, generator=rng, device=device, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]
    calls: dict[str, Callable[[], Any]] = {}
    reasons: dict[str, str] = {}
    for name, function in implementations(device, s).items():
        try:
            check(name, function, q, k, v, grad, causal)
        except (RuntimeError, NotImplementedError) as error:
            reasons[name] = str(error).splitlines()[0]
            continue

        def call(function: Function = function) -> None:
            out = function(*leaves, causal)
            if backward:
                torch.autograd.grad(out, leaves, grad)

        calls[name] = call
    seconds = take_turns(calls, device, ROUNDS[sizes])
    return {**{name: (seconds[name], peak_bytes(call, device)) for name, call in calls.items()}, **reasons}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = metafunc.config.getoption("--sizes")
    device = metafunc.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if metafunc.function is test_attention:
        _, _, dims, lengths = SHAPES[device, sizes]
        cells = [(s, d, c, b) for b in (False, True) for d in dims for c in (True, False) for s in lengths]
        metafunc.parametrize(
            ("s", "dim", "causal", "backward", "name"), [(*cell, n) for cell in cells for n in implementations(device, cell[0])]
        )
    else:
        contexts, _, _ = DECODE[device, sizes]
        names = ("ours", "ours, paged", "SDPA")
        metafunc.parametrize(("batch", "context", "name"), [(*cell, name) for cell in contexts for name in names])


def test_attention(
    benchmark: Any, summary: Summary, sizes: str, device: str, s: int, dim: int, causal: bool, backward: bool, name: str
) -> None:
    measured = measure(device, sizes, s, dim, causal, backward)[name]
    if isinstance(measured, str):
        pytest.skip(f"{name} does not compute this: {measured}")
    seconds, peak = measured
    direction = "forward and backward" if backward else "forward"
    group = f"attention {direction}, S {s}, head_dim {dim}, {'causal' if causal else 'full'}"
    replay(benchmark, group, name, seconds)
    tokens, width, _, _ = SHAPES[device, sizes]
    flops = 4 * tokens * s * width * (0.5 if causal else 1) * (3.5 if backward else 1)
    rate = flops / statistics.median(seconds)
    of_matmul = rate / matmul_flops(device, torch.bfloat16 if device == "cuda" else torch.float32)
    benchmark.extra_info.update(device=device, flops_per_second=rate, of_matmul=of_matmul, peak_bytes=peak)
    columns = {"TFLOP/s": f"{rate / 1e12:.4g}", "of matmul": f"{of_matmul:.0%}", "peak MiB": f"{peak / 2**20:,.0f}"}
    summary.add(f"{group}, on {device}", name, seconds, **columns)


@functools.cache
def measure_decode(device: str, sizes: str, batch: int, context: int) -> dict[str, list[float]]:
    _, heads, groups = DECODE[device, sizes]
    dim, page = 128, 256
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    page = min(page, context)
    rng = torch.Generator(device).manual_seed(context)
    k, v = (torch.randn(batch, context, groups, dim, generator=rng, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(batch, 1, heads, dim, generator=rng, device=device, dtype=dtype)
    used = torch.full((batch,), context, dtype=torch.int32, device=device)
    table = torch.arange(batch * context // page, dtype=torch.int32, device=device).view(batch, -1)
    k_pages, v_pages = (x.view(-1, page, groups, dim) for x in (k, v))
    k_heads, v_heads = (x.transpose(1, 2).contiguous() for x in (k, v))
    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=used),
        "ours, paged": lambda: flash_attn_with_kvcache(q, k_pages, v_pages, cache_seqlens=used, block_table=table),
        "SDPA": lambda: F.scaled_dot_product_attention(q.transpose(1, 2), k_heads, v_heads, enable_gqa=True).transpose(1, 2),
    }
    with torch.no_grad():
        one = [x[:1].double() for x in (q, k, v)]
        truth = attention_reference(Inputs(*one, softmax_scale=dim**-0.5))[0]
        plain = attention_reference(Inputs(*(x[:1] for x in (q, k, v)), softmax_scale=dim**-0.5))[0]
        for name, call in calls.items():
            if name.startswith("ours"):
                assert_as_accurate_as(call()[:1], plain, truth, absolute=torch.finfo(dtype).eps / 4)
        return take_turns(calls, device, ROUNDS[sizes])


def test_decode(benchmark: Any, summary: Summary, sizes: str, device: str, batch: int, context: int, name: str) -> None:
    seconds = measure_decode(device, sizes, batch, context)[name]
    group = f"decoding, batch {batch}, context {context}"
    replay(benchmark, group, name, seconds)
    _, _, groups = DECODE[device, sizes]
    size = 2 * batch * context * groups * 128 * (2 if device == "cuda" else 4)
    rate = size / statistics.median(seconds)
    of_copy = rate / copy_bandwidth(device)
    benchmark.extra_info.update(device=device, bytes_per_second=rate, of_copy=of_copy)
    summary.add(f"{group}, on {device}", name, seconds, **{"GB/s": f"{rate / 1e9:,.1f}", "of copy": f"{of_copy:.0%}"})
