"""Hugging Face interchange: GPT-2 and Llama weights come in, and models go out in the same two layouts.

`config.json` and the weights are read and written here, without transformers. A layout is one table
(`_parts`) from names in the file to rows of our parameters; loading and saving walk the same table.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .data import BPETokenizer, Tokenizer, WordTokenizer, tokenizer_from_json
from .data.sources import HUB_SECONDS, _within
from .data.tokenizers import EOS, UNK, _visible, _without_surrogates
from .errors import UserError
from .files import writable_directory, write_bytes
from .model import GPT, GPTConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Model

OWN_TOKENIZER = "wikigpt_tokenizer.json"
OVERRIDES = ("backend", "context_length", "dropout")
_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_PREFIX = {"gpt2": "transformer.", "llama": "model."}
_LAYOUTS = (
    "there are two Hugging Face layouts: GPT-2 (learned, layernorm, gelu or gelu_tanh, n_kv_head = n_head, "
    "head_dim = n_embd / n_head) and Llama (rotary, rmsnorm, swiglu, n_embd a multiple of n_head)"
)
# Buffers that older transformers stored among the weights: the causal mask and the rotary frequencies.
_BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_WEIGHT_FILES = ["model*.safetensors", "model.safetensors.index.json"]
_BIN_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
_TOKENIZER_FILES = [OWN_TOKENIZER, "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
# What else of a model may lie in a directory and would belong to none once another one is there.
_REST = ["generation_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"]


# ---- files ----


def _directory(source: str | Path, patterns: list[str]) -> Path:
    """`source` itself, or the folder that the files of that name on the Hub which match `patterns` are in."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise UserError(f"{source} is a file: give the directory that holds config.json and model.safetensors")
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download

    source = str(source)
    try:
        # snapshot_download retries an unreachable Hub for a long time, so ask this first.
        url = hf_hub_url(source, "config.json")
        _within(HUB_SECONDS, lambda: get_hf_file_metadata(url, timeout=HUB_SECONDS - 1))
        return Path(snapshot_download(source, allow_patterns=patterns, etag_timeout=HUB_SECONDS))
    except Exception as error:  # three generations of HTTP libraries below, with no base class in common
        try:
            return Path(snapshot_download(source, allow_patterns=patterns, local_files_only=True))
        except Exception:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise UserError(
                f"no directory {source!r}, nothing in the cache, and the Hugging Face Hub did not give it "
                f"({reason}): check the name, connect, or give a directory that "
                f"`hf download {source} --local-dir DIR` made on another machine"
            ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({' '.join(str(error).split())}): use another copy") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: use another copy")
    return content


def _weight_files(directory: Path) -> list[Path]:
    """The files of weights, safetensors preferred, shards in order; empty where there are none."""
    for name in _WEIGHTS:
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index} has no weight_map: use another copy")
            files = [directory / shard for shard in sorted(set(weight_map.values()))]
            for file in files:
                if not file.is_file():
                    raise UserError(f"{index} names {file.name}, which is not there: download that file too")
            return files
    return []


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights in a file, one at a time. Raises UserError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a dict
                    yield name, opened.get_tensor(name)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True).items()
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        OSError,
        AttributeError,
    ) as error:
        raise UserError(f"{file} is damaged or no file of weights ({type(error).__name__}); use another copy") from error


# ---- configurations ----


