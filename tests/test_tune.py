"""The tuning tool: what it drops, that a wrong answer never wins, that a run goes on where it stopped; no GPU is needed."""

import json
import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is for Linux alone")

from wikigpt.kernels import tune  # noqa: E402
from wikigpt.kernels.attention import config  # noqa: E402
from wikigpt.kernels.compile_report import Kernel  # noqa: E402

from tests.conftest import ROOT, assert_as_accurate_as  # noqa: E402

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="for the interpreter")

TINY = {
    "attention": ["--shapes", "1x18c", "--head-dim", "16", "--only", "dkdv", "--limit", "2"],
    "attention_decode": ["--shapes", "1x32", "--head-dim", "16"],
    "norm": ["--shapes", "3x32"],
    "activation": ["--shapes", "5x64"],
    "rotary": ["--shapes", "1x5"],
    "cross_entropy": ["--shapes", "5x130"],
}


def run(op, *more):
    """The tool with a timer for which the time is the number of launches: deterministic, and quick."""
    clock = iter(range(1, 10**6))

    def timer(launches):
        assert launches, "no launch of the kernels that count was recorded"
        for launch in launches:
            launch()
        return float(next(clock))

    tune.main([op, *TINY[op], "--rounds", "1", *more], timer)


@interpreted
@pytest.mark.parametrize("op", tune.OPS)
def test_every_op_goes_through_the_whole_procedure(op, capsys, tmp_path):
    run(op, "--out", str(tmp_path / "results.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    last = {(row["part"], row["config"]): row for row in rows}
    assert len(last) >= 2 * len({part for part, _ in last})
    assert all(row["verdict"] is None and row["seconds"] for row in last.values()), last
    printed = capsys.readouterr().out
    assert "rows to check in" in printed
    assert "measured" in printed


@interpreted
def test_the_wall_clock_stands_in_for_the_events_on_a_cpu(capsys):
    tune.main(["rotary", *TINY["rotary"], "--rounds", "3", "--only", "halves", "--limit", "1"])
    assert " us" in capsys.readouterr().out


@interpreted
def test_a_wrong_answer_never_wins(capsys, monkeypatch):
    """The candidate that is not today's computes something else, and is the fastest by far."""
    from wikigpt.kernels import rotary_triton

    turned = rotary_triton.turned

    def wrong(*arguments):
        q, k = turned(*arguments)
        return (q * 1.01 if rotary_triton.BYTES == 1024 else q), k

    monkeypatch.setattr(rotary_triton, "turned", wrong)
    run("rotary")
    printed = capsys.readouterr().out
    assert "wrong: error" in printed
    assert "halves: BYTES = 4096" in printed
    assert "halves: BYTES = 1024" not in printed


@interpreted
def test_a_run_goes_on_where_it_stopped_and_leaves_out_what_ended_it(monkeypatch, capsys, tmp_path):
    out, stopped = tmp_path / "results.jsonl", []
    start = tune.disagreement

    def stop(*answers):
        stopped.append(1)
        if len(stopped) == 2:
            raise KeyboardInterrupt
        return start(*answers)

    monkeypatch.setattr(tune, "disagreement", stop)
    with pytest.raises(KeyboardInterrupt):
        run("rotary", "--only", "halves", "--out", str(out))
    monkeypatch.setattr(tune, "disagreement", start)
    run("rotary", "--only", "halves", "--out", str(out))
    assert "the process died while it ran" in capsys.readouterr().out
    last = {row["config"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert last["BYTES = 4096"]["seconds"]
    assert "seconds" not in last["BYTES = 1024"]
    before = out.read_text()
    run("rotary", "--only", "halves", "--out", str(out))
    assert out.read_text() == before, "what is done is not done again"


@interpreted
def test_the_table_is_not_changed():
    before = {arch: dict(rows) for arch, rows in config._TABLE.items()}
    run("attention", "--only", "forward")
    assert before == config._TABLE
    assert config._forced is None


def kernel(**changes):
    base = {
        "op": "attention", "case": "", "name": "_forward", "arch": 90, "warps": 8, "stages": 3, "registers": 200, "spills": 0,
        "shared": 100_000, "blocks": 1, "occupancy": 0.1, "instruction": "wgmma", "instructions": 8, "load": "async 16 B",
        "store": "16 B", "barriers": 1, "blocking": "128x64",
    }  # fmt: skip
    return Kernel(**base | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"spills": 8}, "spills 8 B"),
        ({"shared": 240_000}, "does not fit"),
        ({"blocks": 0}, "does not fit"),
        ({"instruction": "mma"}, "mma, not wgmma"),
    ],
)
def test_what_the_compiler_says_drops_a_candidate(changes, reason):
    found = tune.why_not([kernel(), kernel(**changes)], True)
    assert found is None if reason is None else reason in found


def test_the_rule_of_the_tool_is_no_looser_than_that_of_the_tests():
    truth = torch.randn(64, dtype=torch.float64)
    plain = truth.float() + 1e-4
    for factor in (0.0, 1.0, 1.9, 2.5, 10.0, float("nan")):
        ours = truth.float() + 1e-4 * factor
        agrees = tune.disagreement([ours], [plain], [truth]) is None
        try:
            assert_as_accurate_as(ours, plain, truth, tiny=33 * torch.finfo(torch.float32).eps)
        except AssertionError:
            assert not agrees
        assert agrees == (factor < 2)


def test_rows_are_written_as_in_the_source():
    assert tune.literal(config.Row(128, 64, 8, 3)) == "Row(128, 64, 8, 3)"
    assert tune.literal(config.Row(128, 64, 8, 3, tma=True)) == "Row(128, 64, 8, 3, tma=True)"
    assert eval(tune.literal(config.Row(64, 64, 4, 2, True)), vars(config)) == config.Row(64, 64, 4, 2, True)


@interpreted
@pytest.mark.parametrize("arguments", [["attention"], ["attention", "--arch", "90"], ["rotary", "--only", "nothing"]])
def test_what_cannot_be_done_is_said(arguments, monkeypatch, capsys):
    if arguments == ["attention"]:
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(arguments)
    error = capsys.readouterr().err
    assert "--dry-run" in error or "known are halves; pairs" in error


@pytest.mark.slow
def test_a_dry_run_compiles_and_filters(tmp_path):
    """In a process that does not interpret: today's row and the one nearest to it, for one kernel of sm_90."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "wikigpt.kernels.tune", "attention", "--dry-run", "--arch", "90", "--head-dim", "64"]
    more = ["--only", "forward", "--limit", "2", "--shapes", "8x2048c", "--jobs", "1", "--out", str(tmp_path / "out.jsonl")]
    done = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["facts"][0]["instruction"] == "wgmma" for row in rows)
    assert "1 of 2 candidates fit" in done.stdout or "2 of 2 candidates fit" in done.stdout
    assert "to be measured" in done.stdout
