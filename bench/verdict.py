"""Is an op right on this machine? A line for each case: its error against float64 beside plain PyTorch's, then ok or FAIL.

    python -m bench.verdict OP... [--sizes smoke|check] [--device cpu|cuda] [--journal FILE]

Through the public functions, as a user calls them, at sizes that fill a chip (smoke: that fill a test). Fresh random inputs;
memory that results will lie in holds NaN beforehand; every case runs twice and has to give the same bits. Ours is right where
its error is at most twice that of the op's reference in the same dtype, plus one rounding of the largest value, which no
result in that dtype can avoid; NaN is never right.

A case that breaks the device (an illegal address) ends its process: the rest of the cases goes on in a new one.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from wikigpt.kernels import (
    FusedAdamW,
    apply_rotary_emb_qk,
    bias_gelu,
    cross_entropy,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    geglu,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary_cos_sin,
    sample,
    scaled_dot_product_attention,
    swiglu,
)
from wikigpt.kernels._dispatch import extension_lacks

from wikigpt import kernels

from . import FAKE, NO_BREAK, device_is_lost, in_lines, records

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Results = dict[str, Tensor]
# name -> (ours, plain PyTorch's, the truth in float64); or an AssertionError
Evaluate = Callable[["Draw"], dict[str, tuple[Tensor, Tensor, Tensor]]]


class Draw:
    """Fresh random numbers on the device (or those of a seed, to repeat a case), and which of two sizes is asked for."""

    def __init__(self, device: str, small: bool, seed: int | None = None):
        self.device, self.small = device, small
        self.seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
        self.rng = torch.Generator(device).manual_seed(self.seed)

    def size(self, real: int, small: int) -> int:
        return small if self.small else real

    def normal(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device).to(dtype)

    def below(self, n: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(n, shape, generator=self.rng, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Case:
    text: str
    evaluate: Evaluate


Build = Callable[
    [Draw], tuple[dict[str, Tensor], Callable[..., Any]]
]  # inputs with gradients, and (backend, **inputs) -> results


def poison(tensors: Iterable[Tensor]) -> None:
    """Leave NaN in memory of these sizes, which is given back at once: results will lie in it."""
    for tensor in tensors:
        blocks = [torch.full_like(tensor, torch.nan) for _ in range(3)]
        del blocks


def by_backend(text: str, dtype: torch.dtype, build: Build, backward: bool = True) -> Case:
    """A case of a public function that takes backend=: what the machine chooses against "reference"."""

    def run(
        inputs: dict[str, Tensor], call: Callable[..., Any], backend: str | None, wide: bool, grads: list[Tensor]
    ) -> Results:
        leaves = {name: (x.double() if wide else x).detach().clone().requires_grad_(backward) for name, x in inputs.items()}
        torch.manual_seed(1)  # what dropout draws its seed from
        with torch.set_grad_enabled(backward):
            given = call(backend, **leaves)
        results = [given] if isinstance(given, Tensor) else list(given)
        found = {f"out{i or ''}": result.detach() for i, result in enumerate(results)}
        if not backward:
            return found
        for result in results[len(grads) :]:
            grads.append(torch.randn_like(result, dtype=F32).to(dtype))
        torch.autograd.backward(results, [grad.to(result.dtype) for grad, result in zip(grads, results)])
        return found | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def evaluate(draw: Draw) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        inputs, call = build(draw)
        grads: list[Tensor] = []
        truth = run(inputs, call, "reference", True, grads)
        plain = run(inputs, call, "reference", False, grads)
        poison(inputs.values())
        ours = run(inputs, call, None, False, grads)
        again = run(inputs, call, None, False, grads)
        moved = [name for name in ours if not torch.equal(ours[name], again[name])]
        assert FAKE or not moved, f"{', '.join(moved)} differ from one run to the next"
        return {name: (ours[name], plain[name], truth[name]) for name in truth}

    return Case(f"{text}, {str(dtype).removeprefix('torch.')}", evaluate)


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(
    features: str = "", dtype: torch.dtype = BF16, b: int = 2, s: int = 2048, t: int | None = None, h: int = 8, g: int = 8,
    d: int = 64, dv: int | None = None, **options: Any,
) -> Case:  # fmt: skip
    """features: words that ask for tensors of their own."""

    def build(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        n_q, n_k = draw.size(s, 40), draw.size(t or s, 40 if t is None else 56)
        inputs = {
            "q": draw.normal(b, n_q, h, d, dtype=dtype),
            "k": draw.normal(b, n_k, g, d, dtype=dtype),
            "v": draw.normal(b, n_k, g, dv or d, dtype=dtype),
        }
        given = dict(options)
        if "alibi" in features:
            given["alibi_slopes"] = 2.0 ** -torch.arange(1, h + 1, device=draw.device, dtype=F32)
        if "sinks" in features:
            inputs["s_aux"] = draw.normal(h)
        if "bias" in features:
            inputs["attn_bias"] = draw.normal(1, h, n_q, n_k, dtype=dtype)
        if "padding" in features:  # queries that are padding, in a mask of transformers
            inputs["attn_bias"][..., n_q // 2 :, :] = torch.finfo(dtype).min
        if "mask" in features:
            given["attn_mask"] = draw.normal(b, 1, n_q, n_k) > -0.5
            given["attn_mask"][..., n_q // 3 :, : n_k // 2] = False
            given["attn_mask"][..., -1:] = True
        if "used keys" in features:
            given["seqused_k"] = draw.below(n_k, b, dtype=torch.int32) + 1
        return inputs, lambda backend, **x: flash_attn_func(**x, **given, backend=backend)

    words = [features, *(f"{k} {v}" for k, v in options.items())]
    shape = f"{b} x {s}{'' if t is None else f' x {t}'}, {h}/{g} heads of {d}{'' if dv is None else f'/{dv}'}"
    return by_backend(", ".join([*filter(None, words), shape]), dtype, build)


def _varlen(dtype: torch.dtype, d: int, tail: int, **options: Any) -> Case:
    def build(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        lengths = torch.tensor([0, 1, 700, 33, 2000, 129] if not draw.small else [0, 1, 17, 33, 9], device=draw.device)
        ends = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        longest = 2000 if not draw.small else 33
        total = int(lengths.sum()) + tail
        inputs = {"q": draw.normal(total, 8, d, dtype=dtype)} | {n: draw.normal(total, 2, d, dtype=dtype) for n in "kv"}

        def call(backend: str | None, **x: Tensor) -> Tensor:
            return flash_attn_varlen_func(**x, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest,
                                          max_seqlen_k=longest, **options, backend=backend)  # fmt: skip

        return inputs, call

    words = [f"{k} {v}" for k, v in options.items()] + ([f"{tail} tokens beyond the last sequence"] if tail else [])
    return by_backend(", ".join(["packed sequences", *words, f"8/2 heads of {d}"]), dtype, build)


def _sdpa(dtype: torch.dtype, mask: bool) -> Case:
    def build(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        s = draw.size(1500, 50)
        inputs = {name: draw.normal(2, 4, s, 64, dtype=dtype) for name in ("query", "key", "value")}
        attn_mask = draw.normal(2, 1, s, s) > 0 if mask else None
        return inputs, lambda backend, **x: scaled_dot_product_attention(
            **x, attn_mask=attn_mask, is_causal=not mask, backend=backend
        )

    text = "a boolean mask" if mask else "is_causal"
    return by_backend(f"scaled_dot_product_attention, {text}, 2 x 4 x 1500 x 64", dtype, build)


def _decode(
    features: str, dtype: torch.dtype, b: int, context: int, n_new: int, h: int, g: int, d: int, dv: int | None = None,
    **options: Any,
) -> Case:  # fmt: skip
    def build(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        room, page = draw.size(context, 64), 64 if draw.size(context, 64) % 256 else 256
        widths = d, dv or d
        cache = [draw.normal(b, room, g, width, dtype=dtype) for width in widths]
        used = draw.below(room - n_new, b, dtype=torch.int32)
        given: dict[str, Any] = dict(options)
        if "paged" in features:
            pages = b * room // page
            order = torch.randperm(pages, device=draw.device)
            cache = [x.view(pages, page, g, -1)[order].contiguous() for x in cache]
            given["block_table"] = order.argsort().view(b, -1).int()
        q = draw.normal(b, n_new, h, d, dtype=dtype)
        new = [draw.normal(b, n_new, g, width, dtype=dtype) for width in widths]
        if "rotary" in features:
            cos, sin = rotary_cos_sin(torch.arange(room, device=draw.device), d)
            given |= {"rotary_cos": cos, "rotary_sin": sin}

        def call(backend: str | None, q: Tensor) -> list[Tensor]:
            tensors = [x.to(q.dtype, copy=True) for x in (*cache, *new)]
            if q.dtype == F64:
                given.update({k: given[k].double() for k in ("rotary_cos", "rotary_sin") if k in given})
            out = flash_attn_with_kvcache(q, *tensors, cache_seqlens=used, causal=True, **given, backend=backend)
            if q.dtype == F64:
                given.update({k: given[k].float() for k in ("rotary_cos", "rotary_sin") if k in given})
            return [out, *tensors[:2]]

        return {"q": q}, call

    words = [features, *(f"{k} {v}" for k, v in options.items())]
    shape = f"{b} x {context}, {n_new} new, {h}/{g} heads of {d}{'' if dv is None else f'/{dv}'}"
    text = ", ".join([*filter(None, words), shape])
    return by_backend(text, dtype, build, backward=False)


# --- norms, activations, rotary -----------------------------------------------------------------------------------------


def _norm(op: Callable[..., Any], dtype_on_gpu: torch.dtype, rows: int, n: int, residual: bool = False, **options: Any) -> Case:
    def build(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        m, width = draw.size(rows, 5), draw.size(n, min(n, 130))
        given = dict(options)
        dtype = dtype_on_gpu
        if draw.device == "cpu":  # there 16 bits and dropout are PyTorch's own, and not ours to judge
            dtype = F32
            given.pop("dropout_p", None)
        inputs = {"x": draw.normal(m, width, dtype=dtype) + 0.5, "weight": draw.normal(width, dtype=dtype)}
        if op is layer_norm:
            inputs["bias"] = draw.normal(width, dtype=dtype)
        if residual:
            inputs["residual"] = draw.normal(m, width)
        return inputs, lambda backend, **x: op(**x, **given, prenorm=residual, backend=backend)

    words = [op.__name__, "with residual" if residual else "", *(f"{k} {v}" for k, v in options.items()), f"{rows} x {n}"]
    return by_backend(", ".join(filter(None, words)), dtype_on_gpu, build)


def _activation(
    op: Callable[..., Any], dtype: torch.dtype, inputs: Sequence[str], rows: int = 4096, f: int = 11008, **options: Any
) -> Case:
    def build(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        m, width = draw.size(rows, 7), draw.size(f, 96 if f % 8 == 0 else 33)
        given = dict(options)
        if draw.device == "cpu":  # dropout there is PyTorch's own, with other random numbers
            given.pop("dropout_p", None)
        packed = len(inputs) == 1
        shapes = {name: (width,) if "bias" in name else (m, (1 + packed) * width) for name in inputs}
        return (
            {name: draw.normal(*shape, dtype=dtype) for name, shape in shapes.items()},
            lambda backend, **x: op(**x, **given, backend=backend),
        )

    words = [op.__name__, *inputs, *(f"{k} {v}" for k, v in options.items()), f"{rows} x {f}"]
    return by_backend(", ".join(words), dtype, build)


def _rotary(dtype: torch.dtype, b: int, s: int, h: int, g: int, d: int, rotary_dim: int, interleaved: bool) -> Case:
    def build(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        n = draw.size(s, min(s, 20))
        cos, sin = rotary_cos_sin(torch.arange(n, device=draw.device), rotary_dim)

        def call(backend: str | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            table = (cos.double(), sin.double()) if q.dtype == F64 else (cos, sin)
            return apply_rotary_emb_qk(q, k, *table, interleaved=interleaved, backend=backend)

        return {name: draw.normal(b, n, heads, d, dtype=dtype).transpose(1, 2) for name, heads in (("q", h), ("k", g))}, call

    form = "pairs" if interleaved else "halves"
    return by_backend(f"{form}, {b} x {s}, {h} + {g} heads of {d}, {rotary_dim} turned", dtype, build)


# --- losses -------------------------------------------------------------------------------------------------------------


def _targets(draw: Draw, n: int, vocabulary: int) -> Tensor:
    target = draw.below(vocabulary, n)
    target[:: max(2, n // 50)] = -100
    return target


def _cross_entropy(dtype: torch.dtype, n: int, vocabulary: int, **options: Any) -> Case:
    def build(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        rows, v = draw.size(n, 9), draw.size(vocabulary, 501)
        target = _targets(draw, rows, v)
        return {"logits": 3 * draw.normal(rows, v, dtype=dtype)}, lambda backend, logits: cross_entropy(
            logits, target, **options, reduction="sum", backend=backend
        )

    return by_backend(", ".join([*(f"{k} {v}" for k, v in options.items()), f"{n} x {vocabulary}"]), dtype, build)


def _linear_cross_entropy(dtype: torch.dtype, n: int, d: int, vocabulary: int, bias: bool = False, **options: Any) -> Case:
    def build(draw: Draw) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        rows, width, v = draw.size(n, 33), draw.size(d, 48), draw.size(vocabulary, 501)
        target = _targets(draw, rows, v)
        inputs = {
            "input": draw.normal(rows, width, dtype=dtype),
            "linear_weight": (draw.normal(v, width) / width**0.5).to(dtype),
        }
        if bias:
            inputs["linear_bias"] = draw.normal(v, dtype=dtype)
        return inputs, lambda backend, **x: linear_cross_entropy(
            **x, target=target, **options, reduction="sum", backend=backend
        )

    words = ["with bias" if bias else "", *(f"{k} {v}" for k, v in options.items()), f"{n} x {d} x {vocabulary}"]
    return by_backend(", ".join(filter(None, words)), dtype, build)


# --- optimizer, sampling, the model -------------------------------------------------------------------------------------


def needs_extension(draw: Draw, operator: str) -> None:
    """Without csrc/ PyTorch's operators stand in, and what is right is not ours."""
    reason = None if draw.device == "cpu" or FAKE else extension_lacks("cuda", operator)
    assert reason is None, reason


