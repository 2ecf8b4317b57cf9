"""The public attention functions: they validate, choose an implementation and document."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._checks import FLOATS, as_float, as_int, check_tensors, has_functions
from .._dispatch import Implementation, checks_values, choose, debug_checks, only_on, register, why_not_triton
from .op import attention, seed_for
from .reference import MAX_HEAD_DIM, Inputs, laid_out_like, visible

# --- checks ---------------------------------------------------------------------------------------------------------


def check(x: Inputs) -> Inputs:
    """The same problem, or ValueError or TypeError that names the argument, what came and what is allowed.

    Looks at shapes, dtypes and devices only: values on a device would need a synchronisation (see `debug_checks`).
    """
    rank = 4 if x.cu_seqlens_q is None else 3
    layout = "(batch, positions, heads, head_dim)" if rank == 4 else "(tokens, heads, head_dim)"
    dtype, device = x.q.dtype, x.q.device
    if dtype not in FLOATS:
        raise TypeError(f"q: got dtype {dtype}, allowed are float16, bfloat16, float32 and float64")
    for name, tensor in (("q", x.q), ("k", x.k), ("v", x.v)):
        if tensor.dim() != rank:
            raise ValueError(f"{name}: got {tensor.dim()} dimensions, need {rank}: {layout}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, q has {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: got device {tensor.device}, q is on {device}")
        if not 0 < tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: got head_dim {tensor.shape[-1]}, allowed are 1 to {MAX_HEAD_DIM}")
    if x.k.shape[-1] != x.q.shape[-1]:
        raise ValueError(f"k: got head_dim {x.k.shape[-1]}, q has {x.q.shape[-1]}")
    if x.v.shape[:-1] != x.k.shape[:-1]:
        raise ValueError(f"v: got shape {tuple(x.v.shape)}, k has {tuple(x.k.shape)}")
    if rank == 4 and x.k.shape[0] != x.q.shape[0]:
        raise ValueError(f"k: got batch {x.k.shape[0]}, q has {x.q.shape[0]}")
    heads, groups = x.q.shape[-2], x.k.shape[-2]
    if heads != groups and (groups == 0 or heads % groups):
        raise ValueError(f"k: got {groups} heads for {heads} query heads, they must divide the query's")
    _check_lengths(x)
    # Comparisons, because torch.compile cannot trace math.isfinite of a number that changes.
    if not 0 <= x.softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: got {x.softmax_scale}, must be finite and 0 or more (for a negative one negate q)")
    if not 0 <= x.softcap < math.inf:
        raise ValueError(f"softcap: got {x.softcap}, must be finite and 0 or more")
    if not 0.0 <= x.dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {x.dropout_p}, must be at least 0 and below 1")
    for name, numbers in (("alibi_slopes", x.alibi_slopes), ("s_aux", x.s_aux)):
        if numbers is None:
            continue
        shapes = [(heads,), (x.batch, heads)] if name == "alibi_slopes" else [(heads,)]
        if tuple(numbers.shape) not in shapes:
            raise ValueError(f"{name}: got shape {tuple(numbers.shape)}, need {' or '.join(map(str, shapes))}")
        if not numbers.is_floating_point() or numbers.device != x.q.device:
            raise ValueError(f"{name}: got {numbers.dtype} on {numbers.device}, need floating point on {x.q.device}")
    if x.alibi_slopes is not None and x.alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes: requires_grad is set, but slopes get no gradient; pass them as attn_bias")
    _check_masks(x, heads)
    return x


def _check_masks(x: Inputs, heads: int) -> None:
    s, t = x.lengths
    for name, tensor in (("attn_bias", x.bias), ("attn_mask", x.mask)):
        if tensor is None:
            continue
        if x.cu_seqlens_q is not None:
            raise ValueError(f"{name}: does not combine with cu_seqlens, as packed sequences have no common rectangle")
        if tensor.device != x.q.device:
            raise ValueError(f"{name}: got device {tensor.device}, q is on {x.q.device}")
        full = (x.q.shape[0], heads, s, t)
        if tensor.dim() > 4 or any(n not in (1, m) for n, m in zip(reversed(tensor.shape), reversed(full))):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, must broadcast to {full}")
    if x.mask is not None and x.mask.dtype != torch.bool:
        raise TypeError(f"attn_mask: got dtype {x.mask.dtype}, allowed is bool (an additive mask is attn_bias)")
    if x.bias is not None and x.bias.dtype not in FLOATS:
        raise TypeError(f"attn_bias: got dtype {x.bias.dtype}, allowed are float16, bfloat16, float32 and float64")


def _check_lengths(x: Inputs) -> None:
    if (x.cu_seqlens_q is None) != (x.cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k: got one of them, need both or neither")
    sizes = (("cu_seqlens_q", x.cu_seqlens_q, 1), ("cu_seqlens_k", x.cu_seqlens_k, 1), ("seqused_k", x.seqused_k, 0))
    for name, tensor, extra in sizes:
        if tensor is None:
            continue
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, allowed is int32")
        if tensor.dim() != 1 or tensor.shape[0] < extra:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, need (batch{' + 1' if extra else ''},)")
        if tensor.shape[0] - extra != x.batch:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, need ({x.batch + extra},)")
        if tensor.device != x.q.device:
            raise ValueError(f"{name}: got device {tensor.device}, q is on {x.q.device}")
    if x.cu_seqlens_q is not None and (x.max_seqlen_q < 0 or x.max_seqlen_k < 0):
        raise ValueError(f"max_seqlen_q, max_seqlen_k: got {x.max_seqlen_q} and {x.max_seqlen_k}, must be 0 or more")
    if x.cu_seqlens_q is None and x.seqused_k is None:
        return
    if checks_values(x.q.device.type) and readable(x.cu_seqlens_q, x.cu_seqlens_k, x.seqused_k):
        check_values(x)


def readable(*tensors: Tensor | None) -> bool:
    """Whether the values can be looked at: not of a fake tensor, nor of one that torch.func maps."""
    if torch._C._are_functorch_transforms_active() and any(
        tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors
    ):
        return False
    kinds = [type(tensor) for tensor in tensors if tensor is not None]
    return all(kind is Tensor or kind.__torch_dispatch__ is Tensor.__torch_dispatch__ for kind in kinds)


def check_values(x: Inputs) -> None:
    """Checks of the values of cu_seqlens and seqused_k. Always made on the CPU; on a GPU, where they wait for the device,
    only by `wikigpt.kernels.debug_checks()`."""
    pairs = (("cu_seqlens_q", x.cu_seqlens_q, x.q, x.max_seqlen_q), ("cu_seqlens_k", x.cu_seqlens_k, x.k, x.max_seqlen_k))
    for name, tensor, tokens, longest in pairs:
        if tensor is None:
            continue
        ends = tensor.tolist()
        if ends[0] != 0 or ends[-1] > tokens.shape[0] or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"{name}: got {ends}, must rise from 0 to at most the number of tokens {tokens.shape[0]}")
        most = max((b - a for a, b in itertools.pairwise(ends)), default=0)
        if most > longest:
            raise ValueError(f"max_seqlen{name[-2:]}: got {longest}, {name} has a sequence of {most}")
    if x.seqused_k is not None:
        used, keys = x.seqused_k.tolist(), [x.lengths[1]] * x.batch
        if x.cu_seqlens_k is not None:
            keys = [b - a for a, b in itertools.pairwise(x.cu_seqlens_k.tolist())]
        if any(not 0 <= n <= most for n, most in zip(used, keys)):
            raise ValueError(f"seqused_k: got {used}, must be 0 or more and at most {keys}, the keys of each sequence")


def casting_to(device_type: str) -> torch.dtype | None:
    """The dtype of autocast where it is on for such a device."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on for their device, as PyTorch's own attention does."""
    dtype = casting_to(tensors[0].device.type)
    if dtype is None or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(dtype) for tensor in tensors)


