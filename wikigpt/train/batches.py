"""The batches of a run. Sequence number i (0, 1, 2 ... over all epochs) is a function of (seed, i) alone, so that a run which
is resumed sees what it would have seen."""

from __future__ import annotations

import torch
from torch import Tensor

from wikigpt.errors import UserError
from wikigpt.pairs import IGNORE


class Batches:
    """Sequences by their number. A subclass has `count` places an epoch, their order, and what lies at a place; a sequence
    has `mean_length` tokens."""

    def __init__(self, count: int, mean_length: float, seed: int, device: torch.device):
        self.count, self.mean_length, self.seed, self.device = count, mean_length, seed, device
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def order(self, generator: torch.Generator) -> Tensor:
        """Of an epoch: (count) int64 on the host."""
        return torch.randperm(self.count, generator=generator)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets (number of places, length), int64, of the sequences at `places`."""
        raise NotImplementedError

    def starts(self, epoch: int) -> Tensor:
        """The places of an epoch, in the order of their visit: (count) int64 beside the tokens."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**64)
            self._starts, self._epoch = self.order(generator).to(self.device), epoch
        return self._starts

    def places(self, first: int, count: int) -> Tensor:
        """Where the sequences first .. first + count - 1 lie, (count) int64 beside the tokens. Only at the start of an epoch
        does anything travel to the device."""
        pieces = []
        while count > 0:
            epoch, place = divmod(first, self.count)
            pieces.append(self.starts(epoch)[place : place + count])
            first, count = first + pieces[-1].numel(), count - pieces[-1].numel()
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def get(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (count, length), int64, of sequences first .. first + count - 1."""
        return self.at(self.places(first, count))


class TextBatches(Batches):
    """Shuffled blocks of a token stream: every epoch cuts it at another offset into blocks of `length` + 1 tokens (neighbours
    share one) and visits them in another order. Raises UserError where the stream is shorter than two blocks."""

    def __init__(self, tokens: Tensor, length: int, seed: int):
        self.tokens, self.length = tokens, length
        # One block is left unused so that any offset below `length` has room.
        blocks = (tokens.numel() - 1) // length - 1
        if blocks < 1:
            raise UserError(
                f"the train split has {tokens.numel()} tokens, fewer than two contexts of {length}; "
                "use more text or a smaller model.context_length"
            )
        super().__init__(blocks, length, seed, tokens.device)

    def order(self, generator: torch.Generator) -> Tensor:
        offset = torch.randint(self.length, (1,), generator=generator)
        return super().order(generator) * self.length + offset

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        block = self.tokens[places[:, None] + torch.arange(self.length + 1, device=places.device)].long()
        return block[:, :-1], block[:, 1:]


class PairBatches(Batches):
    """Encoded pairs in a new random order each epoch, cut to the longest pair of the batch."""

    def __init__(self, ids: Tensor, targets: Tensor, seed: int):
        self.ids, self.targets = ids, targets
        # Padding lies behind the last target.
        lengths = ids.shape[1] - (targets != IGNORE).flip(1).int().argmax(1)
        super().__init__(len(ids), lengths.double().mean().item(), seed, ids.device)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        return cut(self.ids[places], self.targets[places])


def cut(ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Without the padding behind the longest pair."""
    length = int((targets != IGNORE).any(dim=0).nonzero().max()) + 1
    return ids[:, :length], targets[:, :length]


__all__ = ["Batches", "PairBatches", "TextBatches", "cut"]
