"""Sampling: the distribution by chi-square against softmax + multinomial, the tokens themselves against a sort in float64, and
the CUDA kernel emulated on the CPU."""

import ctypes
import itertools
import math
import shutil
import subprocess
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from wikigpt.kernels import debug_checks, sample, top_k_top_p_sampling_from_logits
from wikigpt.kernels._dispatch import extension_lacks
from wikigpt.kernels.sampling import Parameters, _sample_rows, uniform

from tests.conftest import ROOT

built, gpu_built = (
    pytest.mark.skipif(extension_lacks(device, "sample_rows") is not None, reason=str(extension_lacks(device, "sample_rows")))
    for device in ("cpu", "cuda")
)
BACKENDS = [pytest.param("cpu", marks=built), "torch", "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def normal(*shape, scale=1.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept_probabilities(logits: Tensor, temperature=1.0, top_k=None, top_p=None, min_p=None, joint=False) -> Tensor:
    """What one row (V) leaves of the softmax, token by token, in float64."""
    p = torch.softmax(logits.double() / temperature, 0)
    order = sorted(range(len(p)), key=lambda i: (-float(logits[i]), i))
    kept = order[:top_k]
    if top_p is not None:
        whole = float(p.sum() if joint else p[kept].sum())
        mass, count = 0.0, 0
        while count < len(kept) and mass < top_p * whole:
            mass, count = mass + float(p[kept[count]]), count + 1
        kept = kept[:count]
    if min_p is not None:
        kept = [i for i in kept if p[i] >= min_p * p[order[0]]]
    left = torch.zeros_like(p)
    left[kept] = p[kept]
    return left / left.sum()


def probability_of_chi_square(difference: Tensor, variance: Tensor, free: int) -> float:
    """How often a chi-square of this many degrees of freedom is larger."""
    chi_square = (difference.square() / variance).sum()
    return float(torch.special.gammaincc(torch.tensor(free / 2, dtype=torch.float64), chi_square / 2))


def assert_drawn_from(ids: Tensor, p: Tensor, seed=0) -> None:
    """Chi-square of the counts against p, and against those of torch.multinomial."""
    draws, counts = len(ids), torch.bincount(ids, minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    counts, p = counts[p > 0], p[p > 0]
    assert (p * draws > 5).all(), "the test has cells that are too rare"
    if len(p) == 1:
        return
    assert probability_of_chi_square(counts - p * draws, p * draws, len(p) - 1) > 1e-4
    theirs = torch.multinomial(p, draws, replacement=True, generator=torch.Generator().manual_seed(seed))
    theirs = torch.bincount(theirs, minlength=len(p)).double()
    assert probability_of_chi_square(counts - theirs, counts + theirs, len(p) - 1) > 1e-4


# ---- the distribution ----

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 2.5},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.15},
    {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
]


def test_meta_logits_have_no_value_to_check():
    assert sample(torch.empty(3, 7, device="meta"), check_nan=True).shape == (3,)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@every_backend
def test_draws_follow_the_distribution(filters, backend):
    draws = 1_000_000 if backend == "cpu" else 50_000
    logits = normal(50)
    ids = sample(logits.expand(draws, -1), **filters, generator=torch.Generator().manual_seed(1), backend=backend)
    assert_drawn_from(ids, kept_probabilities(logits, **filters))


@every_backend
def test_each_row_follows_its_own_parameters(backend):
    rows = [{"temperature": 0.7, "top_k": 50, "top_p": 1.0, "min_p": 0.0},
            {"temperature": 1.0, "top_k": 5, "top_p": 1.0, "min_p": 0.1},
            {"temperature": 3.0, "top_k": 40, "top_p": 0.5, "min_p": 0.0},
            {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.03}]  # fmt: skip
    draws = 250_000 if backend == "cpu" else 20_000
    logits = normal(len(rows), 50)
    parameters = {name: torch.tensor([row[name] for row in rows]).expand(draws, -1) for name in rows[0]}
    ids = sample(logits.expand(draws, -1, -1), **parameters, generator=torch.Generator().manual_seed(1), backend=backend)
    for i, row in enumerate(rows):
        assert_drawn_from(ids[:, i], kept_probabilities(logits[i], **row))


