"""flash_attn_with_kvcache: against the formula key by key, the kernels against float64, and what is written where.

The kernels run on the GPU where there is one, otherwise in Triton's interpreter. Every place of a cache that no query may
see holds NaN, and every entry of a block table that no key needs points beyond the cache.
"""

import functools
import json
import math
import os
import subprocess
import sys
from importlib.metadata import version

import numpy
import pytest
import torch
from wikigpt.kernels import flash_attn_with_kvcache
from wikigpt.kernels.attention import kvcache

from tests.conftest import assert_as_accurate_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CACHES = ("k_cache", "v_cache")


def problem(
    dtype=torch.float32,
    *,
    seed=0,
    B=2,
    H=4,
    G=2,
    D=16,
    Dv=None,
    T=60,
    S=1,
    N=1,
    lengths=(37, 20),
    page=0,
    batch_idx=False,
    leftpad=None,
    rotary=0,
    alibi=False,
    sink=False,
    **options,
):
    """Arguments of flash_attn_with_kvcache. N new keys (0: none), pages of `page` keys (0: dense), `rotary` dimensions."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=gen).to(dtype)

    def ints(numbers):
        return torch.tensor(numbers, dtype=torch.int32).reshape(-1)

    Dv = Dv or D
    x = {"q": randn(B, S, H, D), "cache_seqlens": ints(lengths[:B]), **options}
    if N:
        x |= {"k": randn(B, N, G, D), "v": randn(B, N, G, Dv)}
    if leftpad is not None:
        x["cache_leftpad"] = ints(leftpad[:B])
    if rotary:
        angle = torch.rand(T + page + S, rotary // 2, generator=gen) * 2 * math.pi
        x |= {"rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype)}
    if alibi:
        x["alibi_slopes"] = torch.rand(B, H, generator=gen) * 0.3
    if sink:
        x["s_aux"] = torch.randn(H, generator=gen)
    rows = B
    if page:
        n_pages = -(-T // page)
        rows = B * n_pages + 2
        table = torch.randperm(rows, generator=gen)[: B * n_pages].reshape(B, n_pages)
        used = (x["cache_seqlens"].long() + N + page - 1) // page
        x["block_table"] = table.where(torch.arange(n_pages) < used[:, None], 10**6).int()
    elif batch_idx:
        rows = B + 2
        x["cache_batch_idx"] = torch.randperm(rows, generator=gen)[:B].int()
    x["k_cache"], x["v_cache"] = (torch.full((rows, page or T, G, d), math.nan, dtype=dtype) for d in (D, Dv))
    for b in range(B):
        for j in range(leftpad[b] if leftpad is not None else 0, lengths[b]):
            x["k_cache"][place(x, b, j)], x["v_cache"][place(x, b, j)] = randn(G, D), randn(G, Dv)
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in x.items()}


def place(x, b, j):
    """Where the key at position j of sequence b lies in the cache."""
    if "block_table" in x:
        page = x["k_cache"].shape[1]
        return int(x["block_table"][b, j // page]), j % page
    return int(x["cache_batch_idx"][b]) if "cache_batch_idx" in x else b, j


def run(x, backend, dtype=None):
    """out, lse, k_cache, v_cache after the call; on copies of the caches, with the floating-point tensors as `dtype`."""

    def copy(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(dtype, copy=True) if dtype and value.is_floating_point() else value.clone()

    x = {name: copy(value) for name, value in x.items()}
    out, lse = flash_attn_with_kvcache(**x, return_softmax_lse=True, backend=backend)
    return out, lse, x["k_cache"], x["v_cache"]


def assert_accurate(x, backend="triton"):
    ours, plain, truth = run(x, backend), run(x, "reference"), run(x, "reference", torch.float64)
    assert ours[0].dtype == x["q"].dtype
    assert ours[1].dtype == torch.float32
    assert_as_accurate_as(ours[0], plain[0], truth[0])
    # A row without keys has lse -inf in all of them.
    assert torch.equal(ours[1] == -math.inf, truth[1] == -math.inf)
    assert_as_accurate_as(*(result[1].clamp(min=-1e30) for result in (ours, plain, truth)))
    return ours


def turned(x, row, position):
    """A row (heads, D) with its pairs, as complex numbers, multiplied by exp(i angle)."""
    if "rotary_cos" not in x:
        return row
    cos, sin = x["rotary_cos"][position], x["rotary_sin"][position]
    n = len(cos)
    first, second = (
        (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if x.get("rotary_interleaved", True) else (slice(n), slice(n, 2 * n))
    )
    z = torch.complex(row[:, first], row[:, second]) * torch.complex(cos, sin)
    row = row.clone()
    row[:, first], row[:, second] = z.real, z.imag
    return row


def by_hand(x):
    """(out, lse) in float64, one query of one head and one key at a time."""
    x = {n: t.double().cpu() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in x.items()}
    q, caches = x["q"], {name: x[name].clone() for name in CACHES}
    B, S, H, D = q.shape
    G, N = x["k_cache"].shape[2], x["k"].shape[1] if "k" in x else 0
    left, right = x.get("window_size", (-1, -1))
    right = 0 if x.get("causal") else right
    out, lse = torch.zeros(B, S, H, x["v_cache"].shape[3], dtype=torch.float64), torch.empty(B, H, S, dtype=torch.float64)
    for b in range(B):
        start = int(x["cache_seqlens"][b])
        for i in range(N):
            caches["k_cache"][place(x, b, start + i)] = turned(x, x["k"][b, i], start + i)
            caches["v_cache"][place(x, b, start + i)] = x["v"][b, i]
        keys = range(int(x["cache_leftpad"][b]) if "cache_leftpad" in x else 0, start + N)
        for i in range(S):
            at = start + N - S + i
            query = turned(x, q[b, i], start + (i if left >= 0 or right >= 0 else 0))
            for h in range(H):
                scores, values = [], []
                for j in keys:
                    if (left >= 0 and j < at - left) or (right >= 0 and j > at + right):
                        continue
                    g = h * G // H
                    s = float(query[h] @ caches["k_cache"][place(x, b, j)][g]) * x.get("softmax_scale", D**-0.5)
                    if x.get("softcap"):
                        s = x["softcap"] * math.tanh(s / x["softcap"])
                    if "alibi_slopes" in x:
                        s -= float(x["alibi_slopes"][b, h]) * abs(at - j)
                    scores.append(s)
                    values.append(caches["v_cache"][place(x, b, j)][g])
                sink = [float(x["s_aux"][h])] if "s_aux" in x else []
                weights = torch.tensor([math.exp(s) for s in scores], dtype=torch.float64)
                total = float(weights.sum()) + sum(map(math.exp, sink))
                lse[b, h, i] = math.log(total) if total else -math.inf
                if scores:
                    out[b, i, h] = (weights[:, None] * torch.stack(values)).sum(0) / total
    return out, lse


FEATURES = {
    "one query": {},
    "several queries": {"S": 5, "N": 5},
    "nothing new": {"N": 0, "S": 3},
    "causal": {"S": 5, "N": 5, "causal": True},
    "causal, more queries than keys": {"S": 5, "N": 2, "causal": True, "lengths": (1, 0)},
    "window": {"S": 5, "N": 5, "window_size": (9, 2)},
    "left window": {"S": 5, "N": 1, "window_size": (9, -1)},
    "right window": {"S": 5, "N": 1, "window_size": (-1, 2)},
    "one query with a window": {"window_size": (18, 0)},
    "rotary interleaved": {"rotary": 16, "causal": True, "S": 3, "N": 3},
    "rotary in halves": {"rotary": 16, "rotary_interleaved": False, "causal": True, "S": 3, "N": 3},
    "rotary in part, without a window": {"rotary": 6, "S": 3, "N": 2},
    "rotary in halves in part, in a window": {"rotary": 10, "rotary_interleaved": False, "S": 3, "N": 2, "window_size": (9, 9)},
    "left padding": {"leftpad": (30, 3)},
    "left padding to the end": {"leftpad": (37, 20), "N": 0},
    "batch index": {"batch_idx": True},
    "pages of 16": {"page": 16},
    "pages of 7": {"page": 7, "S": 5, "N": 5, "causal": True},
    "pages of 1": {"page": 1},
    "pages and left padding": {"page": 16, "leftpad": (30, 3)},
    "alibi": {"alibi": True, "S": 3, "N": 2},
    "softcap": {"softcap": 2.0, "S": 3},
    "softcap and alibi": {"softcap": 2.0, "alibi": True, "S": 3},
    "sink": {"sink": True},
    "sink without keys": {"sink": True, "N": 0, "lengths": (0, 9)},
    "scale": {"softmax_scale": 0.7},
    "no keys": {"N": 0, "lengths": (0, 9)},
    "the first key": {"lengths": (0, 0)},
    "full cache": {"lengths": (59, 59)},
    "one head for all": {"G": 1, "S": 5},
    "no groups": {"G": 4},
    "head_dim 80": {"D": 80, "lengths": (19, 5)},
    "values of another head_dim": {"D": 24, "Dv": 40},
    "values of a smaller head_dim": {"D": 40, "Dv": 9, "rotary": 32},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_equals_the_formula_key_by_key(feature):
    x = problem(torch.float64, **FEATURES[feature])
    out, lse, *_ = run(x, "reference")
    expected_out, expected_lse = by_hand(x)
    torch.testing.assert_close(out.cpu(), expected_out)
    torch.testing.assert_close(lse.cpu(), expected_lse)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_kernels_are_as_accurate_as_plain_pytorch(feature):
    assert_accurate(problem(torch.float32, seed=1, **FEATURES[feature]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("feature", ["causal", "rotary in halves", "pages of 7", "softcap and alibi", "sink", "head_dim 80"])
def test_the_kernels_are_as_accurate_as_plain_pytorch_in_16_bits(feature, dtype):
    assert_accurate(problem(dtype, seed=2, **FEATURES[feature]))


@pytest.mark.parametrize("feature", FEATURES)
def test_the_cpu_is_as_accurate_as_plain_pytorch(feature):
    x = {n: t.cpu() if isinstance(t, torch.Tensor) else t for n, t in problem(seed=3, **FEATURES[feature]).items()}
    assert_accurate(x, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "feature",
    [
        {},
        {"lengths": (37, 37), "causal": True},
        {"G": 4, "N": 0, "S": 3},
        {"G": 4, "S": 5, "N": 5},
        {"leftpad": (30, 3)},
        {"batch_idx": True},
        {"rotary": 16},
        {"G": 4, "softmax_scale": 0.7},
        {"G": 1, "D": 80, "lengths": (0, 0)},
    ],
    ids=str,
)  # fmt: skip
def test_a_cpu_computes_usual_problems_by_pytorchs_fused_attention(feature, dtype, monkeypatch):
    """On the keys where they lie: masks, copies and blocks take 50 times its time where keys are few."""
    x = {n: t.cpu() if isinstance(t, torch.Tensor) else t for n, t in problem(dtype, seed=3, **feature).items()}
    plain, truth = run(x, "reference"), run(x, "reference", torch.float64)

    def never(*_):
        raise AssertionError("not by the fused attention")

    monkeypatch.setattr(kvcache, "_plain", never)
    for ours, simple, true in zip(run(x, "cpu"), plain, truth):
        known = ~true.isnan()
        assert torch.equal(ours.isnan(), true.isnan())
        assert_as_accurate_as(ours[known], simple[known], true[known])


def any_problem(seed):
    gen = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=gen))]

    groups, n_new, paged = pick(1, 2, 3), pick(0, 1, 4), pick(0, 1)
    longest = 64 - n_new
    lengths = tuple(torch.randint(0, longest + 1, (3,), generator=gen).tolist())
    return problem(
        pick(torch.float16, torch.bfloat16, torch.float32),
        seed=seed,
        B=pick(1, 3),
        H=groups * pick(1, 2, 5),
        G=groups,
        D=pick(16, 24, 33),
        Dv=pick(None, 16, 48),
        T=64,
        S=pick(1, 1, 2, 7),
        N=n_new,
        lengths=lengths,
        page=pick(5, 16, 32) if paged else 0,
        batch_idx=pick(True, False),
        leftpad=tuple(n // 3 for n in lengths) if pick(0, 1) else None,
        rotary=pick(0, 8, 16) if n_new else 0,
        rotary_interleaved=pick(True, False),
        alibi=pick(True, False),
        sink=pick(True, False),
        causal=pick(True, False),
        window_size=pick((-1, -1), (-1, -1), (6, 0), (20, 3), (-1, 2)),
        softcap=pick(0.0, 0.0, 1.5),
        num_splits=pick(0, 1, 2, 3),
    )


@pytest.mark.parametrize("seed", [*range(16), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(16, 40))])
def test_any_combination_is_as_accurate_as_plain_pytorch(seed):
    assert_accurate(any_problem(seed))


# --- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "feature", [{}, {"S": 5, "N": 5, "causal": True, "sink": True}, {"window_size": (20, 0), "page": 16}, {"lengths": (0, 3)}]
)
def test_splits_change_the_result_by_rounding_alone(feature):
    x = problem(**feature)
    one = run(x | {"num_splits": 1}, "triton")
    for splits in (0, 2, 5):
        other = run(x | {"num_splits": splits}, "triton")
        torch.testing.assert_close(other[0], one[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other[1], one[1], rtol=1e-5, atol=1e-6)


def test_a_split_result_is_the_same_bits_every_time():
    x = problem(torch.bfloat16, S=5, num_splits=3)
    first, second = run(x, "triton"), run(x, "triton")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.full) for arch in (80, 86))])
def test_as_many_blocks_are_counted_on_a_multiprocessor_as_the_compiler_leaves_room_for(arch):
    from wikigpt.kernels.attention.decode import config, resident

    script = (
        "import json; from wikigpt.kernels import compile_report as r; "
        f"print(json.dumps([(k.case, k.blocks) for n in ('64', '128', '256') for case in r.cases('attention_decode', "
        f"f'bfloat16 {{n}}') for k in r.report('attention_decode', {arch}, case) if k.name == '_decode']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = json.loads(subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True).stdout)
    assert len(found) == 6
    for case, blocks in found:
        _, width, kind = case.split()
        row = config(arch, int(width), torch.bfloat16, 4, kind == "paged")
        # Triton 3.6 takes 195 registers for this one, which leaves room for two; 3.7 takes 168.
        fewer = (arch, case) == (90, "bfloat16 256 paged") and version("triton").startswith("3.6.")
        assert resident(arch, row["BLOCK_M"], row["BLOCK_N"], 2 * int(width), torch.bfloat16) == blocks + fewer, case


def test_few_programs_share_the_keys_and_many_do_not():
    from wikigpt.kernels.attention.decode import splits_for

    assert splits_for(programs=264, blocks=1000, slots=264) == 1
    assert splits_for(programs=8, blocks=1000, slots=264) == 264 // 8
    # A wave and a bit would leave the chip idle for most of the second wave.
    assert splits_for(programs=150, blocks=1000, slots=264) > 1
    assert splits_for(programs=1, blocks=1, slots=264) == splits_for(programs=1, blocks=0, slots=264) == 1
    assert splits_for(programs=1, blocks=100_000, slots=264) == 128


# --- what is written ------------------------------------------------------------------------------------------------


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


LAYOUTS = {
    "dense": {},
    "batch index": {"batch_idx": True},
    "pages of 16": {"page": 16},
    "pages of 7": {"page": 7},
    "from the start": {"lengths": (0, 0)},
    "to the end": {"lengths": (55, 55), "N": 5},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_new_keys_and_values_are_written_bit_for_bit_and_nothing_else_is(layout, backend):
    x = problem(torch.bfloat16, **{"N": 5, "Dv": 24, **LAYOUTS[layout]})
    expected = {name: x[name].clone() for name in CACHES}
    for b in range(2):
        for i in range(5):
            where = place(x, b, int(x["cache_seqlens"][b]) + i)
            expected["k_cache"][where], expected["v_cache"][where] = x["k"][b, i], x["v"][b, i]
    _, _, k_cache, v_cache = run(x, backend)
    assert torch.equal(bits(k_cache), bits(expected["k_cache"]))
    assert torch.equal(bits(v_cache), bits(expected["v_cache"]))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_are_turned_by_the_angle_of_their_position(layout, interleaved):
    x = problem(torch.bfloat16, **{"N": 5, "rotary": 12, "rotary_interleaved": interleaved, **LAYOUTS[layout]})
    _, _, k_cache, v_cache = run(x, "triton")
    _, _, plain_k, plain_v = run(x, "reference")
    wide = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in x.items()}
    for b in range(2):
        for i in range(5):
            position = int(x["cache_seqlens"][b]) + i
            where = place(x, b, position)
            truth = turned(wide, wide["k"][b, i], position)
            assert_as_accurate_as(k_cache[where], truth.bfloat16(), truth)
            assert torch.equal(k_cache[where][:, 12:], x["k"][b, i][:, 12:])
            k_cache[where] = plain_k[where]
    assert torch.equal(bits(k_cache), bits(plain_k))
    assert torch.equal(bits(v_cache), bits(plain_v))


def test_many_new_keys_are_all_written():
    x = problem(T=60, N=37, S=37, lengths=(23, 4), causal=True, page=16, rotary=16)
    ours = assert_accurate(x)
    plain = run(x, "reference")
    torch.testing.assert_close(ours[2], plain[2], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.equal(bits(ours[3]), bits(plain[3]))


def test_caches_and_queries_may_have_any_strides():
    x = problem(torch.float32, S=3, N=3, causal=True)
    expected = run(x, "triton")
    views = dict(x)
    for name in CACHES:  # the layout (batch, heads, positions, head_dim), with room between the rows
        wide = torch.zeros(2, 2, 60, 40, device=DEVICE)
        views[name] = wide[..., 3:19].transpose(1, 2)
        views[name].copy_(x[name])
    for name in "qkv":  # the last dimension strided
        views[name] = x[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    out, lse = flash_attn_with_kvcache(**views, return_softmax_lse=True, backend="triton")
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert torch.equal(bits(views["k_cache"].contiguous()), bits(expected[2]))


@pytest.mark.parametrize("dimension", [0, 1])
def test_a_cache_may_be_larger_than_two_to_the_31_numbers(dimension, tmp_path):
    stride = 2**30
    if DEVICE == "cuda":
        storage = torch.empty(3 * stride + 64, dtype=torch.float16, device=DEVICE)
    else:  # a file with holes takes no memory
        storage = torch.from_file(str(tmp_path / "cache"), shared=True, size=3 * stride + 64, dtype=torch.float16)
    strides = (stride, 16, 16, 1) if dimension == 0 else (64, stride, 16, 1)
    x = problem(torch.float16, B=4 if dimension == 0 else 1, H=2, G=1, T=4, lengths=(1,) * 4 if dimension == 0 else (3,))
    expected = run(x, "triton")
    for name in CACHES:
        x[name] = storage.as_strided(x[name].shape, strides).copy_(x[name])
    x["v_cache"] = x["k_cache"]  # the file is large enough for one
    x["v"] = x["k"]
    out = flash_attn_with_kvcache(**x, backend="triton")
    dense = {**x, "k_cache": x["k_cache"].contiguous(), "v_cache": x["k_cache"].contiguous()}
    assert torch.equal(out, flash_attn_with_kvcache(**dense, backend="triton"))
    assert torch.equal(bits(x["k_cache"].contiguous()), bits(dense["k_cache"]))
    assert out.shape == expected[0].shape


IDLE = {
    "one new key": {},
    "several new keys": {"N": 5, "S": 5, "causal": True},
    "in splits": {"num_splits": 3},
    "nothing new": {"N": 0},
    "turned": {"N": 3, "S": 3, "causal": True, "rotary": 12},
    "in pages": {"page": 16, "N": 3},
    "by index": {"batch_idx": True},
}


@pytest.mark.parametrize("length", [-1, -40])
@pytest.mark.parametrize("kind", IDLE)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_sequence_of_negative_length_is_idle(backend, kind, length):
    """Nothing of it is written, in the cache or before it, and its rows see no key."""
    x = problem(**IDLE[kind])
    before, busy = {name: x[name].clone() for name in CACHES}, run(x, backend)
    x["cache_seqlens"][0] = length
    # The cache begins a few rows into memory: what lies before it would be hit by a negative position.
    for name in CACHES:
        memory = torch.full((64 + len(x[name]), *x[name].shape[1:]), 7.0, device=DEVICE)
        x[name] = memory[64:].copy_(x[name])
        x[name].before = memory[:64]
    out, lse = flash_attn_with_kvcache(**x, return_softmax_lse=True, backend=backend)
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    torch.testing.assert_close(out[1], busy[0][1])
    torch.testing.assert_close(lse[1], busy[1][1])
    for name, after in zip(CACHES, busy[2:]):
        assert (x[name].before == 7).all()
        written = bits(after) != bits(before[name])
        mine = [place(x, 1, 20 + i) for i in range(IDLE[kind].get("N", 1))]
        expected = before[name].clone()
        for where in mine:
            assert IDLE[kind].get("N", 1) == 0 or written[where].any()
            expected[where] = after[where]
        assert torch.equal(bits(x[name]), bits(expected))


def test_a_sink_takes_all_of_an_idle_sequence():
    x = problem(sink=True)
    x["cache_seqlens"][0] = -1
    out, lse, *_ = run(x, "triton")
    assert (out[0] == 0).all()
    torch.testing.assert_close(lse[0, :, 0], x["s_aux"])


@pytest.mark.parametrize("name", ["cache_seqlens", "cache_leftpad", "cache_batch_idx", "alibi_slopes", "s_aux", "rotary"])
def test_small_tensors_may_be_strided(name):
    x = problem(leftpad=(3, 2), alibi=True, sink=True, rotary=8, batch_idx=True)
    expected = run(x, "triton")
    for given in ("rotary_cos", "rotary_sin") if name == "rotary" else (name,):
        gaps = torch.stack((x[given], torch.zeros_like(x[given])), dim=-1)
        x[given] = gaps[..., 0]
    assert all(torch.equal(bits(got), bits(wanted)) for got, wanted in zip(run_as_given(x, "triton"), expected))


def run_as_given(x, backend):
    """`run` with the strides of everything but the caches, of which it takes copies."""
    x = x | {name: x[name].clone() for name in CACHES}
    return *flash_attn_with_kvcache(**x, return_softmax_lse=True, backend=backend), x["k_cache"], x["v_cache"]


def test_a_window_may_be_wider_than_any_cache():
    x = problem(S=3, N=3)
    expected = run(x, "triton")
    for window in ((2**31 - 1, 2**31 - 1), (2**40, 2**40)):
        assert torch.equal(run(x | {"window_size": window}, "triton")[0], expected[0])


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_an_empty_batch_gives_an_empty_result(backend):
    x = problem()
    x = {n: t[:0] if n in ("q", "k", "v", "cache_seqlens") else t for n, t in x.items()}
    out, lse, *_ = run(x, backend)
    assert out.shape == (0, 1, 4, 16)
    assert lse.shape == (0, 4, 1)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_without_queries_the_keys_are_appended_all_the_same(backend):
    x = problem(S=0, N=2)
    out, _, k_cache, _ = run(x, backend)
    assert out.shape == (2, 0, 4, 16)
    assert torch.equal(k_cache[1, 20:22], x["k"][1])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_cache_seqlens_may_be_an_int_or_nothing(backend):
    x = problem(lengths=(60, 60), N=0)
    expected = run(x, backend)[0]
    assert torch.equal(run(x | {"cache_seqlens": 60}, backend)[0], expected)
    del x["cache_seqlens"]
    assert torch.equal(run(x, backend)[0], expected)


def test_lse_is_returned_only_if_asked_for():
    assert isinstance(flash_attn_with_kvcache(**problem(), backend="triton"), torch.Tensor)


def test_rotary_tables_may_be_float32_beside_16_bit_inputs():
    x = problem(torch.bfloat16, rotary=16, S=3, N=3, causal=True)
    assert_accurate(x | {name: x[name].float() for name in ("rotary_cos", "rotary_sin")})


def test_float64_is_computed_in_float64():
    x = problem(torch.float64)
    assert torch.equal(run(x, "triton")[0], run(x, "reference")[0])


@pytest.mark.parametrize("option", [{}, {"page": 16}, {"rotary": 16, "causal": True}])
def test_it_decodes_token_by_token_as_it_does_at_once(option):
    x = problem(T=48, S=8, N=8, lengths=(20, 11), **{"causal": True, **option})
    together = run(x, "triton")
    steps = []
    for i in range(8):
        one = {n: t[:, i : i + 1] if n in ("q", "k", "v") else t for n, t in x.items()}
        steps.append(flash_attn_with_kvcache(**one | {"cache_seqlens": x["cache_seqlens"] + i}, backend="triton"))
    torch.testing.assert_close(torch.cat(steps, dim=1), together[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(bits(x["k_cache"]), bits(together[2]))


# --- PyTorch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_it_compiles_into_one_graph_and_still_writes_in_place(backend):
    x = problem(N=2, S=2, causal=True, rotary=8)
    expected = run(x, backend)

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def step(q, k, v, k_cache, v_cache, cos, sin, seqlens):
        out = flash_attn_with_kvcache(
            q * 1.0, k_cache, v_cache, k, v, cos, sin, cache_seqlens=seqlens, causal=True, backend=backend
        )
        return out + 0.0

    names = ("q", "k", "v", *CACHES, "rotary_cos", "rotary_sin", "cache_seqlens")
    assert torch.equal(step(*(x[name] for name in names)), expected[0])
    assert torch.equal(bits(x["k_cache"]), bits(expected[2]))
    assert torch.equal(bits(x["v_cache"]), bits(expected[3]))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("n_new", [0, 2])
def test_the_registered_op_keeps_pytorchs_rules(implementation, n_new):
    x = problem(N=n_new, S=2, page=16)
    for name in CACHES:
        x[name].nan_to_num_()  # opcheck compares with ==
    args = (x["q"], x["k_cache"], x["v_cache"], x.get("k"), x.get("v"), None, None, x["cache_seqlens"], None, None)
    options = (None, None, None, 0.25, -1, 0, 0.0, True, 2, None, implementation)
    torch.library.opcheck(torch.ops.wikigpt.flash_attn_with_kvcache.default, (*args, x["block_table"], *options))


def test_it_runs_in_inference_mode():
    x = problem()
    expected = run(x, "triton")
    with torch.inference_mode():
        out = flash_attn_with_kvcache(**x, backend="triton")
    assert torch.equal(out, expected[0])
    assert torch.equal(bits(x["k_cache"]), bits(expected[2]))


# --- bad input ------------------------------------------------------------------------------------------------------


def r(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def test_a_length_may_be_an_integer_of_numpy():
    q, caches = r(2, 1, 4, 16), (r(2, 60, 2, 16), r(2, 60, 2, 16))
    expected = flash_attn_with_kvcache(q, *caches, cache_seqlens=5)
    assert torch.equal(flash_attn_with_kvcache(q, *caches, cache_seqlens=numpy.int64(5)), expected)


NEW = {"k": r(2, 1, 2, 16), "v": r(2, 1, 2, 16), "cache_seqlens": i32(1, 1)}
BAD = [
    ({"q": r(2, 4, 16)}, "q: got 3 dimensions, need 4"),
    ({"q": r(2, 1, 4, 16, dtype=torch.int32)}, "q: got dtype torch.int32"),
    ({"q": r(2, 1, 3, 16)}, "k_cache: got 2 heads for 3 query heads"),
    ({"q": r(2, 1, 4, 24)}, "k_cache: got head_dim 16, q has 24"),
    ({"q": r(3, 1, 4, 16), "k": r(3, 1, 2, 16), "v": r(3, 1, 2, 16), "cache_seqlens": i32(1, 1, 1)}, "k_cache: got 2 seq"),
    ({"k_cache": r(2, 60, 2, 16, dtype=torch.float16)}, "k_cache: got dtype torch.float16, q has torch.float32"),
    ({"k_cache": r(1, 60, 2, 16).expand(2, -1, -1, -1), **NEW}, "k_cache: is expanded"),
    ({"v_cache": r(2, 60, 1, 16).expand(-1, -1, 2, -1), **NEW}, "v_cache: is expanded"),
    ({"k_cache": r(2, 60, 16, 2).transpose(2, 3)}, "k_cache: got stride 2 in the last dimension, need 1"),
    ({"v_cache": r(2, 50, 2, 16)}, r"v_cache: got shape \(2, 50, 2, 16\), k_cache has"),
    ({"v_cache": r(2, 60, 2, 1100)}, "v_cache: got head_dim 1100, allowed are 1 to 1024"),
    ({"k": None}, "k: got None with v"),
    ({"v": None}, "v: got None with k"),
    ({"k": r(2, 1, 4, 16)}, r"k: got shape \(2, 1, 4, 16\), need \(2, 1, 2, 16\)"),
    ({"v": r(2, 2, 2, 16)}, r"v: got shape \(2, 2, 2, 16\), need \(2, 1, 2, 16\)"),
    ({"k": r(2, 61, 2, 16), "v": r(2, 61, 2, 16)}, "k: got 61 positions, the cache has room for 60"),
    ({"k": r(2, 1, 2, 16, dtype=torch.float16)}, "k: got dtype torch.float16, q has"),
    ({"cache_seqlens": None}, "cache_seqlens: got None with k"),
    ({"cache_seqlens": 1.5}, "cache_seqlens: got float, allowed are int and an int32 tensor"),
    ({"cache_seqlens": 60}, "cache_seqlens: got 60, the cache has room for 0 to 59"),
    ({"cache_seqlens": -1}, "cache_seqlens: got -1, the cache has room for 0 to 59"),
    ({"cache_seqlens": i32(3, 4).long()}, "cache_seqlens: got dtype torch.int64, allowed is int32"),
    ({"cache_seqlens": i32(3)}, r"cache_seqlens: got shape \(1,\), need \(2,\)"),
    ({"cache_batch_idx": i32(0, 1).long()}, "cache_batch_idx: got dtype torch.int64"),
    ({"cache_leftpad": i32(0)}, r"cache_leftpad: got shape \(1,\)"),
    ({"block_table": i32(0, 1)}, r"block_table: got shape \(2,\), need \(2, pages per sequence\)"),
    ({"block_table": i32(0, 1)[:, None], "cache_batch_idx": i32(0, 1)}, "cache_batch_idx: does not combine with block_table"),
    ({"rotary_cos": r(60, 8)}, "rotary_sin: got None with rotary_cos"),
    ({"rotary_cos": r(59, 8), "rotary_sin": r(59, 8)}, r"rotary_cos: got shape \(59, 8\), need \(at least 60, at most 8\)"),
    ({"rotary_cos": r(60, 9), "rotary_sin": r(60, 9)}, r"rotary_cos: got shape \(60, 9\)"),
    ({"rotary_cos": r(60, 8), "rotary_sin": r(61, 8)}, r"rotary_sin: got \(61, 8\), rotary_cos has \(60, 8\)"),
    ({"rotary_cos": r(60, 8), "rotary_sin": r(60, 8), "k": None, "v": None}, "rotary_cos: needs k and v"),
    ({"rotary_cos": r(60, 8, dtype=torch.float16), "rotary_sin": r(60, 8)}, "rotary_cos: got dtype torch.float16"),
    ({"softmax_scale": math.inf}, "softmax_scale: got inf"),
    ({"softcap": -1.0}, "softcap: got -1.0"),
    ({"window_size": (-2, 0)}, r"window_size: got \(-2, 0\)"),
    ({"num_splits": 129}, "num_splits: got 129, allowed are 1 to 128"),
    ({"num_splits": -1}, "num_splits: got -1"),
    ({"alibi_slopes": r(3)}, r"alibi_slopes: got shape \(3,\), need \(4,\) or \(2, 4\)"),
    ({"s_aux": r(2, 4)}, r"s_aux: got shape \(2, 4\), need \(4,\)"),
    ({"q": r(2, 1, 4, 16).requires_grad_()}, "q: requires_grad is set, but there is no gradient here"),
    ({"q": r(2, 1, 4, 16).to("meta")}, "k_cache: got device"),
]
BAD_VALUES = [
    ({"cache_seqlens": i32(3, 60)}, r"cache_seqlens: got \[3, 60\], the cache has room for 0 to 59"),
    ({"cache_batch_idx": i32(0, 2)}, r"cache_batch_idx: got \[0, 2\], k_cache has 2 sequences"),
    ({"cache_leftpad": i32(0, -2)}, r"cache_leftpad: got \[0, -2\], must be 0 or more"),
    ({"block_table": i32(0, 2)[:, None]}, r"block_table: got \[2\], k_cache has 2 pages"),
    (
        {"rotary_cos": r(60, 8), "rotary_sin": r(60, 8), "q": r(2, 9, 4, 16), "causal": True, "cache_seqlens": 55},
        "rotary_cos: got 60 positions, the last query is at 63",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD + (BAD_VALUES if DEVICE == "cpu" else []))
def test_bad_arguments_are_named_before_anything_is_written(change, message):
    x = problem() | change
    before = [x[name].clone() for name in CACHES]
    with pytest.raises((ValueError, TypeError), match=message):
        flash_attn_with_kvcache(**x, backend=None if x["q"].device.type == "meta" else "triton")
    for name, cache in zip(CACHES, before):
        assert torch.equal(bits(x[name].contiguous()), bits(cache.contiguous()))
