"""bias_gelu, swiglu and geglu, forward and with backward: ours, the reference, PyTorch's operators, torch.compile, Liger.

    pytest bench/bench_activation.py [--sizes smoke|default|full] [--device cpu|cuda]

bf16 (on a CPU float32), random normal data, gradients of inputs and biases. GB/s counts what the formula must move: each input
read once, each result written once, forward 2 or 3 tensors of (rows, features), backward 3 or 5. Every result is compared with
float64 before it is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from wikigpt.kernels import bias_gelu, geglu, swiglu

from .suite import Function, Measure, Peer, Problem, assert_right, dtype_of, plain, rows


class Case(NamedTuple):
    op: str
    backward: bool
    n: int
    f: int


# device, sizes -> (rows, features). MLPs of GPT-2 and of Llama 7B.
SHAPES = {
    ("cuda", "smoke"): [(1024, 3072)],
    ("cuda", "check"): [(8192, 11008)],
    ("cuda", "default"): [(8192, 3072), (8192, 11008)],
    ("cuda", "full"): [(n, f) for n in (64, 1024, 8192, 32768) for f in (1000, 3072, 11008, 14336)],
    ("cpu", "smoke"): [(64, 256)],
    ("cpu", "default"): [(2048, 512), (2048, 2048)],
    ("cpu", "full"): [(n, f) for n in (64, 2048, 8192) for f in (512, 1000, 2048)],
}


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


def _bias_gelu_tanh(x: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return bias_gelu(x, bias, "tanh", **options)


class Op(NamedTuple):
    shapes: Callable[[int, int], list[tuple[int, ...]]]  # of the inputs, for (rows, features)
    torch: Function
    ours: Function
    forward: int  # tensors of (rows, features) that must move
    backward: int


OPS = {
    "bias_gelu": Op(lambda n, f: [(n, f), (f,)], _plain_bias_gelu, bias_gelu, 2, 3),
    "bias_gelu tanh": Op(lambda n, f: [(n, f), (f,)], _plain_bias_gelu_tanh, _bias_gelu_tanh, 2, 3),
    "swiglu": Op(lambda n, f: [(n, f), (n, f)], _plain_swiglu, swiglu, 3, 5),
    "swiglu packed": Op(lambda n, f: [(n, 2 * f)], _plain_swiglu_packed, swiglu, 3, 5),
    "geglu packed": Op(lambda n, f: [(n, 2 * f)], _plain_geglu_packed, geglu, 3, 5),
}


def _liger() -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


PEERS = {
    name: {
        "ours": plain(op.ours),
        "reference": plain(functools.partial(op.ours, backend="reference")),
        "torch": plain(op.torch),
        "torch.compile": Peer(functools.partial(torch.compile, op.torch, dynamic=False)),
        **({"liger": Peer(_liger, "cuda", "liger_kernel")} if name == "swiglu" else {}),
    }
    for name, op in OPS.items()
}


def cases(device: str, sizes: str) -> list[Case]:
    return [Case(op, backward, n, f) for backward in (False, True) for op in OPS for n, f in SHAPES[device, sizes]]


def peers(case: Case, device: str, sizes: str) -> dict[str, Peer]:
    # A compiler's minute is too long for a smoke test, and ten of them for the check.
    return {name: peer for name, peer in PEERS[case.op].items() if sizes not in ("smoke", "check") or name != "torch.compile"}


def run(function: Function, inputs: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    y = function(*inputs)
    return [y.detach()] if grad is None else [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def problem(case: Case, device: str) -> Problem:
    op, n, f = OPS[case.op], case.n, case.f
    rng = torch.Generator(device).manual_seed(n + f)
    dtype = dtype_of(device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device, dtype=dtype)

    inputs = [draw(*shape).requires_grad_(case.backward) for shape in op.shapes(n, f)]
    grad = draw(n, f) if case.backward else None
    last = min(n, max(1, 2**26 // f))  # rows that are compared: all of them up to half a gigabyte in float64

    def some(dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
        leaves = [(x[-last:] if x.dim() == 2 else x).detach().to(dtype).requires_grad_(case.backward) for x in inputs]
        return leaves, None if grad is None else grad[-last:].to(dtype)

    @functools.cache
    def expected() -> tuple[list[Tensor], list[Tensor]]:
        return run(op.torch, *some(dtype)), run(op.torch, *some(torch.float64))

    def check(name: str, function: Function) -> None:
        got = run(function, *some(dtype))
        assert_right(name, got, *expected(), absolute=torch.finfo(dtype).eps)
        if last < n:  # the same rows out of the whole
            torch.testing.assert_close(run(function, inputs, grad)[0][-last:], got[0])

    return Problem(
        op=f"{case.op}, forward{' and backward' if case.backward else ''}",
        shape=f"{n:,} x {f:,}",
        call=lambda name, function: functools.partial(run, function, inputs, grad),
        check=check,
        bytes=(op.forward + (op.backward if case.backward else 0)) * n * f * dtype.itemsize,
        dtype=dtype,
        axes=case._asdict(),
    )


@rows(cases, peers)
def test_activation(measure: Measure, case: Case, name: str) -> None:
    measure(problem, case, name)