@built
def test_draws_from_a_large_vocabulary_follow_the_distribution():
    # Cells of about 1,000 tokens.
    logits, draws = normal(50_257, scale=2.0), 4_000
    ids = sample(logits.expand(draws, -1), 0.9, top_p=0.95, generator=torch.Generator().manual_seed(1))
    p = torch.zeros(50).double().index_add(0, torch.arange(50_257) % 50, kept_probabilities(logits, 0.9, top_p=0.95))
    assert_drawn_from(ids % 50, p)


# ---- what is kept, exactly ----


@every_backend
def test_the_support_is_exactly_what_the_filters_keep(backend):
    rng = torch.Generator().manual_seed(0)
    for case in range(30):
        v = int(torch.randint(1, 40, (), generator=rng))
        # Few different logits, so that many cuts fall among equals; each token that stays has 0.2% or more.
        logits = torch.randint(0, 2 + case % 4, (v,), generator=rng) / 2
        top_k = int(torch.randint(1, v + 1, (), generator=rng)) if case % 2 else None
        top_p = float(torch.rand((), generator=rng)) * 0.98 + 0.01 if case % 3 else None
        min_p = float(torch.rand((), generator=rng)) * 0.6 if case % 5 == 0 else None
        p = kept_probabilities(logits, 1.5, top_k, top_p, min_p)
        ids = sample(logits.expand(5_000, -1), 1.5, top_k, top_p, min_p, seed=case, backend=backend)
        if backend == "torch":  # which of equal logits it keeps is open
            assert logits[ids.unique()].sort().values.equal(logits[p > 0].sort().values)
        else:
            assert ids.unique().tolist() == p.nonzero()[:, 0].tolist()


def problems():
    """(logits, parameters) with seeds: sizes from 1 on, ties, all dtypes, strides and addresses."""
    rng = torch.Generator().manual_seed(0)

    def maybe(value, otherwise, odds):
        return value.where(torch.rand(len(value), generator=rng) < odds, otherwise)

    for case in range(60):
        rows, v = 3, int(torch.randint(1, (40, 3000, 20_000)[case % 3], (), generator=rng))
        logits = torch.randn(rows, v + 3, generator=rng) * (6 * torch.rand((), generator=rng) + 0.1)
        if case % 4 == 0:
            logits = logits.round()
        if case % 5 == 0:
            logits = logits.masked_fill(torch.rand(rows, v + 3, generator=rng) < 0.3, -math.inf)
        logits = logits.to((torch.float32, torch.float16, torch.bfloat16)[case // 4 % 3])[:, case % 4 : case % 4 + v]
        logits[:, 0] = 0.0  # no row without a token
        temperature = 2 * torch.rand(rows, generator=rng, dtype=torch.float64)
        top_k = maybe(torch.randint(1, v + 1, (rows,), generator=rng), torch.tensor(v), 0.5)
        top_p = maybe(torch.rand(rows, generator=rng, dtype=torch.float64) * 0.98 + 0.01, torch.tensor(1.0).double(), 0.6)
        min_p = maybe(torch.rand(rows, generator=rng, dtype=torch.float64) * 0.1, torch.tensor(0.0).double(), 0.3)
        yield logits, Parameters(temperature, top_k, top_p, min_p, 7**case % 2**63, case, case % 5 == 1, None)


def call(logits, p, backend):
    function = top_k_top_p_sampling_from_logits if p.joint else sample
    if p.joint:  # which has neither of these
        p = p._replace(temperature=torch.ones_like(p.temperature), min_p=torch.zeros_like(p.min_p))
        from wikigpt.kernels import backend as forced

        with forced(backend):
            return function(logits, p.top_k, p.top_p, filter_apply_order="joint", seed=p.seed, offset=p.offset)
    return function(logits, *p[:4], seed=p.seed, offset=p.offset, backend=backend)


@built
def test_the_tokens_are_those_of_a_sort_in_float64():
    for logits, p in problems():
        assert call(logits, p, "cpu").equal(call(logits, p, "reference")), (logits.shape, logits.dtype, p)


@built
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_instruction_set_gives_the_same_tokens(lanes):
    try:
        _sample_rows(torch.zeros(1, 1), Parameters(1.0, 1, 1.0, 0.0, 0, 0, False, None), lanes)
    except RuntimeError:
        pytest.skip(f"this processor has no vectors of {lanes} floats")
    for logits, p in problems():
        assert _sample_rows(logits, p, lanes).equal(_sample_rows(logits, p))


@built
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_cuda_kernel_run_on_the_cpu_gives_the_same_tokens(tmp_path):
    library = tmp_path / "emulated.so"
    source = ROOT / "tests" / "emulated_sampling.cpp"
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    run = ctypes.CDLL(str(library)).emulated_sampling
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    run.argtypes = [pointer, ctypes.c_int, long, long, long, *[pointer] * 4, long, long, ctypes.c_int, ctypes.c_uint, pointer]
    for i, (logits, p) in enumerate(problems()):
        ids = torch.full((len(logits),), -9)
        dtype = (torch.float32, torch.float16, torch.bfloat16).index(logits.dtype)
        parameters = [t.data_ptr() for t in p[:4]]
        run(
            logits.data_ptr(),
            dtype,
            *logits.shape,
            logits.stride(0),
            *parameters,
            p.seed,
            p.offset,
            p.joint,
            i % 3,
            ids.data_ptr(),
        )
        assert ids.equal(_sample_rows(logits, p)), (i, logits.shape, logits.dtype, p)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, {1}), (0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.84, {1, 3, 4}), (1.0, {0, 1, 2, 3, 4})],
)
@every_backend
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept, backend):
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()
    assert set(sample(logits.expand(2000, -1), top_p=top_p, seed=0, backend=backend).tolist()) == kept