def _optimizer(text: str, dtype: torch.dtype, triton: bool = False, **options: Any) -> Case:
    """Five steps of tensors of many sizes; the truth is torch.optim.AdamW in float64, clipping by PyTorch's function.

    triton: by the kernel that stands in where csrc/ is not built; on a CPU by what is there."""
    common: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def evaluate(draw: Draw) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        shapes = [(draw.size(1000, 30), 777), (1,), (13,), (draw.size(4096, 8), 513), (3, 5, 7)]
        start = [draw.normal(*shape, dtype=dtype) for shape in shapes]
        grads = [[draw.normal(*shape, dtype=dtype) for shape in shapes] for _ in range(5)]

        def run(make: Callable[[list[Tensor]], Any], clip: float | None, wide: torch.dtype) -> list[Tensor]:
            params = [p.to(wide, copy=True).requires_grad_() for p in start]
            optimizer = make(params)
            for step in grads:
                for p, grad in zip(params, step):
                    p.grad = grad.to(wide, copy=True)
                if clip is not None:
                    nn.utils.clip_grad_norm_(params, clip)
                optimizer.step()
            return [p.detach() for p in params]

        if not triton:
            needs_extension(draw, "adamw_")
        clip = options.get("max_grad_norm")
        with kernels.backend("triton" if triton and draw.device != "cpu" else "auto"):
            ours = run(lambda p: FusedAdamW(p, **common, **options), None, dtype)
        with kernels.backend("reference"):
            plain = run(lambda p: FusedAdamW(p, **common, **options), None, dtype)
        truth = run(lambda p: torch.optim.AdamW(p, **common, foreach=False), clip, F64)
        return {f"p{i}": three for i, three in enumerate(zip(ours, plain, truth))}

    return Case(f"AdamW, {text}, {str(dtype).removeprefix('torch.')}", evaluate)


