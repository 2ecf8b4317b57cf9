"""Prompt/completion pairs for fine-tuning: reading the JSONL file, turning pairs into padded batches.

Shapes: N pairs, S tokens of the longest pair.
"""

from __future__ import annotations

import codecs
import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data.sources import refuse_marked
from .errors import UserError
from .memory import machine_memory

if TYPE_CHECKING:
    from .data import Tokenizer

KEYS = ("prompt", "completion")
EXAMPLE = '{"prompt": "3 1 4 =", "completion": "three one four"}'
IGNORE = -100  # targets that the loss leaves out


@dataclass(frozen=True)
class Pair:
    prompt: str
    completion: str
    where: str = field(default="pair", compare=False)  # "pairs.jsonl:3", for error messages


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a JSONL file with one {"prompt": ..., "completion": ...} a line; other keys are ignored.

    Blank lines are skipped. Raises UserError that names the file and line of what is wrong.
    """
    path = Path(path)
    pairs = []
    try:
        with path.open("rb") as file:  # line by line: the file itself is never in memory
            for number, line in enumerate(file, 1):
                if number == 1:
                    refuse_marked(line, path)
                    line = line.removeprefix(codecs.BOM_UTF8)  # Windows editors put it before UTF-8
                if line.strip():
                    pairs.append(_parse(line, f"{path}:{number}"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a file with lines like {EXAMPLE}") from None
    if not pairs:
        raise UserError(f"{path} is empty: it needs lines like {EXAMPLE}")
    return pairs


def _parse(line: bytes, where: str) -> Pair:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:  # the latter for deep nesting
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where}: not JSON ({reason}); each line is one object like {EXAMPLE}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: {_kind(value)}, not an object; each line is one object like {EXAMPLE}")
    for key in KEYS:
        if key not in value:
            near = difflib.get_close_matches(key, [k for k in value if k not in KEYS], n=1)
            hint = f"; rename {near[0]!r} to it" if near else f"; each line is one object like {EXAMPLE}"
            raise UserError(f"{where}: no {key!r}{hint}")
        if not isinstance(value[key], str):
            raise UserError(f"{where}: {key!r} is {_kind(value[key])}; put it in quotes to make it a string")
        if not value[key].strip():
            raise UserError(f"{where}: the {key} is empty; fill it in or delete the line")
    return Pair(value["prompt"], value["completion"], where)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number")


def encode_pairs(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    context_length: int,
    log: Callable[[str], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets, both (N, S) int64: prompt + completion + <eos>, padded at the right.

    Targets are -100 (ignored) inside the prompt and on padding, so that the loss counts the completion and
    its <eos> alone. Prompt and completion are encoded apart, so that generation meets a prompt cut as in
    training. `log` is told the share of words that the vocabulary lacks, if there are any.

    Raises UserError for a pair that does not fit into context_length, with a word tokenizer for a completion of
    several lines (a line break is its <eos>), and for more pairs than the machine's memory holds.
    """
    if not pairs:
        raise ValueError("pairs: got none, must be 1 or more")
    rows, unknown, total = [], 0, 0
    for pair in pairs:
        if tokenizer.kind == "word" and "\n" in pair.completion.strip():
            raise UserError(
                f"{pair.where}: the completion has several lines, but a line break ends the text of a word "
                "tokenizer; use --tokenizer bpe or byte"
            )
        completion = pair.completion.strip() if tokenizer.kind == "word" else pair.completion
        p, c = tokenizer.encode_prompt(pair.prompt), tokenizer.encode(completion).tolist()
        if len(p) + len(c) > context_length:
            raise UserError(
                f"{pair.where}: {len(p)} prompt and {len(c)} completion tokens are {len(p) + len(c)}, the "
                f"model's context is {context_length}; shorten the pair or use a model with a longer context"
            )
        rows.append((p, c))
        unk_id = getattr(tokenizer, "unk_id", None)
        unknown += sum(i == unk_id for i in p + c)
        total += len(p) + len(c)
    if unknown and log is not None:
        log(f"{unknown:,} of {total:,} words ({unknown / total:.1%}) are unknown to the vocabulary: <unk>")

    length, longest = max((len(p) + len(c), pair.where) for (p, c), pair in zip(rows, pairs))
    needed, have = 2 * 8 * length * len(rows), machine_memory(torch.device("cpu"))
    if have is not None and needed > have:
        raise UserError(
            f"{len(rows):,} pairs, padded to the {length:,} tokens of {longest}, take {needed / 2**30:,.0f} GiB, this "
            f"machine has {have / 2**30:,.0f}; leave out the longest pairs, or use fewer"
        )
    ids = torch.full((len(rows), length), tokenizer.eos_id)
    targets = torch.full((len(rows), length), IGNORE)
    for i, (p, c) in enumerate(rows):
        n = len(p) + len(c)
        ids[i, :n] = torch.tensor(p + c)
        targets[i, len(p) - 1 : n] = torch.tensor([*c, tokenizer.eos_id])
    return ids, targets


__all__ = ["Pair", "encode_pairs", "read_pairs"]
