"""A whole training step (forward, backward, clipping, optimiser): ours against three peers, same sizes, batch, precision.

    pytest bench/bench_training.py [--sizes smoke|default|full] [--device cpu|cuda]

Every implementation runs in a process of its own; the processes take turns, one step each, so that a machine whose speed
drifts slows all of them alike. Ours, plain and transformers hold the same weights, and their losses are compared before
anything is timed. Targets on a CPU: >= 2x plain-sdpa and transformers in float32, >= 1.6x in bf16, >= 3x the seed model.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

import pytest

from .conftest import ROOT, Summary
from .timing import replay
from .training_worker import IMPLEMENTATIONS

_W128 = {
    "vocab_size": 33278,
    "context_length": 256,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "batch_size": 8,
}
_W192 = {**_W128, "n_embd": 192}
_W512 = {
    "vocab_size": 33278,
    "context_length": 128,
    "n_layer": 6,
    "n_head": 8,
    "n_embd": 512,
    "batch_size": 8,
}
_SMOKE = {"vocab_size": 2000, "context_length": 64, "n_layer": 2, "n_head": 2, "n_embd": 32, "batch_size": 4}

SIZES = {
    "smoke": {"w32": _SMOKE},
    "default": {"w128": _W128},
    "full": {"w128": _W128, "w192": _W192, "w512": _W512},
}
ROUNDS = {"smoke": 3, "default": 9, "full": 9}


def worker(name: str, size: dict[str, int], precision: str, device: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.training_worker"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    ask(process, json.dumps({"name": name, "size": size, "precision": precision, "device": device}))
    return process


def ask(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


_measured: dict[tuple[str, str], dict[str, list[dict[str, float]]]] = {}


def measure(label: str, precision: str, sizes: str, device: str) -> dict[str, list[dict[str, float]]]:
    """Seconds and peak memory of every implementation, measured in turn, once per group."""
    key = (label, precision)
    if key not in _measured:
        size = SIZES[sizes][label]
        workers = {name: worker(name, size, precision, device) for name in IMPLEMENTATIONS}
        losses = {name: answer(process)["loss"] for name, process in workers.items()}
        tolerance = 1e-4 if precision == "fp32" else 2e-2
        assert losses["ours"] == pytest.approx(losses["plain-sdpa"], rel=tolerance)
        # Its labels are shifted by one, so the loss is that of nearly, not quite, the same tokens.
        assert losses["transformers"] == pytest.approx(losses["plain-sdpa"], rel=2e-2)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for i in range(ROUNDS[sizes] + 2):
            for name, process in workers.items():
                ask(process, "step")
                figures = answer(process)
                if i >= 2:  # the first steps allocate
                    rounds[name].append(figures)
        for process in workers.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=60)
        _measured[key] = rounds
    return _measured[key]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = metafunc.config.getoption("--sizes")
    groups = [(label, precision) for label in SIZES[sizes] for precision in ("fp32", "bf16")]
    cases = [(label, precision, name) for label, precision in groups for name in IMPLEMENTATIONS]
    metafunc.parametrize(("label", "precision", "name"), cases)


def test_training_step(
    benchmark: Any, summary: Summary, sizes: str, device: str, label: str, precision: str, name: str
) -> None:
    rounds = measure(label, precision, sizes, device)[name]
    size = SIZES[sizes][label]
    durations = [r["seconds"] for r in rounds]
    replay(benchmark, f"training step {label} {precision}", name, durations)
    tokens = size["batch_size"] * size["context_length"]
    peak = max(r["peak_bytes"] for r in rounds)
    rate = tokens / statistics.median(durations)
    benchmark.extra_info.update(size, tokens_per_second=rate, peak_bytes=peak, precision=precision, device=device)
    summary.add(
        f"training step, {label} {precision}, {tokens} tokens, on {device}",
        name,
        durations,
        **{"tokens/s": f"{rate:,.0f}", "peak MiB": f"{peak / 2**20:,.0f}"},
    )
