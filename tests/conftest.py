"""Shared fixtures: where the real WikiText-2 lies, one numeric rule for every op, one thread per test process."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


# A skip for one of these tools hides what was never tested. CI has them all.
TOOLS = re.compile(
    r"could not import|for Linux alone|too old|nvcc|g\+\+|gcc|compiler|csrc/|wikigpt\._C (is|does)|package kernels"
)
IN_CI = os.environ.get("CI", "").lower() in ("1", "true")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample",
        type=int,
        default=1,
        metavar="N",
        help="of every test each N-th case: for a second version of a package",
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_report_header() -> str:
    return ", ".join(f"{d.name} {d.version}" for d in importlib.metadata.distributions() if d.name in ("torch", "triton"))


@pytest.hookimpl(trylast=True)  # after -m and -k, so that what they leave is what is sampled
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    every, seen = config.getoption("--sample"), Counter[Any]()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        key = item.path, getattr(item, "originalname", item.name)
        (left_out if seen[key] % every else kept).append(item)
        seen[key] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def fail_for_a_missing_tool(report: Any) -> None:
    """In CI a test that is skipped for want of a tool has failed."""
    if IN_CI and report.skipped and not hasattr(report, "wasxfail") and TOOLS.search(str(report.longrepr)):
        report.outcome = "failed"
        report.longrepr = f"in CI nothing is skipped for a missing tool: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    fail_for_a_missing_tool(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    fail_for_a_missing_tool(report)
    return report


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
