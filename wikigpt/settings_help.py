"""The list of settings that `key=value` takes, read from the source of the configuration: what a field is for stands in the
comment beside it. The source is parsed, not imported, so that a help page needs no torch."""

from __future__ import annotations

import ast
import functools
import itertools
import textwrap
from pathlib import Path
from typing import NamedTuple

FROM_TOKENIZER = ("model", "vocab_size")  # a field of the model that no user sets


class Setting(NamedTuple):
    group: str  # data, model or train
    key: str
    type: str  # "float", "int | None"
    default: str  # as Python writes it
    comment: str


@functools.cache
def settings() -> tuple[Setting, ...]:
    """Every setting, in the order of config.py."""
    path = Path(__file__).with_name("config.py")
    text = path.read_text(encoding="utf-8")
    module = ast.parse(text)
    classes = _classes(module, text)
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and "." not in node.module:
            file = path.with_name(f"{node.module}.py")
            if any(name.name.endswith("Config") for name in node.names) and file.is_file():
                other = file.read_text(encoding="utf-8")
                classes |= _classes(ast.parse(other), other)
    rows = []
    for group, name in _groups(module).items():
        rows += [Setting(group, *field) for field in classes[name]]
    return tuple(row for row in rows if (row.group, row.key) != FROM_TOKENIZER)


def _groups(module: ast.Module) -> dict[str, str]:
    """GROUPS of config.py: group -> name of its class."""
    for node in module.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "GROUPS":
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key): ast.unparse(cls) for key, cls in zip(node.value.keys, node.value.values) if key}
    raise AssertionError("config.py defines no GROUPS")


def _classes(module: ast.Module, text: str) -> dict[str, list[tuple[str, str, str, str]]]:
    """The fields (key, type, default, comment) of each class in a source."""
    lines = text.splitlines()
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    for cls in module.body:
        if not isinstance(cls, ast.ClassDef):
            continue
        found[cls.name] = []
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()  # type: ignore[operator]
                comment = rest.partition("#")[2].strip()
                default = ast.unparse(node.value)
                found[cls.name].append((node.target.id, ast.unparse(node.annotation), default, comment))
    return found


def table(width: int = 100) -> str:
    """One line per setting, or more where it is longer than `width`: group.key=default, then what it is for."""
    names = [f"{row.group}.{row.key}={_written(row.default)}" for row in settings()]
    column = max(map(len, names)) + 2
    lines = []
    for name, row in zip(names, settings()):
        text = f"{name:{column}}{row.comment}".rstrip()
        lines += textwrap.wrap(text, max(width, column + 20), subsequent_indent=" " * column, break_on_hyphens=False)
    return "\n".join(lines)


def _written(default: str) -> str:
    """A default as it is typed on the command line: text without quotes, none, true."""
    try:
        value = ast.literal_eval(default)
    except ValueError:  # no literal
        return default
    return value if isinstance(value, str) else str(value).lower()


def keys_epilog() -> str:
    """The settings as the end of `wikigpt train --help`, for a terminal of 80 columns."""
    # Brackets would be typer's markup.
    return "Settings, as KEY=VALUE with their defaults:\n" + table(78).replace("[", r"\[")


def purpose(preset: str) -> str:
    """What a preset is for: the first sentence of the comment that its file begins with."""
    text = (Path(__file__).parent / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line[1:].strip() for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
    return comment.split(". ")[0].removesuffix(".")


__all__ = ["Setting", "keys_epilog", "purpose", "settings", "table"]
