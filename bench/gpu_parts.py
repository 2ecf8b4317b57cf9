"""The parts of `make gpu-check` that are neither tests nor benchmarks, a process each: bench.gpu_parts NAME --journal FILE."""

from __future__ import annotations

import argparse
import functools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import FAKE, in_lines, machine, records

ROOT = machine.ROOT
Arguments = argparse.Namespace


def say(text: str) -> None:
    print(in_lines(text), flush=True)


def facts(args: Arguments) -> dict[str, Any]:
    """What machine this is, and its ceilings."""
    import torch

    from .timing import copy_ceiling, matmul_ceiling

    found: dict[str, Any] = {"doctor": machine.run(sys.executable, "-m", "wikigpt", "doctor")}
    if args.device == "cuda":
        query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        found["nvidia_smi"] = machine.run("nvidia-smi", query, "--format=csv")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    product, copy = matmul_ceiling(args.device, dtype), copy_ceiling(args.device)
    known = machine.facts(args.device)
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    say(f"{known.get('gpu', known['cpu'])}; {versions}; commit {known['commit'][:10]}")
    kind = str(dtype).removeprefix("torch.")
    say(f"ceilings: {product / 1e12:.4g} TFLOP/s of one {kind} product, {copy / 1e9:,.4g} GB/s of a copy")
    return found | {"ceilings": {f"matmul {kind}": product, "copy": copy}}


def build(args: Arguments) -> dict[str, Any]:
    """csrc/ for this machine alone, unless it is there and loads: on a fresh machine it is not, whatever the journal says."""
    works = [sys.executable, "-c", "import torch, wikigpt._C as c; print(c.build_info()['cuda'])"]
    there = subprocess.run(works, cwd=ROOT, capture_output=True, text=True)
    if FAKE or (there.returncode == 0 and there.stdout.strip() not in ("", "None")):
        say("csrc: built already")
        return {"summary": "there already"}
    import torch

    jobs = {"MAX_JOBS": str(os.cpu_count() or 1), "TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}
    begin = time.perf_counter()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **jobs}, text=True, capture_output=True)
    output = done.stdout + done.stderr
    print(output)
    # setup.py leaves out what does not compile and ends well: only the import tells.
    there = subprocess.run(works, cwd=ROOT, capture_output=True, text=True)
    passed = done.returncode == 0 and there.returncode == 0 and there.stdout.strip() != "None"
    seconds = time.perf_counter() - begin
    said = [line for line in output.splitlines() if line.startswith("wikigpt:") or "error" in line]
    say(f"csrc: {'built' if passed else 'NOT built'} in {seconds:.0f} s{'' if passed else ': ' + '; '.join(said[:3])}")
    return {"passed": passed, "seconds_to_build": seconds, "said": said[:20], "import": there.stderr[-500:]}


SMOKE_RUN = ["n_layer=2", "n_embd=32", "n_head=2", "context_length=64", "data.vocab_size=512", "log_interval=5"]
# name -> backend, torch.compile, the whole step as one CUDA graph
VARIANTS = {"ours": ("auto", False, True), "sdpa-compile": ("torch", True, False)}
SECONDS = 20.0  # of training, the same for all: compilation and evaluation are not counted


