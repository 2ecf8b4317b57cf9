"""What the launch tier runs on a fake GPU: every public function with each of its features, extreme shapes, sweeps of shapes.

Imported by a process in whose environment WIKIGPT_FAKE_GPU stands, it installs the fake first; tests/test_launch.py sends
names to such processes and judges what comes back.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import fake_gpu

RECORDER = fake_gpu.install_if_asked()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from wikigpt.kernels import backend  # noqa: E402
from wikigpt.kernels import linear_cross_entropy as loss_of_a_layer  # noqa: E402
from wikigpt.kernels.attention import pytorch as pytorch_names  # noqa: E402

from wikigpt import kernels  # noqa: E402
from wikigpt.model import GPT, GPTConfig  # noqa: E402

BF16 = torch.bfloat16
Call = Callable[[], Any]


@dataclass
class Found:
    """What a case did."""

    launches: list[fake_gpu.Launch]
    compiled: Counter[str]


def tensor(*shape: int, dtype: torch.dtype = BF16, grad: bool = True) -> Tensor:
    """Numbers that nobody reads; memory that nobody touches."""
    return torch.empty(*shape, dtype=dtype, device="cuda").requires_grad_(grad and dtype.is_floating_point)


def far(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """The same with a memory of one row."""
    return torch.empty(shape[-1], dtype=dtype, device="cuda").expand(shape).requires_grad_()


def floats(*shape: int) -> Tensor:
    return tensor(*shape, dtype=torch.float32, grad=False)


def integers(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def backward(result: Any) -> None:
    """From every result that has a gradient, without a pass over memory."""
    results = [r for r in (result if isinstance(result, tuple) else (result,)) if isinstance(r, Tensor) and r.requires_grad]
    if results:
        torch.autograd.backward(results, [torch.empty_like(r) for r in results])


# --- attention ------------------------------------------------------------------------------------------------------


def flash(
    batch: int = 2, s: int = 80, t: int = 96, heads: int = 4, groups: int = 2, d: int = 64, dv: int | None = None,
    dtype: torch.dtype = BF16, **options: Any,
) -> Call:  # fmt: skip
    q, k = tensor(batch, s, heads, d, dtype=dtype), tensor(batch, t, groups, d, dtype=dtype)
    v = tensor(batch, t, groups, dv or d, dtype=dtype)
    return lambda: kernels.flash_attn_func(q, k, v, **options)


def flash_columns(width: int, d: int) -> Call:
    """Of head_dim d, with elements that lie `width` apart."""
    q, k = tensor(2, 80, 4, d, width)[..., 0], tensor(2, 96, 2, d, width)[..., 0]
    return lambda: kernels.flash_attn_func(q, k, k, causal=True)


def packed(**options: Any) -> Call:
    q, k, ends = tensor(96, 4, 64), tensor(96, 2, 64), integers(0, 30, 96)
    return lambda: kernels.flash_attn_varlen_func(q, k, k, ends, ends, 66, 66, causal=True, **options)


def qkv_packed(n: int) -> Call:
    qkv = tensor(2, n, 3, 4, 64)
    return lambda: kernels.flash_attn_qkvpacked_func(qkv, causal=True)


def varlen(n: int) -> Call:
    q, k, ends = tensor(n + 20, 4, 64), tensor(n + 20, 2, 64), integers(0, 20, n + 20)
    return lambda: kernels.flash_attn_varlen_func(q, k, k, ends, ends, max(n, 20), max(n, 20), causal=True)


def sdpa(mask: Tensor | None = None, s: int = 80, t: int = 96, **options: Any) -> Call:
    q, k = tensor(2, 4, s, 64), tensor(2, 4, t, 64)
    return lambda: kernels.scaled_dot_product_attention(q, k, k, mask, **options)


def decode(
    lengths: Any = 100, batch: int = 2, s: int = 1, new: int = 1, capacity: int = 4096, heads: int = 8, groups: int = 2,
    pages: int = 0, rotary: bool = False, **options: Any,
) -> Call:  # fmt: skip
    def plain(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return tensor(*shape, dtype=dtype, grad=False)

    q, k = plain(batch, s, heads, 128), plain(batch, new, groups, 128)
    if pages:
        cache = plain(batch * capacity // pages, pages, groups, 128)
        options["block_table"] = torch.zeros(batch, capacity // pages, dtype=torch.int32, device="cuda")
    else:
        cache = plain(batch, capacity, groups, 128)
    if lengths == "on the device":
        lengths = integers(*[100] * batch)
    if rotary:
        options["rotary_cos"] = options["rotary_sin"] = plain(capacity, 32)
    values = torch.empty_like(cache)
    return lambda: kernels.flash_attn_with_kvcache(
        q, cache, values, k if new else None, k if new else None, cache_seqlens=lengths, causal=True, **options
    )


def activated(call: Call) -> Call:
    """With our attention under PyTorch's names. C++ sees tensors of the CPU, so that is where it takes their place."""

    def inside() -> Any:
        activation = pytorch_names._activate("CPU")
        try:
            results = call()
            backward(results)
        finally:
            activation.remove()

    return inside


