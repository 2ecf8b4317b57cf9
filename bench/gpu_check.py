"""`make gpu-check`: on a machine with a GPU, everything that only a GPU can tell, in the order of its worth.

    python -m bench.gpu_check [--device cuda|cpu] [--sizes check|smoke] [--out DIR] [--minutes 9.4] [--only PART] [--again]

First whether every op is right, then how fast each is beside its peers, then training, then the tests. A line is printed as
each thing is known. Every part is a process with a time limit, so that a crash or a hang of one hides no other; what it has
finished stands in the journal (bench/records.py) from that moment on, here and in build/gpu-check. A second call at the same
commit goes on where the first one stopped, then tries again what failed. docs/gpu-check.md: minute by minute, and how to read
what comes back. Exit code: 0 all passed, 1 some failed, 3 some not finished, 2 it cannot start.

Works from the source tree without a network and without .git (then WIKIGPT_COMMIT names the commit); WIKIGPT_DATA_DIR names the
folder of WikiText-2. WIKIGPT_FAKE_GPU=90 with --sizes smoke runs all of it on a machine without a GPU, computing nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import FAKE, LOST_DEVICE, UNFINISHED, machine, records, width

ROOT = machine.ROOT
KEPT = ROOT / "build" / "gpu-check"  # git ignores it, and so whoever copies the tree to the machine again leaves it alone
JOURNAL, LOG = "journal.jsonl", "gpu-check.log"
Arguments = argparse.Namespace


@dataclass(frozen=True)
class Part:
    """A process. What it prints after "| " is shown at once, all of it goes to the log."""

    name: str  # file/key, as bench/report.py finds it
    limit: float  # seconds
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    # With fewer seconds left it does not begin, as it would come to no result; 0: a third of the limit.
    least: float = 0.0


Stage = list[Part]  # parts that run side by side


# --- the plan -----------------------------------------------------------------------------------------------------------


def plan(args: Arguments, journal: records.Journal) -> list[Stage]:
    """What is worth most comes first: --minutes may end before the list does. Limits are those of an H100 with 16 cores."""
    device = ["--sizes", args.sizes, "--device", args.device]
    files = [f"--journal={path}" for path in journal.paths]

    def python(name: str, limit: float, least: float = 0.0) -> Part:
        return Part(name, limit, [sys.executable, "-m", "bench.gpu_parts", name, *device, *files], least=least)

    def verdict(*ops: str) -> Part:
        return Part(f"verdict/{ops[0]}", 110, [sys.executable, "-m", "bench.verdict", *ops, *device, *files])

    def pytest(name: str, limit: float, *arguments: str, least: float = 0.0) -> Part:
        again = [] if args.again else ["--skip-finished"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, *files, f"--part={name}", *again]
        return Part(name, limit, command, least=least)

    def bench(name: str, limit: float, *names: str) -> Part:
        chosen = [f"bench/bench_{file}.py" for file in names]
        return pytest(name, limit, *chosen, *device, "--time-limit={time_limit:.0f}", "--benchmark-quiet")

    from .gpu_parts import VARIANTS
    from .verdict import CASES

    if args.device == "cpu":  # to prove the script; one process imports torch once
        return [
            [python("environment/facts", 60)],
            [verdict(*CASES)],
            [bench("ops/all", 600, "attention", *OPS)],
            [bench("training/all", 300, *MODELS)],
            *([python(f"wikitext/{name}", 120)] for name in VARIANTS),
            [python("training/profile", 120)],
        ]
    of_gpu = ["-p", "bench.gpu_tests", *gpu_test_files()]
    if FAKE:  # kernels compute nothing, so tests of results can only be collected
        of_gpu.append("--collect-only")
    # A fake GPU has a machine of two cores: there a process for each op would take longest to import PyTorch.
    verdicts = [verdict(*CASES)] if FAKE else [verdict(op) for op in CASES]
    warm = [sys.executable, "-m", "bench.warm", *device, f"--processes={1 if FAKE else 4}"]
    return [
        [python("environment/facts", 60), python("environment/build", 150)],
        [*verdicts, Part(WARM, 110, warm)],
        [bench("ops/attention", 60, "attention")],
        [bench("ops/norm", 40, "norm")],
        [bench("ops/others", 75, *OPS[1:])],
        [bench("training/training", 105, "training")],
        [python("training/profile", 60)],
        [python("wikitext/ours", 90, least=60)],
        [python("wikitext/sdpa-compile", 110, least=80)],
        # What has passed stands in the journal and a later call goes on behind it, so a short time is worth its beginning.
        [pytest("tests/gpu", 240, *of_gpu, "--gpu-tests=small", "-n", str(args.workers), "--dist=worksteal", least=45)],
        [pytest("tests/big", 90, *of_gpu, "--gpu-tests=big")],  # alone: each wants most of the memory
        *([part] for part in sanitizer(files)),
        [bench("training/others", 120, *MODELS[1:])],
    ]


def gpu_test_files() -> list[str]:
    """Files that hold tests for a GPU: the others may need packages that a GPU machine lacks, and take time to import."""
    mark = re.compile(r"\bmark\.gpu\b|^DEVICE = ", re.MULTILINE)
    return [f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_*.py")) if mark.search(path.read_text())]


OPS = ("norm", "linear_cross_entropy", "optimizer", "activation", "rotary", "sampling")
MODELS = ("training", "generation", "transformers")


def sanitizer(files: list[str]) -> list[Part]:
    """compute-sanitizer over the small cases of the ops that share memory between threads, where it is installed."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return []
    cases = [sys.executable, "-m", "bench.verdict", "--sizes", "smoke", "optimizer", "sampling", "norm"]
    # PyTorch's allocator would hand out parts of one allocation, inside which nothing is out of bounds.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    memcheck = [tool, "--tool", "memcheck", "--error-exitcode", "1", "--report-api-errors", "no", *cases, "attention"]
    # It does not follow the matrix units' asynchronous reads, so attention would be full of hazards that are none.
    racecheck = [tool, "--tool", "racecheck", "--error-exitcode", "1", *cases]
    return [Part("sanitizer/memcheck", 120, memcheck, environment), Part("sanitizer/racecheck", 150, racecheck, environment)]


