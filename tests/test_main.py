"""How the `wikigpt` command ends where the fault is not the program's: one line that names the way out, and a status."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from wikigpt import __main__ as entry
from wikigpt import cli, cli_group
from wikigpt.errors import UserError

HELP = [sys.executable, "-m", "wikigpt", "--help"]


def end(error, monkeypatch, capsys):
    """Status and lines of standard error of a command that raises this error."""

    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    return ended.value.code, capsys.readouterr().err.splitlines()


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 9.50 GiB of which 1.20 GiB is free.\nMore"
)
CASES = {
    "the user's": (UserError("no such split"), "no such split"),
    "GPU memory": (torch.OutOfMemoryError(OUT_OF_MEMORY), "the GPU is out of memory, no 2.50 GiB were free: smaller batches"),
    "memory": (MemoryError(), "this machine is out of memory: smaller batches"),
    "PyTorch's memory": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "this machine is out of memory, no 9 bytes were free: smaller",
    ),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "cannot write runs/a: No space left on device"),
    "full output": (OSError(errno.ENOSPC, "No space left on device"), "cannot write the output: No space left"),
    "training package": (
        ModuleNotFoundError(name="yaml"),
        'in the folder of the repository: pip install --no-build-isolation ".[train]"',
    ),
    "torch": (ModuleNotFoundError(name="torch"), "--index-url https://download.pytorch.org/whl/cpu"),
    "another package": (ModuleNotFoundError(name="kernels.x"), "kernels is not installed; pip install kernels"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_person_can_mend_is_one_line_and_status_2(case, monkeypatch, capsys):
    error, message = CASES[case]
    status, lines = end(error, monkeypatch, capsys)
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("x"), OSError(errno.EINVAL, "x"), ModuleNotFoundError(name="wikigpt.x")], ids=repr
)
def test_faults_of_the_program_keep_their_traceback(error, monkeypatch):
    with pytest.raises(type(error)):
        end(error, monkeypatch, None)


def test_the_packages_of_the_extra_train_are_known_by_the_names_that_are_imported():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0] for requirement in project["optional-dependencies"]["train"]}
    assert {"yaml" if name == "pyyaml" else name for name in names} == set(entry.TRAIN)


def test_ctrl_c_outside_of_training_is_one_line_and_status_130(monkeypatch, capsys):
    assert end(KeyboardInterrupt(), monkeypatch, capsys) == (130, ["interrupted"])


def test_ctrl_c_inside_of_a_command_is_the_same(capsys):
    import typer

    app = typer.Typer(cls=cli_group.Group)

    @app.command()
    def wait():
        raise KeyboardInterrupt

    @app.command()
    def other(): ...

    assert typer.main.get_command(app).main(["wait"], standalone_mode=False) == 130
    assert capsys.readouterr().err.splitlines() == ["interrupted"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_output_device_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(HELP, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: cannot write the output: No space left on device"]


def test_a_reader_that_has_gone_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(HELP, stdout=pipe, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert done.stderr == ""


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: None)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 0
