"""Which implementation of an op runs: one small table for all ops.

Every op registers its implementations here in order of preference; `choose` takes the first that this machine and these
inputs allow. `backend("reference")` (context manager) or the environment variable WIKIGPT_BACKEND (read at import) force
one, and forcing what is not available raises with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

NAMESPACE = "wikigpt"
"""Namespace of the registered operators (torch.ops.<NAMESPACE>)."""

BACKENDS = ("auto", "reference", "torch", "cpu", "cuda", "triton")
"""auto: the first that is available. reference: plain PyTorch, written for reading. torch: PyTorch's own fused operators.
cpu: ours for the processor (csrc/ where it is built). cuda: ours in CUDA C++. triton: ours in Triton."""

# A plain global, one for the process, because torch.compile can guard on it (it cannot read a ContextVar).
_forced: str | None = os.environ.get("WIKIGPT_BACKEND") or None


# The same, of `debug_checks`.
_debugging = False


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. `why_not(device_type)` is the reason it cannot run on such a device, or None."""

    backend: str
    function: Callable[..., Any]
    why_not: Callable[[str], str | None] = lambda device_type: None


_table: dict[str, tuple[Implementation, ...]] = {}


def register(op: str, *implementations: Implementation) -> None:
    """Enter an op's implementations, the preferred one first."""
    _table[op] = implementations


def ops() -> tuple[str, ...]:
    return tuple(sorted(_table))


def check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, allowed are {', '.join(BACKENDS)}")
    return name


def forced_backend() -> str | None:
    """The backend in force by the innermost `backend()` block, else by WIKIGPT_BACKEND, else None."""
    return None if _forced is None or check_backend(_forced) == "auto" else _forced


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for every op called inside the block, in the whole process. ValueError for an unknown name."""
    global _forced
    before, _forced = _forced, check_backend(name)
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def debug_checks() -> Iterator[None]:
    """Check the values of targets, cu_seqlens and seqused_k on a GPU too, where each call then waits for the device; on the
    CPU they are always checked. Holds for the whole process inside the with block."""
    global _debugging
    before, _debugging = _debugging, True
    try:
        yield
    finally:
        _debugging = before


def checks_values(device_type: str) -> bool:
    """Whether a call looks at the values of its index tensors: on the CPU, and under `debug_checks`."""
    return (device_type == "cpu" or _debugging) and not torch.compiler.is_compiling()


def choose(op: str, device_type: str, name: str | None = None) -> Callable[..., Any]:
    """The function that computes `op` on this type of device.

    `name` forces a backend for this call; None or "auto" leave it to `backend()` and WIKIGPT_BACKEND.
    Raises RuntimeError with the reason where the forced backend cannot run.
    """
    wanted = forced_backend() if name is None or check_backend(name) == "auto" else name
    reasons = []
    for implementation in _table[op]:
        if wanted is not None and implementation.backend != wanted:
            continue
        if wanted is None and implementation.backend == "triton" and device_type == "cpu":
            continue  # the interpreter is for tests: it never computes unless it is asked to
        reason = implementation.why_not(device_type)
        if reason is None:
            return implementation.function
        reasons.append(f"{implementation.backend}: {reason}")
    if wanted is not None and not reasons:
        have = ", ".join(i.backend for i in _table[op])
        reasons = [f"{op} has no {wanted} implementation in this version (it has {have})"]
    raise RuntimeError(f"backend {wanted!r} cannot compute {op} on {device_type}: {'; '.join(reasons)}")


def explain(op: str, device_type: str) -> list[tuple[str, str | None]]:
    """(backend, reason it cannot run here or None) for each implementation of `op`, the preferred one first."""
    return [(i.backend, i.why_not(device_type)) for i in _table[op]]


def only_on(*device_types: str) -> Callable[[str], str | None]:
    """A `why_not` for an implementation that runs on these types of device alone."""

    def why_not(device_type: str) -> str | None:
        if device_type in device_types:
            return None
        return f"runs on {' and '.join(device_types)}, not on {device_type}"

    return why_not


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def watched(*args: Any) -> bool:
    """Whether more than this call and its numbers counts: the compiler, a trace, a transform of torch.func, a mode or a
    tensor with functions of its own sees each call of PyTorch, and may take it for what other inputs will do too."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.overrides.has_torch_function(args)
    )


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode derivatives are asked for."""
    return any(tensor is not None and unpack_dual(tensor).tangent is not None for tensor in tensors)


def no_forward_mode(op: str) -> NotImplementedError:
    return NotImplementedError(f"{op} has no forward-mode derivative (use backend='reference')")


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """NotImplementedError for forward-mode derivatives, which a registered operator would drop in silence."""
    if not torch.compiler.is_compiling() and has_tangent(*tensors):
        raise no_forward_mode(op)


def _triton_missing() -> str | None:
    """The reason why Triton cannot be used, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 6):
        return f"triton {version} is too old (needs 3.6 or newer)"
    return None


# Looked up once, because torch.compile of torch 2.11 goes through a cached function and cannot trace what is inside this one.
_TRITON_MISSING = _triton_missing()


def why_not_triton(device_type: str) -> str | None:
    """The `why_not` of a Triton kernel."""
    if device_type == "cpu" and not interpreting():
        return "runs on cuda, not on cpu (TRITON_INTERPRET=1 interprets kernels there)"
    if device_type not in ("cpu", "cuda"):
        return f"runs on cuda, not on {device_type}"
    return _TRITON_MISSING


@functools.cache
def imported(module: str, package: str) -> Any:
    """A module that is imported at first use, because it imports triton. importlib takes 2 us to find one that is there."""
    return importlib.import_module(module, package)


@functools.cache
def extension() -> tuple[Any, str | None]:
    """(the module wikigpt._C or None, the reason why it is missing or None)."""
    try:
        # By name, because this folder is also published alone, where no package stands above it.
        module = importlib.import_module("wikigpt._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            return (
                None,
                "csrc/ was not built (needs torch and a C++ compiler: pip install --no-build-isolation ., see docs/build.md)",
            )
        return None, f"wikigpt._C does not load ({str(error).splitlines()[0]})"
    return module, None


def extension_lacks(device_type: str, operator: str) -> str | None:
    """Why wikigpt._C has no operator of this name for this type of device, or None."""
    module, missing = extension()
    if module is None:
        return missing
    if not hasattr(torch.ops.wikigpt, operator):
        return "wikigpt._C is of an older version (build csrc/ again)"
    if device_type == "cuda" and module.build_info()["cuda"] is None:
        return "wikigpt._C was built without CUDA"
    return None


def in_extension(device_type: str, operator: str) -> Callable[[str], str | None]:
    """The `why_not` of an operator of wikigpt._C. Looked up once, because torch.compile cannot load a library."""
    lacks, elsewhere = extension_lacks(device_type, operator), only_on(device_type)
    return lambda wanted: elsewhere(wanted) or lacks


def extension_fake(operator: str, fake: Callable[..., Any]) -> None:
    """Registers the fake implementation of an operator of wikigpt._C, if it is there."""
    if extension_lacks("cpu", operator) is None:
        torch.library.register_fake(f"wikigpt::{operator}", fake)
