"""Entry point of the `wikigpt` command: what a person can mend ends in one line and status 2, Ctrl-C in one line and 130."""

from __future__ import annotations

import errno
import os
import re
import sys

from . import threads
from .errors import UserError
from .output import shortened

# What the extra "train" of pyproject.toml brings, by the names that are imported.
TRAIN = (
    *("huggingface_hub", "matplotlib", "pyarrow", "rich", "sacrebleu", "safetensors", "tensorboard", "tokenizers", "tomli"),
    *("typer", "yaml"),
)
# Errors of the machine, not of the program.
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE)
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def missing(name: str) -> str:
    """How to get a package, which is not on PyPI as wikigpt's extra: wikigpt itself is not there."""
    if name == "torch":
        way = "pip install torch, or without a GPU: pip install torch --index-url https://download.pytorch.org/whl/cpu"
    elif name in TRAIN:
        way = 'in the folder of the repository: pip install --no-build-isolation ".[train]"'
    else:
        way = f"pip install {name}"
    return f"{name} is not installed; {way}"


def explain(error: BaseException) -> str | None:
    """The line for a person; None for what is a fault of the program, whose traceback is wanted."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        name = error.name.split(".")[0]
        return missing(name) if name != "wikigpt" else None
    if isinstance(error, MemoryError | RuntimeError) and (isinstance(error, MemoryError) or NO_MEMORY.search(str(error))):
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        where = "the GPU" if "CUDA" in str(error) else "this machine"
        way = "smaller batches (train.batch_size, and train.accumulate for it), shorter model.context_length, a smaller model"
        return f"{where} is out of memory{f', no {asked[1]} were free' if asked else ''}: {way}"
    if isinstance(error, OSError) and error.errno in MACHINE:
        return f"cannot write {error.filename or 'the output'}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG and error.filename is not None:
        return f"{shortened(error.filename)}: {error.strerror}"
    return None


def run() -> int:
    try:
        from .cli import app

        app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        return 1
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


def main() -> None:
    threads.configure(os.environ)
    status = run()
    try:
        if sys.stdout is not None:  # it is closed where the caller's is
            sys.stdout.flush()
    except OSError as error:
        # What cannot be written now cannot be written by the interpreter's end either, which would say so in its own words.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if status == 0 and not isinstance(error, BrokenPipeError):
            print(f"error: {explain(error) or error}", file=sys.stderr)
        status = status or (1 if isinstance(error, BrokenPipeError) else 2)
    sys.exit(status)


if __name__ == "__main__":
    main()
