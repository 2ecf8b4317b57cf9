"""What `wikigpt doctor` says: what this machine has, and which implementation of every op it gets, with the reasons."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from . import __version__, kernels, threads
from .kernels import _dispatch

if TYPE_CHECKING:
    from rich.table import Table


def report(device_type: str | None = None) -> list[str]:
    """About ten lines. `device_type` is that of the ops; None: cuda where there is a GPU, else cpu."""
    device_type = device_type or default_device()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        f"wikigpt {__version__}, Python {platform.python_version()}, torch {torch.__version__}, GPU: {gpu}",
        f"CPU threads: {threads.describe()}",
        *_extension(),
        *_ops(device_type),
    ]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _extension() -> Iterator[str]:
    module, missing = _dispatch.extension()
    if module is None:
        yield f"extension wikigpt._C: {missing}"
        return
    built = module.build_info()
    yield (
        f"extension wikigpt._C: {built['instruction_set']}, built by {built['compiler']} with torch {built['torch']} "
        f"for torch {built['stable_abi']} and later"
    )
    cuda = f"for {built['cuda_targets']}, by nvcc {built['cuda']}" if built["cuda"] else f"none, {built['no_cuda_because']}"
    yield f"CUDA kernels of wikigpt._C: {cuda}"


def chosen(op: str, device_type: str) -> str | None:
    """The backend that computes `op` there, None where the one that is forced cannot. ValueError for an unknown forced one."""
    try:
        function = _dispatch.choose(op, device_type)
    except RuntimeError:
        return None
    # Two implementations may be one function, which PyTorch dispatches by device.
    return next(i.backend for i in _dispatch._table[op] if i.function is function and i.why_not(device_type) is None)


def _ops(device_type: str) -> Iterator[str]:
    """The ops by the implementation that they get, then why they don't get one that would be preferred, each reason once."""
    forced = _dispatch.forced_backend()
    groups: defaultdict[str | None, list[str]] = defaultdict(list)
    reasons: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for op in kernels.ops():
        backend = chosen(op, device_type)
        groups[backend].append(op)
        for other, reason in kernels.explain(op, device_type):
            if other == backend or (forced is not None and other != forced):
                break
            if reason is not None:
                reasons[other, reason].append(op)
        if backend is None and forced not in dict(kernels.explain(op, device_type)):
            reasons[str(forced), "this version has none of these ops"].append(op)
    yield f"ops on {device_type}" + (f", {forced} alone (WIKIGPT_BACKEND):" if forced else ", by the implementation they get:")
    for backend, ops in sorted(groups.items(), key=lambda group: -len(group[1])):
        yield f"  {backend or 'none'}: {', '.join(ops)}"
    for (backend, reason), ops in reasons.items():
        yield f"  no {backend}: {reason}" + (f" (for {', '.join(ops)})" if len(ops) <= 3 else "")


def table(device_type: str | None = None) -> Table:
    """Every op with each of its implementations."""
    from rich.table import Table

    device_type = device_type or default_device()
    table = Table("op", f"on {device_type}", "others", title="implementations", show_lines=False)
    for op in kernels.ops():
        backend = chosen(op, device_type)
        others = [f"{name}: {reason or 'available'}" for name, reason in kernels.explain(op, device_type) if name != backend]
        table.add_row(op, backend or "none", "\n".join(others))
    return table


__all__ = ["chosen", "default_device", "report", "table"]
