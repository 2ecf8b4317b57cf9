"""How many threads the command line uses, how they wait, and that neither reaches a program that uses the library."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from bench import threads as benchmark
from tests.conftest import ROOT
from wikigpt import cli_group, threads

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}


def run(code, **environment):
    """What a new process prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**CLEAN, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- how threads wait ---


def test_waiting_threads_soon_sleep():
    environ = {}
    threads.configure(environ)
    assert environ == threads.WAITS


@pytest.mark.parametrize(
    "chosen", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "200"}], ids=lambda c: next(iter(c))
)
def test_what_the_user_says_about_waiting_stays_and_nothing_is_added(chosen):
    environ = dict(chosen)
    threads.configure(environ)
    assert environ == chosen


def test_the_number_of_threads_is_left_to_pytorch_and_torchrun():
    environ = {"OMP_NUM_THREADS": "1"}
    threads.configure(environ)
    assert environ["OMP_NUM_THREADS"] == "1"
    assert not set(threads.COUNTS) & set(threads.WAITS)


def test_a_program_that_imports_the_library_keeps_its_environment():
    code = """
        import json, os
        before = dict(os.environ)
        import wikigpt, wikigpt.kernels, wikigpt.cli, wikigpt.train, wikigpt.threads, wikigpt.__main__
        changed = {name for name in os.environ if os.environ[name] != before.get(name)}
        print(json.dumps(sorted(name for name in changed if name.startswith(("OMP", "GOMP", "KMP", "MKL")))))
    """
    assert run(code) == []


# --- --threads ---


def commands(command, path=()):
    yield path, command
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*path, name))


def every_command():
    from typer.main import get_command

    from wikigpt.cli import app

    return dict(commands(get_command(app)))


@pytest.mark.parametrize("path", every_command(), ids=" ".join)
def test_every_command_shows_and_takes_threads(path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(threads, "use", asked.append)
    command = every_command()[path]
    assert command.main(["--threads", "3", "--help"], prog_name="wikigpt", standalone_mode=False) == 0
    assert asked == [3]
    assert "--threads" in capsys.readouterr().out
    assert sum("--threads" in parameter.opts for parameter in command.params) == 1


@pytest.mark.parametrize("words", ["--threads 1 doctor", "doctor --threads 1"])
def test_threads_takes_effect_before_and_after_the_command(words):
    code = f"""
        import json, os, sys
        from wikigpt import cli
        from wikigpt.__main__ import main

        assert "torch" not in sys.modules
        sys.argv = ["wikigpt", *{words!r}.split()]
        try:
            main()
        except SystemExit as ended:
            import torch
            settings = [os.environ[name] for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")]
            print(json.dumps([ended.code, torch.get_num_threads(), *settings]))
    """
    assert run(code, OMP_NUM_THREADS="2") == [0, 1, "1", threads.WAITS["GOMP_SPINCOUNT"]]


def test_threads_of_a_process_that_has_imported_torch(monkeypatch):
    for name in threads.COUNTS:
        monkeypatch.setenv(name, "5")
    before = torch.get_num_threads()
    try:
        threads.use(before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_no_threads_is_one_per_core(monkeypatch):
    monkeypatch.setattr(threads, "use", lambda count: pytest.fail("nothing to set"))
    assert cli_group._use(0) == 0
    assert cli_group._use(None) is None


def test_doctor_can_say_how_many_and_how_they_wait(monkeypatch):
    for name in (*threads.WAITS, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert "\n" not in threads.describe()
    assert f"{torch.get_num_threads()} on {os.cpu_count()} cores" in threads.describe()
    assert "as OpenMP does by itself" in threads.describe()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert "OMP_WAIT_POLICY=PASSIVE" in threads.describe()


# --- answers without torch ---


@pytest.mark.parametrize(
    "words", ["--help", "-h", "train --help", "generate -h", "tarin", "train --foo", "train --threads many"]
)
def test_help_and_typos_import_nothing_large(words):
    """torch takes seconds, matplotlib and transformers one more: 0.2 s without them, on the machine this was written on."""
    code = f"""
        import json, sys
        from wikigpt.__main__ import main

        sys.argv = ["wikigpt", *{words!r}.split()]
        try:
            main()
        except SystemExit as ended:
            print()
            print(json.dumps([ended.code, sorted({{name.split(".")[0] for name in sys.modules}})]))
    """
    status, modules = run(code)
    assert status == (0 if "-h" in words.replace("--h", "-h") else 2)
    assert not {"torch", "numpy", "matplotlib", "transformers", "pyarrow", "tokenizers", "huggingface_hub"} & set(modules)


# --- the benchmark ---


def test_the_benchmark_compares_what_the_command_line_sets_with_what_openmp_does():
    assert benchmark.SETTINGS["wikigpt"] == threads.WAITS
    assert benchmark.SETTINGS["OpenMP's own"] == {}
    assert benchmark.table({0: {"a": [1000.0, 3000.0, 2000.0]}, 2: {"a": [500.0]}}).splitlines() == [
        "tokens/s" + f"{'beside 0 busy':>24}{'beside 2 busy':>24}",
        "a       " + f"{'2,000 (1,000 to 3,000)':>24}{'500 (500 to 500)':>24}",
    ]


@pytest.mark.slow
def test_the_benchmark_runs_and_leaves_no_process(capsys):
    benchmark.main(["--settings", "wikigpt", "--busy", "0,1", "--rounds", "1", "--steps", "1"])
    *_, head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["tokens/s", "beside", "0", "busy", "beside", "1", "busy"]
    assert row.startswith("wikigpt")
