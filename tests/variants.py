"""How many variants of each kernel sweeps of thousands of shapes would compile, beside those of tests/launch_cases.py, which
launch: `python -m tests.variants`, a process of its own, since tests tell Triton to interpret. Arguments are specialised as for
sm_90; nothing is compiled and nothing is launched."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

SWEEPS: dict[str, Callable[[], object]] = {}


def sweep(function: Callable[[], object]) -> Callable[[], object]:
    SWEEPS[function.__name__] = function
    return function


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Of no memory: what needed a value on the host would fail."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def norm(rows: int, n: int) -> None:
    from wikigpt.kernels.norm_triton import backward, forward

    x, w = meta(rows, n), meta(n)
    _, h, mean, rstd = forward(x, w, w, x, None, 1e-5, 0.0, False, False, True, True)
    backward(x, x, h, w, mean, rstd, None, 0.0, False, x.dtype, w.dtype, True, True)


@sweep
def norm_of_any_number_of_rows() -> None:
    for rows in [*range(1, 301), 512, 4099, 8192, 100_000]:
        norm(rows, 768)


@sweep
def norm_of_wide_rows() -> None:
    for rows in range(1, 301):
        norm(rows, 65536)


@sweep
def activation_of_any_width() -> None:
    from wikigpt.kernels.activation_triton import backward, forward

    for features in range(8, 20_000, 8):
        gate, up = meta(3, features), meta(3, features)
        options = (gate, up, None, None, None, "silu", False, 0.0)
        backward(forward(*options), False, False, *options)


def rotary(batch: int, length: int, heads: int) -> None:
    from wikigpt.kernels.rotary_triton import turned

    q, k = (meta(batch, length, n, 128).transpose(1, 2) for n in (heads, -(-heads // 4)))
    cos, positions = meta(300, 64, dtype=torch.float32), meta(batch, length, dtype=torch.int64)
    turned(q, k, cos, cos, positions, False, False)


@sweep
def rotary_of_any_length_batch_and_number_of_heads() -> None:
    for length in range(2, 301):
        rotary(1 + length % 5, length, 1 + length % 33)


@sweep
def rotary_of_one_position_of_any_batch() -> None:
    for batch in range(1, 301):
        rotary(batch, 1, 1 + batch % 33)


def linear_cross_entropy(tokens: int, filtering: bool) -> None:
    from wikigpt.kernels import cross_entropy_triton, linear_cross_entropy_triton

    vocabulary, d = 33278, 512
    options = cross_entropy_triton.options(-100, 0.1, 0.0, 0.0, meta(vocabulary, dtype=torch.float32))
    problem = meta(tokens, d), meta(vocabulary, d), None, meta(tokens, dtype=torch.int64), options
    rows, logits = linear_cross_entropy_triton.losses(*problem, tokens < 1000, True)
    linear_cross_entropy_triton.gradients(rows.loss, rows.lse, logits, *problem, (True, True, False), filtering)


@sweep
def linear_cross_entropy_of_any_number_of_tokens() -> None:
    for tokens in [*range(1, 301), 512, 1000, 2048, 4099, 8192]:
        linear_cross_entropy(tokens, False)


@sweep
def linear_cross_entropy_that_filters_any_number_of_tokens() -> None:
    for tokens in [*range(1, 301), 512, 1000, 2048, 4099, 8192]:
        linear_cross_entropy(tokens, True)


def counted() -> dict[str, dict[str, int]]:
    """The variants of each kernel (file.function) in every sweep, counted in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.variants"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main() -> None:
    from triton.runtime.jit import JITFunction
    from wikigpt.kernels import compile_report

    class Nothing:
        """What stands for a compiled kernel."""

    variants: collections.Counter[str] = collections.Counter()

    def note(self: Any, key: Any, signature: Any, device: int, *_: Any) -> Nothing:
        variants[f"{self.fn.__module__.split('.')[-1]}.{self.fn.__name__}"] += 1
        self.device_caches[device][0][key] = Nothing()
        return self.device_caches[device][0][key]

    found, JITFunction._do_compile = {}, note
    for number, (name, function) in enumerate(SWEEPS.items()):
        variants.clear()
        with compile_report.compile_only(90) as _:
            # Kernels are kept for each device: another one for each sweep, which then finds none.
            compile_report.driver.active.get_current_device = lambda number=number: number
            function()
        found[name] = dict(variants)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
