"""What the benchmarks promise: wrong and failing implementations are told apart, and functions take turns."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import suite
from bench.suite import Peer, Problem, measure_group, plain
from bench.timing import take_turns


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
