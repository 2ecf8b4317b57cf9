"""Attention problems by name of their features, and the numeric rule over everything an implementation returns."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from wikigpt.kernels.attention.op import attention
from wikigpt.kernels.attention.reference import Inputs

from tests.conftest import assert_as_accurate_as

FEATURES = (
    "causal",
    "top_left",
    "window",
    "softcap",
    "alibi",
    "alibi_per_batch",
    "bias",
    "bias_of_keys",
    "bias_of_queries",
    "mask",
    "mask_of_keys",
    "block_mask",
    "sinks",
    "dropout",
    "varlen",
    "used_keys",
    "lse_gradient",
    "packed_layout",
    "heads_first_layout",
    "expanded_batch",
)
# Two of one kind, or two that the public functions refuse together.
EXCLUSIVE = (
    {"alibi", "alibi_per_batch"},
    {"bias", "bias_of_keys", "bias_of_queries"},
    {"mask", "mask_of_keys", "block_mask"},
    {"packed_layout", "heads_first_layout", "expanded_batch"},
    *({"varlen", other} for other in ("bias", "bias_of_keys", "bias_of_queries", "mask", "mask_of_keys", "block_mask")),
    *({"varlen", layout} for layout in ("heads_first_layout", "expanded_batch")),
)
HEAD_DIMS = (16, 24, 40, 64, 72, 80, 96, 112, 128, 136, 192, 256)


@dataclass(frozen=True)
class Case:
    features: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    batch: int = 2
    s: int = 33
    t: int = 41
    heads: int = 2
    groups: int = 1
    head_dim: int = 16
    v_head_dim: int | None = None
    seed: int = 0
    device: str = field(default="cpu", compare=False)

    def __str__(self) -> str:
        widths = f"d{self.head_dim}-{self.v_head_dim or self.head_dim}"
        dims = f"b{self.batch}-s{self.s}-t{self.t}-h{self.heads}-g{self.groups}-{widths}"
        return "-".join((*self.features, str(self.dtype).removeprefix("torch."), dims))


def combines(features: tuple[str, ...]) -> bool:
    return not any(len(group & set(features)) > 1 for group in EXCLUSIVE)


def build(case: Case) -> Inputs:
    """The problem of a case, with fresh random numbers from its seed."""
    rng = torch.Generator().manual_seed(case.seed)
    on = set(case.features)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype).to(case.device)

    b, s, t, h, g, d, dv = case.batch, case.s, case.t, case.heads, case.groups, case.head_dim, case.v_head_dim or case.head_dim
    if "packed_layout" in on:  # slices of one projection, as models make them
        width = max(d, dv)
        t = s
        qkv = normal(b, s, h + 2 * g, width)
        q, k, v = qkv[..., :h, :d], qkv[..., h : h + g, :d], qkv[..., h + g :, :dv]
    elif "heads_first_layout" in on:
        q, k, v = (normal(b, n, length, w).transpose(1, 2) for n, length, w in ((h, s, d), (g, t, d), (g, t, dv)))
    elif "expanded_batch" in on:
        q, k, v = normal(b, s, h, d), normal(1, t, g, d).expand(b, t, g, d), normal(1, t, g, dv).expand(b, t, g, dv)
    else:
        q, k, v = normal(b, s, h, d), normal(b, t, g, d), normal(b, t, g, dv)
    options: dict[str, object] = {}
    if "varlen" in on:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        options |= _lengths(q.shape[0], k.shape[0], b + 1, rng, case.device)
    if "used_keys" in on:
        most = t if "varlen" not in on else None
        sizes = [most] * b if most else (options["cu_seqlens_k"][1:] - options["cu_seqlens_k"][:-1]).tolist()  # type: ignore[index]
        used = [int(torch.randint(n + 1, (), generator=rng)) for n in sizes]
        options["seqused_k"] = torch.tensor(used, dtype=torch.int32, device=case.device)
    if "window" in on:
        options |= {
            "window_left": int(torch.randint(s, (), generator=rng)),
            "window_right": int(torch.randint(8, (), generator=rng)),
        }
    if "causal" in on:
        options["window_right"] = 0
    if "softcap" in on:
        options["softcap"] = 1.5
    if "alibi" in on or "alibi_per_batch" in on:
        slopes = torch.rand(*((h,) if "alibi" in on else (b if "varlen" not in on else b + 1, h)), generator=rng)
        options["alibi_slopes"] = slopes.to(case.device)
    for name, shape in (("bias", (b, h, s, t)), ("bias_of_keys", (b, 1, 1, t)), ("bias_of_queries", (h, s, 1))):
        if name in on:
            options["bias"] = normal(*shape)
    for name, shape in (("mask", (b, h, s, t)), ("mask_of_keys", (b, 1, 1, t))):
        if name in on:
            options["mask"] = (torch.rand(*shape, generator=rng) > 0.3).to(case.device)
    if "block_mask" in on:  # whole tiles without a key, whole tiles with all, and rows that see nothing
        mask = torch.zeros(1, 1, s, t, dtype=torch.bool)
        mask[..., s // 3 :, : 2 * t // 3] = True
        mask[..., : s // 4, t // 2 :] = torch.rand(s // 4, t - t // 2, generator=rng) > 0.5
        options["mask"] = mask.to(case.device)
    if "sinks" in on:
        options["s_aux"] = normal(h, dtype=torch.float32)
    if "dropout" in on:
        options |= {"dropout_p": 0.2, "seed": torch.randint(2**31, (2,), generator=rng).to(case.device)}
    return Inputs(q, k, v, softmax_scale=d**-0.5, top_left="top_left" in on, **options)  # type: ignore[arg-type]


def _lengths(q_tokens: int, k_tokens: int, sequences: int, rng: torch.Generator, device: str) -> dict[str, object]:
    def cut(n: int) -> Tensor:
        inner = torch.randint(n + 1, (sequences - 1,), generator=rng).sort().values
        return torch.cat((torch.tensor([0]), inner, torch.tensor([n]))).int()

    q, k = cut(q_tokens), cut(k_tokens)
    longest = [int((ends[1:] - ends[:-1]).max()) for ends in (q, k)]
    return {
        "cu_seqlens_q": q.to(device),
        "cu_seqlens_k": k.to(device),
        "max_seqlen_q": longest[0],
        "max_seqlen_k": longest[1],
    }


def outputs(x: Inputs, backend: str, dtype: torch.dtype, lse_gradient: bool, seed: int = 1) -> dict[str, Tensor]:
    """out, lse (0 where a row has no key) and the gradients of everything that has one, for a random loss."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {}
    for name in ("q", "k", "v", "bias", "s_aux"):
        tensor = getattr(x, name)
        if tensor is not None:
            to = wide if name == "s_aux" else dtype
            # A leaf with the strides of the case's tensor: a float64 one may be laid out as it likes.
            leaves[name] = (tensor.detach() if tensor.dtype == to else tensor.detach().to(to)).requires_grad_()
    slopes = None if x.alibi_slopes is None else x.alibi_slopes.to(wide)
    out, lse = attention(replace(x, **leaves, alibi_slopes=slopes), backend)
    rng = torch.Generator().manual_seed(seed)
    loss = (out * torch.randn(out.shape, generator=rng).to(out)).sum()
    empty = lse == -torch.inf
    if lse_gradient:
        loss = loss + (lse.masked_fill(empty, 0) * torch.randn(lse.shape, generator=rng).to(lse)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "lse": lse.masked_fill(empty, 0), "empty": empty, **{f"d{n}": g for n, g in zip(leaves, grads)}}


