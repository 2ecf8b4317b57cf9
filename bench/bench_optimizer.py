"""One step of AdamW with clipping by the global norm, for the parameters of a GPT: ours against PyTorch's three ways.

    pytest bench/bench_optimizer.py [--sizes smoke|default|full] [--device cpu|cuda]

Float32. GB/s counts 32 bytes a parameter: the gradient is read twice (no coefficient before the norm is known), parameter and
moments are read and written. On a GPU also with the time of the host, which is what a step outside a CUDA graph takes. Every
implementation is compared with float64 over three steps of small tensors before it is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from wikigpt.kernels import FusedAdamW
from wikigpt.kernels.roofline import parameters_in_words

from wikigpt import kernels
from wikigpt.model import GPT, GPTConfig

from .suite import Function, Measure, Peer, Problem, assert_right, plain, rows

CLIP = 1.0
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
GIANT = 300_000_000  # parameters from which the tensors of all implementations are the same ones, or memory would not hold them


class Case(NamedTuple):
    n_layer: int
    n_embd: int
    vocab_size: int
    host: bool  # the host's time counts


SIZES = {"tiny": (2, 64, 1000), "10M": (6, 256, 20_000), "124M": (12, 768, 50_257), "1B": (24, 1792, 50_257)}


def cases(device: str, sizes: str) -> list[Case]:
    names = {"smoke": ["tiny"], "check": ["124M"], "default": ["10M", "124M"], "full": ["10M", "124M", "1B"]}[sizes]
    if device == "cpu":
        return [Case(*SIZES[name], host=True) for name in names if name != "1B"]
    return [Case(*SIZES[name], host=host) for host in (False, True) for name in names]


# --- implementations: each of (parameters that have gradients), giving the function that takes a step -------------------------


def ours(params: list[Tensor]) -> Callable[[], Any]:
    return FusedAdamW(params, **OPTIONS, max_grad_norm=CLIP).step


def ours_by(backend: str, params: list[Tensor]) -> Callable[[], Any]:
    step = ours(params)

    def forced() -> None:
        with kernels.backend(backend):
            step()

    return forced


def of_torch(params: list[Tensor], fused: bool | None = None, foreach: bool | None = None) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(params, **OPTIONS, fused=fused, foreach=foreach)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, CLIP, foreach=foreach)
        optimizer.step()

    return step


PEERS = {
    "ours": plain(ours),
    "ours, Triton": plain(functools.partial(ours_by, "triton"), device="cuda"),
    "ours, torch operators": plain(functools.partial(ours_by, "torch")),
    "torch fused": plain(functools.partial(of_torch, fused=True)),
    "torch foreach": plain(functools.partial(of_torch, foreach=True)),
    "torch for-loop": plain(functools.partial(of_torch, foreach=False)),
}


@functools.cache
def shapes(case: Case) -> list[torch.Size]:
    config = GPTConfig(
        vocab_size=case.vocab_size,
        n_layer=case.n_layer,
        n_head=max(1, case.n_embd // 64),
        n_embd=case.n_embd,
        context_length=1024,
    )
    with torch.device("meta"):
        return [p.shape for p in GPT(config).parameters()]


def tensors(shapes: list[torch.Size], device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator(device).manual_seed(0)
    params = [torch.randn(shape, generator=rng, device=device).mul_(0.02).to(dtype).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng, device=device).mul_(1e-3).to(dtype)
    return params


def problem(case: Case, device: str) -> Problem:
    of_case = shapes(case)
    count = sum(shape.numel() for shape in of_case)

    def three_steps(make: Function, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        params = tensors([torch.Size((70, 300)), torch.Size((13,))], device, dtype)
        step = make(params)
        for i in range(3):
            for p in params:
                p.grad = torch.cos(p.detach().to(torch.float64) * 100 + i).to(dtype)
            step()
        return [p.detach() for p in params]

    def check(name: str, function: Function) -> None:
        simple, truth = (three_steps(PEERS["torch for-loop"].make(), d) for d in (torch.float32, torch.float64))
        assert_right(name, three_steps(function), simple, truth, absolute=1e-8)

    @functools.cache
    def shared() -> list[Tensor]:
        return tensors(of_case, device)

    def call(name: str, function: Function) -> Callable[[], Any]:
        return function(shared() if count >= GIANT else tensors(of_case, device))

    return Problem(
        op=f"AdamW with clipping{', with the time of the host' if case.host and device == 'cuda' else ''}",
        shape=f"{parameters_in_words(count)} in {len(of_case)} tensors",
        call=call,
        check=check,
        bytes=32 * count,
        wall=case.host,
        axes=case._asdict(),
    )


def peers(case: Case, device: str, sizes: str) -> dict[str, Peer]:
    return {name: peer for name, peer in PEERS.items() if sizes != "check" or name != "torch for-loop"}


@rows(cases, peers)
def test_optimizer(measure: Measure, case: Case, name: str) -> None:
    measure(problem, case, name)
