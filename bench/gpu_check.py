"""`make gpu-check`: on a machine with a GPU, everything that only a GPU can tell, in one call.

    python -m bench.gpu_check [--device cuda|cpu] [--sizes default|smoke] [--out DIR] [--minutes 9] [--only PART] [--again]

Environment, build of csrc/, the tests that need a GPU (a process for each file), compute-sanitizer, the benchmark of each op,
training and generation with a profile of a training step, and WikiText-2 for 60 seconds with each of three implementations.

Each part is a process of its own with a time limit, so that a crash or a hang of one hides no other. What it found is written
to --out (default bench/results/<machine>/) when it ends; a part that has passed at this commit is not run again, so a second
call goes on where the first was stopped or ran out of --minutes. Exit code: 0 all passed, 1 some failed, 3 some not started.

Works from the source tree without a network; WIKIGPT_DATA_DIR names the folder of WikiText-2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine, records

ROOT = machine.ROOT
Arguments = argparse.Namespace
FILES, FILE_BYTES = 8, 16 * 2**20  # the most that the folder of results may hold
LOG = "gpu-check.log"
LOG_OF_A_PART = 100_000  # characters


@dataclass(frozen=True)
class Part:
    """`name` is file/key: what the part finds is entered under that key of that file."""

    name: str
    limit: float  # seconds
    command: Callable[[Path], list[str]]  # (a folder of its own) -> what is run
    read: Callable[[Path, int], dict[str, Any]]  # (the same, exit code) -> what is kept; without "passed" it is the exit code's
    beside: str | None = None  # nothing in it is timed: it may run beside its neighbours of the same name

    @property
    def place(self) -> tuple[str, str]:
        file, _, key = self.name.partition("/")
        return file, key


# --- parts that are processes of pytest -------------------------------------------------------------------------------


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def run_tests(name: str, limit: float, *arguments: str, before: Sequence[str] = ()) -> Part:
    return Part(name, limit, lambda folder: [*before, *_pytest(*arguments)], lambda folder, code: {}, beside="tests")


def benchmark(name: str, limit: float, args: Arguments, *files: str) -> Part:
    """Rows of benchmark files. Groups that would begin in the last third of the limit are left out."""

    def command(folder: Path) -> list[str]:
        options = ["--sizes", args.sizes, "--device", args.device, f"--time-limit={limit * 0.65:.0f}"]
        return _pytest(*files, *options, f"--benchmark-json={folder / 'raw.json'}")

    def read(folder: Path, code: int) -> dict[str, Any]:
        return records.condense(json.loads((folder / "raw.json").read_text()))

    return Part(name, limit, command, read)


def gpu_tests() -> dict[str, list[str]]:
    """file -> arguments. Only files that hold such tests: the others may need packages that a GPU machine lacks."""
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text, file = path.read_text(), f"tests/{path.name}"
        if re.search(r"^DEVICE = ", text, re.MULTILINE):  # its tests run wherever there is a device
            found[path.stem] = [file]
        elif re.search(r"\bmark\.gpu\b", text):
            found[path.stem] = [file, "-m", "gpu and not full"]
    return found


# --- parts in Python, each run by `--only` in a process of its own ------------------------------------------------------


def environment(args: Arguments) -> dict[str, Any]:
    facts: dict[str, Any] = {"machine": machine.facts(args.device)}
    if args.device == "cuda":
        query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        facts["nvidia_smi"] = machine.run("nvidia-smi", query, "--format=csv")
    return facts | {"doctor": machine.run(sys.executable, "-m", "wikigpt", "doctor")}


def build(args: Arguments) -> dict[str, Any]:
    """csrc/ for this machine alone; without a GPU only where it is not there yet."""
    if args.device == "cpu" and any((ROOT / "wikigpt").glob("_C*.so")):
        return {"passed": True, "summary": "there already"}
    jobs = {"MAX_JOBS": str(os.cpu_count() or 1)}
    if args.device == "cuda":
        import torch

        jobs["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    begin = time.perf_counter()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **jobs}, text=True, capture_output=True)
    output = done.stdout + done.stderr
    print(output)
    # setup.py leaves out what does not compile and ends well: only the import tells.
    works = subprocess.run([sys.executable, "-c", "import torch, wikigpt._C"], cwd=ROOT, capture_output=True, text=True)
    said = [line for line in output.splitlines() if line.startswith("wikigpt:") or "error" in line]
    passed = done.returncode == 0 and works.returncode == 0
    return {"passed": passed, "seconds_to_build": time.perf_counter() - begin, "said": said[:20], "import": works.stderr[-500:]}


SMOKE_RUN = ["n_layer=2", "n_embd=32", "n_head=2", "context_length=64", "data.vocab_size=512", "log_interval=5"]
# name -> backend, torch.compile, the whole step as one CUDA graph
VARIANTS = {"ours": ("auto", False, True), "sdpa-compile": ("torch", True, False), "reference": ("reference", False, False)}


def wikitext(args: Arguments, name: str) -> dict[str, Any]:
    """WikiText-2 for a fixed time with one implementation: perplexity reached, tokens per second."""
    import torch

    from wikigpt.config import resolve
    from wikigpt.data import prepare
    from wikigpt.train import Trainer, processes, read_log

    backend, compiled, graph = VARIANTS[name]
    smoke = args.sizes == "smoke"
    seconds = 2.0 if smoke else 60.0
    changes = [f"max_seconds={seconds}", f"backend={backend}", f"compile={compiled and args.device == 'cuda'}",
               f"cuda_graph={graph}", f"device={args.device}", "steps=1000000", "eval_interval=1000000",
               "save_interval=1000000", "tensorboard=false", "dataset=auto"]  # fmt: skip
    config = resolve("quick" if smoke else "wikitext-2", overrides=[*changes, *(SMOKE_RUN if smoke else [])])
    dataset = prepare(config.data.dataset, config.data.tokenizer, config.data.vocab_size)
    if smoke:
        dataset.tokens.update({split: dataset.tokens[split][:2048] for split in ("valid", "test")})
    # Not under --out, which holds results alone: checkpoints are large.
    with tempfile.TemporaryDirectory(prefix="wikigpt-") as directory, processes(args.device) as group:
        trainer = Trainer(config, dataset, Path(directory), group, log=print)
        trainer.train_step()  # compilation and first allocations are not training
        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        result = trainer.run()
        curve = [(round(line["seconds"], 2), line["loss"]) for line in read_log(Path(directory)) if "loss" in line]
    assert result.valid is not None
    assert result.test is not None
    print(f"{result.tokens_per_second:,.0f} tokens/s, validation perplexity {result.valid.per_token:.1f}")
    return {
        "machine": machine.facts(args.device),
        "sizes": args.sizes,
        "dataset": dataset.name,
        "backend": backend,
        "compile": config.train.compile,
        "cuda_graph": graph,
        "training_seconds": seconds,
        "steps": result.steps,
        "tokens": result.steps * trainer.tokens_per_step,
        "tokens_per_second": result.tokens_per_second,
        "mfu": trainer._mfu(result.tokens_per_second),
        "train_loss": result.train_loss,
        "valid_perplexity": result.valid.per_token,
        "test_perplexity": result.test.per_token,
        "peak_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        "model": config.model.to_dict(),
        "batch_size": config.train.batch_size,
        "precision": config.train.precision,
        "curve": curve[:: max(1, len(curve) // 200)],
    }


Kernel = tuple[str, int, int]  # name, begin and duration in nanoseconds


def our_kernels() -> set[str]:
    """Names of the kernels in kernels/ and csrc/."""
    triton = re.compile(r"@triton\.jit.*\n(?:@.*\n)*def (\w+)")
    cuda = re.compile(r"__global__[^;{]*?\bvoid\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")
    names: set[str] = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        names.update(triton.findall(path.read_text()))
    for path in (ROOT / "csrc").glob("*"):
        if path.suffix in (".cu", ".cuh", ".h"):
            names.update(cuda.findall(path.read_text()))
    return names


def summarize(kernels: Iterable[Kernel], ours: set[str], steps: int) -> dict[str, Any]:
    """Where the device's time goes: the longest kernels, the part that is ours, the gaps in which it has nothing to do."""
    kernels = sorted(kernels, key=lambda kernel: kernel[1])
    totals: dict[str, list[int]] = {}
    for name, _, duration in kernels:
        entry = totals.setdefault(name, [0, 0])
        entry[0] += duration
        entry[1] += 1
    everything = sum(total for total, _ in totals.values()) or 1
    word = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(ours)))})(?!\w)") if ours else re.compile(r"(?!)")
    gaps, end = [], kernels[0][1] if kernels else 0
    for _, begin, duration in kernels:
        if begin > end:
            gaps.append(begin - end)
        end = max(end, begin + duration)
    whole = end - kernels[0][1] if kernels else 0
    longest = sorted(totals.items(), key=lambda item: -item[1][0])
    return {
        "kernels_per_step": len(kernels) / steps,
        "device_ms_per_step": whole / steps / 1e6,
        "idle_fraction": sum(gaps) / whole if whole else None,
        "gaps_per_step": len(gaps) / steps,
        "median_gap_us": statistics.median(gaps) / 1e3 if gaps else 0.0,
        "ours_fraction": sum(total for name, (total, _) in totals.items() if word.search(name)) / everything,
        "top": [
            {"name": name[:120], "ours": bool(word.search(name)), "fraction": total / everything,
             "ms_per_step": total / steps / 1e6, "calls_per_step": calls / steps}
            for name, (total, calls) in longest[:15]
        ],
    }  # fmt: skip


