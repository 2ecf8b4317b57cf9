"""The script behind `make gpu-check`, with parts that are a line of Python each, and once whole on a fake GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from bench import LOST_DEVICE, UNFINISHED, gpu_check, gpu_parts, machine, records
from bench.gpu_check import JOURNAL, Log, Part, left_to_do, open_journal, run, run_all
from bench.gpu_parts import summarize


def part(name: str, code: str = "", limit: float = 30.0) -> Part:
    """Runs Python code."""
    return Part(name, limit, [sys.executable, "-c", code])


@pytest.fixture
def journal(tmp_path: Path) -> records.Journal:
    return open_journal(tmp_path / "out", tmp_path / "kept")


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


def known(journal: records.Journal) -> dict[str, dict]:
    return records.fold(journal.lines())


# --- the journal --------------------------------------------------------------------------------------------------------


def test_a_journal_keeps_the_last_line_of_each_row_and_forgets_another_commit():
    journal = [
        {"part": "ops/a", "kind": "begin", "commit": "c0", "sizes": "check"},
        {"part": "ops/a", "kind": "row", "group": "g", "name": "ours", "median": 9.0},
        {"part": "ops/a", "kind": "end", "passed": True},
        {"part": "ops/a", "kind": "begin", "commit": "c1", "sizes": "check"},
        {"part": "ops/a", "kind": "row", "group": "g", "name": "ours", "median": 2.0},
        {"part": "ops/a", "kind": "row", "group": "g", "name": "torch", "median": 3.0},
        {"part": "ops/a", "kind": "row", "group": "g", "name": "ours", "median": 1.0},
    ]
    found = records.fold(journal)["ops/a"]
    assert {(row["name"], row["median"]) for row in found["rows"]} == {("ours", 1.0), ("torch", 3.0)}
    assert found["commit"] == "c1"
    assert "passed" not in found, "it has not ended at this commit"


def test_a_part_that_begins_again_at_the_same_commit_keeps_its_rows():
    begin = {"part": "ops/a", "kind": "begin", "commit": "c0", "sizes": "check"}
    row = {"part": "ops/a", "kind": "row", "group": "g", "name": "ours", "median": 1.0}
    assert records.fold([begin, row, begin])["ops/a"]["rows"] == [{"group": "g", "name": "ours", "median": 1.0}]


def test_a_line_that_was_cut_off_hides_no_other(tmp_path):
    path = tmp_path / JOURNAL
    records.Journal(path).add("ops/a", "row", group="g", name="ours", median=1.0)
    with path.open("a") as file:
        file.write('{"part": "ops/a", "kind": "row", "gro')
    assert len(records.read_lines(path)) == 1
    records.Journal(path).add("ops/a", "row", group="h", name="ours", median=1.0)
    assert [line["group"] for line in records.read_lines(path)] == ["g", "h"]


def test_the_journal_is_restored_from_either_of_its_places(tmp_path):
    """Between two calls on one machine the folder of results may be emptied, or the tree laid anew."""
    out, kept = tmp_path / "out", tmp_path / "kept"
    open_journal(out, kept).add("ops/a", "row", group="g", name="ours")
    for lost in (out, kept):
        (lost / JOURNAL).unlink()
        assert open_journal(out, kept).lines() == [{"part": "ops/a", "kind": "row", "group": "g", "name": "ours"}]
        assert (lost / JOURNAL).exists()


def test_processes_that_write_at_the_same_time_mix_no_lines(tmp_path):
    code = (
        "from pathlib import Path; from bench.records import Journal; import sys\n"
        "for i in range(200): Journal(Path(sys.argv[1])).add('p', 'row', group=sys.argv[2], name=i, text='x' * 3000)"
    )
    path = tmp_path / JOURNAL
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(i)], cwd=machine.ROOT) for i in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(records.read_lines(path)) == 400


# --- parts --------------------------------------------------------------------------------------------------------------


def test_what_a_part_says_is_shown_and_all_that_it_prints_is_logged(journal, log, tmp_path, capsys):
    assert run(part("a/one", "print('| 3 ms'); print('detail')"), 30, journal, log, "c0") == (True, 0)
    shown, logged = capsys.readouterr().out, (tmp_path / "log").read_text()
    assert "3 ms" in shown
    assert "detail" not in shown
    assert "a/one detail" in logged
    assert known(journal)["a/one"]["passed"]


def test_a_crash_hides_no_other_part(journal, log, capsys):
    crash = part("tests/crash", "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)")
    failed, left = run_all([[crash, part("tests/fine")], [part("tests/later")]], journal, log, "c0", 1)
    assert (failed, left) == (["tests/crash"], [])
    found = known(journal)
    assert found["tests/crash"]["exit_code"] == -signal.SIGSEGV
    assert found["tests/crash"]["tail"] == ["before"]
    assert found["tests/fine"]["passed"]
    assert found["tests/later"]["passed"]
    assert "tests/crash: FAILED" in capsys.readouterr().out


def test_the_time_limit_ends_a_part_and_all_that_it_started(journal, log, tmp_path):
    mark = tmp_path / "grandchild"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    start = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    passed, _ = run(part("a/slow", f"{start}; print('on', flush=True); time.sleep(60)"), 2, journal, log, "c0")
    assert passed is None
    assert time.monotonic() - begin < 20
    found = known(journal)["a/slow"]
    assert found["error"] == "time was over after 2 s"
    assert found["tail"] == ["on"]
    assert not found["complete"]
    time.sleep(max(0.0, begin + 5 - time.monotonic()))
    assert not mark.exists()


def test_no_part_begins_when_the_minutes_are_over(journal, log):
    failed, left = run_all([[part("a/one")], [part("a/two", limit=600)]], journal, log, "c0", 0.5)
    assert (failed, left) == ([], ["a/two"])
    assert known(journal).keys() == {"a/one"}


def test_what_could_come_to_no_result_in_the_time_left_does_not_begin(journal, log):
    wants = Part("wikitext/ours", 30, [sys.executable, "-c", ""], least=20)
    assert run_all([[wants]], journal, log, "c0", 15 / 60) == ([], ["wikitext/ours"])
    assert run_all([[wants]], journal, log, "c0", 25 / 60) == ([], [])


def test_a_part_that_ran_out_of_time_is_not_finished_and_has_not_failed(journal, log, capsys):
    assert run_all([[part("a/slow", "import time; time.sleep(30)", limit=1)]], journal, log, "c0", 1) == ([], ["a/slow"])
    left_out = [part("a/left-out", f"raise SystemExit({UNFINISHED})")]
    assert run_all([left_out], journal, log, "c0", 1) == ([], ["a/left-out"])
    assert "FAILED" not in capsys.readouterr().out


def test_what_passed_at_smoke_sizes_has_not_passed_at_real_ones(journal, log):
    stages = [[part("ops/a")]]
    run_all(stages, journal, log, "c0", 1, "smoke")
    assert left_to_do(stages, known(journal), "c0", False, "smoke") == []
    assert left_to_do(stages, known(journal), "c0", False, "check") == stages


def test_ctrl_c_ends_the_parts_that_run(tmp_path):
    process = fake_gpu_check(tmp_path / "out", "--only", "training/others")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("== training/others"):
            break
    time.sleep(1)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert time.monotonic() - begin < 10
    assert "interrupted" in output


def test_a_folder_of_data_that_is_not_there_is_an_error(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WIKIGPT_DATA_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("WIKIGPT_COMMIT", "c0")
    assert gpu_check.main(["--device", "cpu", "--sizes", "smoke", "--out", str(tmp_path)]) == 2
    assert "WIKIGPT_DATA_DIR" in capsys.readouterr().err


def test_journals_of_two_calls_become_one_and_the_later_call_counts():
    first, second = ([{"part": "ops/a", "kind": "begin", "commit": c, "date": d, "sizes": "check"},
                      {"part": "ops/a", "kind": "row", "group": "g", "name": "ours", "median": m}]
                     for c, d, m in (("c0", "2026-01-01", 1.0), ("c1", "2026-01-02", 2.0)))  # fmt: skip
    for journals in ([first, second], [second, first], [second, first + second]):
        found = records.fold(records.merge(journals))["ops/a"]
        assert (found["commit"], [row["median"] for row in found["rows"]]) == ("c1", [2.0])


def test_a_row_that_was_wrong_once_is_not_forgotten():
    row = {"part": "verdict/a", "kind": "row", "group": "a", "name": "case"}
    parts = records.fold([{**row, "wrong": "off by 1; --seed 7"}, {**row, "ok": True}])
    (kept,) = parts["verdict/a"]["rows"]
    assert kept["was_wrong"] == "off by 1; --seed 7"


def test_a_part_that_lost_its_device_goes_on_in_a_new_process_and_has_failed(journal, log, tmp_path):
    mark = tmp_path / "mark"
    code = (
        f"import os, sys; p = {str(mark)!r}; there = os.path.exists(p); open(p, 'w'); sys.exit(0 if there else {LOST_DEVICE})"
    )
    assert run_all([[part("ops/a", code)]], journal, log, "c0", 1) == (["ops/a"], [])
    assert known(journal)["ops/a"]["complete"], "it came to its end in the second process"


def test_with_again_too_a_part_that_lost_its_device_leaves_out_what_it_was_at(journal, log):
    code = f"import sys; sys.exit(0 if '--skip-finished' in sys.argv else {LOST_DEVICE})"
    begin = time.monotonic()
    of_pytest = Part("ops/a", 30, [sys.executable, "-c", code, "pytest"])
    assert run_all([[of_pytest]], journal, log, "c0", 1) == (["ops/a"], [])
    assert known(journal)["ops/a"]["passed"]
    assert time.monotonic() - begin < 20, "it did not try for ever"


def test_what_is_compiled_beforehand_is_not_tried_twice(journal, log):
    stages = [[part(gpu_check.WARM, "import time; time.sleep(30)", limit=1)]]
    run_all(stages, journal, log, "c0", 1)
    assert not known(journal)[gpu_check.WARM]["complete"]
    assert left_to_do(stages, known(journal), "c0", again=False) == []


def test_a_second_call_does_what_has_not_ended_then_what_failed_and_always_builds(journal, log):
    stages = [
        [part("environment/build")],
        [part("a/failed", "raise SystemExit(1)"), part("a/passed")],
        [part("a/late", "import time; time.sleep(30)", limit=1)],
        [part("a/old")],
        [part("a/new")],
    ]
    run_all(stages[:3], journal, log, "c1", 1)
    run_all(stages[3:4], journal, log, "c0", 1)
    names = [[p.name for p in stage] for stage in left_to_do(stages, known(journal), "c1", again=False)]
    assert names == [["environment/build"], ["a/late"], ["a/old"], ["a/new"], ["a/failed"]]
    assert left_to_do(stages, known(journal), "c1", again=True) == stages


def test_the_parts_of_a_killed_script_end_with_it(tmp_path):
    """Else they would hold the GPU while the next call measures."""
    mark = tmp_path / "mark"
    code = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    script = (
        "from pathlib import Path; import sys\nfrom bench import gpu_check as g\n"
        f"print('begin', flush=True); p = Path({str(tmp_path)!r})\n"
        f"part = g.Part('a/slow', 60, [sys.executable, '-c', {code!r}])\n"
        "g.run(part, 60, g.open_journal(p / 'o', p / 'k'), g.Log(p / 'l'), 'c')"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=machine.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    time.sleep(1)
    process.kill()
    process.wait()
    time.sleep(4)
    assert not mark.exists()


# --- the plan -----------------------------------------------------------------------------------------------------------


def stages_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Part]]:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: sys.executable)
    args = Namespace(device="cuda", sizes="check", again=False, workers=12)
    return gpu_check.plan(args, records.Journal(tmp_path / JOURNAL))


def test_the_plan_asks_first_what_is_right_then_what_is_fast_and_covers_every_benchmark(tmp_path, monkeypatch):
    stages = stages_for_a_gpu(tmp_path, monkeypatch)
    names = [part.name for stage in stages for part in stage]
    assert len(set(names)) == len(names)
    in_order = [
        "environment/facts", "verdict/attention", "ops/attention", "ops/norm", "ops/others", "training/training",
        "training/profile", "wikitext/ours", "wikitext/sdpa-compile", "tests/gpu", "tests/big", "sanitizer/memcheck",
    ]  # fmt: skip
    places = [names.index(name) for name in in_order]
    assert places == sorted(places)
    commands = " ".join(word for stage in stages for part in stage for word in part.command)
    for path in (machine.ROOT / "bench").glob("bench_*.py"):
        if path.stem != "bench_host":  # its launches are fake on any machine
            assert f"bench/{path.name}" in commands
    mark = ".".join(("pytest", "mark", "gpu"))  # in one piece this file would look like one of those
    for path in (machine.ROOT / "tests").glob("test_*.py"):
        if mark in path.read_text():
            assert f"tests/{path.name}" in commands


def test_what_answers_the_first_questions_fits_one_call_of_ten_minutes(tmp_path, monkeypatch):
    stages = stages_for_a_gpu(tmp_path, monkeypatch)
    limits = {stage[0].name: max(part.limit for part in stage) for stage in stages}
    until = list(limits).index("training/training")
    assert sum(list(limits.values())[: until + 1]) < 9.4 * 60


def test_the_page_names_every_part_with_its_limit(tmp_path, monkeypatch):
    text = (machine.ROOT / "docs" / "gpu-check.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    for stage in stages_for_a_gpu(tmp_path, monkeypatch):
        for one in stage:
            name = "verdict/*" if one.name.startswith("verdict/") else one.name
            (limit,) = [cells[1].removesuffix(" each") for cells in rows if name in cells[0]]
            assert float(limit) == max(part.limit for part in stage), one.name


def test_tests_that_need_most_of_the_memory_run_alone(tmp_path, monkeypatch):
    (alone,) = next(stage for stage in stages_for_a_gpu(tmp_path, monkeypatch) if stage[0].name == "tests/big")
    assert "--gpu-tests=big" in alone.command
    assert "-n" not in alone.command


def test_without_a_gpu_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--device cpu --sizes smoke" in capsys.readouterr().err


def test_without_a_commit_it_does_not_start(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("WIKIGPT_COMMIT", raising=False)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert gpu_check.main(["--device", "cpu", "--sizes", "smoke", "--out", str(tmp_path)]) == 2
    assert "WIKIGPT_COMMIT" in capsys.readouterr().err


# --- GPU tests ----------------------------------------------------------------------------------------------------------

TESTS = """
import pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_wrong():
    reason = "seven"
    assert reason == "eight"
