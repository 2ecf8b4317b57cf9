"""Every architecture of the installed transformers, tiny: what attn_implementation="wikigpt" does with it.

A configuration is made by its class without arguments and shrunk by the names of its fields: every width is WIDTH, every
number of heads HEADS, so that parts of one model fit each other; of layers that differ, one of each kind stays. What that
does not get right stands in HINTS, and what could not be run in NOT_TRIED, which tests/test_architectures.py holds to.

    python -m tests.architectures            writes the list into docs/transformers.md (some minutes)
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import re
import sys
import textwrap
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
TASKS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM", "CTC",
    "TEXT_TO_WAVEFORM", "",
)  # fmt: skip

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
        elif value is None and (name == "head_dim" or KEY_VALUE.fullmatch(name)):
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
    "falcon_h1": {"mamba_d_ssm": 128},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 5},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},
    "moonshine": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
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
    found = None
    for task in TASKS:
        names = mapping(task).get(key)
        if names is not None:
            model = getattr(transformers, names if isinstance(names, str) else names[0])
            if getattr(model, "config_class", None) is CONFIG_MAPPING[key]:
                return model
            found = model
    return found


def mapping(task: str) -> dict[str, Any]:
    return getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES", {})


def keys() -> list[str]:
    """Every architecture that has a model."""
    return sorted(key for key in CONFIG_MAPPING if any(key in mapping(task) for task in TASKS))


# Reason: architectures. Found by running them; tests/test_architectures.py fails for one that can be run.
NOT_TRIED: dict[str, str] = {
    "eager itself gives numbers that are not finite with these weights": """
        nemotron3_5_asr nemotron_asr_streaming nemotron_asr_streaming_encoder""",
    "more than 30 million parameters, however small its configuration": """
        align dots3_note efficientnet florence2 janus neucodec qwen2_5_omni univnet vibevoice
        vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder
        vibevoice_asr xcodec2""",
    "needs a configuration whose fields fit each other": """
        audio-spectrogram-transformer blt chameleon cohere_compass cohere_compass_text csm depth_pro diffusion_gemma
        dots3_note_text emu3 ernie4_5_vl_moe fun_asr_nano_encoder gemma4_assistant glm_image_vqmodel granite4_vision
        granite_docling_vision granite_speech5_ctc granite_speech5_encoder grounding-dino hrm_text informer
        inkling2_vision kimi_k25_vision kyutai_speech_to_text llama4 lw_detr maskformer mimi mimi_decoder
        mm-grounding-dino mobilevitv2 moonshine_streaming muse_glimmer_vision muse_spark_vision
        pocket_tts_audio_tokenizer pocket_tts_audio_tokenizer_decoder pp_formulanet pp_ocrv5_mobile_rec
        pp_ocrv5_server_rec pp_ocrv6_medium_det pp_ocrv6_small_det pp_ocrv6_small_rec pp_ocrv6_tiny_rec qwen3_omni_moe
        qwen4_exp qwen4_exp_text rf_detr sam2 sam2_hiera_det_model sam2_vision_model sam3_tracker sapiens2
        t5gemma2_encoder time_series_transformer uvdoc voxtral_realtime_text wavtokenizer_encoder xlstm zamba zamba2""",
    "needs the package detectron2": "layoutlmv2",
    "needs the package natten": "dinat",
    "needs the package scipy": "inkling_mm_model",
    "needs the package timm": """
        conditional_detr dab-detr deformable_detr detr edgetam edgetam_vision_model fast_vlm gemma3n gemma3n_vision
        pe_audio_video pe_audio_video_encoder pe_video pe_video_encoder perception_lm table-transformer timm_backbone
        timm_wrapper""",
    "needs the package torchaudio": "higgs_audio_v2_tokenizer",
    "takes inputs that its own processor makes": """
        audioflamingo3_encoder blip-2 blip_2_qformer decision_transformer edgetam_video efficientloftr encodec
        gemma3n_audio gemma4_unified_assistant idefics instructblip instructblipvideo kosmos-2 lightglue
        minicpm_ocr_vision minicpmv4_7_vision muse_glimmer_assistant nemotron3_5_transcribe_word_timestamp pi0
        pix2struct qwen3_asr_encoder sam2_video sam3_tracker_video sam3_video speech-encoder-decoder timesfm
        voxtral_realtime xcodec""",
}  # fmt: skip


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
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, buffer in model.state_dict().items():  # frozen batch norms and the like
        if name not in parameters and buffer.is_floating_point():
            buffer.fill_(float(name.endswith(("weight", "var", "scale", "std"))))
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
    "input_ids", "attention_mask", "spatial_shapes", "pixel_attention_mask", "pixel_position_ids", "decoder_input_ids",
    "pixel_values", "input_features", "input_values", "bbox", "grid_thw", "pixel_values_videos", "image_grid_thw",
    "hidden_states", "past_values", "qformer_input_ids",
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
        shape = ((2, 7), (8, 7), (2, 7, 9), (2, 7))[form]  # four codebooks in the batch, nine behind
        return torch.randint(20, VOCAB, shape, generator=g)
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
    first: Exception = ValueError("no inputs")
    for x in inputs(model):
        try:
            return x, results(model, x)
        except Exception as failure:
            first = failure if str(first) == "no inputs" else first
    raise first


class Differs(AssertionError):
    """A wrong result of ours."""


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, by eager's largest number; where eager is not finite, neither is ours."""
    if not len(ours) == len(theirs) > 0:
        raise Differs("another number of results")
    errors = [0.0]
    for a, b in zip(ours, theirs):
        finite = torch.isfinite(b)
        if not finite.any() and b.numel():
            raise ArithmeticError("eager itself is not finite")
        if not torch.equal(torch.isfinite(a), finite):
            raise Differs("not finite where eager is, or the other way about")
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


