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
    return write_results(tmp_path)


def write_results(tmp_path: Path) -> Path:
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


def cells(text: str) -> dict[str, list[str]]:
    """The lines of all tables by their first cell."""
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]
    return {line[0]: line for line in table}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """docs/ of the results."""
    folder = tmp_path_factory.mktemp("made")
    report.main(["--results", str(write_results(folder / "results")), "--out", str(folder / "docs")])
    return folder / "docs"


def test_the_page_has_figures_where_there_are_results_and_a_dash_where_there_are_none(made):
    text = (made / "benchmarks.md").read_text()
    line = cells(text)
    assert line["attention forward, head_dim 64 and 128, S 512 to 16k"][3] == "0.80x, worst 0.80x"
    assert line["decoding, batch 1 to 64, context 8k to 128k"][3] == "-"
    assert line["WikiText-2 for the same time"][3] == "ours 61.5"
    assert "| 2.0x | 2.00x |" in text  # the fastest of ours against plain PyTorch, compiled
    assert "| 5.0x | 10.00x |" in text
    assert "NVIDIA H100 80GB HBM3; torch 2.11.0, triton 3.6.0; 2026-01-02, commit aaaaaaaaaa." in text
    assert "not installed: attention: flash-attn 2." in text
    assert text.count("not measured") == 1, "said once, at the top"
    for name in ("speed", "roofline-attention", "memory-attention", "training", "wikitext"):
        for end in (".svg", "-dark.svg", ".png"):
            assert (made / "benchmarks" / f"h100-{name}{end}").stat().st_size > 1000
        assert f'srcset="benchmarks/h100-{name}-dark.svg"' in text


def test_the_page_begins_with_ours_against_the_best_of_the_others_and_marks_where_we_lose(made):
    text = (made / "benchmarks.md").read_text()
    first = text[: text.index("## Goals")]
    line = cells(first)
    assert line["attention"] == [
        "attention",
        "SDPA cuDNN",
        "2",
        "**0.80x**",
        "**0.80x**",
        "forward, head_dim 64, causal, S 512",
    ]
    assert line["training step, bf16"][1:4] == ["plain PyTorch, compiled", "1", "1.80x"]
    assert len(first.splitlines()) < 25


def test_every_row_stands_on_the_page_of_its_machine(made):
    text = (made / "benchmarks" / "h100.md").read_text()
    assert "(benchmarks/h100.md)" in (made / "benchmarks.md").read_text()
    for name in ("ours", "SDPA flash", "SDPA cuDNN", "reference"):
        assert text.count(f"| {name} |") >= 2, "a row for each of two shapes"
    assert text.count("\n## ") == 2


def test_one_operation_is_a_line_whatever_its_directions_and_forms():
    names = {
        "attention forward and backward, head_dim 64, causal": "attention",
        "rms_norm with residual, backward": "rms_norm with residual",
        "bias_gelu tanh, forward and backward": "bias_gelu tanh",
        "sample, top_k 50, top_p 0.9": "sample",
        "sample, no filter": "sample",
        "training step, bf16": "training step, bf16",
        "patched Llama, forward": "patched Llama, forward",
    }
    assert {op: report.family(op) for op in names} == names


def test_a_table_made_by_hand_says_once_what_all_its_rows_share(results):
    same = {"machine": "2 cores", "commit": "abc", "date": "2026-01-02"}
    rows = [{"seconds": 95.25, "command": "make train", "conditions": "quiet", **same},
            {"seconds": 1200, "command": "make train", "conditions": "two busy processes", **same}]  # fmt: skip
    (results / "h100" / "first-hour.json").write_text(
        json.dumps({"first": {"title": "The first commands", "note": "Wall time.", "table": rows}})
    )
    text = report.page(report.machines(results), results / "docs")
    assert text[text.index("## The first commands") :].startswith(
        "## The first commands\n\nWall time.\n\n| conditions | seconds |\n|---|---:|\n| quiet | 95.25 |\n"
        "| two busy processes | 1,200 |\n\ncommand: make train; machine: 2 cores; commit: abc; date: 2026-01-02.\n"
    )


