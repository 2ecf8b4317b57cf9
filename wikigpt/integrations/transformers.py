"""attn_implementation="wikigpt" for every model of Hugging Face transformers that goes through its AttentionInterface. A
model whose own code computes attention is refused when it is made (`why_not`): it would read our masks as its own.

Shapes: B batch, H query heads, G key/value heads, S query and T key positions, D head_dim.

transformers makes the mask once per forward pass (AttentionMaskInterface) and hands it to every layer's attention
(AttentionInterface); both must know the name, or padding is lost without a word. The mask is, the cheapest first:

    None            nothing to mask, or plain causal attention over exactly the keys that exist: flags of the kernel
    DescribedMask   causal, window, padding, unfilled places of a static cache, packed sequences: flags, one (B, T) mask
                    or cu_seqlens, which stand for the (B, 1, S, T) mask that sdpa would get
    Tensor          all else (Llama 4's chunks, Gemma 3's images, the user's own mask): bool or additive, as for sdpa
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from wikigpt.kernels import flash_attn_func, flash_attn_varlen_func

from .patch import patch, unpatch

NAME = "wikigpt"
# What a model's config says instead, where the model knows no masks but eager's (`_refusing`).
NAME_EAGER_MASKS = "wikigpt_eager_masks"


def register() -> None:
    """Make attn_implementation="wikigpt" valid, for models made from now on and `model.set_attn_implementation`.

    Both raise ValueError for a model that does not take its attention from transformers' AttentionInterface. Nothing
    changes for other models; calling it again is harmless. Raises ImportError where transformers is missing.
    """
    try:
        from transformers import AttentionInterface, PreTrainedModel
        from transformers.masking_utils import AttentionMaskInterface, eager_mask
    except ImportError as error:
        raise ImportError("wikigpt.integrations.transformers needs Hugging Face transformers 5.0 or newer") from error
    AttentionInterface.register(NAME, wikigpt_attention_forward)
    AttentionMaskInterface.register(NAME, wikigpt_mask)
    AttentionInterface.register(NAME_EAGER_MASKS, _with_eagers_masks)
    AttentionMaskInterface.register(NAME_EAGER_MASKS, eager_mask)
    # What every model calls with its own and every part's implementation, when it is made and when it is changed.
    checked = PreTrainedModel.get_correct_attn_implementation
    if not hasattr(checked, "refuses"):
        PreTrainedModel.get_correct_attn_implementation = _refusing(checked)  # type: ignore[method-assign]
        PreTrainedModel.set_attn_implementation = _refusing_parts(PreTrainedModel.set_attn_implementation)  # type: ignore


# --- which models ---------------------------------------------------------------------------------------------------


def _refuse(model: type, requested: Any) -> None:
    reason = _judge(model)[0] if requested in (NAME, NAME_EAGER_MASKS) else None
    if reason is not None:
        others = '"sdpa" or "eager"' if model._supports_sdpa else '"eager"'  # type: ignore[attr-defined]
        raise ValueError(
            f'attn_implementation: got "{NAME}", but {reason}. Use {others}. If {model.__name__} is a part '
            f'of a model, for this part alone: attn_implementation={{"text_config": "{NAME}", "vision_config": "eager"}}'
        )


def _refusing(checked: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(checked)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        _refuse(type(self), requested_attention)
        if requested_attention in (NAME, NAME_EAGER_MASKS):  # the second where an outer model shares its config
            others = self._supports_sdpa or self._supports_flash_attn or self._supports_flex_attn
            requested_attention = NAME if others else NAME_EAGER_MASKS  # Splinter, NLLB-MoE, DeepSeek V4 look into the mask
        return checked(self, requested_attention, *args, **kwargs)

    get_correct_attn_implementation.refuses = NAME  # type: ignore[attr-defined]
    return get_correct_attn_implementation


def _refusing_parts(change: Callable[..., None]) -> Callable[..., None]:
    """transformers leaves a part that cannot change as it is, with a warning."""

    @functools.wraps(change)
    def set_attn_implementation(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        for part in self.modules() if attn_implementation == NAME else ():
            if hasattr(part, "get_correct_attn_implementation"):
                _refuse(type(part), attn_implementation)
        change(self, attn_implementation, *args, **kwargs)

    return set_attn_implementation


_SOFTMAX = {"softmax", "Softmax", "scaled_dot_product_attention"}
_PRODUCT = {"matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}


def _code(code: types.CodeType) -> set[str]:
    """The names that the code mentions; "matmul" for the operator @."""
    names = set(code.co_names)
    for instruction in dis.get_instructions(code):
        if instruction.opname == "BINARY_MATRIX_MULTIPLY" or instruction.argrepr == "@":
            names.add("matmul")
        if isinstance(instruction.argval, types.CodeType):
            names |= _code(instruction.argval)
    return names


def _functions(cls: type) -> Iterator[types.FunctionType]:
    """The methods that a model's own file, not transformers or PyTorch at large, gives to the class."""
    for base in cls.__mro__:
        if _is_a_models_own(base):
            for name, member in vars(base).items():
                member = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if isinstance(member, types.FunctionType) and name != "_init_weights":  # which names parts of all the file
                    yield _undecorated(member)


