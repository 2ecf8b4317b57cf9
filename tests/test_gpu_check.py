"""The script behind `make gpu-check`, with parts that are a line of Python each."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from bench import gpu_check, machine, records
from bench.gpu_check import Folder, Part, in_order, run, run_all, shorten, summarize


def part(name: str, code: str = "", limit: float = 30.0, beside: str | None = None) -> Part:
    """Runs Python code; what it writes to result.json in its folder is what it found."""

    def command(folder: Path) -> list[str]:
        return [sys.executable, "-c", f"result = {str(folder / 'result.json')!r}\n{code}"]

    def read(folder: Path, code: int) -> dict:
        path = folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else {}

    return Part(name, limit, command, read, beside)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out")


def test_what_parts_find_is_entered_under_their_names(folder):
    write = "open(result, 'w').write('{\"speed\": %d}')"
    assert run(part("a/one", write % 1), 30, folder, "c0")
    assert run(part("a/two", write % 2), 30, folder, "c0")
    assert run(part("b/one", "print('hello')"), 30, folder, "c0")
    content = json.loads((folder.path / "a.json").read_text())
    assert [content[key]["speed"] for key in ("one", "two")] == [1, 2]
    assert content["one"]["passed"]
    assert content["one"]["commit"] == "c0"
    assert folder.read("b")["one"]["tail"] == ["hello"]
    assert "== b/one" in (folder.path / "gpu-check.log").read_text()


def test_a_crash_hides_no_other_part(folder, capsys):
    crash = part("tests/crash", "import os, signal; print('before'); os.kill(os.getpid(), signal.SIGSEGV)", beside="x")
    failed, left = run_all([crash, part("tests/fine", beside="x")], folder, "c0", 1, 2)
    assert (failed, left) == (["tests/crash"], [])
    assert folder.read("tests")["crash"]["exit_code"] == -11
    assert folder.read("tests")["fine"]["passed"]
    assert "tests/crash: FAILED" in capsys.readouterr().out


def test_a_part_that_leaves_no_result_has_failed(folder):
    strict = Part("a/one", 30, part("a/one").command, lambda folder, code: json.loads((folder / "nothing").read_text()))
    assert not run(strict, 30, folder, "c0")
    assert "no result" in folder.read("a")["one"]["error"]


def test_the_time_limit_ends_a_part_and_all_that_it_started(folder, tmp_path):
    mark = tmp_path / "grandchild"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    start = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])"
    code = f"{start}; print('on', flush=True); time.sleep(60)"
    begin = time.monotonic()
    assert not run(part("a/slow", code), 2, folder, "c0")
    assert time.monotonic() - begin < 20
    found = folder.read("a")["slow"]
    assert found["error"] == "stopped after 2 s"
    assert found["tail"] == ["on"]
    time.sleep(max(0.0, begin + 5 - time.monotonic()))
    assert not mark.exists()


def test_no_part_begins_when_the_minutes_are_over(folder):
    failed, left = run_all([part("a/one"), part("a/two", limit=600)], folder, "c0", 0.5, 1)
    assert (failed, left) == ([], ["a/two"])
    assert folder.read("a").keys() == {"one"}


def test_a_second_call_does_what_is_new_then_what_failed(folder):
    every = [part("a/failed", "raise SystemExit(3)"), part("a/passed"), part("a/new"), part("a/old")]
    for p in every[:2]:
        run(p, 30, folder, "c1")
    run(every[3], 30, folder, "c0")
    known = {p.name: folder.record(p) for p in every}
    assert [p.name for p in in_order(every, known, "c1", False)] == ["a/new", "a/old", "a/failed"]
    assert [p.name for p in in_order(every, known, "c1", True)] == [p.name for p in every]


def test_the_folder_keeps_its_limits(folder, monkeypatch):
    monkeypatch.setattr(gpu_check, "FILE_BYTES", 4000)
    monkeypatch.setattr(gpu_check, "LOG_OF_A_PART", 1000)
    for i in range(5):
        run(part(f"a/p{i}", "print('x' * 100_000)"), 30, folder, "c0")
    assert (folder.path / "gpu-check.log").stat().st_size < 4000
    assert folder.excess() == []
    (folder.path / "large.json").write_text("0" * 5000)
    for i in range(8):
        (folder.path / f"{i}.json").write_text("{}")
    assert folder.excess() == ["11 files, 8 may be", "large.json has 5,000 bytes"]
    assert shorten("a" * 50 + "b" * 50, 10).startswith("aaaaa\n")
    assert shorten("a" * 50 + "b" * 50, 10).endswith("\nbbbbb")


def test_what_a_gpu_gets_fits_its_files_and_covers_every_test_and_benchmark(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: sys.executable)
    names = [p.name for p in gpu_check.parts(Namespace(device="cuda", sizes="default"))]
    assert len(set(names)) == len(names)
    assert len({name.partition("/")[0] for name in names}) + 1 <= gpu_check.FILES  # and the log
    assert {"tests/test_gpu", "tests/memcheck", "ops/attention", "training/training", "wikitext/ours"} <= set(names)
    for path in (machine.ROOT / "bench").glob("bench_*.py"):
        assert {f"ops/{path.stem[6:]}", f"training/{path.stem[6:]}"} & set(names)
    mark = ".".join(("pytest", "mark", "gpu"))  # in one piece this file would look like one of those
    with_mark = {f"tests/{path.stem}" for path in (machine.ROOT / "tests").glob("test_*.py") if mark in path.read_text()}
    assert with_mark <= set(names)
    assert "tests/test_gpu_check" not in names


def test_without_a_gpu_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--device cpu --sizes smoke" in capsys.readouterr().err


def test_a_profile_tells_kernels_gaps_and_what_is_ours():
    kernels = [("_norm_kernel", 0, 1000), ("gemm", 1500, 3000), ("void wide_gemm<_norm_kernel_2>", 4000, 1000),
               ("_norm_kernel", 7000, 1000)]  # fmt: skip
    found = summarize(kernels, {"_norm_kernel"}, steps=2)
    assert found["kernels_per_step"] == 2
    assert found["ours_fraction"] == pytest.approx(2000 / 6000)
    assert found["idle_fraction"] == pytest.approx((500 + 2000) / 8000)
    assert found["gaps_per_step"] == 1
    assert found["median_gap_us"] == pytest.approx(1.25)
    assert found["top"][0] == {"name": "gemm", "ours": False, "fraction": 0.5, "ms_per_step": 0.0015, "calls_per_step": 0.5}
    assert summarize([], {"_norm_kernel"}, steps=1)["idle_fraction"] is None


def test_the_names_of_our_kernels_are_found():
    names = gpu_check.our_kernels()
    for kernel in ("kernels/norm_triton.py", "kernels/activation_triton.py"):
        text = (machine.ROOT / kernel).read_text()
        assert [name for name in names if f"def {name}(" in text]


def test_results_of_pytest_benchmark_and_of_the_check_are_read_alike(tmp_path):
    stats = {"median": 2.0, "q1": 1.0, "q3": 3.0, "min": 1.0, "max": 4.0, "rounds": 5}
    entry = {"group": "g, S 1", "name": "test_x[ours]", "stats": stats, "extra_info": {"implementation": "ours", "op": "g"}}
    raw = {"benchmarks": [entry], "datetime": "2026-01-02T03:04:05.6+00:00", "sizes": "default",
           "machine_info": {"wikigpt": {"commit": "abc", "gpu": "H100"}}}  # fmt: skip
    machine_folder = tmp_path / "some-machine"
    machine_folder.mkdir()
    (machine_folder / "norm.json").write_text(json.dumps(raw))
    records.write(machine_folder / "ops.json", {"norm": records.condense(raw)})
    first, second = records.load(tmp_path)
    assert first.content == second.content
    assert first.content["date"] == "2026-01-02 03:04:05 UTC"
    assert first.content["commit"] == "abc"
    (machine_folder / "other.json").write_text('{"date": "today"}')
    with pytest.raises(ValueError, match=r"other\.json: expected an object of parts"):
        list(records.load(tmp_path))
    assert second.rows == [{"group": "g, S 1", "name": "ours", "op": "g", **stats}]