def errors_of_saving(x: Inputs, dtype: torch.dtype, seed: int = 1) -> dict[str, float]:
    """The largest error in each gradient that comes from keeping `out` in its dtype between forward and backward, as every
    flash attention does and plain PyTorch does not: d score is p * (dO.V - rowsum(dO * O)), so the rounding of O enters as a
    gradient of lse. It is the larger of the two where rows have one key or two and d score cancels to nearly 0."""
    if dtype == torch.float32:
        return {}
    leaves = {
        name: getattr(x, name).detach().double().requires_grad_()
        for name in ("q", "k", "bias", "s_aux")
        if getattr(x, name) is not None
    }
    slopes = None if x.alibi_slopes is None else x.alibi_slopes.double()
    out, lse = attention(replace(x, **leaves, v=x.v.double(), alibi_slopes=slopes), "reference")
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    grad_lse = (grad_out * (out - out.to(dtype).double())).sum(-1).detach()
    grad_lse = grad_lse.T if x.cu_seqlens_q is not None else grad_lse.transpose(1, 2)
    loss = (lse.masked_fill(lse == -torch.inf, 0) * grad_lse).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {f"d{name}": float(grad.abs().max()) if grad.numel() else 0.0 for name, grad in zip(leaves, grads)}


def check(case: Case, backend: str) -> None:
    """The numeric rule for out, lse, dq, dk, dv, dbias and ds_aux; rows without a key are the same ones.

    Plain PyTorch's error counts as at least that of keeping the output in its dtype (errors_of_saving).
    The tiny absolute term is that of FlashAttention 3's tests (twice the rounding of the dtype at 0.3, for inputs of unit
    variance) and 32 roundings of float32. It decides where the truth cancels to 0, as do dq and dk of a row with one key.
    """
    # A bias of queries cancels to 0, or to a sink's share: test_what_cancels_to_zero_is_rounding has its bound.
    without = {"dbias"} if "bias_of_queries" in case.features else set()
    check_problem(build(case), backend, "lse_gradient" in case.features, without)


