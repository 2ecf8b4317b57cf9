"""`make gpu-check`: on a machine with a GPU, correctness on the hardware, then a training run of each backend.

    python -m bench.gpu_check [--device cuda|cpu] [--sizes default|smoke] [--out DIR] [--only PART]

Each part runs in a process of its own with a time limit, so that a crash or a hang of one hides no other, and writes
<part>.json into --out; a part whose file is there already is skipped, so an interrupted check goes on where it stopped.
Works from the source tree without network; WIKIGPT_DATA_DIR names the folder of WikiText-2 (else `--dataset auto`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def machine_name(device: str) -> str:
    """A folder name for this machine: the GPU's, or the processor's."""
    import torch

    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((x.split(":")[1] for x in lines if x.startswith("model name")), platform.machine())
        name = f"cpu {name}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --- parts ----------------------------------------------------------------------------------------------------------


def environment(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    def run(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
            return done.stdout.strip() or done.stderr.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"not available ({error})"

    try:
        from importlib.metadata import version

        triton = version("triton")
    except ModuleNotFoundError:
        triton = None
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "commit": run("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "cpu_threads": torch.get_num_threads(),
        "device": args.device,
    }
    if args.device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": p.name,
            "memory": p.total_memory,
            "sm": f"{p.major}{p.minor}",
            "count": p.multi_processor_count,
        }
        facts["nvidia_smi"] = run("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv")
    facts["doctor"] = run(sys.executable, "-m", "wikigpt", "doctor")
    return facts


def tests(args: argparse.Namespace) -> dict[str, Any]:
    """The tests marked `gpu`, a process for each file (on a CPU: some of the ops' own, to prove that this part works)."""
    # Only files that hold such tests are collected: the others may need packages that a GPU machine lacks.
    marks = re.compile(r"mark\.gpu|^DEVICE = ", re.MULTILINE)  # or tests that run wherever there is a device
    files = sorted(p.name for p in (ROOT / "tests").glob("test_*.py") if marks.search(p.read_text()))
    if args.device == "cpu":
        files = ["test_dispatch.py", "test_attention.py"]
    return _pytest_each([[f"tests/{name}"] for name in files])


def sanitizer(args: argparse.Namespace) -> dict[str, Any]:
    """compute-sanitizer's memcheck and racecheck over the tests that are small enough for it."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if args.device == "cpu" or not Path(tool).exists():
        return {"passed": True, "summary": "not run: " + ("no GPU" if args.device == "cpu" else "no compute-sanitizer here")}
    selection = ["tests/test_attention_gpu.py", "tests/test_norm_gpu.py", "-k", "small_set"]
    return _pytest_each(
        [selection] * 2, [[tool, "--tool", name, "--error-exitcode", "9"] for name in ("memcheck", "racecheck")]
    )


def _pytest_each(selections: list[list[str]], before: list[list[str]] | None = None) -> dict[str, Any]:
    results = []
    for i, selection in enumerate(selections):
        prefix = before[i] if before else []
        command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        tail = (done.stdout + done.stderr).strip().splitlines()[-30:]
        print("\n".join(tail), flush=True)
        results.append({"command": command, "exit_code": done.returncode, "tail": tail})
    return {"passed": all(result["exit_code"] == 0 for result in results), "runs": results}


def train(args: argparse.Namespace, backend: str, compiled: bool) -> dict[str, Any]:
    """WikiText-2 for a fixed time with one backend: perplexity reached, tokens per second."""
    import torch

    from wikigpt.config import resolve
    from wikigpt.data import prepare
    from wikigpt.train import Trainer, processes

    seconds = 60.0 if args.sizes == "default" else 4.0
    changes = [f"max_seconds={seconds}", f"backend={backend}", f"compile={compiled}", f"device={args.device}",
               "steps=1000000", "eval_interval=1000000", "save_interval=1000000", "tensorboard=false",
               "dataset=auto"]  # fmt: skip
    preset = "wikitext-2"
    if args.sizes == "smoke":
        preset = "quick"
        changes += [
            "n_layer=2",
            "n_embd=32",
            "n_head=2",
            "context_length=64",
            "data.vocab_size=512",
            "log_interval=5",
        ]
    config = resolve(preset, overrides=changes)
    dataset = prepare(config.data.dataset, config.data.tokenizer, config.data.vocab_size)
    if args.sizes == "smoke":
        dataset.tokens.update({split: dataset.tokens[split][:4096] for split in ("valid", "test")})
    # Not under --out, which holds results alone: checkpoints are large.
    directory = Path(tempfile.mkdtemp(prefix=f"wikigpt-{backend}-"))
    with processes(args.device) as group:
        trainer = Trainer(config, dataset, directory, group, log=print)
        trainer.train_step()  # compilation and first allocations are not training
        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        result = trainer.run()
    shutil.rmtree(directory)
    assert result.valid is not None
    assert result.test is not None
    figures = {
        "backend": backend,
        "compiled": compiled,
        "seconds": seconds,
        "steps": result.steps,
        "tokens": result.steps * trainer.tokens_per_step,
        "tokens_per_second": result.tokens_per_second,
        "train_loss": result.train_loss,
        "valid_perplexity": result.valid.per_token,
        "test_perplexity": result.test.per_token,
        "dataset": dataset.name,
        "model": config.model.to_dict(),
        "batch_size": config.train.batch_size,
        "precision": config.train.precision,
        "mfu": trainer._mfu(result.tokens_per_second),
        "peak_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
    }
    print(f"{figures['tokens_per_second']:,.0f} tokens/s, test perplexity {figures['test_perplexity']:.1f}")
    return figures


def benchmark(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """bench/bench_<name>.py, its pytest-benchmark JSON."""
    path = Path(args.out) / f"{name}-raw.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"bench/bench_{name}.py",
               "--sizes", args.sizes, "--device", args.device, f"--benchmark-json={path}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print("\n".join(done.stdout.splitlines()[-40:]))
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    rows = json.loads(path.read_text())["benchmarks"]
    path.unlink()
    return {"rows": [{"group": r["group"], "name": r["name"], "median": r["stats"]["median"], **r["extra_info"]} for r in rows]}


def ops(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark of every op, one process each; what fails is in the result beside what does not."""
    results: dict[str, Any] = {"passed": True}
    for name in ("attention", "norm", "linear_cross_entropy", "activation", "rotary"):
        try:
            results[name] = benchmark(args, name)
        except RuntimeError as error:
            results |= {name: {"error": str(error)}, "passed": False}
    return results


# name -> (function, limit in seconds at default sizes). A later issue adds its part here.
PARTS: dict[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], int]] = {
    "environment": (environment, 60),
    "tests": (tests, 240),
    "train-reference": (lambda a: train(a, "reference", False), 180),
    "train-sdpa-compile": (lambda a: train(a, "torch", a.device == "cuda"), 240),
    "train-ours": (lambda a: train(a, "auto", False), 180),
    "ops": (ops, 420),
    "throughput": (lambda a: benchmark(a, "training"), 180),
    "sanitizer": (sanitizer, 180),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", choices=("default", "smoke"), default="default")
    parser.add_argument("--out", default=None, help="folder for the results; default bench/results/<machine>")
    parser.add_argument("--only", choices=tuple(PARTS), help="run this part in this process")
    args = parser.parse_args()

    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: no CUDA device here; --device cpu --sizes smoke proves the script without one",
            file=sys.stderr,
        )
        return 2
    args.out = str(Path(args.out or ROOT / "bench" / "results" / machine_name(args.device)).resolve())
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.only:
        result = PARTS[args.only][0](args)
        path = Path(args.out) / f"{args.only}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1))
        os.replace(temporary, path)
        return 0

    failed = []
    for name, (_, limit) in PARTS.items():
        path = Path(args.out) / f"{name}.json"
        if path.exists():
            print(f"== {name}: done before ({path})", flush=True)
            continue
        print(f"== {name} (at most {limit} s)", flush=True)
        command = [
            sys.executable,
            "-m",
            "bench.gpu_check",
            "--only",
            name,
            "--device",
            args.device,
            "--sizes",
            args.sizes,
        ]
        begin = time.perf_counter()
        try:
            code: int | str = subprocess.run([*command, "--out", args.out], cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit} s"
        passed = code == 0 and json.loads(path.read_text()).get("passed", True)
        print(
            f"== {name}: {'ok' if passed else f'FAILED ({code})'} in {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
        if not passed:
            failed.append(name)
    print(f"results in {args.out}" + (f"; FAILED: {', '.join(failed)}" if failed else "; all parts passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
