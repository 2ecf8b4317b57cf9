"""Block sizes by measurement: which rows of an op's table the GPU at hand runs fastest. Proposes, never changes a table.

    python -m wikigpt.kernels.tune OP [--shapes 8x2048c 2x8192] [--only REGEX] [--out FILE] [--budget-seconds 210]
    python -m wikigpt.kernels.tune OP --dry-run [--arch 90 ...]        all but the measurement; needs no GPU

For each part of an op (one kernel and one table row) the candidates are compiled, in parallel, and those dropped that spill,
do not fit, or multiply without the tensor-core instruction of the GPU's generation; today's row stays whatever it does. What
remains has to agree with the reference (error against float64 at most twice plain PyTorch's) before it is timed: by CUDA
events, the L2 cache overwritten before each launch, candidates in turns, medians, the slow ones leaving after three rounds.
--out takes one line a result as results come, and a later run with the same file goes on from there.

Under TRITON_INTERPRET=1 nothing is compiled and the wall clock stands in for the events: that proves the procedure.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from .compile_report import ARCHITECTURES, Kernel, compile_only, measure
from .roofline import aligned

Config = Any  # a frozen dataclass of block sizes, or ((name, value), ...) for constants of a module
Launch = Callable[[], object]
Shape = tuple[int, int, bool]  # "8x2048c": 8, 2048, causal

# --- what can be tuned ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """run: the op by the configuration in force. expected: of the reference in a dtype, what `part` takes from run's result."""

    run: Callable[[], list[Tensor]]
    part: Callable[[list[Tensor]], list[Tensor]]
    expected: Callable[[torch.dtype], list[Tensor]]


@dataclass(frozen=True)
class Part:
    """One choice to make. kernels: those whose time counts. problems: name -> a function that makes one on a device ("meta":
    to compile). variants: further candidates from the fastest ones, which launch the same compiled kernel otherwise."""

    name: str
    kernels: tuple[str, ...]
    today: Config
    candidates: list[Config]
    force: Callable[[Config], AbstractContextManager[object]]
    problems: Mapping[str, Callable[[str], Problem]]
    multiplies: bool = False
    variants: Callable[[Config], list[Config]] = lambda config: []


def literal(config: Config) -> str:
    """The configuration as it is written in the source."""
    if not is_dataclass(config):
        return ", ".join(f"{name} = {value}" for name, value in config)
    words = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.default is MISSING:
            words.append(str(value))
        elif value != field.default:
            words.append(f"{field.name}={value}")
    return f"{type(config).__name__}({', '.join(words)})"


