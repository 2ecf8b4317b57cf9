"""bench.verdict: what it calls right, what it calls wrong, and that nothing keeps it from the next case."""

from __future__ import annotations

import os
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import records, verdict
from bench.verdict import CASES, F32, Case, Draw, by_backend, judge

ARGS = Namespace(ops=["rotary", "norm"], sizes="smoke", device="cpu", journal=[])
draw = partial(Draw, "cpu", True)
TRUTH = torch.randn(100, dtype=torch.float64)


def results(ours: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return {"out": (ours, TRUTH.float(), TRUTH)}


def test_the_rounding_of_plain_pytorch_is_right():
    assert judge(results(TRUTH.float())).wrong == []


@pytest.mark.parametrize(
    "ours",
    [TRUTH.float() + 1e-3, TRUTH.float() * torch.nan, TRUTH.float()[:50], TRUTH.half()],
    ids=["an error", "nan", "another shape", "another dtype"],
)
def test_anything_else_is_wrong(ours):
    assert judge(results(ours)).wrong


def test_a_single_element_that_was_not_written_is_wrong():
    ours = TRUTH.float()
    ours[17] = torch.nan
    assert judge(results(ours)).wrong


def doubled(x: torch.Tensor, backend: str | None) -> torch.Tensor:
    return 2 * x


def case(function) -> Case:
    return by_backend("double", F32, lambda draw: ({"x": draw.normal(9)}, lambda backend, x: function(x, backend)))


def test_outputs_and_gradients_are_compared():
    found = case(doubled).evaluate(draw())
    assert found.keys() == {"out", "dx"}
    assert judge(found).wrong == []


def test_a_result_that_moves_from_run_to_run_is_wrong():
    moving = iter(range(10))
    with pytest.raises(AssertionError, match="out differ from one run to the next"):
        case(lambda x, backend: 2 * x + (0 if backend else 1e-7 * next(moving))).evaluate(draw())


def run(monkeypatch, tmp_path: Path, *cases: Case) -> tuple[bool, list[dict]]:
    monkeypatch.setitem(CASES, "rotary", list(cases))
    journal = records.Journal(tmp_path / "journal.jsonl")
    right = verdict.run("rotary", 0, draw, journal, ARGS)
    return right, journal.lines()


def test_a_case_that_raises_is_wrong_and_the_next_one_is_heard(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "100")  # in a narrower terminal lines wrap

    def fails(draw: Draw):
        raise RuntimeError("ptxas was not found\nand more")

    right, lines = run(monkeypatch, tmp_path, Case("first", fails), case(doubled))
    assert not right
    assert [line["ok"] for line in lines] == [False, True]
    assert lines[0]["wrong"] == "RuntimeError: ptxas was not found"
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("| rotary, small: first: FAIL: RuntimeError: ptxas was not found")
    assert "dx 0.0e+00: ok" in shown[1]


def test_after_a_lost_device_a_new_process_goes_on_with_the_next_case(monkeypatch, tmp_path):
    def loses(draw: Draw):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Replaced(Exception):
        pass

    def execv(path: str, arguments: list[str]) -> None:
        raise Replaced(" ".join(arguments[1:]))

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(Replaced, match=r"-m bench.verdict rotary norm --from 1 --failed --sizes smoke --device cpu"):
        run(monkeypatch, tmp_path, Case("first", loses), case(doubled))


def test_every_op_of_the_library_has_a_verdict():
    from wikigpt.kernels import _dispatch

    told = {
        "flash_attention": "attention", "flash_attn_with_kvcache": "decode", "layer_norm": "norm", "rms_norm": "norm",
        "adamw": "optimizer", "grad_norm": "optimizer", "sample": "sampling",
        **dict.fromkeys(("bias_gelu", "gelu", "geglu", "swiglu"), "activation"),
    }  # fmt: skip
    assert {told.get(op, op) for op in _dispatch.ops()} <= CASES.keys()
