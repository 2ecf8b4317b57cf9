"""A whole training step (forward, backward, clipping, optimiser): ours against four peers, same sizes, batch and precision.

    pytest bench/bench_training.py [--sizes smoke|default|full] [--device cpu|cuda]

"ours" is the step of `wikigpt train`, its data included, on a GPU the whole step as one CUDA graph ("ours, eager": without,
"ours, compiled": torch.compile inside the graph, as the presets for a GPU do); the peers see one batch again and again. "plain
PyTorch" is SDPA and fused AdamW; "vocabulary padded" rounds its 33,278 words up to a multiple of 64, because the rows of logits
are otherwise aligned to 4 bytes, for which cuBLAS has slow kernels alone: whoever tunes plain PyTorch pads. "seed document" is
the model code this project started from. Every implementation runs in a
process of its own; the processes take turns, some steps each, so that a machine whose speed drifts slows all of them alike.
Ours, PyTorch's and transformers' hold the same weights, and their losses are compared before anything is timed. Time is what a
caller waits. TFLOP/s counts 6 per weight and token and PaLM's term for attention; MFU is that part of the bf16 peak in the
data sheet. Peak memory is the GPU's, on a CPU that of
the whole process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import FAKE, machine
from .suite import Function, Measure, Peer, Problem, Row, fill, guarded, plain, rows
from .timing import Samples


class Case(NamedTuple):
    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    n_embd: int
    batch_size: int
    precision: str


SMOKE = (2000, 64, 2, 2, 32, 4)
W128 = (33278, 256, 4, 4, 128, 8)
W192 = (33278, 256, 4, 4, 192, 8)
W512 = (33278, 128, 6, 8, 512, 8)
WIKITEXT = (33278, 512, 6, 8, 512, 32)  # the model of the preset wikitext-2, as GPT-2 would be built
GPT2 = (50257, 1024, 12, 12, 768, 16)
MEDIUM = (50257, 1024, 24, 16, 1024, 8)
SIZES = {
    ("cpu", "smoke"): [SMOKE],
    ("cpu", "default"): [W128],
    ("cpu", "full"): [W128, W192, W512],
    ("cuda", "smoke"): [SMOKE],
    ("cuda", "check"): [WIKITEXT],
    ("cuda", "default"): [WIKITEXT, GPT2],
    ("cuda", "full"): [WIKITEXT, GPT2, MEDIUM],
}
PLAIN = "plain PyTorch"
ROUNDS = {"smoke": 3, "check": 7, "default": 9, "full": 15}
STEPS = {"cpu": 1, "cuda": 5}  # in a turn: on a GPU the host runs ahead within it, as in training
WARMUP = {"cpu": 2, "cuda": 6}  # compiles, allocates, captures


def cases(device: str, sizes: str) -> list[Case]:
    precisions = ("bf16",) if device == "cuda" else ("fp32",) if sizes == "smoke" else ("fp32", "bf16")
    return [Case(*size, precision) for size in SIZES[device, sizes] for precision in precisions]


def peers(case: Case, device: str, sizes: str) -> dict[str, Peer]:
    names = ["ours", PLAIN, "transformers", "seed document"]
    if device == "cuda":
        names[1:1] = ["ours, eager", "ours, compiled"]
    if sizes != "smoke":  # a compiler's minute
        names[-2:-2] = ["plain PyTorch, compiled"]
        if device == "cuda" and case.vocab_size % 64:
            names[-2:-2] = ["plain PyTorch, vocabulary padded, compiled"]
    if sizes == "check":
        names = [name for name in names if name not in ("ours, compiled", "transformers", "seed document")]
    return {name: plain(print) for name in names}


def flops(case: Case) -> float:
    """Of a step: GPT.flops_per_token for the architecture that all of them but the seed document's share."""
    matmul = 12 * case.n_layer * case.n_embd**2 + case.vocab_size * case.n_embd
    per_token = 6 * matmul + 12 * case.n_layer * case.n_embd * case.context_length
    return per_token * case.batch_size * case.context_length


