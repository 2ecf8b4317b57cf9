"""Every kernel compiles for six architectures, spills nothing, fits, reads wide and uses the matrix units.

No GPU is needed. Kernels are compiled in processes of their own, because here Triton is told to interpret; what is compiled
where is thinned to keep the file at a few minutes: `python -m wikigpt.kernels.compile_report` compiles everything.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton", reason="triton, which compiles, is for Linux alone")

from wikigpt.kernels import compile_report, roofline  # noqa: E402

pytestmark = pytest.mark.slow

ARCHITECTURES = compile_report.ARCHITECTURES
ODD = re.compile("one row|token")  # cases whose rows lie at any address

CHECKED = compile_report.CHECKED
# Further rows, under the marker `full` (make test-full): op -> architecture -> cases.
FULL: dict[str, dict[int, str]] = {
    "attention": {
        80: "bfloat16 .* full",
        89: "bfloat16 .* causal",
        90: "bfloat16 (64|256) full",
        100: "bfloat16 .* full",
        120: "(bfloat16|float32) 256 causal",
    },
    "attention_features": {80: "bfloat16 128 (everything|packed)", 86: "bfloat16 128 packed"},
    **{op: {89: CHECKED[op][86]} for op in ("norm", "linear_cross_entropy", "activation", "rotary", "optimizer")},
}
# Without matrix units: what limits them is how fast memory is read.
MEMORY_BOUND = ("norm", "activation", "rotary", "optimizer")


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """One process that compiles for all tests of this one, because here Triton interprets. To import torch and Triton takes
    as long as to compile a kernel."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")  # Triton's own cache stays: it knows a kernel by its source and its compiler
        pool.submit(int).result()  # it starts with the first task
        patch.undo()
        yield pool


@pytest.fixture(scope="module")
def compiled(compiler, tmp_path_factory) -> Callable[..., list]:
    """The kernels of an op, compiled once for all tests and all of their processes."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent

    def of(op: str, arch: int, selection: dict[str, dict[int, str]] = CHECKED) -> list:
        name = f"{op}-{arch}-{'checked' if selection is CHECKED else 'full'}"
        with open(directory / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            result = directory / f"{name}.json"
            if not result.exists():
                cases = compile_report.cases(op, selection[op][arch])
                assert cases, f"no case of {op} matches {selection[op][arch]}"
                tasks = [compiler.submit(compile_report.report, op, arch, case) for case in cases]
                result.write_text(json.dumps([asdict(kernel) for task in tasks for kernel in task.result()]))
            return [compile_report.Kernel(**kernel) for kernel in json.loads(result.read_text())]

    return of


def each(selection: dict[str, dict[int, str]], *marks) -> list:
    return [
        pytest.param((op, arch, selection), id=f"{op}-sm_{arch}{'-full' if marks else ''}", marks=marks)
        for op in selection
        for arch in selection[op]
    ]


@pytest.fixture(params=[*each(CHECKED), *each(FULL, pytest.mark.full)])
def kernels(request, compiled):
    return compiled(*request.param)


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


@pytest.mark.parametrize("arch", CHECKED["attention"], ids="sm_{}".format)
def test_every_16_bit_kernel_of_attention_uses_the_matrix_instruction_of_its_generation(arch, compiled):
    kernels = compiled("attention", arch)
    assert not [k for k in kernels if "float32" not in k.case and k.instruction != ARCHITECTURES[arch].family]


@pytest.mark.parametrize("arch", CHECKED["norm"], ids="sm_{}".format)
def test_the_backward_of_a_norm_waits_for_no_load(arch, compiled):
    kernels = compiled("norm", arch)
    backward = [k for k in kernels if k.name == "_backward" and not ODD.search(k.case)]
    assert backward
    assert all(kernel.load == "async 16 B" for kernel in backward), backward


def test_float32_fits_the_least_shared_memory(compiled):
    """It is compiled for sm_80 alone; what it holds in shared memory is the same everywhere."""
    kernels = [k for k in compiled("attention", 80) if "float32" in k.case]
    assert kernels
    assert not [k for k in kernels if k.shared > min(limits.shared_block for limits in ARCHITECTURES.values())]


@pytest.mark.parametrize(
    ("op", "arch"), roofline.snapshot_keys(), ids=lambda part: f"sm_{part}" if isinstance(part, int) else part
)
def test_kernels_are_those_of_the_snapshot(op, arch, compiled):
    """Where a change is meant: python -m wikigpt.kernels.roofline --update-snapshot."""
    version, snapshot = roofline.read_snapshot()
    if triton.__version__ != version:
        pytest.skip(f"the snapshot is that of triton {version}, here is {triton.__version__}")
    differences = roofline.differences([k for k in snapshot if (k.op, k.arch) == (op, arch)], compiled(op, arch))
    assert not differences, "\n".join(differences)


@pytest.mark.parametrize(("version", "excused"), [("3.6.0", True), ("3.6.1", True), ("3.7.1", False)])
def test_an_exception_can_be_one_of_a_version_of_triton(version, excused, monkeypatch):
    entry = compile_report.Spill("_kernel", 90, "bfloat16 64", triton="3.6.")
    monkeypatch.setattr(compile_report, "EXCEPTIONS", {entry: "why"})
    monkeypatch.setattr(triton, "__version__", version)
    kernel = SimpleNamespace(name="_kernel", arch=90, case="bfloat16 64 causal")
    assert compile_report.excuse(kernel) == (entry if excused else None)


def test_under_the_interpreter_nothing_can_be_compiled():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), compile_report.compile_only(80):
        pass
