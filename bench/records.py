"""What the files under bench/results/<machine>/ hold, and how to read all of them.

A file is an object of parts; a part says when and on what it was made ("date", "machine", "commit") and holds either "rows" of
a benchmark, each {"group", "name", "median", ...}, or figures of its own. `pytest bench/ --benchmark-json=FILE` may be put
there as it is: it is read as one part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    for path in sorted(results.glob("*/*.json")):
        content = json.loads(path.read_text())
        parts = {path.stem: condense(content)} if "benchmarks" in content else content
        if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
            raise ValueError(f"{path}: expected an object of parts or the JSON of pytest-benchmark")
        for name, part in parts.items():
            yield Record(path.parent.name, path.stem, name, part)