def check_problem(x: Inputs, backend: str, with_lse: bool = False, without: Collection[str] = ()) -> None:
    """`check` of a problem that has been built, but for the outputs `without`."""
    dtype = x.q.dtype
    truth = outputs(x, "reference", torch.float64, with_lse)
    saving = errors_of_saving(x, dtype)
    plain = outputs(x, "reference", dtype, with_lse)
    ours = outputs(x, backend, dtype, with_lse)
    assert torch.equal(ours.pop("empty"), truth.pop("empty"))
    tiny = torch.finfo(dtype).eps / 4 + 32 * torch.finfo(torch.float32).eps
    for name in without:
        truth.pop(name)
    rows = x.q.numel() // (x.q.shape[-1] * x.q.shape[-2])
    for name, expected in truth.items():
        assert ours[name].dtype == plain[name].dtype, name
        allowed = tiny * rows**0.5 if name == "ds_aux" else tiny  # a sink's gradient is a sum over the rows
        if name in saving:
            allowed += 2 * max(0.0, saving[name] - float((plain[name].double() - expected).abs().max()))
        if expected.numel():
            try:
                assert_as_accurate_as(ours[name], plain[name], expected, absolute=allowed)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


def grid(seed: int, n_random: int) -> Iterator[Case]:
    """Every feature in three dtypes, every pair of features, every head_dim, and random combinations of three to six."""
    choose = random.Random(seed)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def dims(features: tuple[str, ...] = ()) -> dict[str, int]:
        heads, groups = choose.choice(((1, 1), (2, 2), (2, 1), (4, 2), (3, 1)))
        s = choose.choice((1, 5, 17, 32, 33, 50) if "packed_layout" not in features else (5, 17, 32, 33, 50))
        return {
            "s": s,
            "t": choose.choice((7, 16, 31, 32, 41)),
            "heads": heads,
            "groups": groups,
            "batch": 4 if s == 1 else choose.choice((1, 2)),  # of a handful of rows the largest error is a matter of luck
            "head_dim": choose.choice((16, 20, 40)),
            "v_head_dim": choose.choice((16, 24)),
            "seed": choose.randrange(2**31),
        }

    for feature in ((), *((name,) for name in FEATURES)):
        for dtype in dtypes:
            yield Case(feature, dtype, seed=choose.randrange(2**31))
    for pair in itertools.combinations(FEATURES, 2):
        if combines(pair):
            yield Case(pair, choose.choice(dtypes), **dims(pair))  # type: ignore[arg-type]
    for head_dim in HEAD_DIMS:
        yield Case(("causal",), choose.choice(dtypes), **{**dims(), "head_dim": head_dim, "v_head_dim": head_dim})  # type: ignore[arg-type]
        yield Case((), choose.choice(dtypes), **{**dims(), "head_dim": head_dim, "v_head_dim": choose.choice(HEAD_DIMS)})  # type: ignore[arg-type]
    made = 0
    while made < n_random:
        features = tuple(sorted(choose.sample(FEATURES, choose.randint(3, 6)), key=FEATURES.index))
        if combines(features):
            made += 1
            yield Case(features, choose.choice(dtypes), **dims(features))  # type: ignore[arg-type]


def covering(seed: int, beside: Sequence[Case] = ()) -> list[Case]:
    """Few cases in which still every two features that combine meet, each feature every dtype, and each head_dim every dtype:
    a pairwise covering array, made greedily, of what the cases `beside` leave over. For machines where what takes the time is
    to compile kernels for each case."""
    choose = random.Random(seed)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    wanted: set[frozenset[object]] = {frozenset(pair) for pair in itertools.combinations(FEATURES, 2) if combines(pair)}
    wanted |= {frozenset(pair) for pair in itertools.product(FEATURES, dtypes)}
    wanted |= {frozenset(pair) for pair in itertools.product(HEAD_DIMS, dtypes)}
    for case in beside:
        wanted -= {frozenset(pair) for pair in itertools.combinations((*case.features, case.dtype, case.head_dim), 2)}
    cases = []
    for head_dim, dtype in itertools.product(HEAD_DIMS, dtypes):
        if frozenset((head_dim, dtype)) not in wanted:
            continue
        best: tuple[str, ...] = ()
        left: set[frozenset[object]] = set()
        for _ in range(200):
            features: tuple[str, ...] = ()
            for feature in choose.sample(FEATURES, len(FEATURES)):
                if len(features) < 6 and combines((*features, feature)):
                    features = (*features, feature)
            new = {frozenset(pair) for pair in itertools.combinations((*features, dtype, head_dim), 2)} & wanted
            if len(new) > len(left):
                best, left = features, new
        wanted -= left | {frozenset((head_dim, dtype))}
        heads, groups = choose.choice(((2, 2), (2, 1), (4, 2), (3, 1)))
        s, t = choose.choice((17, 32, 33, 130)), choose.choice((16, 31, 41, 150))
        v_head_dim = choose.choice((head_dim, head_dim, 24))
        ordered = tuple(sorted(best, key=FEATURES.index))
        cases.append(Case(ordered, dtype, 2, s, t, heads, groups, head_dim, v_head_dim, choose.randrange(2**31)))
    assert not wanted, f"not covered: {wanted}"
    return cases
