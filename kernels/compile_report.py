"""What the compiler makes of every Triton kernel on every architecture, without a GPU.

    python -m wikigpt.kernels.compile_report [op ...] [--arch 80 90] [--markdown | --json]

prints registers, spills, shared memory, occupancy, matrix instructions, load and store width and barriers. `compile_only` puts
a driver without a device in Triton's place and turns each launch into a compilation, so an op enters `OPS` with nothing but
calls of its own launch code on representative inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .roofline import aligned, markdown

KiB = 1024


@dataclass(frozen=True)
class Limits:
    """Of one architecture: CUDA C++ programming guide, "Technical specifications per compute capability"."""

    shared_block: int
    shared_multiprocessor: int
    warps: int
    blocks: int
    family: str
    registers: int = 65536
    tensor_memory: int = 512


ARCHITECTURES = {
    80: Limits(163 * KiB, 164 * KiB, 64, 32, "mma"),
    86: Limits(99 * KiB, 100 * KiB, 48, 16, "mma"),
    89: Limits(99 * KiB, 100 * KiB, 48, 24, "mma"),
    90: Limits(227 * KiB, 228 * KiB, 64, 32, "wgmma"),
    100: Limits(227 * KiB, 228 * KiB, 64, 32, "tcgen05"),
    120: Limits(99 * KiB, 100 * KiB, 48, 24, "mma"),
}


class _NoDevice:
    """What Triton asks of a driver to compile for sm_<arch>."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a kernel keeps its compiled forms per device, and with them the target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[Any]]:
    """Inside the block kernels are compiled for sm_<arch> and not launched; the list collects what was compiled, in order.

    Raises RuntimeError where Triton interprets kernels: what was imported under TRITON_INTERPRET cannot be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    compiled: list[Any] = []
    run, active = JITFunction.run, driver._active

    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    driver.set_active(_NoDevice(arch))
    JITFunction.run = compile_kernel
    try:
        yield compiled
    finally:
        JITFunction.run, driver._active = run, active


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. shared and spills in bytes, spills per thread; occupancy in blocks and in parts of all warps."""

    op: str
    case: str
    name: str
    arch: int
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    blocks: int
    occupancy: float
    instruction: str
    instructions: int
    load: str
    store: str
    barriers: int
    blocking: str


def measure(op: str, case: str, arch: int, kernel: Any) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    meta, ptx, limits = kernel.metadata, kernel.asm["ptx"], ARCHITECTURES[arch]
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        limits.blocks,
        limits.warps // meta.num_warps,
        limits.registers // (per_warp * meta.num_warps),
        limits.shared_multiprocessor // (meta.shared + KiB),  # the system keeps 1 KiB of each block
        limits.tensor_memory // max(getattr(meta, "tmem_size", 0) or 0, 1),
    )
    patterns = {"tcgen05": r"tcgen05\.mma\.", "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync"}
    counts = {family: len(re.findall(pattern, ptx)) for family, pattern in patterns.items()}
    family = next((family for family, count in counts.items() if count), "fma")
    return Kernel(
        op, case, meta.name, arch, meta.num_warps, meta.num_stages, registers, stack, meta.shared, blocks,
        blocks * meta.num_warps / limits.warps, family, counts.get(family, 0), _load(ptx), _store(ptx),
        len(re.findall(r"\b(?:bar|barrier(?:\.cta)?)\.sync", ptx)), _blocking(kernel),
    )  # fmt: skip


def _blocking(kernel: Any) -> str:
    """The kernel's block sizes, "128x64"."""
    constants = {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    sizes = [constants.get(name) for name in ("BLOCK_M", "BLOCK_N")]
    return "x".join(str(size) for size in sizes if size is not None)


def _load(ptx: str) -> str:
    """The widest load from global memory."""
    if "cp.async.bulk.tensor" in ptx:
        return "TMA"
    asynchronous = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)[,;]", ptx)]
    if asynchronous:
        return f"async {max(asynchronous)} B"
    return _widest(ptx, "ld")


def _store(ptx: str) -> str:
    """The widest store to global memory."""
    return "TMA" if re.search(r"cp\.async\.bulk\.tensor\.\w+\.global\.shared", ptx) else _widest(ptx, "st")


