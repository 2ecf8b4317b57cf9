"""Benchmarks, and the check of everything on a machine with a GPU. WIKIGPT_FAKE_GPU=90 puts a fake GPU of that architecture in
the place of a real one: all that a GPU would run is run up to the launch, and computes nothing."""

from __future__ import annotations

import os
import re
import shutil
import textwrap

# What PyTorch, Triton and the driver say when nothing on the device works any more in this process.
_LOST = ("CUDA error", "Triton Error [CUDA]", "an illegal memory access", "device-side assert", "unspecified launch failure")


# Exit codes of the parts of gpu-check.
UNFINISHED = 7  # something was left out for time
LOST_DEVICE = 8  # a new process can go on with what comes after


def device_is_lost(error: object) -> bool:
    return any(word in str(error) for word in _LOST)


NO_BREAK = "\N{NO-BREAK SPACE}"  # a space at which no line is to break


def width() -> int:
    """Of what is printed: that of the terminal, and at most 100."""
    return max(40, min(100, shutil.get_terminal_size((100, 24)).columns))


def in_lines(text: str) -> str:
    """A line for people, which begins with "| ", no wider than that; what stands between ":" and ";" stays in one piece."""
    pieces = re.split(r"(?<=[:;]) ", text)
    kept = " ".join(piece.replace(" ", NO_BREAK) if len(piece) < 45 else piece for piece in pieces)
    lines = textwrap.fill(kept, width(), initial_indent="| ", subsequent_indent="|   ", break_on_hyphens=False)
    return lines.replace(NO_BREAK, " ")


FAKE = bool(os.environ.get("WIKIGPT_FAKE_GPU"))
if FAKE:
    from .fake_gpu import install_if_asked

    install_if_asked()  # before anything imports Triton