@pytest.mark.full
def test_of_the_full_product(): raise RuntimeError
@pytest.mark.big
def test_with_most_of_the_memory(): pass
"""


def gpu_tests(tmp_path: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "test_some.py"
    if not file.exists():
        file.write_text(TESTS)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n gpu: x\n big: x\n full: x\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu_tests", f"--journal={tmp_path / JOURNAL}", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(machine.ROOT), **(env or {})}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_a_failure_is_printed_whole_and_every_outcome_is_in_the_journal(tmp_path):
    done = gpu_tests(tmp_path)
    assert done.returncode == 1
    shown = [line[2:] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert shown[0].startswith("FAILED test_some.py::test_wrong")
    assert any('assert reason == "eight"' in line for line in shown)
    tests = records.fold(records.read_lines(tmp_path / JOURNAL))["tests/gpu"]["tests"]
    assert {name.rpartition(":")[2]: entry["outcome"] for name, entry in tests.items()} == {
        "test_right": "passed", "test_wrong": "failed"
    }  # fmt: skip


def test_big_tests_are_chosen_alone(tmp_path):
    assert gpu_tests(tmp_path, "--gpu-tests=big", "--part=tests/big").returncode == 0
    tests = records.fold(records.read_lines(tmp_path / JOURNAL))["tests/big"]["tests"]
    assert [name.rpartition(":")[2] for name in tests] == ["test_with_most_of_the_memory"]


def test_a_second_call_runs_only_what_has_not_passed(tmp_path):
    gpu_tests(tmp_path)
    again = gpu_tests(tmp_path, "--skip-finished")
    assert "1 failed" in again.stdout
    assert "passed" not in again.stdout


def test_after_again_was_cut_off_a_call_goes_on_behind_the_tests_that_it_has_run(tmp_path):
    """Those that had passed before it are to run too."""
    gpu_tests(tmp_path)
    cut_off = gpu_tests(tmp_path, "-k", "wrong")  # as --again runs them: all, but it comes to one alone
    assert "1 failed" in cut_off.stdout
    gone_on = gpu_tests(tmp_path, "--skip-finished")
    assert "1 failed, 1 passed" in gone_on.stdout
    assert "passed" not in gpu_tests(tmp_path, "--skip-finished").stdout


def test_tests_on_a_gpu_begin_also_with_little_time_and_have_four_minutes(tmp_path, monkeypatch):
    (tests,) = next(stage for stage in stages_for_a_gpu(tmp_path, monkeypatch) if stage[0].name == "tests/gpu")
    assert tests.limit == 240
    assert 0 < tests.least <= 60


def test_what_is_printed_fits_a_hundred_columns_and_the_log_has_it_as_it_was(log, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    log.say(f"call again for: {', '.join(f'tests/part-{i}' for i in range(30))}")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    part = {"commit": "c0", "tests": {f"test_{i}": {"outcome": "failed"} for i in range(30)}}
    said = gpu_check.summary({"tests/gpu": part}, "c0")
    assert said[0] == "tests/gpu: 30 tests failed:"
    assert said[-1] == "  and 10 more, in the journal"
    assert len(said) == 22


def test_a_test_that_was_running_when_time_was_over_is_known(tmp_path):
    (tmp_path / "test_some.py").write_text("import os, pytest\n@pytest.mark.gpu\ndef test_hangs(): os._exit(3)\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n gpu: x\n")
    gpu_tests(tmp_path)
    found = records.fold(records.read_lines(tmp_path / JOURNAL))
    (entry,) = found["tests/gpu"]["tests"].values()
    assert entry["outcome"] == "running"
    said = gpu_check.summary(found, found["tests/gpu"]["commit"])
    assert said[-2:] == ["tests/gpu: time was over while it was at:", "  test_some.py::test_hangs"]


def test_workers_that_begin_later_collect_what_the_first_did(tmp_path):
    """A test that has passed meanwhile would be missing in their list, and tests are told to them by number."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_a(): pass\ndef test_b(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_c(): pass\ndef test_d(): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n gpu: x\n")
    done = gpu_tests(tmp_path, "-n", "1", "--skip-finished")
    assert "INTERNALERROR" not in done.stdout + done.stderr
    tests = records.fold(records.read_lines(tmp_path / JOURNAL))["tests/gpu"]["tests"]
    assert [entry["outcome"] for _, entry in sorted(tests.items())] == ["passed", "failed", "passed", "passed"]


