"""What a result was measured on: hardware, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from wikigpt.kernels.roofline import GPUS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("triton", "transformers", "flash-attn", "liger-kernel", "quack-kernels", "cut-cross-entropy")


def run(*command: str, seconds: float = 30) -> str:
    """What a command prints, or why it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not available ({error})"
    return done.stdout.strip() or done.stderr.strip()


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def folder(device: str) -> str:
    """A folder name for this machine: the GPU's, or the processor's."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu {cpu_name()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s in the data sheet of this GPU, or None where it is not known."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((gpu.tensor * 1e12 for part, gpu in GPUS.items() if part in name), None)


def commit() -> str:
    """The commit of this source tree. WIKIGPT_COMMIT names it for a copy without its history."""
    if given := os.environ.get("WIKIGPT_COMMIT"):
        return given
    found = run("git", "rev-parse", "HEAD")
    if not re.fullmatch(r"[0-9a-f]{40}", found):
        return "not known"
    return found + (
        " with changes"
        if run("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!docs")
        else ""
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def facts(device: str) -> dict[str, Any]:
    """Hardware, versions and commit, for results and for the captions of plots."""
    found: dict[str, Any] = {"device": device, "cpu": cpu_name(), "cpu_threads": torch.get_num_threads()}
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": p.name,
            "gpu_memory": p.total_memory,
            "sm": f"{p.major}{p.minor}",
            "multiprocessors": p.multi_processor_count,
        }
        found["driver"] = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    return found | {"versions": versions(), "commit": commit()}
