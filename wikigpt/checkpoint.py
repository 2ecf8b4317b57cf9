"""Checkpoints: one file that holds a model, its tokenizer and, for training, all that an exact resume needs.

A checkpoint is a dict written by torch.save and loaded with weights_only=True (no code runs on load). It is written under
a temporary name, flushed to disk and renamed, so a crash or a full disk leaves the old file as it was.
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .errors import UserError
from .model import GPT, GPTConfig

if TYPE_CHECKING:
    from .data import Tokenizer

FORMAT = "wikigpt"
VERSION = 1
NAME = "wiki-gpt.pth"


class Loaded(NamedTuple):
    """What `load_model` gives: the model in eval mode, its tokenizer (None if the source has none), the raw dict."""

    model: GPT
    tokenizer: Tokenizer | None
    content: dict[str, Any]


def writable_directory(directory: str | Path) -> Path:
    """Make the directory where needed. Raises UserError where files cannot be written into it."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}; choose another with --out") from None
    return directory


def write_atomically(path: str | Path, write: Any) -> None:
    """Call write(file) on a temporary file beside `path` and rename it to `path` when it is safely on disk.

    Raises UserError where that fails; `path` is then as it was before and the temporary file is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch.save reports a failed write as RuntimeError.
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = "; the file that was there before is unharmed" if path.exists() else ""
        raise UserError(f"cannot write {path}: {reason}{kept}; free some space or choose another --out") from error


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
    if path.is_dir():
        path = path / NAME
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: train one with `wikigpt train --out {Path(source)}` or name another")
    return path


def load(source: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint. Raises UserError for a missing, truncated or foreign file."""
    path = find(source)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is not a checkpoint of wikigpt, or it is damaged ({type(error).__name__}); use another copy"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is a PyTorch file, but not a checkpoint of wikigpt; train one with `wikigpt train`")
    if content["version"] > VERSION:
        raise UserError(f"{path} was written by a newer wikigpt (format {content['version']}); upgrade wikigpt")
    content["tokenizer"] = json.loads(content["tokenizer"])
    return content


def model_from(content: dict[str, Any], device: Any = "cpu", backend: str | None = None) -> GPT:
    """The model inside a loaded checkpoint, in eval mode."""
    config = dict(content["model_config"])
    if backend is not None:
        config["backend"] = backend
    model = GPT(GPTConfig(**config))
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise UserError(f"the weights in the checkpoint do not fit its configuration: {error}") from error
    return model.to(device).eval()


def load_model(source: str | Path, device: Any = "cpu", backend: str | None = None) -> Loaded:
    """Model and tokenizer from a checkpoint file, a run directory, or a Hugging Face directory or name.

    Raises UserError where nothing usable is there.
    """
    path = Path(source)
    # A name on the Hub is one word or OWNER/NAME; anything that can be a path here is one.
    local = path.exists() or path.suffix == ".pth" or len(path.parts) > 2 or (path.parent.name and path.parent.is_dir())
    hugging_face = (path / "config.json").is_file() or not local
    if hugging_face:
        from . import hub

        model = hub.from_pretrained(str(source), **({"backend": backend} if backend else {}))
        return Loaded(model.to(device).eval(), hub.load_tokenizer(str(source)), {})
    from .data import tokenizer_from_json

    content = load(path)
    tokenizer = tokenizer_from_json(content["tokenizer"]) if content["tokenizer"] else None
    model = model_from(content, device, backend)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} types, its model {model.config.vocab_size}; the file is damaged"
        )
    return Loaded(model, tokenizer, content)
