"""Sampling of token ids from logits: ours against a sort, against topk, and against flashinfer.

    pytest bench/bench_sampling.py [--sizes smoke|default|full] [--device cpu|cuda]

float32 logits, normal with standard deviation 3 (top_p = 0.9 keeps about 4% of the vocabulary), temperature 0.8. GB/s counts
the logits, read once. Before it is timed, every peer's draws from one small row are compared with the distribution by
chi-square, and its ids of the problem itself with what a sort in float64 keeps.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from wikigpt.kernels import sample

from tests.test_sampling import assert_drawn_from, kept_probabilities

from .suite import Function, Measure, Peer, Problem, plain, rows

TEMPERATURE = 0.8


class Case(NamedTuple):
    b: int
    v: int
    top_k: int | None
    top_p: float | None
    min_p: float | None

    @property
    def filters(self) -> dict[str, Any]:
        return {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}


FILTERS: list[tuple[int | None, float | None, float | None]] = [
    (None, None, None), (50, None, None), (None, 0.9, None), (50, 0.9, None), (None, None, 0.05)
]  # fmt: skip
# device, sizes -> (rows, vocabulary)
SHAPES = {
    ("cuda", "smoke"): [(4, 1000)],
    ("cuda", "check"): [(64, 128256), (1, 50257)],
    ("cuda", "default"): [(64, 128256), (1, 50257), (1, 128256), (256, 128256)],
    ("cuda", "full"): [(b, v) for v in (257, 33278, 50257, 128256, 262144) for b in (1, 8, 64, 256)],
    ("cpu", "smoke"): [(4, 1000)],
    ("cpu", "default"): [(1, 50257), (8, 33278), (64, 128256)],
    ("cpu", "full"): [(b, v) for v in (257, 33278, 50257, 128256) for b in (1, 8, 64)],
}


def cases(device: str, sizes: str) -> list[Case]:
    return [Case(b, v, k, p, m) for k, p, m in FILTERS for b, v in SHAPES[device, sizes]]


# --- implementations: each of (logits, top_k, top_p, min_p) ---------------------------------------------------------


def ours(logits: Tensor, top_k: int | None, top_p: float | None, min_p: float | None, backend: str | None = None) -> Tensor:
    return sample(logits, TEMPERATURE, top_k, top_p, min_p, backend=backend)


def by_sort(logits: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    """Mask after mask, as transformers' logits processors do it, then softmax and multinomial."""
    logits = logits / TEMPERATURE
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -torch.inf)
    if top_p is not None:
        ranked, order = logits.sort(descending=True)
        p = ranked.softmax(-1)
        out = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
    p = logits.softmax(-1)
    if min_p is not None:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    return p.multinomial(1)[:, 0]


def by_topk(logits: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    """What is left after topk alone."""
    assert top_k is not None
    ranked, order = logits.topk(top_k)
    p = (ranked / TEMPERATURE).softmax(-1)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    return order.gather(-1, p.multinomial(1))[:, 0]


def flashinfer() -> Function:
    package = importlib.import_module("flashinfer.sampling")

    def run(logits: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
        logits = logits / TEMPERATURE
        if top_k is not None:
            ids = package.top_k_top_p_sampling_from_logits(logits, top_k, 1.0 if top_p is None else top_p)
        elif top_p is not None:
            ids = package.top_p_sampling_from_probs(logits.softmax(-1), top_p)
        elif min_p is not None:
            ids = package.min_p_sampling_from_probs(logits.softmax(-1), min_p)
        else:
            ids = package.sampling_from_logits(logits)
        return ids.long()

    return run


def peers(case: Case, device: str, sizes: str) -> dict[str, Peer]:
    found = {
        "ours": plain(ours),
        "ours, torch operators": plain(functools.partial(ours, backend="torch")),
        **({"torch, sort + multinomial": plain(by_sort)} if case.top_p is not None else {}),
        **({"torch, topk + multinomial": plain(by_topk)} if case.top_k is not None else {}),
        **({"torch, softmax + multinomial": plain(by_sort)} if case.top_k is None and case.top_p is None else {}),
        "torch.compile": Peer(functools.partial(torch.compile, by_sort, dynamic=False), "cuda"),
        "flashinfer": Peer(flashinfer, "cuda", "flashinfer"),
    }
    if sizes == "check":
        del found["torch.compile"]
    return found


def allowed(logits: Tensor, case: Case) -> Tensor:
    """(B, V): what may come out, in float64, with the tokens next to the cut that float32 may keep."""
    ranked, order = (logits.double() / TEMPERATURE).sort(descending=True)
    p = ranked.softmax(-1)
    rank = torch.arange(case.v, device=p.device)
    keep = (rank < (case.top_k or case.v)) | (ranked == ranked[:, (case.top_k or case.v) - 1, None])
    if case.top_p is not None:
        p = p * (rank < (case.top_k or case.v))
        keep &= (p.cumsum(-1) - p) < (case.top_p + 1e-5) * p.sum(-1, keepdim=True)
    if case.min_p is not None:
        keep &= p >= (case.min_p - 1e-5) * p[:, :1]
    return torch.zeros_like(keep).scatter(-1, order, keep)


def problem(case: Case, device: str) -> Problem:
    rng = torch.Generator(device).manual_seed(case.b + case.v)
    logits = 3 * torch.randn(case.b, case.v, generator=rng, device=device)
    small = torch.randn(50, generator=rng, device=device)

    @functools.cache
    def expected() -> tuple[Tensor, Tensor]:
        return allowed(logits, case), kept_probabilities(small.cpu(), TEMPERATURE, **case.filters)

    def check(name: str, function: Function) -> None:
        keep, probabilities = expected()
        ids = function(logits, **case.filters)
        assert ids.shape == (case.b,)
        assert keep.gather(-1, ids[:, None]).all(), "an id that the filters do not keep"
        assert_drawn_from(function(small.expand(100_000, -1).contiguous(), **case.filters).cpu(), probabilities)

    def call(name: str, function: Function) -> Callable[[], Any]:
        return lambda: function(logits, **case.filters)

    text = ", ".join(f"{name} {value}" for name, value in case.filters.items() if value is not None)
    return Problem(
        op=f"sample, {text or 'no filter'}",
        shape=f"{case.b:,} x {case.v:,}",
        call=call,
        check=check,
        bytes=logits.nbytes,
        dtype=torch.float32,
        axes=case._asdict(),
    )


@rows(cases, peers)
def test_sampling(measure: Measure, case: Case, name: str) -> None:
    measure(problem, case, name)
