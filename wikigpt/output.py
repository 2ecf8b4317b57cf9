"""What the command line prints: any character, progress, and numbers that people read; and where it writes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

SECONDS_BETWEEN_LINES = 10.0


def show_any_character() -> None:
    """From here on a character that the terminal's encoding lacks is printed as "?"."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def check_file(path: str | Path) -> None:
    """Raises UserError for a file that cannot be written: said before the work that would be lost."""
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file in it")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is a device or a pipe, which a file cannot replace: name a file")
        if not path.parent.is_dir():
            what = "is no folder" if path.parent.exists() else "does not exist"
            raise UserError(f"cannot write {path}: {path.parent} {what}; make that folder first, or choose another")
    except OSError as error:  # a name that is too long
        raise UserError(f"cannot write {shortened(path)}: {error.strerror}; choose another name") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: no permission to write into {path.parent}; choose another folder")


def shortened(name: str | Path, most: int = 100) -> str:
    """A file's name without its middle where it is very long, which can be what is wrong with it."""
    text = str(name)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


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


__all__ = ["check_file", "count", "duration", "progress", "show_any_character"]