def pytorch_sdpa(**options: Any) -> Call:
    q, k = tensor(2, 4, 80, 64), tensor(2, 4, 96, 64)
    return activated(lambda: F.scaled_dot_product_attention(q, k, k, **options))


def kv_packed() -> Call:
    q, kv = tensor(2, 80, 4, 64), tensor(2, 96, 2, 2, 64)
    return lambda: kernels.flash_attn_kvpacked_func(q, kv)


def varlen_qkv_packed() -> Call:
    qkv, ends = tensor(96, 3, 4, 64), integers(0, 30, 96)
    return lambda: kernels.flash_attn_varlen_qkvpacked_func(qkv, ends, 66)


def varlen_attn() -> Call:
    q, ends = tensor(96, 4, 64), integers(0, 30, 96)
    return lambda: kernels.varlen_attn(q, q, q, ends, ends, 66, 66, window_size=(-1, 0))


def mask(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool, device="cuda")


ATTENTION: dict[str, Callable[[], Call]] = {
    "flash causal": lambda: flash(causal=True),
    "flash float32": lambda: flash(causal=True, dtype=torch.float32, d=32),
    "flash head_dim 128": lambda: flash(causal=True, d=128),
    "flash head_dim 192, values of 80": lambda: flash(causal=True, d=192, dv=80),
    "flash head_dim 1": lambda: flash(d=1),
    "flash head_dim 1, far apart": lambda: flash_columns(8, 1),
    "flash columns": lambda: flash_columns(2, 64),
    "flash window": lambda: flash(window_size=(16, 8)),
    "flash softcap, alibi": lambda: flash(causal=True, softcap=20.0, alibi_slopes=floats(4)),
    "flash dropout": lambda: flash(causal=True, dropout_p=0.1),
    "flash sinks": lambda: flash(causal=True, s_aux=tensor(4, dtype=torch.float32)),
    "flash bias": lambda: flash(attn_bias=tensor(2, 4, 80, 96)),
    "flash bias of keys": lambda: flash(attn_bias=tensor(1, 1, 1, 96)),
    "flash mask": lambda: flash(attn_mask=mask(1, 1, 80, 96)),
    "flash used keys": lambda: flash(causal=True, seqused_k=integers(50, 96)),
    "flash lse": lambda: flash(causal=True, return_attn_probs=True),
    "flash qkv packed": lambda: qkv_packed(80),
    "varlen": lambda: packed(),
    "varlen sinks": lambda: packed(s_aux=tensor(4, dtype=torch.float32)),
    "flash kv packed": kv_packed,
    "varlen qkv packed": varlen_qkv_packed,
    "varlen_attn": varlen_attn,
    "PyTorch's sdpa": lambda: pytorch_sdpa(is_causal=True),
    "PyTorch's sdpa, mask": lambda: pytorch_sdpa(attn_mask=mask(2, 1, 1, 96)),
    "sdpa causal": lambda: sdpa(is_causal=True),
    "sdpa mask": lambda: sdpa(mask(2, 1, 1, 96)),
    "sdpa additive mask": lambda: sdpa(tensor(2, 4, 80, 96, grad=False)),
    "kvcache": lambda: decode("on the device"),
    "kvcache of an int": lambda: decode(100),
    "kvcache without new keys": lambda: decode("on the device", new=0),
    "kvcache rotary, window, softcap": lambda: decode("on the device", rotary=True, window_size=(64, 0), softcap=20.0),
    "kvcache paged": lambda: decode("on the device", pages=64),
    "kvcache of chosen rows": lambda: decode("on the device", cache_batch_idx=integers(1, 0), cache_leftpad=integers(3, 0)),
    "kvcache alibi, sinks": lambda: decode(
        "on the device", alibi_slopes=floats(8), s_aux=floats(8)
    ),
    "kvcache of many queries": lambda: decode("on the device", s=33, new=33, num_splits=1),
}  # fmt: skip


