"""Greedy generation: `wikigpt generate` and transformers' `generate`, the same random GPT-2 and the same tokens.

    pytest bench/bench_generation.py [--sizes smoke|default|full] [--device cpu|cuda]

Float32 on one CPU thread (a few rows gain little from threads, which on a shared machine wait long for each other), bf16 on a
GPU. The tokens of both are compared in float32 before anything is timed; time is what a caller waits, prompt included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from wikigpt import hub
from wikigpt.generate import generate

from .suite import Function, Measure, Peer, Problem, dtype_of, plain, rows

transformers = pytest.importorskip("transformers")


class Case(NamedTuple):
    n_layer: int
    n_embd: int
    vocab_size: int
    batch: int
    prompt: int
    new: int


def cases(device: str, sizes: str) -> list[Case]:
    return {
        ("cpu", "smoke"): [Case(2, 64, 1000, 2, 8, 16)],
        ("cpu", "default"): [Case(4, width, 33278, batch, 32, 128) for width in (128, 192) for batch in (1, 8)],
        ("cpu", "full"): [Case(4, width, 33278, batch, 32, 128) for width in (128, 192, 512) for batch in (1, 8, 32)],
        ("cuda", "check"): [Case(12, 768, 50257, 1, 128, 64)],
        ("cuda", "smoke"): [Case(2, 64, 1000, 2, 8, 16)],
        ("cuda", "default"): [Case(12, 768, 50257, batch, 128, 64) for batch in (1, 16, 64)],
        ("cuda", "full"): [Case(12, 768, 50257, batch, 128, 256) for batch in (1, 4, 16, 64, 256)],
    }[device, sizes]


def peers(case: Case, device: str, sizes: str) -> dict[str, Peer]:
    found = {"ours": plain(print), "transformers": plain(print)}
    if sizes == "full":  # it compiles the model, a minute each
        found["transformers, static cache"] = plain(print, device="cuda")
    return found


@pytest.fixture(autouse=True)
def _one_thread(device: str) -> Iterator[None]:
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def models(case: Case) -> tuple[Any, Any]:
    """The same random weights here and in transformers."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=case.vocab_size, n_positions=case.prompt + case.new, n_embd=case.n_embd, n_layer=case.n_layer,
        n_head=max(1, case.n_embd // 64), bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    # Without an end token it makes all the new tokens.
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    for p in theirs.parameters():
        # Wider than at the start of training, where every prompt leads to one repeated token.
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        return hub.from_pretrained(directory).eval(), theirs


def problem(case: Case, device: str) -> Problem:
    ours, theirs = (model.to(device) for model in models(case))
    dtype = dtype_of(device)
    prompts = torch.randint(case.vocab_size, (case.batch, case.prompt), generator=torch.Generator().manual_seed(1)).to(device)

    def run(name: str, count: int) -> list[list[int]]:
        if name == "ours":
            return generate(ours, prompts, count, temperature=0)
        options = {"cache_implementation": "static"} if "static" in name else {}
        mask = torch.ones_like(prompts)
        made = theirs.generate(prompts, attention_mask=mask, max_new_tokens=count, use_cache=True, do_sample=False, **options)
        return made[:, case.prompt :].tolist()

    expected = run("transformers", 16)

    def check(name: str, _: Function) -> None:
        assert run(name, 16) == expected, f"{name}: other tokens than transformers"

    def call(name: str, _: Function) -> Callable[[], Any]:
        (ours if name == "ours" else theirs).to(dtype)
        return lambda: run(name, case.new)

    return Problem(
        op="generation",
        shape=f"{case.n_layer} layers x {case.n_embd}, batch {case.batch}, {case.prompt} + {case.new} tokens",
        call=call,
        check=check,
        tokens=case.batch * case.new,
        dtype=dtype,
        wall=True,
        axes=case._asdict(),
    )


@rows(cases, peers)
def test_generation(measure: Measure, case: Case, name: str) -> None:
    measure(problem, case, name)
