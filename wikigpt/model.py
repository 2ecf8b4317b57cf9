"""A GPT: decoder-only transformer (Radford et al. 2019), with the published choices of small models behind one config.

Shapes: B batch, S positions of this call, T positions in the key/value cache, H heads, G key/value heads, D head_dim,
C = n_embd, V = vocab_size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wikigpt.kernels as kernels

from .config import GPTConfig
from .errors import UserError
from .kernels._dispatch import choose

# What any GPT computes with, its loss included.
_OPS = ("attention", "flash_attention", "layer_norm", "rms_norm", "bias_gelu", "swiglu", "rotary", "linear_cross_entropy")


def check_backend(name: str | None, device_type: str, *more: str) -> None:
    """Raises UserError where a GPT, or one of the ops named in `more`, cannot run with this backend on a type of device.

    `name` is that of the configuration. None and "auto" leave the choice to WIKIGPT_BACKEND, which is then checked.
    """
    for op in (*_OPS, *more):
        # The ops of `more` are called without a backend: they follow WIKIGPT_BACKEND alone.
        explicit = op in _OPS and name not in (None, "auto")
        said = "backend" if explicit else "WIKIGPT_BACKEND"
        try:
            choose(op, device_type, name if explicit else None)
        except ValueError as error:
            raise UserError(f"{said}: {str(error).removeprefix('backend: ')}") from None
        except RuntimeError as error:
            raise UserError(f"{said}: {str(error).removeprefix('backend ')}; use auto, torch or reference") from None


class KVCache:
    """Keys and values of the positions seen so far, allocated once for the whole context."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        assert config.n_kv_head is not None
        assert config.head_dim is not None
        shape = (batch_size, config.n_kv_head, config.context_length, config.head_dim)
        # Not views of one tensor: autograd lets nobody write into those of unbind().
        self.layers = [
            (torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))
            for _ in range(config.n_layer)
        ]
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, S, D) of the new positions; returns all keys and values (B, G, T, D)."""
        keys, values = self.layers[layer]
        s = k.shape[2]
        keys.narrow(2, self.length, s).copy_(k)
        values.narrow(2, self.length, s).copy_(v)
        return keys.narrow(2, 0, self.length + s), values.narrow(2, 0, self.length + s)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        assert config.n_kv_head is not None
        assert config.head_dim is not None
        self.split = [config.n_head, config.n_kv_head, config.n_kv_head]
        self.qkv = nn.Linear(config.n_embd, sum(self.split) * config.head_dim, bias=config.bias)
        self.proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        slopes = kernels.alibi_slopes(config.n_head) if config.position == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)

    def heads(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of x (B, S, C), each (B, heads, S, D), positions applied."""
        b, s, _ = x.shape
        # One view with all heads side by side: query heads, then key heads, then value heads.
        qkv = self.qkv(x).view(b, s, -1, self.config.head_dim).transpose(1, 2)  # (B, H + 2 G, S, D)
        turning, v = qkv.split([self.split[0] + self.split[1], self.split[2]], dim=1)
        if rotary is not None:
            turning = kernels.apply_rotary_emb(turning, *rotary, backend=self.config.backend)
        q, k = turning.split(self.split[:2], dim=1)
        return q, k, v

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        q, k, v = self.heads(x, rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dropout = self.config.dropout if self.training else 0.0
        if self.slopes is not None:
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, S, H, D)
            y = kernels.flash_attn_func(q, k, v, dropout, causal=True, alibi_slopes=self.slopes, backend=self.config.backend)
            return self.proj(y.flatten(2))
        y = kernels.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            # A single query sees every key; several queries after a past come with a mask.
            is_causal=mask is None and q.shape[2] > 1,
            enable_gqa=self.config.n_kv_head != self.config.n_head,
            backend=self.config.backend,
        )  # (B, H, S, D)
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        gated = config.activation == "swiglu"
        self.fc = nn.Linear(config.n_embd, config.intermediate_size * (2 if gated else 1), bias=config.bias)  # type: ignore[operator]
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)  # type: ignore[arg-type]
        self.activate = self._swiglu if gated else self._gelu
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def _gelu(self, x: Tensor) -> Tensor:
        bias, backend = self.fc.bias, self.config.backend
        if bias is not None and (backend == "triton" or (backend == "auto" and x.is_cuda)):
            # The activation's backward sums the gradient of the bias in the same pass; elsewhere the product adds it for less.
            return kernels.bias_gelu(F.linear(x, self.fc.weight), bias, self.approximate, backend=backend)
        return kernels.bias_gelu(self.fc(x), None, self.approximate, backend=backend)

    def _swiglu(self, x: Tensor) -> Tensor:
        return kernels.swiglu(self.fc(x), backend=self.config.backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.activate(x))


