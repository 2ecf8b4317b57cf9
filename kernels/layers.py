"""Layers for `kernelize` of Hugging Face's package kernels: no constructor, no state, one `forward` that takes the place of
the forward of a module with these attributes. The names are those under which transformers looks for a replacement."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._checks import check_tensors
from .activation import geglu, gelu, swiglu
from .norm import layer_norm, rms_norm
from .rotary import apply_rotary_emb_qk


class RMSNorm(nn.Module):
    """Of Llama, Mistral, Qwen and others: weight (hidden) and variance_epsilon. The wider dtype of the two comes out."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return y.to(torch.promote_types(y.dtype, self.weight.dtype))


class LayerNorm(nn.Module):
    """Of `torch.nn.LayerNorm`."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    normalized_shape: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.weight, self.bias, self.eps, normalized_shape=self.normalized_shape)


class GeLU(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input)


class GeluTanh(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, "tanh")


class NewGELU(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, "tanh")


class SiluAndMul(nn.Module):
    """x (..., 2 * n) holds gate and up side by side."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


class GeluAndMul(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return geglu(x, approximate="none")


class GeluTanhAndMul(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return geglu(x, approximate="tanh")


class rotary_pos_emb(nn.Module):  # transformers' name
    """q (B, H, S, D), k (B, G, S, D); cos, sin (B or 1, S, R) of two equal halves. unsqueeze_dim=2: H and S change places."""

    has_backward = True
    can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        check_tensors("q k cos sin", (q, k, cos, sin))
        for name, table in (("cos", cos), ("sin", sin)):
            if q.dim() != 4 or k.dim() != 4 or table.dim() != 3 or table.shape[0] not in (1, q.shape[0]):
                raise ValueError(
                    f"{name}: got shape {tuple(table.shape)}, q {tuple(q.shape)} with k {tuple(k.shape)} needs (B or 1, S, R)"
                )
        if unsqueeze_dim not in (1, 2):
            raise ValueError(f"unsqueeze_dim: got {unsqueeze_dim}, allowed are 1 and 2")
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half].expand(q.shape[0], -1, -1), sin[..., :half].expand(q.shape[0], -1, -1)
        if unsqueeze_dim == 1:
            return apply_rotary_emb_qk(q, k, cos, sin)
        q, k = apply_rotary_emb_qk(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)


__all__ = [
    "GeLU",
    "GeluAndMul",
    "GeluTanh",
    "GeluTanhAndMul",
    "LayerNorm",
    "NewGELU",
    "RMSNorm",
    "SiluAndMul",
    "rotary_pos_emb",
]