def _config_from(hf: dict[str, Any], where: Path, overrides: dict[str, Any]) -> GPTConfig:
    """The GPTConfig of a config.json. Raises UserError that names the key which we cannot follow."""

    def reject(key: str, value: Any, allowed: str) -> None:
        raise UserError(f"{where}: {key} is {value!r}, wikigpt supports {allowed}; use another model")

    kind = hf.get("model_type")
    if kind not in _PREFIX:
        reject("model_type", kind, "'gpt2' and 'llama'")
    if hf.get("quantization_config"):
        reject("quantization_config", hf["quantization_config"], "weights that are not quantised")
    try:
        if kind == "gpt2":
            for key, value in (
                ("scale_attn_weights", True),
                ("scale_attn_by_inverse_layer_idx", False),
                ("add_cross_attention", False),
            ):
                if hf.get(key, value) != value:
                    reject(key, hf[key], repr(value))
            activation = hf.get("activation_function", "gelu_new")
            if activation not in _GELU:
                reject("activation_function", activation, ", ".join(map(repr, _GELU)))
            fields = {
                "context_length": hf["n_positions"],
                "n_layer": hf["n_layer"],
                "n_head": hf["n_head"],
                "n_embd": hf["n_embd"],
                "intermediate_size": hf.get("n_inner"),
                "activation": _GELU[activation],
                "tie_embeddings": hf.get("tie_word_embeddings", True),
                "dropout": hf.get("resid_pdrop", 0.1),
                "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
            }
        else:
            if hf.get("hidden_act", "silu") not in ("silu", "swish"):
                reject("hidden_act", hf["hidden_act"], "'silu'")
            # transformers 5 has rope_parameters; before, rope_theta stood apart from rope_scaling.
            rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
            rope_type = rope.get("rope_type", rope.get("type", "default"))
            if rope_type != "default":
                key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
                reject(f"{key}.rope_type", rope_type, "'default'")
            partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
            if partial != 1.0:
                reject("partial_rotary_factor", partial, "1.0")
            fields = {
                "context_length": hf["max_position_embeddings"],
                "n_layer": hf["num_hidden_layers"],
                "n_head": hf["num_attention_heads"],
                "n_kv_head": hf.get("num_key_value_heads"),
                "n_embd": hf["hidden_size"],
                "head_dim": hf.get("head_dim"),
                "intermediate_size": hf["intermediate_size"],
                "position": "rotary",
                "norm": "rmsnorm",
                "activation": "swiglu",
                "bias": hf.get("attention_bias", False) or hf.get("mlp_bias", False),
                "tie_embeddings": hf.get("tie_word_embeddings", False),
                "dropout": hf.get("attention_dropout", 0.0),
                "norm_eps": hf.get("rms_norm_eps", 1e-6),
                "rope_theta": rope.get("rope_theta", hf.get("rope_theta", 10_000.0)),
            }
        return GPTConfig(**{"vocab_size": hf["vocab_size"], **fields, **overrides})
    except KeyError as error:
        raise UserError(f"{where} lacks {error.args[0]}: use a complete copy") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where} makes no model ({error}): use another copy") from None


def _config_to(model: GPT, special: dict[str, int]) -> dict[str, Any]:
    """The config.json of a model. Raises UserError where neither layout can hold it."""
    config = model.config
    learned = config.position == "learned"
    wanted: dict[str, bool] = {
        "position": config.position != "alibi",
        "norm": config.norm == ("layernorm" if learned else "rmsnorm"),
        "activation": (config.activation != "swiglu") == learned,
        "n_kv_head": config.n_kv_head == config.n_head or not learned,
        "head_dim": config.head_dim * config.n_head == config.n_embd or not learned,  # type: ignore[operator]
        "n_embd": config.n_embd % config.n_head == 0,
    }
    if not wanted["position"]:
        raise UserError(f"position={config.position!r} cannot be saved: {_LAYOUTS}")
    wrong = [f"{name}={getattr(config, name)!r}" for name, fits in wanted.items() if not fits]
    if wrong:
        raise UserError(f"position={config.position!r} with {', '.join(wrong)} cannot be saved: {_LAYOUTS}")
    dtype = str(model.wte.weight.dtype).removeprefix("torch.")
    common = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": special.get("bos_token_id"),
        "eos_token_id": special.get("eos_token_id"),
        "initializer_range": 0.02,
        "use_cache": True,
        # One name for transformers 4 (and the vLLM of its time), one for transformers 5.
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if learned:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": config.context_length,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.intermediate_size,
            "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            **common,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": config.context_length,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        **common,
    }


