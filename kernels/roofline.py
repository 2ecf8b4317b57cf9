"""What each op must move and compute, the least time that takes on a GPU, and what the compiler makes of our kernels.

    python -m wikigpt.kernels.roofline [op ...] [--gpu H100 ...]             the floors of the benchmarks' shapes; --json: all
    python -m wikigpt.kernels.roofline --kernels [op ...]                    registers, spills, ... as checked in
    python -m wikigpt.kernels.roofline --update-snapshot                     compile again and check in (minutes)

The floor is max(bytes / bandwidth, FLOPs / peak) (Williams et al. 2009): each input read once from memory, each output written
once, every unit at its published peak. No GPU is needed for any of it. Where bench/results/ holds a time of ours for a shape,
the part of the floor that it reaches is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compile_report import Kernel

# --- peaks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPU:
    """Published peaks: TFLOP/s of dense bf16 products with float32 sums and of float32 without tensor cores, TB/s of memory,
    MB of L2 cache, multiprocessors. architecture: whose kernels it runs, 10 * major + minor."""

    architecture: int
    tensor: float
    float32: float
    bandwidth: float
    l2: int
    multiprocessors: int
    source: str


# Data sheets print tensor TFLOP/s "with sparsity": half of that is dense.
GPUS = {
    "H100": GPU(
        90, 989.4, 66.9, 3.35, 50, 132, "NVIDIA H100 Tensor Core GPU data sheet and architecture white paper, SXM5 80 GB"
    ),
    "H200": GPU(90, 989.4, 66.9, 4.8, 50, 132, "NVIDIA H200 Tensor Core GPU data sheet, SXM 141 GB; the chip is the H100's"),
    "A100": GPU(
        80, 312, 19.5, 2.039, 40, 108, "NVIDIA A100 Tensor Core GPU data sheet and architecture white paper, SXM4 80 GB"
    ),
    "RTX 4090": GPU(89, 165.2, 82.6, 1.008, 72, 128, "NVIDIA Ada GPU architecture white paper, appendix A"),
    "B200": GPU(
        100, 2250, 80, 8.0, 126, 148, "NVIDIA Blackwell architecture technical brief, HGX B200; L2 and SMs as CUDA reports"
    ),
}

# --- work -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Bytes that memory must move and floating-point operations, in tensor cores or (tensor False) beside them."""

    bytes: float
    flops: float
    tensor: bool = True

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.tensor)

    def floor(self, gpu: GPU) -> tuple[float, str]:
        """(seconds, which bound holds: "memory", "tensor" or "float32")."""
        of_memory = self.bytes / (gpu.bandwidth * 1e12)
        of_units = self.flops / ((gpu.tensor if self.tensor else gpu.float32) * 1e12)
        return (of_memory, "memory") if of_memory >= of_units else (of_units, "tensor" if self.tensor else "float32")


# Sizes in elements of `size` bytes (bf16: 2). Operations of what is not a matrix product are counted an element, a
# multiply-add as two, exp, erf, rsqrt and a division as one each: they bound nothing here, to a digit or so.


def attention(b: int, s: int, t: int, heads: int, groups: int, d: int, causal: bool, backward: bool, size: int = 2) -> Work:
    """FlashAttention's formula: 4 S T D a head, half of it when causal, 2.5 times as much for the backward. Read q, k, v, and
    write out and lse (float32); backward read q, k, v, out, lse and d out, and write dq, dk, dv."""
    of_q, of_k, of_lse = b * s * heads * d * size, b * t * groups * d * size, b * s * heads * 4
    flops = 4 * b * heads * s * t * d * (0.5 if causal else 1)
    if backward:
        return Work(4 * of_q + 4 * of_k + of_lse, 2.5 * flops)
    return Work(2 * of_q + 2 * of_k + of_lse, flops)


def decode(b: int, context: int, heads: int, groups: int, d: int, size: int = 2) -> Work:
    """One query a sequence over a cache of `context` keys."""
    return attention(b, 1, context, heads, groups, d, False, False, size)


def norm(m: int, n: int, rms: bool, residual: bool, backward: bool, size: int = 2) -> Work:
    """M rows of N: x and y, with a residual also that and h = x + residual; backward dy, h and dx, with a residual also dh.
    Weights, statistics and their gradients are N or M numbers: left out."""
    tensors = (4 if residual else 3) if backward else (4 if residual else 2)
    return Work(tensors * m * n * size, m * n * ((9 if rms else 12) if backward else (5 if rms else 8)), tensor=False)


