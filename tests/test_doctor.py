"""`wikigpt doctor`: which implementation every op gets, each reason once."""

import pytest
from wikigpt.kernels import _dispatch

from wikigpt import doctor, kernels


@pytest.fixture(autouse=True)
def nothing_is_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_report_has_about_ten_lines_and_no_reason_twice(device):
    lines = doctor.report(device)
    assert len(lines) <= 12
    assert len(set(lines)) == len(lines)
    assert sum("TRITON_INTERPRET" in line for line in lines) <= 1


def test_every_op_stands_once_beside_the_implementation_that_computes_it():
    groups = dict(line.strip().split(": ", 1) for line in doctor.report("cpu") if line.startswith("  "))
    for op in kernels.ops():
        [backend] = [b for b, ops in groups.items() if not b.startswith("no ") and op in ops.split(", ")]
        assert backend == doctor.chosen(op, "cpu")
        assert _dispatch.choose(op, "cpu", backend) is _dispatch.choose(op, "cpu")


def test_interpreted_kernels_are_not_shown_as_those_that_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not any(line.startswith("  triton:") for line in doctor.report("cpu"))


def test_a_reason_that_holds_for_few_ops_names_them(monkeypatch):
    monkeypatch.setattr(kernels, "ops", lambda: ("a", "b", "c", "d", "e"))
    monkeypatch.setattr(doctor, "chosen", lambda op, device: "torch")
    reasons = {"a": "not built", "b": "too old", "c": "too old", "d": "too old", "e": "too old"}
    monkeypatch.setattr(kernels, "explain", lambda op, device: [("cuda", reasons[op]), ("torch", None)])
    lines = doctor.report("cuda")
    assert "  torch: a, b, c, d, e" in lines
    assert "  no cuda: not built (for a)" in lines
    assert "  no cuda: too old" in lines


def test_a_forced_backend_is_named_with_the_ops_that_it_cannot_compute(monkeypatch):
    monkeypatch.setattr(_dispatch, "_forced", "triton")
    lines = doctor.report("cpu")
    assert "ops on cpu, triton alone (WIKIGPT_BACKEND):" in lines
    [none] = [line for line in lines if line.startswith("  none:")]
    assert "attention" in none
    assert any("no triton: runs on cuda, not on cpu" in line for line in lines)


def test_a_forced_backend_that_is_unknown_is_refused(monkeypatch):
    monkeypatch.setattr(_dispatch, "_forced", "foo")
    with pytest.raises(ValueError, match="got 'foo'"):
        doctor.report("cpu")


def test_the_table_has_each_op_with_all_its_implementations():
    table = doctor.table("cpu")
    assert table.row_count == len(kernels.ops())
    assert any("triton: runs on cuda" in cell for cell in table.columns[2].cells)
