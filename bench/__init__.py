"""Benchmarks, and the check of everything on a machine with a GPU. WIKIGPT_FAKE_GPU=90 puts a fake GPU of that architecture in
the place of a real one: all that a GPU would run is run up to the launch, and computes nothing."""

from __future__ import annotations

import os

# What PyTorch, Triton and the driver say when nothing on the device works any more in this process.
_LOST = ("CUDA error", "Triton Error [CUDA]", "an illegal memory access", "device-side assert", "unspecified launch failure")


# Exit codes of the parts of gpu-check.
UNFINISHED = 7  # something was left out for time
LOST_DEVICE = 8  # a new process can go on with what comes after


def device_is_lost(error: object) -> bool:
    return any(word in str(error) for word in _LOST)


FAKE = bool(os.environ.get("WIKIGPT_FAKE_GPU"))
if FAKE:
    from .fake_gpu import install_if_asked

    install_if_asked()  # before anything imports Triton