@every_backend
def test_top_p_counts_the_mass_that_top_k_left_or_that_of_the_row(backend):
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log().expand(2000, -1)
    # 0.4 of the 0.7 that top_k leaves are 57%, of the row 40%.
    assert set(sample(logits, top_k=2, top_p=0.55, seed=0, backend=backend).tolist()) == {1}
    p = Parameters(1.0, 2, 0.55, 0.0, 0, 0, True, None)
    assert set(call(logits, p._replace(temperature=torch.ones(2000), min_p=torch.zeros(2000)), backend).tolist()) == {1, 3}


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 1.0}, {"top_p": 0.999}, {"min_p": 0.0}], ids=str)
@every_backend
def test_a_token_with_logit_minus_infinity_is_never_drawn(filters, backend):
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(2000, -1)
    assert set(sample(logits, **filters, seed=0, backend=backend).tolist()) == {1, 3}


@every_backend
def test_top_k_beyond_the_vocabulary_keeps_all(backend):
    for top_k in (100, 2**70, torch.tensor(100)):
        assert set(sample(torch.zeros(2000, 5), top_k=top_k, seed=0, backend=backend).tolist()) == set(range(5))


@pytest.mark.parametrize("filters", [{}, {"top_k": 100, "top_p": 0.9}], ids=str)
@every_backend
def test_temperature_zero_takes_the_likeliest(filters, backend):
    logits = normal(20, 5000)
    assert sample(logits, 0, **filters, backend=backend).equal(logits.argmax(-1))
    assert sample(logits, 1e-300, **filters, backend=backend).equal(logits.argmax(-1))
    mixed = sample(logits, torch.tensor([0.0, 1e6] * 10), seed=0, backend=backend)
    assert mixed[::2].equal(logits[::2].argmax(-1))
    assert not (mixed[1::2] == logits[1::2].argmax(-1)).any()


@every_backend
def test_of_equal_logits_the_likeliest_is_the_first(backend):
    logits = normal(50, 1000).mul(2).round()
    logits[0] = -0.0
    logits[0, 500:] = 0.0
    assert sample(logits, 0, backend=backend).equal(logits.argmax(-1))
    if backend != "torch":
        assert sample(logits, 1.0, top_k=1, seed=0, backend=backend).equal(logits.argmax(-1))


