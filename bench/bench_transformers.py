"""transformers' Llama and GPT-2 as they are and after `patch(model)`: training step, forward, generation.

    pytest bench/bench_transformers.py [--sizes smoke|default|full] [--device cpu|cuda]

Random weights; float32 on a CPU, bf16 on a GPU; attention is PyTorch's in both. A training step is forward and backward with
labels, without an optimiser. Loss and gradients of the two are compared before they are timed. Time is what a caller waits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from wikigpt.integrations.transformers import patch

from .suite import Function, Measure, Peer, Problem, dtype_of, plain, rows

transformers = pytest.importorskip("transformers")


class Case(NamedTuple):
    family: str
    task: str
    width: int
    layers: int
    vocabulary: int
    batch: int
    length: int


# device, sizes -> [(width, layers, vocabulary, batch, length)]
SHAPES = {
    ("cpu", "smoke"): [(64, 2, 512, 2, 64)],
    ("cpu", "default"): [(64, 2, 512, 4, 128), (256, 4, 8192, 4, 128), (512, 4, 32000, 2, 256)],
    ("cpu", "full"): [(64, 2, 512, 4, 128), (256, 4, 8192, 4, 128), (512, 4, 32000, 2, 256), (768, 12, 50257, 2, 512)],
    ("cuda", "smoke"): [(256, 2, 8192, 4, 256)],
    ("cuda", "check"): [(768, 12, 50257, 8, 1024)],
    ("cuda", "default"): [(768, 12, 50257, 8, 1024), (2048, 16, 128256, 4, 2048)],
    ("cuda", "full"): [(768, 12, 50257, 8, 1024), (2048, 16, 128256, 4, 2048), (4096, 8, 128256, 4, 4096)],
}
FAMILIES = ("Llama", "GPT-2")
TASKS = ("training step", "forward", "generation of 16 tokens")
PEERS = {"ours": plain(print), "transformers": plain(print)}


def cases(device: str, sizes: str) -> list[Case]:
    return [Case(family, task, *shape) for family in FAMILIES for shape in SHAPES[device, sizes] for task in TASKS]


def build(case: Case) -> Any:
    heads = max(1, case.width // 64)
    torch.manual_seed(0)
    if case.family == "Llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=case.vocabulary, hidden_size=case.width, intermediate_size=case.width * 11 // 4 // 32 * 32,
                num_hidden_layers=case.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
                max_position_embeddings=case.length + 16, eos_token_id=None,
            )
        )  # fmt: skip
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=case.vocabulary, n_embd=case.width, n_layer=case.layers, n_head=heads,
            n_positions=case.length + 16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None,
        )
    )  # fmt: skip


def problem(case: Case, device: str) -> Problem:
    dtype = dtype_of(device)
    theirs = build(case).to(device, dtype)
    patched = copy.deepcopy(theirs)
    patch(patched)
    models = {"ours": patched, "transformers": theirs}
    shape = (case.batch, case.length)
    ids = torch.randint(case.vocabulary, shape, generator=torch.Generator().manual_seed(1)).to(device)

    def training_step(model: Any) -> Tensor:
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss

    @torch.no_grad()
    def forward(model: Any) -> Tensor:
        return model(ids, use_cache=False).logits

    def generation(model: Any) -> Tensor:
        return model.generate(ids[:1, :16], max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)

    task = dict(zip(TASKS, (training_step, forward, generation)))[case.task]

    def check(name: str, _: Function) -> None:
        tolerance: Any = {"rtol": 0.05, "atol": 0.02} if device == "cuda" else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(training_step(models[name]), training_step(theirs), **tolerance)
        for a, b in zip(models[name].parameters(), theirs.parameters()):
            torch.testing.assert_close(a.grad, b.grad, **tolerance)

    def call(name: str, _: Function) -> Callable[[], Any]:
        models[name].train(case.task == TASKS[0])
        return lambda: task(models[name])

    return Problem(
        op=f"patched {case.family}, {case.task}",
        shape=f"{case.layers} layers x {case.width}, vocabulary {case.vocabulary:,}, {case.batch} x {case.length}",
        call=call,
        check=check,
        tokens=16 if case.task == TASKS[2] else case.batch * case.length,
        dtype=dtype,
        wall=True,
        axes=case._asdict(),
    )


def peers(case: Case, device: str, sizes: str) -> dict[str, Peer]:
    return PEERS


@rows(cases, peers)
def test_model(measure: Measure, case: Case, name: str) -> None:
    measure(problem, case, name)
