"""Block sizes per architecture, head_dim and direction: checked in, verified by compiling every row (tests/test_compile.py).

`python -m wikigpt.kernels.compile_report attention` prints registers, spills, shared memory and occupancy of every row.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._launch import GRID_X, architecture, cdiv, multiprocessors, next_power_of_2
from .reference import Inputs


@dataclass(frozen=True)
class Row:
    """block_m queries by block_n keys. persistent: one program per multiprocessor takes several tiles. tma: tiles of dense
    tensors come through tensor descriptors (sm_90 and newer)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    persistent: bool = False
    tma: bool = False


@dataclass(frozen=True)
class Rows:
    forward: Row
    dq: Row
    dkdv: Row


WIDE = 2**31  # the key of the rows for a head_dim above 256: see `widths`

# (largest padded head_dim of q, k and v) -> rows, for 16-bit inputs. One architecture without a table of its own takes that of
# the nearest older one. Rows are the largest tiles that spill nothing: compile_report.EXCEPTIONS says where there are none.
_TABLE: dict[int, dict[int, Rows]] = {
    80: {
        64: Rows(Row(128, 64, 8, 3), Row(64, 32, 4, 3), Row(16, 64, 4, 3)),
        128: Rows(Row(128, 32, 8, 3), Row(64, 64, 8, 2), Row(64, 64, 8, 2)),
        256: Rows(Row(64, 64, 8, 2), Row(64, 32, 8, 2), Row(32, 32, 8, 2)),
        WIDE: Rows(Row(64, 64, 8, 2), Row(64, 32, 8, 2), Row(32, 32, 8, 2)),
    },
    86: {  # 99 KiB of shared memory a block
        64: Rows(Row(128, 64, 8, 3), Row(64, 32, 4, 2), Row(32, 64, 4, 2)),
        128: Rows(Row(128, 32, 8, 3), Row(64, 64, 8, 2), Row(64, 64, 8, 2)),
        256: Rows(Row(64, 32, 8, 2), Row(64, 16, 8, 2), Row(32, 32, 8, 2)),
        WIDE: Rows(Row(64, 64, 8, 2), Row(64, 32, 8, 2), Row(32, 32, 8, 2)),
    },
    90: {  # block_m of the forward pass and of dQ, block_n of dK and dV are a warpgroup's 64 rows or a multiple, for wgmma
        64: Rows(Row(128, 128, 8, 3), Row(128, 64, 8, 3), Row(32, 128, 8, 3)),
        128: Rows(Row(128, 64, 8, 3), Row(128, 64, 8, 2), Row(32, 128, 8, 2)),
        256: Rows(Row(128, 32, 8, 3), Row(128, 32, 8, 2), Row(16, 64, 8, 3)),
        WIDE: Rows(Row(128, 64, 8, 2), Row(64, 64, 8, 2), Row(32, 64, 8, 2)),
    },
    100: {  # the same for tcgen05. One stage keeps the sums of dK and dV in tensor memory; more move them to registers and back
        64: Rows(Row(128, 128, 8, 2, tma=True), Row(128, 64, 8, 3), Row(64, 64, 8, 1)),
        128: Rows(Row(128, 64, 8, 3, tma=True), Row(64, 64, 8, 2, tma=True), Row(64, 64, 8, 1)),
        256: Rows(Row(64, 64, 8, 2, tma=True), Row(64, 32, 8, 1), Row(16, 64, 8, 1)),
        WIDE: Rows(Row(64, 64, 8, 2), Row(64, 64, 8, 2), Row(16, 64, 8, 2)),
    },
}
_TABLE[120] = _TABLE[86]

# float32 is multiplied without tensor cores, element by element: tiles are as large as the registers. The interpreter wants
# many small tiles so that a test crosses their borders.
_FLOAT32 = {
    64: Rows(Row(32, 32, 4, 2), Row(32, 32, 8, 2), Row(32, 32, 4, 1)),
    128: Rows(Row(32, 32, 8, 2), Row(32, 16, 8, 2), Row(32, 32, 4, 1)),
    256: Rows(Row(32, 16, 8, 2), Row(16, 16, 8, 2), Row(16, 16, 4, 2)),
    WIDE: Rows(Row(64, 32, 8, 2), Row(64, 32, 8, 2), Row(16, 32, 8, 2)),
}
_INTERPRETER = Rows(Row(32, 16, 1, 1), Row(16, 32, 1, 1), Row(32, 16, 1, 1))


def padded(head_dim: int) -> int:
    """tl.dot wants powers of two, 16 at least."""
    return max(16, next_power_of_2(head_dim))


