"""csrc/ without a GPU: what nvcc makes of every .cu file, and the CPU's code under the address and undefined sanitizers.

compute-sanitizer, for the kernels on a GPU, is part of `make gpu-check`.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

CSRC = ROOT / "csrc"
CUDA_SOURCES = sorted(path.stem for path in CSRC.glob("*.cu"))
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

# .cu file -> (registers a thread at most, architectures that are compiled by default, the others in the full product).
# 64: blocks of 1024 threads. 128: blocks of 256, two of them a multiprocessor.
KERNELS = {
    "optimizer": (128, (80, 90, 120)),
    "sampling": (64, (90,)),  # half a minute each
}


def headers(path: Path) -> set[str]:
    """The names of all headers that a file includes, also through ours."""
    names = set(re.findall(r'#include\s*[<"]([^">]+)[">]', path.read_text()))
    return names.union(*(headers(CSRC / name) for name in names if (CSRC / name).is_file()))


def test_every_cuda_file_has_its_row_here():
    assert set(CUDA_SOURCES) <= set(KERNELS)


@pytest.mark.parametrize("name", CUDA_SOURCES)
def test_a_cuda_file_needs_no_torch_header(name):
    assert [header for header in headers(CSRC / f"{name}.cu") if re.match("torch/|ATen/|c10/|pybind11/|Python.h", header)] == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        pytest.param(name, arch, marks=[] if arch in KERNELS[name][1] else pytest.mark.full)
        for name in CUDA_SOURCES
        for arch in ARCHITECTURES
    ],
)
def test_a_cuda_file_compiles_without_spills(name, architecture, tmp_path):
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-O3", "-std=c++17", "-Xptxas=-v", "-Werror=all-warnings", target, "-c", CSRC / f"{name}.cu"]
    done = subprocess.run([*command, "-o", tmp_path / "object"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kernel = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    kernels = kernel.findall(done.stderr)
    assert kernels, done.stderr
    for function, arch, stores, loads, registers in kernels:
        print(f"{arch} {registers:>3} registers, spills {stores} + {loads} B: {function}")
    assert {arch for _, arch, *_ in kernels} == {f"sm_{architecture}"}
    assert [k for k in kernels if int(k[2]) or int(k[3])] == [], "spills"
    assert [k for k in kernels if int(k[4]) > KERNELS[name][0]] == [], f"more than {KERNELS[name][0]} registers"


# .cpp file -> those tests of tests/test_<file>.py that are run under the sanitizers: every option and every odd shape once.
SANITIZED = {
    "linear_cross_entropy": "csrc and (options or chunks_of_tokens and shape1 or bf16 or leading or no_token or infinity)",
    "optimizer": "cpu-cpu and (implementations_agree or layout) or the_norm and cpu or direct_call",
    "sampling": "instruction_set or itself_reads or cpu and (any_shape or any_floating or exactly or infinity)",
}


def file_of_gcc(name: str) -> str | None:
    if shutil.which("g++") is None:
        return None
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.slow
@pytest.mark.skipif(file_of_gcc("libasan.so") is None, reason="g++ with its sanitizers is not here")
def test_the_cpu_code_under_sanitizers(tmp_path):
    """Tensors lie in memory that libasan, loaded first, has given: a read beyond one's end ends the process."""
    names = sorted(path.stem for path in CSRC.glob("*.cpp") if path.stem != "module")
    package = Path(torch.__file__).parent
    flags = ["-O0", "-g1", "-std=c++20", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(package / "include")]
    compilers = [
        subprocess.Popen(["g++", *flags, "-c", str(CSRC / f"{name}.cpp"), "-o", str(tmp_path / f"{name}.o")]) for name in names
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(names)
    objects = [str(tmp_path / f"{name}.o") for name in names]
    library = tmp_path / "operators.so"
    link = ["g++", "-shared", *flags[4:5], *objects, f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(library)]
    subprocess.run(link, check=True)

    plugin = f"""
        import sys, types, torch
        torch.ops.load_library({str(library)!r})
        module = sys.modules["wikigpt._C"] = types.ModuleType("wikigpt._C")
        module.build_info = lambda: {{"cuda": None}}
    """
    (tmp_path / "sanitized.py").write_text(textwrap.dedent(plugin))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "LD_PRELOAD": f"{file_of_gcc('libasan.so')} {file_of_gcc('libstdc++.so')}",  # whose exceptions libasan looks for
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", str(ROOT))]),
        "OMP_NUM_THREADS": "2",
    }
    selection = " or ".join(f"(test_{name} and ({SANITIZED[name]}))" for name in names)
    # What a sanitizer writes bypasses sys.stderr, and must not be lost with the process.
    options = ["-p", "sanitized", "-p", "no:cacheprovider", "-n", "0", "-v", "-rN", "--capture=sys", "-k", selection]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/test_{name}.py" for name in names)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-10_000:]
    for name in names:
        assert len(re.findall(rf"test_{name}\.py::.* PASSED", done.stdout)) >= 3, f"{name}: SANITIZED selects nothing"