# ---- randomness ----


def test_philox_gives_the_published_numbers():
    # The known answer of Random123 for key and counter 0: 6627e8d5 e169c58d ...
    p = Parameters(1.0, 1, 1.0, 0.0, 0, 0, False, None)
    assert float(uniform(p, 1, torch.device("cpu"))) == (0xE169C58D6627E8D5 >> 11) / 2**53


@built
def test_tokens_depend_on_no_layout():
    logits, seeds = normal(64, 1001, scale=3.0), torch.arange(64) * 2**40 - 5
    p = {"temperature": 0.9, "top_k": 300, "top_p": 0.95}
    one = sample(logits, **p, seed=3, offset=2)
    assert sample(logits[:10], **p, seed=3, offset=2).equal(one[:10])
    assert sample(logits.t().contiguous().t(), **p, seed=3, offset=2).equal(one)
    assert sample(torch.cat([logits, logits], 1)[:, :1001], **p, seed=3, offset=2).equal(one)
    assert sample(logits.reshape(4, 16, 1001), **p, seed=3, offset=2).equal(one.reshape(4, 16))
    assert sample(logits, **p, seed=torch.tensor(3), offset=torch.full((64,), 2)).equal(one)
    own = sample(logits, **p, seed=seeds, offset=2)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert sample(logits[order], **p, seed=seeds[order], offset=2).equal(own[order])
    for i in (0, 17):
        assert sample(logits[i], **p, seed=int(seeds[i]), offset=2) == own[i]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert sample(logits, **p, seed=3, offset=2).equal(one)
    finally:
        torch.set_num_threads(threads)


@every_backend
def test_another_seed_offset_or_row_gives_other_tokens(backend):
    flat = torch.zeros(100, 1000)
    first = sample(flat, seed=1, offset=1, backend=backend)
    assert sample(flat, seed=1, offset=1, backend=backend).equal(first)
    assert sample(flat, seed=torch.tensor(1), offset=torch.tensor(1), backend=backend).equal(first)
    for seed, offset in ((2, 1), (1, 2), (2**64 - 1, 1), (2**33 + 1, 1), (1, 2**33 + 1)):
        other = sample(flat, seed=seed, offset=offset, backend=backend)
        assert (other == first).sum() < 5  # each by chance once in 1,000 times
    assert len(first.unique()) > 80


@every_backend
def test_the_generator_decides_where_no_seed_does(backend):
    flat = torch.zeros(100, 1000)
    a, b = (sample(flat, generator=torch.Generator().manual_seed(7), backend=backend) for _ in range(2))
    assert a.equal(b)
    torch.manual_seed(7)
    c, d = (sample(flat, backend=backend) for _ in range(2))
    assert not c.equal(d)
    torch.manual_seed(7)
    assert sample(flat, backend=backend).equal(c)


@pytest.mark.parametrize(("extreme", "drawn"), [(0.0, 1), (1.0, 3)])
def test_the_extreme_random_numbers_draw_no_impossible_token(monkeypatch, extreme, drawn):
    monkeypatch.setattr(torch, "rand", lambda shape, generator, **options: torch.full(shape, extreme, **options))
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    assert sample(logits, backend="torch").tolist() == [drawn]


# ---- shapes and dtypes ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_backend
def test_logits_of_any_floating_dtype_can_be_sampled(dtype, backend):
    logits = torch.tensor([-50.0, 5.0, -50.0, 5.0], dtype=dtype).expand(200, -1)
    ids = sample(logits, seed=0, backend=backend)
    assert ids.dtype == torch.int64
    assert set(ids.tolist()) == {1, 3}


