"""How PyTorch's threads share a machine with other programs: decided before torch is imported, for the command line alone.

The threads of a parallel loop wait for one another at its end, and OpenMP lets them spin for milliseconds first. On a core that
another program wants too, a spinning thread uses up the time that the one it waits for needs: with two busy programs beside it
on two cores, training becomes several times slower. Here threads spin for a fraction of a millisecond, then sleep until they
are woken. `python -m bench.threads` measures what that costs on a quiet machine and gains on a busy one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

# Turns of the waiting loop (10 to 50 ns each) in GNU's OpenMP, which is in PyTorch's packages for Linux; milliseconds in LLVM's
# and Intel's, which are in those for macOS and in conda's. Each ignores the other's variable.
WAITS = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def configure(environ: MutableMapping[str, str]) -> None:
    """Waiting threads soon fall asleep, unless the user has said how they wait. For whoever imports torch after this."""
    if not any(name in environ for name in (*WAITS, "OMP_WAIT_POLICY")):
        environ.update(WAITS)


def use(count: int) -> None:
    """So many threads, in this process and in those that it starts."""
    for name in COUNTS:
        os.environ[name] = str(count)
    if (torch := sys.modules.get("torch")) is not None:  # which has read the variables already
        torch.set_num_threads(count)


def describe() -> str:
    """One line: how many threads, how they wait, how to change it."""
    import torch

    said = [f"{name}={os.environ[name]}" for name in ("OMP_WAIT_POLICY", *WAITS) if name in os.environ]
    return (
        f"{torch.get_num_threads()} on {os.cpu_count()} cores (--threads N or OMP_NUM_THREADS); "
        f"waiting: {', '.join(said) or 'as OpenMP does by itself'} (OMP_WAIT_POLICY=ACTIVE or PASSIVE)"
    )


__all__ = ["configure", "describe", "use"]