def test_a_lost_device_ends_its_worker_and_no_other_test(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\nlost = []\n"
        "def test_a():\n    lost.append(1)\n    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_b(): assert not lost\ndef test_c(): assert not lost\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n gpu: x\n")
    gpu_tests(tmp_path, "-n", "1")
    tests = records.fold(records.read_lines(tmp_path / JOURNAL))["tests/gpu"]["tests"]
    assert [entry["outcome"] for _, entry in sorted(tests.items())] == ["failed", "passed", "passed"]


# --- the whole, on a fake GPU -------------------------------------------------------------------------------------------


def fake_gpu_check(out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "bench.gpu_check",
        "--sizes",
        "smoke",
        "--out",
        str(out),
        "--kept",
        str(out.parent / "kept"),
        *arguments,
    ]
    # Not as a child of this run of pytest: under xdist no benchmark measures.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    environment |= {"WIKIGPT_FAKE_GPU": "90,none", "WIKIGPT_COMMIT": "fake", "OMP_NUM_THREADS": "1"}
    # A shell starts what runs in its background with Ctrl-C ignored, and whatever that starts ignores it too.
    return subprocess.Popen(
        command, cwd=machine.ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def test_a_killed_check_loses_no_finished_row_and_the_next_call_goes_on(tmp_path):
    """Killed when a moment of its own choosing has come: some lines after the first row of a benchmark."""
    out = tmp_path / "out"
    process = fake_gpu_check(out, "--only", "ops/norm")
    assert process.stdout is not None
    seen: list[str] = []
    for line in process.stdout:
        if "_norm" in line and "ours ran" in line:
            seen.append(line.partition(": ours ran")[0])
            if len(seen) == 2 + os.getpid() % 3:
                process.send_signal(signal.SIGKILL)
                break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    time.sleep(1)
    rows = records.fold(records.read_lines(out / JOURNAL))["ops/norm"]["rows"]
    groups = {row["group"] for row in rows if row["name"] == "ours" and "median" in row}
    assert set(seen) <= groups
    (out / JOURNAL).unlink()  # the folder of results was emptied; the copy beside the sources was not
    again = fake_gpu_check(out, "--only", "ops/norm")
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert not any(f"{group}: " in output for group in seen), "measured twice"
    rows = records.fold(records.read_lines(out / JOURNAL))["ops/norm"]["rows"]
    assert len({row["group"] for row in rows if row["name"] == "ours" and "median" in row}) == 8


# --- profiles and files of results ----------------------------------------------------------------------------------------


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
    names = gpu_parts.our_kernels()
    for kernel in ("kernels/norm_triton.py", "kernels/activation_triton.py"):
        text = (machine.ROOT / kernel).read_text()
        assert [name for name in names if f"def {name}(" in text]


def test_results_of_pytest_benchmark_and_of_the_check_are_read_alike(tmp_path):
    stats = {"median": 2.0, "q1": 1.0, "q3": 3.0, "min": 1.0, "max": 4.0, "rounds": 5}
    entry = {"group": "g, S 1", "name": "test_x[ours]", "stats": stats, "extra_info": {"implementation": "ours", "op": "g"}}
    facts = {"commit": "abc", "gpu": "H100"}
    raw = {"benchmarks": [entry], "datetime": "2026-01-02T03:04:05.6+00:00", "sizes": "default",
           "machine_info": {"wikigpt": facts}}  # fmt: skip
    machine_folder = tmp_path / "some-machine"
    machine_folder.mkdir()
    (machine_folder / "norm.json").write_text(json.dumps(raw))
    journal = records.Journal(machine_folder / JOURNAL)
    journal.add("ops/norm", "begin", date="2026-01-02 03:04:05 UTC", commit="abc", machine=facts, sizes="default")
    journal.add("ops/norm", "row", group="g, S 1", name="ours", op="g", **stats)
    ours, theirs = records.load(tmp_path)
    assert ours.rows == theirs.rows == [{"group": "g, S 1", "name": "ours", "op": "g", **stats}]
    assert (ours.file, ours.name) == ("ops", "norm")
    for key in ("date", "commit", "machine", "sizes"):
        assert ours.content[key] == theirs.content[key]
    (machine_folder / "other.json").write_text('{"date": "today"}')
    with pytest.raises(ValueError, match=r"other\.json: expected an object of parts"):
        list(records.load(tmp_path))
