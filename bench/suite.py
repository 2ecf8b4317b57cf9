"""What every benchmark shares: rows of peers that compute one problem, each checked before it is timed.

A benchmark file gives its cases (shapes), its peers (implementations) and a function that makes a `Problem` of a case:

    @rows(cases, peers)
    def test_norm(measure: Measure, case: Case, name: str) -> None:
        measure(problem, case, name)

A case is a group of pytest-benchmark, a peer in it is a row. The first row of a group measures all of them in turn
(bench/timing.py) and hands each its samples; statistics, comparisons, histograms and files are pytest-benchmark's own.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import assert_as_accurate_as

from . import FAKE, LOST_DEVICE, device_is_lost
from .timing import Samples, copy_ceiling, matmul_ceiling, peak_bytes, take_turns

Function = Callable[..., Any]
ROUNDS = {"smoke": 5, "check": 11, "default": 15, "full": 25}
GROUP_SECONDS = {
    "smoke": 2.0,
    "check": 4.0,
    "default": 20.0,
    "full": 60.0,
}  # after these a group takes 3 rounds at least and no more


INSTALL = 'pip install --no-build-isolation ".[bench]"'


@dataclass(frozen=True)
class Peer:
    """An implementation. `make` imports or compiles it when its first row is measured."""

    make: Callable[[], Function]
    device: str | None = None  # the only kind of device that has it
    package: str | None = None  # the module that has to be importable

    def missing(self, device: str) -> str | None:
        """Why it cannot stand in a row on this machine, or None."""
        if self.device is not None and self.device != device:
            return "waits for a GPU" if self.device == "cuda" else f"runs on {self.device} alone"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"not installed ({INSTALL})"
        return None


def plain(function: Function, **options: Any) -> Peer:
    """A peer that is there already."""
    return Peer(lambda: function, **options)


@dataclass
class Problem:
    """One case: what is timed, how a result is checked, how much work it is at least."""

    op: str  # the operation and the direction
    shape: str
    # (name, function) -> the call that is timed
    call: Callable[[str, Function], Callable[[], Any]]
    # (name, function): AssertionError where it computes something else, any other error where it cannot compute this
    check: Callable[[str, Function], None]
    flops: float = 0.0
    bytes: float = 0.0
    tokens: int = 0
    dtype: torch.dtype = torch.float32
    wall: bool = False  # host time counts: whole steps of a model
    axes: dict[str, Any] = field(default_factory=dict)  # for plots
    columns: Callable[[int], dict[str, str]] = lambda peak: {}  # peak bytes -> further columns

    @property
    def group(self) -> str:
        return f"{self.op}, {self.shape}"


@dataclass
class Row:
    """One implementation of one problem: its samples and columns, or why there are none."""

    op: str
    shape: str
    name: str
    samples: Samples | None = None
    info: dict[str, Any] = field(default_factory=dict)  # for files: plain numbers
    columns: dict[str, str] = field(default_factory=dict)  # for people
    cannot: str | None = None  # it does not compute this
    wrong: str | None = None  # it computes something else, or is ours and breaks the numeric rule: it is timed all the same
    file: str = ""  # of the benchmark, for people: "norm"

    @property
    def group(self) -> str:
        return f"{self.op}, {self.shape}"


def ours(name: str) -> bool:
    return name == "ours" or name.startswith("ours,")


def dtype_of(device: str) -> torch.dtype:
    """In which a problem is timed: that of GPUs, and on a CPU its own."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def assert_right(
    name: str, results: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], absolute: float = 0.0
) -> None:
    """Ours by the numeric rule: in each result at most twice the error of `plain`, both against `truth` in float64. A peer's
    accuracy is not ours to judge, but it has to compute the same: within 5%, of the largest value too."""
    assert len(results) == len(plain) == len(truth)
    failed: AssertionError | None = None
    for got, simple, true in zip(results, plain, truth):
        if not ours(name):
            torch.testing.assert_close(got.double(), true, rtol=5e-2, atol=5e-2 * float(true.abs().max()))
            continue
        if got.shape == true.shape and true.numel():
            _errors.append(tuple(float((x.double() - true).abs().max()) for x in (got, simple)))
        try:
            assert_as_accurate_as(got, simple, true, absolute=absolute)
        except AssertionError as error:
            failed = failed or error
    if failed is not None:
        raise failed


