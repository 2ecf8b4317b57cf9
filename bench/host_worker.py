"""Host time of calls, in a process with a fake GPU: from the call to the launch, which is noted nowhere and does nothing.

Reads JSON lines {"case": [op, mode], "rounds": n}, answers {name: [seconds of a call, one figure from each round]}: process CPU
time, which a busy machine disturbs least, in rounds that take turns.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench import fake_gpu

RECORDER = fake_gpu.install_if_asked()  # before anything imports wikigpt.kernels

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from wikigpt import kernels  # noqa: E402

Call = Callable[[], Any]
SAMPLE = 2e-3  # seconds of CPU time of a sample, at least


def leaf(*shape: int) -> Tensor:
    """Small and float32, because what PyTorch computes on the CPU is in the peers' time."""
    return torch.randn(*shape, device="cuda", requires_grad=True)


def target(rows: int = 8) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64, device="cuda")


# --- what is called: op -> (leaves, {name: function of them}) -------------------------------------------------------

Setting = tuple[list[Tensor], dict[str, Callable[..., Tensor]]]


def rms_norm() -> Setting:
    peers = {"F.rms_norm": lambda x, w: F.rms_norm(x, (64,), w), "F.layer_norm": lambda x, w: F.layer_norm(x, (64,), w)}
    return [leaf(8, 64), leaf(64)], {"ours": kernels.rms_norm, **peers}


def layer_norm() -> Setting:
    leaves = [leaf(8, 64), leaf(64), leaf(64)]
    return leaves, {"ours": kernels.layer_norm, "F.layer_norm": lambda x, w, b: F.layer_norm(x, (64,), w, b)}


def flash_attn_func() -> Setting:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.flash_attn_func(q, k, v, causal=True)

    # As many heads as positions: each function may take the tensors for its own layout.
    return [leaf(1, 4, 4, 64) for _ in range(3)], {"ours": ours, "SDPA": sdpa}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def scaled_dot_product_attention() -> Setting:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.scaled_dot_product_attention(q, k, v, is_causal=True)

    return [leaf(1, 4, 4, 64) for _ in range(3)], {"ours": ours, "SDPA": sdpa}


def kvcache() -> Setting:
    """A token more: its key and value into the cache, then attention over it, in splits."""
    q, k = leaf(1, 1, 2, 64), leaf(1, 1, 2, 64)
    cache = torch.zeros(1, 4096, 2, 64, device="cuda")
    values = cache.clone()
    small, small_values = cache[:, :16].clone(), values[:, :16].clone()  # the peer reads all of it
    used = torch.full((1,), 8, dtype=torch.int32, device="cuda")

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return kernels.flash_attn_with_kvcache(q, cache, values, k, k, cache_seqlens=used, causal=True)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        small[:, 8:9], small_values[:, 8:9] = k, k
        keys, rows = small[:, :9].transpose(1, 2), small_values[:, :9].transpose(1, 2)
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, rows).transpose(1, 2)

    return [q, k], {"ours": ours, "two slices, SDPA": plain}


def swiglu() -> Setting:
    return [leaf(8, 64), leaf(8, 64)], {"ours": kernels.swiglu, "F.silu(a) * b": lambda a, b: F.silu(a) * b}


def apply_rotary_emb() -> Setting:
    cos = torch.ones(16, 32, device="cuda")

    def ours(x: Tensor) -> Tensor:
        return kernels.apply_rotary_emb(x, cos, cos)

    def plain(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * cos, x2 * cos + x1 * cos), dim=-1)

    return [leaf(1, 2, 16, 64)], {"ours": ours, "chunk, products, cat": plain}


def cross_entropy() -> Setting:
    labels = target()

    def ours(logits: Tensor) -> Tensor:
        return kernels.cross_entropy(logits, labels)

    return [leaf(8, 128)], {"ours": ours, "F.cross_entropy": lambda logits: F.cross_entropy(logits, labels)}


def linear_cross_entropy() -> Setting:
    labels = target()

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(x, weight, labels)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), labels)

    return [leaf(8, 64), leaf(128, 64)], {"ours": ours, "F.linear, F.cross_entropy": plain}


def adamw_step() -> Setting:
    def steps(optimizer: Callable[..., Any]) -> Callable[..., Any]:
        params = [torch.nn.Parameter(torch.zeros(64, device="cuda")) for _ in range(40)]
        for p in params:
            p.grad = torch.ones_like(p)
        return optimizer(params).step

    peer = steps(lambda params: torch.optim.AdamW(params, fused=True))
    return [], {"ours": steps(kernels.FusedAdamW), "torch.optim.AdamW(fused)": peer}


def sample() -> Setting:
    logits = torch.randn(2, 128, device="cuda")

    def plain() -> Tensor:
        values, ids = logits.topk(50)
        return ids.gather(-1, torch.multinomial(values.softmax(-1), 1))

    return [], {"ours": lambda: kernels.sample(logits, top_k=50), "topk, multinomial": plain}


SETTINGS: dict[str, Callable[[], Setting]] = {
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "flash_attn_func": flash_attn_func,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "kvcache append + decode": kvcache,
    "swiglu": swiglu,
    "apply_rotary_emb": apply_rotary_emb,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "AdamW step": adamw_step,
    "sample": sample,
}

# --- measuring ------------------------------------------------------------------------------------------------------


def calls(op: str, mode: str) -> dict[str, Call]:
    leaves, functions = SETTINGS[op]()
    if mode == "no grad":
        leaves = [tensor.detach() for tensor in leaves]

    def forward(function: Callable[..., Tensor]) -> Call:
        return lambda: function(*leaves)

    def both(function: Callable[..., Tensor]) -> Call:
        grad = torch.ones_like(function(*leaves))
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    return {name: (both if mode == "forward + backward" else forward)(function) for name, function in functions.items()}


def seconds_of(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        begin = time.process_time()
        made = 0
        while (spent := time.process_time() - begin) < SAMPLE / 4:
            call()
            made += 1
        repeats[name] = max(5, round(made * SAMPLE / spent))
    found: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _, (name, call) in itertools.product(range(rounds), calls.items()):
            begin = time.process_time()
            for _ in range(repeats[name]):
                call()
            found[name].append((time.process_time() - begin) / repeats[name])
    finally:
        gc.enable()
    return found


def answers(lines: Iterator[str]) -> Iterator[dict[str, list[float]]]:
    assert RECORDER is not None, f"no {fake_gpu.ASKED} in the environment"
    torch.set_num_threads(1)
    with RECORDER.uncounted():
        for line in lines:
            asked = json.loads(line)
            op, mode = asked["case"]
            with torch.set_grad_enabled(mode != "no grad"):
                yield seconds_of(calls(op, mode), asked["rounds"])


if __name__ == "__main__":
    # What libraries print goes to the console, what is answered to whoever asked.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for answer in answers(iter(sys.stdin.readline, "")):
        print(json.dumps(answer), file=out, flush=True)
