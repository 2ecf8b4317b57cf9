"""Counts the kernels that Triton would compile for the calls of attention named on the command line, without compiling any.

It runs in a process of its own, because tests run where Triton interprets: `python -m tests.counted_compiles`, prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from bench import fake_gpu

recorder = fake_gpu.install(90, "none")  # before what it fakes is imported

import torch  # noqa: E402
from wikigpt.kernels.attention import decode  # noqa: E402
from wikigpt.kernels.attention.backward import backward  # noqa: E402
from wikigpt.kernels.attention.forward import forward  # noqa: E402
from wikigpt.kernels.attention.kvcache import CacheInputs  # noqa: E402
from wikigpt.kernels.attention.reference import Inputs  # noqa: E402

from tests.attention_cases import build  # noqa: E402


def attend(x: Inputs) -> None:
    out, lse = forward(x)
    backward(x, out, lse, torch.empty_like(out), torch.empty_like(lse), x.bias is not None)


def dense(b: int, s: int, t: int, heads: int, groups: int, d: int, layout: str = "bshd", **options: Any) -> None:
    def empty(length: int, n: int) -> torch.Tensor:
        if layout == "bhsd":
            return torch.empty(b, n, length, d, dtype=torch.bfloat16).transpose(1, 2)
        return torch.empty(b, length, n, d, dtype=torch.bfloat16)

    q, k = empty(s, heads), empty(t, groups)
    attend(Inputs(q, k, k, softmax_scale=0.1, **{"window_right": 0, **options}))


def packed(b: int, tokens: int, longest: int) -> None:
    q, ends = torch.empty(tokens, 8, 64, dtype=torch.bfloat16), torch.zeros(b + 1, dtype=torch.int32)
    attend(Inputs(q, q, q, softmax_scale=0.1, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest))


def cached(b: int, capacity: int, n: int, heads: int = 8, new: int = 1, tensor: bool = True, left: int = -1) -> None:
    q, cache = torch.empty(b, new, heads, 128, dtype=torch.bfloat16), torch.empty(b, capacity, 2, 128, dtype=torch.bfloat16)
    k = torch.empty(b, new, 2, 128, dtype=torch.bfloat16)
    used = torch.full((b,), n, dtype=torch.int32) if tensor else None
    decode.forward(
        CacheInputs(
            q, cache, cache, k, k, None, None, used, None, None, None, None, None, seqlen=None if tensor else n,
            softmax_scale=0.1, window_left=left, window_right=0, softcap=0.0, rotary_interleaved=False, num_splits=0,
        )
    )  # fmt: skip


def masked(t: int, name: str, dtype: torch.dtype) -> None:
    dense(2, 64, t, 8, 8, 64, **{name: torch.empty(2, 1, 64, t, dtype=dtype)})


def _sweep() -> None:
    """What changes from call to call in training and serving: lengths, batch, number of heads, layout, window."""
    for s in range(1, 301):
        dense(1, s, s, 8, 8, 64)
    for n in range(1, 33):
        dense(n, 128, 100 + n, 8, 8, 64)
        dense(2, 128, 128, n, n, 64)
        dense(2, n, 16 * n, 16, 16, 64, "bhsd")
    for groups in (1, 2, 4, 8, 16):
        dense(2, 256, 256, 16, groups, 64)


def _windows() -> None:
    for left in (*range(64), 127, 128, 4095, 4096, 2**31 - 1, 2**40):
        dense(2, 256, 256, 8, 8, 64, window_left=left)


def _packed() -> None:
    for n in range(1, 33):
        packed(n, 64 * n + 1, 3 * n)


def _decoding() -> None:
    for n in range(1, 400):
        cached(4, 4096, n, tensor=False)
    for n in range(1, 34):
        cached(n, 4096, 5)
        cached(2, 100 + n, 5)
        cached(2, 4096, 5, heads=2 * min(n, 8))


def _masks() -> None:
    for t in range(33, 97):
        masked(t, "bias", torch.bfloat16)
        masked(t, "mask", torch.bool)


def _gpu() -> None:
    """The cases of tests/test_attention_gpu.py."""
    from dataclasses import replace

    from wikigpt.kernels.attention import config

    from tests import test_attention_gpu as gpu

    for case in (*gpu.SMALL, *gpu.REAL, *gpu.SANITIZED):
        attend(build(replace(case, device="cpu")))
    for kind in gpu.KINDS.values():
        with config.force(kind):
            attend(build(replace(gpu.tiled(("causal",)), device="cpu")))


SWEEPS: dict[str, Callable[[], None]] = {
    "training": _sweep, "windows": _windows, "packed": _packed, "decoding": _decoding, "masks": _masks, "gpu": _gpu
}  # fmt: skip


def main() -> None:
    result = {}
    for name in sys.argv[1:]:
        recorder.compiled.clear()
        SWEEPS[name]()
        result[name] = {kernel.rpartition(".")[2]: count for kernel, count in recorder.compiled.items()}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
