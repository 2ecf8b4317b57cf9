"""What the repaired interpreter of Triton computes as a GPU does, in every version of Triton and numpy that is supported."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is for Linux alone")

import triton.language as tl  # noqa: E402
from wikigpt.kernels._interpreter import repair  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="for the interpreter")


@pytest.fixture(autouse=True)
def repaired():
    repair()


@triton.jit
def _count(Out, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for i in range(0, n):
        total += i
    tl.store(Out + tl.arange(0, BLOCK), total)


@triton.jit
def _count_to_what_is_stored(Out, N, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for i in range(tl.load(N), tl.load(N + 1)):
        total += i
    tl.store(Out + tl.arange(0, BLOCK), total)


@triton.jit
def _copy(X, Out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Out + i, tl.load(X + i).to(Out.dtype.element_ty))


@triton.jit
def _product(A, B, Out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tile = i[:, None] * BLOCK + i[None, :]
    tl.store(Out + tile, tl.dot(tl.load(A + tile), tl.load(B + tile)))


def test_an_argument_can_bound_a_loop():
    out = torch.empty(16, dtype=torch.int32)
    _count[(1,)](out, 5, BLOCK=16)
    assert out.tolist() == [10] * 16


def test_a_loaded_number_can_bound_a_loop():
    out = torch.empty(16, dtype=torch.int32)
    _count_to_what_is_stored[(1,)](out, torch.tensor([3, 6], dtype=torch.int32), BLOCK=16)
    assert out.tolist() == [12] * 16


def test_float32_is_rounded_to_the_nearest_bfloat16():
    x, out = torch.linspace(-3, 7, 64).exp(), torch.empty(64, dtype=torch.bfloat16)
    _copy[(1,)](x, out, BLOCK=64)
    assert torch.equal(out, x.bfloat16())


def test_matrices_of_bfloat16_are_multiplied_as_numbers():
    a, b, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    _product[(1,)](a, b, out, BLOCK=16)
    torch.testing.assert_close(out, a.float() @ b.float())
