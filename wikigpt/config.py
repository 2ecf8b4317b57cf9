"""The configuration of a training run: three groups of plain values, from a preset, a YAML or TOML file, and key=value.

Later sources win: defaults, preset, file, command line. The resolved configuration is saved with the run (config.yaml).
The comment beside a field is its description wherever settings are listed. Importing this imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import inspect
import math
import numbers
import os
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from .errors import UserError, integer

POSITIONS = ("learned", "rotary", "alibi")
NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")
BACKENDS = ("auto", "reference", "torch", "cpu", "cuda", "triton")  # those of wikigpt.kernels, which imports torch
MAX_HEAD_DIM = 1024  # of the attention kernels
MOST = 2**31 - 1  # of whatever is counted here: more is a slip of the finger


# --- the three groups ------------------------------------------------------------------------------------------------


@dataclass
class DataConfig:
    dataset: str = "wikitext-2"  # wikitext-2, wikitext-2-raw, auto, pydoc, or a path, folder or glob of text files
    data_dir: str | None = (
        None  # folder with train.txt valid.txt test.txt or wiki.*.tokens; none: WIKIGPT_DATA_DIR, else the Hub
    )
    tokenizer: str = "word"  # word (33,278 types on WikiText-2, what papers report), bpe, byte
    vocab_size: int | None = None  # limit of the vocabulary; none: every word, 8192 for bpe

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("dataset: got nothing, must be a name or a path")
        if self.data_dir is not None and not str(self.data_dir):
            raise ValueError("data_dir: got nothing, must be a folder; leave it out for WIKIGPT_DATA_DIR or the Hub")
        from .data.tokenizers import KINDS, SMALLEST  # with numpy, which a help page can do without

        _words(self, tokenizer=KINDS)
        _integers(self, "vocab_size", SMALLEST[self.tokenizer])
        if self.tokenizer == "byte" and self.vocab_size not in (None, 257):
            raise ValueError(f"vocab_size: got {self.vocab_size}, a byte vocabulary has 257 tokens; leave it out")


@dataclass
class GPTConfig:
    vocab_size: int = 33278  # from the tokenizer
    context_length: int = 256  # positions that the model sees
    n_layer: int = 6  # blocks
    n_head: int = 8  # attention heads
    n_kv_head: int | None = None  # heads of keys and values; none: n_head; fewer: grouped-query attention (Ainslie et al. 2023)
    n_embd: int = 512  # width
    head_dim: int | None = None  # width of a head; none: n_embd / n_head
    intermediate_size: int | None = None  # width inside the MLP; none: 4 n_embd, for swiglu 8/3 n_embd, to a multiple of 32
    position: str = "learned"  # learned, rotary, alibi
    norm: str = "layernorm"  # layernorm, rmsnorm
    activation: str = "gelu_tanh"  # gelu, gelu_tanh, swiglu
    bias: bool = True  # biases of the linear layers and of LayerNorm
    tie_embeddings: bool = True  # the output head is the token embedding
    dropout: float = 0.0  # of attention weights and of what each block adds; 0 to below 1
    norm_eps: float = 1e-5  # added to the variance in norms
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    backend: str = "auto"  # which kernels: auto, reference, torch, triton

    def __post_init__(self) -> None:
        _integers(self, "vocab_size context_length n_layer n_head n_kv_head n_embd head_dim intermediate_size", 1)
        _words(self, position=POSITIONS, norm=NORMS, activation=ACTIVATIONS, backend=BACKENDS)
        _flags(self, "bias tie_embeddings")
        _numbers(self, "dropout", 0, below=1)
        _numbers(self, "norm_eps", above=0, high=1)
        _numbers(self, "rope_theta", above=0)
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_head: {self.n_head} does not divide n_embd {self.n_embd}; give head_dim")
            self.head_dim = self.n_embd // self.n_head
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim: got {self.head_dim}, must be {MAX_HEAD_DIM} or less; use more heads")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head: {self.n_kv_head} does not divide n_head {self.n_head}")
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, rotary positions need an even one")
        if self.intermediate_size is None:
            wide = -(-8 * self.n_embd // 96) * 32
            self.intermediate_size = wide if self.activation == "swiglu" else 4 * self.n_embd

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class TrainConfig:
    steps: int = 1000  # optimiser steps
    max_seconds: float | None = None  # stop earlier; the schedule follows whichever limit is nearer
    batch_size: int = 8  # sequences of context_length tokens per process and micro-step
    accumulate: int = 1  # micro-steps per optimiser step
    optimizer: str = "adamw"  # adamw, muon (matrices inside the blocks; the rest adamw)
    lr: float = 1e-3  # highest learning rate
    muon_lr: float = 0.02  # highest learning rate of muon
    weight_decay: float = 0.1  # of matrices
    beta1: float = 0.9  # adamw's average of gradients
    beta2: float = 0.95  # adamw's average of their squares
    clip_grad_norm: float = 1.0  # largest norm of the gradient; 0: no clipping
    schedule: str = "cosine"  # cosine, wsd (warmup, stable, linear decay over the last decay_fraction), constant
    warmup_steps: int = 50  # steps in which the learning rate rises
    min_lr_fraction: float = 0.1  # last learning rate as a fraction of the highest
    decay_fraction: float = 0.2  # part of the run in which wsd decays
    ema_decay: float = 0.0  # moving average of the weights, which is what is validated and kept; 0: none
    precision: str = "fp32"  # fp32, bf16 (autocast), or auto: bf16 on a GPU and on a CPU with units for it
    compile: bool = False  # torch.compile
    cuda_graph: bool = True  # the whole step as one CUDA graph; only on one GPU with adamw, elsewhere without effect
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    parallel: str = "ddp"  # ddp, fsdp (FSDP2); under torchrun
    seed: int = 1337  # of weights, batches and dropout; 64 bits
    log_interval: int = 10  # steps between lines of log.jsonl
    eval_interval: int = 200  # steps between validations
    eval_tokens: int = 32768  # validation tokens looked at during training: evenly spaced windows, always the same
    final_tokens: int | None = None  # tokens of validation and test looked at in the end; none: all of both, sliding window
    save_interval: int = 200  # steps between checkpoints
    tensorboard: bool = True  # write TensorBoard logs

    def __post_init__(self) -> None:
        _integers(self, "steps batch_size accumulate log_interval eval_interval eval_tokens final_tokens save_interval", 1)
        _integers(self, "warmup_steps", 0)
        _integers(self, "seed", -(2**63), 2**64 - 1)  # the range of torch.manual_seed
        _numbers(self, "max_seconds", above=0)
        _numbers(self, "lr muon_lr weight_decay clip_grad_norm", 0)
        _numbers(self, "min_lr_fraction decay_fraction", 0, high=1)
        _numbers(self, "beta1 beta2 ema_decay", 0, below=1)
        _words(
            self,
            optimizer=("adamw", "muon"),
            schedule=("cosine", "wsd", "constant"),
            precision=("fp32", "bf16", "auto"),
            parallel=("ddp", "fsdp"),
        )
        _flags(self, "compile cuda_graph tensorboard")
        if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d{1,3})?", self.device):
            raise ValueError(f"device: unknown device {self.device!r}, allowed are auto, cpu, cuda, cuda:1 ...")
        if self.parallel == "fsdp" and self.ema_decay > 0:
            raise ValueError("ema_decay: not available with parallel=fsdp; use ddp or ema_decay=0")


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: GPTConfig = field(default_factory=GPTConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)


GROUPS: dict[str, Any] = {"data": DataConfig, "model": GPTConfig, "train": TrainConfig}


# --- checks of values ------------------------------------------------------------------------------------------------


def _integers(config: Any, names: str, low: int, high: int = MOST) -> None:
    """Make fields Python's own integers (numpy's cannot be loaded from a checkpoint). None stays."""
    for name in names.split():
        value = getattr(config, name)
        if value is None:
            continue
        value = integer(name, value)
        if not low <= value <= high:
            end = f"{low} or more" if value < low and high == MOST else f"from {low} to {high}"
            raise ValueError(f"{name}: got {value}, must be {end}")
        setattr(config, name, value)


def _numbers(
    config: Any,
    names: str,
    low: float | None = None,
    *,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> None:
    """Make fields finite floats within the limits given. None stays."""
    for name in names.split():
        value = getattr(config, name)
        if value is None:
            continue
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name}: got {type(value).__name__}, allowed is float")
        value = float(value)
        fits = (
            math.isfinite(value)
            and (low is None or value >= low)
            and (above is None or value > above)
            and (high is None or value <= high)
            and (below is None or value < below)
        )
        if not fits:
            first = f"at least {low}" if low is not None else f"above {above}"
            last = f" and below {below}" if below is not None else f" and at most {high}" if high is not None else ""
            words = f"{low} or more" if low is not None and not last else first + last
            raise ValueError(f"{name}: got {value}, must be {words}{'' if math.isfinite(value) else ', and finite'}")
        setattr(config, name, value)


def _words(config: Any, **allowed: tuple[str, ...]) -> None:
    for name, words in allowed.items():
        if getattr(config, name) not in words:
            raise ValueError(f"{name}: got {getattr(config, name)!r}, allowed are {', '.join(words)}")


def _flags(config: Any, names: str) -> None:
    for name in names.split():
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name}: got {type(getattr(config, name)).__name__}, allowed is bool")


# --- the list of settings --------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    group: str
    name: str
    default: Any
    meaning: str


def settings() -> list[Setting]:
    """Every setting that a user may give, with the comment beside it as its meaning."""
    rows = []
    for group, cls in GROUPS.items():
        comments = dict(re.findall(r"^    (\w+): [^#]*#\s*(.*)$", inspect.getsource(cls), re.MULTILINE))
        rows += [Setting(group, f.name, f.default, comments[f.name]) for f in dataclasses.fields(cls)]
    return [row for row in rows if (row.group, row.name) != ("model", "vocab_size")]


def presets() -> list[str]:
    folder = importlib.resources.files("wikigpt") / "presets"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


# --- wrong names -----------------------------------------------------------------------------------------------------

# What others call our settings: transformers (TrainingArguments, GPT2Config, LlamaConfig) and nanoGPT. For hints alone.
_ELSEWHERE = {
    "train.lr": "learning_rate",
    "train.batch_size": "per_device_train_batch_size train_batch_size micro_batch_size",
    "train.accumulate": "gradient_accumulation_steps grad_accum_steps accumulation_steps",
    "train.steps": "max_steps max_iters num_steps num_iterations lr_decay_iters num_train_epochs epochs",
    "train.max_seconds": "max_time",
    "train.optimizer": "optim",
    "train.beta1": "adam_beta1",
    "train.beta2": "adam_beta2",
    "train.clip_grad_norm": "max_grad_norm grad_clip gradient_clip_val",
    "train.schedule": "lr_scheduler_type lr_scheduler decay_lr",
    "train.warmup_steps": "warmup_iters warmup_ratio num_warmup_steps",
    "train.min_lr_fraction": "min_lr min_lr_ratio",
    "train.ema_decay": "ema",
    "train.precision": "bf16 fp16 fp32 tf32 dtype torch_dtype mixed_precision",
    "train.compile": "torch_compile",
    "train.device": "use_cpu no_cuda device_type",
    "train.parallel": "fsdp ddp strategy",
    "train.seed": "data_seed",
    "train.log_interval": "logging_steps",
    "train.eval_interval": "eval_steps",
    "train.eval_tokens": "eval_iters",
    "train.save_interval": "save_steps",
    "train.tensorboard": "report_to wandb_log",
    "model.n_layer": "num_hidden_layers num_layers n_layers depth",
    "model.n_head": "num_attention_heads num_heads n_heads",
    "model.n_kv_head": "num_key_value_heads n_kv_heads",
    "model.n_embd": "hidden_size d_model n_embed embed_dim embedding_size",
    "model.context_length": "n_positions n_ctx block_size max_position_embeddings max_seq_len max_seq_length sequence_length",
    "model.intermediate_size": "n_inner ffn_dim d_ff",
    "model.position": "position_embedding_type",
    "model.activation": "hidden_act activation_function",
    "model.tie_embeddings": "tie_word_embeddings tie_weights",
    "model.dropout": "resid_pdrop embd_pdrop attn_pdrop attention_dropout hidden_dropout",
    "model.norm_eps": "layer_norm_epsilon rms_norm_eps layer_norm_eps",
    "model.backend": "attn_implementation",
    "data.dataset": "dataset_name data_path data_files train_file",
    "data.tokenizer": "tokenizer_name",
    "--out": "out_dir output_dir",
    "--resume": "resume_from_checkpoint",
    "`wikigpt finetune --checkpoint`": "init_from model_name_or_path",
}
_ALIASES = {alias: ours for ours, aliases in _ELSEWHERE.items() for alias in aliases.split()}


def _keys() -> dict[str, str]:
    """Group by key, of all that a user may give: no key is in two groups."""
    found = {f.name: group for group, cls in GROUPS.items() for f in dataclasses.fields(cls)}
    return {**found, "vocab_size": "data"}  # the model's comes from the tokenizer


def _nearest(word: str, words: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0.7)
    return f"; did you mean {match[0]}?" if match else f"; known are {', '.join(words)}"


def _unknown_key(name: str, group: str | None, source: str) -> UserError:
    """The error for a key that no group has, or that `group` has not: with the key meant, where one can tell."""
    written = name if group is None else f"{group}.{name}"
    meant = _ALIASES | {key: f"{owner}.{key}" for key, owner in _keys().items()}
    plain = name.lower().lstrip("-").replace("-", "_")
    match = difflib.get_close_matches(plain, meant, n=1, cutoff=0.75)
    if match and match[0] == plain:
        hint = f"here it is {meant[plain]}"
    elif match:
        hint = f"did you mean {meant[match[0]]}?"
    elif group is not None:
        hint = f"{group} has {', '.join(key for key, owner in _keys().items() if owner == group)}"
    else:
        hint = "`wikigpt train --help` and docs/training.md list all keys"
    return UserError(f"{source}: unknown key {written}; {hint}")


# --- files and key=value ---------------------------------------------------------------------------------------------


def _parse(text: str, source: str) -> dict[str, Any]:
    """A mapping from YAML, or from TOML where the name says so."""
    if source.endswith(".toml"):
        try:
            import tomllib
        except ImportError:  # Python 3.10
            import tomli as tomllib  # type: ignore[no-redef]
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{source} is not valid TOML: {error}") from None
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML keeps the last of two equal keys in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):  # others are no keys of ours, and refused
                    if key.value in seen:
                        raise UserError(f"{source}: {key.value} is given twice, again in line {key.start_mark.line + 1}")
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:  # nothing but comments
        return {}
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "text" if isinstance(content, str) else type(content).__name__
        raise UserError(f'{source}: expected groups {", ".join(GROUPS)}, as in "train: {{lr: 1e-3}}", got {kind}')
    return content


def _read(file: str | Path) -> dict[str, Any]:
    path = Path(file)
    if path.is_dir():
        inside = path / "config.yaml"
        raise UserError(f"{file} is a folder; --config takes a file{f', for example {inside}' if inside.is_file() else ''}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the configuration {file}: {error.strerror}") from None
    from .data.sources import decode

    return _parse(decode(content, file), str(file))


def _convert(value: Any, hint: Any, name: str, source: str) -> Any:
    """`value` as the field's type; YAML reads 1e-3 as text, and everything on the command line is text."""
    allowed = hint.__args__ if hasattr(hint, "__args__") else (hint,)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and type(None) in allowed):
        if type(None) in allowed:
            return None
    elif bool in allowed:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if str(value).lower() in words:
            return words[str(value).lower()]
    elif isinstance(value, bool):
        pass
    elif int in allowed:
        try:
            return int(value) if isinstance(value, str | int) else _whole(value)
        except (TypeError, ValueError, OverflowError):
            pass
        try:
            return _whole(float(value))  # 1e6, as text
        except (TypeError, ValueError, OverflowError):
            pass
    elif float in allowed:
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif str in allowed and isinstance(value, str | int | float):
        return str(value)
    named: dict[Any, str] = {type(None): "none", int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    kinds = " or ".join(named[t] for t in allowed)
    raise UserError(f"{source}: {name} must be {kinds}, got {value!r}")


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError(value)
    return int(value)


def merge(into: dict[str, dict[str, Any]], groups: Mapping[str, Any], source: str) -> None:
    """Enter groups of values read from `source`, checked and converted. Raises UserError for unknown keys."""
    for group, values in groups.items():
        if group not in GROUPS:
            if owner := _keys().get(str(group)):
                raise UserError(f"{source}: {group} stands outside its group; write {owner}: {{{group}: ...}}")
            raise UserError(f"{source}: unknown group {group!r}{_nearest(str(group), GROUPS)}")
        if values is None:  # a group whose lines are all comments
            continue
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: {group} must hold key: value lines, got {values!r}")
        hints = get_type_hints(GROUPS[group])
        for key, value in values.items():
            if key not in hints:
                raise _unknown_key(str(key), group, source)
            if (group, key) == ("model", "vocab_size"):
                raise UserError(f"{source}: model.vocab_size comes from the tokenizer: leave it out, or set data.vocab_size")
            into[group][key] = _convert(value, hints[key], f"{group}.{key}", source)


def parse_overrides(overrides: Iterable[str]) -> dict[str, dict[str, Any]]:
    """["train.lr=3e-4", "n_layer=6"] as groups; the group may be left out."""
    groups: dict[str, dict[str, Any]] = {}
    owners = _keys()
    for text in overrides:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UserError(f"{text!r}: expected key=value, for example train.lr=3e-4")
        group, dot, key = name.partition(".")
        if not dot:
            if name not in owners:
                raise _unknown_key(name, None, "command line")
            group, key = owners[name], name
        groups.setdefault(group, {})[key] = value
    return groups


# --- the whole -------------------------------------------------------------------------------------------------------

# What has an effect only beside another setting: (setting, whether it has, what would give it one).
_EFFECTS: tuple[tuple[str, Any, str], ...] = (
    ("train.muon_lr", lambda c: c.train.optimizer == "muon", "train.optimizer=muon"),
    ("train.decay_fraction", lambda c: c.train.schedule == "wsd", "train.schedule=wsd"),
    ("train.min_lr_fraction", lambda c: c.train.schedule != "constant", "train.schedule=cosine or wsd"),
    ("train.parallel", lambda c: os.environ.get("WORLD_SIZE", "1") != "1", "torchrun"),
    ("model.rope_theta", lambda c: c.model.position == "rotary", "model.position=rotary"),
)


def resolve(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    base: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration from `base` (a saved one), preset, file and key=value overrides, later ones winning.

    Raises UserError for an unknown preset, key or value, naming the nearest valid one, for settings that contradict each
    other, and for an override that has no effect beside the others.
    """
    sources: list[tuple[str, Mapping[str, Any]]] = []
    if base is not None:
        saved = {group: dict(values) for group, values in base.items()}
        saved.get("model", {}).pop("vocab_size", None)
        sources.append(("saved configuration", saved))
    if preset is not None:
        if preset not in presets():
            raise UserError(f"unknown preset {preset!r}{_nearest(preset, presets())}")
        text = (importlib.resources.files("wikigpt") / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
        sources.append((f"preset {preset}", _parse(text, f"preset {preset}")))
    if file is not None:
        sources.append((str(file), _read(file)))
    given = parse_overrides(overrides)
    sources.append(("command line", given))
    values: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    origins: dict[str, str] = {}
    for source, groups in sources:
        merge(values, groups, source)
        origins |= {f"{group}.{key}": source for group, content in groups.items() for key in content or ()}
    parts = {}
    for group, cls in GROUPS.items():
        try:
            parts[group] = cls(**values[group])
        except (TypeError, ValueError) as error:
            name = f"{group}.{str(error).partition(':')[0]}"
            raise UserError(f"{origins.get(name, 'configuration')}: {group}.{error}") from None
    config = Config(**parts)
    if config.model.context_length < 2:
        raise UserError(f"{origins['model.context_length']}: model.context_length: got 1, must be 2 or more to train")
    for name, has_effect, remedy in _EFFECTS:
        group, key = name.split(".")
        if key in given.get(group, {}) and not has_effect(config):
            raise UserError(f"command line: {name} has no effect without {remedy}; use that or leave it out")
    return config


def dump(config: Config) -> str:
    """The configuration as YAML, for `resolve(file=...)`.

    What follows from the rest is left open, so that the rest can be changed: a file that names head_dim beside n_head would
    make another model than was meant, once n_head changes.
    """
    import yaml

    content = config.to_dict()
    model = content["model"]
    del model["vocab_size"]
    derived = ("n_kv_head", "head_dim", "intermediate_size")
    for name in derived:
        try:
            follows = getattr(GPTConfig(**{**model, name: None}), name) == model[name]
        except ValueError:  # n_head need not divide n_embd where head_dim is given
            follows = False
        if follows:
            model[name] = None
    return yaml.safe_dump(content, sort_keys=False)


__all__ = ["Config", "DataConfig", "GPTConfig", "Setting", "TrainConfig", "dump", "presets", "resolve", "settings"]
