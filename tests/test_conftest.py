"""What the tests themselves promise: in CI no tool is missing in silence, a sample has a case of every test."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests import conftest
from tests.conftest import ROOT


@pytest.fixture
def run(tmp_path):
    """Runs pytest with our conftest.py on one file; what it prints of each outcome."""

    def of(source: str, *options: str, **environment: str) -> dict[str, int]:
        (tmp_path / "test_file.py").write_text(source)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.conftest",
            "-p",
            "no:cacheprovider",
            "-q",
            *options,
            "test_file.py",
        ]
        paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        given = {**os.environ, "PYTHONPATH": paths, **environment}
        done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True)
        words = done.stdout.splitlines()[-1].replace(",", "").split()
        assert "in" in words, done.stdout + done.stderr
        return {what.rstrip("s"): int(n) for n, what in zip(words[::2], words[1 : words.index("in") : 2])}

    return of


@pytest.mark.parametrize(
    "reason",
    [
        "could not import 'triton': No module named 'triton'",
        "triton is for Linux alone",
        "triton, which compiles, is for Linux alone",
        "triton 3.1.0 is too old (needs 3.6 or newer)",
        "nvcc is not here",
        "needs g++",
        "g++ with its sanitizers is not here",
        "csrc/ is not built (no C++ compiler)",
        "csrc/ was not built (needs torch and a C++ compiler: pip install --no-build-isolation ., see docs/build.md)",
        "wikigpt._C is of an older version (build csrc/ again)",
        "wikigpt._C does not load (undefined symbol)",
        "needs Hugging Face's package kernels",
    ],
)
def test_in_ci_a_skip_for_a_missing_tool_is_a_failure(reason, monkeypatch):
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("file", 1, f"Skipped: {reason}"))
    conftest.fail_for_a_missing_tool(report)
    assert report.outcome == ("failed" if conftest.IN_CI else "skipped")
    monkeypatch.setattr(conftest, "IN_CI", True)
    conftest.fail_for_a_missing_tool(report)
    assert report.outcome == "failed"
    assert reason in report.longrepr


@pytest.mark.parametrize(
    "reason",
    [
        "needs a CUDA device",
        "a GPU is here: Triton compiles",
        "wikigpt._C was built without CUDA",
        "the snapshot is that of triton 3.7.1, here is 3.6.0",
        "this PyTorch has no varlen_attn_out",
        "this processor has no vectors of 16 floats",
        "this machine lends no 29 GiB of addresses",
        "the real WikiText-2 is not here: set WIKIGPT_DATA_DIR",
        "needs 60 GiB of free GPU memory",
    ],
)
def test_in_ci_what_the_hardware_lacks_stays_a_skip(reason, monkeypatch):
    monkeypatch.setattr(conftest, "IN_CI", True)
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("file", 1, f"Skipped: {reason}"))
    conftest.fail_for_a_missing_tool(report)
    assert report.outcome == "skipped"


SKIPS = """import pytest, sys
def test_a_tool(): pytest.skip("nvcc is not here")
@pytest.mark.skipif(True, reason="needs g++")
def test_a_mark(): pass
def test_a_module(): pytest.importorskip("no_such_module")
def test_expected(): pytest.xfail("needs g++")
def test_hardware(): pytest.skip("needs a CUDA device")
"""


def test_in_ci_every_way_to_skip_for_a_tool_fails(run):
    assert run(SKIPS, CI="true") == {"failed": 2, "error": 1, "skipped": 1, "xfailed": 1}  # a mark's skip is in the setup


def test_elsewhere_a_missing_tool_is_a_skip(run):
    assert run(SKIPS, CI="") == {"skipped": 4, "xfailed": 1}


def test_in_ci_a_file_that_is_skipped_whole_for_a_tool_is_an_error(run):
    assert run("import pytest; pytest.importorskip('no_such_module')", CI="true") == {"error": 1}


def test_a_sample_has_the_first_case_of_every_test_and_every_nth(run):
    source = """import pytest
@pytest.mark.parametrize("case", range(7))
def test_many(case): assert case in (0, 3, 6)
@pytest.mark.parametrize("case", range(2))
def test_two(case): assert case == 0
def test_one(): pass
"""
    assert run(source, "--sample", "3") == {"passed": 5, "deselected": 5}
