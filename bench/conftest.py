"""Options and the closing table of the benchmarks."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sizes", choices=("smoke", "default", "full"), default="default", help="how large the problems are")
    parser.addoption("--device", choices=("cpu", "cuda"), default=None, help="default: cuda where there is one")


class ReplayClock:
    """A timer for pytest-benchmark that shows durations measured elsewhere (other processes, in turn)."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--sizes")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    import torch

    return request.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


class Summary:
    """Rows collected by the benchmarks: group -> implementation -> (seconds of each round, further columns)."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, tuple[list[float], dict[str, Any]]]] = {}

    def add(self, group: str, name: str, seconds: list[float], **columns: Any) -> None:
        self.groups.setdefault(group, {})[name] = (seconds, columns)


_summary = Summary()


@pytest.fixture(scope="session")
def summary() -> Summary:
    return _summary


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _summary.groups:
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120, highlight=False)
    for group, rows in _summary.groups.items():
        extra = list(dict.fromkeys(key for _, columns in rows.values() for key in columns))
        table = Table("implementation", "median ms", "min", "max", *extra, "time / ours", title=group)
        ours = rows.get("ours")
        for name, (seconds, columns) in rows.items():
            median = statistics.median(seconds)
            factor = "" if ours is None or name == "ours" else f"{median / statistics.median(ours[0]):.2f}x"
            table.add_row(
                name, f"{median * 1e3:.1f}", f"{min(seconds) * 1e3:.1f}", f"{max(seconds) * 1e3:.1f}",
                *(str(columns.get(key, "")) for key in extra), factor,
            )  # fmt: skip
        console.print(table)


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    import torch

    threads = torch.get_num_threads()
    print(f"\ntorch {torch.__version__}, {threads} CPU threads, CUDA {torch.cuda.is_available()}")
