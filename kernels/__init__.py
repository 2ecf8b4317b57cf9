"""Fused kernels for transformers: `import wikigpt.kernels` needs torch and nothing else.

Each op stands in one file (or folder) of its name: reference, kernel, registered op, public function.
`backend("reference")` forces one implementation for every op inside a with block; WIKIGPT_BACKEND does so for a process.
"""

# As top-level `kernels` the folder is found by accident, where the repository's root is on sys.path: transformers probes for
# Hugging Face's package of that name. A second copy of the operators would take the place of the first.
if __name__ != "kernels":
    from . import layers
    from ._dispatch import BACKENDS, backend, debug_checks, explain, ops
    from .activation import bias_gelu, geglu, gelu, swiglu
    from .attention import (
        alibi_slopes,
        attention_weights,
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_qkvpacked_func,
        flash_attn_with_kvcache,
        scaled_dot_product_attention,
        varlen_attn,
    )
    from .cross_entropy import CrossEntropyAux, cross_entropy
    from .linear_cross_entropy import linear_cross_entropy
    from .norm import LayerNorm, RMSNorm, layer_norm, rms_norm
    from .optimizer import FusedAdam, FusedAdamW
    from .rotary import apply_rotary_emb, apply_rotary_emb_qk, rotary_cos_sin
    from .sampling import sample, top_k_top_p_sampling_from_logits

__all__ = [
    "BACKENDS",
    "CrossEntropyAux",
    "FusedAdam",
    "FusedAdamW",
    "LayerNorm",
    "RMSNorm",
    "alibi_slopes",
    "apply_rotary_emb",
    "apply_rotary_emb_qk",
    "attention_weights",
    "backend",
    "bias_gelu",
    "cross_entropy",
    "debug_checks",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "geglu",
    "gelu",
    "layer_norm",
    "layers",
    "linear_cross_entropy",
    "ops",
    "rms_norm",
    "rotary_cos_sin",
    "sample",
    "scaled_dot_product_attention",
    "swiglu",
    "top_k_top_p_sampling_from_logits",
    "varlen_attn",
]
