"""Linear layer + cross-entropy, and cross-entropy of given logits: ours against PyTorch's ways and other packages.

    pytest bench/bench_linear_cross_entropy.py [--sizes smoke|default|full] [--device cpu|cuda]

bf16 on a GPU, float32 on a CPU, random normal data. TFLOP/s counts 2 N V D for the forward and three times as much with the
backward, whatever an implementation computes besides. "of matmul" and "of copy" are fractions of what a square product and a
copy reach on the same machine in the same run. "extra MiB" is the peak of what a call allocates less the gradients it returns,
"of logits" that in parts of the logits in bf16. Every result is compared with float64 before it is timed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from wikigpt.kernels import cross_entropy, linear_cross_entropy
from wikigpt.kernels.cross_entropy import cross_entropy_reference
from wikigpt.kernels.linear_cross_entropy import linear_cross_entropy_reference

from tests.conftest import assert_as_accurate_as

from .bench_attention import copy_bandwidth, matmul_flops
from .conftest import Summary
from .timing import peak_bytes, replay, take_turns

Function = Callable[..., Tensor]

# device, sizes -> (tokens, width, vocabulary)
SHAPES = {
    ("cuda", "smoke"): [(512, 256, 2000)],
    ("cuda", "default"): [(8192, 1024, 33278), (8192, 4096, 128256), (4096, 4096, 128256)],
    ("cuda", "full"): [
        (2048, 128, 33278),
        (8192, 768, 50257),
        (8192, 1024, 33278),
        (8192, 4096, 33278),
        (4096, 2048, 128256),
        (4096, 4096, 128256),
        (8192, 4096, 128256),
        (16384, 4096, 128256),
    ],
    ("cpu", "smoke"): [(256, 32, 1000)],
    ("cpu", "default"): [(2048, 128, 33278)],
    ("cpu", "full"): [(2048, 128, 33278), (2048, 192, 33278), (2048, 512, 33278)],
}
ROUNDS = {"smoke": 3, "default": 9, "full": 15}


# --- linear layer + cross-entropy -----------------------------------------------------------------------------------


def plain(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y)


def plain_float32(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w).float(), y)


@contextlib.contextmanager
def _all_logits_kept() -> Iterator[None]:
    module = importlib.import_module("wikigpt.kernels.linear_cross_entropy")
    before, module.KEEP_BYTES = module.KEEP_BYTES, 1 << 62  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.KEEP_BYTES = before  # type: ignore[attr-defined]


def kept(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    with _all_logits_kept():
        return linear_cross_entropy(x, w, y)


def pytorchs_chunks(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, w, y, options=torch.nn.LinearCrossEntropyOptions())


def implementations(device: str, sizes: str) -> dict[str, Function]:
    """Each of (input, linear_weight, target)."""
    found: dict[str, Function] = {"ours": linear_cross_entropy, "linear + cross_entropy": plain}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy, chunks"] = pytorchs_chunks
    if device == "cpu":
        return found
    found["ours, logits kept"] = kept
    found["ours, filtered"] = functools.partial(linear_cross_entropy, filter_gradients=True)
    found["linear + cross_entropy, float32"] = plain_float32
    found["torch.compile"] = torch.compile(plain_float32, dynamic=False)
    if importlib.util.find_spec("liger_kernel") is not None:
        liger = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda x, w, y: liger(w, x, y)
    if importlib.util.find_spec("quack") is not None:
        quack = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
        found["quack"] = lambda x, w, y: quack(x, w, y)
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        found["cut_cross_entropy"] = lambda x, w, y: cut(x, w, y)
    return found


def check(name: str, function: Function, tensors: list[Tensor], y: Tensor, reference: Function) -> None:
    """Loss and gradients of a part of the tokens by the numeric rule."""

    def run(function: Function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensors[0][:256].to(dtype).detach(), *(tensor.to(dtype).detach() for tensor in tensors[1:])]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        loss = function(*leaves, y[:256])
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    truth, simple, got = run(reference, torch.float64), run(reference, tensors[0].dtype), run(function, tensors[0].dtype)
    for ours, plainly, true in zip(got, simple, truth):
        if name in ("ours", "ours, logits kept", "ours, in place"):
            assert_as_accurate_as(ours, plainly, true, absolute=torch.finfo(ours.dtype).eps * float(true.abs().max()) / 2)
        else:  # a peer's accuracy is not ours to judge, but it has to compute the same
            torch.testing.assert_close(ours.double(), true, rtol=5e-2, atol=5e-2 * float(true.abs().max()))


def _calls(functions: dict[str, Function], tensors: list[Tensor], y: Tensor, reference: Function, backward: bool) -> Any:
    """(calls of those that compute this, why the others do not)."""
    calls: dict[str, Callable[[], Any]] = {}
    reasons: dict[str, str] = {}
    for name, function in functions.items():
        try:
            check(name, function, tensors, y, reference)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reasons[name] = str(error).splitlines()[0]
            continue

        def call(function: Function = function) -> None:
            with contextlib.nullcontext() if backward else torch.no_grad():
                loss = function(*tensors, y)
            if backward:
                torch.autograd.grad(loss, tensors)

        calls[name] = call
    return calls, reasons


@functools.cache
def measure(device: str, sizes: str, n: int, d: int, v: int, backward: bool) -> dict[str, tuple[list[float], int] | str]:
    """Implementation -> (seconds of each round, peak bytes), or why it cannot."""
    rng = torch.Generator(device).manual_seed(n + d + v)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(n, d, generator=rng, device=device, dtype=dtype).requires_grad_()
    w = (torch.randn(v, d, generator=rng, device=device, dtype=dtype) / d**0.5).requires_grad_()
    y = torch.randint(v, (n,), generator=rng, device=device)
    calls, reasons = _calls(implementations(device, sizes), [x, w], y, linear_cross_entropy_reference, backward)
    seconds = take_turns(calls, device, ROUNDS[sizes])
    return {**{name: (seconds[name], peak_bytes(call, device)) for name, call in calls.items()}, **reasons}


def test_linear_cross_entropy(
    benchmark: Any, summary: Summary, sizes: str, device: str, n: int, d: int, v: int, backward: bool, name: str
) -> None:
    measured = measure(device, sizes, n, d, v, backward)[name]
    if isinstance(measured, str):
        pytest.skip(f"{name} does not compute this: {measured}")
    seconds, peak = measured
    group = f"linear cross-entropy {'forward and backward' if backward else 'forward'}, {n} x {d}, vocabulary {v}"
    replay(benchmark, group, name, seconds)
    rate = 2 * n * d * v * (3 if backward else 1) / statistics.median(seconds)
    of_matmul = rate / matmul_flops(device, torch.bfloat16 if device == "cuda" else torch.float32)
    extra = peak - (2 * (n + v) * d if backward else 0)
    benchmark.extra_info.update(device=device, flops_per_second=rate, of_matmul=of_matmul, extra_bytes=extra)
    columns = {"TFLOP/s": f"{rate / 1e12:.4g}", "of matmul": f"{of_matmul:.0%}"}
    if device == "cuda":
        columns |= {"extra MiB": f"{extra / 2**20:,.0f}", "of logits": f"{extra / (2 * n * v):.1%}"}
    summary.add(f"{group}, on {device}", name, seconds, **columns)


# --- cross-entropy of given logits ----------------------------------------------------------------------------------


def float32_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.float(), y)


def logits_implementations(device: str) -> dict[str, Function]:
    """Each of (logits, target)."""
    found: dict[str, Function] = {"ours": cross_entropy, "F.cross_entropy": F.cross_entropy}
    if device == "cpu":
        return found
    found["ours, in place"] = functools.partial(cross_entropy, inplace_backward=True)
    found["torch.compile"] = torch.compile(float32_cross_entropy, dynamic=False)
    if importlib.util.find_spec("liger_kernel") is not None:
        liger = importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss()
        found["liger"] = lambda z, y: liger(z * 1, y)  # it writes over what it is given
    if importlib.util.find_spec("quack") is not None:
        quack = importlib.import_module("quack.cross_entropy").cross_entropy
        found["quack"] = lambda z, y: quack(z, y, reduction="mean")
    return found


@functools.cache
def measure_logits(device: str, sizes: str, n: int, v: int) -> dict[str, tuple[list[float], int] | str]:
    rng = torch.Generator(device).manual_seed(n + v)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    z = torch.randn(n, v, generator=rng, device=device, dtype=dtype).requires_grad_()
    y = torch.randint(v, (n,), generator=rng, device=device)
    functions = logits_implementations(device)
    inplace = {name: functions.pop(name) for name in ("ours, in place",) if name in functions}
    calls, reasons = _calls(functions, [z], y, cross_entropy_reference, True)
    for name, call in _calls(inplace, [z.detach().clone().requires_grad_()], y, cross_entropy_reference, True)[0].items():
        calls[name] = call  # with logits of its own, which its first call replaces by their gradient
    seconds = take_turns(calls, device, ROUNDS[sizes])
    return {**{name: (seconds[name], peak_bytes(call, device)) for name, call in calls.items()}, **reasons}


def test_cross_entropy(benchmark: Any, summary: Summary, sizes: str, device: str, n: int, v: int, name: str) -> None:
    measured = measure_logits(device, sizes, n, v)[name]
    if isinstance(measured, str):
        pytest.skip(f"{name} does not compute this: {measured}")
    seconds, peak = measured
    group = f"cross-entropy forward and backward, {n} x {v}"
    replay(benchmark, group, name, seconds)
    size = 3 * n * v * (2 if device == "cuda" else 4)  # read for the loss, read and written for the gradient
    rate = size / statistics.median(seconds)
    of_copy = rate / copy_bandwidth(device)
    benchmark.extra_info.update(device=device, bytes_per_second=rate, of_copy=of_copy, peak_bytes=peak)
    columns = {"GB/s": f"{rate / 1e9:,.1f}", "of copy": f"{of_copy:.0%}", "peak MiB": f"{peak / 2**20:,.0f}"}
    summary.add(f"{group}, on {device}", name, seconds, **columns)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = metafunc.config.getoption("--sizes")
    device = metafunc.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    shapes = SHAPES[device, sizes]
    if metafunc.function is test_linear_cross_entropy:
        cells = [(*shape, backward) for backward in (False, True) for shape in shapes]
        names = implementations(device, sizes)
        metafunc.parametrize(("n", "d", "v", "backward", "name"), [(*cell, name) for cell in cells for name in names])
    else:
        rows = dict.fromkeys((n, v) for n, _, v in shapes)
        metafunc.parametrize(("n", "v", "name"), [(*row, name) for row in rows for name in logits_implementations(device)])
