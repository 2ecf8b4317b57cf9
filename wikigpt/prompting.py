"""Prompts of `wikigpt generate`: from arguments, files, standard input or a person at a terminal, and their continuations."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from .data import Tokenizer
    from .model import GPT

STANDARD_INPUT = "-"

Prompt = tuple[str, list[int]]  # the text that is shown, and its token ids


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> list[str]:
    """The prompts given as texts, "-" being all of standard input, and as files; without the last line break of these.

    Raises UserError for what cannot be read.
    """
    if list(texts).count(STANDARD_INPUT) > 1:
        raise UserError("standard input can be read once: give '-' once")
    prompts = [_decoded(sys.stdin.buffer.read(), "standard input") if t == STANDARD_INPUT else t for t in texts]
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the prompt file {file}: {error.strerror}") from None
        prompts.append(_decoded(content, str(file)))
    return prompts


def _decoded(content: bytes, source: str) -> str:
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text (byte {error.start:,}): save it as UTF-8") from None
    # As `$(cat FILE)` does: an editor ends a file with a line break that nobody means.
    return text.removesuffix("\n")


def fit(model: GPT, tokenizer: Tokenizer, texts: Sequence[str]) -> list[Prompt]:
    """The prompts as the model can take them. One that is too long loses its beginning, which a line on standard error says.

    Raises UserError for tokens that the model does not know.
    """
    from .data.tokenizers import UNK
    from .generate import check_tokens, cropped

    prompts = []
    for number, text in enumerate(texts, 1):
        ids, had = cropped(model, tokenizer, text)
        if had > len(ids):
            which = f"prompt {number}" if len(texts) > 1 else "the prompt"
            n = f"{len(ids):,}"
            print(
                f"note: {which} has {had:,} tokens, the model's context holds {n}: only the last {n} are used", file=sys.stderr
            )
            text = "\u2026 " + tokenizer.decode(ids, pretty=tokenizer.kind == "word").lstrip()
        check_tokens(model, ids)
        unknown = ids.count(unk) if (unk := getattr(tokenizer, "unk_id", None)) is not None else 0
        if unknown and unknown > text.split().count(UNK):
            print(f"note: {unknown:,} of {len(ids):,} words of the prompt are not in the vocabulary: {UNK}", file=sys.stderr)
        prompts.append((text, ids))
    return prompts


def show(console: Console, prompts: Sequence[Prompt], complete: Callable[..., list[str]]) -> None:
    """Print prompts with their continuations: one alone streams, several come as a batch with something between two.

    `complete(rows, stream_text)` continues token ids.
    """
    if len(prompts) == 1:
        [(text, ids)] = prompts
        stream(text)
        complete([ids], stream)
        stream("\n")
        return
    texts = complete([ids for _, ids in prompts], None)
    for number, ((prompt, _), text) in enumerate(zip(prompts, texts), 1):
        if console.is_terminal:
            console.rule(f"{number} of {len(prompts)}")
        elif number > 1:
            stream("\n")
        stream(prompt + text + "\n")


def stream(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def converse(console: Console, model: GPT, tokenizer: Tokenizer, complete: Callable[..., list[str]]) -> None:
    """Continue what is typed, line after line, until an empty one or the end of input. Ctrl-C ends the text under way, and at
    the prompt the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then has arrow keys and a history
    console.print("Type the beginning of a text. An empty line or Ctrl-D leaves, Ctrl-C stops a text.")
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            stream("\n")
            return
        if not text.strip():
            return
        try:
            show(console, fit(model, tokenizer, [text]), complete)
        except KeyboardInterrupt:
            stream("\n")


__all__ = ["converse", "fit", "read_prompts", "show"]
