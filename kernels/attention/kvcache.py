"""Attention over a cache of keys and values, for generation: reference, checks, registered op, public function.

Shapes: B batch, H query heads, G key/value heads (H a multiple of G), S queries and N new keys per sequence, D head_dim, Dv
head_dim of the values. A cache is dense, (B_cache, T, G, D), or paged, (pages, page_size, G, D) with block_table (B, P): the
key at position j of sequence b lies in page block_table[b, j // page_size], and a sequence has room for T = P * page_size.

    append   k turned by the rotary angle of its position, and v, at positions cache_seqlens .. cache_seqlens + N
    attend   as `flash_attn_func` over the keys at cache_leftpad .. cache_seqlens + N

A sequence whose cache_seqlens is negative is idle, as a slot without a request is when a server decodes a fixed batch: nothing
of it is written, and its rows have no key.

The kernels are in decode.py, imported when one first runs.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .._autograd import call_in_place
from .._checks import as_float, as_int, check_tensors, check_writable
from .._dispatch import NAMESPACE, Implementation, checks_values, choose, imported, only_on, register, watched, why_not_triton
from .functional import _float, _window, casting_to, changing, readable
from .op import attention, changed
from .reference import MAX_HEAD_DIM, Inputs

MAX_SPLITS = 128


@dataclass(frozen=True)
class CacheInputs:
    """One problem, checked, as every implementation receives it. alibi_slopes and s_aux are float32."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    cache_seqlens: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    s_aux: Tensor | None
    seqlen: int | None  # of every sequence, where cache_seqlens is None; None: the whole cache
    softmax_scale: float
    window_left: int  # -1: no limit
    window_right: int
    softcap: float
    rotary_interleaved: bool
    num_splits: int  # 0: as many as fill the device
    changing: Tensor | None = None  # as in reference.Inputs

    @property
    def capacity(self) -> int:
        """How many keys a sequence has room for."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k_cache.shape[1]

    @property
    def start(self) -> int:
        """Keys in the cache of every sequence, where cache_seqlens is None."""
        return self.capacity if self.seqlen is None else self.seqlen

    @property
    def n_new(self) -> int:
        return 0 if self.k is None else self.k.shape[1]

    @property
    def advances(self) -> bool:
        """Whether query i has the rotary position cache_seqlens + i; without a window all have cache_seqlens."""
        return self.window_left >= 0 or self.window_right >= 0

    def empty(self) -> tuple[Tensor, Tensor]:
        """Room for (out, lse)."""
        b, s, h, _ = self.q.shape
        out = self.q.new_empty(b, s, h, self.v_cache.shape[-1])
        return out, self.q.new_empty(b, h, s, dtype=torch.float64 if self.q.dtype == torch.float64 else torch.float32)


_NAMES = tuple(field.name for field in fields(CacheInputs))  # here, because torch.compile cannot trace fields()


# --- reference ------------------------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (B, S, heads, D), its first 2 * cos.shape[-1] numbers turned by the angles of positions (B, S); in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[positions][:, :, None].to(wide) for table in (cos, sin))  # (B, S, 1, pairs)
    n = 2 * cos.shape[-1]
    pairs = x[..., :n].to(wide)
    x1, x2 = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, dim=-1)
    turned = (x1 * cos - x2 * sin, x2 * cos + x1 * sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((joined.to(x.dtype), x[..., n:]), dim=-1)


def _locate(x: CacheInputs, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Indices into the first two dimensions of the cache of positions (B, n)."""
    if x.block_table is None:
        rows = torch.arange(x.q.shape[0], device=x.q.device) if x.cache_batch_idx is None else x.cache_batch_idx.long()
        return rows[:, None], positions
    size = x.k_cache.shape[1]
    # Beyond its length a sequence may have anything in its row of the table.
    pages = x.block_table.long().gather(1, positions // size).clamp(0, max(x.k_cache.shape[0] - 1, 0))
    return pages, positions % size


def _rotated(x: CacheInputs, used: Tensor) -> tuple[Tensor, Tensor | None]:
    """q and k turned by their angles, where sequences have `used` (B) keys already."""
    if x.k is None or x.rotary_cos is None or x.rotary_sin is None:
        return x.q, x.k
    s, device = x.q.shape[1], x.q.device
    new = used[:, None] + torch.arange(x.n_new, device=device)
    k = rotate(x.k, x.rotary_cos, x.rotary_sin, new, x.rotary_interleaved)
    rows = torch.arange(s, device=device) if x.advances else torch.zeros(s, dtype=torch.int64, device=device)
    return rotate(x.q, x.rotary_cos, x.rotary_sin, used[:, None] + rows, x.rotary_interleaved), k


def _plain(x: CacheInputs, implementation: str) -> tuple[Tensor, Tensor]:
    """(out, lse) with PyTorch's operators around `attention`; writes into the caches. Reads lengths back from the device."""
    batch, device = x.q.shape[0], x.q.device
    lengths = torch.full((batch,), x.start, device=device) if x.cache_seqlens is None else x.cache_seqlens.long()
    active, used = lengths >= 0, lengths.clamp(min=0)
    q, k = _rotated(x, used)
    if k is not None and x.v is not None:
        new = used[:, None] + torch.arange(x.n_new, device=device)
        rows, positions = (place[active] for place in _locate(x, new))
        x.k_cache[rows, positions], x.v_cache[rows, positions] = k[active], x.v[active]
        used = (used + x.n_new).where(active, 0)
    out, lse = x.empty()
    if out.numel() == 0:
        return out, lse.fill_(-math.inf)
    longest = int(used.max())
    positions = torch.arange(longest, device=device).expand(batch, longest)
    if x.block_table is None and x.cache_batch_idx is None:
        keys, values = x.k_cache[:batch, :longest], x.v_cache[:batch, :longest]
    else:
        where = _locate(x, positions)
        keys, values = x.k_cache[where], x.v_cache[where]
    mask = None
    if x.cache_leftpad is not None:
        real = positions >= x.cache_leftpad[:, None]
        mask = real[:, None, None]
        values = values.where(real[..., None, None], 0)  # what lies there may be NaN
    problem = Inputs(
        q,
        keys,
        values,
        mask=mask,
        alibi_slopes=x.alibi_slopes,
        s_aux=x.s_aux,
        seqused_k=used.int(),
        softmax_scale=x.softmax_scale,
        window_left=x.window_left,
        window_right=x.window_right,
        softcap=x.softcap,
    )
    out, lse_of = attention(problem, implementation)
    assert lse_of is not None
    return out, lse_of


# --- PyTorch's fused attention on the CPU -------------------------------------------------------------------------------


_ATTEND = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # F.scaled_dot_product_attention hides the lse


def _fused(x: CacheInputs) -> tuple[Tensor, Tensor] | None:
    """(out, lse), each sequence's keys as they lie in the cache, without a copy or a mask. None for what PyTorch's attention
    does not have; nothing is written then."""
    (batch, s, heads, dim), groups = x.q.shape, x.k_cache.shape[2]
    has_not = x.block_table is not None or x.alibi_slopes is not None or x.s_aux is not None or x.softcap > 0
    windowed = x.window_left >= 0 or x.window_right > 0 or (x.window_right == 0 and s > 1)
    if has_not or windowed or x.softmax_scale == 0 or dim != x.v_cache.shape[3] or (heads != groups and s > 1):
        return None
    if x.q.numel() == 0 or x.q.stride(3) != 1 or x.k_cache.stride(3) != 1 or x.v_cache.stride(3) != 1:
        return None
    lengths = [x.start] * batch if x.cache_seqlens is None else x.cache_seqlens.tolist()
    first = [0] * batch if x.cache_leftpad is None else x.cache_leftpad.tolist()
    if any(n < 0 or begin >= n + x.n_new for n, begin in zip(lengths, first)):
        return None
    q, k = x.q, x.k
    if x.rotary_cos is not None:
        q, k = _rotated(x, torch.tensor(lengths))
    # The query heads that share keys are queries of one head.
    q = q.transpose(1, 2) if s > 1 else q.reshape(batch, groups, heads // groups, dim)  # (B, G, queries, D)
    # One call for all sequences where they lie alike, else one for each.
    if x.cache_batch_idx is None and len(set(lengths)) == len(set(first)) == 1:
        parts = [(slice(batch), slice(batch))]
    else:
        rows = range(batch) if x.cache_batch_idx is None else x.cache_batch_idx.tolist()
        parts = [(slice(i, i + 1), slice(row, row + 1)) for i, row in enumerate(rows)]
    if k is not None and x.v is not None:  # all of them first: sequences may share a row of the cache
        for here, there in parts:
            end = lengths[here.start or 0]
            x.k_cache[there, end : end + x.n_new].copy_(k[here])
            x.v_cache[there, end : end + x.n_new].copy_(x.v[here])
    found = []
    for here, there in parts:
        begin, end = first[here.start or 0], lengths[here.start or 0] + x.n_new
        keys, values = (cache[there, begin:end].transpose(1, 2) for cache in (x.k_cache, x.v_cache))
        found.append(_ATTEND(q[here], keys, values, scale=x.softmax_scale))
    out, lse = found[0] if len(found) == 1 else (torch.cat(part) for part in zip(*found))
    return out.transpose(1, 2) if s > 1 else out.reshape(batch, s, heads, dim), lse.reshape(batch, heads, s)


# --- registered op --------------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::flash_attn_with_kvcache", mutates_args=("k_cache", "v_cache"))
def _flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    s_aux: Tensor | None,
    seqlen: int | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    rotary_interleaved: bool,
    num_splits: int,
    changing: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    x = CacheInputs(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table,
        alibi_slopes, s_aux, seqlen, softmax_scale, window_left, window_right, softcap, rotary_interleaved, num_splits,
    )  # fmt: skip
    if changing is not None:
        softmax_scale, softcap = changed(changing)
        x = replace(x, softmax_scale=softmax_scale, softcap=softcap)
    return _on_cpu(x) if implementation == "cpu" else _computed(x, implementation)


def _on_cpu(x: CacheInputs) -> tuple[Tensor, Tensor]:
    return _fused(x) or _plain(x, "cpu")


def _computed(x: CacheInputs, implementation: str) -> tuple[Tensor, Tensor]:
    if implementation != "triton" or x.q.dtype == torch.float64:
        return _plain(x, "reference" if implementation == "triton" else implementation)
    out, lse = imported(".decode", __package__).forward(x)
    return out, lse


@_flash_attn_with_kvcache.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    return CacheInputs(*args[:-1]).empty()


def _implementation(name: str) -> Any:
    def function(x: CacheInputs) -> tuple[Tensor, Tensor]:
        if x.changing is not None:
            x = replace(x, softmax_scale=1.0, softcap=0.0)
        # For a few keys the registered op would take several times the time of what it computes.
        if name == "cpu" and not watched(x.q, x.k_cache, x.v_cache, x.k, x.v, x.cache_seqlens):
            return _on_cpu(x)
        fields = [getattr(x, field) for field in _NAMES]
        out, lse = call_in_place(_flash_attn_with_kvcache, (x.k_cache, x.v_cache), *fields, name)
        return out, lse

    return function


register(
    "flash_attn_with_kvcache",
    Implementation("triton", _implementation("triton"), why_not_triton),
    Implementation("cpu", _implementation("cpu"), only_on("cpu")),
    Implementation("reference", _implementation("reference")),
)


# --- checks ---------------------------------------------------------------------------------------------------------


def _check(x: CacheInputs) -> CacheInputs:
    """The same problem, or ValueError or TypeError that names the argument, what came and what is allowed.

    Looks at shapes, dtypes and devices; at values only on the CPU, as on a GPU that would wait for the device.
    """
    _check_tensors(x)
    (batch, _, heads, dim), groups = x.q.shape, x.k_cache.shape[2]
    if x.k_cache.shape[3] != dim:
        raise ValueError(f"k_cache: got head_dim {x.k_cache.shape[3]}, q has {dim}")
    if x.v_cache.shape[:3] != x.k_cache.shape[:3]:
        raise ValueError(f"v_cache: got shape {tuple(x.v_cache.shape)}, k_cache has {tuple(x.k_cache.shape)}")
    for name, n in (("q", dim), ("v_cache", x.v_cache.shape[3])):
        if not 0 < n <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: got head_dim {n}, allowed are 1 to {MAX_HEAD_DIM}")
    if heads != groups and (groups == 0 or heads % groups):
        raise ValueError(f"k_cache: got {groups} heads for {heads} query heads, they must divide the query's")
    for name, cache in (("k_cache", x.k_cache), ("v_cache", x.v_cache)):
        if cache.stride(-1) != 1 and cache.shape[-1] != 1:
            raise ValueError(f"{name}: got stride {cache.stride(-1)} in the last dimension, need 1")
    if x.block_table is not None:
        if x.cache_batch_idx is not None:
            raise ValueError("cache_batch_idx: does not combine with block_table, which says where each sequence lies")
        if x.block_table.dim() != 2 or x.block_table.shape[0] != batch:
            raise ValueError(f"block_table: got shape {tuple(x.block_table.shape)}, need ({batch}, pages per sequence)")
        if x.k_cache.shape[1] == 0:
            raise ValueError("k_cache: got pages of 0 positions, need 1 or more")
    elif x.cache_batch_idx is None and x.k_cache.shape[0] < batch:
        raise ValueError(f"k_cache: got {x.k_cache.shape[0]} sequences, q has a batch of {batch}")
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad"):
        tensor = getattr(x, name)
        if tensor is not None and tuple(tensor.shape) != (batch,):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, need ({batch},)")
    for name, tensor in (("alibi_slopes", x.alibi_slopes), ("s_aux", x.s_aux)):
        shapes = [(heads,), (batch, heads)] if name == "alibi_slopes" else [(heads,)]
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, need {' or '.join(map(str, shapes))}")
    for name, number in (("softmax_scale", x.softmax_scale), ("softcap", x.softcap)):
        if not 0 <= number < math.inf:
            way_out = " (for a negative one negate q)" if name == "softmax_scale" else ""
            raise ValueError(f"{name}: got {number}, must be finite and 0 or more{way_out}")
    if not 0 <= x.num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits: got {x.num_splits}, allowed are 1 to {MAX_SPLITS}, and 0 for the best")
    _check_new(x)
    if x.cache_seqlens is None and not 0 <= x.start <= x.capacity - x.n_new:
        raise ValueError(f"cache_seqlens: got {x.start}, the cache has room for 0 to {x.capacity - x.n_new}")
    indices = (x.cache_seqlens, x.cache_batch_idx, x.cache_leftpad, x.block_table)
    if checks_values(x.q.device.type) and readable(*indices):
        _check_values(x)
    return x


def _check_tensors(x: CacheInputs) -> None:
    numbers = ("q", "k_cache", "v_cache", "k", "v")
    floats = ("rotary_cos", "rotary_sin", "alibi_slopes", "s_aux")
    integers = ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table")
    for name in (*numbers, *floats, *integers):
        tensor = getattr(x, name)
        if tensor is None:
            continue
        if tensor.device != x.q.device:
            raise ValueError(f"{name}: got device {tensor.device}, q is on {x.q.device}")
        if name in integers and tensor.dtype != torch.int32:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, allowed is int32")
        if name not in integers and (not tensor.is_floating_point() or tensor.element_size() == 1):
            raise TypeError(f"{name}: got dtype {tensor.dtype}, allowed are float16, bfloat16, float32 and float64")
        if name in numbers and tensor.dim() != 4:
            raise ValueError(f"{name}: got {tensor.dim()} dimensions, need 4: (batch, positions, heads, head_dim)")
        if name in numbers and tensor.dtype != x.q.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, q has {x.q.dtype}")
        if name.startswith("rotary") and tensor.dtype not in (x.q.dtype, torch.float32):
            raise TypeError(f"{name}: got dtype {tensor.dtype}, allowed are q's {x.q.dtype} and float32")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires_grad is set, but there is no gradient here; call it under torch.no_grad()")


def _check_new(x: CacheInputs) -> None:
    """k, v and rotary."""
    for one, other in (("k", "v"), ("v", "k"), ("rotary_cos", "rotary_sin"), ("rotary_sin", "rotary_cos")):
        if getattr(x, one) is None and getattr(x, other) is not None:
            raise ValueError(f"{one}: got None with {other}, need both or neither")
    if x.k is not None and x.v is not None:
        for name, tensor, cache in (("k", x.k, x.k_cache), ("v", x.v, x.v_cache)):
            expected = (x.q.shape[0], x.k.shape[1], *cache.shape[2:])
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, need {expected}")
            check_writable(f"{name}_cache:", cache)
        if x.n_new > x.capacity:
            raise ValueError(f"k: got {x.n_new} positions, the cache has room for {x.capacity}")
    if x.rotary_cos is not None and x.rotary_sin is not None:
        if x.k is None:
            raise ValueError("rotary_cos: needs k and v, as keys in the cache are turned already")
        for name, tensor in (("rotary_cos", x.rotary_cos), ("rotary_sin", x.rotary_sin)):
            if tensor.dim() != 2 or tensor.shape[0] < x.capacity or 2 * tensor.shape[1] > x.q.shape[3]:
                need = f"(at least {x.capacity}, at most {x.q.shape[3] // 2})"
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, need {need}: (positions, rotary_dim / 2)")
        if x.rotary_sin.shape != x.rotary_cos.shape:
            raise ValueError(f"rotary_sin: got {tuple(x.rotary_sin.shape)}, rotary_cos has {tuple(x.rotary_cos.shape)}")


def _check_values(x: CacheInputs) -> None:
    starts = [x.start] * x.q.shape[0] if x.cache_seqlens is None else x.cache_seqlens.tolist()
    room = x.capacity - x.n_new
    if any(n > room for n in starts):
        raise ValueError(f"cache_seqlens: got {starts}, the cache has room for 0 to {room}")
    if x.rotary_cos is not None and x.advances and max(starts, default=0) + x.q.shape[1] > x.rotary_cos.shape[0]:
        need = max(starts) + x.q.shape[1]
        raise ValueError(f"rotary_cos: got {x.rotary_cos.shape[0]} positions, the last query is at {need - 1}")
    if x.cache_leftpad is not None and any(n < 0 for n in x.cache_leftpad.tolist()):
        raise ValueError(f"cache_leftpad: got {x.cache_leftpad.tolist()}, must be 0 or more")
    n_cached = x.k_cache.shape[0]
    if x.cache_batch_idx is not None and any(not 0 <= b < n_cached for b in x.cache_batch_idx.tolist()):
        raise ValueError(f"cache_batch_idx: got {x.cache_batch_idx.tolist()}, k_cache has {n_cached} sequences")
    if x.block_table is not None:
        for start, pages in zip(starts, x.block_table.tolist()):
            used = pages[: -(-(start + x.n_new) // x.k_cache.shape[1])] if start >= 0 else []
            if any(not 0 <= page < n_cached for page in used):
                raise ValueError(f"block_table: got {used}, k_cache has {n_cached} pages")


# --- public function ------------------------------------------------------------------------------------------------


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Any:
    """Under autocast: as the caches are written in place, theirs is the dtype of the computation."""
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int | None = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Attention of q over a cache that first takes in k and v, with the signature of the flash-attn package, plus sinks.

    q (B, S, H, D). k_cache (B_cache, T, G, D), v_cache (B_cache, T, G, Dv), or with block_table (B, P, int32) pages
    (pages, page_size, G, D or Dv) of any size; the last dimension dense. float16, bfloat16 or float32, D and Dv to 1,024.

    k (B, N, G, D), v (B, N, G, Dv): written into the caches, in place, at positions cache_seqlens .. cache_seqlens + N; these
    are not expanded then.
    rotary_cos, rotary_sin (positions, rotary_dim / 2), in q's dtype or float32, turn k by the angle of its position and q:
    with causal or window_size query i by that of cache_seqlens + i, otherwise every query by that of cache_seqlens.
    rotary_interleaved pairs dimensions 0 and 1, 2 and 3 (GPT-J), otherwise 0 and rotary_dim / 2 (GPT-NeoX).
    cache_seqlens, an int or (B, int32): keys already in the cache; needed with k, otherwise the whole cache by default. A
    negative number in the tensor (-1) is an idle sequence: nothing is written, it has no keys.
    cache_batch_idx (B, int32): which sequence of the cache each one is (the b-th by default). cache_leftpad (B, int32):
    where its keys begin. softmax_scale defaults to 1 / sqrt(D). causal and window_size (left, right) count from the diagonal
    that ends at the last key. softcap, alibi_slopes and s_aux as in `flash_attn_func`. num_splits: into how many parts the
    keys are divided among programs, 0 for as many as fill the GPU (without looking at cache_seqlens: no synchronisation).

    Returns out (B, S, H, Dv); with return_softmax_lse=True (out, lse (B, H, S) float32). A row without any key has out 0 and
    lse -inf. There is no gradient. Under autocast q, k and v are cast to the dtype of the caches. None for an option is its
    default.
    Raises ValueError or TypeError for what does not fit, before anything is written; the values of cache_seqlens,
    cache_batch_idx, cache_leftpad and block_table are checked on the CPU, and on a GPU only under `debug_checks()`, because
    reading them waits for the device. Unchecked, lengths beyond the cache are cut off; a cache_batch_idx or a page of
    block_table that is not there reads and writes elsewhere in memory.
    """
    if cache_seqlens is None and k is not None:
        raise ValueError("cache_seqlens: got None with k, need to know where k goes")
    if cache_seqlens is not None and not isinstance(cache_seqlens, (int, Tensor)):
        try:
            cache_seqlens = operator.index(cache_seqlens)  # numpy's integers
        except TypeError:
            name = type(cache_seqlens).__name__
            raise TypeError(f"cache_seqlens: got {name}, allowed are int and an int32 tensor") from None
    check_tensors(
        "q k_cache v_cache k v rotary_cos rotary_sin cache_batch_idx cache_leftpad block_table alibi_slopes s_aux"
        " cache_seqlens",
        (q, k_cache, v_cache),
        (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, block_table, alibi_slopes, s_aux,
         None if isinstance(cache_seqlens, int) else cache_seqlens),
    )  # fmt: skip
    casting = casting_to(q.device.type) is not None
    if casting:
        q, k, v = (_cast(tensor, k_cache.dtype) for tensor in (q, k, v))
    left, right = _window(window_size, causal)
    softcap = 0.0 if softcap is None else as_float("softcap", softcap)
    softmax_scale = None if softmax_scale is None else as_float("softmax_scale", softmax_scale)
    default = 1 / math.sqrt(max(q.shape[-1], 1)) if q.dim() else 1.0
    x = CacheInputs(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens if isinstance(cache_seqlens, Tensor) else None,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        _float(alibi_slopes),
        _float(s_aux),
        seqlen=cache_seqlens if isinstance(cache_seqlens, int) else None,
        softmax_scale=default if softmax_scale is None else softmax_scale,
        window_left=left,
        window_right=right,
        softcap=softcap,
        rotary_interleaved=True if rotary_interleaved is None else rotary_interleaved,
        num_splits=0 if num_splits is None else as_int("num_splits", num_splits),
        changing=changing(softmax_scale, default, softcap),
    )
    compute = choose("flash_attn_with_kvcache", q.device.type, backend)
    if casting:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = compute(_check(x))
    else:
        out, lse = compute(_check(x))
    return (out, lse) if return_softmax_lse else out


__all__ = ["flash_attn_with_kvcache"]
