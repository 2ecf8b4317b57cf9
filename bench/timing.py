"""Durations by the device's own clock, of functions that take turns; peak memory; the ceilings of the machine.

A sample on a GPU is the mean of some calls, each between two CUDA events and each after the L2 cache was filled with clean
lines of other data: to write over it would leave lines that the timed kernel has to write back. A kernel that spins holds the
device back until the host has queued the whole sample, and a sample whose first call had begun before is taken again: so the
launches' time on the host, which is as long as many kernels, is in none of them.

Functions take turns, a sample each, so that a machine whose speed drifts slows all of them alike.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import FAKE

Call = Callable[[], Any]

# A sample lasts at least this long, where calls are short enough for more than one of them to be its mean.
SAMPLE_SECONDS = {"cpu": 1e-3, "cuda": 2e-4}
MOST_CALLS = {"cpu": 200, "cuda": 16}  # those of a GPU have to fit into its queue of launches
LONGEST_HOLD = 0.5


@dataclass
class Samples:
    """Seconds of one call, a figure from each round."""

    seconds: list[float] = field(default_factory=list)
    calls: int = 1  # whose mean a figure is
    hold: float = 0.0  # seconds for which the device is held back before a sample
    with_host: bool = False  # the function waits for the device itself, so host time could not be kept out

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class WallClock:
    """What a caller waits for: host time, on a GPU up to the end of the work."""

    def __init__(self, device: str):
        self.device = device
        self.synchronize: Call = torch.cuda.synchronize if device == "cuda" else lambda: None

    def measure(self, call: Call, samples: Samples) -> float:
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(samples.calls):
            call()
        self.synchronize()
        return (time.perf_counter() - begin) / samples.calls

    def plan(self, call: Call) -> Samples:
        seconds = self.measure(call, Samples())
        return Samples(calls=_calls(seconds, self.device))


class EventClock:
    """What the device works: CUDA events around each call, with a cold cache and no time of the host."""

    WARM_SECONDS = 0.05  # of matrix products: an idle GPU runs at a sixth of its clock

    def __init__(self) -> None:
        size = 2**16 if FAKE else max(2**28, 4 * torch.cuda.get_device_properties(0).L2_cache_size)
        self.cache = torch.zeros(size // 4, dtype=torch.int32, device="cuda")  # only ever read from here on
        self.most = torch.zeros((), dtype=torch.int32, device="cuda")
        self.cycles_per_second = self._cycles_per_second()

    def _cycles_per_second(self) -> float:
        a = torch.randn(*(2 * [64 if FAKE else 4096]), device="cuda", dtype=torch.bfloat16)
        out = torch.empty_like(a)
        torch.cuda.synchronize()
        since = time.perf_counter()
        while time.perf_counter() - since < self.WARM_SECONDS:
            for _ in range(20):
                torch.mm(a, a, out=out)
            torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = 10_000_000
        for _ in range(2):  # the first loads the kernel
            begin.record()
            torch.cuda._sleep(cycles)
            end.record()
        end.synchronize()
        return cycles / (begin.elapsed_time(end) / 1e3)

    def _evict(self) -> None:
        """Fill the L2 cache with clean lines."""
        torch.amax(self.cache, dim=0, out=self.most)

    def _sample(self, call: Call, calls: int, hold: float) -> tuple[float, float, bool]:
        """(device seconds of a call, host seconds to queue all of them, whether the device waited for the last launch)."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda.synchronize()
        torch.cuda._sleep(int(hold * self.cycles_per_second))
        since = time.perf_counter()
        for begin, end in events:
            self._evict()
            begin.record()
            call()
            end.record()
        host = time.perf_counter() - since
        held = not events[0][0].query()
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / 1e3 / calls, host, held

    def measure(self, call: Call, samples: Samples) -> float:
        while True:
            seconds, host, held = self._sample(call, samples.calls, samples.hold)
            if held or samples.with_host:
                return seconds
            samples.hold = max(2 * samples.hold, 2 * host)
            if samples.hold > LONGEST_HOLD:
                samples.calls, samples.hold, samples.with_host = 1, 0.0, True

    def plan(self, call: Call) -> Samples:
        samples = Samples(hold=1e-3)
        seconds = self.measure(call, samples)
        if not samples.with_host:
            _, host, _ = self._sample(call, 1, samples.hold)
            samples.calls = _calls(seconds, "cuda")
            samples.hold = 1e-4 + 1.5 * host * samples.calls
        return samples


def _calls(seconds: float, device: str) -> int:
    return max(1, min(MOST_CALLS[device], math.ceil(SAMPLE_SECONDS[device] / max(seconds, 1e-9))))


def take_turns(
    calls: Mapping[str, Call], device: str, rounds: int, *, wall: bool = False, limit: float = math.inf
) -> dict[str, Samples]:
    """`rounds` samples of every function, in turn; fewer, but 3 at least, where they last longer than `limit` seconds.

    By CUDA events on a GPU, unless `wall` asks for what a caller waits.
    """
    clock = WallClock(device) if wall or device == "cpu" else EventClock()
    collects = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would be one implementation's sample, and of another's garbage
    try:
        for call in calls.values():
            _warm(call, device)
        samples = {name: clock.plan(call) for name, call in calls.items()}
        begin = time.perf_counter()
        for i in range(rounds):
            if i >= 3 and time.perf_counter() - begin > limit:
                break
            for name, call in calls.items():
                samples[name].seconds.append(clock.measure(call, samples[name]))
    finally:
        if collects:
            gc.enable()
    return samples


def _warm(call: Call, device: str) -> None:
    """Allocations, caches and clocks: three calls, one where calls are long."""
    begin = time.perf_counter()
    for _ in range(3):
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if time.perf_counter() - begin > 0.5:
            break


def peak_bytes(call: Call, device: str) -> int:
    """The most that a call has allocated at one time, beyond what was there before it, through PyTorch's allocators."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return most


# --- ceilings -------------------------------------------------------------------------------------------------------


@functools.cache
def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one product of large square matrices of random numbers."""
    n = 8192 if device == "cuda" and not FAKE else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / take_turns({"": lambda: a @ b}, device, 15)[""].median


@functools.cache
def copy_ceiling(device: str) -> float:
    """Bytes per second of one large copy, those read and those written."""
    a = torch.empty(2**30 if device == "cuda" and not FAKE else 2**27, dtype=torch.int8, device=device).random_()
    b = torch.empty_like(a)
    return 2 * a.numel() / take_turns({"": lambda: b.copy_(a)}, device, 15)[""].median