@every_backend
def test_any_shape(backend):
    for v in (1, 2, 3, 63, 64, 65, 127, 131_072):
        hot = torch.full((3, v), -100.0)
        hot[0, 0] = hot[1, v // 2] = hot[2, v - 1] = 0.0
        for filters in ({}, {"top_k": 1}, {"top_p": 0.5}):
            assert sample(hot, **filters, seed=0, backend=backend).tolist() == [0, v // 2, v - 1]
    assert sample(torch.zeros(0, 5), top_p=0.5, backend=backend).shape == (0,)
    assert sample(torch.zeros(2, 0, 5), backend=backend).shape == (2, 0)
    assert sample(torch.zeros(5), torch.tensor(0.0), backend=backend).shape == ()
    assert sample(torch.zeros(2, 3, 5), top_k=torch.ones(2, 3, dtype=torch.int32), backend=backend).shape == (2, 3)


NUMBERS = {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "min_p": 0.125, "seed": 3, "offset": 11}
KINDS = {int: [np.int64, np.int32, np.uint8, np.array], float: [np.float64, np.float32, np.float16, np.array, Fraction]}
OF_ANY_TYPE = [(name, kind) for name, value in NUMBERS.items() for kind in KINDS[type(value)]]


@pytest.mark.parametrize(("name", "kind"), OF_ANY_TYPE, ids=lambda x: getattr(x, "__name__", x))
@every_backend
def test_a_number_may_be_of_any_type(name, kind, backend):
    logits = normal(100, 50)
    expected = sample(logits, **NUMBERS, backend=backend)
    assert torch.equal(sample(logits, **{**NUMBERS, name: kind(NUMBERS[name])}, backend=backend), expected)


def test_flashinfers_function_takes_numbers_of_any_type_too():
    logits = normal(100, 50)
    ids = top_k_top_p_sampling_from_logits(logits, np.int64(7), np.float32(0.75), seed=np.int64(3))
    assert torch.equal(ids, top_k_top_p_sampling_from_logits(logits, 7, 0.75, seed=3))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_parameter_makes_a_device_wait(backend):
    """On meta tensors reading a number raises, as a GPU would be waited for."""
    logits = torch.empty(3, 100, device="meta")
    rows = {name: torch.ones(3, device="meta", dtype=torch.int64 if name in ("top_k", "seed") else None) for name in NUMBERS}
    choices = [(None, rows[name], value) for name, value in NUMBERS.items() if name not in ("offset", "temperature")]
    for temperature, (top_k, top_p, min_p, seed) in itertools.product((1.0, rows["temperature"]), itertools.product(*choices)):
        arguments = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        assert sample(logits, temperature, **arguments, backend=backend).shape == (3,)


def test_logits_that_need_gradients_can_be_sampled():
    assert not sample(torch.zeros(2, 5, requires_grad=True), top_p=0.5).requires_grad


# ---- bad input ----


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"temperature": math.inf}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5},
     {"top_p": math.nan}, {"min_p": -0.1}, {"min_p": 1.1}],
    ids=str,
)  # fmt: skip
@every_backend
def test_an_argument_out_of_range_is_named(wrong, backend):
    [(name, value)] = wrong.items()
    for given in (value, torch.tensor(value), torch.tensor([value, 1])):
        with pytest.raises(ValueError, match=rf"{name}: got {value}"):
            sample(torch.zeros(2, 5), **{name: given}, backend=backend)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"top_k": 2.0}, TypeError, "top_k: got float"),
        ({"top_k": np.float64(2.0)}, TypeError, "top_k: got float64, allowed are int and tensors"),
        ({"top_k": np.array([2, 3])}, TypeError, "top_k: got ndarray"),
        ({"top_p": np.bool_(True)}, TypeError, "top_p: got bool"),
        ({"top_p": 1j}, TypeError, "top_p: got complex"),
        ({"top_k": torch.tensor(2.0)}, TypeError, r"top_k: got dtype torch\.float32"),
        ({"top_p": "0.5"}, TypeError, "top_p: got str"),
        ({"temperature": True}, TypeError, "temperature: got bool"),
        ({"temperature": torch.tensor([True, False])}, TypeError, r"temperature: got dtype torch\.bool"),
        ({"min_p": torch.zeros(3)}, ValueError, r"min_p: got shape \(3,\), allowed are \(\) and that of the rows, \(2,\)"),
        ({"top_p": torch.ones(2, device="meta")}, ValueError, "top_p: got a tensor on meta, logits are on cpu"),
        ({"seed": 0.5}, TypeError, "seed: got float"),
        ({"seed": 2**64}, ValueError, "seed: got 18446744073709551616"),
        ({"offset": torch.zeros(2)}, TypeError, r"offset: got dtype torch\.float32"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed: got shape \(3,\)"),
        ({"backend": "cuda"}, RuntimeError, "runs on cuda, not on cpu"),
        ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, r"logits: got dtype torch\.int64"),
        ({"logits": [[0.0]]}, TypeError, "logits: got list"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logits: got shape \(2, 0\)"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits: got shape \(\)"),
    ],
)
def test_what_does_not_fit_is_named(wrong, error, match):
    with pytest.raises(error, match=match):
        sample(**{"logits": torch.zeros(2, 5), **wrong})