class Worker:
    """A process that trains one implementation; it dies with this one."""

    def __init__(self, name: str, case: Case, device: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.training_worker"],
            cwd=machine.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        size = case._asdict()
        self.ask(json.dumps({"name": name, "size": size, "precision": size.pop("precision"), "device": device}))

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, float]:
        """RuntimeError where the process has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with code {self.process.wait()}; its last words stand above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def problem(case: Case, device: str) -> Problem:
    def nothing(name: str, function: Function) -> Callable[[], Any]:
        raise NotImplementedError

    return Problem(
        op=f"training step, {case.precision}",
        shape=f"{case.n_layer} layers x {case.n_embd}, {case.batch_size} x {case.context_length} tokens, "
        f"vocabulary {case.vocab_size:,}",
        call=nothing,
        check=lambda name, function: None,
        flops=flops(case),
        tokens=case.batch_size * case.context_length,
        dtype=torch.bfloat16 if case.precision == "bf16" and device == "cuda" else torch.float32,
        wall=True,
        axes=case._asdict(),
    )


def measure_processes(
    case: Case, names: list[str], device: str, sizes: str, done: Callable[[Row], None] = lambda row: None
) -> dict[str, Row]:
    """A row for each name, handed to `done` after each of its turns from the third on. The losses of the first batch are
    compared with those of "plain PyTorch", which is always asked."""
    shared = problem(case, device)
    found = {name: Row(shared.op, shared.shape, name) for name in names}
    workers = {name: Worker(name, case, device) for name in dict.fromkeys([*names, PLAIN])}
    try:
        answers = {name: guarded(row, workers[name].answer) for name, row in found.items()}
        plain_loss = (answers.get(PLAIN) or workers[PLAIN].answer())["loss"]
        for name, row in found.items():
            # transformers shifts its labels by one, so its loss is that of nearly, not quite, the same tokens.
            tolerance = 1e-4 if case.precision == "fp32" and name != "transformers" else 2e-2
            loss = plain_loss if answers[name] is None else answers[name]["loss"]
            if "padded" in name:  # its weights have other shapes and so other random numbers
                tolerance = 2e-2
            if FAKE:  # a fake GPU computes nothing
                continue
            if name != "seed document" and not abs(loss / plain_loss - 1) <= tolerance:
                row.wrong = f"{name}: loss {loss}, plain PyTorch's {plain_loss} ({shared.group})"
        samples = {name: Samples(calls=STEPS[device]) for name in names}
        peaks: dict[str, int] = {}
        for i in range(ROUNDS[sizes] + 1):
            for name, row in found.items():
                if row.cannot is not None or (answers[name] is None and row.wrong is not None):
                    continue
                workers[name].ask(str(WARMUP[device] if i == 0 else STEPS[device]))
                figures = guarded(row, workers[name].answer)
                if figures is None:
                    continue
                if (reason := figures.get("no_graph")) is not None:
                    row.wrong = f"{name} captured no CUDA graph: {reason}"
                if i > 0:
                    samples[name].seconds.append(figures["seconds"])
                    peaks[name] = int(figures["peak_bytes"])
                if i >= 3:  # what a later round adds takes the place of this
                    finish(row, shared, device, samples[name], peaks[name])
                    done(row)
    finally:
        for worker in workers.values():
            worker.close()
    return found


def finish(row: Row, shared: Problem, device: str, samples: Samples, peak: int) -> None:
    fill(row, shared, device, samples, peak)
    if (most := machine.peak_flops(device)) is not None:
        row.info["mfu"] = row.info["flops_per_second"] / most
        row.columns["MFU"] = f"{row.info['mfu']:.1%}"


@rows(cases, peers)
def test_training_step(measure: Measure, case: Case, name: str) -> None:
    def group(names: list[str]) -> dict[str, Row]:
        return measure_processes(case, names, measure.device, measure.sizes, measure.report.journal)

    measure.group(case, name, group)
