"""The model this project started from, as its document describes it, and nothing better: what "faster" is measured against.

`nn.Embedding`, a stack of `nn.TransformerEncoderLayer` with its defaults (post-norm, ReLU, dropout 0.1, feed-forward
2048), `nn.Linear`; trained with Adam at lr 1e-3 on the cross-entropy of all logits. The document forgets the causal mask,
so every position sees its own target, and positions, so order is invisible: both can be switched on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SeedTransformer(nn.Module):
    """Token ids (B, S) to logits (B, S, V)."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        n_head: int = 8,
        n_layer: int = 6,
        dim_feedforward: int = 2048,
        causal: bool = False,
        positions: bool = False,
        context_length: int = 1024,
    ):
        super().__init__()
        self.causal = causal
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(context_length, d_model) if positions else None
        layer = nn.TransformerEncoderLayer(d_model, n_head, dim_feedforward, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, n_layer, enable_nested_tensor=False)
        self.fc = nn.Linear(d_model, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embedding(idx)
        if self.positions is not None:
            x = x + self.positions(torch.arange(idx.shape[1], device=idx.device))
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1], device=idx.device, dtype=x.dtype)
        return self.fc(self.transformer(x, mask=mask, is_causal=self.causal))

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(idx).flatten(0, 1), targets.flatten())

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)
