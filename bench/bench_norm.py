"""LayerNorm and RMSNorm, forward and backward, plain and with a residual: ours against PyTorch's, torch.compile, Liger, quack.

    pytest bench/bench_norm.py [--sizes smoke|default|full] [--device cpu|cuda]

bf16 on a GPU, float32 on a CPU; the weight has x's dtype. GB/s counts the least that must move: each input read once and each
output written once. "backward" times the backward alone, on a graph that is kept. Every result is compared with float64 before
it is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from wikigpt.kernels import layer_norm, rms_norm

from .suite import Function, Measure, Peer, Problem, assert_right, dtype_of, plain, rows


class Case(NamedTuple):
    op: str
    residual: bool
    direction: str
    m: int
    n: int


WIDTHS = (64, 128, 512, 768, 1024, 2048, 4096, 5120, 8192, 16384, 32768, 65536)
LARGE = [(65536, 512), (16384, 2048), (8192, 4096), (8192, 8192), (4096, 16384), (2048, 32768), (1024, 65536)]
# device, sizes -> (rows, columns). 64 MB and more in bf16 are LARGE, where the copy's bandwidth is the goal.
SHAPES = {
    ("cuda", "smoke"): [(256, 512)],
    ("cuda", "check"): [(16384, 2048), (8192, 8192)],
    ("cuda", "default"): [(16384, 2048), (8192, 8192), (512, 1024)],
    ("cuda", "full"): list(
        dict.fromkeys([*((m, n) for n in WIDTHS for m in (1, 32, 1024, 8192, 65536) if m * n <= 2**29), *LARGE])
    ),
    ("cpu", "smoke"): [(64, 128)],
    ("cpu", "default"): [(2048, 192), (2048, 768), (512, 4096)],
    ("cpu", "full"): [(m, n) for n in (64, 192, 768, 4096) for m in (1, 64, 2048)],
}


def cases(device: str, sizes: str) -> list[Case]:
    return [
        Case(op, residual, direction, m, n)
        for op in ("layer_norm", "rms_norm")
        for residual in (False, True)
        for direction in ("forward", "backward")
        for m, n in SHAPES[device, sizes]
    ]


# --- implementations: each of (x, weight, bias, residual), giving y, or (y, h) with a residual --------------------------


def torch_norm(op: str) -> Function:
    """PyTorch's own functions, as a model without ours is written."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Any:
        h = x if residual is None else x + residual
        n = h.shape[-1:]
        y = F.layer_norm(h, n, weight, bias, 1e-5) if op == "layer_norm" else F.rms_norm(h, n, weight, 1e-5)
        return y if residual is None else (y, h)

    return run


def our_norm(op: str, backend: str | None) -> Function:
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


PEERS = {
    op: {
        "ours": plain(our_norm(op, None)),
        "reference": plain(our_norm(op, "reference")),
        "torch": plain(torch_norm(op)),
        "torch.compile": Peer(functools.partial(torch.compile, torch_norm(op), dynamic=False), "cuda"),
        "liger": Peer(functools.partial(liger, op), "cuda", "liger_kernel"),
        "quack": Peer(functools.partial(quack, op), "cuda", "quack"),
    }
    for op in ("layer_norm", "rms_norm")
}


def least_bytes(case: Case, size: int) -> int:
    """x and y, with a residual also that and h; backward dy, h and dx, with a residual also dh. Weights, statistics and partial
    sums are left out: they are the implementation's to keep small."""
    backward = case.direction == "backward"
    tensors = (3 if backward else 2) + ((1 if backward else 2) if case.residual else 0)
    return tensors * case.m * case.n * size


def results_of(function: Function, inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
    # So that a compiled backward may run again on a graph that is kept.
    with functorch_config.patch(donated_buffer=False):
        result = function(*inputs)
    return result if isinstance(result, tuple) else (result,)


def problem(case: Case, device: str) -> Problem:
    rng = torch.Generator(device).manual_seed(case.m + case.n)
    dtype = dtype_of(device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device, dtype=dtype)

    m, n = case.m, case.n
    leaves = [draw(m, n), draw(n), draw(n) if case.op == "layer_norm" else None, draw(m, n) if case.residual else None]
    grads = [draw(m, n) for _ in range(2 if case.residual else 1)]
    inputs = [t.requires_grad_() for t in leaves if t is not None]
    last = min(m, max(1, 2**26 // n))  # rows that are compared: all of them up to half a gigabyte in float64

    def some(dtype: torch.dtype) -> tuple[list[Tensor | None], list[Tensor]]:
        cut = [None if t is None else (t[-last:] if t.dim() == 2 else t).detach().to(dtype).requires_grad_() for t in leaves]
        return cut, [g[-last:].to(dtype) for g in grads]

    def run(function: Function, inputs: list[Tensor | None], grads: list[Tensor]) -> list[Tensor]:
        results = results_of(function, inputs)
        wanted = [t for t in inputs if t is not None]
        return [*(r.detach() for r in results), *torch.autograd.grad(results, wanted, grads)]

    @functools.cache
    def expected() -> tuple[list[Tensor], list[Tensor]]:
        reference = our_norm(case.op, "reference")
        return run(reference, *some(dtype)), run(reference, *some(torch.float64))

    def check(name: str, function: Function) -> None:
        got, (simple, truth) = run(function, *some(dtype)), expected()
        for a, b, true in zip(got, simple, truth):
            most = float(true.abs().max())
            assert_right(name, [a], [b], [true], absolute=torch.finfo(dtype).eps / 4 * most + 2e-7)
        if last < m:  # the same rows out of the whole
            for part, whole in zip(got, run(function, leaves, grads)):
                if whole.dim() == 2:
                    torch.testing.assert_close(whole[-last:], part)

    def call(name: str, function: Function) -> Callable[[], Any]:
        if case.direction == "forward":
            return lambda: function(*leaves)
        results = results_of(function, leaves)
        return lambda: torch.autograd.grad(results, inputs, grads, retain_graph=True)

    return Problem(
        op=f"{case.op}{' with residual' if case.residual else ''}, {case.direction}",
        shape=f"{m:,} x {n:,}",
        call=call,
        check=check,
        bytes=least_bytes(case, dtype.itemsize),
        dtype=dtype,
        axes=case._asdict(),
    )


def peers(case: Case, device: str, sizes: str) -> dict[str, Peer]:
    found = dict(PEERS[case.op])
    if sizes == "check":  # each shape is compiled anew
        del found["reference"]
        if case.residual or case.m != 16384:
            del found["torch.compile"]
    return found


@rows(cases, peers)
def test_norm(measure: Measure, case: Case, name: str) -> None:
    measure(problem, case, name)
