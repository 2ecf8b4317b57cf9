"""Linear layer + cross-entropy, and cross-entropy of given logits: ours against PyTorch's ways and other packages.

    pytest bench/bench_linear_cross_entropy.py [--sizes smoke|default|full] [--device cpu|cuda]

bf16 on a GPU, float32 on a CPU, random normal data. TFLOP/s counts 2 N V D for the forward and three times as much with the
backward, whatever an implementation computes besides. "extra MiB" is the peak less the gradients that are returned, "of logits"
that in parts of the logits in bf16 (float32 on a CPU). Every result is compared with float64 before it is timed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from wikigpt.kernels import cross_entropy, linear_cross_entropy
from wikigpt.kernels.cross_entropy import cross_entropy_reference
from wikigpt.kernels.linear_cross_entropy import linear_cross_entropy_reference

from .suite import Function, Measure, Peer, Problem, assert_right, dtype_of, plain, rows


class Case(NamedTuple):
    backward: bool
    n: int
    d: int
    v: int


# device, sizes -> (tokens, width, vocabulary)
SHAPES = {
    ("cuda", "smoke"): [(512, 256, 2000)],
    ("cuda", "check"): [(16384, 512, 33278), (8192, 4096, 128256)],  # the first is that of training on WikiText-2
    ("cuda", "default"): [(16384, 512, 33278), (8192, 1024, 33278), (8192, 4096, 128256), (4096, 4096, 128256)],
    ("cuda", "full"): [
        (16384, 512, 33278),
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


def cases(device: str, sizes: str) -> list[Case]:
    return [Case(backward, *shape) for backward in (False, True) for shape in SHAPES[device, sizes]]


def is_ours(name: str) -> bool:
    """Whether the numeric rule holds for it: filtering leaves out small gradients, so it is judged as a peer."""
    return name.startswith("ours") and name != "ours, filtered"


# --- linear layer + cross-entropy: each of (input, linear_weight, target) ----------------------------------------------


def torch_loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y)


def torch_loss_float32(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
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


def torch_chunks(**options: Any) -> Peer:
    def make() -> Function:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):

            def too_old(*_: Tensor) -> Tensor:
                raise NotImplementedError("F.linear_cross_entropy came with torch 2.13")

            return too_old
        return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions(**options))

    return Peer(make)


def liger() -> Function:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda x, w, y: loss(w, x, y)


def quack() -> Function:
    return importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy


def cut() -> Function:
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy


PEERS = {
    "ours": plain(linear_cross_entropy),
    "ours, logits kept": plain(kept, device="cuda"),
    "ours, filtered": plain(functools.partial(linear_cross_entropy, filter_gradients=True), device="cuda"),
    "linear + cross_entropy": plain(torch_loss),
    "linear + cross_entropy, float32": plain(torch_loss_float32, device="cuda"),
    "torch.compile": Peer(functools.partial(torch.compile, torch_loss_float32, dynamic=False), "cuda"),
    "F.linear_cross_entropy, chunks": torch_chunks(),
    "F.linear_cross_entropy, accurate": torch_chunks(acc_policy="accurate"),
    "liger": Peer(liger, "cuda", "liger_kernel"),
    "quack": Peer(quack, "cuda", "quack"),
    "cut_cross_entropy": Peer(cut, "cuda", "cut_cross_entropy"),
}


def run(function: Function, leaves: list[Tensor], y: Tensor) -> list[Tensor]:
    loss = function(*leaves, y)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def cut_to(count: int, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The problem of the first `count` tokens."""
    return [(t[:count] if i == 0 else t).detach().to(dtype).requires_grad_() for i, t in enumerate(tensors)]


def timed(function: Function, leaves: list[Tensor], y: Tensor, backward: bool) -> Callable[[], Any]:
    def step() -> None:
        with contextlib.nullcontext() if backward else torch.no_grad():
            loss = function(*leaves, y)
        if backward:
            torch.autograd.grad(loss, leaves)

    return step


def check_part(name: str, function: Function, reference: Function, leaves: list[Tensor], y: Tensor, expected: Any) -> None:
    """Loss and gradients of the first tokens by the numeric rule."""
    few = min(256, y.shape[0])
    dtype = leaves[0].dtype
    for got, simple, true in zip(run(function, cut_to(few, leaves, dtype), y[:few]), *expected()):
        most = float(true.abs().max())
        row = name if is_ours(name) else "peer"
        assert_right(row, [got], [simple], [true], absolute=torch.finfo(dtype).eps / 2 * most)