# ---- weights ----


class _Part(NamedTuple):
    """Where a weight of the file stands in our model: all of a parameter, or some rows of a fused one."""

    name: str
    rows: slice = slice(None)
    transposed: bool = False


def _parts(config: GPTConfig, hf: dict[str, Any]) -> dict[str, _Part]:
    """Name in the file -> part, for all weights that a model of this config.json has."""
    prefix = _PREFIX[hf["model_type"]]
    learned = hf["model_type"] == "gpt2"
    parts = {f"{prefix}{'wte' if learned else 'embed_tokens'}.weight": _Part("wte.weight")}
    if not config.tie_embeddings:
        parts["lm_head.weight"] = _Part("head.weight")
    everything = slice(None)
    if learned:
        parts["transformer.wpe.weight"] = _Part("wpe.weight")
        final = ("transformer.ln_f", "norm", True)
        layers = "transformer.h"
        block = [
            ("ln_1", "norm1", everything, True),
            ("attn.c_attn", "attn.qkv", everything, True),
            ("attn.c_proj", "attn.proj", everything, True),
            ("ln_2", "norm2", everything, True),
            ("mlp.c_fc", "mlp.fc", everything, True),
            ("mlp.c_proj", "mlp.proj", everything, True),
        ]
    else:
        q = config.n_head * config.head_dim  # type: ignore[operator]
        k = q + config.n_kv_head * config.head_dim  # type: ignore[operator]
        attention_bias, mlp_bias = hf.get("attention_bias", False), hf.get("mlp_bias", False)
        final = ("model.norm", "norm", False)
        layers = "model.layers"
        block = [
            ("input_layernorm", "norm1", everything, False),
            ("self_attn.q_proj", "attn.qkv", slice(q), attention_bias),
            ("self_attn.k_proj", "attn.qkv", slice(q, k), attention_bias),
            ("self_attn.v_proj", "attn.qkv", slice(k, None), attention_bias),
            ("self_attn.o_proj", "attn.proj", everything, attention_bias),
            ("post_attention_layernorm", "norm2", everything, False),
            ("mlp.gate_proj", "mlp.fc", slice(config.intermediate_size), mlp_bias),
            ("mlp.up_proj", "mlp.fc", slice(config.intermediate_size, None), mlp_bias),
            ("mlp.down_proj", "mlp.proj", everything, mlp_bias),
        ]
    modules = [(final[0], final[1], everything, final[2])]
    for i in range(config.n_layer):
        modules += [(f"{layers}.{i}.{theirs}", f"blocks.{i}.{ours}", rows, bias) for theirs, ours, rows, bias in block]
    for theirs, ours, rows, bias in modules:
        # GPT-2's linear layers are Conv1D: (in, out).
        parts[f"{theirs}.weight"] = _Part(f"{ours}.weight", rows, ".c_" in theirs)
        if bias:
            parts[f"{theirs}.bias"] = _Part(f"{ours}.bias", rows)
    return parts


