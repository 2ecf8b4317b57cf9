"""Checkpoints: one file that holds a model, its tokenizer and, for training, all that an exact resume needs.

A checkpoint is a dict written by torch.save and loaded with weights_only=True (no code runs on load). It is written under
a temporary name, flushed to disk and renamed, so a crash or a full disk leaves the old file as it was.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .errors import UserError
from .files import write_atomically
from .model import GPT, GPTConfig
from .output import shortened

if TYPE_CHECKING:
    from .data import Tokenizer

FORMAT = "wikigpt"
VERSION = 1
NAME = "wiki-gpt.pth"
LAST = "last.pth"


class Loaded(NamedTuple):
    """What `load_model` gives: the model in eval mode, its tokenizer (None if the source has none), the raw dict."""

    model: GPT
    tokenizer: Tokenizer | None
    content: dict[str, Any]


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint. `content` holds "model" (state dict), "model_config", "tokenizer" (JSON dict) and more.

    Values are tensors and plain Python data, since that is all weights_only=True loads. Raises UserError on failure.
    """
    content = {"format": FORMAT, "version": VERSION, **content}
    content["tokenizer"] = json.dumps(content.get("tokenizer"))
    write_atomically(path, lambda file: torch.save(content, file))


def find(source: str | Path) -> Path:
    """The checkpoint file meant by `source`: a file, or a run directory that holds wiki-gpt.pth."""
    path = Path(source)
    if path.suffix == ".pth" and not path.exists():
        raise UserError(f"no checkpoint at {path}: name another")
    if path.is_dir():
        if (path / LAST).is_file() and not (path / NAME).is_file():
            raise UserError(f"{path} has no {NAME} yet, only the last save of a run: name {path / LAST}, or resume the run")
        path = path / NAME
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: train one with `wikigpt train --out {Path(source)}` or name another")
    return path


def load(source: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint. Raises UserError for a missing, truncated or foreign file."""
    path = find(source)
    try:
        # torch.save writes a checksum of every record, and torch.load does not look at it.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location=map_location, weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; change its permissions or use another copy") from error
    except Exception as error:  # the unpickler takes bytes of any other file for its instructions
        raise UserError(
            f"{path} is not a checkpoint of wikigpt, or it is damaged ({type(error).__name__}); use another copy"
        ) from error
    if damaged:
        raise UserError(f"{path} is damaged: its part {damaged} is not what was written; use another copy")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is a PyTorch file, but not a checkpoint of wikigpt; train one with `wikigpt train`")
    try:
        if content["version"] > VERSION:
            raise UserError(f"{path} was written by a newer wikigpt (format {content['version']}); upgrade wikigpt")
        content["tokenizer"] = json.loads(content["tokenizer"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); use another copy") from error
    return content


def model_from(content: dict[str, Any], device: Any = "cpu", backend: str | None = None) -> GPT:
    """The model inside a loaded checkpoint, in eval mode."""
    try:
        config = GPTConfig(**{**content["model_config"], **({} if backend is None else {"backend": backend})})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's model_config makes no model ({error}); use another copy") from error
    model = GPT(config)
    try:
        model.load_state_dict(content["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the weights in the checkpoint do not fit its configuration: {reason[:300]}; use another copy"
        ) from error
    return model.to(device).eval()


def tokenizer_from(content: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer inside a loaded checkpoint, None where it holds none."""
    from .data import tokenizer_from_json

    return tokenizer_from_json(content["tokenizer"]) if content["tokenizer"] else None


def load_model(source: str | Path, device: Any = "cpu", backend: str | None = None) -> Loaded:
    """Model and tokenizer from a checkpoint file, a run directory, or a Hugging Face directory or name.

    Raises UserError where nothing usable is there.
    """
    path = Path(source)
    # A name on the Hub is one word or OWNER/NAME; anything that can be a path here is one.
    try:
        local = path.exists() or path.suffix == ".pth" or len(path.parts) > 2 or (path.parent.name and path.parent.is_dir())
    except OSError as error:  # a name that is too long
        raise UserError(f"cannot read the checkpoint {shortened(path)}: {error.strerror}; name another") from None
    hugging_face = (path / "config.json").is_file() or not local
    if hugging_face:
        from . import hub

        model = hub.from_pretrained(str(source), **({"backend": backend} if backend else {}))
        return Loaded(model.to(device).eval(), hub.load_tokenizer(str(source)), {})
    content = load(path)
    tokenizer = tokenizer_from(content)
    model = model_from(content, device, backend)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} types, its model {model.config.vocab_size}; the file is damaged"
        )
    return Loaded(model, tokenizer, content)
