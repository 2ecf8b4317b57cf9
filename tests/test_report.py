"""docs/benchmarks.md and its plots, from made-up results in a folder of the test."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench import plots, records, report
from bench.tables import EVERYTHING, standings

GPU = {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2.11.0", "triton": "3.6.0"}}


def row(op: str, shape: str, name: str, median: float, **more: object) -> dict:
    return {"group": f"{op}, {shape}", "op": op, "shape": shape, "name": name, "median": median, **more}


def write(folder: Path, name: str, **parts: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    common = {"date": "2026-01-02 03:04:05 UTC", "commit": "a" * 40, "machine": GPU, "sizes": "default"}
    records.write(folder / f"{name}.json", {key: {**common, **part} for key, part in parts.items()})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = []
    for s in (512, 2048):
        for name, time in (("ours", 1.0), ("SDPA flash", 2.0), ("SDPA cuDNN", 0.8), ("reference", 9.0)):
            speed = {"flops_per_second": 4e14 / time, "of_ceiling": 0.6 / time, "ceiling": "matmul", "peak_bytes": 2**27}
            rows.append(row("attention forward, head_dim 64, causal", f"S {s}", name, time * s / 1e6, axes={"s": s}, **speed))
    write(tmp_path / "h100", "ops", attention={"rows": rows, "missing": {"not installed": {"attention": ["flash-attn 2"]}}})
    rates = {"ours": 900.0, "ours, compiled": 1000.0, "plain PyTorch, compiled": 500.0, "seed document": 100.0}
    shape = "6 layers x 512, 32 x 512 tokens"
    steps = [
        row("training step, bf16", shape, name, 1 / rate, tokens_per_second=rate, mfu=0.5, peak_bytes=2**30)
        for name, rate in rates.items()
    ]
    write(tmp_path / "h100", "training", training={"rows": steps})
    run = {
        "training_seconds": 60.0,
        "steps": 10,
        "tokens_per_second": 5.0,
        "dataset": "wikitext-2",
        "valid_perplexity": 61.5,
        "test_perplexity": 60.5,
    }
    write(tmp_path / "h100", "wikitext", ours={**run, "curve": [[1.0, 9.0], [2.0, 5.0]]})
    return tmp_path


def test_the_page_has_figures_where_there_are_results_and_says_so_where_there_are_none(results, tmp_path):
    report.main(["--results", str(results), "--out", str(tmp_path / "docs")])
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]
    line = {cells[0]: cells for cells in table}
    assert line["attention forward, head_dim 64 and 128, S 512 to 16k"][3:] == ["0.80x, worst 0.80x", "not measured"]
    assert line["decoding, batch 1 to 64, context 8k to 128k"][3:] == ["not measured", "not measured"]
    assert line["WikiText-2 for the same time"][3] == "ours 61.5"
    assert "| 2.0x | 2.00x | not measured |" in text  # the fastest of ours against plain PyTorch, compiled
    assert "| 5.0x | 10.00x | not measured |" in text
    assert "NVIDIA H100 80GB HBM3; torch 2.11.0, triton 3.6.0; 2026-01-02, commit aaaaaaaaaa." in text
    assert "not installed: attention: flash-attn 2." in text
    assert "so not measured: " in text
    for name in ("speed", "roofline-attention", "memory-attention", "training", "wikitext"):
        for end in (".svg", "-dark.svg", ".png"):
            assert (tmp_path / "docs" / "benchmarks" / f"h100-{name}{end}").stat().st_size > 1000
        assert f'srcset="benchmarks/h100-{name}-dark.svg"' in text


def test_every_plot_says_on_what_it_was_measured(results, tmp_path):
    (machine,) = report.machines(results)
    drawn = plots.draw(machine, tmp_path / "plots")
    made = [path for path in drawn.values() if path is not None]
    assert len(made) >= 5
    for path in made:
        text = path.with_name(f"{path.name}.svg").read_text()
        for words in ("NVIDIA H100 80GB HBM3", "2.11.0", "2026-01-02", "aaaaaaaaaa"):
            assert words in text
    assert drawn["Peak memory of the loss"] is None


def test_no_results_give_a_page_of_goals(tmp_path):
    (tmp_path / "none").mkdir()
    report.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path / "docs")])
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert text.count("| not measured | not measured |") == len(report.GOALS)
    assert "No GPU has run this yet" in text


def test_smoke_results_are_no_results(results):
    path = results / "h100" / "ops.json"
    content = json.loads(path.read_text())
    content["attention"]["sizes"] = "smoke"
    path.write_text(json.dumps(content))
    assert not any(row["op"].startswith("attention") for machine in report.machines(results) for row in machine.rows)
    assert any(row["op"].startswith("attention") for machine in report.machines(results, smoke=True) for row in machine.rows)


def test_a_wrong_or_late_part_is_named(results):
    write(results / "h100", "other", norm={"rows": [], "left_out_for_time": ["a", "b"]}, rotary={"error": "stopped after 9 s"})
    text = report.page(report.machines(results), results / "docs")
    assert "left out when time was over: norm: 2 rows." in text
    assert "failed: other/rotary: stopped after 9 s." in text


def test_standings_are_geometric_means_and_worst_cells():
    medians = [("norm", "1", "ours", 1.0), ("norm", "1", "torch", 4.0), ("norm", "2", "ours", 1.0), ("norm", "2", "torch", 1.0),
               ("norm", "2", "ours, blocked", 9.0), ("rope", "1", "ours", 1.0), ("rope", "1", "torch", 0.5),
               ("rope", "1", "liger", 3.0), ("alone", "1", "torch", 1.0)]  # fmt: skip
    found = {(s.op, s.peer): s for s in standings(medians)}
    assert found.keys() == {("norm", "torch"), ("rope", "torch"), ("rope", "liger"), (EVERYTHING, "torch")}
    assert found["norm", "torch"].mean == pytest.approx(2.0)
    assert found["norm", "torch"].worst == ("2", 1.0)
    assert found[EVERYTHING, "torch"].mean == pytest.approx(math.cbrt(2.0))
    assert found[EVERYTHING, "torch"].worst == ("rope, 1", 0.5)


def test_the_results_of_this_repository_can_be_read():
    found = report.machines(report.ROOT / "bench" / "results")
    assert any(machine.rows for machine in found)