def test_a_generator_of_another_device_is_named():
    with pytest.raises(ValueError, match="generator: got one on cpu, logits are on meta"):
        sample(torch.zeros(2, 5, device="meta"), generator=torch.Generator())


@pytest.mark.parametrize("temperature", [0.0, 1.0, torch.tensor([0.0, 1.0])], ids=str)
@pytest.mark.parametrize("row", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3], ids=["nan", "inf", "minus inf"])
@every_backend
def test_logits_that_are_no_distribution_are_refused(row, temperature, backend):
    logits = torch.tensor([[0.0, 0.0, 0.0], row])
    for filters in ({}, {"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match="logits: row 1 has NaN"):
            sample(logits, temperature, **filters, backend=backend)


@built
def test_the_operator_gives_minus_one_where_a_row_is_no_distribution():
    logits = normal(6, 100)
    logits[1, 3], logits[2, 99], logits[3] = math.nan, math.inf, -math.inf
    p = Parameters(torch.tensor([1.0, 1, 1, 1, math.nan, 1]), 5, torch.tensor([1.0, 1, 1, 1, 1, 0]), 0.0, 0, 0, False, None)
    ids = _sample_rows(logits, p)
    assert ids[1:].tolist() == [-1] * 5
    assert ids[0] >= 0


@built
def test_the_operator_itself_reads_no_memory_that_is_not_its_own():
    op = torch.ops.wikigpt.sample_rows

    def run(logits, temperature=None, top_k=None, seed=None):
        return op(logits, temperature, 1.0, top_k, 5, None, 1.0, None, 0.0, seed, 0, None, 0, False, 0)

    assert run(torch.zeros(2, 5)).shape == (2,)
    for wrong in (
        {"logits": torch.zeros(2, 5, dtype=torch.float64)},
        {"logits": torch.zeros(5, 2).t()},
        {"logits": torch.zeros(5)},
        {"logits": torch.zeros(2, 0)},
        {"temperature": torch.ones(1)},
        {"temperature": torch.ones(2, dtype=torch.float16)},
        {"temperature": torch.ones(4)[::2]},
        {"top_k": torch.ones(2, dtype=torch.int32)},
        {"seed": torch.ones(3, dtype=torch.int64)},
    ):
        with pytest.raises(RuntimeError, match=r"must|no such"):
            run(**{"logits": torch.zeros(2, 5), **wrong})


# ---- flashinfer's function ----


def test_flashinfers_function_is_sample_with_its_arguments():
    logits, indices = normal(4, 200), torch.tensor([3, 0, 0, 2, 1])
    ids = top_k_top_p_sampling_from_logits(logits, 20, 0.9, indices, seed=1, offset=2)
    assert ids.equal(sample(logits[indices], top_k=20, top_p=0.9, seed=1, offset=2))
    a, b = (top_k_top_p_sampling_from_logits(logits, 20, 0.9, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert a.equal(b)
    with pytest.raises(ValueError, match="filter_apply_order: got 'first'"):
        top_k_top_p_sampling_from_logits(logits, 20, 0.9, filter_apply_order="first")


# ---- torch.compile ----


@built
def test_the_operator_passes_opcheck():
    logits, rows = normal(3, 50), torch.rand(3) + 0.1
    op = torch.ops.wikigpt.sample_rows.default
    torch.library.opcheck(op, (logits, rows, 0.0, None, 7, None, 0.5, rows / 2, 0.0, torch.tensor([3]), 0, None, 4, False, 0))


@built
def test_a_compiled_function_draws_the_same_tokens():
    logits, rows = normal(5, 300), torch.rand(5) + 0.5

    def step(logits, rows, seed):
        return sample(2 * logits, rows, top_k=40, top_p=0.9, seed=seed) + 1, sample(logits, top_p=0.9)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        a, b = compiled(logits, rows, torch.tensor(seed)), step(logits, rows, torch.tensor(seed))
        assert a[0].equal(b[0])
        assert a[1].shape == (5,)
    assert compiled(torch.full((5, 300), math.nan), rows, torch.tensor(0))[1].tolist() == [-1] * 5


# ---- on a GPU ----


@gpu_built
@pytest.mark.gpu
def test_a_gpu_draws_the_tokens_of_the_cpu():
    for logits, p in problems():
        there = Parameters(*(t.cuda() if isinstance(t, Tensor) else t for t in p))
        assert _sample_rows(logits.cuda(), there).cpu().equal(_sample_rows(logits, p)), (logits.shape, logits.dtype, p)
    logits = normal(64, 131_072, scale=3.0)
    for filters in FILTERS:
        for dtype in (torch.float32, torch.bfloat16):
            z = logits.to(dtype)
            assert sample(z.cuda(), **filters, seed=5).cpu().equal(sample(z, **filters, seed=5))


@gpu_built
@pytest.mark.gpu
def test_equal_logits_and_a_vocabulary_of_many_chunks_on_a_gpu():
    for z in (torch.zeros(2, 1_200_003), normal(2, 1_200_003).round()):
        for filters in ({"top_k": 700_001}, {"top_p": 0.6}, {"top_k": 900_000, "top_p": 0.5, "min_p": 0.01}):
            assert sample(z.cuda(), **filters, seed=5).cpu().equal(sample(z, **filters, seed=5))


@gpu_built
@pytest.mark.gpu
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_million_draws_of_a_gpu_follow_the_distribution(filters):
    logits = normal(50)
    ids = sample(logits.cuda().expand(1_000_000, -1), **filters, generator=torch.Generator("cuda").manual_seed(1))
    assert_drawn_from(ids.cpu(), kept_probabilities(logits, **filters))


@pytest.mark.gpu
@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_pytorchs_operators_do_not_wait_for_a_gpu(filters):
    logits = torch.zeros(100, 1000, device="cuda")
    rows = {name: torch.full((100,), value, device="cuda") for name, value in filters.items()}
    sample(logits, **rows, backend="torch")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(logits, **rows, backend="torch")
        sample(logits, **filters, backend="torch")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_built
@pytest.mark.gpu
def test_a_gpu_is_never_waited_for_and_a_graph_draws_anew_at_each_replay():
    flat, top_p = torch.zeros(100, 1000, device="cuda"), torch.full((100,), 0.9, device="cuda")
    sample(flat, top_p=top_p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(flat, top_p=top_p)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = sample(flat, top_p=top_p)
    graph.replay()
    first = ids.clone()
    graph.replay()
    assert (first == ids).sum() < 10
    assert int(first.min()) >= 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=gpu_built), "torch", "reference"])
def test_bad_rows_on_a_gpu(backend):
    logits = torch.zeros(3, 100, device="cuda")
    logits[1, 5] = math.nan
    top_p = torch.tensor([0.5, 0.5, 2.0], device="cuda")
    assert sample(logits, top_p=top_p, backend=backend).tolist()[1:] == [-1, -1]
    with pytest.raises(ValueError, match="logits: row 1"):
        sample(logits, top_p=0.5, check_nan=True, backend=backend)
    with debug_checks(), pytest.raises(ValueError, match=r"top_p: got 2\.0"):
        sample(logits, top_p=top_p, backend=backend)
    with pytest.raises(ValueError, match="generator"):
        sample(logits, generator=torch.Generator(), backend=backend)