# --- running them -------------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """In the child, before it starts: where this script is killed, no part is left to hold the GPU."""
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Log:
    """What parts print: all of it to a file, lines for people also to the terminal, whole lines however many print."""

    def __init__(self, path: Path):
        self.file, self.lock = path.open("a", errors="replace"), threading.Lock()

    def say(self, text: str) -> None:
        lines = [textwrap.fill(line, width(), subsequent_indent="     ", break_long_words=False) for line in text.split("\n")]
        with self.lock:
            print("\n".join(lines), flush=True)
            print(text, file=self.file, flush=True)

    def line(self, part: str, text: str) -> None:
        with self.lock:
            print(f"{part} {text}", file=self.file, flush=True)
            if text.startswith("| "):
                print(text[2:], flush=True)


def run(
    part: Part, limit: float, journal: records.Journal, log: Log, commit: str, sizes: str = "check"
) -> tuple[bool | None, int]:
    """Run a part and enter how it ended. (whether it passed, None where time was over before it ended; its exit code)."""
    log.say(f"== {part.name} (at most {limit:.0f} s)")
    begin = time.monotonic()
    tail: list[str] = []
    # Groups that would begin in the last fifth of its time are left out: a second call measures them.
    command = [word.format(time_limit=0.8 * limit) for word in part.command]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **part.environment}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True, preexec_fn=_die_with_parent,
    )  # fmt: skip

    def listen() -> None:
        assert process.stdout is not None
        for text in process.stdout:
            log.line(part.name, text.rstrip("\n"))
            tail.append(text.rstrip("\n")[:300])
            del tail[:-40]

    _running.add(process)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    late = False
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code, late = -signal.SIGKILL, True
    finally:
        kill_group(process)
        _running.discard(process)
    listener.join(5)
    seconds = time.monotonic() - begin
    late |= code == UNFINISHED
    passed = code == 0 and not late
    found: dict[str, Any] = {
        "commit": commit,
        "sizes": sizes,
        "passed": passed,
        "complete": not late and code in (0, 1),
        "exit_code": code,
    }
    found |= {"seconds": round(seconds, 1), "tail": tail[-1 if passed else -30 :], "error": None}
    if late:
        found["error"] = f"time was over after {min(seconds, limit):.0f} s"
    elif not passed:
        found["error"] = f"exit code {code}"
    journal.add(part.name, "end", **found)
    shown = "" if passed or late or found["complete"] else "".join(f"\n     {line}" for line in tail[-12:])
    how = "ok" if passed else f"{'NOT FINISHED' if late else 'FAILED'} ({found['error']})"
    log.say(f"== {part.name}: {how} in {seconds:.0f} s{shown}")
    return None if late else passed, code


