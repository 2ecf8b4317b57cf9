"""`python -m wikigpt.hub_kernel FOLDER` (make hub-kernel): the folder kernels/ as a kernel for the Hugging Face Hub.

Layout of the package kernels, 0.17: FOLDER/build/torch-<backend>/ holds the Python package and its metadata.json. As no
file is compiled there is one build per backend and none per version of torch. Each build has an operator namespace of its
own, made from the content of its files, so that several versions can live in one process and beside wikigpt itself.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

from wikigpt.kernels import _dispatch

SOURCE = Path(_dispatch.__file__).parent
BACKENDS = ("cpu", "cuda")
# For those who change the kernels, not for those who run them.
LEFT_OUT = ("compile_report.py", "roofline.py", "tune.py")
CARD = """---
library_name: kernels
license: mit
tags: [kernel]
---

# WikiGPT

Fused kernels for transformers: attention, norms, linear cross-entropy, gated activations, rotary embedding. Triton on CUDA,
PyTorch's operators on the CPU.

    kernel = kernels.get_kernel("<this repository>", version={version})
    kernel.rms_norm(x, weight)                                # functions
    kernel.layers.RMSNorm                                     # layers, for kernels.kernelize
"""


def write(folder: Path) -> list[Path]:
    """Write the kernel and return its build folders. FOLDER/build is replaced if it is there.

    Raises ValueError where folder/build holds something else than builds of kernels.
    """
    builds = folder / "build"
    if builds.exists():
        strange = [path.name for path in builds.iterdir() if not (path / "metadata.json").is_file()]
        if strange:
            raise ValueError(f"folder: {builds} holds {strange[0]}, which is no build of a kernel; it would be deleted")
        shutil.rmtree(builds)
    files = {
        path.relative_to(SOURCE): path.read_text(encoding="utf-8")
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name not in LEFT_OUT
    }
    digest = hashlib.sha256("".join(f"{path}\0{text}\0" for path, text in files.items()).encode()).hexdigest()[:10]
    version = int(importlib.metadata.version("wikigpt").split(".")[0])
    line = f'NAMESPACE = "{_dispatch.NAMESPACE}"\n'
    if files[Path("_dispatch.py")].count(line) != 1:
        raise RuntimeError(f"kernels/_dispatch.py has no line {line.strip()}")
    written = []
    for backend in BACKENDS:
        name = f"_wikigpt_{backend}_{digest}"
        target = builds / f"torch-{backend}"
        for path, text in files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_text(text.replace(line, f'NAMESPACE = "{name}"\n'), encoding="utf-8")
        metadata = {
            "name": "wikigpt",
            "id": name,
            "version": version,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        written.append(target)
    (folder / "README.md").write_text(CARD.format(version=version))
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m wikigpt.hub_kernel FOLDER")
    for build in write(Path(sys.argv[1])):
        print(build)
