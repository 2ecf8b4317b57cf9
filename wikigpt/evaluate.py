"""Perplexity as papers count it: every token of the split, `<eos>` included, predicted once.

The stream is preceded by one `<eos>`, or by the token that a Hugging Face tokenizer begins with, so that its first token is
predicted too. Windows of context_length tokens move by `stride`; of each window only the last `stride` predictions count (of
the first, all), so that with stride < context_length every token but the first few has at least context_length - stride tokens
of context. stride = context_length is the plain blocked number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import wikigpt.kernels as kernels

from .errors import UserError, integer
from .model import GPT

if TYPE_CHECKING:
    from .data import SplitStats


@dataclass(frozen=True)
class Perplexity:
    nats: float  # sum over all predicted tokens
    tokens: int  # predicted tokens
    words: int | None = None  # words and line ends of the text, what word-level papers count; None: not known

    @property
    def per_token(self) -> float:
        return _exp(self.nats / self.tokens)

    @property
    def per_word(self) -> float | None:
        """Perplexity normalised to words: comparable between tokenizers; equal to per_token for word-level."""
        return None if self.words is None else _exp(self.nats / self.words)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def windows(n: int, context_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first counted position) of each window over n inputs; every position is counted exactly once."""
    counted = 0
    while counted < n:
        end = counted + (context_length if counted == 0 else stride)
        yield end - context_length, min(end, n), counted
        counted = end


def strides(context_length: int, stride: int | None = None) -> list[tuple[str, int]]:
    """The protocols to report, (name, stride): that of `stride`, or where none is given sliding windows and blocks.

    Raises UserError for a stride outside the context.
    """
    if stride is None:
        both = [max(1, context_length // 2), context_length]
    else:
        both = [integer("stride", stride)]
        if not 1 <= both[0] <= context_length:
            raise UserError(f"stride: got {stride}, must be between 1 and the model's context_length {context_length}")
    return [("blocked" if step == context_length else "sliding window", step) for step in dict.fromkeys(both)]


def check_dynamic_lr(lr: float) -> None:
    """Raises UserError for a learning rate of dynamic evaluation that is negative, no number or too large for float32."""
    if not 0 <= lr <= torch.finfo(torch.float32).max:
        raise UserError(f"dynamic_lr: got {lr}, must be 0 (no dynamic evaluation) or a positive number")


def to_stream(tokens: np.ndarray, first: int, vocab_size: int) -> Tensor:
    """The token file as int64 with `first` put before it. Raises UserError for ids the model does not know."""
    ids = torch.from_numpy(np.concatenate(([first], tokens)).astype(np.int64))
    if tokens.size == 0:
        raise UserError("the split is empty: nothing to evaluate")
    if int(ids.max()) >= vocab_size:
        raise UserError(f"token id {int(ids.max())} is out of range: the model's vocabulary has {vocab_size} entries")
    return ids


def perplexity(
    model: GPT,
    tokens: np.ndarray,
    first_id: int,
    *,
    stride: int | None = None,
    sample: int | None = None,
    batch_size: int = 16,
    dynamic_lr: float = 0.0,
    stats: SplitStats | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `model` on a token stream (N,) of ids, before which `first_id` is put: `Tokenizer.first_id`.

    stride defaults to context_length // 2. With `sample` below the length of the stream only about so many tokens are
    predicted, those of windows evenly spaced over it, the same in every call; there is no word count then. dynamic_lr > 0 is
    dynamic evaluation (Krause et al. 2018): after a window is scored, one step of SGD on it; the weights are restored at the
    end. `stats` of the split gives the word count.
    progress(done, total) is called with tokens after each batch, and may end the work by an exception. Raises UserError for ids
    out of range, a bad stride or sample and a bad dynamic_lr.
    """
    check_dynamic_lr(dynamic_lr)
    length = model.config.context_length
    [(_, stride), *_] = strides(length, stride)
    if sample is not None and integer("sample", sample) < 1:
        raise UserError(f"sample: got {sample}, must be 1 or more")
    device = model.head.weight.device
    ids = to_stream(tokens, first_id, model.config.vocab_size).to(device)
    n = ids.shape[0] - 1
    chosen = list(windows(n, length, stride))
    if sample is not None and sample < n:
        count = min(len(chosen), max(1, round(sample / stride)))
        chosen = [chosen[i * len(chosen) // count] for i in range(count)]
        stats = None
    goal = sum(end - first for _, end, first in chosen)
    training = model.training
    model.eval()
    total, done = torch.zeros((), dtype=torch.float64, device=device), 0

    def losses(batch: list[tuple[int, int, int]]) -> Tensor:
        # Windows of one batch have the same shape; the head runs on the counted positions alone.
        begin, _, first = batch[0]
        x = torch.stack([ids[b:e] for b, e, _ in batch])
        y = torch.stack([ids[f + 1 : e + 1] for _, e, f in batch])
        hidden = model.hidden(x)[:, first - begin :]
        return kernels.linear_cross_entropy(hidden, model.head.weight, y, reduction="none", backend=model.config.backend)

    def counted(batch: list[tuple[int, int, int]]) -> None:
        nonlocal done
        done += sum(end - first for _, end, first in batch)
        if progress:
            progress(done, goal)

    before = {name: p.detach().clone() for name, p in model.named_parameters()} if dynamic_lr > 0 else {}
    try:
        if dynamic_lr > 0:
            for window in chosen:
                loss = losses([window])
                total += loss.detach().double().sum()
                loss.mean().backward()
                with torch.no_grad():
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    for p in model.parameters():
                        if p.grad is not None:
                            p.sub_(p.grad, alpha=dynamic_lr)
                            p.grad = None
                counted([window])
        else:
            with torch.no_grad():
                for _, alike in itertools.groupby(chosen, key=_shape):
                    while batch := list(itertools.islice(alike, batch_size)):
                        total += losses(batch).double().sum()
                        counted(batch)
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in before:
                    p.copy_(before[name])
        model.train(training)
    return Perplexity(float(total), goal, None if stats is None else stats.words + stats.lines)


def _shape(window: tuple[int, int, int]) -> tuple[int, int]:
    begin, end, first = window
    return end - begin, end - first


__all__ = ["Perplexity", "check_dynamic_lr", "perplexity", "strides", "windows"]
