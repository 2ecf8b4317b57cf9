"""Sampling: token ids from logits, with temperature, top-k, top-p and min-p, without a sort over the vocabulary.

Shapes: B rows, V vocabulary. Of p = softmax(logits / temperature), with tokens in the order of their logits (of equal ones the
lower index first),

    top_k keeps the first k,
    top_p the shortest beginning whose mass reaches this part of what top_k left (Holtzman et al. 2020, eq. 2),
    min_p those with at least this fraction of the likeliest one's probability (Nguyen et al. 2024),

and the token is the first index at which the distribution function of what is left, summed in the order of indices, exceeds a
random number u. u is Philox4x32-10 (Salmon et al. 2011) of the key seed and the counter (offset, row), so a token depends on
nothing but its row's logits and parameters and these three numbers, on the CPU and on the GPU alike.

The kernels are in csrc/sampling.{h,cpp,cu}.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import FLOATS, check_float, check_tensors
from ._dispatch import Implementation, checks_values, choose, extension_fake, in_extension, register
from ._philox import MASK, philox


class Parameters(NamedTuple):
    """What `sample` has checked. Tensors are (B), or of one number in seed and offset."""

    temperature: Tensor | float
    top_k: Tensor | int  # V or more: no filter
    top_p: Tensor | float
    min_p: Tensor | float
    seed: Tensor | int | None
    offset: Tensor | int
    joint: bool  # top_p counts the mass of the whole row, not of what top_k left
    generator: torch.Generator | None


# What each may be, of a number or of a tensor.
RANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "temperature": (lambda t: (t >= 0) & (t < math.inf), "0 (greedy) or a positive number"),
    "top_k": (lambda k: k >= 1, "1 or more"),
    "top_p": (lambda p: (p > 0) & (p <= 1), "above 0 and at most 1"),
    "min_p": (lambda p: (p >= 0) & (p <= 1), "at least 0 and at most 1"),
}
# A temperature below could make logits / temperature NaN; so small a one takes the likeliest token anyway.
LEAST_TEMPERATURE = 1e-30


# --- random numbers -------------------------------------------------------------------------------------------------


def _wide(device: torch.device) -> torch.dtype:
    """Of sums over a row: float64, except where a device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _new_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """One int64, made on the device, so that nothing waits for it and a CUDA graph draws another at each replay."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device, generator=generator)


def uniform(p: Parameters, rows: int, device: torch.device) -> Tensor:
    """u (B, 1) in [0, 1), as `random_bits` in csrc/sampling.h."""

    def counter(value: Tensor | int) -> Tensor:
        return torch.as_tensor(value, dtype=torch.int64, device=device).expand(rows)

    seed = _new_seed(p.generator, device) if p.seed is None else p.seed
    own_seeds = isinstance(seed, Tensor) and seed.numel() > 1
    row = torch.zeros(rows, dtype=torch.int64, device=device) if own_seeds else torch.arange(rows, device=device)
    key, offset = counter(seed), counter(p.offset)
    counters = (offset & MASK, offset >> 32 & MASK, row & MASK, row >> 32)
    c0, c1, _, _ = philox(10, counters, key & MASK, key >> 32 & MASK)
    return ((c1 << 21 | c0 >> 11).to(_wide(device)) * 2.0**-53)[:, None]


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """The first index (B, 1) at which the sum of the weights exceeds u times the whole: never one of weight 0."""
    mass = weights.cumsum(-1, dtype=u.dtype)
    total = mass[:, -1:].contiguous()
    # The product may round up to the total, which lies behind the last token.
    point = (u * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, point, right=True).clamp(max=weights.shape[-1] - 1)  # of NaN anything, but an index


# --- reference ------------------------------------------------------------------------------------------------------


def _column(value: Tensor | float) -> Any:
    return value[:, None] if isinstance(value, Tensor) else value


def _finished(ids: Tensor, best: Tensor, best_ids: Tensor, p: Parameters) -> Tensor:
    """ids (B) from columns: the likeliest token where the temperature is 0, -1 where a row is no distribution."""
    if isinstance(p.temperature, Tensor):
        ids = ids.where(_column(p.temperature) != 0, best_ids)
    valid = best.isfinite()
    for name, (allowed, _) in RANGES.items():
        value = getattr(p, name)
        if isinstance(value, Tensor):
            valid = valid & _column(allowed(value))
    return ids.where(valid, -1)[:, 0]


def sample_reference(logits: Tensor, p: Parameters) -> Tensor:
    """ids (B) int64 of logits (B, V): everything sorted, in float64."""
    z = logits.to(_wide(logits.device))
    ranked, order = z.sort(stable=True, dim=-1, descending=True)
    best, best_ids = ranked[:, :1], order[:, :1]
    if not isinstance(p.temperature, Tensor) and p.temperature == 0:
        return _finished(best_ids, best, best_ids, p)
    temperature = torch.as_tensor(p.temperature, dtype=z.dtype, device=z.device).clamp(min=LEAST_TEMPERATURE)
    weights = ((ranked - best) / temperature.reshape(-1, 1)).exp()  # the likeliest has 1
    whole = weights.sum(-1, keepdim=True)
    weights = weights.masked_fill(torch.arange(z.shape[-1], device=z.device) >= _column(p.top_k), 0)
    before = weights.cumsum(-1) - weights
    left = whole if p.joint else weights.sum(-1, keepdim=True)
    top_p = torch.as_tensor(p.top_p, device=z.device).to(z.dtype).reshape(-1, 1)
    weights = weights.masked_fill((before >= top_p * left) & (top_p < 1), 0)
    weights = weights.masked_fill(weights < _column(p.min_p), 0)
    ids = _invert(torch.zeros_like(weights).scatter(-1, order, weights), uniform(p, len(z), z.device))
    return _finished(ids, best, best_ids, p)


# --- PyTorch's operators --------------------------------------------------------------------------------------------


def _heaviest(weights: Tensor, count: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """The `count` heaviest of each row, or more, the heaviest first. A GPU sorts the rows: nothing waits for the count."""
    if not weights.is_cpu:
        values, ids = weights.sort(descending=True)
        return values, ids
    values, ids = weights.topk(max(1, min(int(count()), weights.shape[-1])))
    return values, ids


def _sample_torch(logits: Tensor, p: Parameters) -> Tensor:
    """The same distribution (of equal logits at a cut, any); other tokens for the same seed, since what the filters leave is
    inverted in the order of the logits."""
    best, best_ids = logits.max(-1, keepdim=True)  # on the CPU twice as fast as argmax, and NaN comes through
    if not isinstance(p.temperature, Tensor) and p.temperature == 0:
        return _finished(best_ids, best, best_ids, p)
    wide, vocabulary = _wide(logits.device), logits.shape[-1]
    if isinstance(p.temperature, Tensor):
        temperature: Any = _column(p.temperature.clamp(min=LEAST_TEMPERATURE))
    else:
        temperature = max(p.temperature, LEAST_TEMPERATURE)
    weights = whole = ((logits - best).float() / temperature).exp()
    ids = None
    if isinstance(p.top_k, Tensor):
        weights, ids = _heaviest(weights, p.top_k.max)
        rank = torch.arange(weights.shape[-1], device=weights.device)
        weights = weights.masked_fill(rank >= _column(p.top_k), 0)
    elif p.top_k < vocabulary:
        weights, ids = weights.topk(p.top_k)
    if isinstance(p.top_p, Tensor) or p.top_p < 1:
        top_p = _column(p.top_p)
        total = (whole if p.joint else weights).sum(-1, keepdim=True, dtype=wide)
        if ids is None:
            # What lies below this weighs less than 1 - top_p even together: top_p is reached without it.
            above = weights > total * ((1 - top_p) / (2 * vocabulary))
            weights, ids = _heaviest(weights, lambda: above.sum(-1).max())
        before = weights.cumsum(-1, dtype=wide) - weights
        weights = weights.masked_fill(before >= top_p * total, 0)
    if isinstance(p.min_p, Tensor) or p.min_p > 0:
        weights = weights.masked_fill(weights < _column(p.min_p), 0)
    # Inversion of the distribution function: on the CPU 20 times faster than torch.multinomial, which draws a
    # random number per token of the vocabulary.
    if p.seed is None:
        u = torch.rand((len(logits), 1), dtype=wide, device=logits.device, generator=p.generator)
    else:
        u = uniform(p, len(logits), logits.device)
    choice = _invert(weights, u)
    return _finished(choice if ids is None else ids.gather(-1, choice), best, best_ids, p)


# --- registered op: csrc/sampling.cpp -------------------------------------------------------------------------------


extension_fake("sample_rows", lambda logits, *parameters: logits.new_empty(logits.shape[:1], dtype=torch.int64))


def _either(value: Tensor | float | int) -> tuple[Tensor | None, float | int]:
    """A parameter as the operator takes it: a tensor, or a number in its place."""
    return (value, 0) if isinstance(value, Tensor) else (None, value)


def _sample_rows(logits: Tensor, p: Parameters, lanes: int = 0) -> Tensor:
    """`lanes`: floats of a vector register, for tests of each instruction set; 0 takes the widest."""
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        logits = logits.float()
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    seed = _new_seed(p.generator, logits.device) if p.seed is None else p.seed
    return torch.ops.wikigpt.sample_rows(
        logits.detach(), *_either(p.temperature), *_either(p.top_k), *_either(p.top_p), *_either(p.min_p),
        *_either(seed), *_either(p.offset), p.joint, lanes,
    )  # fmt: skip


register(
    "sample",
    Implementation("cuda", _sample_rows, in_extension("cuda", "sample_rows")),
    Implementation("cpu", _sample_rows, in_extension("cpu", "sample_rows")),
    Implementation("torch", _sample_torch),
    Implementation("reference", sample_reference),
)


# --- public ---------------------------------------------------------------------------------------------------------


def _check_tensor(name: str, value: Tensor, logits: Tensor, integer: bool) -> None:
    narrow = value.is_floating_point() and value.dtype not in FLOATS
    if value.dtype == torch.bool or value.is_complex() or narrow or (integer and value.is_floating_point()):
        raise TypeError(f"{name}: got dtype {value.dtype}, allowed are {'integers' if integer else 'numbers'}")
    if value.device != logits.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, logits are on {logits.device}")
    if value.dim() > 0 and value.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, allowed are () and that of the rows, {tuple(logits.shape[:-1])}"
        )


def _number(name: str, value: Any, integer: bool) -> Any:
    """A number of any type, numpy's included, as int or float."""
    if type(value) is int or (type(value) is float and not integer):
        return value if integer else float(value)
    number: Any = value.item() if getattr(value, "shape", None) == () else value
    wanted: Any = numbers.Integral if integer else numbers.Real
    if isinstance(number, bool) or not isinstance(number, wanted):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed are {'int' if integer else 'float'} and tensors")
    return int(number) if integer else float(number)


