"""Attention, forward and backward, and decoding from a cache: ours against PyTorch's attention, FlexAttention and flash-attn.

    pytest bench/bench_attention.py [--sizes smoke|default|full] [--device cpu|cuda]

16k tokens in all, 2,048 wide, head_dim 64 and 128, bf16 (on a CPU smaller, float32). TFLOP/s by FlashAttention's formula:
4 S^2 D per head, half of it when causal, 2.5 times as much for the backward. Decoding counts the bytes of keys and values,
each read once. Every result is compared with float64 before it is timed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from wikigpt.kernels import flash_attn_func, flash_attn_with_kvcache
from wikigpt.kernels.attention.op import attention
from wikigpt.kernels.attention.reference import Inputs, attention_reference

from .suite import Function, Measure, Peer, Problem, assert_right, dtype_of, plain, rows


class Case(NamedTuple):
    direction: str
    tokens: int
    width: int
    head_dim: int
    causal: bool
    s: int


def cases(device: str, sizes: str) -> list[Case]:
    tokens, width, dims, lengths = {
        ("cuda", "smoke"): (2048, 512, (64,), (512,)),
        ("cuda", "check"): (16384, 2048, (64, 128), (512, 2048, 8192)),
        ("cuda", "default"): (16384, 2048, (64, 128), (512, 2048, 8192, 16384)),
        ("cuda", "full"): (16384, 2048, (64, 128), (512, 1024, 2048, 4096, 8192, 16384)),
        ("cpu", "smoke"): (256, 64, (32,), (128,)),
        ("cpu", "default"): (2048, 256, (64,), (128, 256, 512, 1024, 2048)),
        ("cpu", "full"): (4096, 512, (64, 128), (128, 256, 512, 1024, 2048, 4096)),
    }[device, sizes]
    return [
        Case(direction, tokens, width, dim, causal, s)
        for direction in ("forward", "forward and backward")
        for dim in dims
        for causal in ((True,) if sizes == "check" else (True, False))
        for s in lengths
    ]


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return flash_attn_func(q, k, v, causal=causal)


def blocked(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    inputs = Inputs(q, k, v, softmax_scale=q.shape[-1] ** -0.5, window_right=0 if causal else -1)
    return attention(inputs, "cpu")[0]


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return attention_reference(Inputs(q, k, v, softmax_scale=q.shape[-1] ** -0.5, window_right=0 if causal else -1))[0]


def sdpa(backend: SDPBackend) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return run


@functools.cache
def _flex(causal: bool, s: int) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, s, s) if causal else None
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return _flex(causal, q.shape[1])(q, k, v)


def flash_attn(module: str) -> Peer:
    """FlashAttention 2 (flash_attn) or 3 (flash_attn_interface)."""

    def make() -> Function:
        function = importlib.import_module(module).flash_attn_func

        def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            result = function(q, k, v, causal=causal)
            return result[0] if isinstance(result, tuple) else result

        return run

    return Peer(make, "cuda", module)


PEERS = {
    "ours": plain(flash),
    "ours, blocked": plain(blocked, device="cpu"),
    "reference": plain(reference),
    "SDPA flash": plain(sdpa(SDPBackend.FLASH_ATTENTION)),
    "SDPA cuDNN": plain(sdpa(SDPBackend.CUDNN_ATTENTION), device="cuda"),
    "SDPA efficient": plain(sdpa(SDPBackend.EFFICIENT_ATTENTION), device="cuda"),
    "SDPA math": plain(sdpa(SDPBackend.MATH), device="cpu"),
    "FlexAttention": plain(flex, device="cuda"),
    "flash-attn 2": flash_attn("flash_attn"),
    "flash-attn 3": flash_attn("flash_attn_interface"),
}


def peers(case: Case, device: str, sizes: str) -> dict[str, Peer]:
    found = dict(PEERS)
    if sizes == "check":
        return {name: peer for name, peer in found.items() if name not in ("reference", "SDPA efficient", "FlexAttention")}
    if device == "cuda" and sizes != "full" and (not case.causal or case.s not in (2048, 16384)):
        del found["FlexAttention"]  # each length compiles it anew, a quarter of a minute
    if device == "cuda" and case.s > 2048:
        del found["reference"]  # the scores of 16k tokens in bf16 are 8 GB a copy
    return found


def problem(case: Case, device: str) -> Problem:
    backward = case.direction != "forward"
    dtype = dtype_of(device)
    rng = torch.Generator(device).manual_seed(case.s + case.head_dim)
    shape = (case.tokens // case.s, case.s, case.width // case.head_dim, case.head_dim)
    q, k, v, grad = (torch.randn(shape, generator=rng, device=device, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]

    def run(function: Function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        """Output and gradients of the last head of the last sequence."""
        out = function(*inputs, case.causal)
        grads = torch.autograd.grad(out, inputs, grad) if backward else ()
        return [x[-1:, :, -1:].detach() for x in (out, *grads)]

    def one_head(dtype: torch.dtype) -> list[Tensor]:
        inputs = [x[-1:, :, -1:].detach().to(dtype).requires_grad_(backward) for x in (q, k, v)]
        return run(reference, inputs, grad[-1:, :, -1:].to(dtype))

    @functools.cache
    def expected() -> tuple[list[Tensor], list[Tensor]]:
        return one_head(dtype), one_head(torch.float64)

    def check(name: str, function: Function) -> None:
        assert_right(name, run(function, leaves, grad), *expected(), absolute=torch.finfo(dtype).eps / 4)

    def call(name: str, function: Function) -> Callable[[], Any]:
        def step() -> None:
            out = function(*leaves, case.causal)
            if backward:
                torch.autograd.grad(out, leaves, grad)

        return step

    return Problem(
        op=f"attention {case.direction}, head_dim {case.head_dim}, {'causal' if case.causal else 'full'}",
        shape=f"S {case.s}",
        call=call,
        check=check,
        flops=4 * case.tokens * case.s * case.width * (0.5 if case.causal else 1) * (3.5 if backward else 1),
        dtype=dtype,
        axes=case._asdict(),
    )


@rows(cases, peers)
def test_attention(measure: Measure, case: Case, name: str) -> None:
    measure(problem, case, name)


# --- decoding -------------------------------------------------------------------------------------------------------


class Decode(NamedTuple):
    batch: int
    context: int
    heads: int
    key_heads: int


def decode_cases(device: str, sizes: str) -> list[Decode]:
    contexts, heads, key_heads = {
        ("cuda", "smoke"): ([(2, 1024)], 8, 2),
        ("cuda", "check"): ([(1, 131072), (16, 8192), (64, 8192)], 32, 8),
        ("cuda", "default"): ([(1, 131072), (4, 32768), (16, 8192), (64, 8192)], 32, 8),
        ("cuda", "full"): ([(b, n) for b in (1, 4, 16, 64) for n in (8192, 32768, 131072) if b * n <= 2**21], 32, 8),
        ("cpu", "smoke"): ([(2, 64)], 4, 2),
        ("cpu", "default"): ([(1, 4096), (8, 512)], 8, 2),
        ("cpu", "full"): ([(1, 16384), (8, 4096)], 8, 2),
    }[device, sizes]
    return [Decode(batch, context, heads, key_heads) for batch, context in contexts]


def decode_problem(case: Decode, device: str) -> Problem:
    dim, page = 128, min(256, case.context)
    dtype = dtype_of(device)
    rng = torch.Generator(device).manual_seed(case.context)
    shape = (case.batch, case.context, case.key_heads, dim)
    k, v = (torch.randn(shape, generator=rng, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(case.batch, 1, case.heads, dim, generator=rng, device=device, dtype=dtype)
    used = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
    table = torch.arange(case.batch * case.context // page, dtype=torch.int32, device=device).view(case.batch, -1)
    k_pages, v_pages = (x.view(-1, page, case.key_heads, dim) for x in (k, v))
    k_heads, v_heads = (x.transpose(1, 2).contiguous() for x in (k, v))
    functions: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=used),
        "ours, paged": lambda: flash_attn_with_kvcache(q, k_pages, v_pages, cache_seqlens=used, block_table=table),
        "SDPA": lambda: F.scaled_dot_product_attention(q.transpose(1, 2), k_heads, v_heads, enable_gqa=True).transpose(1, 2),
    }
    if "flash_attn_with_kvcache" in dir(_flash_attn_module()):
        theirs = _flash_attn_module().flash_attn_with_kvcache
        functions["flash-attn 2"] = lambda: theirs(q, k, v, cache_seqlens=used)

    def last(dtype: torch.dtype) -> list[Tensor]:
        return [attention_reference(Inputs(*(x[-1:].to(dtype) for x in (q, k, v)), softmax_scale=dim**-0.5))[0]]

    def check(name: str, _: Function) -> None:
        got = functions[name]()[-1:]
        assert_right(name, [got], last(dtype), last(torch.float64), absolute=torch.finfo(dtype).eps / 4)

    return Problem(
        op="decoding",
        shape=f"batch {case.batch}, context {case.context}",
        call=lambda name, _: functions[name],
        check=check,
        bytes=2 * k.numel() * k.element_size(),
        dtype=dtype,
        axes=case._asdict(),
    )


def _flash_attn_module() -> Any:
    try:
        return importlib.import_module("flash_attn")
    except ImportError:
        return None


DECODE_PEERS = {
    "ours": plain(flash_attn_with_kvcache),
    "ours, paged": plain(flash_attn_with_kvcache),
    "SDPA": plain(F.scaled_dot_product_attention),
    "flash-attn 2": Peer(_flash_attn_module, "cuda", "flash_attn"),
}


@rows(decode_cases, lambda case, device, sizes: DECODE_PEERS)
def test_decode(measure: Measure, case: Decode, name: str) -> None:
    measure(decode_problem, case, name)