def activation(rows: int, features: int, gated: bool, backward: bool, size: int = 2) -> Work:
    """y = act(gate) * up, or act(x + bias) where not gated. Backward: d y, inputs, and their gradients."""
    inputs = 2 if gated else 1
    elements, tensors = rows * features, 2 * inputs + 1 if backward else inputs + 1
    return Work(tensors * elements * size, (30 if backward else 15) * elements, tensor=False)


def rotary(b: int, s: int, heads: int, groups: int, d: int, size: int = 2) -> Work:
    """q and k once in and once out, in either direction; 3 operations an element. The angles are shared by all heads."""
    elements = b * s * (heads + groups) * d
    return Work(2 * elements * size, 3 * elements, tensor=False)


def cross_entropy(n: int, v: int, backward: bool, size: int = 2) -> Work:
    """Given logits (N, V): read once; backward read again and d logits written."""
    return Work((2 if backward else 1) * n * v * size, (4 if backward else 3) * n * v, tensor=False)


def linear_cross_entropy(n: int, d: int, v: int, backward: bool, size: int = 2) -> Work:
    """Input (N, D) and weight (V, D) read, 2 N D V for the logits, which need not exist in memory. Forward and backward: three
    such products, both read and both gradients written."""
    return Work((2 if backward else 1) * (n + v) * d * size, (6 if backward else 2) * n * v * d)


def adamw(parameters: int) -> Work:
    """float32 with clipping: the norm reads g (4 bytes a parameter); the update reads p, g, m, v and writes p, m, v (28)."""
    return Work(32 * parameters, 2 * parameters + 14 * parameters, tensor=False)


def sampling(b: int, v: int, size: int = 4) -> Work:
    """Logits (B, V) read once: the floor of any sampler, one exponential and a comparison a logit."""
    return Work(b * v * size, 4 * b * v, tensor=False)


def parameters_in_words(count: int) -> str:
    """As the benchmarks name the size of a model: "124M parameters", "41k parameters"."""
    number, unit = (count / 1e6, "M") if count >= 1e6 else (count / 1e3, "k") if count >= 1e3 else (count, "")
    return f"{number:,.0f}{unit} parameters"


@dataclass(frozen=True)
class Case:
    """A shape of the benchmarks. group: what bench/bench_<op>.py calls it, under which a result is looked up."""

    op: str
    shape: str
    work: Work
    group: str = ""


