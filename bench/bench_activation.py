"""bias_gelu, swiglu and geglu, forward and with backward: ours, the reference, PyTorch's operators, torch.compile, Liger.

    pytest bench/bench_activation.py [--sizes smoke|default|full] [--device cpu|cuda]

bf16 (on a CPU float32), random normal data, gradients of inputs and biases. GB/s counts what the formula must move: each input
read once, each result written once, forward 2 or 3 tensors of (rows, features), backward 3 or 5; "of copy" is the fraction of a
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
import torch.nn.functional as F
from torch import Tensor
from wikigpt.kernels import bias_gelu, geglu, swiglu

from tests.conftest import assert_as_accurate_as

from .bench_attention import copy_bandwidth
from .conftest import Summary
from .timing import peak_bytes, replay, take_turns

Function = Callable[..., Tensor]

# device, sizes -> (rows, features). MLPs of GPT-2 and of Llama 7B.
SHAPES = {
    ("cuda", "smoke"): [(1024, 3072)],
    ("cuda", "default"): [(8192, 3072), (8192, 11008), (32768, 11008)],
    ("cuda", "full"): [(n, f) for n in (64, 1024, 8192, 32768) for f in (1000, 3072, 11008, 14336)],
    ("cpu", "smoke"): [(64, 256)],
    ("cpu", "default"): [(2048, 512), (2048, 2048)],
    ("cpu", "full"): [(n, f) for n in (64, 2048, 8192) for f in (512, 1000, 2048)],
}
ROUNDS = {"smoke": 3, "default": 15, "full": 25}


def _plain_bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def _plain_bias_gelu_tanh(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def _plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _plain_swiglu_packed(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _plain_geglu_packed(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


# op -> (shapes of its inputs, PyTorch's operators, ours by backend, tensors moved forward, and backward)
OPS: dict[str, tuple[Callable[[int, int], list[tuple[int, ...]]], Function, Function, int, int]] = {
    "bias_gelu": (lambda n, f: [(n, f), (f,)], _plain_bias_gelu, bias_gelu, 2, 3),
    "bias_gelu tanh": (
        lambda n, f: [(n, f), (f,)],
        _plain_bias_gelu_tanh,
        lambda x, bias, **o: bias_gelu(x, bias, "tanh", **o),
        2,
        3,
    ),
    "swiglu": (lambda n, f: [(n, f), (n, f)], _plain_swiglu, swiglu, 3, 5),
    "swiglu packed": (lambda n, f: [(n, 2 * f)], _plain_swiglu_packed, swiglu, 3, 5),
    "geglu packed": (lambda n, f: [(n, 2 * f)], _plain_geglu_packed, geglu, 3, 5),
}


def implementations(op: str, sizes: str) -> dict[str, Function]:
    _, plain, ours, _, _ = OPS[op]
    rows: dict[str, Function] = {
        "ours": ours,
        "reference": functools.partial(ours, backend="reference"),
        "torch": plain,
    }
    if sizes != "smoke":  # a compiler's minute
        rows["torch.compile"] = torch.compile(plain, dynamic=False)
    if importlib.util.find_spec("liger_kernel") is not None and "packed" not in op and "bias" not in op:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        rows["liger"] = LigerSiLUMulFunction.apply
    return rows


def run(function: Function, inputs: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    y = function(*inputs)
    return [y.detach()] if grad is None else [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def check(name: str, function: Function, plain: Function, inputs: list[Tensor], grad: Tensor | None) -> None:
    """Output and gradients by the numeric rule."""

    def as_dtype(dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
        leaves = [x.detach().to(dtype).requires_grad_(grad is not None) for x in inputs]
        return leaves, None if grad is None else grad.to(dtype)

    truths, plains = run(plain, *as_dtype(torch.float64)), run(plain, *as_dtype(inputs[0].dtype))
    for got, simple, truth in zip(run(function, *as_dtype(inputs[0].dtype)), plains, truths):
        if name in ("ours", "reference"):
            assert_as_accurate_as(got, simple, truth, absolute=torch.finfo(got.dtype).eps)
        else:  # a peer's accuracy is not ours to judge, but it has to compute the same
            torch.testing.assert_close(got.double(), truth, rtol=5e-2, atol=5e-2 * truth.abs().max().item())


@functools.cache
def measure(device: str, sizes: str, op: str, n: int, f: int, backward: bool) -> dict[str, tuple[list[float], int]]:
    shapes, plain, *_ = OPS[op]
    rng = torch.Generator(device).manual_seed(n + f)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = [torch.randn(shape, generator=rng, device=device, dtype=dtype).requires_grad_(backward) for shape in shapes(n, f)]
    grad = torch.randn(n, f, generator=rng, device=device, dtype=dtype) if backward else None
    calls: dict[str, Callable[[], Any]] = {}
    for name, function in implementations(op, sizes).items():
        check(name, function, plain, inputs, grad)
        calls[name] = functools.partial(run, function, inputs, grad)
    seconds = take_turns(calls, device, ROUNDS[sizes])
    return {name: (seconds[name], peak_bytes(call, device)) for name, call in calls.items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = metafunc.config.getoption("--sizes")
    device = metafunc.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    cells = [(op, n, f, backward) for backward in (False, True) for op in OPS for n, f in SHAPES[device, sizes]]
    metafunc.parametrize(
        ("op", "n", "f", "backward", "name"), [(*cell, name) for cell in cells for name in implementations(cell[0], sizes)]
    )


def test_activation(
    benchmark: Any, summary: Summary, sizes: str, device: str, op: str, n: int, f: int, backward: bool, name: str
) -> None:
    seconds, peak = measure(device, sizes, op, n, f, backward)[name]
    group = f"{op} {'forward and backward' if backward else 'forward'}, {n} x {f}"
    replay(benchmark, group, name, seconds)
    *_, forward_tensors, backward_tensors = OPS[op]
    tensors = forward_tensors + (backward_tensors if backward else 0)
    rate = tensors * n * f * (2 if device == "cuda" else 4) / statistics.median(seconds)
    of_copy = rate / copy_bandwidth(device)
    benchmark.extra_info.update(device=device, bytes_per_second=rate, of_copy=of_copy, peak_bytes=peak)
    columns = {"GB/s": f"{rate / 1e9:,.1f}", "of copy": f"{of_copy:.0%}", "peak MiB": f"{peak / 2**20:,.0f}"}
    summary.add(f"{group}, on {device}", name, seconds, **columns)
