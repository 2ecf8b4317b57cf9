"""`make` before anything is installed: which torch it takes, what it says; each target installs what it needs, once."""

import importlib.util
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

specification = importlib.util.spec_from_file_location("wikigpt_install", ROOT / ".ci" / "install.py")
install = importlib.util.module_from_spec(specification)
specification.loader.exec_module(install)


@pytest.fixture
def machine(monkeypatch):
    """A Linux without a GPU, with PyTorch's index in reach and nothing installed; each of that can be changed."""
    monkeypatch.delenv("TORCH", raising=False)
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.setattr(install.sys, "platform", "linux")
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(install, "reachable", lambda index: None)
    monkeypatch.setattr(install, "installed", lambda package: False)
    return monkeypatch


VERSION = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))


def test_without_a_gpu_torch_is_the_build_for_processors(machine, capsys):
    assert install.torch_arguments() == [f"{VERSION}+cpu", "--extra-index-url", "https://download.pytorch.org/whl/cpu"]
    said = capsys.readouterr().out
    assert "about 190 MB" in said
    assert "no NVIDIA GPU" in said
    assert "TORCH=cuda" in said


def test_with_a_gpu_torch_is_the_build_that_pip_finds(machine, capsys):
    machine.setattr(install, "has_nvidia_gpu", lambda: True)
    assert install.torch_arguments() == [VERSION]
    assert "gigabytes" in capsys.readouterr().out


def test_elsewhere_than_on_linux_there_is_one_build(machine):
    machine.setattr(install.sys, "platform", "darwin")
    assert install.torch_arguments() == [VERSION]


def test_a_variable_overrides_what_the_machine_has(machine):
    machine.setenv("TORCH", "cuda")
    assert install.torch_arguments() == [VERSION]
    machine.setattr(install, "has_nvidia_gpu", lambda: True)
    machine.setenv("TORCH", "cpu")
    machine.setenv("TORCH_INDEX", "https://mirror.example/cpu")
    assert install.torch_arguments() == [f"{VERSION}+cpu", "--extra-index-url", "https://mirror.example/cpu"]


def test_where_pytorchs_index_is_out_of_reach_the_index_of_pip_serves_and_that_is_said(machine, capsys):
    machine.setattr(install, "reachable", lambda index: "no network")
    assert install.torch_arguments() == [VERSION]
    said = capsys.readouterr().out
    assert "cannot be reached (no network)" in said
    assert "several gigabytes" in said


def test_an_index_out_of_reach_that_was_asked_for_is_an_error(machine, capsys):
    machine.setattr(install, "reachable", lambda index: "no network")
    machine.setenv("TORCH_INDEX", "https://mirror.example/cpu")
    with pytest.raises(SystemExit):
        install.torch_arguments()
    assert "TORCH_INDEX=https://mirror.example/cpu: no network" in capsys.readouterr().err


def test_a_build_that_does_not_exist_is_an_error(machine, capsys):
    machine.setenv("TORCH", "rocm")
    with pytest.raises(SystemExit):
        install.torch_arguments()
    assert "TORCH=rocm: use cpu or cuda" in capsys.readouterr().err


def test_a_torch_that_is_there_stays(machine):
    machine.setattr(install, "installed", lambda package: package == "torch")
    machine.setattr(install, "reachable", lambda index: pytest.fail("nothing has to be asked"))
    assert install.torch_arguments() == [VERSION]


def test_an_index_that_cannot_be_reached_is_known_at_once():
    assert install.reachable("http://127.0.0.1:9/cpu")
    assert install.reachable("no address")


def test_the_time_it_took_is_said_and_the_extension_is_compiled_once(machine, capsys):
    calls = []
    machine.setattr(install, "pip", lambda *arguments, **environment: calls.append((arguments, environment)))
    install.main("train")
    install.main("dev")
    said = capsys.readouterr().out.splitlines()
    assert "about 140 MB" in said[0]
    assert said[-1] == "== done in 0 min 0 s =="
    assert [(call[0][-1], call[1]) for call in calls if "-e" in call[0]] == [
        (".[train]", {}),
        (".[dev]", {"WIKIGPT_NO_EXT": "1"}),
    ]


def test_a_pip_that_fails_ends_in_one_line(machine, capsys):
    machine.setattr(install.subprocess, "run", lambda *arguments, **keywords: subprocess.CompletedProcess(arguments, 1))
    with pytest.raises(SystemExit) as ended:
        install.pip("torch")
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def tree(tmp_path):
    """The Makefile with a python that notes what it is called with."""
    for name in ("Makefile", "pyproject.toml", "setup.py", ".ci/install.py", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    log = tmp_path / "log"
    stub = f'#!/bin/sh\necho "$(basename "$0") $@ TORCH=$TORCH" >> {log}\n'
    (tmp_path / "tool").write_text(stub)
    venv = "mkdir -p .venv/bin; for name in pip python wikigpt; do cp tool .venv/bin/$name; done"
    (tmp_path / "python").write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n{stub}\n{venv}\n')
    for name in ("tool", "python"):
        (tmp_path / name).chmod(0o755)

    def make(*arguments):
        log.write_text("")
        command = ["make", "PYTHON=./python", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines()

    return make


@pytest.mark.skipif(shutil.which("make") is None or sys.platform == "win32", reason="no make")
def test_each_target_installs_what_it_needs_and_later_calls_start_at_once(tree):
    assert tree("train", "TORCH=cuda", "ARGS=train.steps=3") == [
        "python -m venv .venv TORCH=cuda",
        "python .ci/install.py train TORCH=cuda",
        "wikigpt train --preset quick train.steps=3 TORCH=cuda",
    ]
    assert tree("train") == ["wikigpt train --preset quick TORCH="]
    first, second = tree("test", "WORKERS=2")
    assert first == "python .ci/install.py dev TORCH="
    assert second.startswith("python -m pytest -n 2")
    assert tree("setup") == []


def test_a_torch_that_there_is_not_is_refused_even_where_one_is_installed():
    done = subprocess.run(["make", "TORCH=foo", "train"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "TORCH=foo: use cpu or cuda" in done.stderr
