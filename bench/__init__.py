"""Benchmarks, and the check of everything on a machine with a GPU. WIKIGPT_FAKE_GPU=90 puts a fake GPU of that architecture in
the place of a real one: all that a GPU would run is run up to the launch, and computes nothing."""

from __future__ import annotations

import os

FAKE = bool(os.environ.get("WIKIGPT_FAKE_GPU"))
if FAKE:
    from .fake_gpu import install_if_asked

    install_if_asked()  # before anything imports Triton
