"""The list of settings for people: what `key=value` takes, with its default and the comment beside it in config.py."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import Any

from .config import settings


def table(width: int = 100) -> str:
    """One line per setting, or more where it is longer than `width`: group.key=default, then what it is for."""
    names = [f"{row.group}.{row.name}={_written(row.default)}" for row in settings()]
    column = max(map(len, names)) + 2
    lines = []
    for name, row in zip(names, settings()):
        text = f"{name:{column}}{row.meaning}".rstrip()
        lines += textwrap.wrap(text, max(width, column + 20), subsequent_indent=" " * column, break_on_hyphens=False)
    return "\n".join(lines)


def _written(default: Any) -> str:
    """A default as it is typed on the command line: text without quotes, none, true."""
    return default if isinstance(default, str) else str(default).lower()


def keys_epilog() -> str:
    """The settings as the end of `wikigpt train --help`, for a terminal of 80 columns."""
    # Brackets would be typer's markup.
    return "Settings, as KEY=VALUE with their defaults:\n" + table(78).replace("[", r"\[")


def purpose(preset: str) -> str:
    """What a preset is for: the first sentence of the comment that its file begins with."""
    text = (Path(__file__).parent / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line[1:].strip() for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
    return comment.split(". ")[0].removesuffix(".")


__all__ = ["keys_epilog", "purpose", "table"]