_errors: list[tuple[float, ...]] = []  # (ours, plain PyTorch's) of each result that assert_right has compared


def error_ratio() -> float | None:
    """The largest error of ours in parts of plain PyTorch's, over what was compared since the last call. None: nothing was."""
    ratios = [ours / plain if plain else float(ours > 0) for ours, plain in _errors]
    _errors.clear()
    return max(ratios, default=None)


# --- measuring ------------------------------------------------------------------------------------------------------


class _Turns:
    """The timer that pytest-benchmark reads: its moments are as far apart as a sample that was taken before."""

    def __init__(self) -> None:
        self.now = 0.0
        self.__name__ = "bench.timing.take_turns"

    def __call__(self) -> float:
        return self.now


TURNS = _Turns()


def hand_over(benchmark: Any, group: str, seconds: list[float]) -> None:
    """Give samples to pytest-benchmark, whose test must be marked with the timer TURNS."""
    left = iter(seconds)

    def step() -> None:
        TURNS.now += next(left, 0.0)

    benchmark.group = group
    benchmark.pedantic(step, rounds=len(seconds), iterations=1)


@functools.cache
def make(peer: Peer) -> Function:
    """Made once: a compiled function keeps what it compiled."""
    # After eight shapes torch.compile would run a function as it is, and the row would not be what it says.
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 10_000
    return peer.make()


def guarded(row: Row, act: Callable[[], Any]) -> Any:
    """What `act` gives, or None after its error was entered in the row: a peer may be unable, ours may not."""
    try:
        return act()
    except AssertionError as error:
        row.wrong = f"{row.name} gives a wrong result for {row.group}: {error}"
    except Exception as error:  # of compilers too, and of packages that nobody here has seen
        first = (str(error).strip().splitlines() or [""])[0]
        if device_is_lost(error):
            raise
        if ours(row.name):
            row.wrong = f"{row.name} fails for {row.group}: {type(error).__name__}: {first}"
        else:
            row.cannot = f"{type(error).__name__}: {first}"
    return None


def measure_group(
    problem: Problem, peers: Mapping[str, Peer], device: str, sizes: str, only_check: bool = False
) -> dict[str, Row]:
    """Check every peer, then time all that can run: a wrong one is flagged, and how fast it is may say why."""
    found = {name: Row(problem.op, problem.shape, name) for name in peers}

    def compare(name: str) -> None:
        function = make(peers[name])
        if FAKE:  # a fake GPU computes nothing
            return
        error_ratio()
        try:
            problem.check(name, function)
        finally:
            if (ratio := error_ratio()) is not None:
                found[name].info["error_ratio"] = ratio

    def prepare(name: str) -> Callable[[], Any]:
        call = problem.call(name, make(peers[name]))
        call()
        return call

    for name, row in found.items():
        guarded(row, functools.partial(compare, name))
    if only_check:
        return found
    able = [name for name, row in found.items() if row.cannot is None]
    prepared = {name: guarded(found[name], functools.partial(prepare, name)) for name in able}
    calls = {name: call for name, call in prepared.items() if call is not None}
    if not calls:
        return found
    samples = take_turns(calls, device, ROUNDS[sizes], wall=problem.wall, limit=GROUP_SECONDS[sizes])
    for name, call in calls.items():
        fill(found[name], problem, device, samples[name], peak_bytes(call, device))
    return found


