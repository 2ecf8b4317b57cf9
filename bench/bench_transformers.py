"""transformers' Llama and GPT-2 as they are and after `patch(model)`: training step, forward, generation.

    pytest bench/bench_transformers.py [--sizes smoke|default|full] [--device cpu|cuda]

Random weights; float32 on a CPU, bf16 on a GPU; attention is PyTorch's in both. A training step is forward and backward
with labels, without an optimiser. Loss and gradients of the two are compared before they are timed, and they take turns.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from wikigpt.integrations.transformers import patch

from .conftest import Summary
from .timing import peak_bytes, replay, take_turns

transformers = pytest.importorskip("transformers")

# device, sizes -> [(width, layers, vocabulary, batch, length)]
SHAPES = {
    ("cpu", "smoke"): [(64, 2, 512, 2, 64)],
    ("cpu", "default"): [(64, 2, 512, 4, 128), (256, 4, 8192, 4, 128), (512, 4, 32000, 2, 256)],
    ("cpu", "full"): [(64, 2, 512, 4, 128), (256, 4, 8192, 4, 128), (512, 4, 32000, 2, 256), (768, 12, 50257, 2, 512)],
    ("cuda", "smoke"): [(256, 2, 8192, 4, 256)],
    ("cuda", "default"): [(768, 12, 50257, 8, 1024), (2048, 16, 128256, 4, 2048)],
    ("cuda", "full"): [(768, 12, 50257, 8, 1024), (2048, 16, 128256, 4, 2048), (4096, 8, 128256, 4, 4096)],
}
ROUNDS = {"smoke": 5, "default": 15, "full": 25}
FAMILIES = ("Llama", "GPT-2")
TASKS = ("training step", "forward", "generation of 16 tokens")
NAMES = ("ours", "transformers")


def build(family: str, width: int, layers: int, vocabulary: int, length: int) -> Any:
    heads = max(1, width // 64)
    torch.manual_seed(0)
    if family == "Llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4 // 32 * 32,
                num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), max_position_embeddings=length + 16,
                eos_token_id=None,
            )
        )  # fmt: skip
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, n_positions=length + 16, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None,
        )
    )  # fmt: skip


@functools.cache
def measure(device: str, sizes: str, family: str, shape: tuple[int, ...]) -> dict[str, dict[str, tuple[list[float], int]]]:
    """task -> name -> (seconds of each round, peak bytes of a call)."""
    width, layers, vocabulary, batch, length = shape
    plain = build(family, width, layers, vocabulary, length).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    ours = copy.deepcopy(plain)
    patch(ours)
    models = dict(zip(NAMES, (ours, plain)))
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)

    def training_step(model: Any) -> torch.Tensor:
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss

    @torch.no_grad()
    def forward(model: Any) -> torch.Tensor:
        return model(ids, use_cache=False).logits

    def generation(model: Any) -> torch.Tensor:
        return model.generate(ids[:1, :16], max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)

    tolerance: Any = {"rtol": 0.05, "atol": 0.02} if device == "cuda" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(*(training_step(model) for model in models.values()), **tolerance)
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, **tolerance)
    measured = {}
    tasks: tuple[Callable[[Any], Any], ...] = (training_step, forward, generation)
    for task, function in zip(TASKS, tasks):
        for model in models.values():
            model.train(function is training_step)
        calls = {name: functools.partial(function, model) for name, model in models.items()}
        seconds = take_turns(calls, device, ROUNDS[sizes])
        measured[task] = {name: (seconds[name], peak_bytes(call, device)) for name, call in calls.items()}
    return measured


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = metafunc.config.getoption("--sizes")
    device = metafunc.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = [
        (family, shape, task, name)
        for family in FAMILIES
        for shape in SHAPES[device, sizes]
        for task in TASKS
        for name in NAMES
    ]
    metafunc.parametrize(("family", "shape", "task", "name"), cases)


def test_model(
    benchmark: Any, summary: Summary, sizes: str, device: str, family: str, shape: tuple[int, ...], task: str, name: str
) -> None:
    seconds, peak = measure(device, sizes, family, shape)[task][name]
    width, layers, vocabulary, batch, length = shape
    group = f"{family}, {width} wide, {layers} layers, vocabulary {vocabulary}, batch {batch} x {length}: {task}"
    replay(benchmark, group, name, seconds)
    tokens = 16 if task == TASKS[2] else batch * length
    rate = tokens / statistics.median(seconds)
    benchmark.extra_info.update(device=device, tokens_per_second=rate, peak_bytes=peak)
    summary.add(f"{group}, on {device}", name, seconds, **{"tokens/s": f"{rate:,.0f}", "peak MiB": f"{peak / 2**20:,.0f}"})
