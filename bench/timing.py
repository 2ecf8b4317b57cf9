"""Durations of functions that take turns, on a CPU or by CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .conftest import ReplayClock

Functions = Mapping[str, Callable[[], Any]]


def take_turns(functions: Functions, device: str, rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` of every function: one call each in turn, so that a machine whose speed drifts slows all
    of them alike. On a GPU the L2 cache is overwritten before each call."""
    flush = torch.empty(2**28, dtype=torch.int8, device=device) if device == "cuda" else None
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warmup + rounds):
        for name, function in functions.items():
            duration = _on_gpu(function, flush) if flush is not None else _on_cpu(function)
            if i >= warmup:
                seconds[name].append(duration)
    return seconds


def _on_cpu(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _on_gpu(function: Callable[[], Any], flush: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Overwriting the cache takes longer than a launch: the events lie on the GPU before it gets to them.
    flush.zero_()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """What a call allocates beyond what was there, at most; 0 on a CPU."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def replay(benchmark: Any, group: str, name: str, seconds: list[float]) -> None:
    """Hand durations measured elsewhere to pytest-benchmark, so that its statistics, comparisons and files work."""
    left, clock = iter(seconds), ReplayClock()
    benchmark._timer = clock

    def step() -> None:
        clock.now += next(left)

    benchmark.group, benchmark.name = group, name
    benchmark.pedantic(step, rounds=len(seconds), iterations=1)
