"""Philox4x32 (Salmon et al. 2011): random numbers as a function of a key and a counter, the same as in the kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

MASK = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of the product of unsigned 32-bit numbers kept in int64."""
    return (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16, a * b & MASK


def philox(rounds: int, counter: tuple[Tensor, Tensor, Tensor, Tensor], k0: Any, k1: Any) -> tuple[Tensor, ...]:
    """Four words for each element of four tensors of counters. All are unsigned 32-bit numbers, kept in int64; the key may be
    ints."""
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        high0, low0 = _multiply(0xD2511F53, c0)
        high2, low2 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3
