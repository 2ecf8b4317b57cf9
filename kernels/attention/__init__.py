"""Scaled dot-product attention."""

from .functional import (
    debug_checks,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    scaled_dot_product_attention,
)
from .kvcache import flash_attn_with_kvcache
from .pytorch import varlen_attn
from .reference import alibi_slopes, attention_weights

__all__ = [
    "alibi_slopes",
    "attention_weights",
    "debug_checks",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "scaled_dot_product_attention",
    "varlen_attn",
]