def _listed(names: set[str]) -> str:
    shown = sorted(names)[:6]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def from_pretrained(source: str, **overrides: Any) -> GPT:
    """A GPT in eval mode with the weights of a GPT-2 or Llama: a directory or a name on the Hub ("gpt2").

    `overrides` may have dtype, that of the parameters whatever the file holds (default torch.float32), and
    what goes into the config: backend, dropout and, for rotary positions, context_length. Unless given,
    dropout is GPT-2's resid_pdrop or Llama's attention_dropout. Where only some linear layers of a Llama have
    biases, the others get biases of zero.

    Raises UserError where the source cannot be read or has what a GPT cannot express, ValueError for other
    overrides.
    """
    dtype = overrides.pop("dtype", torch.float32)
    for name in overrides.keys() - set(OVERRIDES):
        raise ValueError(f"overrides: got {name!r}, allowed are dtype, {', '.join(OVERRIDES)}")
    files = ["config.json", "generation_config.json", *_WEIGHT_FILES, *_TOKENIZER_FILES]
    directory = _directory(source, files)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json: give a directory that save_pretrained wrote")
    weights = _weight_files(directory)
    if not weights and not Path(source).is_dir():
        directory = _directory(source, files + _BIN_FILES)
        weights = _weight_files(directory)
    if not weights:
        raise UserError(f"{directory} has no weights: it needs {' or '.join(_WEIGHTS)}")
    hf = _read_json(directory / "config.json")
    config = _config_from(hf, directory / "config.json", overrides)
    parts, prefix = _parts(config, hf), _PREFIX[hf["model_type"]]
    with torch.device("meta"):
        model = GPT(config)
    state = {name: torch.zeros(like.shape, dtype=dtype) for name, like in model.state_dict().items()}
    missing, extra = set(parts), set()
    head = None
    for file in weights:
        for name, tensor in _tensors(file):
            if not name.startswith((prefix, "lm_head.")):
                name = prefix + name  # a file of the base model, such as the Hub's gpt2
            if name == "lm_head.weight" and config.tie_embeddings:
                head = tensor
            elif name in parts:
                part = parts[name]
                target, given = state[part.name][part.rows], tensor.t() if part.transposed else tensor
                if target.shape != given.shape:
                    want = tuple(target.t().shape if part.transposed else target.shape)
                    raise UserError(
                        f"{file}: {name} has shape {tuple(tensor.shape)}, by config.json it is {want}; "
                        "use files that belong together"
                    )
                target.copy_(given)
                missing.discard(name)
            elif not _BUFFERS.search(name):
                extra.add(name)
    for problem, names in (("lacks", missing), ("has unknown", extra)):
        if names:
            raise UserError(
                f"{directory} {problem} weights for the {hf['model_type']} of config.json: {_listed(names)}; "
                "use files that belong together"
            )
    if head is not None and not torch.equal(head.to(dtype), state["wte.weight"]):
        raise UserError(
            f"{directory}: lm_head.weight is not the token embedding although tie_word_embeddings is true; "
            "set it to false in config.json"
        )
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.wte.weight
    return model.eval()


def save_pretrained(model: GPT, directory: str | Path, tokenizer: Tokenizer | None = None, overwrite: bool = False) -> None:
    """Write a directory that transformers and vLLM load; with `tokenizer`, `AutoTokenizer` does so too.

    The layout is GPT-2's for learned positions, Llama's for rotary ones; a GPT-2 without biases gets zeros.
    Weights keep their dtype. `overwrite` allows a directory that holds files: those of a model are replaced, others stay.
    Whatever interrupts this, the directory has a whole model or none that loads.
    Raises UserError where the model fits neither layout, the directory holds files or a run, or a file cannot be written.
    """
    special = {} if tokenizer is None else {"bos_token_id": tokenizer.first_id, "eos_token_id": tokenizer.eos_id}
    hf = _config_to(model, special)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} types, the model {model.config.vocab_size}: "
            "save the model with the tokenizer that it was trained with"
        )
    _check_target(Path(directory), overwrite)
    state = model.state_dict()
    tensors = {}
    for name, part in _parts(model.config, hf).items():
        if part.name in state:
            tensor = state[part.name][part.rows].detach().cpu()
            tensors[name] = (tensor.t() if part.transposed else tensor).contiguous()
        else:
            weight = state[part.name.removesuffix("bias") + "weight"]
            tensors[name] = torch.zeros(weight.shape[0], dtype=weight.dtype)
    from safetensors.torch import save

    files = {"model.safetensors": save(tensors, metadata={"format": "pt"})}
    if tokenizer is not None:
        files |= _tokenizer_files(tokenizer, model.config.context_length)
        files["generation_config.json"] = _json({**special, "pad_token_id": tokenizer.eos_id})
    _write(Path(directory), {**files, "config.json": _json(hf)})


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


