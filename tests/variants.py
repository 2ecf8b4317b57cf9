"""How many variants of each kernel a sweep of shapes would compile: `python -m tests.variants`, a process of its own, since
tests tell Triton to interpret. Arguments are specialised as for sm_90; nothing is compiled and nothing is launched."""

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


def norm(rows: int, n: int, weight: torch.dtype, p: float = 0.0, wide: int = 0) -> None:
    from wikigpt.kernels.norm_triton import backward, forward

    x, w = meta(rows, n + wide)[:, :n], meta(n, dtype=weight)
    seed = meta(2, dtype=torch.int64) if p else None
    _, h, mean, rstd = forward(x, w, w, x, seed, 1e-5, p, False, False, True, True)
    backward(x, x, h, w, mean, rstd, seed, p, False, x.dtype, weight, True, True)


@sweep
def norm_of_any_number_of_rows() -> None:
    for rows in range(1, 301):
        norm(rows, 768, torch.bfloat16)
    for rows in (512, 4099, 8192, 100_000):
        norm(rows, 768, torch.bfloat16)


@sweep
def norm_with_weights_in_float32() -> None:
    for rows in range(1, 301):
        norm(rows, 768, torch.float32)


@sweep
def norm_of_wide_rows() -> None:
    for rows in range(1, 301):
        norm(rows, 65536, torch.bfloat16)


@sweep
def norm_of_parts_of_rows_with_dropout() -> None:
    for rows in range(1, 301):
        norm(rows, 768, torch.bfloat16, p=0.5 if rows % 2 else 0.1, wide=16 * (rows % 5 + 1))


def activation(rows: int, features: int, form: str, p: float = 0.0) -> None:
    from wikigpt.kernels.activation_triton import backward, forward

    gate = meta(rows, features * (2 if form == "packed" else 1))
    up = meta(rows, features) if form == "gated" else None
    bias = meta(features) if form == "bias" else None
    seed = meta(2, dtype=torch.int64) if p else None
    options = (gate, up, bias, None, seed, "gelu", form == "packed", p)
    backward(forward(*options), bias is not None, False, *options)


@sweep
def activation_of_any_number_of_rows_with_a_bias() -> None:
    for rows in range(1, 301):
        activation(rows, 3072, "bias")


@sweep
def activation_of_any_number_of_rows_and_chance_of_dropout() -> None:
    for rows in range(1, 301):
        activation(rows, 3072, "gated", p=rows / 400)


@sweep
def activation_of_any_number_of_packed_rows() -> None:
    for rows in range(1, 301):
        activation(rows, 1536, "packed")


@sweep
def activation_of_any_width() -> None:
    for features in range(8, 20_000, 8):
        activation(3, features, "gated")


def rotary(batch: int, length: int, heads: int, positions: bool = False) -> None:
    from wikigpt.kernels.rotary_triton import turned

    q, k = (meta(batch, length, n, 128).transpose(1, 2) for n in (heads, -(-heads // 4)))
    cos = meta(max(length, 40), 64, dtype=torch.float32)
    cos = cos if positions else cos[:length]
    turned(q, k, cos, cos, meta(batch, length, dtype=torch.int64) if positions else None, False, False)


@sweep
def rotary_of_any_length() -> None:
    for length in range(2, 301):
        rotary(1 + length % 5, length, 1 + length % 33)


@sweep
def rotary_of_one_position_of_any_batch() -> None:
    for batch in range(1, 301):
        rotary(batch, 1, 1 + batch % 33, positions=True)


@sweep
def cross_entropy_of_any_number_of_rows() -> None:
    from wikigpt.kernels import cross_entropy_triton as kernels

    for rows in range(1, 301):
        z, target, weight = meta(rows, 33278), meta(rows, dtype=torch.int64), meta(33278, dtype=torch.float32)
        options = kernels.options(rows - 150, 0.1, 0.0, 1e-4, weight)
        per_row = kernels.Rows.empty(target, True, 1)
        kernels.forward(z, target, per_row, 0, 33278, options)
        row_grad = per_row.loss if rows % 2 else per_row.loss[:1].expand(rows)
        kernels.gradient(z, z, target, per_row.lse, row_grad, 0, 33278, options)


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
