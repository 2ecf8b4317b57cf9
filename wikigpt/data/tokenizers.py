"""Three ways to cut a text into tokens: words (as papers on WikiText count), byte-level BPE, and bytes.

An id is an index into the vocabulary; all arrays of ids are one-dimensional int64.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from wikigpt.data.sources import join_escapes, tidy_headings
from wikigpt.errors import UserError

UNK, EOS = "<unk>", "<eos>"
SMALLEST = {"word": 2, "bpe": 257, "byte": 257}  # vocabulary: <unk> and <eos>; the bytes and <eos>
KINDS = tuple(SMALLEST)
BPE_VOCAB_SIZE = 8192
_CHUNK = 4096  # lines that are encoded at a time, to bound what the encodings hold in memory


class Tokenizer(ABC):
    """What the three share. <eos> ends a line of words; in BPE and bytes no text encodes to it."""

    kind: str
    vocab_size: int
    eos_id: int
    bos_id: int | None = None  # what a text begins with, where that is not eos_id
    adds_bos = False  # whether it stands before every text, not before an empty one alone

    @property
    def first_id(self) -> int:
        """What a model sees where no text has come yet."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of `text` as a model wants them: from first_id on, where texts begin with it or this one is empty."""
        ids = self.encode(text).tolist()
        return [self.first_id, *ids] if self.adds_bos or not ids else ids

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, (tokens,) int64."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All there is to know, JSON-serialisable; `tokenizer_from_json` takes it back."""

    @abstractmethod
    def _text(self, ids: list[int]) -> str: ...

    @abstractmethod
    def _label(self, token_id: int) -> str: ...

    def decode(self, ids: Sequence[int] | np.ndarray, pretty: bool = False) -> str:
        """Readable text of `ids`; `pretty` also undoes the spaces of word-level text (see `detokenize`).

        Raises UserError for an id outside the vocabulary.
        """
        text = self._text(self._checked(ids))
        return detokenize(text) if pretty else text

    def token(self, token_id: int) -> str:
        """A visible label for one id, for plots. Raises UserError for an id outside the vocabulary."""
        [token_id] = self._checked([token_id])
        return EOS if token_id == self.eos_id else self._label(token_id)

    def fingerprint(self) -> str:
        """sha256 over the content: equal exactly when two tokenizers do the same."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def _checked(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        array = np.atleast_1d(np.asarray(ids)).astype(np.int64)
        bad = array[(array < 0) | (array >= self.vocab_size)]
        if bad.size:
            raise UserError(
                f"token id {bad[0]} is outside the {self.kind} vocabulary of {self.vocab_size:,}: "
                "use the tokenizer that the tokens were made with"
            )
        return array.tolist()


class WordTokenizer(Tokenizer):
    """White space separates words and each newline is <eos>: `line.split() + ["<eos>"]`, as papers do.

    A text that does not end with a newline (a prompt) gets no <eos> at its end, so that a continuation goes
    on with the line. A word outside the vocabulary becomes <unk>.
    """

    kind = "word"

    def __init__(self, types: Sequence[str]) -> None:
        self.types = list(types)
        self._ids = {word: i for i, word in enumerate(self.types)}
        self.vocab_size = len(self.types)
        self.unk_id, self.eos_id = self._ids[UNK], self._ids[EOS]

    @classmethod
    def train(cls, text: str, vocab_size: int | None = None, min_count: int = 1) -> "WordTokenizer":
        """Words that occur `min_count` times, the most frequent first, ties by first occurrence.

        <unk> and <eos> always; `vocab_size` types at most. Raises UserError for a vocab_size below 2.
        """
        check_tokenizer("word", vocab_size)
        counts = Counter(_words(text))
        counts.update({UNK: 0, EOS: 0})
        words = [word for word, count in counts.most_common() if count >= min_count and word not in (UNK, EOS)]
        kept = {UNK, EOS, *words[: None if vocab_size is None else vocab_size - 2]}
        return cls([word for word, _ in counts.most_common() if word in kept])

    def encode(self, text: str) -> np.ndarray:
        ids, unk = self._ids, self.unk_id
        return np.array([ids.get(word, unk) for word in _words(text)], dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "types": self.types}

    def _text(self, ids: list[int]) -> str:
        words = " ".join("\n" if i == self.eos_id else self.types[i] for i in ids)
        return re.sub(" ?\n ?", "\n", words)

    def _label(self, token_id: int) -> str:
        return self.types[token_id]


def _words(text: str) -> list[str]:
    return text.replace("\n", f" {EOS} ").split()


class BPETokenizer(Tokenizer):
    """Byte-level BPE with GPT-2's pre-tokenisation, line by line; nothing is unknown. <eos> is last."""

    kind = "bpe"

    def __init__(self, vocab: Sequence[str], merges: Sequence[Sequence[str]]) -> None:
        from tokenizers import Tokenizer as Model
        from tokenizers.decoders import ByteLevel as Decoder
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel

        self.vocab, self.merges = list(vocab), [list(pair) for pair in merges]
        self._model = Model(
            BPE(
                {token: i for i, token in enumerate(self.vocab)},
                [(left, right) for left, right in self.merges],
            )
        )
        self._model.pre_tokenizer = ByteLevel(add_prefix_space=False)
        self._model.decoder = Decoder()
        # Kept out of the library's model, where a text with the token's name in it would turn into the token.
        self.eos_id = len(self.vocab)
        self.vocab_size = len(self.vocab) + 1

    @classmethod
    def train(cls, text: str, vocab_size: int | None = None) -> "BPETokenizer":
        """At most `vocab_size` tokens with <eos> (default 8192). Raises UserError for fewer than 257."""
        from tokenizers import Tokenizer as Model
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel
        from tokenizers.trainers import BpeTrainer

        vocab_size = BPE_VOCAB_SIZE if vocab_size is None else vocab_size
        check_tokenizer("bpe", vocab_size)
        # No text has more merges than characters, and the trainer makes room for as many tokens as it is told.
        vocab_size = min(vocab_size, 257 + 4 * len(text))
        model = Model(BPE())
        model.pre_tokenizer = ByteLevel(add_prefix_space=False)
        trainer = BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
        model.train_from_iterator(_lines(text), trainer)
        trained = json.loads(model.to_str())["model"]
        return cls(sorted(trained["vocab"], key=trained["vocab"].__getitem__), trained["merges"])

    def encode(self, text: str) -> np.ndarray:
        # Line by line as in training, so that the tokens of a line do not depend on the next one.
        lines = _lines(_without_surrogates(text))
        chunks = [
            np.fromiter(
                chain.from_iterable(line.ids for line in self._model.encode_batch_fast(lines[i : i + _CHUNK])),
                dtype=np.int64,
            )
            for i in range(0, len(lines), _CHUNK)
        ]
        return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab": self.vocab, "merges": self.merges}

    def _text(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if i != self.eos_id], skip_special_tokens=False)

    def _label(self, token_id: int) -> str:
        text = self._text([token_id])
        return self.vocab[token_id] if "\ufffd" in text else _visible(text)


