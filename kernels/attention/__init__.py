"""Scaled dot-product attention."""

from .functional import scaled_dot_product_attention
from .reference import alibi_slopes, attention_weights, scaled_dot_product_attention_reference

__all__ = [
    "alibi_slopes",
    "attention_weights",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_reference",
]