def _float(tensor: Tensor | None) -> Tensor | None:
    # What is no float is refused later, by its name.
    return tensor.float() if tensor is not None and tensor.is_floating_point() else tensor


def _at_least_2d(mask: Tensor) -> Tensor:
    return mask if mask.dim() > 1 else torch.atleast_2d(mask)


def changing(softmax_scale: float | None, default: float, softcap: float) -> Tensor | None:
    """softmax_scale (or its default) and softcap as a tensor (2), where torch.compile sees numbers that change from call to
    call. As arguments of an operator they would become constants of the graph, and every value would be compiled again."""
    if not torch.compiler.is_compiling():
        return None
    # By its full name, because importing it takes a second.
    static = torch.fx.experimental.symbolic_shapes.has_static_value
    if (softmax_scale is None or static(softmax_scale)) and static(softcap):
        return None
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * (default if softmax_scale is None else softmax_scale), one * softcap])


# --- PyTorch's signature --------------------------------------------------------------------------------------------


def _torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.float32 and query.dtype == torch.float64:
        # PyTorch's kernel for the CPU takes a float32 mask of one column, beside float64, for other numbers.
        attn_mask = attn_mask.to(query.dtype)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def covered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Inputs | None:
    """The problem without its seed, all dimensions before the heads joined to one batch; None where it is not for our
    kernels."""
    rank = query.dim()
    if not (2 < rank == key.dim() == value.dim()):
        return None
    if not enable_gqa and key.shape[-3] not in (1, query.shape[-3]):
        return None
    if attn_mask is not None and (
        is_causal or attn_mask.dtype not in (torch.bool, query.dtype, torch.float32) or attn_mask.dim() > rank
    ):
        return None
    if rank != 4:
        lead = query.shape[:-3]
        if not lead == key.shape[:-3] == value.shape[:-3]:
            return None
        if attn_mask is not None and rank > 4 and attn_mask.dim() > 3:
            if any(n not in (1, wanted) for n, wanted in zip(reversed(attn_mask.shape[:-3]), reversed(lead))):
                return None
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
        query, key, value = (t.reshape(math.prod(lead), *t.shape[-3:]) for t in (query, key, value))
    additive = attn_mask is not None and attn_mask.dtype != torch.bool
    x = Inputs(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        bias=attn_mask if additive else None,
        mask=None if additive else attn_mask,
        dropout_p=dropout_p,
        softmax_scale=1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale,
        window_right=0 if is_causal else -1,
        top_left=True,
    )
    try:
        return check(x)
    except (TypeError, ValueError):
        return None


