"""Texts, tokenizers and tokenised data sets. Importing this needs numpy and nothing else."""

from wikigpt.data.sources import Text, clean_raw, load_text
from wikigpt.data.store import Dataset, SplitStats, check_context, info, prepare
from wikigpt.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    WordTokenizer,
    detokenize,
    tokenizer_from_json,
    train_tokenizer,
)

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Dataset",
    "SplitStats",
    "Text",
    "Tokenizer",
    "WordTokenizer",
    "check_context",
    "clean_raw",
    "detokenize",
    "info",
    "load_text",
    "prepare",
    "tokenizer_from_json",
    "train_tokenizer",
]