def _parameter(name: str, value: Any, logits: Tensor, check: bool) -> Any:
    allowed, text = RANGES[name]
    integer = name == "top_k"
    if isinstance(value, Tensor):
        _check_tensor(name, value, logits, integer)
        if check and not bool(allowed(value).all()):
            wrong = value[~allowed(value)].reshape(-1)[0].item()
            raise ValueError(f"{name}: got {wrong}, must be {text}")
        dtype = torch.int64 if integer else torch.float64 if value.dtype == torch.float64 else torch.float32
        return value.to(dtype).expand(logits.shape[:-1]).reshape(-1).contiguous()
    value = _number(name, value, integer)
    if not allowed(value):
        raise ValueError(f"{name}: got {value}, must be {text}")
    return min(value, logits.shape[-1]) if integer else value


def _counter(name: str, value: Any, logits: Tensor) -> Any:
    if isinstance(value, Tensor):
        _check_tensor(name, value, logits, integer=True)
        return value.to(torch.int64).reshape(-1).contiguous()
    value = _number(name, value, integer=True)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name}: got {value}, must have at most 64 bits")
    return value if value < 2**63 else value - 2**64


def sample(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    check_nan: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A token id for each row of logits (..., V), of shape (...) and dtype int64.

    Of softmax(logits / temperature), top_k keeps the k most likely tokens, then top_p the fewest that have this part of their
    probability together (Holtzman et al. 2020), then min_p those with at least this fraction of the likeliest one's (Nguyen et
    al. 2024). Temperature 0 takes the most likely token. Among equal logits the lower index comes first. A top_k beyond the
    vocabulary keeps everything.

    Each parameter is a number or a tensor on the device of logits, with one number (shape ()) or one for each row; a row's
    filter is off with top_k = V, top_p = 1, min_p = 0. logits: any floating dtype, any strides; float64 is rounded to float32.

    Randomness: `generator` (None: PyTorch's own of the device) gives a seed, on the device, so that nothing waits for it and a
    CUDA graph draws anew at each replay. With `seed` (and `offset`, 0 by default) the tokens are a function of the arguments,
    the same on the CPU and on a GPU, in any batch and with any number of threads: row i of a call with one seed draws with
    (seed, offset, i), a row with a seed of its own (tensor (B)) with (seed, offset, 0). A generator is not used then.

    A row that is no distribution (NaN, +inf or nothing but -inf) raises ValueError on the CPU, under `debug_checks()` and with
    check_nan=True, which waits for the device; otherwise (on a GPU, or under torch.compile) its id is -1, and so it is for a
    parameter out of range in a tensor. Numbers out of range raise ValueError always, what has a wrong type TypeError, as does
    a tensor or generator of another device ValueError.

    Backend "torch" has the same distribution and other tokens for a seed.
    """
    return _sample(logits, temperature, top_k, top_p, min_p, generator, seed, offset, check_nan, backend, joint=False)


def _sample(
    logits: Tensor,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    generator: torch.Generator | None,
    seed: Any,
    offset: Any,
    check_nan: bool,
    backend: str | None,
    joint: bool,
) -> Tensor:
    check_float("logits", logits)
    if logits.dim() == 0 or not 0 < logits.shape[-1] <= 2**30:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, must be (..., V) with V from 1 to 2^30")
    device = logits.device
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}, need a torch.Generator")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: got one on {generator.device}, logits are on {device}")
    check = (check_nan or checks_values(device.type)) and not logits.is_meta
    p = Parameters(
        _parameter("temperature", temperature, logits, check),
        logits.shape[-1] if top_k is None else _parameter("top_k", top_k, logits, check),
        1.0 if top_p is None else _parameter("top_p", top_p, logits, check),
        0.0 if min_p is None else _parameter("min_p", min_p, logits, check),
        None if seed is None else _counter("seed", seed, logits),
        0 if offset is None else _counter("offset", offset, logits),
        joint,
        generator,
    )
    function = choose("sample", device.type, backend)
    shape = logits.shape[:-1]
    if shape.numel() == 0:
        return torch.empty(shape, dtype=torch.int64, device=device)
    ids = function(logits if logits.dim() == 2 else logits.reshape(shape.numel(), logits.shape[-1]), p)
    if check and int(ids.min()) < 0:
        row = int((ids < 0).nonzero()[0])
        raise ValueError(f"logits: row {row} has NaN, +inf or nothing but -inf")
    return ids if logits.dim() == 2 else ids.reshape(shape)


def _check_indices(logits: Tensor, indices: Tensor) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, need (B, V) with indices")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices: got dtype {indices.dtype}, allowed are int32 and int64")
    if indices.dim() != 1 or indices.device != logits.device:
        raise ValueError(f"indices: got shape {tuple(indices.shape)} on {indices.device}, need (B,) on {logits.device}")
    if checks_values(logits.device.type) and ((indices < 0) | (indices >= logits.shape[0])).any():
        raise ValueError(f"indices: got {indices.tolist()}, logits have {logits.shape[0]} rows")


def top_k_top_p_sampling_from_logits(
    logits: Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """flashinfer's function of this name, on top of `sample`: ids (B) of logits (B, V).

    filter_apply_order: "top_k_first" as `sample`; "joint" takes top_p's mass of the whole row, and keeps what both filters
    keep. indices (B) int: the row of logits that each id is drawn from (a copy of the rows). The result is always
    deterministic; ids are int64 and other ones than flashinfer's for a seed. Errors as in `sample`.
    """
    if filter_apply_order not in ("top_k_first", "joint"):
        raise ValueError(f"filter_apply_order: got {filter_apply_order!r}, allowed are 'top_k_first' and 'joint'")
    if indices is not None:
        check_tensors("logits indices", (logits, indices))
        _check_indices(logits, indices)
        logits = logits.index_select(0, indices)
    joint = filter_apply_order == "joint"
    return _sample(logits, 1.0, top_k, top_p, None, generator, seed, offset, check_nan, None, joint)


__all__ = ["sample", "sample_reference", "top_k_top_p_sampling_from_logits"]