def seeded(x: Inputs) -> Inputs:
    return replace(x, seed=seed_for(x.dropout_p, x.q.device)) if x.dropout_p > 0 else x


def as_pytorchs(out: Tensor, query: Tensor) -> Tensor:
    """The output (B, S, H, Dv) of the problem that `covered` made of `query` and others, in query's dimensions and layout."""
    out = out.transpose(1, 2)
    return laid_out_like(query, out if query.dim() == 4 else out.reshape(*query.shape[:-1], out.shape[-1]))


def _ours(backend: str) -> Any:
    def function(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *options: Any) -> Tensor:
        q, k, v = autocast(query, key, value)
        x = covered(q, k, v, attn_mask, *options)
        if x is None:
            return _torch(query, key, value, attn_mask, *options)
        return as_pytorchs(attention(seeded(x), backend, need_lse=False)[0], q)

    return function


def _has_rows_far_from_zero(mask: Tensor) -> bool:
    """Whether an additive mask lifts or lowers a whole row (finfo.min, for a query that is padding). PyTorch's fused backward,
    exp(s - lse), takes 1 for each weight of such a row, as lse has no digits left for the logarithm of its sum."""
    if mask.numel() == 0 or torch.compiler.is_compiling() or not readable(mask):
        return mask.numel() > 0
    top = mask.detach().amax(-1)
    if torch.linalg.vector_norm(top, math.inf).item() <= 1e3:  # nearly always; what follows takes twice as long
        return False
    return bool((top.isfinite() & (top.abs() > 1e3)).any())


