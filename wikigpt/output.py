"""What the command line prints: output that may fail, progress, and numbers that people read."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """Run a command inside; whatever becomes of standard output is no traceback, now or when Python ends.

    A reader that has gone (`| head -1`) ends the process quietly with status 1, as typer and rich do. An output that cannot
    be written is a UserError. A character that the terminal's encoding lacks is printed as "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        _flush()


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """What the operating system refuses inside (a full disk, a name that is too long, a file without permission, too little
    memory) is a UserError."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error) or type(error).__name__).splitlines()[0]
        if error.filename is not None:
            raise UserError(f"{_short(str(error.filename))}: {reason}") from error
        # What has no name was open already: standard output, most likely.
        raise UserError(
            f"{reason}; free some space or send the output elsewhere" if error.errno in _FULL else reason
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        raise UserError("not enough memory for this: a smaller batch, context, text or model needs less") from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch's words on the CPU and on a GPU, where its exception is a RuntimeError too.
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory", re.IGNORECASE)


def _short(name: str, most: int = 100) -> str:
    """A file's name without its middle where it is very long, which can be what is wrong with it."""
    return name if len(name) <= most else f"{name[: most // 2]}...{name[-most // 2 :]}"


def _flush() -> None:
    """Write what is left of standard output. Where that fails, what is left goes nowhere, or Python would try again at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard()
        raise SystemExit(1) from None
    except OSError as error:
        _discard()
        raise UserError(f"{error.strerror or error}; free some space or send the output elsewhere") from None


def _discard() -> None:
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def check_file(path: str | Path) -> None:
    """Raises UserError for a file that cannot be written: said before the work that would be lost."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    if not path.parent.is_dir():
        what = "is no folder" if path.parent.exists() else "does not exist"
        raise UserError(f"cannot write {path}: {path.parent} {what}; make that folder first, or choose another")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: no permission to write into {path.parent}; choose another folder")


@contextlib.contextmanager
def progress(what: str, console: Any) -> Iterator[Callable[[int, int], None]]:
    """Gives a function (done, total) to call now and then: a bar where `console` is a terminal, else a line on standard error
    every ten seconds."""
    if not console.is_terminal:
        begun = last = time.monotonic()

        def on_step(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done < total and now - last >= SECONDS_BETWEEN_LINES:
                last = now
                left = (now - begun) * (total - done) / done
                print(f"{what}: {done / total:.0%}, about {duration(left)} left", file=sys.stderr, flush=True)

        yield on_step
        return

    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: int) -> str:
    """A number of parameters in three digits: 812, 5.06k, 19.3M, 1.24B."""
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * factor:
            digits = number / factor
            return f"{digits:.{2 if digits < 9.995 else 1 if digits < 99.95 else 0}f}{unit}"
    return str(number)


__all__ = ["check_file", "count", "duration", "guarded_output", "progress", "system_errors"]
