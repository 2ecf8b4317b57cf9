"""Fills .venv; `make` calls it with the python of .venv. The standard library is all that it needs.

    .venv/bin/python .ci/install.py train     torch, wikigpt with its extension, and what training needs
    .venv/bin/python .ci/install.py dev       after that: tests, linters, the packages that tests compare with

Environment (`make TORCH=cuda train`):
  TORCH         cpu: PyTorch's build for processors; cuda: the one that pip finds by itself, on Linux with CUDA.
                Without it: cpu on a Linux without an NVIDIA GPU
  TORCH_INDEX   where the build for processors is; without it PyTorch's own index
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Megabytes to download and on disk, of the pinned set on Linux (x86-64, Python 3.11).
SIZES = {"cpu": (190, 760), "train": (140, 630), "dev": (240, 980)}


def say(line: str) -> None:
    print(f"== {line} ==", flush=True)


def stop(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def has_nvidia_gpu() -> bool:
    if os.path.exists("/proc/driver/nvidia/version"):
        return True
    command = shutil.which("nvidia-smi")
    return command is not None and subprocess.run([command, "-L"], capture_output=True).returncode == 0


def reachable(index: str) -> str | None:
    """None, or why not: pip would try for minutes."""
    try:
        urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=15).close()
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def torch_arguments() -> list[str]:
    """What pip installs as torch; says which build that is and why."""
    version = re.findall(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    wanted = os.environ.get("TORCH") or ("cpu" if sys.platform == "linux" and not has_nvidia_gpu() else "cuda")
    if wanted not in ("cpu", "cuda"):
        stop(f"TORCH={wanted}: use cpu or cuda")
    if installed("torch"):
        say("torch is there already")
        return [f"torch=={version}"]
    if wanted == "cuda":
        size = "several gigabytes with CUDA" if sys.platform == "linux" else f"about {SIZES['cpu'][0]} MB"
        say(f"torch: the build that pip finds by itself, {size} (another one: make TORCH=cpu)")
        return [f"torch=={version}"]
    index = os.environ.get("TORCH_INDEX") or CPU_INDEX
    why_not = reachable(index)
    if why_not is None:
        why = "because TORCH=cpu" if os.environ.get("TORCH") else "because no NVIDIA GPU is here (make TORCH=cuda: the other)"
        say(f"torch: the build for processors, about {SIZES['cpu'][0]} MB, {why}")
        return [f"torch=={version}+cpu", "--extra-index-url", index]
    if os.environ.get("TORCH_INDEX"):
        stop(f"cannot reach TORCH_INDEX={index}: {why_not}")
    say(f"torch: {index} cannot be reached ({why_not})")
    say("so it comes from where pip is told to look; if that is the build with CUDA, it is several gigabytes")
    return [f"torch=={version}"]


def pip(*arguments: str, **environment: str) -> None:
    # Python 3.10 has no release of some packages that the set is pinned to.
    pinned = ["-c", "constraints.txt"] if sys.version_info >= (3, 11) else []
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *pinned, *arguments]
    if subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode != 0:
        stop("pip failed, and says why above; the same make command goes on from here")


def main(extra: str) -> None:
    begin = time.monotonic()
    download, disk = SIZES[extra]
    if extra == "train":
        say(f"setting up {sys.prefix}, once: torch, and about {download} MB of other packages; on disk torch and {disk} MB")
        pip(*torch_arguments())
        say("build tools")
        pip("setuptools", "wheel", "ninja", "pybind11", "numpy")
        say("wikigpt: its extension is compiled, which takes a minute or two, and what training needs is downloaded")
        pip("--no-build-isolation", "-e", ".[train]")
    else:
        say(f"the development set, once: about {download} MB to download, {disk} MB on disk")
        # The extension lies in the source tree since the first step, and does not have to be compiled again.
        pip("--no-build-isolation", "-e", ".[dev]", WIKIGPT_NO_EXT="1")
    minutes, seconds = divmod(round(time.monotonic() - begin), 60)
    say(f"done in {minutes} min {seconds} s")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        stop("interrupted; the same make command goes on from here")
