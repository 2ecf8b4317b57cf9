"""Every kernel compiles for six architectures, spills nothing, fits, reads wide and uses the matrix units.

No GPU is needed. Kernels are compiled in processes of their own, because here Triton is told to interpret; what is compiled
where is thinned to keep the file at a few minutes: `python -m wikigpt.kernels.compile_report` compiles everything.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

compile_report = pytest.importorskip("wikigpt.kernels.compile_report", reason="triton, which compiles, is for Linux alone")

pytestmark = pytest.mark.slow

ARCHITECTURES = compile_report.ARCHITECTURES
ODD = re.compile("one row|token")  # cases whose rows lie at any address

# op -> architecture -> cases (a regular expression).
CASES: dict[str, dict[int, str]] = {
    # mma.sync kernels of sm_86, 89 and 120 are those of sm_80 but for the block sizes, float32 kernels the same everywhere.
    "attention": {
        80: "bfloat16|float32 .* causal",
        86: "bfloat16 .* causal",
        89: "float16 .* causal",
        90: "bfloat16",
        100: "bfloat16",
        120: "bfloat16 .* causal|float32 256 causal",
    },
    # sm_89 and 120 have the shared memory of sm_86 and its kernels.
    "attention_features": dict.fromkeys((80, 86, 90, 100), "bfloat16 128 (everything|packed)"),
    "attention_decode": dict.fromkeys((80, 90, 100), "bfloat16 128|float32 64 dense"),
    # Rows in parts, one row a program with and without padding; on two architectures also many rows a program and the rest.
    "norm": dict.fromkeys(ARCHITECTURES, "layer_norm bfloat16 (5120|65536) everything|rms_norm bfloat16 16384 plain")
    | dict.fromkeys(
        (90, 100),
        "layer_norm bfloat16 (64|5120|65536) everything|rms_norm (bfloat16 (2048|16384)|float32 8192) plain"
        "|float32 one row everything",
    ),
    # The last chunk of 50,257 has an odd width. Rows that are given, not made, differ in nothing that depends on the
    # architecture.
    "linear_cross_entropy": dict.fromkeys(ARCHITECTURES, "bfloat16 128256 everything")
    | {90: "bfloat16 50257 (plain|everything)"},
    # The cases with the most registers, and one in which all numbers that Triton takes for constants are.
    "activation": dict.fromkeys(ARCHITECTURES, "bfloat16 gelu 11008 (packed|everything)|one row everything"),
    "rotary": dict.fromkeys(
        ARCHITECTURES, "bfloat16 (128/128|80/32) (halves|pairs)$|float32 80/32 pairs positions|token pairs"
    ),
}
# Without matrix units: what limits them is how fast memory is read.
MEMORY_BOUND = ("norm", "activation", "rotary")


def compiled(directory: Path, arch: int, op: str, only: str) -> list:
    """The kernels of an op, compiled once for all tests and all of their processes."""
    name = f"{op}-{arch}"
    with open(directory / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = directory / f"{name}.json"
        if not result.exists():
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            environment["OMP_NUM_THREADS"] = "1"  # Triton's own cache stays: it knows a kernel by its source and its compiler
            command = [sys.executable, "-m", compile_report.__name__, op, "--arch", str(arch), "--only", only]
            done = subprocess.run([*command, "--json", "--jobs=1"], cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            result.write_text(done.stdout)
        kernels = [compile_report.Kernel(**kernel) for kernel in json.loads(result.read_text())]
    assert kernels, f"no case of {op} matches {only}"
    return kernels


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(params=[(op, arch) for op in CASES for arch in CASES[op]], ids=lambda case: "{}-sm_{}".format(*case))
def kernels(request, directory):
    op, arch = request.param
    return compiled(directory, arch, op, CASES[op][arch])


def test_they_compile_fit_and_neither_spill_nor_read_narrowly_without_a_reason(kernels):
    """One test, because what takes the time is to compile; each assertion shows the kernels that break it."""
    limits = ARCHITECTURES[kernels[0].arch]
    op, features = kernels[0].op, kernels[0].op == "attention_features"  # every feature at once may spill, but it has to fit
    assert not [k for k in kernels if k.blocks < 1 or k.shared > limits.shared_block]
    if not features:
        assert not [k for k in kernels if k.spills and compile_report.excuse(k) is None]
        excused = {key: 0 for key in map(compile_report.excuse, kernels) if key is not None}
        for kernel in kernels:
            if key := compile_report.excuse(kernel):
                excused[key] = max(kernel.spills, excused[key])
        assert all(excused.values()), f"spills no more: {excused}"
        regular = [k for k in kernels if not ODD.search(k.case) and k.name not in ("_append", "_combine")]  # of one token
        assert not [k for k in regular if k.load not in ("async 16 B", "16 B", "TMA")]
    if op in MEMORY_BOUND:
        assert not [k for k in kernels if k.occupancy < 0.12], "too few warps to hide the memory's latency"
    elif not features:
        # Decoding multiplies a handful of rows, for which mma.sync is the right size everywhere.
        families = ("mma", limits.family) if op == "attention_decode" else (limits.family,)
        products = [k for k in kernels if "float32" not in k.case and k.instruction != "fma"]
        assert products
        assert not [k for k in products if k.instruction not in families]


@pytest.mark.parametrize("arch", CASES["attention"], ids="sm_{}".format)
def test_every_16_bit_kernel_of_attention_uses_the_matrix_instruction_of_its_generation(arch, directory):
    kernels = compiled(directory, arch, "attention", CASES["attention"][arch])
    assert not [k for k in kernels if "float32" not in k.case and k.instruction != ARCHITECTURES[arch].family]


@pytest.mark.parametrize("arch", CASES["norm"], ids="sm_{}".format)
def test_the_backward_of_a_norm_waits_for_no_load(arch, directory):
    kernels = compiled(directory, arch, "norm", CASES["norm"][arch])
    backward = [k for k in kernels if k.name == "_backward" and not ODD.search(k.case)]
    assert backward
    assert all(kernel.load == "async 16 B" for kernel in backward), backward


def test_under_the_interpreter_nothing_can_be_compiled():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), compile_report.compile_only(80):
        pass
