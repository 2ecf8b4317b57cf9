"""What a result was measured on: hardware, versions, commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from wikigpt.kernels.roofline import GPUS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("triton", "transformers", "flash-attn", "liger-kernel", "quack-kernels", "cut-cross-entropy")
NOT_KNOWN = "not known"


def run(*command: str, seconds: float = 30) -> str:
    """What a command prints, or why it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, cwd=ROOT)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not available ({error})"
    return done.stdout.strip() or done.stderr.strip()


def _known(ask: Callable[[], Any]) -> Any:
    """The answer. Without one fact a result is still a result, so what goes wrong here is written down and raises nothing."""
    try:
        return ask() or NOT_KNOWN
    except Exception as error:
        return f"{NOT_KNOWN} ({type(error).__name__}: {error})"


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def driver() -> str:
    """The version of NVIDIA's driver: one line for each GPU, of which the first is enough."""
    return next(iter(run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()), NOT_KNOWN)


def folder(device: str) -> str:
    """A folder name for this machine: the GPU's, or the processor's."""
    name = _known(torch.cuda.get_device_name if device == "cuda" else cpu_name)
    return re.sub(r"[^a-z0-9]+", "-", name.lower() if device == "cuda" else f"cpu {name.lower()}").strip("-")


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s in the data sheet of this GPU, or None where it is not known."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((gpu.tensor * 1e12 for part, gpu in GPUS.items() if part in name), None)


def commit() -> str:
    """The commit of this source tree. WIKIGPT_COMMIT names it for a copy without its history."""
    if given := os.environ.get("WIKIGPT_COMMIT", "").strip():
        return given
    if not (ROOT / ".git").exists():
        return NOT_KNOWN  # git would answer with the commit of a repository around this folder
    found = run("git", "rev-parse", "HEAD")
    if not re.fullmatch(r"[0-9a-f]{40}", found):
        return NOT_KNOWN
    changes = run("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!docs")
    return f"{found} with changes" if changes else found


def require_commit() -> str:
    """The commit, or an error: nobody can say later what a result without one was measured on."""
    found = commit()
    if found == NOT_KNOWN:
        raise RuntimeError(
            f"{ROOT} has no git history that can be read, so its results would belong to no commit: "
            "set WIKIGPT_COMMIT to the commit that it is a copy of"
        )
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package) or NOT_KNOWN  # None where its metadata is damaged
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def facts(device: str) -> dict[str, Any]:
    """Hardware, versions and commit, for results and for the captions of plots."""
    found: dict[str, Any] = {"device": device, "cpu": _known(cpu_name), "cpu_threads": torch.get_num_threads()}
    if device == "cuda":
        found |= {
            "gpu": _known(lambda: torch.cuda.get_device_properties(0).name),
            "gpu_memory": _known(lambda: torch.cuda.get_device_properties(0).total_memory),
            "sm": _known(lambda: "{}{}".format(*torch.cuda.get_device_capability(0))),
            "multiprocessors": _known(lambda: torch.cuda.get_device_properties(0).multi_processor_count),
            "driver": _known(driver),
        }
    return found | {"versions": versions(), "commit": _known(commit)}
