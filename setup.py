"""Builds csrc/ as wikigpt._C: for the CPU where torch and a C++ compiler are found, with CUDA kernels where nvcc is found too.
What is missing is left out with one line that says so; an install never fails because of it. docs/build.md has the details.

Environment:
  WIKIGPT_NO_EXT=1       no extension
  WIKIGPT_NO_CUDA=1      the extension without CUDA kernels
  FORCE_CUDA=1           CUDA kernels although the torch at hand is built without CUDA
  CUDA_HOME              the CUDA toolkit (else nvcc on PATH, else /usr/local/cuda)
  TORCH_CUDA_ARCH_LIST   as in PyTorch, "8.0;9.0+PTX"; implies FORCE_CUDA=1
  MAX_JOBS               compilers at a time
  CXX                    the C++ compiler
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from setuptools import setup

# The oldest torch whose stable ABI the library asks for: it loads under this version and every later one.
STABLE_ABI = (2, 11)
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


class LeftOut(Exception):
    """Why a part is not built, in one line for the user."""


def say(message: str) -> None:
    print(f"wikigpt: {message}", file=sys.stderr, flush=True)


# --- CUDA: whether, with what, for which architectures ---


class Toolkit(NamedTuple):
    nvcc: str
    version: str  # "13.0"
    architectures: list[str]  # that it compiles for: ["7.5", "8.0", ...]
    libraries: str  # the folder of libcudart_static.a


def find_toolkit(environment: Mapping[str, str]) -> Toolkit:
    """Raises LeftOut where there is none that works."""
    home = environment.get("CUDA_HOME")
    nvcc = None if home else shutil.which("nvcc", path=environment.get("PATH"))
    nvcc = nvcc or os.path.join(home or "/usr/local/cuda", "bin", "nvcc")
    if not os.path.isfile(nvcc):
        raise LeftOut(f"CUDA_HOME={home} has no bin/nvcc" if home else "no nvcc: install the CUDA toolkit or set CUDA_HOME")

    def ask(*arguments: str) -> str:
        try:
            done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise LeftOut(f"{nvcc} does not work ({error})") from None
        return done.stdout + done.stderr

    version = re.search(r"release (\d+\.\d+)", ask("--version"))
    codes = re.findall(r"compute_(\d+)(\d)\b", ask("--list-gpu-arch"))
    # nvcc may be a script that calls another one: where its libraries are it knows best.
    folders = re.findall(r'"-L([^"]+)"', ask("--dryrun", "-x", "cu", os.devnull))
    libraries = next((folder for folder in folders if os.path.isfile(f"{folder}/libcudart_static.a")), None)
    if version is None or libraries is None:
        raise LeftOut(f"the toolkit of {nvcc} has no " + ("version" if version is None else "libcudart_static.a"))
    return Toolkit(nvcc, version[1], [f"{major}.{minor}" for major, minor in codes], libraries)


def targets(arch_list: str, supported: list[str]) -> tuple[list[str], list[str]]:
    """What of TORCH_CUDA_ARCH_LIST is compiled, as ["8.0", "9.0+PTX"], and what is not. PTX is for GPUs to come."""
    names = re.split(r"[;, ]+", arch_list.strip()) if arch_list.strip() else [a for a in ARCHITECTURES if a in supported]
    if not arch_list.strip() and names:
        names[-1] += "+PTX"

    def fits(name: str) -> bool:
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", name)
        return match is not None and match[1] in supported and float(match[1]) >= float(ARCHITECTURES[0])

    return [name for name in names if fits(name)], [name for name in names if name and not fits(name)]


def gencode(target: str) -> list[str]:
    """nvcc's options for one target."""
    number = target.removesuffix("+PTX").replace(".", "")
    codes = [f"sm_{number}", f"compute_{number}"] if target.endswith("+PTX") else [f"sm_{number}"]
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


def plan_cuda(environment: Mapping[str, str], torch_cuda: str | None) -> tuple[Toolkit, list[str]]:
    """(toolkit, targets), or LeftOut. `torch_cuda` is torch.version.cuda."""
    if environment.get("WIKIGPT_NO_CUDA") == "1":
        raise LeftOut("WIKIGPT_NO_CUDA=1")
    arch_list = environment.get("TORCH_CUDA_ARCH_LIST", "")
    if torch_cuda is None and environment.get("FORCE_CUDA") != "1" and not arch_list:
        raise LeftOut("torch is built without CUDA (FORCE_CUDA=1 builds them all the same)")
    toolkit = find_toolkit(environment)
    if torch_cuda is not None and int(toolkit.version.split(".")[0]) > int(torch_cuda.split(".")[0]):
        # It would ask for a newer driver than torch does.
        raise LeftOut(f"nvcc {toolkit.version} is newer than torch's CUDA {torch_cuda}: set CUDA_HOME to an older toolkit")
    chosen, unknown = targets(arch_list, toolkit.architectures)
    if not chosen:
        raise LeftOut(f"nvcc {toolkit.version} compiles them for none of {arch_list or ' '.join(ARCHITECTURES)}")
    if unknown:
        say(f"no CUDA kernels for {' '.join(unknown)}: they need 8.0 or newer, and nvcc {toolkit.version} to know it")
    return toolkit, chosen


