"""Every architecture of the installed transformers, tiny: what attn_implementation="wikigpt" does with it.

A configuration is made by its class without arguments and shrunk by the names of its fields: every width is WIDTH, every
number of heads HEADS, so that parts of one model fit each other; of layers that differ, one of each kind stays. What that
does not get right stands in HINTS, and what could not be run in NOT_TRIED, which tests/test_architectures.py holds to.

    python -m tests.architectures            writes the list into docs/transformers.md (some minutes)
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from wikigpt.integrations.transformers import NAME, register, wikigpt_attention_forward

WIDTH, HEADS, HEAD_DIM, VOCAB, LENGTH, LAYERS = 64, 4, 16, 99, 11, 2
LARGEST = 30_000_000  # parameters
# The first of these that has the architecture gives its class.
TASKS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM", "CTC", "")

# --- shrinking ------------------------------------------------------------------------------------------------------

# The first pattern that fits the name of a field gives its size; 0: leave it.
SIZES = [(re.compile(pattern), size) for size, pattern in (
    (0, r"(num|max)_(channels|frames|labels)|in_channels|chunk_size_feed_forward|.*(kernel|patch|window|chunk|stride).*size.*"),
    (64, r"codebook_size"),
    (VOCAB, r".*vocab_size(_per_layer_input)?|num_embeddings|n_vocab|.*vocabulary_size|\w+group_vocab"),
    (0, r"num_(feat_extract|conv|adapter)_layers"),
    (LAYERS, r"(num_)?(\w+_)?(hidden_)?layers|n_layers?|depth|num_blocks|resampler_depth|num_encoder_blocks"),
    (8, r"mamba_n_heads|mamba_num_heads|n_mamba_heads"),
    (HEAD_DIM, r"mamba_d_head|mamba_head_dim|mamba_headdim"),
    (HEADS, r"(num_|n_)(\w+_)?heads?|(\w+_)?(attention|query)_heads|heads"),
    (2, r"num_experts_per_(tok|token)|moe_topk|moe_k|top_k|type_vocab_size|router_topk|num_selected_experts|topk"),
    (1, r"n_group|topk_group|first_k_dense_replace|n_shared_experts|num_expert_group|num_codebook_groups"),
    (4, r"\w*num\w*_experts|n_routed_experts|\w*num_queries|num_query_tokens|num_latents|max_window_layers|num_query"),
    (2 * HEAD_DIM, r"qk_head_dim"),
    (HEAD_DIM, r"(\w+_)?head_dim|\w*_lora_rank|d_kv|attention_head_size|dim_head|kv_channels|query_pre_attn_scalar|rotary_dim"),
    (16, r"\w*state_size|\w*d_state|num_mel_bins|index_topk|image_seq_length"),
    (32, r"image_size|input_resolution|img_size"),
    (128, r"\w*max_\w*position\w*|n_positions|max_source_positions|n_ctx|max_seq\w*_len\w*|context_length"),
    (WIDTH, r"d_(model|ff|inner|embed)|n_embd|n_inner|dim|lru_width|dim_feedforward|width|\w*mlp_dim|\w*ffn_dim|(\w+_)?"
            r"(hidden|embed|embedding|emb|inner|out|output|intermediate|feedforward|ffn|feed_forward|projection|projector|proj"
            r"|vision|text|model|qformer|aux|attention|linear|conv_hidden|decoder|encoder|pooler|expert|latent|adapter|feature)"
            r"_(size|dim|dims|channels|mlp)(_mlp|_per_layer_input)?"),
)]  # fmt: skip
KEY_VALUE = re.compile(
    r"num_key_value_heads|num_kv_heads|n_head_kv|\w*num_key_value_heads|multi_query_group_num|num_\w*kv_heads"
)


def size_of(name: str) -> int:
    return next((size for pattern, size in SIZES if pattern.fullmatch(name)), 0)


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with its sizes made small, in place."""
    values = vars(config)
    count = next(
        (
            v
            for k, v in values.items()
            if k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") and isinstance(v, int)
        ),
        None,
    )
    kept = keep_layers(values, count)
    heads = next(
        (v for k, v in values.items() if k in ("num_attention_heads", "n_head", "num_heads") and isinstance(v, int)), None
    )
    for name, value in list(values.items()):
        if isinstance(value, PreTrainedConfig):
            shrink(value)
        elif isinstance(value, float) and "drop" in name:
            values[name] = 0.0
        elif isinstance(value, bool) or name.startswith("_"):
            pass
        elif isinstance(value, (list, tuple)):
            if count and len(value) == count > len(kept):
                values[name] = type(value)(value[i] for i in kept)
        elif value is None and name in ("head_dim", "num_key_value_heads"):
            values[name] = HEAD_DIM if name == "head_dim" else HEADS
        elif isinstance(value, dict):
            if name == "rope_parameters" and "rope_theta" in value:
                value.setdefault("mrope_section", [])
            for part in (value, *(v for v in value.values() if isinstance(v, dict))):
                if "mrope_section" in part:
                    half = int(HEAD_DIM * (part.get("partial_rotary_factor") or 1)) // 2
                    part["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        elif isinstance(value, int):
            if name.endswith(("token_id", "token_index", "_id")) and value >= VOCAB:
                values[name] = 3 + len(name) % 7
            elif KEY_VALUE.fullmatch(name):
                values[name] = 1 if value == 1 else HEADS if value == heads else 2
            elif value > 0 and (size := size_of(name)):
                if size == LAYERS:
                    size = len(kept) if value == count else LAYERS
                values[name] = size if size in (WIDTH, HEADS, HEAD_DIM) else min(value, size)
    return config


def keep_layers(values: dict[str, Any], layers: int | None) -> list[int]:
    """One of each kind of layers, at least LAYERS."""
    if not layers:
        return list(range(LAYERS))
    kinds = [v for k, v in values.items() if isinstance(v, (list, tuple)) and len(v) == layers and "type" in k]
    first: dict[Any, int] = {}
    for i, kind in enumerate(zip(*kinds) if kinds else []):
        first.setdefault(kind, i)
    kept = sorted(first.values())
    kept += [i for i in range(layers) if i not in kept][: max(0, LAYERS - len(kept))]
    return sorted(kept)


MROPE = {"mrope_section": [2, 3, 3], "rope_theta": 1e4, "rope_type": "default"}
WIDE = [WIDTH, WIDTH, WIDTH]
HINTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 1,
    },
    "minimax_m3_vl": {
        "text_config.layer_types": ["full_attention", "minimax_m3_sparse"],
        "text_config.index_block_size": 4,
        "text_config.index_topk_blocks": 1,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (32, 32), "axial_pos_shape": (8, 16)},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "wav2vec2-bert": {"vocab_size": VOCAB},
    "wav2vec2-conformer": {"vocab_size": VOCAB},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1},
    **{
        key: {"decoder_in_channels": WIDE}
        for key in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "pp_doclayout_v3", "pp_doclayout_v4")
    },
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "n_recurrent_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "mistral4": {"head_dim": 2 * HEAD_DIM},
    "mamba2": {"num_heads": 8, "head_dim": HEAD_DIM},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "step3p7": {"text_config.sliding_window": 4},
    "swin": {"embed_dim": 48, "window_size": 4},
    "mobilebert": {"hidden_size": 128, "true_hidden_size": 128, "intra_bottleneck_size": 128, "embedding_size": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
}


