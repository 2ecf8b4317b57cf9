"""Corrections to Triton's interpreter, so that it computes bfloat16 as a GPU does, and in less time."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch


def _round_to_bfloat16(data: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _widen_bfloat16(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


@functools.cache
def repair() -> None:
    """Patch the interpreter of triton 3.6 and 3.7: it truncates float32 to bfloat16 where a GPU rounds to the nearest, and
    multiplies the bit patterns of bfloat16 matrices as integers. At each call of a function inside a kernel it goes through
    all of triton.language to replace what it replaced when the kernel began, which is a third of the time. 3.6 takes a scalar,
    an array of one number, as an index in a way that numpy 2.4 refuses."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    launch, patch_language, patch_tensor = GridExecutor.__call__, interpreter._patch_lang, interpreter._patch_lang_tensor
    patched: set[int] = set()  # the modules whose functions this launch has called

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(_round_to_bfloat16(src.data), tl.bfloat16)
        if (src.dtype.scalar, dst_type.scalar) == (tl.bfloat16, tl.float32):
            return TensorHandle(_widen_bfloat16(src.data), tl.float32)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        if a.dtype.scalar == b.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(_widen_bfloat16(matrix.data), tl.float32) for matrix in (a, b))
        return dot(self, a, b, *args)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_language_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module not in patched:
            patched.add(module)
            return patch_language(fn)

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    GridExecutor.__call__ = launch_afresh
    interpreter._patch_lang = patch_language_once
    interpreter._patch_lang_tensor = patch_tensor_with_index
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
