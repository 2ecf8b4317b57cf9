"""A plugin of pytest for the GPU tests of `make gpu-check`: which ones run, what is known of each as soon as it is known.

    pytest -p bench.gpu_tests --gpu-tests=small|big [-n 12] [--journal FILE --part tests/gpu [--skip-finished]]

small: every test that needs a GPU and is not marked full; big: those that need most of its memory, which must run alone. A
failure is printed whole when it happens; each outcome is a line of the journal, and a test that was begun and has no other line
was running when time was over. An error that loses the device ends its worker, so that the next test has a fresh one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from . import FAKE, device_is_lost, records

# Files whose every test runs where there is a GPU say so by this name.
DEVICE = "DEVICE"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-tests", choices=("small", "big"), default="small", help="which tests run")
    parser.addoption("--journal", type=Path, action="append", default=[], help="file to which each outcome is added at once")
    parser.addoption("--part", default="tests/gpu", help="the part of the journal that they belong to")
    parser.addoption("--skip-finished", action="store_true", help="leave out what has passed at this commit")


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Hands(config), "wikigpt-gpu-tests-hands")
    config.pluginmanager.register(Follower(config), "wikigpt-gpu-tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    big = config.getoption("--gpu-tests") == "big"
    # Workers that start later have to collect what the first ones did, so the controller looks once.
    passed = set(config.workerinput["passed"]) if hasattr(config, "workerinput") else _passed(config)

    def wanted(item: pytest.Item) -> bool:
        marks = {mark.name for mark in item.iter_markers()}
        on_gpu = "gpu" in marks or hasattr(getattr(item, "module", None), DEVICE)
        return on_gpu and "full" not in marks and ("big" in marks) == big and item.nodeid not in passed

    chosen = [item for item in items if wanted(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _passed(config: pytest.Config) -> set[str]:
    """Tests that have passed in this part, which an earlier call began at the same commit."""
    paths = config.getoption("--journal")
    if not config.getoption("--skip-finished") or not paths or not paths[0].exists():
        return set()
    part = records.fold(records.read_lines(paths[0])).get(config.getoption("--part"), {})
    return {test for test, entry in part.get("tests", {}).items() if entry["outcome"] in ("passed", "skipped")}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.getoption("--skip-finished"):
        session.exitstatus = pytest.ExitCode.OK  # all have passed before


class Hands:
    """With xdist alone: what the controller knows goes to every worker."""

    def __init__(self, config: pytest.Config):
        self.passed = sorted(_passed(config))

    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["passed"] = self.passed


class Follower:
    def __init__(self, config: pytest.Config):
        self.config = config
        self.worker = hasattr(config, "workerinput")
        self.lost = False
        paths = config.getoption("--journal")
        self.journal = records.Journal(*paths) if paths and not self.worker else None
        self.part = config.getoption("--part")
        if self.journal is not None:
            # Without --skip-finished all are to run again, and a call that goes on is to leave out those of this one alone.
            anew = {} if config.getoption("--skip-finished") else {"anew": True}
            self.journal.add(self.part, "begin", **anew, **records.about("cuda", "smoke" if FAKE else "check"))

    def _enter(self, test: str, outcome: str, **more: Any) -> None:
        if self.journal is not None:
            self.journal.add(self.part, "test", test=test, outcome=outcome, **more)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._enter(nodeid, "running")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.lost |= report.failed and device_is_lost(report.longreprtext)
        if report.when != "call" and report.passed:
            return
        outcome = {"passed": "passed", "skipped": "skipped"}.get(report.outcome, "failed")
        self._enter(report.nodeid, outcome, seconds=round(report.duration, 2))
        if outcome == "failed" and not self.worker:
            terminal = self.config.pluginmanager.getplugin("terminalreporter")
            text = [f"FAILED {report.nodeid} ({report.when})", *report.longreprtext.splitlines()]
            terminal.write("\n" + "".join(f"| {line}\n" for line in text))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.worker and self.lost:
            os._exit(1)  # on a lost device every further test would fail; the controller starts another worker