def profile(args: Arguments) -> dict[str, Any]:
    """A training step of ours under PyTorch's profiler, and the same without it for tokens/s and MFU."""
    import torch

    from .bench_training import GPT2, SMOKE, WIKITEXT, Case, flops
    from .training_worker import build as build_job

    cuda = args.device == "cuda"
    found: dict[str, Any] = {"machine": machine.facts(args.device), "sizes": args.sizes}
    ours, peak = our_kernels(), machine.peak_flops(args.device)
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    steps = 5 if cuda else 1
    for size in (WIKITEXT, GPT2) if args.sizes == "default" and cuda else (SMOKE,):
        case = Case(*size, "bf16")
        sizes = case._asdict()
        sizes.pop("precision")
        for name in ("ours, eager", "ours") if cuda else ("ours",):
            job = build_job(name, sizes, case.precision, args.device)
            for _ in range(2 if args.device == "cpu" else 8):
                job.step()
            synchronize()
            begin = time.perf_counter()
            for _ in range(2 * steps):
                job.step()
            synchronize()
            seconds = (time.perf_counter() - begin) / (2 * steps)
            with torch.profiler.profile(acc_events=True) as profiler:
                for _ in range(steps):
                    job.step()
                synchronize()
            results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
            kernels = [
                (event.name(), event.start_ns(), event.duration_ns())
                for event in results.events()
                if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
            ]
            averages = sorted(profiler.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
            host = [{"name": e.key[:120], "ms_per_step": e.self_cpu_time_total / steps / 1e3} for e in averages[:10]]
            rate = flops(case) / seconds
            summary = summarize(kernels, ours, steps)
            found[f"{case.n_layer} layers x {case.n_embd}, {name}"] = {
                "ms_per_step": seconds * 1e3,
                "tokens_per_second": case.batch_size * case.context_length / seconds,
                "mfu": rate / peak if peak else None,
                **(summary if cuda else {}),
                "host_top": host,
            }
            print(json.dumps(found[f"{case.n_layer} layers x {case.n_embd}, {name}"], indent=1))
            del job
    return found


# key of PYTHON -> what `--only` calls
PYTHON: dict[str, Callable[[Arguments], dict[str, Any]]] = {
    "environment/environment": environment,
    "environment/build": build,
    "training/profile": profile,
    "wikitext/ours": lambda args: wikitext(args, "ours"),
    "wikitext/sdpa-compile": lambda args: wikitext(args, "sdpa-compile"),
    "wikitext/reference": lambda args: wikitext(args, "reference"),
}


def python(name: str, limit: float, args: Arguments, beside: str | None = None) -> Part:
    def command(folder: Path) -> list[str]:
        run = [sys.executable, "-m", "bench.gpu_check", "--call", name, "--result", str(folder / "result.json")]
        return [*run, "--device", args.device, "--sizes", args.sizes]

    return Part(name, limit, command, lambda folder, code: json.loads((folder / "result.json").read_text()), beside)


# --- the list ---------------------------------------------------------------------------------------------------------

# Seconds that the benchmark of an op may take on an H100; OTHERS for those that are not named. Guessed: no GPU has run them.
OP_LIMITS = {"attention": 100.0, "linear_cross_entropy": 90.0, "norm": 75.0, "activation": 60.0}
OTHERS = 40.0
MODELS = ("training", "generation", "transformers")


def parts(args: Arguments) -> list[Part]:
    """What is worth most comes first: --minutes may end before the list does."""
    found = [python("environment/environment", 60, args), python("environment/build", 240, args, beside="build")]
    if args.device == "cpu" or args.sizes == "smoke":
        # To prove the script: the tests have run elsewhere, and one process for all benchmarks imports torch once.
        files = gpu_tests() if args.device == "cuda" else {"test_config": ["tests/test_config.py"]}
        found += [run_tests(f"tests/{name}", 300, *arguments) for name, arguments in files.items()]
        found += [benchmark("ops/all", 600, args, "bench")]
        return [*found, *(python(f"wikitext/{name}", 120, args) for name in VARIANTS), python("training/profile", 120, args)]
    ops = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py"))
    ops = [op for op in ops if op not in MODELS]
    # The benchmarks without their clock: kernels are compiled, by many processes, before one process is timed.
    found += [compile_first(f"tests/compile-{op}", 150, args, f"bench/bench_{op}.py") for op in ops]
    found += [run_tests(f"tests/{name}", 150, *arguments) for name, arguments in gpu_tests().items()]
    found += sanitizer()
    found += [benchmark(f"ops/{op}", OP_LIMITS.get(op, OTHERS), args, f"bench/bench_{op}.py") for op in ops]
    found += [benchmark("training/training", 150, args, "bench/bench_training.py")]
    found += [python(f"wikitext/{name}", 130, args) for name in VARIANTS]
    found += [python("training/profile", 60, args)]
    return [*found, *(benchmark(f"training/{name}", 90, args, f"bench/bench_{name}.py") for name in MODELS[1:])]


def compile_first(name: str, limit: float, args: Arguments, file: str) -> Part:
    """Passes whatever happens: what is wrong is found again, and told, when it is timed."""
    command = _pytest(file, "--sizes", args.sizes, "--device", args.device, "--benchmark-disable")
    return Part(name, limit, lambda folder: command, lambda folder, code: {"passed": True}, beside="build")


def sanitizer() -> list[Part]:
    """compute-sanitizer over the tests that are small enough for it, where it is installed."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return []
    small = ("tests/test_attention_gpu.py", "tests/test_norm_gpu.py", "-k", "small_set")
    return [
        run_tests(f"tests/{name}", 150, *small, before=[tool, "--tool", name, "--error-exitcode", "9"])
        for name in ("memcheck", "racecheck")
    ]


# --- running them -----------------------------------------------------------------------------------------------------


class Folder:
    """The results: files of parts, and one log of what they printed."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        path.mkdir(parents=True, exist_ok=True)

    def read(self, file: str) -> dict[str, Any]:
        path = self.path / f"{file}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def record(self, part: Part) -> dict[str, Any] | None:
        file, key = part.place
        return self.read(file).get(key)

    def enter(self, part: Part, found: dict[str, Any], output: str) -> None:
        file, key = part.place
        with self.lock:
            records.write(self.path / f"{file}.json", {**self.read(file), key: found})
            log = self.path / LOG
            before = log.read_text() if log.exists() else ""
            text = f"{before}== {part.name}, {found['date']}\n{shorten(output)}\n"
            log.write_text(text[-FILE_BYTES // 2 :])

    def excess(self) -> list[str]:
        """What is over the limits on files."""
        files = sorted(path for path in self.path.iterdir() if path.is_file())
        found = [f"{len(files)} files, {FILES} may be"] if len(files) > FILES else []
        return found + [f"{p.name} has {p.stat().st_size:,} bytes" for p in files if p.stat().st_size >= FILE_BYTES]


def shorten(text: str, most: int = LOG_OF_A_PART) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}\n... {len(text) - most:,} characters ...\n{text[-most // 2 :]}"


def call(command: list[str], limit: float, output: Path) -> tuple[int, bool]:
    """(exit code, whether the time limit ended it). With the process end all that it has started."""
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(limit), False
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL, True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run(part: Part, limit: float, folder: Folder, commit: str) -> bool:
    """Run a part and enter what it found; whether it passed."""
    print(f"== {part.name} (at most {limit:.0f} s)", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        scratch = Path(name)
        code, late = call(part.command(scratch), limit, scratch / "output")
        output = (scratch / "output").read_text(errors="replace")
        try:
            found = part.read(scratch, code)
        except (OSError, ValueError, KeyError) as error:
            found = {"passed": False, "error": f"left no result ({type(error).__name__})"}
    seconds = time.monotonic() - begin
    found.setdefault("passed", code == 0)
    if late:
        found |= {"passed": False, "error": f"stopped after {limit:.0f} s"}
    tail = output.strip().splitlines()[-30:]
    found = {"date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "commit": commit} | found
    found |= {
        "exit_code": code,
        "seconds": round(seconds, 1),
        "tail": [line[:300] for line in tail[-1 if found["passed"] else -30 :]],
    }
    folder.enter(part, found, output)
    verdict = "ok" if found["passed"] else f"FAILED ({found.get('error', f'exit code {code}')})"
    lines = "" if found["passed"] else "\n".join(["", *tail[-15:]])
    print(f"== {part.name}: {verdict} in {seconds:.0f} s{lines}", flush=True)
    return found["passed"]


def run_all(todo: Sequence[Part], folder: Folder, commit: str, minutes: float, workers: int) -> tuple[list[str], list[str]]:
    """(failed, not started). A part begins only where a third of its limit is left, and has no more than what is left."""
    deadline = time.monotonic() + 60 * minutes

    def one(part: Part) -> tuple[str, bool | None]:
        left = deadline - time.monotonic()
        return part.name, run(part, min(part.limit, left), folder, commit) if left > part.limit / 3 else None

    verdicts: list[tuple[str, bool | None]] = []
    for beside, group in itertools.groupby(todo, key=lambda part: part.beside):
        with ThreadPoolExecutor(workers if beside else 1) as pool:
            verdicts += pool.map(one, group)
    return [name for name, passed in verdicts if passed is False], [name for name, passed in verdicts if passed is None]


def in_order(every: Sequence[Part], known: Mapping[str, dict[str, Any] | None], commit: str, again: bool) -> list[Part]:
    """What is left to do: what has never run at this commit, then what has failed."""

    def state(part: Part) -> int:
        record = known[part.name]
        if again or record is None or record.get("commit") != commit:
            return 0
        return 2 if record["passed"] else 1

    return [part for wanted in (0, 1) for part in every if state(part) == wanted]


def point_to_data() -> None:
    """The real WikiText-2 where it lies beside the repository or in it."""
    for place in (ROOT.parent / "shared", ROOT / "shared"):
        if (place / "data" / "wikitext-2" / "train.txt").is_file():
            os.environ.setdefault("WIKIGPT_DATA_DIR", str(place / "data" / "wikitext-2"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", choices=("default", "smoke"), default="default")
    parser.add_argument("--out", type=Path, help="folder for the results; default bench/results/<machine>")
    parser.add_argument("--minutes", type=float, help="8.8, 60 for smoke: start no part after these; the next call goes on")
    parser.add_argument("--only", nargs="+", metavar="PART", help="file or file/key, as the names of the parts are printed")
    parser.add_argument("--again", action="store_true", help="also what has passed before")
    parser.add_argument("--call", choices=tuple(PYTHON), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.call:
        records.write(args.result, PYTHON[args.call](args))
        return 0

    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; --device cpu --sizes smoke proves the script without one", file=sys.stderr)
        return 2
    point_to_data()
    if args.device == "cpu" and args.sizes == "smoke":
        os.environ["OMP_NUM_THREADS"] = "1"  # problems so small gain nothing from a second thread
    folder = Folder((args.out or machine.RESULTS / machine.folder(args.device)).resolve())
    commit = machine.commit()
    every = parts(args)
    if args.only:
        every = [part for part in every if part.name in args.only or part.place[0] in args.only]
        if not every:
            parser.error(f"--only: got {' '.join(args.only)}, there are {' '.join(part.name for part in parts(args))}")
    todo = in_order(every, {part.name: folder.record(part) for part in every}, commit, args.again)
    for part in every:
        if part not in todo:
            print(f"== {part.name}: passed before")
    workers = 6 if args.device == "cuda" else 1
    minutes = args.minutes or (60.0 if args.sizes == "smoke" else 8.8)
    failed, left = run_all(todo, folder, commit, minutes, workers)
    print(f"results in {folder.path}" + "".join(f"; TOO MUCH: {text}" for text in folder.excess()))
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    if left:
        print(f"not started, the time is over; call again for: {', '.join(left)}")
    return 1 if failed or folder.excess() else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
