"""What the benchmarks promise: wrong and failing implementations are told apart, and functions take turns."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from wikigpt.kernels.roofline import parameters_in_words

from bench import LOST_DEVICE, bench_training, in_lines, records, suite
from bench.suite import Peer, Problem, Report, Row, measure_group, plain
from bench.tables import print_tables
from bench.timing import Samples, take_turns
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


# --- what is printed ----------------------------------------------------------------------------------------------------


def a_row(file: str, op: str, shape: str, name: str, seconds: float, **more: Any) -> Row:
    columns = {"TFLOP/s": "0.0346", "of matmul": "84%", "peak MiB": "12,345.6", "extra MiB": "1.0", "of logits": "200.0%"}
    return Row(op, shape, name, Samples([seconds] * 5), columns=columns, file=file, **more)


def a_report(sizes: str = "default") -> Report:
    """Long names and two shapes, where ours loses against one peer."""
    peers = {"ours": 2e-3, "plain PyTorch, vocabulary padded, compiled": 1e-3, "reference": 9e-3}
    shapes = ("6 layers x 512, 32 x 512 tokens, vocabulary 33,278", "12 layers x 768, 8 x 1,024 tokens, vocabulary 50,257")
    found = [a_row("training", "training step, bf16", shape, name, time) for shape in shapes for name, time in peers.items()]
    missing = {f"waits for a {i}": {f"file {j}": {"FlexAttention", f"peer {j}"} for j in range(8)} for i in ("GPU", "TPU")}
    return Report(sizes=sizes, rows=found, missing=missing)


def printed(report: Report, capsys: Any, monkeypatch: Any, columns: int = 100, **options: Any) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_tables(report, "cpu", **options)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_tables_fit_the_terminal_and_a_hundred_columns(columns, capsys, monkeypatch):
    for sizes in ("default", "smoke"):
        lines = printed(a_report(sizes), capsys, monkeypatch, columns, verbose=True)
        assert max(map(len, lines)) <= min(columns, 100)
    assert any(re.search(r"ours +2 ", line) for line in lines), "the time is shown however little room there is"


def test_a_shape_is_said_once_and_the_summary_comes_behind_all_rows(capsys, monkeypatch):
    lines = printed(a_report(), capsys, monkeypatch)
    (shape,) = [i for i, line in enumerate(lines) if line.startswith("training step, bf16, 6 layers")]
    (summary,) = [i for i, line in enumerate(lines) if line.startswith("Time of each peer / time of ours")]
    assert shape < summary
    assert lines[-1] == "Ours is slower in 1 of these 2 lines."
    assert [line for line in lines[summary:] if "ours is slower" in line and "0.50x" in line]


def test_who_is_not_here_takes_a_line_for_each_reason(capsys, monkeypatch):
    lines = printed(a_report(), capsys, monkeypatch)
    assert sum("FlexAttention" in line for line in lines) == 2


def test_smoke_sizes_give_no_ratios_and_say_that_they_are_not_worth_quoting(capsys, monkeypatch):
    for verbose in (False, True):
        text = "\n".join(printed(a_report("smoke"), capsys, monkeypatch, verbose=verbose))
        assert not re.search(r"\d\.\d\dx", text)
        assert text.count("not worth quoting") == (2 if verbose else 1)
    rows = {row.name: row for row in a_report().rows[:3]}
    assert suite.line_of(rows, ratios=False).endswith(
        "ours 2 ms; plain PyTorch, vocabulary padded, compiled 1 ms; reference 9 ms"
    )


def test_times_are_numbers_without_exponents(capsys, monkeypatch):
    report = a_report("smoke")
    report.rows[0].samples = Samples([0.1412] * 5)
    report.rows[3].samples = Samples([12.3456] * 5)
    (line,) = [line for line in printed(report, capsys, monkeypatch) if line.startswith("training ")]
    assert line.endswith("141 to 12346")


def test_what_is_wrong_is_said_last(capsys, monkeypatch):
    for sizes in ("default", "smoke"):
        report = a_report(sizes)
        report.rows[0].wrong = "ours gives a wrong result for training step: Tensor-likes are not close!\n\nMismatched: 3"
        report.errors["bench.bench_norm", "test_norm", "case 7"] = "RuntimeError: seven"
        text = "\n".join(printed(report, capsys, monkeypatch)[-8:])
        assert "== WRONG ==" in text
        assert "WRONG  ours gives a wrong result for training step: Tensor-likes are not close!" in text
        assert "WRONG  bench_norm, case 7: RuntimeError: seven" in text
        assert text.endswith("1 of 6 results are wrong, 1 groups failed")


@pytest.mark.parametrize("columns", [60, 100, 300])
def test_a_line_for_people_wraps_between_figures(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "attention forward, head_dim 64: ours 0.1033 ms, 1.2 GB/s; " + "; ".join(
        f"peer {i}, compiled 1.2{i}x" for i in range(9)
    )
    lines = in_lines(text).splitlines()
    assert all(line.startswith("| ") and len(line) <= min(columns, 100) for line in lines)
    assert all(any(f"peer {i}, compiled 1.2{i}x" in line for line in lines) for i in range(9))


def test_a_model_of_less_than_a_million_parameters_has_more_than_none():
    assert [parameters_in_words(n) for n in (124_439_808, 1_017_302_272, 229_504, 12)] == [
        "124M parameters", "1,017M parameters", "230k parameters", "12 parameters"
    ]  # fmt: skip


WRONG = """
from typing import NamedTuple
from bench.suite import Problem, plain, rows

class Case(NamedTuple):
    n: int

def problem(case, device):
    def check(name, f):
        assert name != "liger", "seven is not eight"
    return Problem("an operation with a long name", f"n {case.n}", call=lambda name, f: f, check=check, bytes=1e6)

def peers(case, device, sizes):
    return {name: plain(int) for name in ("ours", "liger", "torch, softmax + multinomial", "torch, sort + multinomial")}

@rows(lambda device, sizes: [Case(n) for n in range(2)], peers)
def test_op(measure, case, name):
    measure(problem, case, name)
"""


def run_benchmark(source: str, *arguments: str) -> tuple[int, str]:
    file = ROOT / "bench" / f"made_{os.getpid()}.py"  # only there it has the options and the fixtures of the benchmarks
    file.write_text(source)
    command = [sys.executable, "-m", "pytest", str(file), "--sizes=smoke", "--device=cpu", "-p", "no:cacheprovider", *arguments]
    # As on a terminal: under CI pytest does not cut its own lines to its width.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "BUILD_NUMBER", "CI"))}
    environment = kept | {"COLUMNS": "100"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    finally:
        file.unlink()
    return done.returncode, done.stdout


def test_a_run_prints_its_own_tables_alone_and_ends_with_what_is_wrong(tmp_path):
    code, text = run_benchmark(WRONG, f"--benchmark-json={tmp_path / 'x.json'}")
    lines = text.splitlines()
    assert code == 1
    assert "Outliers" not in text, "pytest-benchmark's own table"
    assert not [line for line in lines if len(line) > 100]
    assert "2 of 8 results are wrong" in lines[-2]
    assert len(json.loads((tmp_path / "x.json").read_text())["benchmarks"]) == 8


def test_who_asks_for_columns_of_pytest_benchmark_gets_its_table():
    _, text = run_benchmark(WRONG, "--benchmark-columns=max,ops", "-k", "0")
    assert "Outliers" in text
    assert text.index("Outliers") < text.index("Is every result right")
