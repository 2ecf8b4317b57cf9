"""Options of the benchmarks, their parameters, what their files hold, and the tables at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import LOST_DEVICE, UNFINISHED, in_lines, machine, records
from .suite import Measure, Report, entry_of, file_of
from .tables import SMOKE, print_tables
from .timing import copy_ceiling, matmul_ceiling

_report = Report()
_begin = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sizes", choices=("smoke", "check", "default", "full"), default="default",
        help="how large the problems are; check: what make gpu-check has time for, on a CPU the same as smoke",
    )  # fmt: skip
    parser.addoption("--device", choices=("cpu", "cuda"), default=None, help="default: cuda where there is one")
    parser.addoption("--time-limit", type=float, default=None, help="seconds after which further groups are skipped")
    parser.addoption(
        "--journal", type=Path, action="append", default=[], help="file to which each finished row is added at once"
    )
    parser.addoption("--skip-finished", action="store_true", help="leave out what the journal has at this commit")
    parser.addoption("--part", default="bench/bench", help="the part of the journal that the rows belong to")


def pytest_configure(config: pytest.Config) -> None:
    if sizes_of(config) == "smoke" and device_of(config) == "cpu":
        # Problems so small gain nothing from a second thread, and on a busy machine they wait long for it.
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes of bench_training.py
        torch.set_num_threads(1)

    def say(line: str) -> None:
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            terminal = config.pluginmanager.getplugin("terminalreporter")._tw
            # It may stand behind the name of the file or letters of finished rows.
            begin = "\n" if terminal.width_of_current_line else ""
            terminal.write(f"{begin}{in_lines(line)}\n")

    _report.say, _report.sizes = say, sizes_of(config)
    if paths := config.getoption("--journal"):
        journal, part = records.Journal(*paths), config.getoption("--part")
        journal.add(part, "begin", **records.about(device_of(config), sizes_of(config)))
        _report.journal = lambda row, case="": journal.add(part, "row", case=case, **entry_of(row))


def sizes_of(config: pytest.Config) -> str:
    found = config.getoption("--sizes")
    return "smoke" if found == "check" and device_of(config) == "cpu" else found


def device_of(config: pytest.Config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> str:
    return sizes_of(request.config)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return device_of(request.config)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, device: str, sizes: str) -> Measure:
    return Measure(_report, benchmark, request, device, sizes)


def key_of(item: Any) -> tuple[str, str, Any] | None:
    """The group that a row belongs to, as `Measure` keeps it."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return (item.module.__name__, item.function.__name__, parameters["case"]) if "case" in parameters else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    test: Any = metafunc.function
    if not hasattr(test, "peers"):
        return
    device, sizes = device_of(metafunc.config), sizes_of(metafunc.config)
    parameters = []
    for case in test.cases(device, sizes):
        for name, peer in test.peers(case, device, sizes).items():
            reason = peer.missing(device)
            if reason is None:
                parameters.append(pytest.param(case, name, id=f"{'-'.join(str(x) for x in case)}-{name}"))
            else:
                key = file_of(metafunc.module.__name__)
                _report.missing.setdefault(reason, {}).setdefault(key, set()).add(name)
    metafunc.parametrize(("case", "name"), parameters)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the groups of which the journal has every row already."""
    paths = config.getoption("--journal")
    if not paths or not config.getoption("--skip-finished"):
        return
    part = records.fold(records.read_lines(paths[0])).get(config.getoption("--part"), {"rows": []})
    # A wrong row is measured again, unless it has cost a process its device.
    finished = {
        (row["case"], row["name"]) for row in part["rows"] if row.get("case") and (not row.get("wrong") or row.get("lost"))
    }
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(str(key_of(item)), []).append(item)
    done = [
        item
        for key, members in groups.items()
        if all((key, item.callspec.params.get("name")) in finished for item in members if hasattr(item, "callspec"))
        for item in members
        if hasattr(item, "callspec")
    ]
    config.hook.pytest_deselected(items=done)
    left = set(items) - set(done)
    items[:] = [item for item in items if item in left]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == LOST_DEVICE:
        session.exitstatus = LOST_DEVICE
    elif _report.late and session.config.getoption("--journal"):
        session.exitstatus = UNFINISHED
    elif exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.getoption("--skip-finished"):
        session.exitstatus = pytest.ExitCode.OK  # everything was finished before


def pytest_collection_finish(session: pytest.Session) -> None:
    # -k may have left out rows: what nobody asked for is not measured.
    for item in session.items:
        if (key := key_of(item)) is not None:
            _report.chosen.setdefault(key, []).append(item.callspec.params["name"])  # type: ignore[attr-defined]


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--time-limit")
    if limit is not None and time.monotonic() - _begin > limit and key_of(item) not in _report.groups:
        _report.late.add(item.nodeid)
        pytest.skip(f"the time limit of {limit:.0f} s has passed")


# --- files ----------------------------------------------------------------------------------------------------------


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    brand = machine_info.get("cpu", {}).get("brand_raw", machine.cpu_name())
    machine_info["cpu"] = {"brand_raw": brand, "count": machine_info.get("cpu", {}).get("count")}
    for noise in ("python_build", "python_compiler", "node"):
        machine_info.pop(noise, None)
    machine_info["wikigpt"] = machine.facts(device_of(config))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Statistics without the samples they were made of, and the ceilings of this run."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        for key in ("params", "options"):  # cases are objects, and the axes hold what they say
            entry.pop(key, None)
    device = device_of(config)
    output_json["sizes"] = sizes_of(config)
    output_json["missing"] = {
        reason: {test: sorted(names) for test, names in tests.items()} for reason, tests in _report.missing.items()
    }
    output_json["left_out_for_time"] = sorted(_report.late)
    rows = [row for row in _report.rows if row.info.get("ceiling")]
    output_json["ceilings"] = {
        **{f"matmul {dtype}": matmul_ceiling(device, getattr(torch, dtype))
           for dtype in dict.fromkeys(row.info["dtype"] for row in rows if row.info["ceiling"] == "matmul")},
        **({"copy": copy_ceiling(device)} if any(row.info["ceiling"] == "copy" for row in rows) else {}),
    }  # fmt: skip


# --- the terminal -----------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_report_header(config: pytest.Config) -> Generator[None, list[Any], list[Any]]:
    """What is measured, in the place of pytest-benchmark's defaults: none of them holds here."""
    lines = [line for line in (yield) if not str(line).startswith("benchmark: ")]
    sizes = sizes_of(config)
    return [f"benchmarks on {device_of(config)}, {SMOKE if sizes == 'smoke' else f'sizes {sizes}'}", *lines]


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots: each group has a line."""
    return ("passed", "", "PASSED") if report.when == "call" and report.passed else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Generator[None, None, None]:
    """Ours is the last of all, and pytest-benchmark's own table, as wide as it likes, is there for those who ask for it."""
    session = terminalreporter.config._benchmarksession
    option = terminalreporter.config.getoption
    asked = option("--benchmark-columns") or option("--benchmark-compare") or option("--benchmark-verbose")
    session.quiet = session.quiet or not asked
    if not option("--benchmark-columns"):
        session.columns = ["min", "median"]
    yield
    print_tables(_report, device_of(terminalreporter.config), terminalreporter.verbosity > 0)
