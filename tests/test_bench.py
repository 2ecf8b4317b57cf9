"""What the benchmarks promise: wrong and failing implementations are told apart, and functions take turns."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import LOST_DEVICE, bench_training, records, suite
from bench.suite import Peer, Problem, measure_group, plain
from bench.timing import take_turns
from tests.conftest import ROOT


@pytest.fixture
def problem() -> Problem:
    x = torch.randn(64, 64)

    def check(name: str, function: Any) -> None:
        suite.assert_right(name, [function(x)], [x * 2], [x.double() * 2], absolute=1e-6)

    return Problem(op="double", shape="64", call=lambda name, f: lambda: f(x), check=check, bytes=2 * 64 * 64 * 4)


def double(x: Tensor) -> Tensor:
    return x + x


def broken(x: Tensor) -> Tensor:
    raise NotImplementedError("only even days\nand more lines")


def test_right_rows_have_samples_and_columns(problem):
    rows = measure_group(problem, {"ours": plain(double), "torch": plain(double)}, "cpu", "smoke")
    for row in rows.values():
        assert row.wrong is row.cannot is None
        assert row.samples is not None
        assert len(row.samples.seconds) == suite.ROUNDS["smoke"]
        assert row.info["bytes_per_second"] == pytest.approx(problem.bytes / row.samples.median)
        assert row.info["peak_bytes"] == 64 * 64 * 4
        assert {"GB/s", "of copy", "peak MiB"} <= row.columns.keys()


@pytest.mark.parametrize("name", ["ours", "ours, fast", "liger"])
def test_a_wrong_result_is_wrong_whoever_gives_it(problem, name):
    rows = measure_group(problem, {name: plain(lambda x: 3 * x), "torch": plain(double)}, "cpu", "smoke")
    assert "wrong result" in (rows[name].wrong or "")
    assert "wrong result" in rows[name].info["wrong"]
    assert rows[name].samples is not None, "how fast it is may say why"
    assert rows["torch"].samples is not None


def test_nan_is_wrong(problem):
    rows = measure_group(problem, {"liger": plain(lambda x: x * float("nan"))}, "cpu", "smoke")
    assert rows["liger"].wrong is not None


def test_a_peer_may_be_unable_ours_may_not(problem):
    def absent() -> Any:
        raise ImportError("libcuda.so.1")

    peers = {"ours": plain(broken), "liger": plain(broken), "quack": Peer(absent), "torch": plain(double)}
    rows = measure_group(problem, peers, "cpu", "smoke")
    assert rows["ours"].wrong == "ours fails for double, 64: NotImplementedError: only even days"
    assert rows["liger"].cannot == "NotImplementedError: only even days"
    assert rows["quack"].cannot == "ImportError: libcuda.so.1"
    assert rows["torch"].samples is not None


def test_peers_that_are_not_here_say_why():
    assert plain(double, device="cuda").missing("cpu") == "waits for a GPU"
    assert "not installed" in (Peer(lambda: double, package="no_such_package").missing("cpu") or "")
    assert plain(double).missing("cpu") is None


def test_functions_take_turns():
    order: list[str] = []
    samples = take_turns({name: lambda name=name: order.append(name) for name in ("a", "b")}, "cpu", 4)  # type: ignore[misc]
    assert [len(s.seconds) for s in samples.values()] == [4, 4]
    changes = sum(x != y for x, y in itertools.pairwise(order))
    assert changes >= 2 * 4


def test_a_slow_group_takes_three_rounds():
    samples = take_turns({"a": lambda: torch.randn(10)}, "cpu", 50, limit=0.0)
    assert len(samples["a"].seconds) == 3


def test_before_each_timed_call_the_cache_is_filled_by_reading_and_never_written():
    """What is written lies in the L2 cache as dirty lines, which the timed kernel would have to write back."""
    script = """
import bench, torch
from bench.timing import EventClock, Samples
products = []
mm = torch.mm
torch.mm = lambda *a, **k: products.append(1) or mm(*a, **k)
sleep = torch.cuda._sleep
torch.cuda._sleep = lambda cycles: order.append("sleep")
order = []
clock = EventClock()
assert products, "the spin is calibrated at the clocks of an idle GPU"
order.clear()
written = clock.cache._version
evict = clock._evict
clock._evict = lambda: (order.append("evict"), evict())
clock.measure(lambda: order.append("call"), Samples(calls=3, hold=1.0, with_host=True))
assert order == ["sleep", *["evict", "call"] * 3], order
assert clock.cache._version == written
"""
    environment = {**os.environ, "WIKIGPT_FAKE_GPU": "90,none"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Stub:
    """A worker that trains nothing, and whose CUDA graph was not captured where its name says so."""

    def __init__(self, name: str, case: Any, device: str):
        self.answers = iter([{"loss": 1.0}])
        self.figures = {"seconds": 1e-3, "peak_bytes": 1, "no_graph": "no memory" if name == "ours" else None}

    def ask(self, line: str) -> None:
        self.answers = iter([self.figures])

    def answer(self) -> dict[str, Any]:
        return next(self.answers)

    def close(self) -> None:
        pass


def test_a_graph_that_was_not_captured_is_a_wrong_row_with_a_time(monkeypatch):
    monkeypatch.setattr(bench_training, "Worker", Stub)
    names = ["ours", "ours, eager", bench_training.PLAIN]
    written: list[str] = []
    case = bench_training.Case(*bench_training.SMOKE, "fp32")
    rows = bench_training.measure_processes(case, names, "cpu", "smoke", lambda row: written.append(row.name))
    assert rows["ours"].wrong == "ours captured no CUDA graph: no memory"
    assert rows["ours"].samples is not None
    assert rows["ours, eager"].wrong is None
    assert set(written) == set(names), "each row is handed over as soon as it has three turns"


LOSES = """
from bench.suite import Peer, Problem, dtype_of, plain, rows
from typing import NamedTuple

class Case(NamedTuple):
    n: int

def lost(*_):
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

def problem(case, device):
    act = lost if case.n == 1 else int
    return Problem("op", f"n {case.n}", call=lambda name, f: act, check=lambda name, f: None)

@rows(lambda device, sizes: [Case(n) for n in range(3)], lambda case, device, sizes: {"ours": plain(int)})
def test_op(measure, case, name):
    measure(problem, case, name)
"""


def test_a_group_that_loses_the_device_is_told_and_a_new_process_goes_on_behind_it(tmp_path):
    journal = tmp_path / "journal.jsonl"
    folder = ROOT / "bench"
    file = folder / f"lost_{os.getpid()}.py"  # only there it has the options and the fixtures of the benchmarks
    file.write_text(LOSES)
    command = [sys.executable, "-m", "pytest", "-q", str(file), "--sizes=smoke", "--device=cpu", "-p", "no:cacheprovider",
               f"--journal={journal}", "--part=ops/lost", "--skip-finished", "--benchmark-quiet"]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    try:
        done = [subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True) for _ in range(2)]
    finally:
        file.unlink()
    assert [d.returncode for d in done] == [LOST_DEVICE, 0], done[0].stdout + done[1].stdout
    rows = records.fold(records.read_lines(journal))["ops/lost"]["rows"]
    assert [("median" in row, row.get("lost", False)) for row in rows] == [(True, False), (False, True), (True, False)]
    assert "illegal memory access" in rows[1]["wrong"]
