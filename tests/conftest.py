"""Shared fixtures: where the real WikiText-2 lies, one numeric rule for every op, one thread per test process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent

# No test reaches for the network; libraries fail at once instead of retrying.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Triton reads this when it is imported. Without a GPU its kernels are interpreted, in tests that ask for them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def wikitext_directory() -> Path | None:
    for candidate in (os.environ.get("WIKIGPT_DATA_DIR"), ROOT.parent / "shared" / "data" / "wikitext-2"):
        if candidate and (Path(candidate) / "train.txt").is_file():
            return Path(candidate)
    return None


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The folder of the real WikiText-2."""
    directory = wikitext_directory()
    if directory is None:
        pytest.skip("the real WikiText-2 is not here: set WIKIGPT_DATA_DIR")
    return directory


def assert_as_accurate_as(ours: Tensor, plain: Tensor, truth: Tensor, tiny: float = 1e-6, absolute: float = 0.0) -> None:
    """FlashAttention's rule: our error against float64 is at most twice the plain version's, plus a tiny term."""
    assert truth.dtype == torch.float64
    assert ours.shape == truth.shape
    assert torch.isfinite(ours).all(), "ours is not finite"
    error, allowed = (ours.double() - truth).abs().max(), (plain.double() - truth).abs().max()
    assert error <= 2 * allowed + tiny * truth.abs().max() + absolute, f"error {error:.3e}, plain PyTorch's {allowed:.3e}"