def fill(row: Row, problem: Problem, device: str, samples: Samples, peak: int) -> None:
    """Enter the samples and everything that follows from them."""
    row.samples = samples
    row.info |= {
        "op": problem.op,
        "shape": problem.shape,
        "implementation": row.name,
        "device": device,
        "axes": problem.axes,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "peak_bytes": peak,
        "calls_per_sample": samples.calls,
        "clock": "events" if device == "cuda" and not problem.wall else "host",
    }
    row.columns = {}
    if samples.with_host:
        row.info["with_host"] = True
    if problem.tokens:
        rate = problem.tokens / samples.median
        row.info["tokens_per_second"] = rate
        row.columns["tokens/s"] = f"{rate:,.0f}"
    if problem.flops:
        rate, ceiling = problem.flops / samples.median, matmul_ceiling(device, problem.dtype)
        row.info |= {"flops_per_second": rate, "of_ceiling": rate / ceiling, "ceiling": "matmul"}
        row.columns |= {"TFLOP/s": f"{rate / 1e12:.3g}", "of matmul": f"{rate / ceiling:.0%}"}
    elif problem.bytes:
        rate, ceiling = problem.bytes / samples.median, copy_ceiling(device)
        row.info |= {"bytes_per_second": rate, "of_ceiling": rate / ceiling, "ceiling": "copy"}
        row.columns |= {"GB/s": f"{rate / 1e9:,.4g}", "of copy": f"{rate / ceiling:.0%}"}
    row.columns |= {"peak MiB": f"{peak / 2**20:,.1f}", **problem.columns(peak)}
    if row.wrong is not None:
        row.info["wrong"] = row.wrong


# --- pytest ---------------------------------------------------------------------------------------------------------

Cases = Callable[[str, str], Iterable[Any]]  # (device, sizes) -> hashable cases
Peers = Callable[[Any, str, str], Mapping[str, Peer]]  # (case, device, sizes) -> every peer, also those that are missing
Build = Callable[[Any, str], Problem]  # (case, device)


class Measure:
    """The fixture of that name: measures the group of a row when its first row asks, reports the row."""

    def __init__(self, report: Report, benchmark: Any, request: pytest.FixtureRequest, device: str, sizes: str):
        self.report, self.benchmark, self.request = report, benchmark, request
        self.device, self.sizes = device, sizes

    def __call__(self, build: Build, case: Any, name: str) -> None:
        def group(names: list[str]) -> dict[str, Row]:
            peers = self.request.function.peers(case, self.device, self.sizes)
            chosen = {n: peer for n, peer in peers.items() if n in names}
            return measure_group(build(case, self.device), chosen, self.device, self.sizes, self.benchmark.disabled)

        self.group(case, name, group)

    def group(self, case: Any, name: str, measure: Callable[[list[str]], dict[str, Row]]) -> None:
        """The row `name` of what `measure` finds for all rows of this group that the session runs."""
        key = (self.request.module.__name__, self.request.function.__name__, case)
        if key in self.report.errors:  # the other rows of its group need not try again
            pytest.fail(f"this group failed: {self.report.errors[key]}", pytrace=False)
        if key not in self.report.groups:
            try:
                self.report.groups[key] = measure(self.report.chosen[key])
            except Exception as error:
                self.report.errors[key] = f"{type(error).__name__}: {error}"
                if device_is_lost(error):
                    self.report.device_is_lost(str(key), self.report.chosen[key], self.report.errors[key])
                raise
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self.report.group_is_done(str(key), self.report.groups[key])
        self.finish(self.report.groups[key][name])

    def finish(self, row: Row) -> None:
        """Hand a row to pytest-benchmark and to the tables; an error for a wrong result."""
        row.file = file_of(self.request.module.__name__)
        self.report.rows.append(row)
        if row.cannot is not None:
            pytest.skip(f"{row.name} does not compute {row.group}: {row.cannot}")
        if row.samples is None:
            self.benchmark.skipped = True  # pytest-benchmark is not to warn that it was not used
        else:
            self.benchmark.extra_info.update(row.info)
            hand_over(self.benchmark, row.group, row.samples.seconds)
        if row.wrong is not None:
            pytest.fail(row.wrong, pytrace=False)