def problem(case: Case, device: str) -> Problem:
    n, d, v = case.n, case.d, case.v
    rng = torch.Generator(device).manual_seed(n + d + v)
    dtype = dtype_of(device)
    x = torch.randn(n, d, generator=rng, device=device, dtype=dtype).requires_grad_()
    w = (torch.randn(v, d, generator=rng, device=device, dtype=dtype) / d**0.5).requires_grad_()
    y = torch.randint(v, (n,), generator=rng, device=device)
    few = min(256, n)

    @functools.cache
    def expected() -> tuple[list[Tensor], list[Tensor]]:
        both = [run(linear_cross_entropy_reference, cut_to(few, [x, w], t), y[:few]) for t in (dtype, torch.float64)]
        return both[0], both[1]

    @functools.cache
    @torch.no_grad()
    def whole() -> list[Tensor]:
        """The loss of all tokens and its gradients for the last rows of input and weight, in float32 and float64."""
        rows = 8
        wide = w.float()
        lse = torch.cat([(part.float() @ wide.T).logsumexp(-1) for part in x.split(512)])
        loss = (lse - (x.float() * wide[y]).sum(-1)).double().mean()
        del wide
        p = ((x[-rows:].double() @ w.double().T) - lse[-rows:, None]).exp()  # (rows, V)
        p[torch.arange(rows), y[-rows:]] -= 1
        q = (x.double() @ w[-rows:].double().T - lse[:, None]).exp()  # (N, rows)
        q -= (y[:, None] == torch.arange(v - rows, v, device=y.device)).double()
        return [loss, p @ w.double() / n, q.T @ x.double() / n]

    def check(name: str, function: Function) -> None:
        check_part(name, function, linear_cross_entropy_reference, [x, w], y, expected)
        loss, d_x, d_w = run(function, [x, w], y)
        for got, true in zip((loss, d_x[-8:], d_w[-8:]), whole()):
            torch.testing.assert_close(got.double(), true, rtol=5e-2, atol=5e-2 * float(true.abs().max()))

    def columns(peak: int) -> dict[str, str]:
        extra = max(0, peak - (dtype.itemsize * (n + v) * d if case.backward else 0))
        return {"extra MiB": f"{extra / 2**20:,.1f}", "of logits": f"{extra / (dtype.itemsize * n * v):.1%}"}

    return Problem(
        op=f"linear cross-entropy, forward{' and backward' if case.backward else ''}",
        shape=f"{n:,} x {d:,}, vocabulary {v:,}",
        call=lambda name, function: timed(function, [x, w], y, case.backward),
        check=check,
        flops=2 * n * d * v * (3 if case.backward else 1),
        dtype=dtype,
        axes=case._asdict(),
        columns=columns,
    )


def peers(case: Case, device: str, sizes: str) -> dict[str, Peer]:
    found = dict(PEERS)
    if sizes == "check":
        for name in ("ours, filtered", "F.linear_cross_entropy, accurate"):
            del found[name]
        if case.d != 512 or not case.backward:  # each shape is compiled anew
            del found["torch.compile"]
    return found


@rows(cases, peers)
def test_linear_cross_entropy(measure: Measure, case: Case, name: str) -> None:
    measure(problem, case, name)


# --- cross-entropy of given logits: each of (logits, target) -----------------------------------------------------------


class Logits(NamedTuple):
    n: int
    v: int


def float32_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.float(), y)


def liger_logits() -> Function:
    loss = importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss()
    return lambda z, y: loss(z * 1, y)  # it writes over what it is given


def quack_logits() -> Function:
    return functools.partial(importlib.import_module("quack.cross_entropy").cross_entropy, reduction="mean")


LOGITS_PEERS = {
    "ours": plain(cross_entropy),
    "ours, in place": plain(functools.partial(cross_entropy, inplace_backward=True), device="cuda"),
    "F.cross_entropy": plain(F.cross_entropy),
    "torch.compile": Peer(functools.partial(torch.compile, float32_cross_entropy, dynamic=False), "cuda"),
    "liger": Peer(liger_logits, "cuda", "liger_kernel"),
    "quack": Peer(quack_logits, "cuda", "quack"),
}


def logits_problem(case: Logits, device: str) -> Problem:
    n, v = case
    rng = torch.Generator(device).manual_seed(n + v)
    dtype = dtype_of(device)
    z = torch.randn(n, v, generator=rng, device=device, dtype=dtype).requires_grad_()
    y = torch.randint(v, (n,), generator=rng, device=device)
    few = min(256, n)

    @functools.cache
    def expected() -> tuple[list[Tensor], list[Tensor]]:
        both = [run(cross_entropy_reference, cut_to(few, [z], t), y[:few]) for t in (dtype, torch.float64)]
        return both[0], both[1]

    def check(name: str, function: Function) -> None:
        check_part(name, function, cross_entropy_reference, [z], y, expected)
        # The whole: its last rows, which the first tokens' problem has not seen.
        leaf = z.detach().clone().requires_grad_()
        last = z[-few:].detach().double()
        true = last.softmax(-1)
        true[torch.arange(few), y[-few:]] -= 1
        got = run(function, [leaf], y)[1][-few:].double()
        torch.testing.assert_close(got, true / n, rtol=5e-2, atol=5e-2 / n)

    def call(name: str, function: Function) -> Callable[[], Any]:
        # The gradient may take the place of the logits: those have to be its own, and after its first call are no logits.
        leaf = z.detach().clone().requires_grad_() if name == "ours, in place" else z
        return timed(function, [leaf], y, True)

    return Problem(
        op="cross-entropy, forward and backward",
        shape=f"{n:,} x {v:,}",
        call=call,
        check=check,
        bytes=3 * n * v * dtype.itemsize,  # read for the loss, read and written for the gradient
        dtype=dtype,
        axes=case._asdict(),
    )


def logits_cases(device: str, sizes: str) -> list[Logits]:
    return list(dict.fromkeys(Logits(n, v) for n, _, v in SHAPES[device, sizes]))


def logits_peers(case: Logits, device: str, sizes: str) -> dict[str, Peer]:
    return {name: peer for name, peer in LOGITS_PEERS.items() if sizes != "check" or name != "torch.compile"}


@rows(logits_cases, logits_peers)
def test_cross_entropy(measure: Measure, case: Logits, name: str) -> None:
    measure(logits_problem, case, name)
