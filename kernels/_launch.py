"""What every launch of a Triton kernel needs to know on the host: sizes, and the GPU that the tensors are on.

`triton.cdiv` and `triton.next_power_of_2` take 2.4 us each on the host, and the driver takes longer to name the architecture:
so plain Python computes the former, and the latter is asked once a device.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
from torch import Tensor

from ._interpreter import repair

if triton.knobs.runtime.interpret:
    repair()  # here, because whatever launches a kernel imports this module

GRID_X = 2**31 - 1  # CUDA's limit on the first dimension of a grid; the second and the third end at 65,535


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(device: torch.device) -> int:
    """10 * major + minor of the GPU; 0 for the interpreter. A device that is no GPU gets what Triton compiles for."""
    if triton.knobs.runtime.interpret:
        return 0
    if device.type == "cuda":
        return _capability(device)
    target = triton.runtime.driver.active.get_current_target().arch
    return int(target) if isinstance(target, int) else 80


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; the interpreter counts as an H100."""
    return _multiprocessors(device) if device.type == "cuda" else 132


def grid_x(programs: int) -> tuple[int]:
    """A grid of that many programs. ValueError where CUDA cannot count them."""
    if programs > GRID_X:
        raise ValueError(f"a kernel would need {programs} programs, a GPU takes {GRID_X} at a time: divide the batch")
    return (programs,)


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The tensor's GPU as the current one: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