def compile_cuda(toolkit: Toolkit, targets: list[str], sources: list[str], folder: Path) -> list[str]:
    """The object files. With ninja, only what has changed is compiled again."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    command = [toolkit.nvcc, "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    command += [option for target in targets for option in gencode(target)]
    command += [f"--threads={max(1, jobs // len(sources))}"]  # architectures at a time
    outputs = {os.path.abspath(source): str(folder / f"{Path(source).stem}.cuda.o") for source in sources}
    if shutil.which("ninja"):
        rule = shlex.join(command).replace("$", "$$")
        lines = ["rule nvcc", f"  command = {rule} -MD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
        for source, output in outputs.items():
            lines.append("build {}: nvcc {}".format(*(re.sub(r"([$: ])", r"$\1", path) for path in (output, source))))
        (folder / "build.ninja").write_text("\n".join([*lines, ""]), encoding="utf-8")
        runs = [["ninja", "-C", str(folder), "-j", str(jobs)]]
    else:
        runs = [[*command, "-c", source, "-o", output] for source, output in outputs.items()]
    for run in runs:
        if subprocess.run(run).returncode != 0:
            raise LeftOut("nvcc failed; its messages are above (pip shows them with -v)")
    return list(outputs.values())


# --- the extension ---


def define(name: str, value: str) -> str:
    return f"-D{name}={json.dumps(value.replace('$', ''))}"


def extension() -> dict:
    """The keyword arguments of setup() that build wikigpt._C. Raises LeftOut."""
    if os.environ.get("WIKIGPT_NO_EXT") == "1":
        raise LeftOut("WIKIGPT_NO_EXT=1")
    if sys.platform == "win32":
        raise LeftOut("it needs GCC or Clang, and was never built on Windows")
    rebuild = "pip install --no-build-isolation --force-reinstall --no-deps ."
    try:
        import torch
    except ImportError:
        raise LeftOut(f"no torch in the build environment: pip install torch, then {rebuild}") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < STABLE_ABI:
        raise LeftOut(f"torch {torch.__version__} is too old: pip install 'torch>=2.11', then {rebuild}")
    # ninja is there, where an environment is used without being activated.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        raise LeftOut(
            f"no C++ compiler, {compiler} is not on PATH: install one (Debian and Ubuntu: apt install g++; macOS: "
            f"xcode-select --install), then {rebuild}"
        )
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildOrSkip(BuildExtension):
        def run(self) -> None:
            # Environment variables decide what is built, and no file is newer for it.
            self.force = True
            try:
                super().run()
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                say(f"the C++ extension is left out: it did not build ({reason}); pip shows the compiler's messages with -v")
                # What an earlier build left would be taken for this one's, and a later step would copy what was never made.
                Path(self.get_ext_fullpath(module.name)).unlink(missing_ok=True)
                self.extensions = []

        def build_extensions(self) -> None:
            try:
                self.add_cuda()
            except LeftOut as reason:
                say(f"the CUDA kernels are left out: {reason}")
                module.extra_compile_args.append(define("WIKIGPT_NO_CUDA_BECAUSE", str(reason)))
            super().build_extensions()

        def add_cuda(self) -> None:
            sources = sorted(glob.glob("csrc/*.cu"))
            if not sources:
                raise LeftOut("csrc/ has none")
            toolkit, targets = plan_cuda(os.environ, torch.version.cuda)
            module.extra_objects += compile_cuda(toolkit, targets, sources, Path(self.build_temp).absolute() / "cuda")
            # A CUDA runtime of its own, so that the library loads where there is none.
            module.library_dirs.append(toolkit.libraries)
            module.libraries += ["cudart_static", "dl", "rt", "pthread"]
            module.extra_compile_args += [
                define("WIKIGPT_CUDA", toolkit.version),
                define("WIKIGPT_CUDA_TARGETS", " ".join(targets)),
            ]

    module = CppExtension(
        "wikigpt._C",
        sorted(glob.glob("csrc/*.cpp")),
        extra_compile_args=[
            # Threads are torch's (torch::stable::parallel_for), so that there is one OpenMP in the process.
            *("-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fvisibility=hidden"),
            f"-DTORCH_TARGET_VERSION={STABLE_ABI[0] << 56 | STABLE_ABI[1] << 48:#018x}",
            define("WIKIGPT_TORCH_VERSION", torch.__version__),
            define("WIKIGPT_STABLE_ABI", "{}.{}".format(*STABLE_ABI)),
        ],
        # The symbols of the static CUDA runtime are not for others in the process.
        extra_link_args=[] if sys.platform == "darwin" else ["-Wl,--exclude-libs,ALL"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildOrSkip}}


if __name__ == "__main__":
    # Hugging Face's package kernels has a plugin of setuptools, which our folder kernels/ would be taken for.
    root = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != root]
    try:
        arguments = extension()
    except LeftOut as reason:
        if not {"egg_info", "dist_info"} & set(sys.argv):  # pip calls for these first: once is enough
            say(f"the C++ extension is left out: {reason}")
        arguments = {}
    setup(license="MIT", **arguments)