def wikitext(args: Arguments, name: str) -> dict[str, Any]:
    """WikiText-2 for a fixed time with one implementation: perplexity reached, tokens per second.

    "sdpa-compile" is PyTorch's attention, norms and loss under torch.compile; optimizer and clipping are FusedAdamW in both.
    """
    import torch

    from wikigpt.config import resolve
    from wikigpt.data import prepare
    from wikigpt.train import TextTask, Trainer, processes, read_log

    backend, compiled, graph = VARIANTS[name]
    smoke = args.sizes == "smoke"
    seconds = 2.0 if smoke else SECONDS
    changes = [f"max_seconds={seconds}", f"backend={backend}", f"compile={compiled and args.device == 'cuda' and not FAKE}",
               f"cuda_graph={graph}", f"device={args.device}", "steps=1000000", "eval_interval=1000000",
               "save_interval=1000000", "tensorboard=false", f"dataset={'auto' if smoke else 'wikitext-2'}"]  # fmt: skip
    config = resolve("quick" if smoke else "wikitext-2", overrides=[*changes, *(SMOKE_RUN if smoke else [])])
    dataset = prepare(config.data.dataset, config.data.tokenizer, config.data.vocab_size)
    if smoke:
        dataset.tokens.update({split: dataset.tokens[split][:2048] for split in ("valid", "test")})
    # Not under --out, which holds results alone: checkpoints are large.
    with tempfile.TemporaryDirectory(prefix="wikigpt-") as directory, processes(args.device) as group:
        trainer = Trainer(config, TextTask(dataset), Path(directory), group, log=print)
        trainer.train_step()  # compilation and first allocations are not training
        trainer.check_weights()  # nor is compiling what validations run
        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        result = trainer.run()
        curve = [(round(line["seconds"], 2), line["loss"]) for line in read_log(Path(directory)) if "loss" in line]
    no_graph = getattr(trainer.compute, "failed", None)
    captured = getattr(trainer.compute, "graph", None) is not None
    valid, test = (result.final[split].per_token for split in ("valid", "test"))
    fell_back = f"; FAIL: no CUDA graph: {no_graph}" if no_graph else ""
    if FAKE:
        say(f"WikiText-2, {name}: ran{fell_back}")
        return {"passed": not no_graph}
    say(
        f"WikiText-2, {name}: {result.tokens_per_second:,.0f} tokens/s, validation perplexity {valid:.1f}, test {test:.1f} "
        f"after {seconds:.0f} s and {result.steps} steps{fell_back}"
    )
    return {
        "passed": not no_graph,
        "dataset": dataset.name,
        "backend": backend,
        "compile": config.train.compile,
        "cuda_graph": captured,
        "optimizer": "FusedAdamW",
        "training_seconds": seconds,
        "steps": result.steps,
        "tokens": result.steps * trainer.tokens_per_step,
        "tokens_per_second": result.tokens_per_second,
        "mfu": trainer._mfu(result.tokens_per_second),
        "train_loss": result.train_loss,
        "valid_perplexity": valid,
        "test_perplexity": test,
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


def describe(seconds: float, summary: dict[str, Any]) -> str:
    """A profile in one line: where the device's time goes."""
    if not summary["top"]:
        return f"{seconds * 1e3:.2f} ms, no kernel seen"
    top = "; ".join(f"{k['fraction']:.0%} {k['name'].split('(')[0][-60:]}" for k in summary["top"][:6])
    idle = summary["idle_fraction"] or 0.0
    counts = f"{summary['kernels_per_step']:.0f} kernels, idle {idle:.0%}, ours {summary['ours_fraction']:.0%}"
    return f"{seconds * 1e3:.2f} ms, {counts}: {top}"


def profile(args: Arguments) -> dict[str, Any]:
    """A training step of ours under PyTorch's profiler, and the same without it for tokens/s and MFU."""
    import torch

    from .bench_training import SMOKE, WIKITEXT, Case, flops
    from .training_worker import build as build_job

    cuda = args.device == "cuda"
    found: dict[str, Any] = {}
    ours, peak = our_kernels(), machine.peak_flops(args.device)
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    steps = 5 if cuda else 1
    for size in (SMOKE,) if args.sizes == "smoke" else (WIKITEXT,):
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
            say(f"training step of {case.n_layer} layers x {case.n_embd}, {name}: {describe(seconds, summary)}")
            del job
    return found


# name of a part -> what computes it
PARTS: dict[str, Callable[[Arguments], dict[str, Any]]] = {
    "environment/facts": facts,
    "environment/build": build,
    "training/profile": profile,
    **{f"wikitext/{name}": functools.partial(wikitext, name=name) for name in VARIANTS},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """What a part finds ends it in the journal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=tuple(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", choices=("check", "smoke"), default="check")
    parser.add_argument("--journal", type=Path, action="append", required=True)
    args = parser.parse_args(arguments)
    journal = records.Journal(*args.journal)
    journal.add(args.name, "begin", **records.about(args.device, args.sizes))
    found = PARTS[args.name](args)
    journal.add(args.name, "end", **found)
    return 0 if found.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