# --- norms, activations, rotary, losses -----------------------------------------------------------------------------


def norm(op: str, rows: int = 6, n: int = 64, bias: bool = False, residual: bool = False, **options: Any) -> Call:
    x, weight = tensor(rows, n), tensor(n)
    function: Any = getattr(kernels, op)
    if bias:
        options["bias"] = tensor(n)
    if residual:
        options["residual"] = tensor(rows, n)
    return lambda: function(x, weight, **options)


def part_of_rows(width: int) -> Call:
    x, weight = tensor(6, width), tensor(64)
    return lambda: kernels.rms_norm(x[:, :64], weight)


def gated(op: str, rows: int = 6, n: int = 96, biases: bool = False, together: bool = False, **options: Any) -> Call:
    gate = tensor(rows, 2 * n if together else n)
    up = None if together else tensor(rows, n)
    function: Any = getattr(kernels, op)
    if biases:
        options |= {"gate_bias": tensor(n), "up_bias": tensor(n)}
    return lambda: function(gate, up, **options)


def gelu(rows: int = 6, n: int = 96, **options: Any) -> Call:
    x, bias = tensor(rows, n), tensor(n)
    return lambda: kernels.bias_gelu(x, bias, **options)


def rotary(s: int = 20, heads: int = 4, d: int = 64, batch: int = 2, keys: bool = False, **options: Any) -> Call:
    inplace = options.get("inplace", False)
    x, k = tensor(batch, heads, s, d, grad=not inplace), tensor(batch, 2, s, d, grad=not inplace)
    cos = floats(s, d // 2)
    if keys:
        return lambda: kernels.apply_rotary_emb_qk(x, k, cos, cos, **options)
    return lambda: kernels.apply_rotary_emb(x, cos, cos, **options)


def loss(rows: int = 6, vocabulary: int = 500, **options: Any) -> Call:
    logits, target = tensor(rows, vocabulary), torch.zeros(rows, dtype=torch.int64, device="cuda")
    return lambda: kernels.cross_entropy(logits, target, **options)


def layer_loss(
    rows: int = 6, width: int = 64, vocabulary: int = 500, kept: bool = True, chunks: int = 1, **options: Any
) -> Call:
    """kept: the logits, for the backward."""
    x, weight = tensor(rows, width), tensor(vocabulary, width)
    target = torch.zeros(rows, dtype=torch.int64, device="cuda")
    # What an ordinary problem reaches at gigabytes.
    module: Any = loss_of_a_layer.__globals__
    sizes = {"CHUNK_BYTES": 2 * rows * -(-vocabulary // chunks), "KEEP_BYTES": 2**40 if kept else 0}

    def call() -> Any:
        before = {name: module[name] for name in sizes}
        module.update(sizes)
        try:
            backward(kernels.linear_cross_entropy(x, weight, target, **options))
        finally:
            module.update(before)

    return call


OTHERS: dict[str, Callable[[], Call]] = {
    "layer_norm": lambda: norm("layer_norm", bias=True),
    "layer_norm residual, dropout": lambda: norm("layer_norm", bias=True, residual=True, dropout_p=0.1, prenorm=True),
    "layer_norm of many rows": lambda: norm("layer_norm", rows=20_000, bias=True),
    "layer_norm of wide rows": lambda: norm("layer_norm", n=70_000, bias=True),
    "rms_norm": lambda: norm("rms_norm"),
    "rms_norm residual, dropout": lambda: norm("rms_norm", residual=True, dropout_p=0.1, prenorm=True),
    "rms_norm unit_offset": lambda: norm("rms_norm", unit_offset=True),
    "rms_norm of odd rows": lambda: norm("rms_norm", rows=7, n=77),
    "bias_gelu": lambda: gelu(),
    "bias_gelu dropout": lambda: gelu(dropout_p=0.1, approximate="tanh"),
    "swiglu": lambda: gated("swiglu"),
    "swiglu side by side": lambda: gated("swiglu", together=True),
    "swiglu of odd rows": lambda: gated("swiglu", rows=7, n=77, biases=True),
    "geglu": lambda: gated("geglu"),
    "geglu biases": lambda: gated("geglu", biases=True),
    "rotary": lambda: rotary(),
    "rotary interleaved": lambda: rotary(interleaved=True),
    "rotary in place": lambda: rotary(inplace=True),
    "rotary of q and k": lambda: rotary(keys=True),
    "rotary positions": lambda: rotary(positions=torch.arange(20, device="cuda")),
    "cross_entropy": lambda: loss(),
    "cross_entropy in place": lambda: loss(inplace_backward=True),
    "cross_entropy of everything": lambda: loss(
        label_smoothing=0.1, softcap=20.0, z_loss=1e-4, return_aux=True, reduction="sum",
        weight=floats(500),
    ),
    "cross_entropy of each token": lambda: loss(reduction="none", vocabulary=33_278),
    "linear_cross_entropy": lambda: layer_loss(),
    "linear_cross_entropy in chunks": lambda: layer_loss(vocabulary=1500, chunks=3),
    "linear_cross_entropy in chunks, not kept": lambda: layer_loss(vocabulary=1500, chunks=3, kept=False),
    "linear_cross_entropy bias, aux": lambda: layer_loss(linear_bias=tensor(500), return_aux=True, softcap=20.0),
    "linear_cross_entropy filtered": lambda: layer_loss(filter_gradients=True),
}  # fmt: skip


# --- AdamW in Triton, which stands in where csrc/ is not built ---------------------------------------------------------


def in_triton(make: Callable[[], Call]) -> Call:
    call = make()

    def forced() -> None:
        with backend("triton"):
            call()

    return forced


ADAMW: dict[str, Callable[[], Call]] = {
    "AdamW in Triton": lambda: in_triton(optimizer),
    "AdamW in Triton, everything": lambda: in_triton(
        lambda: optimizer(max_grad_norm=1.0, ema_decay=0.9, amsgrad=True, zero_grad=True)
    ),
    "AdamW in Triton, bfloat16": lambda: in_triton(lambda: optimizer(dtype=BF16, stochastic_rounding=True)),
    "AdamW in Triton, master weights": lambda: in_triton(lambda: optimizer(dtype=BF16, master_weights=True)),
    "AdamW in Triton, scaled": lambda: in_triton(scaled_step),
    "Adam in Triton": lambda: in_triton(adam),
}

# --- csrc: its operators compute on the CPU, and no kernel of Triton is launched -----------------------------------------


def optimizer(dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    params = [torch.nn.Parameter(torch.zeros(n, device="cuda", dtype=dtype)) for n in (5, 64, 1, 80)]
    for p in params:
        p.grad = torch.ones_like(p)
    steps = kernels.FusedAdamW(params, **options)
    return lambda: [steps.step() for _ in range(3)]


def adam() -> Call:
    p = torch.nn.Parameter(torch.zeros(64, device="cuda"))
    p.grad = torch.ones_like(p)
    return kernels.FusedAdam([p]).step


def tokens(**options: Any) -> Call:
    logits = torch.zeros(4, 500, device="cuda")
    return lambda: kernels.sample(logits, **options)


def flashinfer_tokens() -> Call:
    logits = torch.zeros(4, 500, device="cuda")
    return lambda: kernels.top_k_top_p_sampling_from_logits(logits, 50, 0.9)


def scaled_step() -> Call:
    """With a gradient scale, whose finding of inf stays on the device."""
    p = torch.nn.Parameter(torch.zeros(64, device="cuda"))
    optimizer, scaler = kernels.FusedAdamW([p], max_grad_norm=1.0), torch.amp.GradScaler("cuda")

    def call() -> None:
        for _ in range(2):
            scaler.scale(p.square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()

    return call


EXTENSION: dict[str, Callable[[], Call]] = {
    "AdamW": lambda: optimizer(),
    "AdamW of everything": lambda: optimizer(max_grad_norm=1.0, ema_decay=0.9, amsgrad=True, zero_grad=True),
    "AdamW of bfloat16": lambda: optimizer(dtype=BF16, stochastic_rounding=True),
    "AdamW scaled": scaled_step,
    "Adam": adam,
    "sample": lambda: tokens(),
    "sample filtered": lambda: tokens(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01),
    "sample of seeds": lambda: tokens(seed=torch.arange(4, device="cuda"), offset=3, top_k=50),
    "sample of a generator": lambda: tokens(generator=torch.Generator("cuda")),
    "sample as flashinfer": flashinfer_tokens,
    "sample tensors": lambda: tokens(temperature=torch.ones(4, device="cuda"), top_p=torch.full((4,), 0.9, device="cuda")),
}

CASES = ATTENTION | OTHERS | ADAMW | EXTENSION

# --- whole models -----------------------------------------------------------------------------------------------------

SIZE: dict[str, Any] = {"vocab_size": 500, "context_length": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}
LLAMA: dict[str, Any] = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2, "bias": False}


def step_of(**options: Any) -> Call:
    """A step of training as `wikigpt train` makes it on a GPU."""
    model = GPT(GPTConfig(**SIZE | options)).to("cuda").train()
    optimizer = kernels.FusedAdamW(model.parameters(), max_grad_norm=1.0)
    tokens = torch.zeros(2, 64, dtype=torch.int64, device="cuda")

    def call() -> None:
        with torch.autocast("cuda", BF16):
            loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return call


def token_of(**options: Any) -> Call:
    """The next token of two texts, drawn. Whoever shows it to somebody waits for it, once."""
    model = GPT(GPTConfig(**SIZE | options)).to("cuda").eval()
    tokens, seeds = torch.zeros(2, 8, dtype=torch.int64, device="cuda"), torch.arange(2, device="cuda")

    @torch.no_grad()
    def call() -> None:
        cache = model.make_cache(2)
        for part in (tokens, tokens[:, :1]):
            logits = model.head(model.hidden(part, cache)[:, -1])
            kernels.sample(logits, 0.8, 50, 0.9, seed=seeds, offset=3)

    return call


MODELS: dict[str, Callable[[], Call]] = {
    "a step of training, GPT-2": lambda: step_of(dropout=0.1),
    "a step of training, Llama": lambda: step_of(**LLAMA),
    "a step of training, ALiBi": lambda: step_of(position="alibi"),
    "a token of generation, GPT-2": lambda: token_of(),
    "a token of generation, Llama": lambda: token_of(**LLAMA),
    "a token of generation, ALiBi": lambda: token_of(position="alibi"),
}


# --- extreme shapes ---------------------------------------------------------------------------------------------------


def bias_of_many_rows() -> Call:
    q = far(1, 9_000_000, 1, 16)  # 70,000 tiles of queries
    k, bias = tensor(1, 16, 1, 16), tensor(1, 1, 9_000_000, 1)
    return lambda: kernels.flash_attn_func(q, k, k, attn_bias=bias)


def wide_vocabulary() -> Call:
    logits = torch.empty(2**28, dtype=BF16, device="cuda").expand(2, -1).requires_grad_()
    target = torch.zeros(2, dtype=torch.int64, device="cuda")
    return lambda: kernels.cross_entropy(logits, target, reduction="none")


EXTREMES: dict[str, Callable[[], Call]] = {
    "70,000 sequences": lambda: flash(70_000, 1, 1, 1, 1, 16),
    "70,000 heads": lambda: flash(1, 1, 1, 70_000, 1, 16),
    "70,000 sequences with a mask": lambda: flash(70_000, 1, 1, 1, 1, 16, attn_mask=mask(70_000, 1, 1, 1)),
    "70,000 sequences with a bias": lambda: flash(70_000, 1, 1, 1, 1, 16, attn_bias=tensor(70_000, 1, 1, 1)),
    "a mask for each of 300 x 300 heads": lambda: flash(300, 1, 1, 300, 300, 16, attn_mask=mask(300, 300, 1, 1)),
    "a bias for each of 300 x 300 heads": lambda: flash(300, 1, 1, 300, 300, 16, attn_bias=tensor(300, 300, 1, 1)),
    "a bias of 9 million rows": bias_of_many_rows,
    "a bias of 5 million keys": lambda: flash(1, 1, 5_000_000, 1, 1, 16, attn_bias=tensor(1, 1, 1, 5_000_000)),
    "4 million positions": lambda: flash(1, 4_000_000, 4_000_000, 1, 1, 16, causal=True),
    "decode 70,000 sequences": lambda: decode("on the device", batch=70_000, capacity=1, heads=1, groups=1),
    "decode 70,000 heads": lambda: decode("on the device", capacity=2, heads=70_000, groups=70_000, rotary=True),
    "decode 4 million positions": lambda: decode("on the device", batch=1, capacity=4_000_000, heads=1, groups=1),
    "norm of 5 million rows": lambda: norm("rms_norm", rows=5_000_000, n=16),
    "norm of a row of 10 million": lambda: norm("rms_norm", rows=1, n=10_000_000),
    "swiglu of 2^30 + 2 elements": lambda: gated("swiglu", rows=2, n=2**29 + 1),
    "bias_gelu of a million rows": lambda: gelu(rows=1_000_000, n=16),
    "rotary of a million heads": lambda: rotary(s=1, heads=1_000_000, d=16, batch=1),
    "rotary of 70,000 sequences": lambda: rotary(s=1, d=16, batch=70_000),
    "rotary of 4 million positions": lambda: rotary(s=4_000_000, heads=1, d=16, batch=1),
    "a vocabulary of 2^28": wide_vocabulary,
    "5 million tokens": lambda: loss(rows=5_000_000, vocabulary=16),
    "filtered, width of 10 million": lambda: layer_loss(rows=1, width=10_000_000, vocabulary=2, filter_gradients=True),
}  # fmt: skip


# --- sweeps ---------------------------------------------------------------------------------------------------------

LENGTHS = range(1, 301)


@dataclass(frozen=True)
class Sweep:
    """Problems that differ in a number which a user changes from call to call. One kernel serves all of them, unless
    `allowed` has a larger number for it."""

    problems: Iterable[Callable[[], Call]]
    allowed: dict[str, int] = field(default_factory=dict)


def over(numbers: Iterable[int], problem: Callable[[int], Call], allowed: dict[str, int] | None = None) -> Sweep:
    return Sweep([functools.partial(problem, n) for n in numbers], allowed or {})


# A row of a bias or a mask is read in wide loads where rows begin at multiples of 16 bytes; one of one column stands alone.
ALIGNED = 3
BOTH_WAYS = {"rotary_triton._rotary": 2}  # forward, backward
SPLIT = {"decode._decode": 2}  # with one split it writes the result itself

SWEEPS: dict[str, Sweep] = {
    "flash lengths": over(LENGTHS, lambda n: flash(1, n, n, causal=True)),
    "flash lengths, two sequences": over(LENGTHS, lambda n: flash(2, n, n, causal=True)),
    "flash lengths of keys": over(LENGTHS, lambda n: flash(1, 64, n, causal=True)),
    "flash lengths, values of another width": over(LENGTHS, lambda n: flash(1, n, n, dv=32, causal=True)),
    "flash batches": over(range(1, 9), lambda n: flash(n, causal=True)),
    "flash heads": over(range(1, 17), lambda n: flash(heads=n, groups=1)),
    "flash groups": over(range(1, 17), lambda n: flash(heads=16 * n, groups=n)),
    "flash windows": over(range(1, 65), lambda n: flash(window_size=(n, n // 2))),
    "flash scales": over(range(1, 65), lambda n: flash(softmax_scale=n / 16)),
    "flash dropout": over(LENGTHS, lambda n: flash(1, n, n, dropout_p=n / 512)),
    "flash qkv packed": over(LENGTHS, qkv_packed),
    "flash bias": over(
        LENGTHS, lambda n: flash(1, n, n, attn_bias=tensor(1, 4, n, n)),
        dict.fromkeys(("forward._forward", "backward._dq", "backward._dkdv", "backward._dbias"), ALIGNED),
    ),
    "flash mask": over(
        LENGTHS, lambda n: flash(1, n, n, attn_mask=mask(1, 1, n, n)),
        {"forward._forward": ALIGNED, "backward._dq": ALIGNED, "backward._dkdv": ALIGNED, "tile.block_list": 3 * ALIGNED},
    ),
    "sdpa lengths": over(LENGTHS, lambda n: sdpa(s=n, t=n, is_causal=True)),
    "varlen lengths": over(LENGTHS, varlen, {"tile.clear_tails": 2}),  # of the results, of the gradients
    "decode lengths": over(range(1, 401), lambda n: decode(n), SPLIT),
    "decode capacities": over(range(100, 401), lambda n: decode("on the device", capacity=n), SPLIT),
    "decode batches": over(range(1, 9), lambda n: decode("on the device", batch=n)),
    "decode windows": over(range(1, 65), lambda n: decode("on the device", window_size=(n, 0))),
    "decode pages": over(range(1, 65), lambda n: decode("on the device", pages=16, capacity=16 * n), SPLIT),
    "layer_norm rows": over(LENGTHS, lambda n: norm("layer_norm", rows=n, bias=True)),
    "rms_norm rows": over(LENGTHS, lambda n: norm("rms_norm", rows=n)),
    "rms_norm residual, dropout": over(LENGTHS, lambda n: norm("rms_norm", rows=n, residual=True, dropout_p=n / 512)),
    # Rows that begin at multiples of 16 elements are read in wide loads, others are not.
    "rms_norm rows of a wider tensor": over(
        range(64, 364), part_of_rows, {"norm_triton._forward": 2, "norm_triton._backward": 2}
    ),
    "rms_norm eps": over(range(1, 65), lambda n: norm("rms_norm", eps=n * 1e-6)),
    "swiglu rows": over(LENGTHS, lambda n: gated("swiglu", rows=n)),
    "swiglu rows side by side": over(LENGTHS, lambda n: gated("swiglu", rows=n, together=True)),
    "geglu biases": over(LENGTHS, lambda n: gated("geglu", rows=n, biases=True)),
    "bias_gelu rows": over(LENGTHS, lambda n: gelu(rows=n, dropout_p=n / 512)),
    # One position, which is decoding, has a block of its own.
    "rotary lengths": over(LENGTHS, lambda n: rotary(s=n), {"rotary_triton._rotary": 4}),
    "rotary batches": over(range(1, 9), lambda n: rotary(batch=n), BOTH_WAYS),
    "rotary heads": over(range(1, 17), lambda n: rotary(heads=n, keys=True), BOTH_WAYS),
    "cross_entropy tokens": over(LENGTHS, lambda n: loss(rows=n)),
    "cross_entropy ignored": over(range(-100, 33), lambda n: loss(ignore_index=n)),
    "linear_cross_entropy tokens": over(LENGTHS, lambda n: layer_loss(rows=n)),
    "linear_cross_entropy chunks": over(LENGTHS, lambda n: layer_loss(rows=n, vocabulary=1500, chunks=3)),
    "linear_cross_entropy filtered": over(
        LENGTHS, lambda n: layer_loss(rows=n, filter_gradients=True),
        {"linear_cross_entropy_triton._filtered_product": 2},  # for the input and for the weight
    ),
}  # fmt: skip

# --- in the process of a fake GPU -----------------------------------------------------------------------------------


def _recorder() -> fake_gpu.Recorder:
    assert RECORDER is not None, f"no {fake_gpu.ASKED} in the environment"
    return RECORDER


def _found() -> Found:
    recorder = _recorder()
    return Found(recorder.launches, Counter(recorder.compiled))


def run(name: str) -> Found:
    """Forward and backward, really compiled; the host may wait for nothing."""
    recorder = _recorder()
    call = CASES[name]()
    recorder.clear()
    with recorder.strictly():
        backward(call())
    return _found()


def adamw_in_triton(sizes: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(what the launches of one step were given, what they are to be given) for parameters of these sizes, not of 0."""
    recorder = _recorder()
    params = [torch.nn.Parameter(torch.zeros(n, device="cuda")) for n in sizes]
    for p in params:
        p.grad = torch.ones_like(p)
    steps = kernels.FusedAdamW(params, ema_decay=0.9)
    recorder.clear()
    with backend("triton"):
        steps.step()
    state = {name: [steps.state[p][key] for p in params] for name, key in (("ExpAvg", "exp_avg"), ("Ema", "ema"))}
    lists: dict[str, list[Tensor]] = {"Param": list(params), "Grad": [p.grad for p in params if p.grad is not None], **state}
    expected = [
        {name: tensors[i].data_ptr() for name, tensors in lists.items()} | {"numel": n, "column": i, "index": i}
        for i, n in enumerate(sizes)
        if n
    ]
    given = [{name: launch.arguments.get(name, 1) for name in expected[0]} for launch in recorder.launches]  # 1 is compiled in
    return given, expected


def run_elsewhere(name: str) -> Found:
    """With every tensor on the second device while the first is the current one."""
    recorder = _recorder()
    with recorder.counting(), recorder.tensors_on(1):
        backward(CASES[name]()())
        return _found()


def functions_called() -> set[str]:
    """Names of wikigpt.kernels that some case calls, directly or through another function."""
    recorder, called, names = _recorder(), set(), [name for name in kernels.__all__ if callable(getattr(kernels, name))]

    def noting(name: str, function: Any) -> Any:
        @functools.wraps(function, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return function(*args, **kwargs)

        return call

    before = {name: getattr(kernels, name) for name in names}
    try:
        for name, function in before.items():
            setattr(kernels, name, noting(name, function))
        with recorder.counting():
            for make in (CASES | MODELS).values():
                backward(make()())
    finally:
        for name, function in before.items():
            setattr(kernels, name, function)
    return called


def run_model(name: str) -> Found:
    """The host may wait for nothing. Nothing is compiled."""
    recorder = _recorder()
    with recorder.counting():
        call = MODELS[name]()
        with recorder.strictly():
            call()
        return _found()


def run_extreme(name: str) -> Found:
    """Nothing is compiled, and matrix products are left out: what is computed takes memory that nobody has."""
    recorder = _recorder()
    assert os.environ[fake_gpu.ASKED].endswith("untouched")
    with recorder.counting(), _without_products():
        backward(EXTREMES[name]()())
        return _found()


@contextlib.contextmanager
def _without_products() -> Iterator[None]:
    before = torch.mm, torch.addmm
    torch.mm = torch.addmm = lambda *args, out, **options: out  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.mm, torch.addmm = before


def sweep(name: str) -> Found:
    recorder = _recorder()
    with recorder.counting(), _without_products():
        for problem in SWEEPS[name].problems:
            backward(problem()())
        return _found()
