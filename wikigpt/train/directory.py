"""A run directory, and that it belongs to one process at a time.

It holds config.yaml, log.jsonl, loss.png, tensorboard/, last.pth (to resume) and wiki-gpt.pth (to use: the weights with the
lowest validation loss). They appear when the first step is done, so that a run which fails before leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from wikigpt.checkpoint import LAST, NAME
from wikigpt.errors import UserError
from wikigpt.files import remove_temporary, writable_directory

LOG = "log.jsonl"
PICTURE = "loss.png"
CONFIG = "config.yaml"
BOARD = "tensorboard"
LOCK = ".wikigpt.lock"
_WRITTEN = (NAME, LAST, LOG, PICTURE, CONFIG)


@contextlib.contextmanager
def owned(directory: str | Path, resume: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """The run directory, made where needed, as this process's own until the end of the block.

    Raises UserError where another process owns it, where it holds a run that neither `resume` nor `overwrite` speaks of, and
    where there is nothing to resume. What is there stays there: a run that overwrites takes it away with its first step.
    """
    directory = Path(directory)
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it: give one of the two")
    if resume and not (directory / LAST).is_file():
        raise UserError(f"nothing to resume in {directory}: no {LAST} there; leave --resume out to start a run")
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    writable_directory(directory)
    if (directory / LOCK).exists() and not (directory / LOCK).is_file():
        raise UserError(f"{directory / LOCK} is no file, and wikigpt needs that name; choose another --out")
    lock, owner = FileLock(directory / LOCK), None
    try:
        with contextlib.suppress(OSError):
            owner = (directory / LOCK).read_text().strip()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = f"process {owner}" if owner else "another process"
            raise UserError(f"{who} is training into {directory}: stop it, wait for it, or choose another --out") from None
        (directory / LOCK).write_text(f"{os.getpid()}\n")
        there = [name for name in (*_WRITTEN, BOARD) if (directory / name).exists()]
        if there and not (resume or overwrite):
            if {LAST, NAME} & set(there):
                raise UserError(f"{directory} holds a run already; add --resume to go on with it or --overwrite to replace it")
            raise UserError(
                f"{directory} holds {there[0]} already, which a run writes; choose another --out or add --overwrite"
            )
        remove_temporary(directory, _WRITTEN)
        yield directory
    finally:
        if lock.is_locked:
            # Before it is released: who opened the file until now sees that it is gone, and opens another.
            (directory / LOCK).unlink(missing_ok=True)
            lock.release()
        with contextlib.suppress(OSError):  # something lies in it
            for folder in made:
                folder.rmdir()


def clear(directory: Path) -> None:
    """Take away the files of an earlier run but last.pth, in whose place that of the new one is. Raises UserError."""
    board = directory / BOARD
    try:
        for name in _WRITTEN:
            if name != LAST:
                (directory / name).unlink(missing_ok=True)
        for events in board.glob("events.out.tfevents*"):
            events.unlink()
    except OSError as error:
        raise UserError(f"cannot replace {error.filename}: {error.strerror}; remove it, or choose another --out") from error
    with contextlib.suppress(OSError):  # it is not there, or holds something else
        board.rmdir()


__all__ = ["BOARD", "CONFIG", "LAST", "LOG", "PICTURE", "clear", "owned"]
