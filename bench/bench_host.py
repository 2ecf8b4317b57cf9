"""Host time: what a call costs before the GPU has anything to do, ours and PyTorch's own fused operators.

    pytest bench/bench_host.py [--sizes smoke|default|full]

A model of small layers, or a token of generation, waits for the host and not for the GPU. A sample is process CPU time, the
least of some rounds in which the functions take turns, because whatever else runs can only add to it. It is taken in a process
with a fake GPU (bench/fake_gpu.py): kernels are compiled for sm_90 and launched by Triton's own launcher, into a driver that
does nothing. PyTorch's operators run on tensors of the CPU, so small that little of their time is arithmetic; so does what
PyTorch computes inside ours, and csrc's operators (AdamW, sample). The fake adds half a microsecond to a tensor that is made.

Left out, of ours and of the peers alike, is what happens below: the driver's launch, CUDA's allocator, the device guard. On a
GPU each launch and each allocation adds about as much to one as to the other, so ratios move towards 1. A machine with a GPU
measures the same, with its own host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

from . import fake_gpu, machine
from .suite import Measure, Peer, Row, plain, rows
from .timing import Samples


class Case(NamedTuple):
    op: str
    mode: str


MODES = ("no grad", "forward with grad", "forward + backward")
# op -> modes, peers
OPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rms_norm": (MODES, ("F.rms_norm", "F.layer_norm")),
    "layer_norm": (MODES, ("F.layer_norm",)),
    "flash_attn_func": (MODES, ("SDPA",)),
    "scaled_dot_product_attention": (MODES, ("SDPA",)),
    "kvcache append + decode": (MODES[:1], ("two slices, SDPA",)),
    "swiglu": (MODES, ("F.silu(a) * b",)),
    "apply_rotary_emb": (MODES, ("chunk, products, cat",)),
    "cross_entropy": (MODES, ("F.cross_entropy",)),
    "linear_cross_entropy": (MODES, ("F.linear, F.cross_entropy",)),
    "AdamW step": (MODES[:1], ("torch.optim.AdamW(fused)",)),
    "sample": (MODES[:1], ("topk, multinomial",)),
}
# samples, rounds of each
ROUNDS = {"smoke": (3, 5), "check": (5, 5), "default": (9, 10), "full": (15, 10)}


def cases(device: str = "cpu", sizes: str = "default") -> list[Case]:
    return [Case(op, mode) for op, (modes, _) in OPS.items() for mode in modes]


def peers(case: Case, device: str = "cpu", sizes: str = "default") -> dict[str, Peer]:
    return {name: plain(print) for name in ("ours", *OPS[case.op][1])}


class Worker:
    """The process with the fake GPU. It ends with this one."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.host_worker"], cwd=machine.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, bufsize=1, env=environment | {fake_gpu.ASKED: "90,untouched", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def measure(self, case: Case, rounds: int) -> dict[str, list[float]]:
        """{implementation: seconds of a call in each round}. RuntimeError where the process has died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"case": case, "rounds": rounds}) + "\n")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with code {self.process.wait()}; its last words stand above")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


_worker: Worker | None = None


def worker() -> Worker:
    """One for all groups, because it takes seconds to start."""
    global _worker
    if _worker is None or _worker.process.poll() is not None:
        _worker = Worker()
    return _worker


def teardown_module() -> None:
    if _worker is not None:
        _worker.close()


def host_rows(case: Case, names: list[str], sizes: str) -> dict[str, Row]:
    samples, each = ROUNDS[sizes]
    found = worker().measure(case, samples * each)
    least = {name: min(seconds) for name, seconds in found.items()}
    rows = {}
    for name in names:
        op, columns = f"host time, {case.op}", {"us, least": f"{least[name] * 1e6:.1f}"}
        if name != "ours":
            columns["peer / ours"] = f"{least[name] / least['ours']:.2f}"
        info: dict[str, Any] = {
            "op": op, "shape": case.mode, "implementation": name, "device": "fake", "axes": case._asdict(),
            "clock": "process CPU time, launches faked", "rounds_of_a_sample": each,
        }  # fmt: skip
        seconds = [min(found[name][i * each : (i + 1) * each]) for i in range(samples)]
        rows[name] = Row(op, case.mode, name, Samples(seconds), info, columns)
    return rows


@rows(cases, peers)
def test_host_time(measure: Measure, case: Case, name: str) -> None:
    measure.group(case, name, lambda names: host_rows(case, names, measure.sizes))
