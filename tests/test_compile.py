"""Every row of the table of block sizes compiles for its architecture, spills nothing, fits and uses the matrix units.

No GPU is needed. Kernels are compiled in processes of their own, because here Triton is told to interpret; what is compiled
where is thinned to keep the file at a few minutes: `python -m wikigpt.kernels.compile_report` compiles everything.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

compile_report = pytest.importorskip("wikigpt.kernels.compile_report", reason="triton, which compiles, is for Linux alone")

pytestmark = pytest.mark.slow

# mma.sync kernels of sm_86, 89 and 120 are those of sm_80 but for the block sizes, float32 kernels the same everywhere.
CASES = {
    80: ["attention", "bfloat16|float32 .* causal"],
    86: ["attention", "bfloat16 .* causal"],
    89: ["attention", "float16 .* causal"],
    90: ["attention", "bfloat16"],
    100: ["attention", "bfloat16"],
    120: ["attention", "bfloat16 .* causal|float32 256 causal"],
}
# The last chunk of 50,257 has an odd width. Rows that are given, not made, differ in nothing that depends on the architecture.
LOSSES = {
    arch: ["linear_cross_entropy", "bfloat16 50257 (plain|everything)" if arch == 90 else "bfloat16 128256 everything"]
    for arch in CASES
}
FEATURES = "bfloat16 128 (everything|packed)"


def compiled(directory: Path, arch: int, op: str, only: str) -> list:
    """The kernels of an op, compiled once for all tests and all of their processes."""
    name = f"{op}-{arch}"
    with open(directory / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = directory / f"{name}.json"
        if not result.exists():
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            environment |= {"TRITON_CACHE_DIR": str(directory / name), "OMP_NUM_THREADS": "1"}
            command = [
                sys.executable,
                "-m",
                compile_report.__name__,
                op,
                "--arch",
                str(arch),
                "--only",
                only,
                "--json",
                "--jobs=1",
            ]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            result.write_text(done.stdout)
        return [compile_report.Kernel(**kernel) for kernel in json.loads(result.read_text())]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(params=CASES, ids="sm_{}".format)
def kernels(request, directory):
    return compiled(directory, request.param, *CASES[request.param])


@pytest.fixture(params=CASES, ids="sm_{}".format)
def kernels_with_features(request, directory):
    return compiled(directory, request.param, "attention_features", FEATURES)


@pytest.fixture(params=LOSSES, ids="sm_{}".format)
def losses(request, directory):
    return compiled(directory, request.param, *LOSSES[request.param])


def test_no_row_spills_without_a_reason(kernels):
    spilling = [kernel for kernel in kernels if kernel.spills and compile_report.excuse(kernel) is None]
    assert not spilling


def test_every_exception_still_spills(kernels):
    excused = {}
    for kernel in kernels:
        if key := compile_report.excuse(kernel):
            excused[key] = max(kernel.spills, excused.get(key, 0))
    assert all(excused.values()), excused


def test_a_block_fits_its_multiprocessor(kernels):
    assert all(kernel.blocks >= 1 for kernel in kernels), kernels
    assert all(kernel.shared <= compile_report.ARCHITECTURES[kernel.arch].shared_block for kernel in kernels), kernels


def test_16_bit_kernels_use_the_matrix_instruction_of_their_generation(kernels):
    wrong = [k for k in kernels if "float32" not in k.case and k.instruction != compile_report.ARCHITECTURES[k.arch].family]
    assert not wrong


def test_global_memory_is_read_16_bytes_at_a_time(kernels):
    assert not [kernel for kernel in kernels if kernel.load not in ("async 16 B", "16 B", "TMA")]


def test_with_every_feature_a_block_fits_its_multiprocessor(kernels_with_features):
    limits = compile_report.ARCHITECTURES
    assert not [k for k in kernels_with_features if k.blocks < 1 or k.shared > limits[k.arch].shared_block]


def test_kernels_of_a_loss_spill_nothing_and_fit(losses):
    assert {kernel.name for kernel in losses} == {"_forward", "_gradient", "_filtered_product"}
    assert not [kernel for kernel in losses if kernel.spills or kernel.blocks < 1]
    assert all(kernel.shared <= compile_report.ARCHITECTURES[kernel.arch].shared_block for kernel in losses)


def test_kernels_of_a_loss_read_16_bytes_at_a_time(losses):
    assert not [kernel for kernel in losses if kernel.load not in ("async 16 B", "16 B")]


def test_filtered_products_use_the_matrix_instruction_of_their_generation(losses):
    products = [kernel for kernel in losses if kernel.name == "_filtered_product"]
    assert all(kernel.instruction == compile_report.ARCHITECTURES[kernel.arch].family for kernel in products)


def test_under_the_interpreter_nothing_can_be_compiled():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), compile_report.compile_only(80):
        pass