def make_norm(config: GPTConfig) -> kernels.LayerNorm | kernels.RMSNorm:
    if config.norm == "rmsnorm":
        return kernels.RMSNorm(config.n_embd, config.norm_eps, backend=config.backend)
    return kernels.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias, backend=config.backend)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.dropout = config.dropout
        self.norm1 = make_norm(config)
        self.attn = Attention(config, layer)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) -> (x, residual), all (B, S, C): x is not yet added to the residual stream. The next norm does that,
        after dropout, in the pass in which it normalises."""
        dropout = self.dropout if self.training else 0.0
        x, residual = self.norm1(x, residual, dropout, prenorm=True)
        x, residual = self.norm2(self.attn(x, rotary, mask, cache), residual, dropout, prenorm=True)
        return self.mlp(x), residual


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.wte.weight
        self.init_weights()

    def init_weights(self) -> None:
        """As GPT-2: normal(0.02), residual projections scaled by 1 / sqrt(2 * n_layer), biases zero."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                residual = name.endswith("proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Output of the last norm (B, S, C) for token ids idx (B, S), which follow what is in the cache."""
        past = 0 if cache is None else cache.length
        s = idx.shape[1]
        if past + s > self.config.context_length:
            raise ValueError(f"idx: {past + s} positions, the model's context_length is {self.config.context_length}")
        positions = torch.arange(past, past + s, device=idx.device)
        x = self.wte(idx)  # (B, S, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        rotary = None
        if self.config.position == "rotary":
            rotary = kernels.rotary_cos_sin(positions, self.config.head_dim, self.config.rope_theta, x.dtype)  # type: ignore[arg-type]
        mask = self.attention_mask(positions, past + s)
        residual = None
        for block in self.blocks:
            x, residual = block(x, residual, rotary, mask, cache)
        if cache is not None:
            cache.length += s
        return self.norm(x, residual, self.config.dropout if self.training else 0.0)

    def attention_mask(self, positions: Tensor, t: int) -> Tensor | None:
        """Which keys each position sees, (S, T) bool; None where causal attention or ALiBi's slopes say it all."""
        s = positions.shape[0]
        if self.config.position == "alibi" or s == t or s == 1:
            return None
        return positions[:, None] >= torch.arange(t, device=positions.device)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, S, V) for token ids idx (B, S), or, with targets (B, S), the mean cross-entropy in nats.

        Targets of -100 are ignored. Raises ValueError where idx is longer than the context.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.head(x)
        return self._losses(x, targets, "mean")

    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token in nats, (B, S) float32; 0 where the target is -100."""
        x = self.hidden(idx)
        return self._losses(x, targets, "none")

    def _losses(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return kernels.linear_cross_entropy(x, self.head.weight, targets, reduction=reduction, backend=self.config.backend)

    def make_cache(self, batch_size: int) -> KVCache:
        """An empty key/value cache for this model, in the dtype its linear layers compute in."""
        weight = self.head.weight
        device_type = weight.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else weight.dtype
        return KVCache(self.config, batch_size, weight.device, dtype)

    @torch.no_grad()
    def attention_weights(self, idx: Tensor) -> Tensor:
        """The attention weights (n_layer, B, H, S, S) for idx (B, S); rows sum to 1."""
        if idx.shape[1] > self.config.context_length:
            raise ValueError(f"idx: {idx.shape[1]} positions, the model's context_length is {self.config.context_length}")
        weights: list[Tensor] = []

        def look(attn: Any, args: tuple[Any, ...]) -> None:
            assert isinstance(attn, Attention)
            x, rotary, _, _ = args
            q, k, _ = attn.heads(x, rotary)
            weights.append(kernels.attention_weights(q, k, is_causal=True, alibi_slopes=attn.slopes))

        handles = [block.attn.register_forward_pre_hook(look) for block in self.blocks]  # type: ignore[operator, union-attr]
        training = self.training
        self.eval()
        try:
            self.hidden(idx)
        finally:
            for handle in handles:
                handle.remove()
            self.train(training)
        return torch.stack(weights)

    def num_parameters(self, embeddings: bool = True) -> int:
        """Number of parameters, shared ones once; without those of the token and position embeddings where asked."""
        count = sum(p.numel() for p in self.parameters())
        if not embeddings:
            count -= self.wte.weight.numel() + (self.wpe.weight.numel() if self.wpe is not None else 0)
        return count

    def flops_per_token(self, seqlen: int) -> int:
        """Forward + backward FLOPs of one token as PaLM counts them (Chowdhery et al. 2022, appendix B)."""
        config = self.config
        matmul = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * matmul + 12 * config.n_layer * config.n_head * config.head_dim * seqlen  # type: ignore[operator]

    @classmethod
    def from_pretrained(cls, source: str, **overrides: Any) -> GPT:
        """A GPT with the weights of a Hugging Face GPT-2 or Llama model: a directory, or a name on the Hub ("gpt2").

        `overrides` go into the config (backend, dropout). See `wikigpt.hub.from_pretrained`.
        """
        from . import hub

        return hub.from_pretrained(source, **overrides)

    def save_pretrained(self, directory: str, tokenizer: Any = None, overwrite: bool = False) -> None:
        """Write a directory that `transformers.AutoModelForCausalLM` and vLLM load. See `wikigpt.hub.save_pretrained`."""
        from . import hub

        hub.save_pretrained(self, directory, tokenizer, overwrite)


__all__ = ["GPT", "GPTConfig", "KVCache", "check_backend"]