def _widest(ptx: str, access: str) -> str:
    direct = re.findall(rf"\b{access}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return f"{max((int(n or 1) * int(bits) // 8 for n, bits in direct), default=0)} B"


# --- what is compiled -----------------------------------------------------------------------------------------------

Cases = dict[str, Callable[[], object]]


# head_dim of q, k and of v, by the name of their case; 576/512 as in multi-head latent attention.
_HEAD_DIMS = {"64": (64, 64), "128": (128, 128), "256": (256, 256), "576/512": (576, 512)}


def _attention_case(
    dtype: torch.dtype, dims: tuple[int, int], causal: bool, heads: int = 8, **options: Any
) -> Callable[[], object]:
    def launch() -> None:
        from .attention.backward import backward
        from .attention.forward import forward
        from .attention.reference import Inputs

        packed = "cu_seqlens_q" in options
        shape = (4096,) if packed else (2, 2048)
        q, k, v = (_meta(*shape, n, width, dtype=dtype) for n, width in ((heads, dims[0]), (2, dims[0]), (2, dims[1])))
        given = {name: value(dtype) if callable(value) else value for name, value in options.items()}
        x = Inputs(q, k, v, softmax_scale=0.125, window_right=0 if causal else -1, **given)
        out, lse = forward(x)
        backward(x, out, lse, out, None, x.bias is not None)

    return launch


def _attention() -> Cases:
    """Every row of the table of block sizes."""
    return {
        f"{str(dtype)[6:]} {name} {'causal' if causal else 'full'}": _attention_case(dtype, dims, causal)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for name, dims in _HEAD_DIMS.items()
        for causal in (True, False)
    }


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _attention_features() -> Cases:
    """Everything besides causal that a kernel can be asked for."""
    lengths = _meta(3, dtype=torch.int32)
    features: dict[str, dict[str, Any]] = {
        "packed": {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "max_seqlen_q": 2048, "max_seqlen_k": 2048},
        "used": {"seqused_k": lengths},
        "dropout": {"dropout_p": 0.1, "seed": _meta(2, dtype=torch.int64)},
        "bias": {"bias": lambda dtype: _meta(2, 8, 2048, 2048, dtype=dtype)},
        "mask": {"mask": _meta(2, 1, 2048, 2048, dtype=torch.bool)},
        "softcap": {"softcap": 30.0},
        "alibi": {"alibi_slopes": _meta(8)},
        "window": {"window_left": 256},
        "sink": {"s_aux": _meta(8)},
    }
    names = ("dropout", "bias", "mask", "softcap", "alibi", "window", "sink", "used")
    features["everything"] = {option: value for name in names for option, value in features[name].items()}
    return {
        f"{str(dtype)[6:]} {width} {name}": _attention_case(dtype, dims, True, **options)
        for name, options in features.items()
        for dtype in (torch.bfloat16, torch.float32)
        for width, dims in _HEAD_DIMS.items()
    }


def _decode_case(dtype: torch.dtype, dims: tuple[int, int], paged: bool) -> Callable[[], object]:
    def launch() -> None:
        from .attention.decode import forward
        from .attention.kvcache import CacheInputs

        q = _meta(4, 1, 8, dims[0], dtype=dtype)
        k, v = (_meta(4, 1, 2, width, dtype=dtype) for width in dims)
        k_cache, v_cache = (_meta(*((64, 256) if paged else (4, 4096)), 2, width, dtype=dtype) for width in dims)
        lengths, table = _meta(4, dtype=torch.int32), _meta(4, 16, dtype=torch.int32) if paged else None
        angles = _meta(4096, dims[0] // 2, dtype=dtype)
        forward(
            CacheInputs(
                q, k_cache, v_cache, k, v, angles, angles, lengths, None, None, table, None, None, seqlen=None,
                softmax_scale=0.125, window_left=-1, window_right=0, softcap=0.0, rotary_interleaved=False, num_splits=8,
            )
        )  # fmt: skip

    return launch


def _attention_decode() -> Cases:
    """One new token for each sequence of a cache: append, attend in splits, combine."""
    return {
        f"{str(dtype)[6:]} {name} {'paged' if paged else 'dense'}": _decode_case(dtype, dims, paged)
        for dtype in (torch.bfloat16, torch.float32)
        for name, dims in _HEAD_DIMS.items()
        for paged in (False, True)
    }


def _activation_case(dtype: torch.dtype, activation: str, features: int, form: str, rows: int = 8192) -> Callable[[], object]:
    def launch() -> None:
        from .activation_triton import backward, forward

        packed, everything = form in ("packed", "everything"), form == "everything"
        gate = _meta(rows, features * (2 if packed else 1), dtype=dtype)
        up = _meta(rows, features, dtype=dtype) if form == "gated" else None
        bias = _meta(features, dtype=dtype) if form in ("bias", "everything") else None
        seed, dropout_p = (_meta(2, dtype=torch.int64), 0.1) if everything else (None, 0.0)
        up_bias = bias if everything else None
        options = (gate, up, bias, up_bias, seed, activation, packed, dropout_p)
        backward(forward(*options), bias is not None, up_bias is not None, *options)

    return launch


def _activation() -> Cases:
    """11,008 columns: a wide tile; 64: one over many rows; one row of 8: every number that Triton takes for a constant is 1."""
    one_row = {
        f"float32 gelu one row {form}": _activation_case(torch.float32, "gelu", 8, form, rows=1)
        for form in ("bias", "gated", "packed", "everything")
    }
    return one_row | {
        f"{str(dtype)[6:]} {activation} {features} {form}": _activation_case(dtype, activation, features, form)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for activation in ("gelu", "gelu_tanh", "silu")
        for features in (11008, 64)
        for form in ("bias", "gated", "packed", "everything")
    }


def _rotary_case(
    dtype: torch.dtype, shape: tuple[int, int], interleaved: bool, positions: bool, batch: int = 4, length: int = 2048
) -> Callable[[], object]:
    def launch() -> None:
        from .rotary_triton import turned

        head_dim, rotary_dim = shape
        q = _meta(batch, length, 32, head_dim, dtype=dtype).transpose(1, 2)
        k = _meta(batch, length, 2 * batch, head_dim, dtype=dtype).transpose(1, 2)
        angles = _meta(length, rotary_dim // 2)
        turned(q, k, angles, angles, _meta(batch, length, dtype=torch.int64) if positions else None, interleaved, False)

    return launch


def _rotary() -> Cases:
    """(head_dim, rotary dimensions) as in Llama, Phi, GPT-NeoX (20B) and GPT-J, and one new token; the backward is the same
    kernel."""
    token = {
        f"float32 token {'pairs' if interleaved else 'halves'}": _rotary_case(
            torch.float32, (8, 8), interleaved, True, batch=1, length=1
        )
        for interleaved in (False, True)
    }
    return token | {
        f"{str(dtype)[6:]} {shape[0]}/{shape[1]} {'pairs' if interleaved else 'halves'}{' positions' if positions else ''}": (
            _rotary_case(dtype, shape, interleaved, positions)
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for shape in ((64, 64), (128, 128), (80, 32), (96, 24), (256, 64))
        for interleaved in (False, True)
        for positions in (False, True)
    }


def _norm_case(
    op: str, dtype: torch.dtype, weight_dtype: torch.dtype, n: int, everything: bool, rows: int = 8192
) -> Callable[[], object]:
    def launch() -> None:
        from .norm_triton import backward, forward

        rms = op == "rms_norm"
        x, weight, rstd = _meta(rows, n, dtype=dtype), _meta(n, dtype=weight_dtype), _meta(rows)
        bias = None if rms else weight
        residual = x if everything else None
        seed, dropout_p = (_meta(2, dtype=torch.int64), 0.1) if everything else (None, 0.0)
        forward(x, weight, bias, residual, seed, 1e-5, dropout_p, rms, rms, everything, True)
        backward(
            x, residual, x, weight, None if rms else rstd, rstd, seed, dropout_p, rms, dtype, None if rms else weight_dtype,
            everything, True,
        )  # fmt: skip

    return launch


def _norm() -> Cases:
    """One row of 8: every number that Triton takes for a constant is 1; 64: many rows a program; 768 and 5,120: padded; up to
    16,384 or 32,768 a row in registers; 65,536: in parts. Everything: residual, dropout, a gradient through their sum."""
    one_row = {
        f"{op} float32 one row {'everything' if everything else 'plain'}": _norm_case(
            op, torch.float32, torch.float32, 8, everything, rows=1
        )
        for op in ("layer_norm", "rms_norm")
        for everything in (False, True)
    }
    return one_row | {
        f"{op} {str(dtype)[6:]} {n} {'everything' if everything else 'plain'}": _norm_case(
            op, dtype, torch.float32 if everything else dtype, n, everything
        )
        for op in ("layer_norm", "rms_norm")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for n in (64, 768, 2048, 4096, 5120, 8192, 16384, 32768, 65536)
        for everything in (False, True)
    }


def _linear_cross_entropy_case(
    dtype: torch.dtype, tokens: int, d: int, vocabulary: int, everything: bool
) -> Callable[[], object]:
    def launch() -> None:
        from . import cross_entropy_triton, linear_cross_entropy_triton

        vector = _meta(vocabulary) if everything else None
        options = cross_entropy_triton.options(-100, 0.1 * everything, 30.0 * everything, 1e-4 * everything, vector)
        target = _meta(tokens, dtype=torch.int64)
        problem = _meta(tokens, d, dtype=dtype), _meta(vocabulary, d, dtype=dtype), vector, target, options
        rows, logits = linear_cross_entropy_triton.losses(*problem, False, everything)
        needs = True, True, everything
        linear_cross_entropy_triton.gradients(rows.loss, rows.lse, logits, *problem, needs, everything)

    return launch


def _linear_cross_entropy() -> Cases:
    """Heads of Llama 3, of GPT-2 (whose last chunk has an odd number of columns) and of a word-level model, with and without
    everything that can be asked for: bias, class weights, smoothing, softcap, z-loss, aux, filtering."""
    heads = {"128256": (8192, 4096, 128256), "50257": (8192, 768, 50257), "33278": (2048, 512, 33278)}
    return {
        f"{str(dtype)[6:]} {name} {'everything' if everything else 'plain'}": _linear_cross_entropy_case(
            dtype, *sizes, everything
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for name, sizes in heads.items()
        for everything in (False, True)
    }


def _cross_entropy_case(dtype: torch.dtype, vocabulary: int) -> Callable[[], object]:
    def launch() -> None:
        from . import cross_entropy_triton as kernels

        z, target = _meta(4096, vocabulary, dtype=dtype), _meta(4096, dtype=torch.int64)
        options, rows = kernels.options(-100, 0.0, 0.0, 0.0, None), kernels.Rows.empty(target, False, 1)
        kernels.forward(z, target, rows, 0, vocabulary, options)
        kernels.gradient(z, z, target, rows.lse, rows.loss, 0, vocabulary, options)

    return launch


def _cross_entropy() -> Cases:
    """Logits given: rows that begin at multiples of 16 bytes, rows that do not, and short ones."""
    return {
        f"{str(dtype)[6:]} {vocabulary}": _cross_entropy_case(dtype, vocabulary)
        for dtype in (torch.bfloat16, torch.float32)
        for vocabulary in (128256, 50257, 256)
    }


def _optimizer_case(dtype: torch.dtype, numel: int, everything: bool = False, **given: Any) -> Callable[[], object]:
    def launch() -> None:
        from . import optimizer_triton as kernels

        def lists(present: bool, dtype: torch.dtype) -> list[torch.Tensor]:
            return [_meta(numel, dtype=dtype)] if present else []

        master = given.get("master", False)
        state = torch.float32 if master else dtype
        numbers = (0, *[0.5] * 8, False, everything, given.get("stochastic", False))
        kernels.update(
            lists(True, dtype), lists(True, dtype), lists(True, state), lists(True, state), lists(everything, state),
            lists(master, state), lists(everything, torch.float32), [0], _meta(len(kernels.TABLE), 1), numbers,
        )  # fmt: skip

    return launch


def _optimizer() -> Cases:
    """A parameter of a GPT, and one of no multiple of 16 bytes."""
    size = 768 * 3072
    return {
        "float32": _optimizer_case(torch.float32, size),
        "float32 everything": _optimizer_case(torch.float32, size, True),
        "bfloat16": _optimizer_case(torch.bfloat16, size),
        "float16 everything": _optimizer_case(torch.float16, size, True),
        "bfloat16 master, everything": _optimizer_case(torch.bfloat16, size, True, master=True),
        "bfloat16 stochastic, everything": _optimizer_case(torch.bfloat16, size, True, stochastic=True),
        "float32 one row": _optimizer_case(torch.float32, 33_278),
    }


OPS: dict[str, Callable[[], Cases]] = {
    "optimizer": _optimizer,
    "rotary": _rotary,
    "activation": _activation,
    "attention": _attention,
    "attention_features": _attention_features,
    "attention_decode": _attention_decode,
    "norm": _norm,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}

# What CI compiles (tests/test_compile.py) and the snapshot holds: op -> architecture -> cases (a regular expression).
CHECKED: dict[str, dict[int, str]] = {
    # sm_89 has the rows and the PTX of sm_86: one takes bfloat16, the other float16. float32 takes one table for all.
    # Without causal a kernel is a causal one less its comparisons.
    "attention": {
        80: "(bfloat16|float32) .* causal",
        86: "bfloat16 .* causal",
        89: "^float16 \\d+ causal",
        90: "bfloat16 (.* causal|128 full)",
        100: "bfloat16 .* causal",
        120: "bfloat16 .* causal",
    },
    # sm_80 has the rows of sm_86 for this head_dim and more shared memory.
    "attention_features": {
        86: "bfloat16 128 everything",
        90: "bfloat16 128 (everything|packed)",
        100: "bfloat16 128 (everything|packed)",
    },
    "attention_decode": dict.fromkeys((80, 90, 100), "bfloat16 (128|576/512 paged)|float32 64 dense"),
    # Rows in parts, one row a program with and without padding; on two architectures also many rows a program and the rest.
    "norm": dict.fromkeys((80, 86, 120), "layer_norm bfloat16 (5120|65536) everything|rms_norm bfloat16 16384 plain")
    | dict.fromkeys(
        (90, 100),
        "layer_norm bfloat16 (64|5120|65536) everything|rms_norm (bfloat16 (2048|16384)|float32 8192) plain"
        "|float32 one row everything",
    ),
    # The last chunk of 50,257 has an odd width. Rows that are given, not made, differ in nothing that depends on the
    # architecture.
    "linear_cross_entropy": dict.fromkeys((80, 86, 100, 120), "bfloat16 128256 everything")
    | {90: "bfloat16 50257 (plain|everything)"},
    # The cases with the most registers, and one in which all numbers that Triton takes for constants are.
    "activation": dict.fromkeys((80, 86, 90, 100, 120), "bfloat16 gelu 11008 (packed|everything)|one row everything"),
    "optimizer": dict.fromkeys((80, 86, 90, 100, 120), "float32$|float32 one row|bfloat16 (master|stochastic)"),
    "rotary": dict.fromkeys(
        (80, 86, 90, 100, 120), "bfloat16 (128/128|80/32) (halves|pairs)$|float32 80/32 pairs positions|token pairs"
    ),
}


class Spill(NamedTuple):
    """A kernel that may spill: in cases whose name has `case` in it, by versions of Triton that begin with `triton`."""

    kernel: str
    arch: int
    case: str
    triton: str = ""


# -> why this row of a table spills.
EXCEPTIONS = {
    Spill("_dkdv", 90, "float16 128 full"): "a few loop-invariant addresses; the next smaller tile, 16 rows, starves wgmma",
    Spill("_dkdv", 90, "float16 256"): "the sums of dK and dV alone are 128 registers a thread; without wgmma it would fit",
    Spill("_dkdv", 100, "float16 256"): "the sums of dK and dV pass through 128 registers each; without tcgen05 it would fit",
}
_ADDRESSES = "some of the addresses of two products in parts, whatever the tile"
EXCEPTIONS |= {Spill(kernel, 120, "bfloat16 576/512"): _ADDRESSES for kernel in ("_dq", "_dkdv")}
_WORDS = "dropout's words beside a row, its sums and its gradient: a few values for each row, which L1 holds"
EXCEPTIONS |= {
    **{Spill("_backward", arch, "norm bfloat16 5120 everything"): _WORDS for arch in (80, 90, 100, 120)},
    **{Spill("_backward", arch, "rms_norm bfloat16 16384 everything"): _WORDS for arch in ARCHITECTURES},
    Spill("_backward", 100, "layer_norm bfloat16 8192 everything"): _WORDS,
    Spill("_backward", 120, "layer_norm float32 5120 everything"): _WORDS,
}


EXCEPTIONS[Spill("_adamw", 120, "bfloat16 master, everything")] = "ptxas keeps 6 blocks a multiprocessor: 8 bytes, once"


def excuse(kernel: Kernel) -> Spill | None:
    """The entry of EXCEPTIONS that covers the kernel."""
    of = (key for key in EXCEPTIONS if (key.kernel, key.arch) == (kernel.name, kernel.arch) and key.case in kernel.case)
    return next((key for key in of if triton.__version__.startswith(key.triton)), None)


def cases(op: str, only: str) -> list[str]:
    """The names of an op's cases that a regular expression finds."""
    return [case for case in OPS[op]() if re.search(only, case)]


def report(op: str, arch: int, case: str) -> list[Kernel]:
    """The kernels that one case launches, each once."""
    with compile_only(arch) as compiled:
        OPS[op]()[case]()
    return [measure(op, case, arch, kernel) for kernel in {kernel.hash: kernel for kernel in compiled}.values()]


# --- command line ---------------------------------------------------------------------------------------------------
_TITLES = {
    "op": "op", "arch": "sm", "case": "inputs", "name": "kernel", "blocking": "block", "warps": "warps", "stages": "stages",
    "registers": "registers", "spills": "spills, B", "shared": "shared, KiB", "occupancy": "warps resident",
    "instruction": "matrix instruction", "load": "load", "store": "store", "barriers": "barriers",
}  # fmt: skip


def _cells(kernel: Kernel) -> list[str]:
    shown = {
        "shared": f"{kernel.shared / KiB:.0f}",
        "occupancy": f"{kernel.occupancy:.0%} ({kernel.blocks} {'block' if kernel.blocks == 1 else 'blocks'})",
        "instruction": f"{kernel.instructions} {kernel.instruction}" if kernel.instructions else kernel.instruction,
    }
    return [shown.get(field, str(getattr(kernel, field))) for field in _TITLES]


def lines(kernels: list[Kernel]) -> list[list[str]]:
    """A table's cells, the titles first."""
    return [list(_TITLES.values()), *map(_cells, kernels)]


def tables(kernels: list[Kernel]) -> str:
    """For a terminal: a table for each op and architecture, in it the inputs and under them their kernels."""
    groups: dict[tuple[str, int], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.op, kernel.arch), []).append(kernel)
    head = ["", "block", "warps", "stages", "regs", "spills, B", "KiB", "resident", "matrix", "load, store"]
    found = []
    for (op, arch), members in groups.items():
        lines, cases = [head], []
        for k in members:
            matrix = f"{k.instructions} {k.instruction}" if k.instructions else k.instruction
            numbers = [k.blocking, k.warps, k.stages, k.registers, k.spills, f"{k.shared / KiB:.0f}"]
            access = [f"{k.blocks}, {k.occupancy:.0%}", matrix, f"{k.load}, {k.store}"]
            lines.append([f"  {k.name}", *map(str, numbers), *access])
            cases.append(k.case)
        titles, *rows = aligned(lines).splitlines()
        shown = [f"{op} on sm_{arch}", titles]
        for before, case, row in zip([None, *cases], cases, rows):
            shown += [row] if case == before else [case, row]
        found.append("\n".join(shown))
    return "\n\n".join([LEGEND, *found])


LEGEND = """regs: registers of a thread. KiB: shared memory. resident: blocks on a multiprocessor, and warps in
parts of all it can have. matrix: matrix instructions. load, store: the widest. Barriers: --json."""


def _print_markdown(kernels: list[Kernel]) -> None:
    print(markdown(lines(kernels)))


def _print_table(kernels: list[Kernel]) -> None:
    print(tables(kernels))


def _print_json(kernels: list[Kernel]) -> None:
    json.dump([asdict(kernel) for kernel in kernels], sys.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wikigpt.kernels.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", default=["attention"], metavar="op", help=f"of {', '.join(OPS)} (default: attention)")
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="cases whose name matches this regular expression")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_const", dest="show", const=_print_markdown, default=_print_table)
    form.add_argument("--json", action="store_const", dest="show", const=_print_json)
    given = parser.parse_args()
    if unknown := [op for op in given.ops if op not in OPS]:
        parser.error(f"unknown op {unknown[0]!r}, known are {', '.join(OPS)}")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so kernels would be interpreted: unset it")
    work = [(op, arch, case) for op in given.ops for arch in given.arch for case in cases(op, given.only)]
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        given.show([kernel for kernels in pool.map(report, *zip(*work)) for kernel in kernels])


if __name__ == "__main__":
    main()