def file_of(module: str) -> str:
    """What a benchmark is called: "norm" for bench.bench_norm."""
    return module.rpartition(".")[2].removeprefix("bench_")


@dataclass
class Report:
    """What a session of pytest has measured."""

    sizes: str = "default"
    groups: dict[Any, dict[str, Row]] = field(default_factory=dict)
    errors: dict[Any, str] = field(default_factory=dict)  # group -> why it has no rows
    late: set[str] = field(default_factory=set)  # rows left out when time was over
    chosen: dict[Any, list[str]] = field(default_factory=dict)  # group -> names that this session runs
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, dict[str, set[str]]] = field(default_factory=dict)  # reason -> test -> names
    # Where a row is written: one that may be measured further, or with the name of its case one that is finished.
    journal: Callable[..., None] = lambda row, case="": None
    say: Callable[[str], None] = lambda line: None  # where a line for a person goes

    def device_is_lost(self, case: str, names: list[str], error: str) -> None:
        """No row can be measured in this process any more: one that goes on is to leave this group out."""
        for name in names:
            row = Row(case, "", name, wrong=f"the device was lost: {error}", info={"lost": True})
            self.journal(row, case)
        self.say(f"WRONG: {case}: {error}")
        pytest.exit("the device is lost to this process", LOST_DEVICE)

    def group_is_done(self, case: str, rows: Mapping[str, Row]) -> None:
        """Rows to the journal, and one line to whoever looks on."""
        for row in rows.values():
            self.journal(row, case)
        self.say(line_of(rows, ratios=self.sizes != "smoke"))


def line_of(rows: Mapping[str, Row], ratios: bool = True) -> str:
    """A group in one line: time and rate of ours, how many times as long each peer takes (or how long), what is wrong."""
    group = next(iter(rows.values())).group
    if FAKE:  # times of a fake GPU are no figures
        how = [f"{name} {row.wrong or row.cannot or 'ran'}" for name, row in rows.items()]
        return f"{group}: {', '.join(how)}"
    shown = []
    base = next((row.samples.median for name, row in rows.items() if name == "ours" and row.samples), None)
    for name, row in rows.items():
        if row.samples is None:
            shown.append(f"{name} {'FAILS' if row.wrong else 'cannot'}")
        elif name == "ours" or base is None or not ratios:
            rate = ", ".join(f"{row.columns[key]} {key}" for key in RATES if key in row.columns) if ratios else ""
            shown.append(f"{name} {row.samples.median * 1e3:.4g} ms{', ' if rate else ''}{rate}")
        else:
            shown.append(f"{name} {row.samples.median / base:.2f}x")
    wrong = [f"WRONG: {row.wrong}" for row in rows.values() if row.wrong]
    return f"{group}: {'; '.join([*shown, *wrong])}"


RATES = ("TFLOP/s", "of matmul", "GB/s", "of copy", "tokens/s", "MFU")


def entry_of(row: Row) -> dict[str, Any]:
    """A row for the journal, as records.condense makes it of pytest-benchmark's."""
    entry: dict[str, Any] = {"group": row.group, "name": row.name, "op": row.op, "shape": row.shape}
    if row.samples is not None:
        seconds = row.samples.seconds
        q1, median, q3 = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        entry |= {"median": median, "q1": q1, "q3": q3, "min": min(seconds), "max": max(seconds), "rounds": len(seconds)}
    reasons = {"cannot": row.cannot, "wrong": row.wrong}
    return entry | {k: v for k, v in row.info.items() if k != "implementation"} | {k: v for k, v in reasons.items() if v}


def rows(cases: Cases, peers: Peers) -> Callable[[Function], Function]:
    """Parametrise a test by cases and by the names of the peers that this machine has."""

    def mark(test: Any) -> Any:
        test.cases, test.peers = cases, peers
        return pytest.mark.benchmark(timer=TURNS)(test)

    return mark
