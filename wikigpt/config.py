"""The configuration of a training run: three groups of plain values, from a preset, a YAML or TOML file, and key=value.

Later sources win: defaults, preset, file, command line. The resolved configuration is saved with the run (config.yaml).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from .errors import UserError
from .model import GPTConfig


@dataclass
class DataConfig:
    dataset: str = "wikitext-2"  # wikitext-2 | wikitext-2-raw | auto | pydoc | path or glob of text files
    data_dir: str | None = None  # local copy of WikiText-2; None: WIKIGPT_DATA_DIR, else the Hub
    tokenizer: str = "word"  # word | bpe | byte
    vocab_size: int | None = None  # None: every word; 8192 for bpe


@dataclass
class TrainConfig:
    steps: int = 1000  # optimiser steps
    max_seconds: float | None = None  # stop earlier; the schedule follows whichever limit is nearer
    batch_size: int = 8  # sequences of context_length tokens per process and micro-step
    accumulate: int = 1  # micro-steps per optimiser step
    optimizer: str = "adamw"  # adamw | muon (matrices inside the blocks; the rest AdamW)
    lr: float = 1e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad_norm: float = 1.0  # 0: no clipping
    schedule: str = "cosine"  # cosine | wsd (warmup, stable, linear decay over the last decay_fraction) | constant
    warmup_steps: int = 50
    min_lr_fraction: float = 0.1
    decay_fraction: float = 0.2
    ema_decay: float = 0.0  # 0: no moving average of the weights
    precision: str = "fp32"  # fp32 | bf16 (autocast)
    compile: bool = False
    cuda_graph: bool = True  # the whole step as one CUDA graph; only on one GPU with adamw
    device: str = "auto"  # auto | cpu | cuda | cuda:1 ...
    parallel: str = "ddp"  # ddp | fsdp, under torchrun
    seed: int = 1337
    log_interval: int = 10  # steps between log lines
    eval_interval: int = 200  # steps between validations
    eval_tokens: int = 32768  # validation tokens looked at during training: evenly spaced windows, always the same
    final_tokens: int | None = None  # of validation and test looked at in the end; None: all of both, sliding window
    save_interval: int = 200  # steps between checkpoints
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_interval",
            "eval_interval",
            "save_interval",
            "eval_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be 1 or more")
        for name in ("lr", "muon_lr", "weight_decay", "clip_grad_norm", "warmup_steps", "min_lr_fraction"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be 0 or more")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be at least 0 and below 1")
        for name, allowed in (
            ("optimizer", ("adamw", "muon")),
            ("schedule", ("cosine", "wsd", "constant")),
            ("precision", ("fp32", "bf16")),
            ("parallel", ("ddp", "fsdp")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed are {', '.join(allowed)}")


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    # vocab_size comes from the tokenizer.
    model: GPTConfig = field(default_factory=GPTConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)


GROUPS: dict[str, Any] = {"data": DataConfig, "model": GPTConfig, "train": TrainConfig}


def presets() -> list[str]:
    folder = importlib.resources.files("wikigpt") / "presets"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def _nearest(word: str, words: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0.4)
    return f"; did you mean {match[0]}?" if match else f"; known are {', '.join(words)}"


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

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected groups {', '.join(GROUPS)}, got {type(content).__name__}")
    return content


def _convert(value: Any, hint: Any, name: str, source: str) -> Any:
    """`value` as the field's type; YAML reads 1e-3 as text, and everything on the command line is text."""
    allowed = hint.__args__ if hasattr(hint, "__args__") else (hint,)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
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
        if isinstance(value, bool) or str(value).lower() in words:
            return value if isinstance(value, bool) else words[str(value).lower()]
    elif int in allowed and not isinstance(value, bool):
        try:
            if float(value) == int(float(value)):
                return int(float(value))
        except (TypeError, ValueError, OverflowError):
            pass
    elif float in allowed and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif str in allowed and isinstance(value, str | int | float):
        return str(value)
    kinds = " or ".join("none" if t is type(None) else t.__name__ for t in allowed)
    raise UserError(f"{source}: {name} must be {kinds}, got {value!r}")


def merge(into: dict[str, dict[str, Any]], groups: Mapping[str, Any], source: str) -> None:
    """Enter groups of values read from `source`, checked and converted. Raises UserError for unknown keys."""
    for group, values in groups.items():
        if group not in GROUPS:
            raise UserError(f"{source}: unknown group {group!r}{_nearest(group, GROUPS)}")
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: {group} must hold key: value lines, got {values!r}")
        hints = get_type_hints(GROUPS[group])
        for key, value in values.items():
            if key not in hints:
                raise UserError(f"{source}: unknown key {group}.{key}{_nearest(str(key), hints)}")
            into[group][key] = _convert(value, hints[key], f"{group}.{key}", source)


def parse_overrides(overrides: Iterable[str]) -> dict[str, dict[str, Any]]:
    """["train.lr=3e-4", "n_layer=6"] as groups; the group may be left out where only one has the key."""
    groups: dict[str, dict[str, Any]] = {}
    hints = {group: get_type_hints(cls) for group, cls in GROUPS.items()}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r}: expected key=value, for example train.lr=3e-4")
        group, dot, key = name.partition(".")
        if not dot:
            owners = [g for g in hints if name in hints[g]]
            if len(owners) != 1:
                hint = f"; write {' or '.join(f'{g}.{name}' for g in owners)}" if owners else ""
                every = [f"{g}.{k}" for g in hints for k in hints[g]]
                raise UserError(f"unknown key {name!r}{hint or _nearest(name, [e.split('.')[1] for e in every])}")
            group, key = owners[0], name
        groups.setdefault(group, {})[key] = value
    return groups


def resolve(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    base: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration from `base` (a saved one), preset, file and key=value overrides, later ones winning.

    Raises UserError for an unknown preset, key or value, naming the nearest valid one.
    """
    values: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    if base is not None:
        merge(values, base, "saved configuration")
    if preset is not None:
        if preset not in presets():
            raise UserError(f"unknown preset {preset!r}{_nearest(preset, presets())}")
        text = (importlib.resources.files("wikigpt") / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
        merge(values, _parse(text, f"preset {preset}"), f"preset {preset}")
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the configuration {file}: {getattr(error, 'strerror', None) or error}") from None
        merge(values, _parse(text, str(file)), str(file))
    merge(values, parse_overrides(overrides), "command line")
    try:
        return Config(DataConfig(**values["data"]), GPTConfig(**values["model"]), TrainConfig(**values["train"]))
    except ValueError as error:
        raise UserError(f"configuration: {error}") from None


def dump(config: Config) -> str:
    """The configuration as YAML."""
    import yaml

    return yaml.safe_dump(config.to_dict(), sort_keys=False)


__all__ = ["Config", "DataConfig", "TrainConfig", "dump", "presets", "resolve"]
