"""Rotary embedding of q and k, forward and backward: ours against the reference, torch.compile and Liger.

    pytest bench/bench_rotary.py [--sizes smoke|default|full] [--device cpu|cuda]

q and k are views (batch, positions, heads, head_dim).transpose(1, 2), bf16 (on a CPU float32), angles float32. GB/s counts q
and k once in and once out in each direction; the angles, shared by all heads, are left out. Every result is compared with
float64 before it is timed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from wikigpt.kernels import apply_rotary_emb, apply_rotary_emb_qk, rotary_cos_sin
from wikigpt.kernels.rotary import apply_rotary_emb_reference

from .suite import Function, Measure, Peer, Problem, assert_right, dtype_of, plain, rows


class Case(NamedTuple):
    interleaved: bool
    backward: bool
    batch: int
    s: int
    heads: int
    key_heads: int
    head_dim: int


# device, sizes -> (batch, positions, heads, key heads, head_dim)
SHAPES = {
    ("cuda", "smoke"): [(2, 256, 8, 2, 64)],
    ("cuda", "check"): [(8, 2048, 32, 8, 128)],
    ("cuda", "default"): [(8, 2048, 32, 8, 128), (8, 2048, 16, 16, 64), (64, 1, 32, 8, 128)],
    ("cuda", "full"): [
        (b, s, 32, g, d) for b, s in ((1, 2048), (8, 2048), (2, 32768), (64, 1)) for g in (8, 32) for d in (64, 128)
    ],
    ("cpu", "smoke"): [(1, 64, 4, 2, 32)],
    ("cpu", "default"): [(4, 512, 8, 8, 64), (1, 1, 8, 8, 64)],
    ("cpu", "full"): [(4, 512, 8, 8, 64), (2, 2048, 16, 4, 128), (1, 1, 8, 8, 64)],
}


def cases(device: str, sizes: str) -> list[Case]:
    return [
        Case(interleaved, backward, *shape)
        for backward in (False, True)
        for interleaved in (False, True)
        for shape in SHAPES[device, sizes]
    ]


# --- implementations: each of (q, k, cos, sin, interleaved) -------------------------------------------------------------


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    q, k = (apply_rotary_emb_reference(x, cos, sin, interleaved=interleaved) for x in (q, k))
    return q, k


def one_by_one(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    q, k = (apply_rotary_emb(x, cos, sin, interleaved=interleaved) for x in (q, k))
    return q, k


def in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return apply_rotary_emb_qk(q, k, cos, sin, interleaved=interleaved, inplace=True)


def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return apply_rotary_emb_qk(q, k, cos, sin, interleaved=interleaved)


def _liger() -> Function:
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
        return LigerRopeFunction.apply(q, k, *(torch.cat((x, x), dim=-1)[None] for x in (cos, sin)))

    return run


PEERS = {
    "ours": plain(both),
    "ours, one by one": plain(one_by_one),
    "ours, in place": plain(in_place),
    "reference": plain(reference),
    "torch.compile": Peer(functools.partial(torch.compile, reference, dynamic=False)),
    "liger": Peer(_liger, "cuda", "liger_kernel"),
}


def peers(case: Case, device: str, sizes: str) -> dict[str, Peer]:
    found = dict(PEERS)
    if sizes in ("smoke", "check"):  # a compiler's minute
        del found["torch.compile"]
    if case.backward:  # of a leaf there is no gradient in place
        del found["ours, in place"]
    if case.interleaved:
        del found["liger"]
    return found


def problem(case: Case, device: str) -> Problem:
    rng = torch.Generator(device).manual_seed(case.s)
    dtype = dtype_of(device)

    def draw(heads: int) -> Tensor:
        shape = (case.batch, case.s, heads, case.head_dim)
        return torch.randn(shape, generator=rng, device=device, dtype=dtype).transpose(1, 2)

    q, k = (draw(n).requires_grad_(case.backward) for n in (case.heads, case.key_heads))
    grads = [draw(n) for n in (case.heads, case.key_heads)] if case.backward else None
    cos, sin = rotary_cos_sin(torch.arange(case.s, device=device), case.head_dim)

    def run(function: Function, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, grads: list[Tensor] | None) -> list[Tensor]:
        turned = function(q, k, cos, sin, case.interleaved)
        return list(turned) if grads is None else list(torch.autograd.grad(turned, (q, k), grads))

    def once(function: Function, dtype: torch.dtype, table: torch.dtype) -> list[Tensor]:
        a, b = (x.detach().to(dtype, copy=True).requires_grad_(case.backward) for x in (q, k))
        wide = None if grads is None else [grad.to(dtype) for grad in grads]
        return run(function, a, b, cos.to(table), sin.to(table), wide)

    @functools.cache
    def expected() -> tuple[list[Tensor], list[Tensor]]:
        return once(reference, dtype, cos.dtype), once(reference, torch.float64, torch.float64)

    def check(name: str, function: Function) -> None:
        assert_right(name, once(function, dtype, cos.dtype), *expected())

    return Problem(
        op=f"rotary {'pairs' if case.interleaved else 'halves'}, forward{' and backward' if case.backward else ''}",
        shape=f"batch {case.batch}, S {case.s}, {case.heads} + {case.key_heads} heads of {case.head_dim}",
        call=lambda name, function: functools.partial(run, function, q, k, cos, sin, grads),
        check=check,
        bytes=2 * (q.numel() + k.numel()) * dtype.itemsize * (2 if case.backward else 1),
        dtype=dtype,
        axes=case._asdict(),
    )


@rows(cases, peers)
def test_rotary(measure: Measure, case: Case, name: str) -> None:
    measure(problem, case, name)