def _cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    # PyTorch's fused attention for the CPU has neither dropout nor the gradient of a mask: there it builds the S x T matrix.
    # A scale of 0 makes NaN of its masked scores.
    ours = dropout_p > 0.0 or scale == 0
    if attn_mask is not None and attn_mask.dtype != torch.bool and torch.is_grad_enabled() and not ours:
        grad = query.requires_grad or key.requires_grad or value.requires_grad
        ours = attn_mask.requires_grad or (grad and _has_rows_far_from_zero(attn_mask))
    if not ours and _faster_in_float32(query, key, value):
        query, key, value = query.float(), key.float(), value.float()
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.float()
        with torch.autocast("cpu", enabled=False):
            return _torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa).bfloat16()
    function = _ours("cpu") if ours else _torch
    return function(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


AMX = torch.cpu._is_amx_tile_supported()
FEW_KEYS = 256


def _faster_in_float32(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """For a few keys PyTorch's backward in bf16 takes up to 2.4 times its time in float32, measured without AMX."""
    if AMX or query.dtype != torch.bfloat16 or max(query.shape[-2], key.shape[-2]) > FEW_KEYS or not torch.is_grad_enabled():
        return False
    return query.requires_grad or key.requires_grad or value.requires_grad


register(
    "attention",
    Implementation("triton", _ours("triton"), why_not_triton),
    Implementation("cpu", _cpu, only_on("cpu")),
    Implementation("torch", _torch),
    Implementation("reference", _ours("reference")),
)


def _check_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    """ValueError that names the argument, for what PyTorch refuses too or, unchecked, reads beyond its tensors for."""
    casting = casting_to(query.device.type) is not None  # it makes the dtypes equal
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(f"{name}: got {tensor.dim()} dimensions, need 2 or more: (..., positions, head_dim)")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, allowed are float16, bfloat16, float32 and float64")
        if tensor.dtype != query.dtype and not casting:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, query has {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, query is on {query.device}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key: got head_dim {key.shape[-1]}, query has {query.shape[-1]}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value: got shape {tuple(value.shape)}, key has {tuple(key.shape)}")
    dropout_p = as_float("dropout_p", dropout_p)
    if attn_mask is not None:
        fits = attn_mask.dtype in (torch.bool, query.dtype, torch.float32) or (casting and attn_mask.is_floating_point())
        if not fits:
            raise ValueError(f"attn_mask: got dtype {attn_mask.dtype}, allowed are bool, float32 and query's {query.dtype}")
        if attn_mask.device != query.device:
            raise ValueError(f"attn_mask: got device {attn_mask.device}, query is on {query.device}")
    if attn_mask is not None and is_causal:
        raise ValueError("is_causal: cannot be True when attn_mask is given")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, must be from 0 to 1")
    scores = _scores_shape(query, key, value, enable_gqa)
    if attn_mask is None:
        return
    if attn_mask.dim() > len(scores) or any(n not in (1, m) for n, m in zip(reversed(attn_mask.shape), reversed(scores))):
        raise ValueError(f"attn_mask: got shape {tuple(attn_mask.shape)}, must broadcast to {scores}")


def _scores_shape(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """(..., S, T), where all but the last two dimensions of query, key and value broadcast, heads with enable_gqa repeated."""
    leads = [list(tensor.shape[:-2]) for tensor in (query, key, value)]
    for name, lead in zip(("key", "value"), leads[1:]):
        if enable_gqa and not (leads[0] and lead):
            raise ValueError(
                f"enable_gqa: needs heads, which query ({query.dim()} dimensions) or {name} ({len(lead) + 2}) lacks"
            )
        if not lead or not leads[0] or lead[-1] == leads[0][-1]:
            continue
        heads, groups = leads[0][-1], lead[-1]
        if enable_gqa and groups > 0 and heads % groups == 0:
            lead[-1] = heads
        elif enable_gqa or 1 not in (heads, groups):
            way_out = "must divide the query's" if enable_gqa else "need enable_gqa=True"
            raise ValueError(f"{name}: got {groups} heads for {heads} query heads, they {way_out}")
    try:
        torch.broadcast_shapes(*leads)
        return (*torch.broadcast_shapes(*leads[:2]), query.shape[-2], key.shape[-2])
    except RuntimeError:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"query, key and value: got shapes {shapes}, whose leading dimensions do not broadcast") from None


def _is_causal_bias(tensor: Tensor | None) -> bool:
    """By name, because importing its module takes a second: it imports the compiler."""
    return type(tensor).__module__ == "torch.nn.attention.bias"


def _translated(query: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor | None, bool]:
    """(attn_mask, is_causal) with a CausalBias as the flag or the boolean mask that it stands for."""
    if attn_mask is None or not _is_causal_bias(attn_mask):
        return None if attn_mask is None else _at_least_2d(attn_mask), is_causal
    if is_causal:
        raise ValueError("is_causal: cannot be True when attn_mask is given")
    bias: Any = attn_mask
    s, t = bias.seq_len_q, bias.seq_len_kv
    if bias.variant.name == "UPPER_LEFT" or s == t:
        return None, True
    return visible(s, t, -1, 0, t - s, query.device), False


def _by_math(refusal: ValueError, *arguments: Any) -> Tensor:
    """PyTorch's attention by its plain operators; `refusal` where they refuse too."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return _torch(*arguments)
    except RuntimeError:
        raise refusal from None


def _is_simple(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether it is a mask for a simple query and key, without need of `_check_sdpa`."""
    if type(mask) is not Tensor or mask.is_nested or mask.dtype not in (torch.bool, query.dtype) or mask.device != query.device:
        return False
    (batch, heads, s, _), t, shape = query.shape, key.shape[2], mask.shape
    if len(shape) == 4:
        if shape[0] not in (1, batch) or shape[1] not in (1, heads):
            return False
    elif len(shape) != 2:
        return False
    return shape[-2] in (1, s) and shape[-1] in (1, t)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with our choice of implementation.

    query (B, H, S, D), key (B, G, T, D), value (B, G, T, Dv); attn_mask boolean (True: takes part; whole masked blocks are
    skipped) or additive (it gets a gradient), broadcastable to (B, H, S, T); scale defaults to 1 / sqrt(D); is_causal aligns
    the diagonal at the top left, as PyTorch does. Returns (B, H, S, Dv), in memory in the order of query's dimensions.

    Whatever else PyTorch's takes goes to PyTorch's, on every backend: other numbers of dimensions, batches and heads that
    broadcast, head_dim 0, nested and distributed tensors, a negative scale, dropout_p = 1.
    Raises ValueError where ranks, shapes or dtypes do not fit, or where attn_mask and is_causal are both given; TypeError for
    what is no tensor.
    """
    # Comparisons for what is nearly always so: generation calls this thousands of times a second.
    simple = (
        type(query) is type(key) is type(value) is Tensor
        and query.dtype == key.dtype == value.dtype
        and isinstance(dropout_p, (float, int))
        and 0.0 <= dropout_p < 1.0
        and not (query.is_nested or key.is_nested or value.is_nested)
    )
    if simple:
        q, k = query.shape, key.shape
        simple = len(q) == len(k) == 4 and value.shape == k and q[0] == k[0] and q[3] == k[3] and query.dtype in FLOATS
        simple = simple and k[1] > 0 and (q[1] == k[1] or (enable_gqa and q[1] % k[1] == 0))
    if scale is not None:
        scale = as_float("scale", scale)
    if not simple or (attn_mask is not None and (is_causal or not _is_simple(attn_mask, query, key))):
        for name, tensor in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
            if not isinstance(tensor, Tensor) and not (tensor is None and name == "attn_mask"):
                raise TypeError(f"{name}: got {type(tensor).__name__}, need a tensor")
            if _is_causal_bias(tensor) and name != "attn_mask":
                raise TypeError(f"{name}: got a CausalBias, which goes with attn_mask")
        attn_mask, is_causal = _translated(query, attn_mask, is_causal)
        given = [tensor for tensor in (query, key, value, attn_mask) if tensor is not None]
        if any(has_functions(tensor) or is_traceable_wrapper_subclass(tensor) for tensor in given):
            return _torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        try:
            _check_sdpa(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        except ValueError as refusal:
            no_heads = enable_gqa and 0 in (key.shape[-3:-2] + value.shape[-3:-2])  # PyTorch divides by their number
            if no_heads or (value.numel() > 0 and 0 not in query.shape[:-1]):
                raise
            # Where there is nothing to compute, PyTorch 2.13 gives zeros, whatever else does not fit.
            return _by_math(refusal, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if query.shape[-3:-2] == (0,):  # PyTorch 2.11, where it chooses a kernel or repeats heads, divides by their number
            without_heads = ValueError(f"query: got shape {tuple(query.shape)}, without heads")
            return _by_math(without_heads, query, key, value, attn_mask, dropout_p, is_causal, scale, False)
    function = choose("attention", query.device.type, backend)
    out: Tensor = function(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return out


# --- flash-attn's signatures ----------------------------------------------------------------------------------------


def _window(window_size: Any, causal: bool) -> tuple[int, int]:
    """(left, right); None, for both or one, is no limit."""
    if window_size == (-1, -1):
        return -1, 0 if causal else -1
    try:
        left, right = (-1, -1) if window_size is None else (-1 if n is None else n for n in window_size)
        fits = int(left) == left and int(right) == right and left >= -1 and right >= -1
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(f"window_size: got {window_size}, need (left, right), each 0 or more, or -1 for no limit")
    # As in flash-attn: a causal window has no keys on the right, whatever was asked for.
    return int(left), 0 if causal else int(right)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    s_aux: Tensor | None,
    return_attn_probs: bool,
    backend: str | None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
    **packed: Any,
) -> Any:
    check_tensors(
        "q k v alibi_slopes s_aux attn_bias attn_mask seqused_k", (q, k, v),
        (alibi_slopes, s_aux, attn_bias, attn_mask, seqused_k),
    )  # fmt: skip
    q, k, v = autocast(q, k, v)
    left, right = _window(window_size, causal)
    dropout_p = 0.0 if dropout_p is None else as_float("dropout_p", dropout_p)
    softcap = 0.0 if softcap is None else as_float("softcap", softcap)
    softmax_scale = None if softmax_scale is None else as_float("softmax_scale", softmax_scale)
    default = 1 / math.sqrt(max(q.shape[-1], 1)) if q.dim() else 1.0
    x = Inputs(
        q,
        k,
        v,
        bias=None if attn_bias is None else _at_least_2d(attn_bias),
        mask=None if attn_mask is None else _at_least_2d(attn_mask),
        alibi_slopes=_float(alibi_slopes),
        s_aux=_float(s_aux),
        seqused_k=seqused_k,
        seed=seed_for(dropout_p, q.device),
        changing=changing(softmax_scale, default, softcap),
        dropout_p=dropout_p,
        softmax_scale=default if softmax_scale is None else softmax_scale,
        window_left=left,
        window_right=right,
        softcap=softcap,
        **packed,
    )
    out, lse = attention(check(x), backend, need_lse=return_attn_probs)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Flash attention with the signature of the flash-attn package, plus sinks, bias and mask (Dao 2023).

    q (B, S, H, D), k (B, T, G, D), v (B, T, G, Dv) in float16, bfloat16 or float32, H a multiple of G, D and Dv to 1,024.
    softmax_scale defaults to 1 / sqrt(D). causal and window_size (left, right) count from the diagonal that ends at the last
    key (bottom right). softcap c > 0 replaces scores by c tanh(score / c). alibi_slopes (H) or (B, H). s_aux (H): one logit
    more in every softmax, without a value. attn_bias and attn_mask (bool, True: takes part) broadcast to (B, H, S, T); scores
    are float32, and what is added to them is taken in float32 too.
    seqused_k (B, int32): how many keys of each sequence are in use. Everything combines; q, k, v, attn_bias and s_aux get
    gradients. The backward is always deterministic, so `deterministic` changes nothing. None for an option is its default.

    Returns out (B, S, H, Dv); with return_attn_probs=True (out, lse (B, H, S) float32, None). lse has a gradient; a row
    without any key has out 0 and lse -inf.
    Raises ValueError or TypeError for ranks, shapes, dtypes, devices and options that do not fit, and for a tensor whose type
    has torch functions of its own (CausalBias, MaskedTensor, nested).
    """
    return _flash(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux, return_attn_probs, backend,
        attn_bias=attn_bias, attn_mask=attn_mask, seqused_k=seqused_k,
    )  # fmt: skip


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`flash_attn_func` of qkv (B, S, 3, H, D); the other arguments are the same, in the same order."""
    check_tensors("qkv", (qkv,))
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, need (batch, positions, 3, heads, head_dim)")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`flash_attn_func` of q (B, S, H, D) and kv (B, T, 2, G, D); the other arguments are the same, in the same order."""
    check_tensors("kv", (kv,))
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv: got shape {tuple(kv.shape)}, need (batch, positions, 2, heads, head_dim)")
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    seqused_k: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Flash attention over sequences of different lengths, packed one after the other without padding.

    q (sum of S, H, D), k (sum of T, G, D), v (sum of T, G, Dv); cu_seqlens_q and cu_seqlens_k (B + 1, int32): where each
    sequence begins, from 0 on; max_seqlen_q and max_seqlen_k: the longest. Tokens behind the last sequence (of a batch that is
    padded to a fixed size, as CUDA graphs need) give out 0 and lse -inf, and get gradients of 0. Other arguments as
    `flash_attn_func`. Returns out (sum of S, H, Dv); with return_attn_probs=True (out, lse (H, sum of S), None).
    Raises ValueError or TypeError as `flash_attn_func`; the values of cu_seqlens and seqused_k are checked on the CPU, and on a
    GPU only under `debug_checks()`, because reading them waits for the device. Unchecked, a seqused_k beyond its sequence is
    cut off; cu_seqlens that do not rise, or that pass the tokens, read and write elsewhere in memory.
    """
    check_tensors("cu_seqlens_q cu_seqlens_k", (cu_seqlens_q, cu_seqlens_k))
    if max_seqlen_q is None or max_seqlen_k is None:
        name = "max_seqlen_q" if max_seqlen_q is None else "max_seqlen_k"
        raise TypeError(f"{name}: got None, need the length of the longest sequence")
    max_seqlen_q, max_seqlen_k = as_int("max_seqlen_q", max_seqlen_q), as_int("max_seqlen_k", max_seqlen_k)
    return _flash(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux, return_attn_probs, backend,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any) -> Any:
    """`flash_attn_varlen_func` of qkv (sum of S, 3, H, D); the other arguments are the same, in the same order."""
    check_tensors("qkv", (qkv,))
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, need (tokens, 3, heads, head_dim)")
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


__all__ = [
    "debug_checks",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "scaled_dot_product_attention",
]