def _sampling(rows: int, vocabulary: int, **filters: Any) -> Case:
    """Ids that the filters keep, drawn as often as their probabilities say (a chi-square test)."""

    def evaluate(draw: Draw) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        from tests.test_sampling import assert_drawn_from, kept_probabilities

        v = draw.size(vocabulary, 30)
        rows_drawn, most = draw.size(rows, 4_000), draw.size(5, 2) / 2
        logits = draw.normal(v).clamp(-most, most)  # no token so rare that the test has nothing to count
        needs_extension(draw, "sample_rows")
        p = kept_probabilities(logits.cpu(), 0.8, **filters)
        ids = sample(logits.expand(rows_drawn, -1).contiguous(), 0.8, **filters)
        if not FAKE:
            assert (p[ids.cpu()] > 0).all(), "an id that the filters do not keep"
            assert_drawn_from(ids.cpu(), p)
        one = sample(draw.normal(1, draw.size(128256, 60)), 0.8, **filters)
        assert one.shape == (1,)
        return {}

    return Case(", ".join([*(f"{k} {v}" for k, v in filters.items()), f"{rows} x {vocabulary}"]), evaluate)


def _model(text: str, **options: Any) -> Case:
    """Loss and every gradient of a GPT in float32, all ops together."""

    def evaluate(draw: Draw) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        from wikigpt.model import GPT, GPTConfig

        size: dict[str, Any] = {"context_length": draw.size(512, 24), "n_layer": 2, "n_head": 4, "n_embd": draw.size(512, 32)}
        v = draw.size(33278, 200)
        ids = draw.below(v, draw.size(4, 2), size["context_length"])

        def run(backend: str, dtype: torch.dtype) -> Results:
            torch.manual_seed(0)
            model = GPT(GPTConfig(vocab_size=v, **size, **options, backend=backend)).to(draw.device, dtype)
            loss = model(ids, ids.roll(-1, 1))
            loss.backward()
            grads = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
            return {"loss": loss.detach()} | grads

        truth, plain, ours = run("reference", F64), run("reference", F32), run("auto", F32)
        return {name: (ours[name], plain[name], truth[name]) for name in truth}

    return Case(f"{text}, loss and gradients, float32", evaluate)


