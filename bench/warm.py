"""Compile beforehand, with cores that have nothing else to do, what benchmarks and training are about to launch.

    python -m bench.warm [--sizes check|smoke] [--processes 6]

Calls every problem of the benchmarks once, of ours alone: the launches are the ones that will be measured, so the compiled
kernels lie in Triton's cache under the keys that will be looked for. It runs beside parts that measure no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import machine
from .suite import Peer, Problem, ours

# In the order in which gpu-check measures them: file -> its tests and what makes their problems.
FILES = {
    "attention": {"test_attention": "problem", "test_decode": "decode_problem"},
    "norm": {"test_norm": "problem"},
    "linear_cross_entropy": {"test_linear_cross_entropy": "problem", "test_cross_entropy": "logits_problem"},
    "activation": {"test_activation": "problem"},
    "rotary": {"test_rotary": "problem"},
}
Task = tuple[str, Callable[[], None]]  # what it is called, and what compiles it


def tasks(sizes: str) -> Iterator[Task]:
    yield "training", functools.partial(train, sizes)
    for file, tests in FILES.items():
        module = importlib.import_module(f"bench.bench_{file}")
        for name, build in tests.items():
            test = getattr(module, name)
            for case in test.cases("cuda", sizes):
                for peer, made in test.peers(case, "cuda", sizes).items():
                    if ours(peer) and made.missing("cuda") is None:
                        yield f"{name}, {case}, {peer}", functools.partial(call, getattr(module, build), case, peer, made)


def call(build: Callable[[Any, str], Problem], case: Any, name: str, peer: Peer) -> None:
    build(case, "cuda").call(name, peer.make())()


def train(sizes: str) -> None:
    """Forward and backward of the models that are trained, one layer of each, as they are trained."""
    from wikigpt.config import resolve
    from wikigpt.model import GPT, GPTConfig

    from .bench_training import SMOKE, WIKITEXT, Case

    case = Case(*(SMOKE if sizes == "smoke" else WIKITEXT), "bf16")
    shape: dict[str, Any] = {key: getattr(case, key) for key in ("vocab_size", "context_length", "n_head", "n_embd")}
    preset = resolve("wikitext-2").model
    preset.vocab_size = case.vocab_size
    for config in (GPTConfig(n_layer=1, **shape), dataclasses.replace(preset, n_layer=1)):
        model = GPT(config).to("cuda").train()
        ids = torch.zeros(2, 64, dtype=torch.int64, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, ids)
        loss.backward()


def compile_share(sizes: str, part: int, parts: int) -> None:
    """Every parts-th task, in this process. What fails here is found again, and told, when it is measured."""
    for i, (name, act) in enumerate(tasks(sizes)):
        if i % parts == part:
            begin = time.perf_counter()
            try:
                act()
            except Exception as error:  # whatever stands in the way of one, the others are still worth compiling
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
            else:
                print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
            gc.collect()
            torch.cuda.empty_cache()  # others need the memory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=("check", "smoke"), default="check")
    parser.add_argument("--device", choices=("cuda",), default="cuda")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.part is not None:
        compile_share(args.sizes, args.part, args.processes)
        return 0
    command = [sys.executable, "-m", "bench.warm", "--sizes", args.sizes, "--processes", str(args.processes), "--part"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    share = [subprocess.Popen([*command, str(i)], cwd=machine.ROOT, env=environment) for i in range(args.processes)]
    return max(process.wait() for process in share)


if __name__ == "__main__":
    sys.exit(main())
