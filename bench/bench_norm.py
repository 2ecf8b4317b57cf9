"""LayerNorm and RMSNorm, forward and backward, plain and with a residual: ours against PyTorch's, torch.compile, Liger, quack.

    pytest bench/bench_norm.py [--sizes smoke|default|full] [--device cpu|cuda]

bf16 on a GPU, float32 on a CPU; the weight has x's dtype. GB/s counts the least that must move: each input read once and each
output written once (`least_bytes`); "of copy" is the fraction of what copying 1 GiB reaches on the same machine in the same
run. "backward" times the backward alone, on a graph that is kept. Every result is compared with float64 before it is timed.
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
from torch._functorch import config as functorch_config
from wikigpt.kernels import layer_norm, rms_norm

from tests.conftest import assert_as_accurate_as

from .bench_attention import copy_bandwidth
from .conftest import Summary
from .timing import peak_bytes, replay, take_turns

Function = Callable[..., Any]

WIDTHS = (64, 128, 512, 768, 1024, 2048, 4096, 5120, 8192, 16384, 32768, 65536)
LARGE = [(65536, 512), (16384, 2048), (8192, 4096), (8192, 8192), (4096, 16384), (2048, 32768), (1024, 65536)]
# device, sizes -> (rows, columns). LARGE: 64 MB and more in bf16, where the copy's bandwidth is the goal.
SHAPES = {
    ("cuda", "smoke"): [(256, 512)],
    ("cuda", "default"): [*LARGE, (65536, 64), (512, 1024), (1, 4096)],
    ("cuda", "full"): [(m, n) for n in WIDTHS for m in (1, 32, 1024, 8192, 65536) if m * n <= 2**29],
    ("cpu", "smoke"): [(64, 128)],
    ("cpu", "default"): [(2048, 192), (2048, 768), (512, 4096)],
    ("cpu", "full"): [(m, n) for n in (64, 192, 768, 4096) for m in (1, 64, 2048)],
}
ROUNDS = {"smoke": 3, "default": 15, "full": 25}


def plain(op: str) -> Function:
    """The op in PyTorch's own functions, as a model without ours is written."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Any:
        h = x if residual is None else x + residual
        n = h.shape[-1:]
        y = F.layer_norm(h, n, weight, bias, 1e-5) if op == "layer_norm" else F.rms_norm(h, n, weight, 1e-5)
        return y if residual is None else (y, h)

    return run


def ours(op: str, backend: str | None) -> Function:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Any:
        prenorm = residual is not None
        if op == "layer_norm":
            return layer_norm(x, weight, bias, 1e-5, residual, prenorm=prenorm, backend=backend)
        return rms_norm(x, weight, 1e-5, residual, prenorm=prenorm, backend=backend)

    return run


def liger(op: str) -> Function:
    from liger_kernel.ops import fused_add_rms_norm, layer_norm, rms_norm

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Any:
        if op == "layer_norm":
            if residual is not None:
                raise NotImplementedError("no residual")
            return layer_norm.LigerLayerNormFunction.apply(x, weight, bias, 1e-5)
        if residual is not None:
            return fused_add_rms_norm.LigerFusedAddRMSNormFunction.apply(x, residual, weight, 1e-5, 0.0, "llama", False)
        return rms_norm.LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False)

    return run


def quack(op: str) -> Function:
    from quack import rmsnorm

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Any:
        if op == "layer_norm":
            raise NotImplementedError("no backward of layer norm")
        return rmsnorm(x, weight, residual=residual, eps=1e-5, prenorm=residual is not None)

    return run


@functools.cache
def implementations(device: str, op: str) -> dict[str, Function]:
    """Each of (x, weight, bias, residual), giving y, or (y, h) with a residual."""
    found = {"ours": ours(op, None), "reference": ours(op, "reference"), "torch": plain(op)}
    if device == "cuda":
        found["torch.compile"] = torch.compile(plain(op), dynamic=False)
        for name, make in (("liger", liger), ("quack", quack)):
            if importlib.util.find_spec("liger_kernel" if name == "liger" else name) is not None:
                found[name] = make(op)
    return found


def least_bytes(op: str, m: int, n: int, size: int, residual: bool, backward: bool) -> int:
    """x and y, with a residual also that and h; backward dy, h and dx, with a residual also dh. Weights, statistics and partial
    sums are left out: they are the implementation's to keep small."""
    tensors = (3 if backward else 2) + ((1 if backward else 2) if residual else 0)
    return tensors * m * n * size