def _undecorated(value: Any) -> Any:
    return inspect.unwrap(value) if isinstance(value, types.FunctionType) else value


def _is_a_models_own(thing: Any) -> bool:
    package = thing.__module__ or ""
    return package.startswith("transformers.models.") or package.split(".")[0] not in ("transformers", "torch", "builtins")


def why_not(model: type) -> str | None:
    """Why models of this class (BloomForCausalLM, say), or the models that their code names as parts, cannot use
    attn_implementation="wikigpt", or None where they can. A part that the config alone names is refused when it is made.
    Raises TypeError for what is no class of transformers' models.
    """
    from transformers import PreTrainedModel

    if not (isinstance(model, type) and issubclass(model, PreTrainedModel)):
        got = model.__name__ if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"model: got {got}, need a class of models of transformers")
    seen: set[type] = set()
    todo: list[type] = [model]
    while todo:
        cls = todo.pop()
        seen.add(cls)
        reason, parts = _judge(cls)
        if reason is not None:
            return reason
        todo += [part for part in parts if part not in seen]
    return None


@functools.cache
def _judge(model: type) -> tuple[str | None, list[type]]:
    """(why models of this class cannot use ours, the models that its code names).

    Judged by the code of the class and of the modules that it makes, up to other models, which are judged by themselves:
    attention is a softmax beside a product of matrices, or what is called so and takes a mask, and it has to come from
    ALL_ATTENTION_FUNCTIONS. _supports_attention_backend does not tell: T5 and Whisper do not set it.
    """
    from transformers import PreTrainedModel

    models: list[type] = []
    own: list[str] = []  # classes that compute attention themselves
    from_interface = False
    seen, todo = set(), [model]
    while todo:
        cls = todo.pop()
        seen.add(cls)
        names: set[str] = set()
        functions, known = list(_functions(cls)), set()
        masked = any("mask" in name for function in functions for name in function.__code__.co_varnames)
        while functions:
            function = functions.pop()
            known.add(function)
            mentioned = _code(function.__code__)
            names |= mentioned
            for name in mentioned & function.__globals__.keys():
                value = function.__globals__[name]
                if isinstance(value, dict) and "eager" in value and NAME not in value and isinstance(value["eager"], type):
                    return f"{cls.__name__} takes its attention from {name}, which does not have it", models
                values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
                for part in map(_undecorated, values):
                    if isinstance(part, types.FunctionType) and part not in known and _is_a_models_own(part):
                        functions.append(part)
                    if not isinstance(part, type) or not issubclass(part, torch.nn.Module) or part in seen:
                        continue
                    if _is_a_models_own(part):
                        (models if issubclass(part, PreTrainedModel) else todo).append(part)
        if "ALL_ATTENTION_FUNCTIONS" in names:
            from_interface = True
        elif not issubclass(cls, PreTrainedModel) and (
            (names & _SOFTMAX and names & _PRODUCT) or ("Attention" in cls.__name__ and masked)
        ):
            own.append(cls.__name__)
    if not own or from_interface or model._supports_sdpa:  # type: ignore[attr-defined]
        return None, models
    return f"{model.__name__} computes attention in its own {own[0]}, not through transformers' AttentionInterface", models


