"""What a result says of its machine: whatever the tools there print, a result is never lost for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import machine


@pytest.fixture
def gpu(monkeypatch):
    """What PyTorch says of a GPU."""
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: properties.name)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a tool on PATH that prints these bytes and ends with this code."""

    def put(name: str, printed: bytes, code: int = 0) -> None:
        (tmp_path / f"{name}.out").write_bytes(printed)
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\ncat {tmp_path / name}.out\nexit {code}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return put


@pytest.mark.parametrize(
    ("printed", "driver"),
    [
        (b"580.159\n", "580.159"),
        (b"580.159\n580.159\n", "580.159"),
        (b"", "not known"),
        (b"\n \n", "not known"),
        (b"\xff\xfe\n", "\ufffd\ufffd"),
        (
            b"Failed to initialize NVML: Driver/library version mismatch\n",
            "Failed to initialize NVML: Driver/library version mismatch",
        ),
    ],
)
@pytest.mark.parametrize("code", [0, 9])
def test_the_driver_is_the_first_line_that_nvidia_smi_prints(printed, driver, code, gpu, tool):
    tool("nvidia-smi", printed, code)
    assert machine.facts("cuda")["driver"] == driver


def test_without_nvidia_smi_the_facts_say_so(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.facts("cuda")["driver"].startswith("not available")


def test_a_tool_that_hangs_is_given_up():
    assert machine.run(sys.executable, "-c", "import time; time.sleep(60)", seconds=0.5).startswith("not available")


@pytest.mark.parametrize("asked", ["get_device_properties", "get_device_capability"])
def test_what_pytorch_does_not_say_costs_no_other_fact(asked, gpu, monkeypatch):
    def fails(device):
        raise RuntimeError("CUDA error: unknown error")

    monkeypatch.setattr(torch.cuda, asked, fails)
    found = machine.facts("cuda")
    assert any(value == "not known (RuntimeError: CUDA error: unknown error)" for value in found.values())
    assert found["versions"]["torch"] == torch.__version__
    json.dumps(found)


def test_a_machine_without_a_name_has_a_folder(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "")
    monkeypatch.setattr(machine, "cpu_name", lambda: "")
    assert machine.folder("cuda") == "not-known"
    assert machine.folder("cpu") == "cpu-not-known"


def test_damaged_metadata_of_a_package_is_no_version(monkeypatch):
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda package: None)
    assert machine.versions()["triton"] == "not known"


# --- the commit -------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the source without its history, inside a repository of something else."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q", str(tmp_path)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], cwd=tmp_path, check=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path / "copy")
    monkeypatch.delenv("WIKIGPT_COMMIT", raising=False)


def test_a_copy_without_history_has_no_commit_and_not_that_of_a_repository_around_it(copy):
    assert machine.commit() == "not known"


@pytest.mark.parametrize("given", [None, "", " "])
def test_where_a_commit_is_required_its_absence_names_the_variable(given, copy, monkeypatch):
    if given is not None:
        monkeypatch.setenv("WIKIGPT_COMMIT", given)
    with pytest.raises(RuntimeError, match="set WIKIGPT_COMMIT"):
        machine.require_commit()


def test_the_variable_names_the_commit_of_a_copy(copy, monkeypatch):
    monkeypatch.setenv("WIKIGPT_COMMIT", "0" * 40)
    assert machine.require_commit() == "0" * 40


def test_a_damaged_repository_has_no_commit(copy):
    (machine.ROOT / ".git").write_text("gitdir: nowhere")
    assert machine.commit() == "not known"
    with pytest.raises(RuntimeError, match="set WIKIGPT_COMMIT"):
        machine.require_commit()


def test_a_repository_names_its_commit_and_whether_files_differ(copy):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (machine.ROOT / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], cwd=machine.ROOT, check=True)
    clean = machine.require_commit()
    assert len(clean) == 40
    (machine.ROOT / "file").write_text("2")
    assert machine.require_commit() == f"{clean} with changes"
