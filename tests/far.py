"""Tensors of more than 2^31 elements in tests: on a CPU without their memory, on a GPU with guards around what is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

GUARD = 1 << 16


def strided(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A copy of these strides in memory that nothing else touches, so that it takes few pages however far rows are apart."""
    size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, stride))
    try:
        memory = torch.empty(size, dtype=tensor.dtype)
    except RuntimeError:
        pytest.skip(f"this machine lends no {size * tensor.element_size() / 2**30:.0f} GiB of addresses")
    return memory.as_strided(tensor.shape, stride).copy_(tensor)


def leave_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter copies each argument's whole memory onto itself after a launch."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)


def run_only(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, choose: Callable[[int], list[int]]) -> None:
    """Of the kernel's n programs the interpreter runs those that choose(n) names. The grid must have one dimension."""
    from triton.runtime.interpreter import interpreter_builder

    kernel = getattr(module, name)
    place, size = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim

    class Some:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            (n,) = grid
            chosen = choose(n)

            def launch(*args: Any, **kwargs: Any) -> None:
                with monkeypatch.context() as patch:
                    patch.setattr(interpreter_builder, "set_grid_dim", lambda *_: size(n, 1, 1))
                    patch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: place(chosen[x], y, z))
                    kernel[(len(chosen),)](*args, **kwargs)

            return launch

    monkeypatch.setattr(module, name, Some())


def note_grids(monkeypatch: pytest.MonkeyPatch, module: Any, *names: str) -> list[tuple[int, ...]]:
    """The grids of these kernels' launches, which do nothing: with meta tensors a problem may have any size."""
    grids: list[tuple[int, ...]] = []

    class Launch:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in names:
        monkeypatch.setattr(module, name, Launch())
    return grids


def fits(grid: tuple[int, ...]) -> bool:
    """Whether CUDA takes it."""
    return grid[0] < 2**31 and all(n <= 65_535 for n in grid[1:])


class Guards:
    """While this stands, tensors from `new_empty` and `empty_like` lie between numbers that must not change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.edges: list[tuple[Tensor, Tensor]] = []  # and what they held

        def new_empty(like: Tensor, *shape: Any, **options: Any) -> Tensor:
            shape = shape[0] if shape and not isinstance(shape[0], int) else shape
            return self.empty(tuple(shape), options.get("dtype") or like.dtype, options.get("device") or like.device)

        def empty_like(like: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            return self.empty(tuple(like.shape), dtype or like.dtype, like.device)

        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
        monkeypatch.setattr(torch, "empty_like", empty_like)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        n = math.prod(shape)
        memory = torch.empty(n + 2 * GUARD, dtype=dtype, device=device)
        for edge in (memory[:GUARD], memory[-GUARD:]):
            self.edges.append((edge, edge.fill_(77).clone()))
        return memory[GUARD:-GUARD].view(shape)

    def check(self) -> None:
        assert self.edges
        assert all(torch.equal(edge, before) for edge, before in self.edges), "something was written beside its tensor"


def seams(n: int, at: int = 2**31, count: int = 64, width: int = 4096) -> list[slice]:
    """Of n elements: the beginning, the end, around `at`, and `count` random places."""
    random = torch.randint(max(n - width, 1), (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [slice(max(begin, 0), min(begin + width, n)) for begin in (0, n - width, at - width // 2, *random)]