def _lines(text: str) -> list[str]:
    return re.findall("[^\n]*\n|[^\n]+", text)


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8, and <eos> = 256. Bytes that are no UTF-8 decode to U+FFFD."""

    kind = "byte"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_without_surrogates(text).encode(), np.uint8).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def _text(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i != self.eos_id).decode(errors="replace")

    def _label(self, token_id: int) -> str:
        return _visible(chr(token_id)) if token_id < 128 else f"0x{token_id:02X}"


def _without_surrogates(text: str) -> str:
    # Half of a surrogate pair has no UTF-8. Command lines in a broken locale contain such.
    return text.encode("utf-8", "replace").decode()


def _visible(text: str) -> str:
    shown = text.replace("\n", "\\n").replace(" ", "\u00b7")
    return shown if shown.isprintable() else ascii(shown)[1:-1]


def train_tokenizer(kind: str, text: str, vocab_size: int | None = None) -> Tokenizer:
    """A tokenizer of `kind` made from a train split. `vocab_size`: None is all words, or 8192 for BPE.

    Raises UserError for an unknown kind or an impossible vocab_size.
    """
    check_tokenizer(kind, vocab_size)
    if kind == "word":
        # A model has to meet <unk> in training to predict it. WikiText contains it; in other text, words that
        # occur once are left to it.
        return WordTokenizer.train(text, vocab_size, min_count=1 if UNK in text else 2)
    if kind == "bpe":
        return BPETokenizer.train(text, vocab_size)
    return ByteTokenizer()


def check_tokenizer(kind: str, vocab_size: int | None) -> None:
    """Raises UserError for an unknown kind or an impossible vocab_size, before any text is read."""
    if kind not in KINDS:
        raise UserError(f"unknown tokenizer {kind!r}: use one of {', '.join(KINDS)}")
    if vocab_size is None:
        return
    if kind == "byte" and vocab_size != ByteTokenizer.vocab_size:
        raise UserError(f"the byte vocabulary has 257 tokens, not {vocab_size}: leave out the vocabulary size")
    if vocab_size < SMALLEST[kind]:
        needs = "2 (<unk> and <eos>) and words" if kind == "word" else "257 (the bytes and <eos>)"
        raise UserError(f"a {kind} vocabulary of {vocab_size} is too small: it needs {needs}")


def tokenizer_from_json(content: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose `to_json()` this is. Raises UserError if it is none."""
    try:
        if content["kind"] == "word":
            return WordTokenizer(content["types"])
        if content["kind"] == "bpe":
            return BPETokenizer(content["vocab"], content["merges"])
        if content["kind"] == "byte":
            return ByteTokenizer()
        if content["kind"] == "hub":
            from wikigpt.hub import HubTokenizer

            return HubTokenizer(content["model"], content["eos_id"], content.get("bos_id"))
        reason = f"unknown kind {content['kind']!r}"
    except (KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UserError(f"this is no tokenizer ({reason}): use what to_json() gave, as it is in a checkpoint")


def detokenize(text: str) -> str:
    """Word-level text as one would write it: joins "@-@", punctuation, brackets, quotes, "'s" and "n't"."""
    text = tidy_headings(join_escapes(text))
    text = re.sub(r'"([^"\n]*)"', lambda quoted: f'"{quoted[1].strip(" ")}"', text)
    text = re.sub(r"([(\[{$£€]) ", r"\1", text)
    text = re.sub(r" ([.,;:!?%)\]}…])", r"\1", text)
    return re.sub(r" (n['\u2019]t|['\u2019](?:s|t|re|ve|d|ll|m))\b", r"\1", text)