def tuple_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check(name: str, function: Function, op: str, leaves: list[Tensor | None], grads: list[Tensor]) -> None:
    """Outputs and gradients by the numeric rule, on the first rows."""

    def run(function: Function, dtype: torch.dtype) -> list[Tensor]:
        some = [None if t is None else (t[:64] if t.dim() == 2 else t).detach().to(dtype).requires_grad_() for t in leaves]
        results = tuple_of(function(*some))
        inputs = [t for t in some if t is not None]
        return [*(r.detach() for r in results), *torch.autograd.grad(results, inputs, [g[:64].to(dtype) for g in grads])]

    dtype = grads[0].dtype
    truth, simple, got = run(ours(op, "reference"), torch.float64), run(ours(op, "reference"), dtype), run(function, dtype)
    for a, b, true in zip(got, simple, truth):
        if name == "ours":
            assert_as_accurate_as(a, b, true, absolute=torch.finfo(dtype).eps / 4 * float(true.abs().max()) + 2e-7)
        else:  # a peer's accuracy is not ours to judge, but it has to compute the same
            torch.testing.assert_close(a.double(), true, rtol=5e-2, atol=5e-2 * float(true.abs().max()))


@functools.cache
@functorch_config.patch(donated_buffer=False)  # a compiled backward may then run again on a graph that is kept
def measure(device: str, sizes: str, op: str, m: int, n: int, residual: bool) -> dict[str, Any]:
    """Implementation -> {False: forward, True: backward} of (seconds of each round, peak bytes), or why it cannot."""
    rng = torch.Generator(device).manual_seed(m + n)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device, dtype=dtype)

    bias = draw(n) if op == "layer_norm" else None
    leaves = [draw(m, n), draw(n), bias, draw(m, n) if residual else None]
    grads = [draw(m, n) for _ in range(2 if residual else 1)]
    inputs = [t.requires_grad_() for t in leaves if t is not None]
    calls: dict[bool, dict[str, Callable[[], Any]]] = {False: {}, True: {}}
    reasons: dict[str, Any] = {}
    for name, function in implementations(device, op).items():
        try:
            check(name, function, op, leaves, grads)
        except (RuntimeError, NotImplementedError) as error:
            reasons[name] = str(error).splitlines()[0]
            continue
        results = tuple_of(function(*leaves))
        calls[False][name] = functools.partial(function, *leaves)
        calls[True][name] = functools.partial(torch.autograd.grad, results, inputs, grads, retain_graph=True)
    found: dict[str, Any] = {name: {} for name in calls[False]} | reasons
    for backward, functions in calls.items():
        seconds = take_turns(functions, device, ROUNDS[sizes])
        for name, call in functions.items():
            found[name][backward] = (seconds[name], peak_bytes(call, device))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = metafunc.config.getoption("--sizes")
    device = metafunc.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    cells = [
        (op, m, n, residual, backward, name)
        for op in ("layer_norm", "rms_norm")
        for residual in (False, True)
        for m, n in SHAPES[device, sizes]
        for backward in (False, True)
        for name in implementations(device, op)
    ]
    metafunc.parametrize(("op", "m", "n", "residual", "backward", "name"), cells)


def test_norm(
    benchmark: Any,
    summary: Summary,
    sizes: str,
    device: str,
    op: str,
    m: int,
    n: int,
    residual: bool,
    backward: bool,
    name: str,
) -> None:
    measured = measure(device, sizes, op, m, n, residual)[name]
    if isinstance(measured, str):
        pytest.skip(f"{name} does not compute this: {measured}")
    seconds, peak = measured[backward]
    direction = "backward" if backward else "forward"
    group = f"{op}{' with residual' if residual else ''}, {direction}, {m:,} x {n:,}"
    replay(benchmark, group, name, seconds)
    size = 2 if device == "cuda" else 4
    rate = least_bytes(op, m, n, size, residual, backward) / statistics.median(seconds)
    of_copy = rate / copy_bandwidth(device)
    benchmark.extra_info.update(device=device, bytes_per_second=rate, of_copy=of_copy, peak_bytes=peak)
    columns = {"GB/s": f"{rate / 1e9:,.1f}", "of copy": f"{of_copy:.0%}", "peak MiB": f"{peak / 2**20:,.0f}"}
    summary.add(f"{group}, on {device}", name, seconds, **columns)