# --- masks ----------------------------------------------------------------------------------------------------------


_ADDITIONS = {getattr(torch.ops.aten, name) for name in ("add", "add_", "sub", "sub_", "rsub", "baddbmm")}


class DescribedMask(torch.Tensor):
    """A boolean mask (B, 1, S, T) that is described and not stored. Any operation on it but ours sees the full mask, so
    models that cut or combine masks need not know.

    window (left, right) counts from the diagonal that ends at the last of the first n_keys keys; keys after them are
    masked. padding (B, n_keys) bool: True takes part. cu_seqlens (int32) and max_seqlen: packed sequences in B * S tokens.
    """

    window: tuple[int, int]
    n_keys: int
    padding: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int
    dense: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], device: torch.device, **description: Any) -> DescribedMask:
        mask: DescribedMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)  # type: ignore
        mask.__dict__.update(description)
        return mask

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        if func.overloadpacket in _ADDITIONS:  # attention of a model's own, which takes the mask for an additive one
            raise ValueError(f'a mask of attn_implementation="{NAME}" is boolean, it cannot be added to scores: use "eager"')
        args, kwargs = tree_map_only(DescribedMask, lambda mask: mask.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _pattern(mask_function: Callable[..., Any]) -> tuple[int, int, Tensor | None] | None:
    """(left, right, index (B, S) of each token's packed sequence or None) of a mask function of transformers, -1 for no
    limit; None where flags cannot express it. Closures are read because nothing else tells a window from a chunk."""
    if mask_function.__module__ != "transformers.masking_utils":
        return None
    cells = (cell.cell_contents for cell in mask_function.__closure__ or ())
    seen = dict(zip(mask_function.__code__.co_freevars, cells))
    name = mask_function.__qualname__.split(".")[0]
    if name == "causal_mask_function":
        return -1, 0, None
    if name == "bidirectional_mask_function":
        return -1, -1, None
    if name == "sliding_window_overlay":
        return seen["sliding_window"] - 1, -1, None
    if name == "sliding_window_bidirectional_overlay":
        return seen["sliding_window"], seen["sliding_window"], None
    if name == "packed_sequence_mask_function":
        return -1, -1, seen["packed_sequence_mask"]
    if name == "remap_positions_for_packed_sequence":  # within a sequence distances are what they were
        return _pattern(seen["mask_function"])
    if name == "and_masks":
        left, right, sequences = -1, -1, None
        for part in map(_pattern, seen["mask_functions"]):
            if part is None or (sequences is not None and part[2] is not None):
                return None
            left, right = (min(a, b) if min(a, b) >= 0 else max(a, b) for a, b in ((left, part[0]), (right, part[1])))
            sequences = part[2] if sequences is None else sequences
        return left, right, sequences
    return None


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def wikigpt_mask(**problem: Any) -> Tensor | None:
    """The mask of one forward pass for `wikigpt_attention_forward`; the arguments are those of transformers' `sdpa_mask`.

    Returns None, a DescribedMask, or where neither will do the bool mask (B, 1, S, T).
    """
    from transformers.masking_utils import sdpa_mask

    skips = problem.get("allow_is_causal_skip", True), problem.get("allow_is_bidirectional_skip", False)
    full = {**problem, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    padding, position = problem.get("attention_mask"), problem.get("cache_position")  # the latter in older versions
    s = problem["q_length"] if position is None else position.shape[0]
    t, first_key = problem["kv_length"], problem.get("kv_offset", 0)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _capturing():
        # Only what needs no value: a graph must not depend on the lengths of one batch.
        plain = padding is None and problem["mask_function"].__name__ == "bidirectional_mask_function"
        return None if plain and any(skips) else sdpa_mask(**full)
    try:
        pattern = None if problem.get("use_vmap") else _pattern(problem["mask_function"])
    except KeyError:  # a closure of another version of transformers
        pattern = None
    if pattern is None or not (any(skips) or pattern[2] is not None):
        return sdpa_mask(**full)
    left, right, sequences = pattern
    n_keys = t
    if (left, right) != (-1, -1):
        n_keys = int(problem.get("q_offset", 0) if position is None else position[0]) + s - first_key
        if not 0 < n_keys <= t or (n_keys < t and right != 0):
            return sdpa_mask(**full)
    if padding is not None:
        padding = F.pad(padding, (0, max(0, first_key + n_keys - padding.shape[-1])))[:, first_key : first_key + n_keys]
        padding = None if padding.all() else padding
    if left >= n_keys - 1:
        left = -1
    if sequences is None and padding is None and left < 0 and right <= 0 and n_keys == t:
        config = problem.get("config")
        # PaliGemma: its layers call themselves bidirectional, its mask is causal all the same for text alone.
        told = right < 0 or s == 1 or not getattr(getattr(config, "text_config", config), "use_bidirectional_attention", None)
        if told:
            return None
    if s == 1:
        return sdpa_mask(**full)  # no larger than its description
    cu_seqlens, max_seqlen = None, 0
    if sequences is not None:
        if padding is not None or n_keys != s or t != s:
            return sdpa_mask(**full)
        cu_seqlens, max_seqlen = _boundaries(sequences.expand(problem["batch_size"], s))
    return DescribedMask(
        (problem["batch_size"], 1, s, t),
        torch.device(problem.get("device", "cpu") if position is None else position.device),
        window=(left, right),
        n_keys=n_keys,
        padding=padding,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        dense=lambda: sdpa_mask(**full),
    )


def _boundaries(sequences: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens (int32) of B * S tokens and the longest sequence, from each token's sequence (B, S)."""
    begins = F.pad(sequences.diff(dim=1) != 0, (1, 0), value=True)  # rows never share a sequence
    cu_seqlens = F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel())
    return cu_seqlens.int(), int(cu_seqlens.diff().max())


# --- attention ------------------------------------------------------------------------------------------------------


def _only(mask: Tensor | None, seen: Tensor) -> Tensor:
    """The bool or additive mask, with all that `seen` (bool) does not contain masked."""
    if mask is None or mask.dtype == torch.bool:
        return seen if mask is None else mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def wikigpt_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, called by the model. query (B, H, S, D), key (B, G, T, D), value (B, G, T, Dv).

    attention_mask: from `wikigpt_mask`, or any bool (True takes part) or additive mask that broadcasts to (B, H, S, T);
    given one, is_causal and sliding_window are not looked at, as it contains them. Without one, is_causal (or else
    module.is_causal) aligns the diagonal with the last key. position_bias (.., S, T) is added to the scores and gets a
    gradient; indices (B, S, n): the only keys that each query sees (DeepSeek V3.2); block_indices: the same by blocks, as
    the module's indexer reads them (MiniMax M3); sinks (B, H, S, 1): one more score of each query (Inkling 2), with a
    gradient; cu_seq_lens_q and cu_seq_lens_k: packed sequences. Other keyword arguments of transformers change nothing here.

    Returns (out (B, S, H, Dv), None). A query without any key gives 0.
    Raises ValueError for attention that the kernels do not know.
    """
    if kwargs.get("output_attentions"):
        from transformers.utils import logging

        logging.get_logger(__name__).warning_once(
            f'attn_implementation="{NAME}" does not return weights: use "eager" for output_attentions=True'
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    left = -1 if sliding_window is None else sliding_window - 1  # their window counts the query's own position
    window = (left, 0 if causal else left)
    mask, bias = attention_mask, position_bias
    (batch, _, s, _), t = query.shape, key.shape[2]

    if block_indices is not None:
        build_block_mask: Any = getattr(getattr(module, "indexer", None), "build_block_mask", None)
        if build_block_mask is None:
            raise ValueError(f'block_indices: {type(module).__name__} has no indexer that reads them, use "sdpa" or "eager"')
        positions = torch.arange(t - s, t, device=query.device).expand(batch, s)
        seen = mask.dense() if isinstance(mask, DescribedMask) else mask
        mask = build_block_mask(block_indices, seen, t, query.dtype, query.device, positions)

    if isinstance(mask, DescribedMask) and mask.shape == (batch, 1, s, t) and indices is None:
        window, n_keys, padding = mask.window, mask.n_keys, mask.padding
        if mask.cu_seqlens is not None:
            cu_seq_lens_q = cu_seq_lens_k = mask.cu_seqlens
            max_length_q = max_length_k = mask.max_seqlen
        key, value, bias = key[:, :, :n_keys], value[:, :, :n_keys], None if bias is None else bias[..., :n_keys]
        mask = None if padding is None else padding[:, None, None]
    elif mask is not None:
        mask, window = mask.dense() if isinstance(mask, DescribedMask) else mask, (-1, -1)
    if indices is not None:
        chosen = indices.new_zeros(batch, s, t, dtype=torch.bool).scatter(-1, indices.long(), True)
        mask = _only(mask, chosen[:, None])

    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # (B, S, H, D)
    options: dict[str, Any] = {
        "dropout_p": dropout, "softmax_scale": scaling, "window_size": window, "softcap": softcap or 0.0, "s_aux": s_aux
    }  # fmt: skip
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if mask is None and bias is None and sinks is None:
            out = flash_attn_varlen_func(
                q.flatten(0, 1),
                k.flatten(0, 1),
                v.flatten(0, 1),
                cu_seq_lens_q.int(),
                cu_seq_lens_k.int(),
                int(cu_seq_lens_q.diff().max() if max_length_q is None else max_length_q),
                int(cu_seq_lens_k.diff().max() if max_length_k is None else max_length_k),
                **options,
            )
            return out.view(batch, s, *out.shape[1:]), None
        q_of, k_of = (
            torch.bucketize(torch.arange(batch * n, device=q.device), ends[1:], right=True).view(batch, 1, -1)
            for n, ends in ((s, cu_seq_lens_q), (k.shape[1], cu_seq_lens_k))
        )
        mask = _only(mask, q_of[..., None] == k_of[..., None, :])
    if mask is not None and mask.dtype != torch.bool:
        bias = mask if bias is None else bias + mask
        mask = None
    if sinks is None:
        return flash_attn_func(q, k, v, attn_mask=mask, attn_bias=bias, **options).contiguous(), None
    out, lse, _ = flash_attn_func(q, k, v, attn_mask=mask, attn_bias=bias, **options, return_attn_probs=True)
    kept = torch.sigmoid(lse - sinks.squeeze(-1).float())  # what the sink leaves to the keys: e^lse / (e^lse + e^sink)
    return (out * kept.transpose(1, 2).unsqueeze(-1).to(out.dtype)).contiguous(), None


def _with_eagers_masks(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Where eager gets no mask, nothing is masked, whatever the module says of itself."""
    return wikigpt_attention_forward(module, *args, **{**kwargs, "is_causal": False, "sliding_window": None})


__all__ = ["NAME", "DescribedMask", "patch", "register", "unpatch", "why_not", "wikigpt_attention_forward", "wikigpt_mask"]