def widths(d: int, dv: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK_D and BLOCK_DV columns of q, k and of v in a tile, and CHUNK. Rows up to 256 wide are held whole (CHUNK 0). Wider
    ones are multiplied CHUNK columns at a time, and a program owns one part of a row's sums: shared memory and registers
    hang on no head_dim, for the price of computing scores again for each part."""
    if max(d, dv) <= 256:
        return {"BLOCK_D": padded(d), "BLOCK_DV": padded(dv), "CHUNK": 0}
    part, chunk = (128, 32) if dtype == torch.float32 else (256, 64)
    return {"BLOCK_D": min(padded(d), part), "BLOCK_DV": min(padded(dv), part), "CHUNK": chunk}


_forced: Rows | None = None


@contextlib.contextmanager
def force(rows: Rows) -> Iterator[None]:
    """These rows for every problem inside the block: for tests and for tuning."""
    global _forced
    before, _forced = _forced, rows
    try:
        yield
    finally:
        _forced = before


def rows(x: Inputs) -> Rows:
    if _forced is not None:
        return _forced
    return _rows(architecture(x.q.device), x.q.dtype, max(x.q.shape[-1], x.v.shape[-1]))


@functools.cache
def _rows(arch: int, dtype: torch.dtype, head_dim: int) -> Rows:
    if arch == 0:
        return _INTERPRETER
    table = _FLOAT32 if dtype == torch.float32 else _TABLE[max((known for known in _TABLE if known <= arch), default=80)]
    return table[min(known for known in table if known >= padded(head_dim))]


def forward(x: Inputs) -> Row:
    return rows(x).forward


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as torch.set_float32_matmul_precision says ("ieee" or "tf32")."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def grid(n_work: int, row: Row, device: torch.device) -> tuple[int, bool]:
    """(programs, whether each takes several units of the work). A persistent program counts on beyond the last unit by as
    many as there are programs, and that must fit 32 bits, as n_work does."""
    if n_work > GRID_X:
        return GRID_X, True
    persistent = row.persistent and n_work <= 2**30
    return min(n_work, multiprocessors(device)) if persistent else n_work, persistent


def section(k: Tensor, v: Tensor, group: int, n_k: int, n_heads: int, n_tiles: int) -> int:
    """How many heads work at the same time, so that what they read stays in the L2 cache (about 32 MiB): k and v, n_k positions
    of one head for each `group` of them. The work of a section is counted in 32 bits."""
    per_group = max(n_k * (k.shape[-1] + v.shape[-1]) * k.element_size(), 1)
    return min(max(1, 2**25 // per_group) * group, n_heads, GRID_X // max(n_tiles, 1))


def far(block: int, *tensors: Tensor) -> bool:
    """Whether a number in a tile of `block` positions may lie 2^31 or more behind the tile's first one."""
    return any((block - 1) * tensor.stride(-3) + tensor.shape[-1] >= 2**31 for tensor in tensors)


def far_rows(fixed: dict[str, Any], block: int, *tensors: Tensor) -> bool:
    """`far` of tensors whose rows are addressed tile by tile only where head_dim is above 256."""
    return bool(fixed["CHUNK"]) and far(block, *tensors)


def descriptor(tensor: Tensor, block: int) -> TensorDescriptor:
    """Tiles of `block` positions of one head of (batch, positions, heads, head_dim), for the tensor memory accelerator."""
    return TensorDescriptor(tensor, list(tensor.shape), _described(tensor), [1, block, 1, padded(tensor.shape[-1])])


def _described(tensor: Tensor) -> list[int]:
    """Strides for a descriptor. That of a dimension of size 1 may be any number in PyTorch: here it is one that CUDA takes."""
    whole = 16 // tensor.element_size()
    valid = cdiv(tensor.shape[-1], whole) * whole
    return [stride if size > 1 else valid for size, stride in zip(tensor.shape[:-1], tensor.stride())] + [1]


def describable(x: Inputs, *tensors: Tensor) -> bool:
    """Whether descriptors can address the tensors, whose rows are dense. Packed sequences and seqused_k end inside a tensor,
    where a descriptor would go on reading: what is there may be NaN."""
    return x.cu_seqlens_q is None and x.seqused_k is None and all(map(_describable, tensors))


def _describable(tensor: Tensor) -> bool:
    """CUDA's rules for a tensor map: something in it, an address and strides of 16 bytes, strides below 2^40 and none 0."""
    strides = [stride * tensor.element_size() for stride in _described(tensor)[:-1]]
    return tensor.numel() > 0 and tensor.data_ptr() % 16 == 0 and all(n % 16 == 0 and 0 < n < 2**40 for n in strides)
