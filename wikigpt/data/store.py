"""Tokenised data sets on disk: made once, then opened as read-only memory maps.

One folder of the cache per text and tokenizer: {train,valid,test}.bin (ids, uint16 where they fit, else
uint32), tokenizer.json, and manifest.json with the sizes that tell a damaged folder, which is made again.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wikigpt.data.sources import SPLITS, Source, cache_root, locate, publish, read
from wikigpt.data.tokenizers import BPE_VOCAB_SIZE, Tokenizer, check_tokenizer, tokenizer_from_json, train_tokenizer
from wikigpt.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

_VERSION = 1  # of everything that turns a text into token files; a new number leaves the old files unused


@dataclass(frozen=True)
class SplitStats:
    """Counts of one split."""

    lines: int
    words: int  # by white space, without <eos>
    tokens: int  # with <eos>
    types: int  # distinct tokens
    unk: int
    bytes: int  # of UTF-8


@dataclass(frozen=True)
class Dataset:
    """A tokenised text. `fingerprint` covers text and tokenizer, wherever the files were."""

    name: str
    origin: str
    fallback: bool
    tokenizer: Tokenizer
    tokens: dict[str, np.ndarray]  # split -> (tokens,) read-only memory map, uint16 or uint32
    stats: dict[str, SplitStats]
    directory: Path
    fingerprint: str


def prepare(
    dataset: str = "wikitext-2",
    tokenizer: str = "word",
    vocab_size: int | None = None,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    tokenizer_json: dict[str, Any] | None = None,
) -> Dataset:
    """The data set called `dataset` (see `load_text`): the first call tokenises it, later ones just open it.

    `tokenizer` is "word", "bpe" or "byte", made from the train split with at most `vocab_size` tokens (None:
    all words; 8192 for BPE). `tokenizer_json` (from a checkpoint) takes the place of both. Raises UserError.
    """
    settings: Any = [tokenizer, BPE_VOCAB_SIZE if tokenizer == "bpe" and vocab_size is None else vocab_size]
    if tokenizer_json is not None:
        settings = tokenizer_from_json(tokenizer_json).fingerprint()
    else:
        check_tokenizer(tokenizer, vocab_size)  # before anything is downloaded
    source = locate(dataset, data_dir, cache_dir)
    key = hashlib.sha256(json.dumps([_VERSION, source.key(), settings]).encode()).hexdigest()[:24]
    directory = cache_root(cache_dir) / "tokens" / key
    if (ready := _open(directory)) is not None:
        return ready
    files = _tokenise(source, tokenizer, vocab_size, tokenizer_json)
    # A process that mends the same damaged folder may take it away between our write and our open.
    for _ in range(20):
        publish(directory, files, lambda: _open(directory) is not None)
        if (ready := _open(directory)) is not None:
            return ready
    raise UserError(f"{directory} keeps changing: remove it, or set WIKIGPT_CACHE_DIR to another folder")


def check_context(dataset: Dataset, context_length: int) -> None:
    """Raises UserError where the train split is too short to be cut into blocks of context_length, as training does."""
    tokens = len(dataset.tokens["train"])
    if tokens < 2 * context_length + 1:
        longest = (tokens - 1) // 2
        remedy = f"use more text or model.context_length={longest}" if longest > 1 else "use more text"
        raise UserError(
            f"the train split of {dataset.name} has {tokens:,} tokens, fewer than two contexts of {context_length:,}; {remedy}"
        )


def info(dataset: Dataset) -> "Table":
    """A table of the splits: lines, words, tokens, types, share of <unk> (of words alone: the others have none), bytes.

    Where the text is from is `dataset.origin`, and not in the table.
    """
    from rich.table import Table

    words = dataset.tokenizer.kind == "word"
    columns = ["lines", "words", "tokens", "types", *(["<unk> %"] if words else []), "bytes"]
    table = Table("split", title=f"{dataset.name}, {dataset.tokenizer.kind} vocabulary of {dataset.tokenizer.vocab_size:,}")
    for column in columns:
        table.add_column(column, justify="right")
    for split, stats in dataset.stats.items():
        counts = [f"{count:,}" for count in (stats.lines, stats.words, stats.tokens, stats.types)]
        unknown = [f"{100 * stats.unk / stats.tokens:.2f}"] if words else []
        table.add_row(split, *counts, *unknown, f"{stats.bytes:,}")
    return table


def _tokenise(source: Source, kind: str, vocab_size: int | None, tokenizer_json: dict[str, Any] | None) -> dict[str, bytes]:
    """The files of a folder of the cache, by name."""
    text = read(source)
    if tokenizer_json is None:
        tokenizer = train_tokenizer(kind, text.splits["train"], vocab_size)
    else:
        tokenizer = tokenizer_from_json(tokenizer_json)
    dtype = "uint16" if tokenizer.vocab_size < 2**16 else "uint32"
    fingerprint = hashlib.sha256(tokenizer.fingerprint().encode())
    files, stats = {"tokenizer.json": json.dumps(tokenizer.to_json()).encode()}, {}
    for split in SPLITS:
        content = text.splits[split].encode()
        fingerprint.update(hashlib.sha256(content).digest())
        ids = tokenizer.encode(text.splits[split])
        stats[split] = SplitStats(
            lines=text.splits[split].count("\n"),
            words=len(text.splits[split].split()),
            tokens=len(ids),
            types=len(np.unique(ids)),
            unk=int((ids == getattr(tokenizer, "unk_id", -1)).sum()),
            bytes=len(content),
        )
        files[f"{split}.bin"] = ids.astype(dtype).tobytes()
    manifest = {
        "name": text.name,
        "origin": text.origin,
        "fallback": text.fallback,
        "fingerprint": fingerprint.hexdigest(),
        "dtype": dtype,
        "stats": {split: asdict(counts) for split, counts in stats.items()},
        "sizes": {name: len(content) for name, content in files.items()},
    }
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def _open(directory: Path) -> Dataset | None:
    """The data set in `directory`, or None where there is no whole one."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
        if any((directory / name).stat().st_size != size for name, size in manifest["sizes"].items()):
            return None
        return Dataset(
            name=manifest["name"],
            origin=manifest["origin"],
            fallback=manifest["fallback"],
            tokenizer=tokenizer_from_json(json.loads((directory / "tokenizer.json").read_text("utf-8"))),
            tokens={split: np.memmap(directory / f"{split}.bin", dtype=manifest["dtype"], mode="r") for split in SPLITS},
            stats={split: SplitStats(**counts) for split, counts in manifest["stats"].items()},
            directory=directory,
            fingerprint=manifest["fingerprint"],
        )
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
