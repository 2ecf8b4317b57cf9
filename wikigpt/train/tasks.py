"""What a run learns: its batches, the figure that picks its best weights, and the figures in the end.

A task is made of data alone. The trainer asks it for everything that differs between a text and a file of pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from wikigpt.config import Config
from wikigpt.data import check_context
from wikigpt.evaluate import Perplexity, perplexity
from wikigpt.model import GPT
from wikigpt.pairs import IGNORE

from .batches import Batches, PairBatches, TextBatches, cut

if TYPE_CHECKING:
    from wikigpt.data import Dataset, Tokenizer

Progress = Callable[[int, int], None]  # (done, total) tokens


class Task(Protocol):
    tokenizer: Tokenizer
    fingerprint: str  # of the data: a run goes on with the same alone

    def batches(self, config: Config, device: torch.device) -> Batches: ...

    def validate(self, model: GPT, config: Config, progress: Progress) -> Perplexity | None:
        """On the same tokens each time; None where the task has nothing to validate by."""

    def describe(self, valid: Perplexity) -> str: ...

    def final(self, model: GPT, config: Config, report: Callable[[str], Progress]) -> dict[str, Perplexity]:
        """By name of split, of the weights that are kept. `report` gives the progress of a split."""

    def saved(self) -> dict[str, Any]:
        """What a checkpoint says of the task: plain values."""


class TextTask:
    """Language modelling: the next token of a tokenised text."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.tokenizer, self.fingerprint = dataset, dataset.tokenizer, dataset.fingerprint

    def batches(self, config: Config, device: torch.device) -> Batches:
        check_context(self.dataset, config.model.context_length)
        tokens = torch.from_numpy(self.dataset.tokens["train"].astype("int32")).to(device)
        return TextBatches(tokens, config.model.context_length, config.train.seed)

    def _perplexity(self, model: GPT, split: str, stride: int | None, sample: int | None, progress: Progress) -> Perplexity:
        return perplexity(
            model,
            self.dataset.tokens[split],
            self.tokenizer.first_id,
            stride=stride,
            sample=sample,
            stats=self.dataset.stats[split],
            progress=progress,
        )

    def validate(self, model: GPT, config: Config, progress: Progress) -> Perplexity:
        """Windows side by side, evenly spaced over the split."""
        return self._perplexity(model, "valid", config.model.context_length, config.train.eval_tokens, progress)

    def describe(self, valid: Perplexity) -> str:
        return f"validation perplexity {valid.per_token:.1f}"

    def final(self, model: GPT, config: Config, report: Callable[[str], Progress]) -> dict[str, Perplexity]:
        """Validation and test, both in the same way: the whole split by a sliding window, or a sample of it."""
        sample = config.train.final_tokens
        stride = None if sample is None else config.model.context_length
        return {split: self._perplexity(model, split, stride, sample, report(split)) for split in ("valid", "test")}

    def saved(self) -> dict[str, Any]:
        return {"kind": "text", "origin": f"{self.dataset.name}, {self.dataset.origin}"}


class PairsTask:
    """Prompt/completion pairs, encoded: (ids, targets) to train on and to validate by. The loss counts completions alone."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        train: tuple[Tensor, Tensor],
        valid: tuple[Tensor, Tensor],
        fingerprint: str,
        settings: dict[str, Any],
    ):
        self.tokenizer, self.fingerprint = tokenizer, fingerprint
        self.train, self.valid, self.settings = train, valid, settings

    def batches(self, config: Config, device: torch.device) -> Batches:
        return PairBatches(self.train[0].to(device), self.train[1].to(device), config.train.seed)

    def validate(self, model: GPT, config: Config, progress: Progress) -> Perplexity | None:
        return pairs_perplexity(model, *self.valid, config.train.batch_size, progress) if len(self.valid[0]) else None

    def describe(self, valid: Perplexity) -> str:
        return f"validation loss {valid.nats / valid.tokens:.4f}"

    def final(self, model: GPT, config: Config, report: Callable[[str], Progress]) -> dict[str, Perplexity]:
        valid = self.validate(model, config, report("valid"))
        return {} if valid is None else {"valid": valid}

    def saved(self) -> dict[str, Any]:
        return {"kind": "pairs", "origin": self.settings["pairs"], **self.settings}


@torch.no_grad()
def pairs_perplexity(
    model: GPT, ids: Tensor, targets: Tensor, batch_size: int = 32, progress: Progress = lambda done, total: None
) -> Perplexity:
    """Of the completion tokens of encoded pairs, each (N, S) int64."""
    training, device = model.training, model.head.weight.device
    model.eval()
    total, done = 0.0, 0
    try:
        for batch in zip(ids.split(batch_size), targets.split(batch_size)):
            i, t = cut(*batch)
            total += model.token_losses(i.to(device), t.to(device)).sum().item()
            done += len(i)
            progress(done, len(ids))
    finally:
        model.train(training)
    return Perplexity(total, int((targets != IGNORE).sum()))


__all__ = ["PairsTask", "Task", "TextTask", "pairs_perplexity"]