def tiny(key: str) -> PreTrainedConfig:
    config = shrink(CONFIG_MAPPING[key]())
    if not hasattr(config, "pad_token_id"):
        config.pad_token_id = 0
    for name, value in HINTS.get(key, {}).items():
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, config), last, value)
    return config


def walk(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from walk(value)


def class_of(key: str) -> Any:
    """The model class of an architecture, with a head where there is one for its configuration."""
    for task in TASKS:
        names = mapping(task).get(key)
        if names is not None:
            model = getattr(transformers, names if isinstance(names, str) else names[0])
            if not task or getattr(model, "config_class", None) is CONFIG_MAPPING[key]:
                return model
    return None


def mapping(task: str) -> dict[str, Any]:
    return getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES", {})


def keys() -> list[str]:
    """Every architecture that has a model."""
    return sorted(key for key in CONFIG_MAPPING if any(key in mapping(task) for task in TASKS))


# --- running --------------------------------------------------------------------------------------------------------


def build(key: str, implementation: str) -> Any:
    """A tiny model with random weights, the same for every implementation."""
    config = tiny(key)
    config._attn_implementation = implementation
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    torch.manual_seed(0)
    with no_init_weights():
        model = class_of(key)(config)
    if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
        raise MemoryError("large")
    model.eval().float()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # far from uniform attention, so that a wrong mask shows
        inputs_of_one = parameter[0].numel() if parameter.ndim > 2 else 25
        parameter.data.normal_(0, max(inputs_of_one, 1) ** -0.5, generator=generator)
    return model


def find(config: PreTrainedConfig, *names: str) -> Any:
    for c in walk(config):
        for name in names:
            if getattr(c, name, None) is not None:
                return getattr(c, name)
    return None


def inputs(model: Any) -> Iterator[dict[str, Any]]:
    """What the model may want, in the order of trying: what it must have, then pictures and sounds beside a text."""
    accepted = inspect.signature(model.forward).parameters
    required = {n for n, p in accepted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    least = required | {model.main_input_name, "input_ids", "attention_mask", "decoder_input_ids"} & accepted.keys()
    if "input_ids" not in accepted:
        least -= {"attention_mask"}
    for form in range(4):
        x = {name: make(name, model.config, form) for name in least}
        yield {name: value for name, value in x.items() if value is not None}
    for form in range(4):
        x = {name: make(name, model.config, form) for name in accepted if name in MADE and name in least | set(MADE[2:])}
        yield {name: value for name, value in x.items() if value is not None}


MADE = (
    "input_ids", "attention_mask", "spatial_shapes", "pixel_attention_mask", "pixel_position_ids", "decoder_input_ids", "pixel_values", "input_features", "input_values", "bbox", "grid_thw",
    "pixel_values_videos", "image_grid_thw", "hidden_states", "past_values", "qformer_input_ids",
)  # fmt: skip


def make(name: str, config: Any, form: int) -> Any:
    """The input of this name; the forms are those that differ between models."""
    g = torch.Generator().manual_seed(len(name))
    size = find(config, "image_size", "input_size") or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = find(config, "num_channels", "in_channels", "in_chans") or 3
    channels = channels if isinstance(channels, int) else 3
    bins = (
        find(config, "feature_projection_input_dim", "input_dim", "num_mel_bins", "feature_size", "input_feat_per_channel") or 8
    )
    time = 2 * min(find(config, "max_source_positions") or 64, 128)
    patch = find(config, "patch_size") or 8
    patch = patch if isinstance(patch, int) else 8
    if name in ("input_ids", "qformer_input_ids"):
        ids = torch.randint(20, max(21, min(VOCAB, find(config, "vocab_size") or VOCAB)), (2, LENGTH), generator=g)
        ids[0, :4] = 1
        eos = find(config, "eos_token_id")
        if isinstance(eos, int) and 0 <= eos < VOCAB:
            ids[:, -1] = eos  # which some models pool at
        return ids
    if name == "attention_mask":
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        mask[0, :4] = 0
        return mask
    if name == "decoder_input_ids":
        return torch.randint(20, VOCAB, (2, 7), generator=g)
    if name in ("pixel_values", "pixel_values_videos"):
        if form == 1 or (form == 0 and name.endswith("videos")):
            return torch.randn(2, find(config, "num_frames", "frames_per_clip") or 2, channels, height, width, generator=g)
        if form == 3:
            return torch.randn(2, 16, channels * patch**2, generator=g)
        if form == 2:
            return torch.randn(32, channels * (find(config, "temporal_patch_size") or 1) * patch**2, generator=g)
        return torch.randn(2, channels, height, width, generator=g)
    if name == "spatial_shapes":
        return torch.tensor([[4, 4], [4, 4]])
    if name == "pixel_attention_mask":
        return torch.ones(2, 16, dtype=torch.long)
    if name == "pixel_position_ids":
        return torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, 16, 2)
    if name == "hidden_states":
        return torch.randn(32, channels * (find(config, "temporal_patch_size") or 1) * patch**2, generator=g)
    if name.endswith("grid_thw"):
        return torch.tensor([[1, 4, 4], [1, 4, 4]])
    if name == "merge_sizes":
        return torch.tensor([1, 1])
    if name == "input_features":
        return torch.randn(2, *((bins, time) if form % 2 == 0 else (time, bins)), generator=g)
    if name == "input_features_mask":
        return torch.ones(2, time, dtype=torch.long)
    if name == "input_values":
        return torch.randn(2, *((1,) if form == 1 else (16, 16) if form == 2 else ()), 4032, generator=g)
    if name == "bbox":
        return torch.randint(0, 20, (2, LENGTH, 4), generator=g).cumsum(-1)
    if name == "past_values":
        length, features = find(config, "context_length") or 32, find(config, "num_input_channels") or 1
        return torch.randn(2, length, *((features,) if form == 0 else ()), generator=g)
    return None


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for name, value in output.items():
            if "past_key" not in name and "cache" not in name:
                yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


@torch.no_grad()
def results(model: Any, x: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    out = list(tensors(model(**x)))
    mask = x.get("attention_mask")
    if mask is None:
        return out
    # At padding there may be anything; a tensor of other positions is compared where nothing is padded.
    return [t[mask.bool()] if t.shape[:2] == mask.shape else t[1:] if t.ndim > 2 and len(t) == 2 else t for t in out]


def working(model: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """The first inputs that the model takes, and its results."""
    first = None
    for x in inputs(model):
        try:
            return x, results(model, x)
        except Exception as failure:
            first = first or failure
    raise first


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, by eager's largest number; where eager is not finite, neither is ours."""
    assert len(ours) == len(theirs) > 0
    errors = [0.0]
    for a, b in zip(ours, theirs):
        finite = torch.isfinite(b)
        if not finite.any() and b.numel():
            raise ArithmeticError("eager itself is not finite")
        assert torch.equal(torch.isfinite(a), finite)
        if b.numel():
            errors.append(float((a - b)[finite].abs().max() / b[finite].abs().max().clamp(min=1e-9)))
    return max(errors)


@torch.no_grad()
def step(model: Any, x: dict[str, Any]) -> list[Tensor]:
    """The logits of a prompt in two pieces through a cache, [] for a model without one."""
    accepted = inspect.signature(model.forward).parameters
    if set(x) != {"input_ids", "attention_mask"} or "use_cache" not in accepted or not model.can_generate():
        return []
    ids, mask = x["input_ids"], x["attention_mask"]
    name = "cache" if "cache" in accepted else "past_key_values"
    first = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    cache = first.get("past_key_values", first.get("cache"))
    if cache is None:
        return []
    return list(tensors(model(input_ids=ids[:, -1:], attention_mask=mask, use_cache=True, **{name: cache}).logits))


EQUAL, REFUSED, UNUSED = "equal", "refused", "unused"
TOLERANCE = 1e-3  # float32; a wrong mask gives 0.1 and more


def outcome(key: str) -> tuple[str, str]:
    """(EQUAL, REFUSED or UNUSED, why it was refused); raises where the model cannot be made or run, or is not equal.

    UNUSED: no attention of it goes through transformers' AttentionInterface, and none was computed by itself.
    """
    try:
        ours = build(key, NAME)
    except ValueError as refusal:
        if f'attn_implementation: got "{NAME}"' in str(refusal):
            return REFUSED, str(refusal)
        raise
    eager = build(key, "eager")
    x, expected = working(eager)
    calls.clear()
    difference = error(results(ours, x), expected)
    if difference > TOLERANCE:
        assert error(results(eager, x), expected) == 0, "eager itself is random"
        raise AssertionError(f"{key} differs from eager by {difference:.2g}")
    if not calls:
        return UNUSED, ""
    try:
        stepped = step(eager, x)
    except Exception:  # a cache of its own
        stepped = []
    if stepped:
        difference = error(step(ours, x), stepped)
        assert difference <= TOLERANCE, f"{key} differs from eager by {difference:.2g} in a step with a cache"
    return EQUAL, ""


calls: list[str] = []


def count_calls() -> None:
    """Let `calls` hear of every attention that ours computes."""
    from wikigpt.integrations import transformers as integration

    def counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return original(module, *args, **kwargs)

    register()
    original = wikigpt_attention_forward
    transformers.AttentionInterface.register(NAME, counted)
    integration.wikigpt_attention_forward = counted  # type: ignore[assignment]
