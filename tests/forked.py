"""Processes that begin with torch and the command line imported, which takes two seconds: copies of one that has done it."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["wikigpt.cli", "wikigpt.train", "wikigpt.generate", "wikigpt.evaluate"])


def _run_module(module: str, arguments: list[str], cwd: str, environment: dict[str, str], printed: list[str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate([os.devnull, *printed]):
        os.dup2(os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_module(
    module: str, arguments: list[str], cwd: Path, env: dict[str, str], timeout: float
) -> subprocess.CompletedProcess:
    """`python -m module arguments`, as subprocess.run gives it."""
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        printed = [f"{folder}/stdout", f"{folder}/stderr"]
        process = _CONTEXT.Process(target=_run_module, args=(module, arguments, str(cwd), env, printed))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, process.exitcode, *(Path(path).read_text() for path in printed))