_running: set[subprocess.Popen[str]] = set()


def kill_group(process: subprocess.Popen[str]) -> None:
    """With a part ends all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(
    stages: Sequence[Stage], journal: records.Journal, log: Log, commit: str, minutes: float, sizes: str = "check"
) -> tuple[list[str], list[str]]:
    """(failed, not finished). A part begins only where enough is left for a result, and has no more than what is left."""
    deadline = time.monotonic() + 60 * minutes  # after Ctrl-C at once

    def one(part: Part) -> tuple[str, bool | None]:
        end = min(deadline, time.monotonic() + part.limit)
        if deadline - time.monotonic() <= (part.least or part.limit / 3):
            return part.name, None
        passed, code = run(part, end - time.monotonic(), journal, log, commit, sizes)
        # What it was at is left out from now on, whatever --again says: it would be lost there for ever.
        rest = replace(part, command=[*part.command, *(["--skip-finished"] if "pytest" in part.command else [])])
        while code == LOST_DEVICE and end - time.monotonic() > 10:
            code = run(rest, end - time.monotonic(), journal, log, commit, sizes)[1]
        return part.name, passed

    verdicts: list[tuple[str, bool | None]] = []
    for stage in stages:
        with ThreadPoolExecutor(len(stage)) as pool:
            try:
                verdicts += pool.map(one, stage)
            except KeyboardInterrupt:
                for process in list(_running):
                    kill_group(process)
                deadline = 0.0
                raise
    return [name for name, passed in verdicts if passed is False], [name for name, passed in verdicts if passed is None]


ALWAYS = ("environment/build",)  # what a fresh machine lacks
WARM = "environment/warm"  # worth doing once, to its end or not


def left_to_do(
    stages: Sequence[Stage], known: Mapping[str, dict[str, Any]], commit: str, again: bool, sizes: str = "check"
) -> list[Stage]:
    """What has never come to its end at this commit, then what has and failed."""

    def state(part: Part) -> int:
        record = known.get(part.name, {})
        if again or (record.get("commit"), record.get("sizes")) != (commit, sizes) or part.name in ALWAYS:
            return 0
        if part.name == WARM:
            return 2
        if not record.get("complete"):
            return 0
        return 2 if record["passed"] else 1

    chosen = [[part for part in stage if state(part) == wanted] for wanted in (0, 1) for stage in stages]
    return [stage for stage in chosen if stage]


def point_to_data() -> str | None:
    """The real WikiText-2 where it lies beside the repository or in it. Why what was asked for is not there, or None."""
    given = os.environ.get("WIKIGPT_DATA_DIR")
    if given and not Path(given).is_dir():
        return f"WIKIGPT_DATA_DIR: {given} is no folder here"
    places = [ROOT.parent / "shared" / "data", ROOT / "shared" / "data", ROOT / ".data"]
    here = next((place / "wikitext-2" for place in places if (place / "wikitext-2" / "train.txt").is_file()), None)
    if not given and here is not None:
        os.environ["WIKIGPT_DATA_DIR"] = str(here)
    elif not given:
        print("WikiText-2 is not here (WIKIGPT_DATA_DIR, .data/wikitext-2): training on it will FAIL", flush=True)
    return None


def open_journal(out: Path, *others: Path) -> records.Journal:
    """The journal in `out` and its copy in the first of `others`; what one of the folders has and another lacks is restored."""
    lines = records.merge([records.read_lines(p / JOURNAL) for p in (out, *others) if (p / JOURNAL).exists()])
    for place in (out, others[0]):
        place.mkdir(parents=True, exist_ok=True)
        path = place / JOURNAL
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(temporary, path)
    return records.Journal(out / JOURNAL, others[0] / JOURNAL)


def listed(tests: list[str], most: int = 20) -> list[str]:
    """A line for each of the first, and how many more there are."""
    more = [f"  and {len(tests) - most} more, in the journal"] if len(tests) > most else []
    return [f"  {test}" for test in tests[:most]] + more


def summary(parts: Mapping[str, dict[str, Any]], commit: str) -> list[str]:
    """The last lines: how many cases of each op are right, and every wrong row."""
    from .verdict import CASES

    found = []
    current = {name: part for name, part in parts.items() if part.get("commit") == commit}
    judged = [row for name, part in current.items() if name.startswith("verdict/") for row in part["rows"]]
    for op in dict.fromkeys(row["group"] for row in judged):
        rows = [row for row in judged if row["group"] == op]
        right = sum(row["ok"] for row in rows)
        how = "reach their launches" if FAKE else "right"
        every = len(CASES.get(op, rows))  # one that broke its process may have left no row
        found.append(f"{op}: {right} of {every} cases {how}{'' if right == every else '  <-- WRONG'}")
    for name, part in current.items():
        if not name.startswith("verdict/"):
            found += [f"WRONG in {name}: {row['wrong']}" for row in part.get("rows", []) if row.get("wrong")]
        found += [f"was wrong before in {name}: {row['was_wrong']}" for row in part.get("rows", []) if row.get("was_wrong")]
        failed = [test for test, entry in part.get("tests", {}).items() if entry["outcome"] == "failed"]
        hung = [test for test, entry in part.get("tests", {}).items() if entry["outcome"] == "running"]
        found += [f"{name}: {len(failed)} tests failed:", *listed(failed)] if failed else []
        found += [f"{name}: time was over while it was at:", *listed(hung)] if hung and not part.get("passed") else []
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", choices=("check", "smoke"), default="check")
    parser.add_argument("--out", type=Path, help="folder for the results; default bench/results/<machine>")
    parser.add_argument("--minutes", type=float, help="9.4, 60 for smoke: start no part after these; the next call goes on")
    parser.add_argument("--only", nargs="+", metavar="PART", help="file or file/key, as the names of the parts are printed")
    parser.add_argument(
        "--again", action="store_true", help="also what has passed before; where time is over, a call without it goes on"
    )
    parser.add_argument("--workers", type=int, default=12, help="processes of the GPU tests")
    parser.add_argument("--kept", type=Path, default=KEPT, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)

    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; --device cpu --sizes smoke proves the script without one", file=sys.stderr)
        return 2
    if FAKE and args.sizes != "smoke":
        print("error: --sizes: a fake GPU runs --sizes smoke alone, as nothing of it is a result", file=sys.stderr)
        return 2
    try:
        commit = machine.require_commit()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ["WIKIGPT_COMMIT"] = commit  # of all parts, also if somebody commits while they run
    if (reason := point_to_data()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    if args.device == "cpu" or FAKE:
        os.environ["OMP_NUM_THREADS"] = "1"  # problems so small gain nothing from a second thread
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "3")  # a process; several compile at a time
    name = machine.folder(args.device)
    out = (args.out or (KEPT / name / "results" if FAKE else machine.RESULTS / name)).resolve()
    if out.exists() and not out.is_dir():
        print(f"error: --out: {out} is no folder", file=sys.stderr)
        return 2
    journal, log = open_journal(out, args.kept / name, machine.RESULTS / name), Log(out / LOG)
    stages = plan(args, journal)
    if args.only:
        names = [part.name for stage in stages for part in stage]
        stages = [[p for p in stage if {p.name, p.name.partition("/")[0]} & set(args.only)] for stage in stages]
        if not any(stages):
            parser.error(f"--only: got {' '.join(args.only)}, there are {' '.join(names)}")
    todo = left_to_do(stages, records.fold(journal.lines()), commit, args.again, args.sizes)
    doing = {part.name for stage in todo for part in stage}
    for part in (part for stage in stages for part in stage):
        if part.name not in doing:
            log.say(f"== {part.name}: passed before")
    minutes = (60.0 if args.sizes == "smoke" else 9.4) if args.minutes is None else args.minutes
    try:
        failed, left = run_all(todo, journal, log, commit, minutes, args.sizes)
    except KeyboardInterrupt:
        log.say(f"interrupted; what was finished stands in {out}, the next call goes on")
        return 130
    for line in summary(records.fold(journal.lines()), commit):
        log.say(line)
    log.say(f"results in {out}")
    if failed:
        log.say(f"FAILED: {', '.join(failed)}")
    if left:
        log.say(f"not finished, the time is over; call again for: {', '.join(left)}")
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
