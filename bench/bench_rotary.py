"""Rotary embedding of q and k, forward and backward: ours against the reference, torch.compile and Liger.

    pytest bench/bench_rotary.py [--sizes smoke|default|full] [--device cpu|cuda]

q and k are views (batch, positions, heads, head_dim).transpose(1, 2), bf16 (on a CPU float32), angles float32. GB/s counts q
and k once in and once out in each direction; the angles, shared by all heads, are left out. "of copy" is the fraction of a
large copy's bandwidth in the same run. Every result is compared with float64 before it is timed.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from wikigpt.kernels import apply_rotary_emb, apply_rotary_emb_qk, rotary_cos_sin
from wikigpt.kernels.rotary import apply_rotary_emb_reference

from tests.conftest import assert_as_accurate_as

from .bench_attention import copy_bandwidth
from .conftest import Summary
from .timing import peak_bytes, replay, take_turns

Function = Callable[..., tuple[Tensor, Tensor]]

# device, sizes -> (batch, positions, heads, key heads, head_dim)
SHAPES = {
    ("cuda", "smoke"): [(2, 256, 8, 2, 64)],
    ("cuda", "default"): [(8, 2048, 32, 8, 128), (8, 2048, 16, 16, 64), (64, 1, 32, 8, 128)],
    ("cuda", "full"): [
        (b, s, 32, g, d) for b, s in ((1, 2048), (8, 2048), (2, 32768), (64, 1)) for g in (8, 32) for d in (64, 128)
    ],
    ("cpu", "smoke"): [(1, 64, 4, 2, 32)],
    ("cpu", "default"): [(4, 512, 8, 8, 64), (1, 1, 8, 8, 64)],
    ("cpu", "full"): [(4, 512, 8, 8, 64), (2, 2048, 16, 4, 128), (1, 1, 8, 8, 64)],
}
ROUNDS = {"smoke": 3, "default": 15, "full": 25}


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    q, k = (apply_rotary_emb_reference(x, cos, sin, interleaved=interleaved) for x in (q, k))
    return q, k


def one_by_one(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    q, k = (apply_rotary_emb(x, cos, sin, interleaved=interleaved) for x in (q, k))
    return q, k


def in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return apply_rotary_emb_qk(q, k, cos, sin, interleaved=interleaved, inplace=True)


def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return apply_rotary_emb_qk(q, k, cos, sin, interleaved=interleaved)


def implementations(interleaved: bool, backward: bool, sizes: str) -> dict[str, Function]:
    rows: dict[str, Function] = {
        "ours": ours,
        "ours, one by one": one_by_one,
        "reference": plain,
    }
    if sizes != "smoke":  # a compiler's minute
        rows["torch.compile"] = torch.compile(plain, dynamic=False)
    if not backward:  # of a leaf there is no gradient in place
        rows["ours, in place"] = in_place
    if importlib.util.find_spec("liger_kernel") is not None and not interleaved:
        from liger_kernel.ops.rope import LigerRopeFunction

        def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
            return LigerRopeFunction.apply(q, k, *(torch.cat((x, x), dim=-1)[None] for x in (cos, sin)))

        rows["liger"] = liger
    return rows


def run(
    function: Function, q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor], grads: list[Tensor] | None, interleaved: bool
) -> list[Tensor]:
    turned = function(q, k, *angles, interleaved)
    return list(turned) if grads is None else list(torch.autograd.grad(turned, (q, k), grads))


def check(
    function: Function, q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor], grads: list[Tensor] | None, interleaved: bool
) -> None:
    def one(function: Function, dtype: torch.dtype, table: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype, copy=True).requires_grad_(grads is not None) for x in (q, k)]
        wide = None if grads is None else [grad.to(dtype) for grad in grads]
        return run(function, leaves[0], leaves[1], (angles[0].to(table), angles[1].to(table)), wide, interleaved)

    dtypes = q.dtype, angles[0].dtype
    truths, plains = one(plain, torch.float64, torch.float64), one(plain, *dtypes)
    for got, simple, truth in zip(one(function, *dtypes), plains, truths):
        assert_as_accurate_as(got, simple, truth)


@functools.cache
def measure(
    device: str, sizes: str, shape: tuple[int, ...], interleaved: bool, backward: bool
) -> dict[str, tuple[list[float], int]]:
    batch, length, heads, groups, dim = shape
    rng = torch.Generator(device).manual_seed(length)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def random(n: int) -> Tensor:
        return torch.randn(batch, length, n, dim, generator=rng, device=device, dtype=dtype).transpose(1, 2)

    q, k = (random(n).requires_grad_(backward) for n in (heads, groups))
    grads = [random(n) for n in (heads, groups)] if backward else None
    angles = rotary_cos_sin(torch.arange(length, device=device), dim)
    calls: dict[str, Callable[[], Any]] = {}
    for name, function in implementations(interleaved, backward, sizes).items():
        check(function, q, k, angles, grads, interleaved)
        calls[name] = functools.partial(run, function, q, k, angles, grads, interleaved)
    seconds = take_turns(calls, device, ROUNDS[sizes])
    return {name: (seconds[name], peak_bytes(call, device)) for name, call in calls.items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = metafunc.config.getoption("--sizes")
    device = metafunc.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    cells = [(s, i, b) for b in (False, True) for i in (False, True) for s in SHAPES[device, sizes]]
    metafunc.parametrize(
        ("shape", "interleaved", "backward", "name"),
        [(*cell, name) for cell in cells for name in implementations(cell[1], cell[2], sizes)],
    )


def test_rotary(
    benchmark: Any,
    summary: Summary,
    sizes: str,
    device: str,
    shape: tuple[int, ...],
    interleaved: bool,
    backward: bool,
    name: str,
) -> None:
    seconds, peak = measure(device, sizes, shape, interleaved, backward)[name]
    batch, length, heads, groups, dim = shape
    direction = "forward and backward" if backward else "forward"
    group = (
        f"rotary {direction}, {'pairs' if interleaved else 'halves'}, "
        f"batch {batch}, S {length}, {heads} + {groups} heads of {dim}"
    )
    replay(benchmark, group, name, seconds)
    size = 2 * batch * length * (heads + groups) * dim * (2 if device == "cuda" else 4) * (2 if backward else 1)
    rate = size / statistics.median(seconds)
    of_copy = rate / copy_bandwidth(device)
    benchmark.extra_info.update(device=device, bytes_per_second=rate, of_copy=of_copy, peak_bytes=peak)
    columns = {"GB/s": f"{rate / 1e9:,.1f}", "of copy": f"{of_copy:.0%}", "peak MiB": f"{peak / 2**20:,.0f}"}
    summary.add(f"{group}, on {device}", name, seconds, **columns)