# --- the list -----------------------------------------------------------------------------------------------------------

LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 2}
CASES: dict[str, list[Case]] = {
    # Three lists, because each case compiles three kernels, two seconds each: three processes share them.
    "attention": [
        _attention(causal=True),
        _attention(),
        _attention(causal=True, h=16, g=4, d=128),
        _attention(causal=True, d=128, dtype=F16),
        _varlen(BF16, 64, 0, causal=True),
        _varlen(BF16, 128, 100, causal=True),
        _sdpa(BF16, False),
        _sdpa(F16, True),
    ],
    "attention_shapes": [
        _attention(causal=True, s=1024, d=96, t=1111),
        _attention(s=1000, t=2047, d=128),
        _attention(causal=True, s=1024, d=256),
        _attention(causal=True, s=1024, d=192, dv=128),
        _attention(causal=True, s=777, dtype=F32),
        _attention(causal=True, s=1, t=2000),
        _attention(causal=True, s=1000, d=512),
        _attention(causal=True, s=700, g=1, d=576, dv=512),
    ],
    "attention_features": [
        _attention("sinks", causal=True, window_size=(255, 0), g=2),
        _attention("alibi", causal=True, softcap=20.0),
        _attention("bias", s=1000),
        _attention("bias with padding", s=1000),
        _attention("mask", s=1000),
        _attention("used keys", s=1000),
        _attention(causal=True, dropout_p=0.2, s=1000),
    ],
    "decode": [
        _decode("", BF16, 4, 8192, 1, 32, 8, 128),
        _decode("paged", BF16, 16, 4096, 1, 32, 8, 128),
        _decode("rotary", F16, 2, 1000, 5, 8, 8, 64),
        _decode("", BF16, 1, 65536, 1, 32, 8, 128),
        _decode("", F32, 3, 777, 2, 4, 2, 64, window_size=(100, 0)),
        _decode("paged", BF16, 2, 2048, 33, 8, 1, 128, softcap=30.0),
        _decode("paged", BF16, 4, 4096, 1, 32, 1, 576, 512),
    ],
    "norm": [
        *(_norm(op, BF16, rows, n) for op in (layer_norm, rms_norm) for rows, n in ((16384, 512), (4096, 4096), (1024, 16384))),
        _norm(layer_norm, BF16, 4096, 768, residual=True),
        _norm(rms_norm, BF16, 2048, 8192, residual=True),
        _norm(rms_norm, F16, 4099, 1000, residual=True, dropout_p=0.2),
        _norm(layer_norm, F32, 1000, 4100),
        _norm(layer_norm, BF16, 100, 65536),
        _norm(rms_norm, BF16, 3, 7),
    ],
    "activation": [
        _activation(bias_gelu, BF16, ("x", "bias")),
        _activation(bias_gelu, F16, ("x", "bias"), 8192, 3072, approximate="tanh", dropout_p=0.1),
        _activation(swiglu, BF16, ("gate", "up")),
        _activation(swiglu, BF16, ("gate",)),
        _activation(swiglu, F32, ("gate", "up", "gate_bias", "up_bias"), 1000, 1001),
        _activation(geglu, BF16, ("gate",), 2048, 14336),
    ],
    "rotary": [
        _rotary(BF16, 4, 2048, 32, 8, 128, 128, False),
        _rotary(BF16, 4, 2048, 32, 8, 128, 128, True),
        _rotary(F16, 2, 1000, 16, 16, 64, 32, False),
        _rotary(F32, 2, 333, 3, 1, 80, 80, True),
        _rotary(BF16, 64, 1, 32, 8, 128, 128, False),
    ],
    "cross_entropy": [
        _cross_entropy(BF16, 4096, 33278),
        _cross_entropy(BF16, 1024, 128256, label_smoothing=0.1),
        _cross_entropy(F32, 2048, 50257, z_loss=1e-3, softcap=30.0),
        _cross_entropy(F16, 100, 7),
    ],
    "linear_cross_entropy": [
        _linear_cross_entropy(BF16, 4096, 512, 33278),
        _linear_cross_entropy(BF16, 1024, 4096, 128256),
        _linear_cross_entropy(F16, 1000, 768, 50257, bias=True, label_smoothing=0.1),
        _linear_cross_entropy(F32, 777, 320, 10001, z_loss=1e-3, softcap=30.0),
        _linear_cross_entropy(BF16, 1, 64, 1000),
    ],
    "optimizer": [
        _optimizer("plain", F32),
        _optimizer("clipped", F32, max_grad_norm=1.0),
        _optimizer("clipped, moving average", F32, max_grad_norm=1.0, ema_decay=0.9),
        _optimizer("master weights", BF16, master_weights=True),
        _optimizer("in Triton", F32, triton=True),
        _optimizer("in Triton, clipped, moving average, amsgrad", F32, True, max_grad_norm=1.0, ema_decay=0.9, amsgrad=True),
        _optimizer("in Triton, master weights", BF16, True, master_weights=True),
        _optimizer("in Triton, stochastic rounding", BF16, True, stochastic_rounding=True),
    ],
    "sampling": [
        _sampling(100_000, 100),
        _sampling(100_000, 100, top_k=50),
        _sampling(100_000, 100, top_p=0.9),
        _sampling(100_000, 100, top_k=50, top_p=0.9),
        _sampling(100_000, 100, min_p=0.05),
    ],
    "model": [_model("GPT-2"), _model("Llama", **LLAMA), _model("ALiBi", position="alibi")],
}