_UNFINISHED = ".export-"  # begins the name of the folder in which files are written before they take their places


def _check_target(directory: Path, overwrite: bool) -> None:
    """Raises UserError for a directory that a model must not be written to."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; name a directory")
    names = sorted(p.name for p in directory.iterdir() if not p.name.startswith(_UNFINISHED)) if directory.is_dir() else []
    if any(name.endswith(".pth") for name in names):
        raise UserError(f"{directory} holds a run or a checkpoint; name another directory for the export")
    if names and not overwrite:
        raise UserError(
            f"{directory} is not empty ({_listed(set(names))}); name another directory, or add --overwrite "
            "(overwrite=True) to replace the model in it"
        )


def _write(directory: Path, files: dict[str, bytes]) -> None:
    """Write a model's files, config.json last: without that one nothing loads a directory. Raises UserError."""
    existed = directory.is_dir()
    writable_directory(directory)
    try:
        for left in directory.glob(f"{_UNFINISHED}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=directory))
        try:
            for name, content in files.items():
                write_bytes(work / name, content)
            (directory / "config.json").unlink(missing_ok=True)
            for pattern in (*_WEIGHT_FILES, *_BIN_FILES, *_TOKENIZER_FILES, *_REST):
                for old in directory.glob(pattern):
                    old.unlink()
            for name in sorted(files, key="config.json".__eq__):
                os.replace(work / name, directory / name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if not existed:
                with suppress(OSError):  # not empty: it has the model
                    directory.rmdir()
    except OSError as error:
        raise UserError(f"cannot write to {directory} ({error.strerror}): free some space or name another directory") from None


# ---- tokenizers ----


class HubTokenizer(Tokenizer):
    """A tokenizer.json of the Hub; `encode` gives the ids of transformers without those around a text.

    bos_id is what its post-processor puts before a text, or else the one given. What it puts behind a text is left out.
    """

    kind = "hub"

    def __init__(self, model: str, eos_id: int, bos_id: int | None = None) -> None:
        from tokenizers import Tokenizer as Model

        self._model = Model.from_str(model)
        self._model.no_truncation()
        self._model.no_padding()
        self.eos_id = eos_id
        first = self._model.encode("a", add_special_tokens=True)
        self.adds_bos = first.special_tokens_mask[:1] == [1]
        self.bos_id = first.ids[0] if self.adds_bos else bos_id
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(_without_surrogates(text), add_special_tokens=False).ids, dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": self._model.to_str(), "eos_id": self.eos_id, "bos_id": self.bos_id}

    def _text(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if i not in (self.eos_id, self.bos_id)], skip_special_tokens=False)

    def _label(self, token_id: int) -> str:
        text = self._text([token_id])
        return str(self._model.id_to_token(token_id)) if "\ufffd" in text or not text else _visible(text)


def load_tokenizer(source: str | Path) -> Tokenizer | None:
    """The tokenizer of a directory or a name on the Hub; None where there is none.

    Ours (wikigpt_tokenizer.json) comes back as it was saved; tokenizer.json, or GPT-2's vocab.json with
    merges.txt, as a `HubTokenizer`. Raises UserError for a damaged one, or one without an end of text.
    """
    directory = _directory(source, ["config.json", *_TOKENIZER_FILES])
    if (directory / OWN_TOKENIZER).is_file():
        return tokenizer_from_json(_read_json(directory / OWN_TOKENIZER))
    path = directory / "tokenizer.json"
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    if not path.is_file() and not (vocab.is_file() and merges.is_file()):
        return None
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Model

    try:
        if path.is_file():
            model = Model.from_file(str(path))
        else:
            path = vocab
            model = Model(models.BPE.from_file(str(vocab), str(merges)))
            model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            model.decoder = decoders.ByteLevel()
            if model.token_to_id("<|endoftext|>") is not None:
                model.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
            # Only where there is no tokenizer.json: transformers, too, believes that file alone.
            bos_id = _special_id("bos", directory, model)
            if bos_id is not None and _settings(directory).get("add_bos_token"):
                bos = model.id_to_token(bos_id)
                model.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{path} is no tokenizer ({' '.join(str(error).split())}): use another copy") from None
    eos_id = _special_id("eos", directory, model)
    if eos_id is None:
        eos_id = model.token_to_id("<|endoftext|>")
    if eos_id is None:
        raise UserError(f"{directory} names no end-of-text token: set eos_token in its tokenizer_config.json")
    return HubTokenizer(model.to_str(), eos_id, _special_id("bos", directory, model))


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return _read_json(path) if path.is_file() else {}


def _special_id(which: str, directory: Path, model: Model) -> int | None:
    """The id of the "eos" or "bos" token by tokenizer_config.json, else config.json."""
    token = _settings(directory).get(f"{which}_token")
    token_id = model.token_to_id(str(token["content"] if isinstance(token, dict) else token)) if token else None
    if token_id is None and (directory / "config.json").is_file():
        token_id = _read_json(directory / "config.json").get(f"{which}_token_id")
    return token_id[0] if isinstance(token_id, list) else token_id


def _tokenizer_files(tokenizer: Tokenizer, context_length: int) -> dict[str, bytes]:
    """What `AutoTokenizer` reads, and ours, by name."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        # transformers 4 would make token_type_ids too, and its GPT-2 add them to the embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, HubTokenizer):
        model = tokenizer._model
        settings["eos_token"] = model.id_to_token(tokenizer.eos_id)
        settings["bos_token"] = model.id_to_token(tokenizer.first_id)
    else:
        model = _as_library_model(tokenizer)
        settings["eos_token"] = EOS
        # No text encodes to a special token of ours, not even its name.
        settings["split_special_tokens"] = True
        if isinstance(tokenizer, WordTokenizer):
            settings["unk_token"] = UNK
    return {
        "tokenizer.json": model.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(settings),
        OWN_TOKENIZER: _json(tokenizer.to_json()),
    }


def _as_library_model(tokenizer: Tokenizer) -> Model:
    """One of our three tokenizers in terms of the library `tokenizers`."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Model

    if isinstance(tokenizer, WordTokenizer):
        model = Model(models.WordLevel({word: i for i, word in enumerate(tokenizer.types)}, unk_token=UNK))
        model.normalizer = normalizers.Sequence(
            [
                normalizers.Replace("\n", f" {EOS} "),
                # White space for Python, not for Rust.
                normalizers.Replace(Regex("[\x1c-\x1f]"), " "),
            ]
        )
        model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        model.decoder = decoders.Sequence(
            [
                decoders.Replace(Regex("^"), " "),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
                decoders.Replace(Regex(f"(?<!\\S){EOS}(?!\\S)"), "\n"),
                decoders.Replace(Regex(" ?\n ?"), "\n"),
            ]
        )
        model.add_special_tokens([AddedToken(UNK, special=True, normalized=False)])
    else:
        if isinstance(tokenizer, BPETokenizer):
            vocab = {token: i for i, token in enumerate(tokenizer.vocab)}
            model = Model(models.BPE(vocab, [(left, right) for left, right in tokenizer.merges]))
            model.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex("[^\n]*\n|[^\n]+"), "isolated"),  # line by line
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        else:
            model = Model(models.BPE(_byte_characters(), []))
            model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    assert model.token_to_id(EOS) == tokenizer.eos_id
    return model


def _byte_characters() -> dict[str, int]:
    """Visible character -> the byte that it stands for in byte-level BPE (Radford et al. 2019)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


__all__ = ["HubTokenizer", "from_pretrained", "load_tokenizer", "save_pretrained"]
