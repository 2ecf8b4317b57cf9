"""What the tests of layer_norm and rms_norm share: a problem, its outputs and gradients, the numeric rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from wikigpt.kernels import layer_norm, rms_norm

from tests.conftest import assert_as_accurate_as

FUNCTIONS = {"layer_norm": layer_norm, "rms_norm": rms_norm}


@dataclass(frozen=True)
class Case:
    """dtypes of None: no such input."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    weight: torch.dtype | None = torch.float32
    bias: torch.dtype | None = torch.float32
    residual: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    seed: int = 0

    def __str__(self) -> str:
        dtypes = ("dtype", "weight", "bias", "residual")
        names = [f"{name}={str(getattr(self, name))[6:]}" for name in dtypes if getattr(self, name) is not None]
        return "-".join([self.op, "x".join(map(str, self.shape)), *names, *(f"{k}={v}" for k, v in self.options.items())])

    def inputs(self) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(self.seed + sum(self.shape))

        def draw(shape: tuple[int, ...], dtype: torch.dtype, shift: float = 0.0) -> Tensor:
            return (torch.randn(shape, generator=rng) + shift).to(self.device, dtype)

        found = {"x": draw(self.shape, self.dtype, 0.5)}  # a mean that is not zero
        for name, shape in (("weight", self.shape[-1:]), ("bias", self.shape[-1:]), ("residual", self.shape)):
            if (dtype := getattr(self, name)) is not None:
                found[name] = draw(shape, dtype)
        return found


def outputs(case: Case, backend: str | None, inputs: dict[str, Tensor], wide: bool = False) -> dict[str, Tensor]:
    """y, h and every gradient for random gradients of y and of h, in float64 where `wide`."""
    leaves = {n: (t.double() if wide else t).detach().requires_grad_() for n, t in inputs.items()}
    torch.manual_seed(case.seed)  # what dropout's seed is drawn from
    result = FUNCTIONS[case.op](**leaves, **case.options, backend=backend)
    results = result if case.options.get("prenorm") else (result,)
    rng = torch.Generator().manual_seed(case.seed + 1)
    grads = [torch.randn(r.shape, generator=rng).to(case.device).to(case.dtype).to(r.dtype) for r in results]
    torch.autograd.backward(results, grads)
    named = dict(zip(("y", "h"), (r.detach() for r in results)))
    return named | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def check(case: Case, backend: str | None, inputs: dict[str, Tensor] | None = None) -> None:
    inputs = case.inputs() if inputs is None else inputs
    ours, plain, truth = (
        outputs(case, backend, inputs),
        outputs(case, "reference", inputs),
        outputs(case, "reference", inputs, wide=True),
    )
    for name, expected in truth.items():
        got = ours[name]
        assert (got.dtype, got.shape) == (plain[name].dtype, expected.shape), name
        if got.dtype == torch.float64:
            torch.testing.assert_close(got, expected)
            continue
        # Plain PyTorch may by luck be exact in the few elements of a small case, and terms of size 1 may cancel to 0 (dx of
        # rows of one element is all rounding).
        absolute = torch.finfo(got.dtype).eps / 4 * float(expected.abs().max()) + torch.finfo(torch.float32).eps
        assert_as_accurate_as(got, plain[name], expected, absolute=absolute)