def test_a_folder_with_nothing_but_a_table_made_by_hand_has_no_other_section(tmp_path):
    (tmp_path / "cpu-x").mkdir()
    (tmp_path / "cpu-x" / "first-hour.json").write_text(json.dumps({"a": {"title": "Times", "table": [{"seconds": 3}]}}))
    text = report.page(report.machines(tmp_path), tmp_path / "docs")
    assert "## Times" in text
    assert "cpu-x" not in text


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": {"table": 3}}', '{"a": {"table": []}}', '{"a": {"table": [3]}}'])
def test_a_file_that_cannot_be_read_is_named(content, tmp_path, capsys):
    (tmp_path / "cpu-x").mkdir()
    (tmp_path / "cpu-x" / "first-hour.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        report.main(["--results", str(tmp_path), "--out", str(tmp_path / "docs")])
    assert stopped.value.code == 2
    assert "first-hour.json: " in capsys.readouterr().err


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


def test_every_goal_of_a_cpus_training_step_names_the_compiled_peer(results, tmp_path):
    rates = {"ours": 1300.0, "plain PyTorch, compiled": 1000.0, "plain PyTorch": 500.0}
    shape = "4 layers x 128, 8 x 256 tokens"
    steps = [row("training step, bf16", shape, name, 1 / rate, tokens_per_second=rate) for name, rate in rates.items()]
    write(results / "cpu", "training", training={"rows": steps, "machine": {"device": "cpu", "cpu": "A CPU", "versions": {}}})
    report.main(["--results", str(results), "--out", str(tmp_path / "docs")])
    text = (tmp_path / "docs" / "benchmarks.md").read_text().split("## Goals on a CPU")[1]
    table = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    assert table[0][-1] == "A CPU"
    lines = {tuple(cells[:3]): cells[-1] for cells in table if len(cells) == 4}
    compiled = "plain PyTorch: SDPA, torch.compile, fused AdamW"
    assert lines["training step, bf16", compiled, "1.3x"] == "1.30x, worst 1.30x"
    assert lines["training step, bf16", "plain PyTorch, eager", "2.0x"] == "2.60x, worst 2.60x"
    assert lines["training step, fp32", compiled, "1.3x"] == report.NOT_MEASURED


def test_no_results_give_a_page_of_goals(tmp_path):
    (tmp_path / "none").mkdir()
    report.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path / "docs")])
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert all(f"| {what} | {against} | {goal} |" in text for what, against, goal, _ in report.GOALS)
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


def test_a_peer_looks_the_same_in_every_plot_and_like_no_other():
    every = plots.Style(plots.LIGHT, list(plots.PEERS))
    assert len({every.line(name)["marker"] + every.color(name) for name in plots.PEERS}) == len(plots.PEERS)
    first, second = plots.Style(plots.LIGHT, ["ours", "torch.compile", "torch"]), plots.Style(plots.LIGHT, ["torch.compile"])
    assert first.line("torch.compile") == second.line("torch.compile")
    several = plots.Style(plots.LIGHT, ["ours", "ours, paged", "ours, in place", "somebody new", "torch"])
    assert len({several.line(name)["marker"] + several.color(name) for name in several.names}) == 5


def test_values_of_one_size_stand_on_an_axis_from_nought_and_every_tick_has_its_number(results):
    (machine,) = report.machines(results)
    rows = [row for row in machine.rows if row["op"].startswith("attention")]
    for spread, scale in ((1, "linear"), (100, "log")):
        for i, one in enumerate(rows):
            one["peak_bytes"] = 2**27 * (1 + spread * i / len(rows))
        figure = plots.by_length(rows, lambda row: row["peak_bytes"] / 2**20, "MiB")(plots.LIGHT)
        figure.canvas.draw()
        axis = figure.axes[0]
        assert axis.get_yscale() == scale
        low, high = axis.get_ylim()
        labels = [label.get_text() for label, at in zip(axis.get_yticklabels(), axis.get_yticks()) if low <= at <= high]
        assert len(labels) >= 3
        assert all(labels)
        assert (low == 0) == (scale == "linear")