def _attention_cases() -> Iterator[Case]:
    tokens, width = 16384, 2048
    for backward in (False, True):
        for d in (64, 128):
            for causal in (True, False):
                for s in (512, 2048, 8192, 16384):
                    heads = width // d
                    forward = attention(tokens // s, s, s, heads, heads, d, causal, False)
                    both = forward + attention(tokens // s, s, s, heads, heads, d, causal, True)
                    shape = f"{tokens // s} x {s:,}, {heads} heads of {d}, {'causal' if causal else 'full'}"
                    direction = "forward and backward" if backward else "forward"
                    group = f"attention {direction}, head_dim {d}, {'causal' if causal else 'full'}, S {s}"
                    yield Case("attention", f"{direction}, {shape}", both if backward else forward, group)
    for b, context in ((1, 131072), (4, 32768), (16, 8192), (64, 8192)):
        group = f"decoding, batch {b}, context {context}"
        yield Case(
            "attention_decode", f"batch {b}, {context:,} keys, 32 + 8 heads of 128", decode(b, context, 32, 8, 128), group
        )


def _norm_cases() -> Iterator[Case]:
    large = ((65536, 512), (16384, 2048), (8192, 4096), (8192, 8192), (4096, 16384), (2048, 32768), (1024, 65536))
    for op in ("layer_norm", "rms_norm"):
        for m, n in (*large, (65536, 64), (512, 1024), (1, 4096)):
            for residual in (False, True):
                for backward in (False, True):
                    shape = f"{'with residual, ' if residual else ''}{'backward' if backward else 'forward'}, {m:,} x {n:,}"
                    group = (
                        f"{op}{' with residual' if residual else ''}, {'backward' if backward else 'forward'}, {m:,} x {n:,}"
                    )
                    yield Case(op, shape, norm(m, n, op == "rms_norm", residual, backward), group)


def _activation_cases() -> Iterator[Case]:
    forms = (("bias_gelu", False), ("bias_gelu tanh", False), ("swiglu", True), ("swiglu packed", True), ("geglu packed", True))
    for n, f in ((8192, 3072), (8192, 11008), (32768, 11008)):
        for form, gated in forms:
            forward = activation(n, f, gated, False)
            yield Case("activation", f"{form}, forward, {n:,} x {f:,}", forward, f"{form}, forward, {n:,} x {f:,}")
            both = forward + activation(n, f, gated, True)
            group = f"{form}, forward and backward, {n:,} x {f:,}"
            yield Case("activation", f"{form}, forward and backward, {n:,} x {f:,}", both, group)


def _other_cases() -> Iterator[Case]:
    for b, s, heads, groups, d in ((8, 2048, 32, 8, 128), (8, 2048, 16, 16, 64), (64, 1, 32, 8, 128)):
        work, name = rotary(b, s, heads, groups, d), f"{heads} + {groups} heads of {d}"
        for direction, moved in (("forward", work), ("forward and backward", work + work)):
            group = f"rotary halves, {direction}, batch {b}, S {s}, {name}"
            yield Case("rotary", f"{direction}, {b} x {s:,}, {name}", moved, group)
    for n, d, v in ((8192, 1024, 33278), (8192, 4096, 128256), (4096, 4096, 128256)):
        for backward in (False, True):
            work, direction = linear_cross_entropy(n, d, v, backward), "forward and backward" if backward else "forward"
            group = f"linear cross-entropy, {direction}, {n:,} x {d:,}, vocabulary {v:,}"
            yield Case("linear_cross_entropy", f"{direction}, {n:,} x {d:,}, vocabulary {v:,}", work, group)
    for n, v in ((8192, 33278), (8192, 128256), (4096, 128256)):
        work = cross_entropy(n, v, False) + cross_entropy(n, v, True)
        group = f"cross-entropy, forward and backward, {n:,} x {v:,}"
        yield Case("cross_entropy", f"forward and backward, {n:,} x {v:,}", work, group)
    for parameters, tensors in ((10_121_216, 76), (124_439_808, 148), (1_017_302_272, 292)):
        shape = f"{parameters_in_words(parameters)} in {tensors} tensors"
        yield Case("adamw", f"{shape}, float32, with clipping", adamw(parameters), f"AdamW with clipping, {shape}")
    for b, v in ((1, 128256), (64, 128256)):
        yield Case("sampling", f"{b} x {v:,}, float32", sampling(b, v), f"sample, top_p 0.9, {b:,} x {v:,}")


def cases() -> list[Case]:
    return [*_attention_cases(), *_norm_cases(), *_activation_cases(), *_other_cases()]


# --- what was measured ----------------------------------------------------------------------------------------------

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def measured(directory: Path) -> dict[str, dict[str, float]]:
    """GPU -> group -> seconds of ours, from bench/results/<machine>/*.json and *.jsonl, wherever in a file a row {"group",
    "name", "median"} stands that is not wrong. Of several the last counts."""

    def rows(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict) and {"group", "name", "median"} <= value.keys():
            if not value.get("wrong"):
                yield value
        elif isinstance(value, (dict, list)):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from rows(inner)

    found: dict[str, dict[str, float]] = {}
    for gpu in GPUS:
        machine = gpu.lower().replace(" ", "-")
        for path in sorted(directory.glob(f"*{machine}*/*.json*")):
            for content in _contents(path):
                for row in rows(content):
                    if row["name"] == "ours":
                        found.setdefault(gpu, {})[row["group"]] = row["median"]
    return found


def _contents(path: Path) -> Iterator[Any]:
    """What a .json file holds, or each line of a journal that was written to its end."""
    for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(text)


# --- the snapshot of what the compiler makes of our kernels ---------------------------------------------------------

SNAPSHOT_FILE = Path(__file__).with_name("snapshot.json")
SNAPSHOT_ARCHITECTURES = (80, 90, 100)
REGISTERS = 8  # the hardware hands them out in eights a thread


def snapshot_keys() -> list[tuple[str, int]]:
    from .compile_report import CHECKED

    return [(op, arch) for op, selection in CHECKED.items() for arch in selection if arch in SNAPSHOT_ARCHITECTURES]


def read_snapshot() -> tuple[str, list[Kernel]]:
    """(the version of triton it is of, kernels)."""
    from .compile_report import Kernel

    content = json.loads(SNAPSHOT_FILE.read_text())
    return content["triton"], [Kernel(**kernel) for kernel in content["kernels"]]


def write_snapshot(kernels: list[Kernel], version: str, path: Path = SNAPSHOT_FILE) -> None:
    """One line a kernel, so that a change shows as one line."""
    lines = ",\n".join(json.dumps(asdict(kernel)) for kernel in kernels)
    path.write_text(f'{{"triton": {json.dumps(version)}, "kernels": [\n{lines}\n]}}\n')


def compile_snapshot(jobs: int | None) -> list[Kernel]:
    from .compile_report import CHECKED, report
    from .compile_report import cases as cases_of

    work = [(op, arch, case) for op, arch in snapshot_keys() for case in cases_of(op, CHECKED[op][arch])]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return [kernel for kernels in pool.map(report, *zip(*work)) for kernel in kernels]


def differences(before: list[Kernel], now: list[Kernel]) -> list[str]:
    """What changed, one sentence each. Everything has to be equal but registers, which may vary by `REGISTERS` as long as as
    many blocks are resident as before."""

    def keyed(kernels: list[Kernel]) -> dict[tuple[object, ...], Kernel]:
        named: dict[tuple[object, ...], Kernel] = {}
        for k in kernels:
            key = (k.op, k.arch, k.case, k.name)
            named[(*key, sum(other[:4] == key for other in named))] = k
        return named

    old, new, found = keyed(before), keyed(now), []
    for key in [*old, *(key for key in new if key not in old)]:
        where = f"{key[0]} sm_{key[1]}, {key[2]}, {key[3]}"
        if key not in new or key not in old:
            found.append(f"{where}: {'compiled no more' if key in old else 'not in the snapshot'}")
            continue
        for field in fields(old[key]):
            a, b = getattr(old[key], field.name), getattr(new[key], field.name)
            if a != b and not (field.name == "registers" and abs(a - b) <= REGISTERS):
                found.append(f"{where}: {field.name} was {a}, is {b}")
    return found


# --- command line ---------------------------------------------------------------------------------------------------


def _number(value: float, unit: str) -> str:
    factor, prefix = next(((f, p) for f, p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= f), (1.0, ""))
    return f"{value / factor:.3g} {prefix}{unit}"


def _time(seconds: float) -> str:
    factor, unit = next(((f, u) for f, u in ((1e3, "ms"), (1e6, "us")) if seconds * f >= 1), (1e9, "ns"))
    return f"{seconds * factor:.3g} {unit}"


def table(selected: list[Case], gpus: list[str], results: dict[str, dict[str, float]]) -> list[list[str]]:
    """All of it in one table, for a page."""
    lines = [["op", "shape", "bytes", "FLOP", "FLOP/byte", *(f"{gpu}: floor, bound, reached" for gpu in gpus)]]
    for case in selected:
        work, cells = case.work, []
        for gpu in gpus:
            floor, bound = work.floor(GPUS[gpu])
            seconds = results.get(gpu, {}).get(case.group)
            cells.append(f"{_time(floor)}, {bound}, {'not measured' if seconds is None else f'{floor / seconds:.0%}'}")
        lines.append([case.op, case.shape, _number(work.bytes, "B"), _number(work.flops, "FLOP"), _intensity(work), *cells])
    return lines


def _intensity(work: Work) -> str:
    return f"{work.flops / work.bytes:.3g}"


LEGEND = """The least time that a shape can take: max(bytes / bandwidth, FLOP / peak of the units).
*: bound by the tensor cores (^: by float32 units), else by memory.
67%: what ours reaches of it where bench/results has its time; all others are not measured."""
FEW = 2  # GPUs beside which there is room for operations too


def tables(selected: list[Case], gpus: list[str], results: dict[str, dict[str, float]]) -> str:
    """For a terminal: a table for each op and direction, of which the title says what all its shapes share."""
    groups: dict[str, list[tuple[str, Case]]] = {}
    for case in selected:
        words = case.shape.split(", ")
        of_title = [word for word in words if not any(letter.isdigit() for letter in word)]
        size = ", ".join(word for word in words if word not in of_title)
        groups.setdefault(", ".join([case.op, *of_title]), []).append((size, case))
    few = len(gpus) <= FEW

    def cell(case: Case, gpu: str) -> str:
        floor, bound = case.work.floor(GPUS[gpu])
        seconds = results.get(gpu, {}).get(case.group)
        mark = {"tensor": "*", "float32": "^"}.get(bound, "")
        return f"{_time(floor)}{mark}{'' if seconds is None else f' {floor / seconds:.0%}'}"

    found = [LEGEND]
    for title, members in groups.items():
        lines = [["", "bytes", *(["FLOP", "FLOP/byte"] if few else []), *gpus]]
        for size, case in members:
            operations = [_number(case.work.flops, "FLOP"), _intensity(case.work)] if few else []
            lines.append([size, _number(case.work.bytes, "B"), *operations, *(cell(case, gpu) for gpu in gpus)])
        found.append(f"{title}\n{aligned(lines)}")
    return "\n\n".join(found)


def as_json(selected: list[Case], gpus: list[str], results: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    rows = []
    for case in selected:
        row: dict[str, Any] = {"op": case.op, "shape": case.shape, **asdict(case.work), "gpus": {}}
        for gpu in gpus:
            floor, bound = case.work.floor(GPUS[gpu])
            row["gpus"][gpu] = {"floor": floor, "bound": bound, "measured": results.get(gpu, {}).get(case.group)}
        rows.append(row)
    return rows


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def aligned(lines: list[list[str]], width: int = 100) -> str:
    """Columns, the last of which wraps where it would be wider than the page."""
    *widths, _ = [max(map(len, column)) + 2 for column in zip(*lines)]
    before = sum(widths)
    found = []
    for line in lines:
        start = "".join(cell.ljust(wide) for cell, wide in zip(line, widths))
        first, *others = textwrap.wrap(line[-1], max(20, width - before)) or [""]
        found += [(start + first).rstrip(), *(" " * before + other for other in others)]
    return "\n".join(found)


def main(arguments: list[str] | None = None) -> None:
    known = list(dict.fromkeys(case.op for case in cases()))
    parser = argparse.ArgumentParser(prog="python -m wikigpt.kernels.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of measured times (default: bench/results)")
    parser.add_argument("--kernels", action="store_true", help="the compiled kernels of the snapshot instead of the floors")
    parser.add_argument("--update-snapshot", action="store_true", help=f"compile and write {SNAPSHOT_FILE.name}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")
    given = parser.parse_args(arguments)
    if given.update_snapshot or given.kernels:
        from . import compile_report

        if given.update_snapshot:
            if compile_report.triton.knobs.runtime.interpret:
                parser.error("TRITON_INTERPRET is set, so kernels would be interpreted: unset it")
            write_snapshot(compile_snapshot(given.jobs), compile_report.triton.__version__)
            return
        version, kernels = read_snapshot()
        if unknown := [op for op in given.ops if op not in compile_report.CHECKED]:
            parser.error(f"unknown op {unknown[0]!r}, the snapshot has {', '.join(compile_report.CHECKED)}")
        kernels = [kernel for kernel in kernels if kernel.op in (given.ops or compile_report.CHECKED)]
        if given.json:
            json.dump({"triton": version, "kernels": [asdict(kernel) for kernel in kernels]}, sys.stdout)
            return
        print(f"triton {version}")
        print(markdown(compile_report.lines(kernels)) if given.markdown else compile_report.tables(kernels))
        return
    if unknown := [op for op in given.ops if op not in known]:
        parser.error(f"unknown op {unknown[0]!r}, known are {', '.join(known)}")
    selected = [case for case in cases() if case.op in (given.ops or known)]
    results = measured(given.results) if given.results.is_dir() else {}
    if given.json:
        json.dump(as_json(selected, given.gpu, results), sys.stdout)
    else:
        found = selected, given.gpu, results
        print(markdown(table(*found)) if given.markdown else tables(*found))


if __name__ == "__main__":
    main()
