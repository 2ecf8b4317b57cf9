"""What the files under bench/results/<machine>/ hold, how they are written and how to read all of them.

A part says when and on what it was made ("date", "machine", "commit") and holds either "rows" of a benchmark, each {"group",
"name", "median", ...}, figures of its own, or a "table" made by hand (bench/report.py). A .json file is an object of parts;
`pytest bench/ --benchmark-json=FILE` may be put there as it is and is read as one. A .jsonl file is a journal: a line for
everything that was finished, in the order in which it was, so that a run that is killed loses nothing but what it was at. Each
line names its part and its kind:

    begin   a part starts, on this machine, at this commit: what an earlier commit found in it no longer counts, and with "anew"
            no test that has passed before
    row     one implementation of one shape; a later line of the same group and name takes its place
    test    one test: its name and outcome
    end     the part is over: whether it passed, seconds, and figures of its own
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine

KEPT = ("median", "q1", "q3", "min", "max", "rounds")


def condense(raw: dict[str, Any]) -> dict[str, Any]:
    """A part, from the JSON of pytest-benchmark as bench/conftest.py leaves it."""
    rows = [
        {
            "group": entry["group"],
            "name": entry["extra_info"].get("implementation", entry["name"]),
            **{key: entry["stats"][key] for key in KEPT},
            **{key: value for key, value in entry["extra_info"].items() if key != "implementation"},
        }
        for entry in raw["benchmarks"]
    ]
    facts = raw["machine_info"].get("wikigpt", {})
    date = raw["datetime"][:19].replace("T", " ") + " UTC"
    part = {"date": date, "commit": facts.get("commit", "not known"), "machine": facts}
    return (
        part | {key: raw[key] for key in ("sizes", "ceilings", "missing", "left_out_for_time") if key in raw} | {"rows": rows}
    )


def write(path: Path, content: Any) -> None:
    """All of it or nothing: a reader, or a later run, never sees half a file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def about(device: str, sizes: str) -> dict[str, Any]:
    """What a part of a journal begins with."""
    facts = machine.facts(device)
    date = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"date": date, "commit": facts["commit"], "machine": facts, "sizes": sizes}


class Journal:
    """Lines appended to one or more files. A line is one write, so that processes may share a file."""

    def __init__(self, *paths: Path):
        self.paths = paths
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                with path.open("a") as file:  # what a killed process was at must not swallow the next line
                    file.write("\n")

    def add(self, part: str, kind: str, **content: Any) -> None:
        line = (json.dumps({"part": part, "kind": kind, **content}) + "\n").encode()
        for path in self.paths:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)

    def lines(self) -> list[dict[str, Any]]:
        """Those of the first file."""
        return read_lines(self.paths[0]) if self.paths[0].exists() else []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal. The write of a killed process may have ended in mid-line: such a line is left out."""
    found = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "part" in line and "kind" in line:
            found.append(line)
    return found


def merge(journals: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One journal of several, each line once, those of the one that was begun last at the end, where they count."""

    def last_begun(lines: list[dict[str, Any]]) -> str:
        return max((line.get("date", "") for line in lines), default="")

    found: dict[str, dict[str, Any]] = {}
    for lines in sorted(journals, key=last_begun):
        for line in lines:
            key = json.dumps(line, sort_keys=True)
            found.pop(key, None)
            found[key] = line
    return list(found.values())


def fold(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name of a part -> its content, as the lines of a journal leave it."""
    parts: dict[str, dict[str, Any]] = {}
    for line in lines:
        name, kind = line["part"], line["kind"]
        rest = {key: value for key, value in line.items() if key not in ("part", "kind")}
        if kind == "begin":
            before = parts.get(name, {})
            kept = before if before.get("commit") == rest.get("commit") and before.get("sizes") == rest.get("sizes") else {}
            # What the last run said at its end is not true of this one until it ends.
            tests = {} if rest.pop("anew", False) else kept.get("tests", {})
            parts[name] = {**rest, "rows": kept.get("rows", []), "tests": tests}
            continue
        part = parts.setdefault(name, {"rows": [], "tests": {}})
        if kind == "row":
            key = (rest.get("group"), rest.get("name"))
            before = next((row for row in part["rows"] if (row.get("group"), row.get("name")) == key), {})
            if (reason := before.get("wrong") or before.get("was_wrong")) and not rest.get("wrong"):
                rest["was_wrong"] = reason  # other random numbers, or luck: either way somebody must look at it
            part["rows"] = [row for row in part["rows"] if (row.get("group"), row.get("name")) != key] + [rest]
        elif kind == "test":
            part["tests"][rest["test"]] = rest
        elif kind == "end":
            part.update(rest)
    return parts


@dataclass(frozen=True)
class Record:
    """A part of a file of results."""

    folder: str  # of the machine
    file: str
    name: str  # of the part
    content: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content.get("rows", [])


def load(results: Path) -> Iterator[Record]:
    """Every part of every file, machines and files by name. ValueError for a file that is no object of parts."""
    for folder in sorted({path.parent for path in results.glob("*/*.jsonl")}):
        for name, part in fold(merge([read_lines(path) for path in sorted(folder.glob("*.jsonl"))])).items():
            file, _, key = name.partition("/")
            yield Record(folder.name, file, key or file, part)
    for path in sorted(results.glob("*/*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        parts = {path.stem: condense(content)} if "benchmarks" in content else content
        if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
            raise ValueError(f"{path}: expected an object of parts or the JSON of pytest-benchmark")
        for name, part in parts.items():
            rows = part.get("table", [{}])
            if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
                raise ValueError(f'{path}: {name}: "table" has to be a list of rows, each an object')
            yield Record(path.parent.name, path.stem, name, part)
