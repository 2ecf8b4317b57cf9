"""Our attention under PyTorch's own names, so that models run it with no line changed.

    torch.nn.attention.activate_flash_attention_impl("wikigpt")    until restore_flash_attention_impl()

While active, on CUDA, every `F.scaled_dot_product_attention` (nn.MultiheadAttention, nn.TransformerEncoderLayer and so on) and
every `torch.nn.attention.varlen.varlen_attn` of the process comes here. What ours cannot do goes to the kernel that PyTorch
would have run: dtypes other than float16, bfloat16 and float32, head_dim above 1,024, nested and distributed tensors, batch
sizes that broadcast, calls inside torch.func's transforms; so does everything while flash attention is switched off
(`sdpa_kernel(SDPBackend.MATH)`).

Overridden are two layers of aten. PyTorch's selector sends neither masks nor float32 to its flash operators, so we stand
before the selector, at scaled_dot_product_attention. Below it the flash operators serve those who call them directly:
varlen_attn, DTensor, context parallelism, jagged tensors.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._checks import as_int, check_tensors
from .._dispatch import NAMESPACE, explain, forced_backend
from .functional import as_pytorchs, check, covered, flash_attn_varlen_func, seeded
from .kvcache import flash_attn_with_kvcache
from .op import attention
from .reference import Inputs, laid_out_like

_Result = Any  # what the operator returns, or None: then PyTorch's own kernel is called


def _plain(*tensors: Tensor | None) -> bool:
    """Whether none is a tensor of tensors (DTensor, jagged), which PyTorch takes apart, and the first has a dtype of ours."""
    if any(is_traceable_wrapper_subclass(tensor) for tensor in tensors):
        return False
    return tensors[0] is not None and tensors[0].dtype in (torch.float16, torch.bfloat16, torch.float32)


def _checked(x: Inputs) -> Inputs | None:
    try:
        return check(x)
    except (TypeError, ValueError):
        return None  # PyTorch computes it, or raises in its own words


# --- scaled_dot_product_attention -----------------------------------------------------------------------------------


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> _Result:
    if forced_backend() == "torch" or not torch.backends.cuda.flash_sdp_enabled():
        return None
    if torch._C._are_functorch_transforms_active():
        return None  # a custom operator with a gradient refuses them; what PyTorch takes it apart into does not
    if not _plain(query, key, value, attn_mask):
        return None
    x = covered(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return None if x is None else as_pytorchs(attention(seeded(x))[0], query)


# --- the flash operators --------------------------------------------------------------------------------------------


def _kernel_arguments(x: Inputs) -> list[Any] | None:
    """The arguments of our operator. It is called itself, because below autograd the backward is called by name too."""
    implementation = forced_backend() or ("cpu" if x.q.device.type == "cpu" else "triton")
    return [getattr(x, field.name) for field in fields(Inputs)] + [implementation] if implementation in _WITH_BACKWARD else None


_WITH_BACKWARD = ("cpu", "triton")


def _flash_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    num_splits: int | None = None,  # we never split, so every number of splits gives the same
    **unsupported: Any,  # alibi_slopes, which PyTorch's backward does not get, and block_table
) -> list[Any] | None:
    # With dropout the backward has to come from whoever drew the numbers, and could not know who did.
    if dropout_p > 0 or return_debug_mask or any(option is not None for option in unsupported.values()):
        return None
    if not _plain(query, key, value, cum_seq_q, cum_seq_k, seqused_k) or value.shape[-1] != query.shape[-1]:
        return None
    x = Inputs(
        query,
        key,
        value,
        cu_seqlens_q=cum_seq_q,
        cu_seqlens_k=cum_seq_k,
        seqused_k=seqused_k,
        max_seqlen_q=max_q if cum_seq_q is not None else 0,
        max_seqlen_k=max_k if cum_seq_q is not None else 0,
        softmax_scale=1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale,
        window_left=-1 if window_size_left is None else window_size_left,
        window_right=0 if is_causal else -1 if window_size_right is None else window_size_right,
    )
    return None if _checked(x) is None else _kernel_arguments(x)


def _flash_forward(query: Tensor, *args: Any, **options: Any) -> _Result:
    arguments = _flash_arguments(query, *args, **options)
    if arguments is None:
        return None
    out, lse = getattr(torch.ops, NAMESPACE).attention(*arguments)
    no_seed, no_offset = query.new_empty(2, dtype=torch.uint64), query.new_empty((), dtype=torch.uint64)
    return laid_out_like(query, out), lse, no_seed, no_offset, query.new_empty(0)


def _flash_forward_inplace(out: Tensor, *args: Any, **options: Any) -> _Result:
    result = _flash_forward(*args, **options)
    if result is None:
        return None
    out.copy_(result[0])
    return result[1]


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    **options: Any,
) -> _Result:
    arguments = _flash_arguments(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, **options)
    if arguments is None:
        return None
    backward = getattr(torch.ops, NAMESPACE).attention_backward
    grads = backward(out, logsumexp, grad_out, None, False, *arguments)[:3]
    return tuple(laid_out_like(tensor, grad) for tensor, grad in zip((query, key, value), grads))


def _sdpa_flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> _Result:
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    s, t = query.shape[2], key.shape[2]
    result = _flash_forward(q, k, v, None, None, s, t, dropout_p, is_causal, return_debug_mask, scale=scale)
    if result is None:
        return None
    out, lse, seed, offset, debug_mask = result
    return out.transpose(1, 2), lse, None, None, s, t, seed, offset, debug_mask


def _sdpa_flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    *args: Any,
    scale: float | None = None,
) -> _Result:
    do, q, k, v, o = (tensor.transpose(1, 2) for tensor in (grad_out, query, key, value, out))
    grads = _flash_backward(do, q, k, v, o, logsumexp, None, None, *args, scale=scale)
    return None if grads is None else tuple(grad.transpose(1, 2) for grad in grads)


# --- activation -----------------------------------------------------------------------------------------------------

_OVERRIDES: dict[str, Callable[..., _Result]] = {
    "scaled_dot_product_attention": _sdpa,
    "_scaled_dot_product_flash_attention": _sdpa_flash_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_flash_backward,
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_forward_inplace,  # since torch 2.13
    "_flash_attention_backward": _flash_backward,
}


def _own(operator: str, key: str) -> Any:
    """The kernel in force now; None for a PyTorch without one (the flash operators, where it is built without CUDA)."""
    try:
        return torch.library.get_kernel(f"aten::{operator}", key)
    except RuntimeError:
        return None


def _override(operator: str, key: str, own: Any) -> Callable[..., Any]:
    """The kernel that takes the place of `own` and calls it for what is not ours."""
    function = _OVERRIDES[operator]

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if result is not None:
            return result
        if own is None:
            raise NotImplementedError(f"aten::{operator}: this PyTorch has no kernel of its own for {key}")
        return own.call_boxed(keys, *args, **kwargs)

    return kernel


class _Activation:
    """Overrides in force until `remove()`."""

    def __init__(self, device_key: str) -> None:
        self._operators = [name for name in _OVERRIDES if hasattr(torch.ops.aten, name)]
        # A call that autograd watches never reaches the device's key: PyTorch takes the operator apart before it.
        places = [("scaled_dot_product_attention", f"Autograd{device_key}"), *((name, device_key) for name in self._operators)]
        # All are captured first: a kernel at the device's key puts a stub without a gradient in the place of autograd's.
        kernels = [(*place, _override(*place, _own(*place))) for place in places]
        # In the key of torch.compile's cache on disk stands the call, not who answers it.
        self._tag = f"{NAMESPACE} attention on {device_key}"
        torch.compiler.config.cache_key_tag += self._tag
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
                for operator, key, kernel in kernels:
                    self._library.impl(operator, kernel, key, with_keyset=True, allow_override=True)
            self._forget()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        if self._library is None:
            return
        self._library._destroy()  # at once: a traceback may hold on to us
        self._library = None
        torch.compiler.config.cache_key_tag = torch.compiler.config.cache_key_tag.replace(self._tag, "")
        self._forget()

    def _forget(self) -> None:
        """What was compiled before has the attention of that time in it, and tracing remembers which kernel it found."""
        for name in self._operators:
            getattr(torch.ops.aten, name).default._dispatch_cache.clear()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()


def _activate(device_key: str = "CUDA") -> _Activation:
    """What `activate_flash_attention_impl("wikigpt")` calls. RuntimeError where there is no kernel of ours to run."""
    if not hasattr(torch.library, "get_kernel"):
        raise RuntimeError(
            f"the attention of {NAMESPACE} inside PyTorch needs torch 2.11 or newer, this is {torch.__version__}"
        )
    reasons = [reason for name, reason in explain("flash_attention", device_key.lower()) if name != "reference"]
    if None not in reasons:
        raise RuntimeError(f"the attention of {NAMESPACE} cannot run on {device_key.lower()}: {reasons[0]}")
    return _Activation(device_key)


# Importing only makes the name known; who activates it decides for the whole process.
if hasattr(torch.nn.attention, "register_flash_attention_impl"):  # since torch 2.11
    torch.nn.attention.register_flash_attention_impl(NAMESPACE, register_fn=_activate)


# --- varlen_attn ----------------------------------------------------------------------------------------------------


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """Attention over packed sequences with the signature of `torch.nn.attention.varlen.varlen_attn` (2.13; 2.11's is a part).

    query (sum of S, H, D), key and value (sum of T, G, D) in float16, bfloat16 or float32, D to 1,024; G other than H needs
    enable_gqa=True. cu_seq_q and cu_seq_k (B + 1, int32): where each sequence begins. max_q and max_k: the longest.
    scale defaults to 1 / sqrt(D). window_size (left, right) counts from the diagonal that ends at the last key of each
    sequence; (-1, 0) is causal. seqused_k (B, int32): how many keys of each sequence are in use (with a gradient, here).
    block_table (B, P, int32) with seqused_k: key and value are pages (pages, page_size, G, D); all sequences then have max_q
    queries, cu_seq_k is not read, and there is no gradient. num_splits: of the keys, with block_table; without we never split.

    Returns out (sum of S, H, D); with return_aux=AuxRequest(lse=True) (out, lse (H, sum of S) float32).
    Raises ValueError or TypeError for what does not fit.
    """
    check_tensors("query key value", (query, key, value))
    if query.dim() != 3 or key.dim() < 2:
        raise ValueError(f"query: got shape {tuple(query.shape)} with key {tuple(key.shape)}, need (tokens, heads, head_dim)")
    heads, groups = query.shape[1], key.shape[-2]
    if heads != groups and not enable_gqa:
        raise ValueError(f"key: got {groups} heads for {heads} query heads, they need enable_gqa=True")
    if num_splits is not None and as_int("num_splits", num_splits) < 1:
        raise ValueError(f"num_splits: got {num_splits}, must be 1 or more, or None")
    if block_table is not None:
        max_q = as_int("max_q", max_q)
        out, lse = _paged(query, key, value, cu_seq_q, max_q, scale, window_size, seqused_k, block_table, num_splits or 0)
    elif cu_seq_k is None:
        raise ValueError("cu_seq_k: got None, which only goes with block_table")
    else:
        out, lse, _ = flash_attn_varlen_func(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, window_size=window_size,
            return_attn_probs=True, seqused_k=seqused_k,
        )  # fmt: skip
    return (out, lse) if return_aux is not None and return_aux.lse else out


def _paged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    max_q: int,
    scale: float | None,
    window_size: tuple[int, int],
    seqused_k: Tensor | None,
    block_table: Tensor,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    batch = cu_seq_q.shape[0] - 1
    if seqused_k is None:
        raise ValueError("block_table: needs seqused_k, the number of keys of each sequence")
    if query.shape[0] != batch * max_q:
        raise ValueError(f"block_table: got {query.shape[0]} queries for {batch} sequences, need max_q = {max_q} of each")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise ValueError("block_table: query, key or value requires a gradient, paged attention has none")
    out, lse = flash_attn_with_kvcache(
        query.unflatten(0, (batch, max_q)), key, value, cache_seqlens=seqused_k, block_table=block_table, softmax_scale=scale,
        window_size=window_size, num_splits=num_splits, return_softmax_lse=True,
    )  # fmt: skip
    return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)


__all__ = ["varlen_attn"]