# --- judging them -------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    errors: dict[str, tuple[float, float, float]]  # result -> (error of ours, of plain PyTorch, what ours may have)
    wrong: list[str]

    def __str__(self) -> str:
        if FAKE:  # nothing was computed
            return ""
        ratios = [f"{name} {ours / plain:.2f}x" if plain else f"{name} {ours:.1e}" for name, (ours, plain, _) in self._shown()]
        return ", ".join(ratios)

    def _shown(self) -> Iterator[tuple[str, tuple[float, float, float]]]:
        """All results, or the worst six of a model's many."""
        worst = sorted(self.errors, key=lambda name: -self.errors[name][0] / (self.errors[name][2] or 1.0))
        shown = set(worst[:6])
        return ((name, errors) for name, errors in self.errors.items() if name in shown)


def judge(results: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Verdict:
    verdict = Verdict({}, [])
    for name, (ours, plain, truth) in results.items():
        if ours.shape != truth.shape or ours.dtype != plain.dtype:
            verdict.wrong.append(
                f"{name} has shape {tuple(ours.shape)} and dtype {ours.dtype}, not {tuple(truth.shape)}, {plain.dtype}"
            )
            continue
        if truth.numel() == 0:
            continue
        ours_error, plain_error = (float((x.double() - truth).abs().max()) for x in (ours, plain))
        most = float(truth.abs().max())
        allowed = 2 * plain_error + torch.finfo(ours.dtype).eps / 2 * most + 32 * torch.finfo(F32).eps * min(1.0, most)
        verdict.errors[name] = (ours_error, plain_error, allowed)
        if not ours_error <= allowed:  # NaN too
            verdict.wrong.append(f"{name} is off by {ours_error:.2e}, allowed {allowed:.2e}")
    return verdict


def with_memory(act: Callable[[], Any]) -> Any:
    """What `act` gives; other processes hold memory of the same GPU for a while, so it may try twice."""
    try:
        return act()
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        time.sleep(10)
        return act()


def run(op: str, first: int, draw: Callable[[], Draw], journal: records.Journal | None, args: argparse.Namespace) -> bool:
    """The cases of an op from number `first` on; whether all are right."""
    right = True
    for number, case in enumerate(CASES[op][first:], first):
        begin = time.perf_counter()
        broken = False
        numbers = draw()
        try:
            verdict = judge(with_memory(functools.partial(case.evaluate, numbers)))
            if args.device == "cuda":
                torch.cuda.synchronize()  # an error of the device is this case's
        except Exception as error:  # whatever a compiler or a driver says of a case, the next one is to be heard as well
            text = (str(error).strip().splitlines() or [""])[0]
            verdict = Verdict({}, [f"{type(error).__name__}: {text}"])
            broken = device_is_lost(error)
        if FAKE:  # it computes nothing; what fails on the way to the launch fails here too
            verdict.wrong = [reason for reason in verdict.wrong if "is off by" not in reason]
        seconds = time.perf_counter() - begin
        ok = not verdict.wrong
        right &= ok
        said = "ok" if ok else f"FAIL: {'; '.join(verdict.wrong)}; --seed {numbers.seed}"
        at = f"{op}, small" if args.sizes == "smoke" else op
        print(
            in_lines(f"{at}: {case.text}: {verdict}{': ' if str(verdict) else ''}{said} ({seconds:.1f}{NO_BREAK}s)"),
            flush=True,
        )
        if journal is not None:
            entry = {"group": op, "name": case.text, "ok": ok, "errors": verdict.errors, "seed": numbers.seed}
            entry["seconds"] = round(seconds, 2)
            journal.add(f"verdict/{op}", "row", **entry, **({} if ok else {"wrong": "; ".join(verdict.wrong)}))
        if broken:
            print(f"| {op}: the device is lost to this process; a new one goes on", flush=True)
            left = args.ops[args.ops.index(op) :]
            options = ["--from", str(number + 1), "--failed", "--sizes", args.sizes, "--device", args.device]
            files = [f"--journal={path}" for path in args.journal]
            os.execv(sys.executable, [sys.executable, "-m", "bench.verdict", *left, *options, *files])
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return right


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", choices=tuple(CASES), nargs="+", metavar="OP", help=", ".join(CASES))
    parser.add_argument("--sizes", choices=("smoke", "check", "default"), default="default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--journal", type=Path, action="append", default=[])
    parser.add_argument("--seed", type=int, help="of the random inputs: that of a case which was wrong")
    parser.add_argument("--from", type=int, default=0, dest="first", help=argparse.SUPPRESS)
    parser.add_argument("--failed", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    journal = records.Journal(*args.journal) if args.journal else None
    draw = functools.partial(Draw, args.device, args.sizes == "smoke", args.seed)
    right = not args.failed
    for i, op in enumerate(args.ops):
        first = args.first if i == 0 else 0
        if journal is not None and first == 0:
            journal.add(f"verdict/{op}", "begin", **records.about(args.device, args.sizes))
        right &= run(op, first, draw, journal, args)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
