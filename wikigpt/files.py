"""Files that are whole or not there: written under a temporary name, flushed to disk and renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from .errors import UserError

_ADVICE = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some space or choose another place",
    errno.EFBIG: "free some space or choose another place",
    errno.ENOENT: "make that folder first, or choose another place",
    errno.ENOTDIR: "a part of that path is a file; choose another place",
    errno.EISDIR: "that is a folder; name a file",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that can be written to",
}


def writable_directory(directory: str | Path) -> Path:
    """Make the directory where needed. Raises UserError where files cannot be written into it."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror or error
        raise UserError(f"cannot write to {directory}: {reason}; choose another with --out") from None
    return directory


class _Remembering:
    """A file whose failed write is known afterwards: torch.save reports one in words that do not say why."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def remove_temporary(directory: Path, names: Iterable[str]) -> None:
    """Take away what a process that was killed while it wrote one of these files has left. No other process may be writing
    there."""
    for name in names:
        for path in directory.glob(f".{name}.*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()


def write_atomically(path: str | Path, write: Callable[[Any], Any]) -> None:
    """Call write(file) on a temporary file beside `path` and rename it to `path` when it is safely on disk.

    Raises UserError where that fails; `path` is then as it was before and the temporary file is gone.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # renaming over /dev/null would take it from the whole machine
        raise UserError(f"cannot write {path}: it is no file; choose another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    file = None
    try:
        with open(temporary, "wb") as opened:
            file = _Remembering(opened)
            write(file)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save reports a failed write as RuntimeError.
        cause = file.error if file is not None and file.error is not None else error
        if not isinstance(cause, (OSError, RuntimeError)):
            raise
        number = cause.errno if isinstance(cause, OSError) else None
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        kept = "; the file that was there before is unharmed" if path.is_file() else ""
        raise UserError(f"cannot write {path}: {reason}{kept}; {_ADVICE.get(number or 0, 'choose another place')}") from error


def write_bytes(path: str | Path, content: bytes) -> None:
    """write_atomically for what is in memory."""
    write_atomically(path, lambda file: file.write(content))


__all__ = ["remove_temporary", "writable_directory", "write_atomically", "write_bytes"]