def same(key: str, ours: Any, eager: Any, x: dict[str, Any], expected: list[Tensor] | None = None) -> None:
    expected = results(eager, x) if expected is None else expected
    difference = error(results(ours, x), expected)
    if difference > TOLERANCE:
        if error(results(eager, x), expected) > 0:
            raise RuntimeError("eager itself is random")
        try:
            sdpa = f"{error(results(build(key, 'sdpa'), x), expected):.2g}"
        except Exception as reason:
            sdpa = str(reason)
        raise Differs(f"{key} differs from eager by {difference:.2g}, sdpa: {sdpa}")


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
    same(key, ours, eager, x, expected)
    if "attention_mask" in x:  # ours then hears of no mask, and has to know by itself whether attention is causal
        same(key, ours, eager, {name: value for name, value in x.items() if name != "attention_mask"})
    if not calls:
        return UNUSED, ""
    try:
        stepped = step(eager, x)
    except Exception:  # a cache of its own
        stepped = []
    if stepped:
        difference = error(step(ours, x), stepped)
        if difference > TOLERANCE:
            raise Differs(f"{key} differs from eager by {difference:.2g} in a step with a cache")
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


# --- the page -------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "transformers.md"
BEGIN, END = "<!-- architectures: written by python -m tests.architectures -->", "<!-- /architectures -->"
TITLES = {
    EQUAL: "Equal to eager",
    REFUSED: "Refused when the model is made, as they compute attention themselves",
    UNUSED: "Without any attention",
}


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def why_not_tried() -> dict[str, str]:
    return {key: reason for reason, keys_of in NOT_TRIED.items() for key in keys_of.split()}


def written(outcomes: dict[str, str]) -> str:
    """The part of the page for {architecture: EQUAL, REFUSED, UNUSED or why it was not tried}."""
    paragraphs = [f"transformers {transformers.__version__}, {len(outcomes)} architectures:"]
    for title in dict.fromkeys([*TITLES, *sorted(set(outcomes.values()))]):
        names = sorted(key for key, value in outcomes.items() if value == title)
        head = TITLES.get(title, f"Not tried, {title}")
        paragraphs.append(f"**{head} ({len(names)}):** {', '.join(f'`{name}`' for name in names)}.")
    wrapped = (textwrap.fill(text, 125, break_long_words=False, break_on_hyphens=False) for text in paragraphs)
    return "\n\n".join([BEGIN, *wrapped, END])


def page() -> str:
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def documented() -> dict[str, str]:
    """What the page says of each architecture."""
    titles = {title: name for name, title in TITLES.items()}
    found = re.findall(r"\*\*(?:Not tried, )?(.*) \(\d+\):\*\* (.*)\.", re.sub(r"(?<!\n)\n(?!\n)", " ", page()))
    return {key: titles.get(title, title) for title, names in found for key in re.findall("`(.*?)`", names)}


def main() -> int:
    logging.disable(logging.WARNING)
    count_calls()
    outcomes, failed = why_not_tried(), 0
    for key in keys():
        if key not in outcomes:
            try:
                outcomes[key] = outcome(key)[0]
            except Exception as error:
                print(f"{key}: {type(error).__name__}: {error}", file=sys.stderr)
                failed += 1
    if not failed:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(text.replace(page(), written(outcomes)), encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main()))