@contextlib.contextmanager
def _patched(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _normal(device: str, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
    """Random numbers: bfloat16 on a GPU (and to compile), float32 under the interpreter."""
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=torch.float32).to(dtype)


def _nearest_first(today: Config, candidates: Iterable[Config]) -> list[Config]:
    """Today's row, then what differs least from it, so that a budget that ends early ends with the unlikely ones."""

    def numbers(config: Config) -> list[float]:
        return [float(getattr(config, field.name)) for field in fields(config)]

    def distance(config: Config) -> float:
        return sum(abs(math.log2(max(a, 0.5) / max(b, 0.5))) for a, b in zip(numbers(config), numbers(today)))

    return [today, *sorted((config for config in candidates if config != today), key=distance)]


def _attention_problem(batch: int, s: int, causal: bool, d: int, direction: str, device: str) -> Problem:
    from .attention.backward import backward
    from .attention.forward import forward
    from .attention.reference import Inputs, attention_reference

    heads = 1 if device == "cpu" else 2048 // d
    q, k, v, grad = (_normal(device, batch, s, heads, d, seed=i) for i in range(4))
    x = Inputs(q, k, v, softmax_scale=d**-0.5, window_right=0 if causal else -1)

    def head(tensors: list[Tensor]) -> list[Tensor]:
        """The last head of the last sequence: (1, S, 1, D), and lse (1, 1, S)."""
        return [t[-1:, -1:] if t.dim() == 3 else t[-1:, :, -1:] for t in tensors]

    def expected(dtype: torch.dtype) -> list[Tensor]:
        one, dout = [t.to(dtype).requires_grad_() for t in head([q, k, v])], head([grad])[0].to(dtype)
        out, lse = attention_reference(replace(x, q=one[0], k=one[1], v=one[2]))
        if direction == "forward":
            return [out.detach(), lse.detach()]
        dq, dk, dv = torch.autograd.grad(out, one, dout)
        return [dq] if direction == "dq" else [dk, dv]

    if direction == "forward":
        return Problem(lambda: list(forward(x)), head, expected)
    out, lse = (torch.empty_like(q), q.new_empty(x.lse_shape(), dtype=torch.float32)) if device == "meta" else forward(x)

    def run() -> list[Tensor]:
        dq, dk, dv, *_ = backward(x, out, lse, grad, None, False)
        return [dq] if direction == "dq" else [dk, dv]

    return Problem(run, head, expected)


def _force_row(rows: Any, direction: str, row: Config) -> AbstractContextManager[object]:
    from .attention import config

    return config.force(replace(rows, **{direction: row}))


def _attention(arch: int, shapes: list[Shape], head_dims: list[int]) -> list[Part]:
    from .attention import config
    from .attention.config import Row, Rows
    from .attention.reference import Inputs

    parts = []
    for d in head_dims:
        dtype = torch.float32 if arch == 0 else torch.bfloat16
        q = torch.empty(1, 1, 1, d, dtype=dtype, device="meta")
        with compile_only(arch) if arch else contextlib.nullcontext():
            today: Rows = config.rows(Inputs(q, q, q))
        sizes: dict[str, tuple[tuple[int, ...], ...]] = {
            "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
            "dq": ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
            "dkdv": ((16, 32, 64), (64, 128), (4, 8), (1, 2, 3)),
        }
        for direction, choices in sizes.items():
            if arch == 0:
                choices = ((16, 32), (16, 32), (1,), (1,))
            tma = (False, True) if arch >= 90 else (False,)
            all_rows = [Row(m, n, w, s, tma=t) for m, n, w, s in itertools.product(*choices) for t in tma]
            now = getattr(today, direction)
            problems = {
                f"{b}x{s}{'c' if c else ''}": functools.partial(_attention_problem, b, s, c, d, direction)
                for b, s, c in shapes or [(8, 2048, True), (2, 8192, False)]
            }
            parts.append(
                Part(
                    f"{direction}, head_dim {d}",
                    (f"_{direction}",),
                    now,
                    _nearest_first(now, all_rows),
                    functools.partial(_force_row, today, direction),
                    problems,
                    multiplies=True,
                    variants=lambda row: [replace(row, persistent=not row.persistent)],
                )
            )
    return parts


def _decode_problem(batch: int, context: int, d: int, paged: bool, device: str) -> Problem:
    from .attention.decode import forward
    from .attention.kvcache import CacheInputs
    from .attention.reference import Inputs, attention_reference

    heads, groups, page = (4, 2, 16) if device == "cpu" else (32, 8, 256)
    q = _normal(device, batch, 1, heads, d)
    k, v = (_normal(device, batch, context, groups, d, seed=i) for i in (1, 2))
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    table = torch.arange(batch * context // page, dtype=torch.int32, device=device).view(batch, -1) if paged else None
    k_cache, v_cache = (t.view(-1, page, groups, d) if paged else t for t in (k, v))
    x = CacheInputs(
        q, k_cache, v_cache, None, None, None, None, lengths, None, None, table, None, None, seqlen=None, softmax_scale=d**-0.5,
        window_left=-1, window_right=-1, softcap=0.0, rotary_interleaved=False, num_splits=0,
    )  # fmt: skip

    def expected(dtype: torch.dtype) -> list[Tensor]:
        last_q, last_k, last_v = (t[-1:].to(dtype) for t in (q, k, v))
        return [attention_reference(Inputs(last_q, last_k, last_v, softmax_scale=d**-0.5))[0]]

    return Problem(lambda: list(forward(x)), lambda results: [results[0][-1:]], expected)


def _attention_decode(arch: int, shapes: list[Shape], head_dims: list[int]) -> list[Part]:
    from .attention import decode
    from .attention.config import Row

    parts = []
    for d, paged in itertools.product(head_dims, (False, True)):
        dtype = torch.float32 if arch == 0 else torch.bfloat16
        m, n, warps, stages = decode.config(arch, d, dtype, 2 if arch == 0 else 4, paged).values()
        today = Row(m, n, warps, stages)
        choices = ((16,), (32, 64, 128, 256), (2, 4, 8), (2, 3, 4, 5)) if arch else ((16,), (16, 32), (1,), (1,))
        problems = {
            f"{b}x{n}": functools.partial(_decode_problem, b, n, d, paged)
            for b, n, _ in shapes or [(4, 32768, False), (64, 8192, False)]
        }

        def force(row: Config) -> AbstractContextManager[object]:
            blocks = {
                "BLOCK_M": row.block_m, "BLOCK_N": row.block_n, "num_warps": row.num_warps, "num_stages": row.num_stages,
            }  # fmt: skip
            return _patched(decode, config=lambda *_: blocks)

        rows = _nearest_first(today, (Row(m, n, w, s) for m, n, w, s in itertools.product(*choices)))
        name = f"{'paged' if paged else 'dense'}, head_dim {d}"
        parts.append(Part(name, ("_decode", "_combine"), today, rows, force, problems))
    return parts


def _norm_problem(m: int, n: int, rms: bool, backward: bool, device: str) -> Problem:
    from . import norm_triton
    from .norm import layer_norm, rms_norm

    x, dy = (_normal(device, m, n, seed=i) for i in (0, 1))
    weight, bias = (_normal(device, n, seed=i) for i in (2, 3))
    shift = None if rms else bias
    forward = functools.partial(norm_triton.forward, x, weight, shift, None, None, 1e-5, 0.0, rms, False, False, True)
    mean: Tensor | None = None if rms else x.new_empty(m, dtype=torch.float32)
    rstd: Any = x.new_empty(m, dtype=torch.float32)
    if backward and device != "meta":
        _, _, mean, rstd = forward()

    def run() -> list[Tensor]:
        if not backward:
            return [forward()[0]]
        dx, _, dw, db = norm_triton.backward(
            dy, None, x, weight, mean, rstd, None, 0.0, False, x.dtype, None if rms else weight.dtype, False, True
        )
        return [t for t in (dx, dw, db) if t is not None]

    def expected(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in ((x, weight) if rms else (x, weight, bias))]
        norm: Any = rms_norm if rms else layer_norm
        y = norm(*leaves, eps=1e-5, backend="reference")
        return list(torch.autograd.grad(y, leaves, dy.to(dtype))) if backward else [y.detach()]

    return Problem(run, lambda results: results, expected)


def _norm(arch: int, shapes: list[Shape], head_dims: list[int]) -> list[Part]:
    from . import norm_triton
    from .norm_triton import Blocks, backward_blocks, forward_blocks

    parts = []
    for m, n, _ in shapes or [(65536, 512, False), (16384, 2048, False), (8192, 4096, False), (8192, 8192, False)]:
        width, size = norm_triton._padded(n), 4 if arch == 0 else 2
        for rms, backward in itertools.product((False, True), (False, True)):
            forward_today = forward_blocks(n, size, 2 * size, False)
            backward_today = backward_blocks(n, 2 * size, size, rms, arch)
            today = backward_today if backward else forward_today
            found = [today]
            for numbers, warps in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16)):
                if numbers >= width and today.block_n >= n:  # whole rows
                    whole = Blocks(numbers // width, width, warps)
                    choices = itertools.product((1, 2, 3), (1, 2)) if backward else ((1, 1),)
                    found += [replace(whole, num_stages=s, programs=p) for s, p in choices]
            if arch == 0:
                found = [today, replace(today, block_m=2 * today.block_m)]

            def force(
                blocks: Config, backward: bool = backward, f: Blocks = forward_today, b: Blocks = backward_today
            ) -> AbstractContextManager[object]:
                return norm_triton.force(*((f, blocks) if backward else (blocks, b)))

            kernels = ("_backward", "_backward_means", "_add_partials") if backward else ("_forward", "_forward_wide")
            name = f"{'rms_norm' if rms else 'layer_norm'} {'backward' if backward else 'forward'}, {n} columns"
            problems = {f"{m}x{n}": functools.partial(_norm_problem, m, n, rms, backward)}
            parts.append(Part(name, kernels, today, _nearest_first(today, dict.fromkeys(found)), force, problems))
    return parts


def _constants(module: Any, **choices: tuple[int, ...]) -> tuple[Config, list[Config]]:
    """(today's constants of a module, all combinations, today's first)."""
    today = tuple((name, getattr(module, name)) for name in choices)
    found = [tuple(zip(choices, values)) for values in itertools.product(*choices.values())]
    return today, [today, *(config for config in found if config != today)]


def _activation_problem(rows: int, features: int, gated: bool, backward: bool, device: str) -> Problem:
    from . import activation_triton
    from .activation import bias_gelu, swiglu

    gate, up, grad = (_normal(device, rows, features, seed=i) for i in range(3))
    bias = _normal(device, features, seed=3)
    # gate, up, their biases, the seed; activation, packed, dropout_p
    options: tuple[Any, ...] = (*((gate, up, None) if gated else (gate, None, bias)), None, None)
    options += ("silu" if gated else "gelu", False, 0.0)

    def run() -> list[Tensor]:
        if not backward:
            return [activation_triton.forward(*options)]
        found = activation_triton.backward(grad, not gated, False, *options)
        return [tensor for tensor in found if tensor is not None]

    def expected(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in ((gate, up) if gated else (gate, bias))]
        function: Any = swiglu if gated else bias_gelu
        y = function(*leaves, backend="reference")
        return list(torch.autograd.grad(y, leaves, grad.to(dtype))) if backward else [y.detach()]

    return Problem(run, lambda results: results, expected)


def _activation(arch: int, shapes: list[Shape], head_dims: list[int]) -> list[Part]:
    from . import activation_triton

    parts = []
    for gated, backward in itertools.product((False, True), (False, True)):
        choices: dict[str, tuple[int, ...]] = {"BYTES": (2048, 4096, 8192), "WARPS": (2, 4, 8)}
        if backward and not gated:
            choices["PROGRAMS"] = (1024, 2048, 4096)
        if arch == 0:
            choices = {"BYTES": (2048, 4096)}
        problems = {
            f"{m}x{f}": functools.partial(_activation_problem, m, f, gated, backward)
            for m, f, _ in shapes or [(8192, 3072, False), (8192, 11008, False)]
        }
        name = f"{'swiglu' if gated else 'bias_gelu'} {'backward' if backward else 'forward'}"
        parts.append(
            Part(
                name,
                ("_backward" if backward else "_forward",),
                *_constants(activation_triton, **choices),
                lambda config: _patched(activation_triton, **dict(config)),
                problems,
            )
        )
    return parts


def _rotary_problem(batch: int, length: int, interleaved: bool, device: str) -> Problem:
    from .rotary import apply_rotary_emb_reference, rotary_cos_sin
    from .rotary_triton import turned

    heads, groups, d = (4, 2, 16) if device == "cpu" else (32, 8, 128)
    q = _normal(device, batch, length, heads, d).transpose(1, 2)
    k = _normal(device, batch, length, groups, d, seed=1).transpose(1, 2)
    cos, sin = rotary_cos_sin(torch.arange(length, device=device), d)

    def run() -> list[Tensor]:
        return [t for t in turned(q, k, cos, sin, None, interleaved, False) if t is not None]

    def expected(dtype: torch.dtype) -> list[Tensor]:
        return [apply_rotary_emb_reference(t.to(dtype), cos.to(dtype), sin.to(dtype), interleaved=interleaved) for t in (q, k)]

    return Problem(run, lambda results: results, expected)


def _rotary(arch: int, shapes: list[Shape], head_dims: list[int]) -> list[Part]:
    from . import rotary_triton

    choices: dict[str, tuple[int, ...]] = {"BYTES": (2048, 4096, 8192), "HEADS": (1, 2, 4, 8, 16)}
    if arch == 0:
        choices = {"BYTES": (1024, 4096)}
    return [
        Part(
            "pairs" if interleaved else "halves",
            ("_rotary",),
            *_constants(rotary_triton, **choices),
            lambda config: _patched(rotary_triton, **dict(config)),
            {
                f"{b}x{s}": functools.partial(_rotary_problem, b, s, interleaved)
                for b, s, _ in shapes or [(8, 2048, False), (64, 1, False)]
            },
        )
        for interleaved in (False, True)
    ]


def _cross_entropy_problem(n: int, vocabulary: int, backward: bool, device: str) -> Problem:
    from . import cross_entropy_triton as kernels
    from .cross_entropy import cross_entropy_reference

    z = _normal(device, n, vocabulary)
    target = torch.empty(n, dtype=torch.int64, device=device)
    if device != "meta":
        target.random_(vocabulary)
    options, rows = kernels.options(-100, 0.0, 0.0, 0.0, None), kernels.Rows.empty(target, False, 1)
    ones, out = torch.ones(n, device=device), torch.empty_like(z)
    if device != "meta":
        kernels.forward(z, target, rows, 0, vocabulary, options)

    def run() -> list[Tensor]:
        if backward:
            kernels.gradient(z, out, target, rows.lse, ones, 0, vocabulary, options)
            return [out]
        kernels.forward(z, target, rows, 0, vocabulary, options)
        return [rows.loss]

    def expected(dtype: torch.dtype) -> list[Tensor]:
        logits = z[:256].to(dtype).requires_grad_()
        loss = cross_entropy_reference(logits, target[:256], reduction="none")
        loss = loss[0] if isinstance(loss, tuple) else loss
        return [torch.autograd.grad(loss.sum(), logits)[0]] if backward else [loss.detach()]

    return Problem(run, lambda results: [results[0][:256]], expected)


def _cross_entropy(arch: int, shapes: list[Shape], head_dims: list[int]) -> list[Part]:
    from . import cross_entropy_triton
    from .norm_triton import Blocks

    parts = []
    for (n, v, _), backward in itertools.product(shapes or [(8192, 33278, False), (8192, 128256, False)], (False, True)):
        today = Blocks(*cross_entropy_triton.block(v))
        found = [Blocks(1, width, warps) for width in (1024, 2048, 4096, 8192) for warps in (4, 8, 16)]
        if arch == 0:
            found = [Blocks(16, 128, 1)]

        def force(blocks: Config) -> AbstractContextManager[object]:
            chosen = (blocks.block_m, blocks.block_n, blocks.num_warps)
            return _patched(cross_entropy_triton, block=lambda *_: chosen)

        name = f"{'gradient' if backward else 'forward'}, vocabulary {v}"
        problems = {f"{n}x{v}": functools.partial(_cross_entropy_problem, n, v, backward)}
        kernel = "_gradient" if backward else "_forward"
        parts.append(Part(name, (kernel,), today, _nearest_first(today, found), force, problems))
    return parts


OPS: dict[str, Callable[[int, list[Shape], list[int]], list[Part]]] = {
    "attention": _attention,
    "attention_decode": _attention_decode,
    "norm": _norm,
    "activation": _activation,
    "rotary": _rotary,
    "cross_entropy": _cross_entropy,
}

# --- filter by compiling --------------------------------------------------------------------------------------------


@functools.cache
def _parts(op: str, arch: int, shapes: tuple[Shape, ...], head_dims: tuple[int, ...]) -> dict[str, Part]:
    return {part.name: part for part in OPS[op](arch, list(shapes), list(head_dims))}


STUCK = 60.0  # seconds in which no compilation ends: what is left crashed its compiler or never will


def why_not(kernels: list[Kernel], multiplies: bool) -> str | None:
    """Why a candidate is not worth a GPU's time, from what the compiler made of its kernels; None where it is."""
    for kernel in kernels:
        limits = ARCHITECTURES[kernel.arch]
        if kernel.shared > limits.shared_block or kernel.blocks < 1:
            return f"does not fit: {kernel.shared:,} B of shared memory, {kernel.registers} registers x {kernel.warps} warps"
        if kernel.spills:
            return f"spills {kernel.spills} B"
        if multiplies and kernel.instruction != limits.family:
            return f"{kernel.instruction}, not {limits.family}"
    return None


def compile_candidate(key: tuple[Any, ...], part_name: str, index: int, problem: str) -> list[Kernel] | str:
    """The kernels that count of one candidate, or why it does not compile. Runs in a process of its own, whose cache on disk
    the measuring process then finds filled."""
    part, arch = _parts(*key)[part_name], key[1]
    try:
        with compile_only(arch) as compiled, part.force(part.candidates[index]):
            part.problems[problem]("meta").run()
    except Exception as error:
        return f"does not compile: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    unique = {kernel.hash: kernel for kernel in compiled if kernel.metadata.name in part.kernels}
    return [measure(key[0], part_name, arch, kernel) for kernel in unique.values()]


def filtered(key: tuple[Any, ...], parts: list[Part], records: Records, jobs: int, deadline: float) -> None:
    """Fill the records with a verdict for every candidate: None, or why it is not measured."""
    waiting: dict[Any, tuple[Part, int, list[str]]] = {}
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:  # Pool: a compiler that crashes takes one worker, not all

        def submit(part: Part, index: int, problems: list[str]) -> None:
            task = pool.apply_async(compile_candidate, (key, part.name, index, problems[0]))
            waiting[task] = part, index, problems[1:]

        for part in parts:
            for index, config in enumerate(part.candidates):
                if records.get(part, config) is None:
                    submit(part, index, list(part.problems))
        progress = time.monotonic()
        while waiting and time.monotonic() < min(deadline, progress + STUCK):
            done = [task for task in waiting if task.ready()]
            progress = time.monotonic() if done else progress
            for task in done:
                part, index, left = waiting.pop(task)
                config, result = part.candidates[index], task.get()
                verdict = result if isinstance(result, str) else why_not(result, part.multiplies)
                facts = [] if isinstance(result, str) else [asdict(kernel) for kernel in result]
                if config == part.today and facts:
                    verdict = None  # it runs today
                if verdict is None and left:
                    submit(part, index, left)  # the other problems' kernels, for the cache
                else:
                    records.put(part, config, verdict=verdict, facts=facts)
            time.sleep(0.02)
        for part, index, _ in waiting.values():
            records.put(part, part.candidates[index], save=False, verdict="not compiled in time (or the compiler crashed)")


# --- results --------------------------------------------------------------------------------------------------------


def _source() -> str:
    """What the results depend on, in a few letters."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    texts = [path.read_bytes() for path in files if path.name not in ("tune.py", "roofline.py", "compile_report.py")]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:12]


class Records:
    """part, configuration -> what is known of it: verdict, facts, seconds; kept in a file of one JSON object a line."""

    def __init__(self, op: str, arch: int, device_name: str, path: Path | None):
        self.common = {"op": op, "arch": arch, "device": device_name, "triton": triton.__version__, "source": _source()}
        self.path = path
        self.known: dict[tuple[str, str], dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the run was stopped while it wrote
                    continue
                if all(row.get(name) == value for name, value in self.common.items()):
                    if row["verdict"] == "running":
                        row["verdict"] = "the process died while it ran"
                    self.known[row["part"], row["config"]] = row

    def get(self, part: Part, config: Config) -> dict[str, Any] | None:
        return self.known.get((part.name, literal(config)))

    def put(self, part: Part, config: Config, save: bool = True, **values: Any) -> None:
        key = part.name, literal(config)
        row = {**self.common, "part": key[0], "config": key[1], **self.known.get(key, {}), **values}
        self.known[key] = row
        if save and self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


# --- verify and measure ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded(names: tuple[str, ...]) -> Iterator[list[Launch]]:
    """Collects the launches of kernels of these names inside the block, to launch them again without what surrounds them."""
    launches: list[Launch] = []
    kinds = (JITFunction, InterpretedFunction)
    runs = [kind.run for kind in kinds]

    def recording(run: Any) -> Any:
        def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            if self.fn.__name__ in names:
                launches.append(functools.partial(run, self, *args, grid=grid, warmup=warmup, **options))
            return run(self, *args, grid=grid, warmup=warmup, **options)

        return launch

    for kind, run in zip(kinds, runs):
        kind.run = recording(run)  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        for kind, run in zip(kinds, runs):
            kind.run = run  # type: ignore[method-assign]


def disagreement(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> str | None:
    """FlashAttention's rule: the error against float64 is at most twice plain PyTorch's, plus a tiny term. NaN never agrees."""
    for i, (a, simple, true) in enumerate(zip(ours, plain, truth, strict=True)):
        error, allowed = (float((t.double() - true).abs().max()) for t in (a, simple))
        tiny = torch.finfo(a.dtype).eps / 4 + 32 * torch.finfo(torch.float32).eps
        if not error <= 2 * allowed + tiny * float(true.abs().max()):
            return f"wrong: error {error:.2e} in result {i}, plain PyTorch's {allowed:.2e}"
    return None


class Timer:
    """Seconds of launches: by events on a GPU, with the L2 cache overwritten before them, which takes longer than to launch."""

    def __init__(self, device: str):
        self.flush = torch.empty(2**28, dtype=torch.int8, device=device) if device == "cuda" else None

    def __call__(self, launches: list[Launch]) -> float:
        if self.flush is None:
            begin = time.perf_counter()
            for launch in launches:
                launch()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        for launch in launches:
            launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def timed(
    part: Part, records: Records, device: str, timer: Callable[[list[Launch]], float], rounds: int, deadline: float
) -> None:
    """Verify and time all candidates of a part that have no verdict against them; the records get seconds by problem."""
    open_ = [c for c in part.candidates if (row := records.get(part, c)) and row["verdict"] is None and "seconds" not in row]
    if not open_:
        return
    if part.today not in open_:
        open_.insert(0, part.today)  # what was timed in an earlier run is compared by way of today's row
    problems = {name: make(device) for name, make in part.problems.items()}
    answers = {
        name: [problem.expected(dtype) for dtype in (_dtype(device), torch.float64)] for name, problem in problems.items()
    }

    def start(config: Config) -> dict[str, list[Launch]] | None:
        records.put(part, config, verdict="running")
        found: dict[str, list[Launch]] = {}
        verdict = None
        try:
            for name, problem in problems.items():
                with part.force(config), recorded(part.kernels) as launches:
                    result = problem.part(problem.run())
                found[name] = launches
                verdict = verdict or disagreement(result, *answers[name])
        except Exception as error:  # too much shared memory, an illegal access: of this candidate alone
            verdict = f"does not run: {(str(error) or type(error).__name__).splitlines()[0]}"
        records.put(part, config, verdict=verdict)
        if device == "cuda":
            torch.cuda.synchronize()  # an error that stays ends the run here; the next one leaves this candidate out
        return found if verdict is None else None

    def race(runners: dict[Config, dict[str, list[Launch]]]) -> dict[Config, dict[str, float]]:
        samples: dict[Config, dict[str, list[float]]] = {c: {name: [] for name in problems} for c in runners}
        for turn in range(rounds):
            for config, launches in runners.items():
                for name in problems:
                    samples[config][name].append(timer(launches[name]))
            if turn == 2:  # today's row stays for comparison
                scores = {c: _score({n: statistics.median(s) for n, s in samples[c].items()}) for c in runners}
                slowest = 1.25 * min(scores.values())
                runners = {c: launches for c, launches in runners.items() if scores[c] <= slowest or c == part.today}
            if turn >= 2 and time.monotonic() > deadline:
                break
        return {c: {name: statistics.median(s) for name, s in of.items()} for c, of in samples.items()}

    runners = {}
    for config in open_:
        if time.monotonic() > deadline and config != part.today:
            break
        if (launches := start(config)) is not None:
            runners[config] = launches
    if not runners:
        return
    seconds = race(runners)
    finalists = sorted(runners, key=lambda c: _score(seconds[c]))[:3]
    more = {v: launches for c in finalists for v in part.variants(c) if v not in runners and (launches := start(v)) is not None}
    if more:
        again = race({c: runners[c] for c in {*finalists, part.today} if c in runners} | more)
        seconds |= again
    for config, of in seconds.items():
        records.put(part, config, seconds=of)


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _score(seconds: dict[str, float]) -> float:
    """The geometric mean over the problems."""
    return statistics.geometric_mean(seconds.values())


# --- command line ---------------------------------------------------------------------------------------------------

GAIN = 1.02  # a new row has to be faster by so much: less is noise


def ranked(part: Part, records: Records) -> list[dict[str, Any]]:
    """What was timed, the fastest first, then the rest."""
    rows = [row for (name, _), row in records.known.items() if name == part.name]
    fast = [row for row in rows if row["verdict"] is None and "seconds" in row]
    return sorted(fast, key=lambda row: _score(row["seconds"])) + [row for row in rows if row not in fast]


def best(part: Part, records: Records) -> str | None:
    """The row to check in; None where nothing was timed."""
    rows = [row for row in ranked(part, records) if row["verdict"] is None and "seconds" in row]
    if not rows:
        return None
    today = records.get(part, part.today)
    if today is None or "seconds" not in today or _score(today["seconds"]) >= GAIN * _score(rows[0]["seconds"]):
        return rows[0]["config"]
    return literal(part.today)


def _print_part(part: Part, records: Records, tested: bool) -> None:
    today = records.get(part, part.today) or {}
    rows = ranked(part, records)
    fitting = sum(row["verdict"] is None for row in rows)
    print(f"\n== {part.name}: today {literal(part.today)}; {fitting} of {len(rows)} candidates fit")
    lines = [["", "row", *part.problems, "today / this", "regs", "spills, B", "KiB", "blocks", "verdict"]]
    for row in rows:
        facts, seconds, mark = (
            row.get("facts") or [],
            row.get("seconds", {}),
            "*" if row["config"] == literal(part.today) else "",
        )
        gain = f"{_score(today['seconds']) / _score(seconds):.3f}" if seconds and today.get("seconds") else ""
        times = [f"{seconds[name] * 1e6:.1f} us" if name in seconds else "" for name in part.problems]
        state = "measured" if seconds else "not measured" if tested else "to be measured"
        static = [""] * 4
        if facts:
            registers, spills, shared = (max(fact[key] for fact in facts) for key in ("registers", "spills", "shared"))
            static = [str(registers), str(spills), f"{shared / 1024:.0f}", str(min(fact["blocks"] for fact in facts))]
        lines.append([mark, row["config"], *times, gain, *static, row["verdict"] or state])
    told = [any(column[1:]) for column in zip(*lines)]  # of what is not measured there is no column
    print(aligned([[cell for cell, is_told in zip(line, told) if is_told] for line in lines]))


def proposal(op: str, arch: int, parts: list[Part], records: Records) -> list[str]:
    """The lines to check in."""
    chosen = {part.name: best(part, records) for part in parts}
    if op != "attention":
        return [f"{name}: {row}" for name, row in chosen.items() if row is not None]
    lines = [f"# kernels/attention/config.py, _TABLE[{arch}]"]
    for d in dict.fromkeys(name.rsplit(" ", 1)[1] for name in chosen):
        of = [chosen.get(f"{direction}, head_dim {d}") for direction in ("forward", "dq", "dkdv")]
        if all(of):
            lines.append(f"{d}: Rows({', '.join(map(str, of))}),")
        else:
            lines += [f"# {name}: {row}" for name, row in chosen.items() if row and name.endswith(f" {d}")]
    return lines


def _shape(text: str) -> Shape:
    found = re.fullmatch(r"(\d+)x(\d+)(c?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted is for example 8x2048 or, causal, 8x2048c")
    return int(found[1]), int(found[2]), bool(found[3])


def main(arguments: list[str] | None = None, timer: Callable[[list[Launch]], float] | None = None) -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m wikigpt.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[], help="what to time on: batch x length, c for causal; "
                        "for other ops rows x columns (default: a few of the benchmarks')")  # fmt: skip
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128], help="of attention (default: 64 128)")
    parser.add_argument("--only", default="", help="parts whose name matches this regular expression")
    parser.add_argument("--limit", type=int, help="at most so many candidates a part, those nearest to today's row")
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, help="of --dry-run (default: the GPU's, else 90)")
    parser.add_argument("--dry-run", action="store_true", help="compile and filter, measure nothing")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget-seconds", type=float, default=210, help="of which compiling gets at most 60%%")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--out", type=Path, help="file of results, one JSON object a line; what it has is not done again")
    given = parser.parse_args(arguments)
    interprets, has_gpu = triton.knobs.runtime.interpret, torch.cuda.is_available()
    if interprets and given.dry_run:
        parser.error("TRITON_INTERPRET is set, so kernels would be interpreted: unset it")
    if not (given.dry_run or interprets or has_gpu):
        parser.error("no GPU here: --dry-run does all but the measurement")
    if given.arch and not given.dry_run:
        parser.error("--arch is for --dry-run: what is measured is the GPU at hand")
    if given.dry_run and has_gpu and not given.arch:
        given.arch = [10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]]
    device = "cpu" if interprets or not has_gpu else "cuda"
    if given.dry_run:
        archs = given.arch or [90]
    else:
        archs = [0 if interprets else 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]]
        if archs[0] and archs[0] not in ARCHITECTURES:
            parser.error(f"sm_{archs[0]} is not known, known are {', '.join(map(str, ARCHITECTURES))}")
    for arch in archs:
        key = given.op, arch, tuple(given.shapes), tuple(given.head_dim)
        parts = [part for name, part in _parts(*key).items() if re.search(given.only, name)]
        if not parts:
            parser.error(f"--only: no part matches {given.only!r}, known are {'; '.join(_parts(*key))}")
        if given.limit:
            parts = [replace(part, candidates=part.candidates[: given.limit]) for part in parts]
        name = "interpreter" if arch == 0 else ("none" if given.dry_run else torch.cuda.get_device_name())
        records = Records(given.op, arch, name, given.out)
        print(
            f"{given.op} on sm_{arch} ({name}): {sum(len(p.candidates) for p in parts)} candidates, triton {triton.__version__}"
        )
        if arch:
            filtered(key, parts, records, given.jobs, begin + given.budget_seconds * (1 if given.dry_run else 0.6))
        else:
            for part in parts:
                for config in part.candidates:
                    if records.get(part, config) is None:
                        records.put(part, config, verdict=None, facts=[])
        print(f"filtered after {time.monotonic() - begin:.0f} s", flush=True)
        for i, part in enumerate(parts):
            if not given.dry_run:
                left = begin + given.budget_seconds - time.monotonic()
                share = time.monotonic() + max(left, 0) / (len(parts) - i)
                timed(part, records, device, timer or Timer(device), given.rounds, share)
            _print_part(part, records, not given.dry_run)
            sys.stdout.flush()
        if not given.dry_run:
            print("\nrows to check in (then: pytest tests/test_compile.py and roofline --update-snapshot)")
            print("\n".join(proposal(given.op, arch, parts, records)))
        print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
