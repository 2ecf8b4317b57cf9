"""FusedAdamW and FusedAdam against torch.optim in float64, on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import importlib
import io
import math
import pickle
import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest
import torch
from wikigpt.kernels import FusedAdam, FusedAdamW, optimizer
from wikigpt.kernels._dispatch import explain

from tests.conftest import ROOT, assert_as_accurate_as
from wikigpt import kernels

# More than one chunk of csrc/ and of the GPU, odd ends, one element, none, no dimension.
SHAPES = [(29, 701), (17, 33), (5,), (1,), (0,), ()]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = [
    ("cpu", "cpu"), ("cpu", "torch"), ("cpu", "foreach"), ("cpu", "triton"), ("cpu", "reference"),
    *(pytest.param(("cuda", name), marks=pytest.mark.gpu) for name in ("cuda", "triton", "torch", "reference")),
]  # fmt: skip


@pytest.fixture(params=BACKENDS, ids=lambda pair: "-".join(pair))
def device(request, monkeypatch):
    """The device of a test, in which one implementation is in force. "foreach": what "torch" is on a GPU."""
    device_type, name = request.param
    if name == "foreach":
        monkeypatch.setattr(optimizer, "_step_fused", optimizer._step_foreach)
        name = "torch"
    if (device_type, name) == ("cpu", "triton"):  # interpreted, so that fewer programs take less time
        monkeypatch.setattr(importlib.import_module("wikigpt.kernels.optimizer_triton"), "BLOCK", 8192)
    reason = next(reason for backend, reason in explain("adamw", device_type) if backend == name)
    if reason is not None:
        pytest.skip(reason)
    with kernels.backend(name):
        yield device_type


@pytest.fixture(params=DEVICES)
def own(request):
    """A device with our own implementation in force."""
    reason = next(reason for backend, reason in explain("adamw", request.param) if backend == request.param)
    if reason is not None:
        pytest.skip(reason)
    with kernels.backend(request.param):
        yield request.param


def make_params(dtype=torch.float32, device="cpu", shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


@functools.cache
def grad_of(step, shapes):
    """Gradients of one step, of sizes from 1e-3 to 10."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(s, generator=generator) * 10 ** float(torch.rand((), generator=generator) * 4 - 3) for s in shapes]


def set_grads(params, step, scale=1.0, dtype=None):
    """The same numbers in every dtype (rounded to `dtype` first)."""
    for p, grad in zip(params, grad_of(step, tuple(p.shape for p in params))):
        p.grad = ((grad if dtype is None else grad.to(dtype)).to(p.dtype) * scale).to(p.device)


def run(optimizer, params, steps, first=0, clip=None, **grads):
    for step in range(first, first + steps):
        set_grads(params, step, **grads)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()


def values(params):
    return torch.cat([p.detach().cpu().flatten() for p in params])


def state_of(optimizer, params, key):
    return torch.cat([optimizer.state[p][key].cpu().flatten() for p in params])


def assert_same(a, b):
    """The same bits in two state_dicts or lists of tensors."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


def reloaded(state_dict):
    """A state_dict by way of a file."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file)


# --- against torch in float64 ----------------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "no decay": {"weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-6},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.3},
    "maximize": {"maximize": True, "lr": 3e-3},
    "no memory": {"betas": (0.0, 0.0), "eps": 1e-3},
    "short memory": {"betas": (0.3, 0.6), "amsgrad": True, "maximize": True},
    "lr on the device": {"lr": "tensor"},
}


@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clip"])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(FusedAdamW, torch.optim.AdamW), (FusedAdam, torch.optim.Adam)], ids=["adamw", "adam"]
)
@pytest.mark.parametrize("case", CASES)
def test_200_steps_are_as_accurate_as_torch(own, case, ours, theirs, clip):
    options = {"lr": 1e-2, "weight_decay": 0.1, **CASES[case]}
    if options["lr"] == "tensor":
        options["lr"] = torch.tensor(1e-2, device=own)

    def groups(params):
        return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.02, "betas": (0.8, 0.99), "lr": 4e-3}]

    truth, plain, mine = (make_params(dtype) for dtype in (torch.float64, torch.float32, torch.float32))
    mine = [torch.nn.Parameter(p.to(own)) for p in mine]
    numbers = {**options, "lr": float(options["lr"])}
    optimizers = theirs(groups(truth), **numbers), theirs(groups(plain), **numbers, fused=True)
    for params, o in zip((truth, plain), optimizers):
        run(o, params, 200, clip=clip, dtype=torch.float32)
    run(ours(groups(mine), **options, max_grad_norm=clip), mine, 200)
    assert_as_accurate_as(values(mine), values(plain), values(truth))


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True, "ema_decay": 0.9, "zero_grad": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", [False, True])
def test_implementations_agree(device, dtype, master, options):
    """With the reference in float64 as the truth and torch's fused AdamW as the measure: 10 steps, clipped."""
    everything = {"lr": 1e-2, "max_grad_norm": 0.5, "master_weights": master, **options}
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    mine, truth, plain = make_params(dtype, device), make_params(dtype), make_params(dtype)
    truth = [torch.nn.Parameter(p.double()) for p in truth]
    a = FusedAdamW(mine, **everything)
    with kernels.backend("reference"):
        b = FusedAdamW(truth, **everything)
        run(b, truth, 10, dtype=dtype)
    run(a, mine, 10)
    with kernels.backend("torch"):
        c = FusedAdamW(plain, **everything)
        run(c, plain, 10)
    assert_as_accurate_as(values(mine), values(plain), values(truth))
    for key in a.state[mine[0]]:
        if key == "step":
            assert torch.equal(state_of(a, mine, "step"), torch.full((len(SHAPES),), 10.0))
        else:
            expected = wide if key == "ema" or master else dtype
            other = values(truth) if key == "master" else state_of(b, truth, key)
            assert state_of(a, mine, key).dtype == expected
            assert_as_accurate_as(state_of(a, mine, key), state_of(c, plain, key), other)
    assert_as_accurate_as(a.grad_norm.cpu(), c.grad_norm, b.grad_norm.double())
    if options:
        assert all(not p.grad.any() for p in mine)


def test_tensors_of_several_dtypes_and_devices_of_lr_in_one_optimizer(own):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    mine = [make_params(d, own, [(300, 7)], seed=i)[0] for i, d in enumerate(dtypes)]
    plain = [torch.nn.Parameter(p.detach().cpu().clone()) for p in mine]
    groups = [{"params": mine[:3]}, {"params": mine[3:], "lr": torch.tensor(2e-2)}]
    a = FusedAdamW(groups, lr=1e-2, eps=1e-3, max_grad_norm=0.1)
    b = [torch.optim.AdamW([p], lr=2e-2 if i > 2 else 1e-2, eps=1e-3, fused=True) for i, p in enumerate(plain)]
    for step in range(5):
        for params in (mine, plain):
            set_grads(params, step)
        norm = torch.cat([p.grad.double().flatten() for p in plain]).norm()
        for p in plain:
            p.grad = (p.grad.double() * min(1.0, 0.1 / (float(norm) + 1e-6))).to(p.dtype)
        a.step()
        assert a.grad_norm.dtype == torch.float64
        torch.testing.assert_close(a.grad_norm.cpu(), norm, rtol=1e-6, atol=0)
        for o in b:
            o.step()
    for p, q in zip(mine, plain):
        ulp = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[p.dtype]
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=2 * ulp, atol=2 * ulp)


# --- the norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 31, 16384, 16391, 70001])
def test_the_norm(own, dtype, size):
    grads = [torch.randn(n).to(own, dtype) for n in (size, 0, 3, 2 * size)]
    norm = kernels._dispatch.choose("grad_norm", own)(grads, None, torch.zeros(1, dtype=torch.int32, device=own))
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.device.type == own
    truth = torch.cat([g.double() for g in grads]).norm().cpu()
    torch.testing.assert_close(norm.cpu().double(), truth, rtol=1e-12 if dtype == torch.float64 else 2e-7, atol=0)


def test_the_norm_of_gradients_whose_squares_leave_float32_is_right_where_the_sum_is_in_float64(own):
    p = torch.nn.Parameter(torch.ones(100, dtype=torch.float64, device=own))
    p.grad = torch.full_like(p, 1e100)
    o = FusedAdamW([p], max_grad_norm=1.0)
    o.step()
    assert float(o.grad_norm) == pytest.approx(1e101)


def test_a_norm_that_is_not_finite_is_seen(device):
    for bad in (math.nan, math.inf):
        params = make_params(device=device)
        set_grads(params, 0)
        params[0].grad[3, 5] = bad
        o = FusedAdamW(params, max_grad_norm=1.0)
        o.step()
        assert not torch.isfinite(o.grad_norm)


def test_the_number_of_threads_changes_no_bit():
    if explain("adamw", "cpu")[1][1] is not None:
        pytest.skip("csrc/ is not built")
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = make_params()
            o = FusedAdamW(params, max_grad_norm=0.1)
            run(o, params, 3)
            results.append([values(params), o.grad_norm])
    finally:
        torch.set_num_threads(before)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


# --- gradients of every size -------------------------------------------------------------------------------------------

# The square of 1.8e19 leaves float32; times 1 - beta2 = 0.001 that of 5.8e20 does. float16 ends at 65,504.
SIZES = [0.0, 1e-30, 1e-22, 1e-10, 1.0, 300.0, 2e4, 1e10, 1.7e19, 1.9e19, 1e20, 5e20, 7e20, 1e30, 3e38]
EVERY_SIZE = [sign * size for size in SIZES for sign in (1, -1)]
KINDS = {
    "float32": {},
    "amsgrad": {"amsgrad": True, "maximize": True},
    "short memory": {"betas": (0.3, 0.4)},
    "no memory": {"betas": (0.0, 0.0)},
    "ema": {"ema_decay": 0.9},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16, "eps": 1e-3},
    "stochastic": {"dtype": torch.bfloat16, "stochastic_rounding": True},
    "master of bfloat16": {"dtype": torch.bfloat16, "master_weights": True, "amsgrad": True},
    "master of float16": {"dtype": torch.float16, "master_weights": True},
}


def steps_after(optimizer, p, first, steps=4):
    """The parameter after each step: one with the gradient `first`, then ones of alternating sign."""
    seen = []
    for step in range(steps):
        p.grad = first.to(p.dtype) if step == 0 else torch.full_like(p, (-1.0) ** step)
        optimizer.step()
        seen.append(p.detach().cpu().clone())
    return torch.stack(seen)


def assert_survives_as_in_torch(kind, gradients, device="cpu"):
    """What stays finite, step by step, and in float32 what it is, as with torch.optim.AdamW(foreach=True)."""
    options = {"lr": 1e-2, **KINDS[kind]}
    dtype = options.pop("dtype", torch.float32)
    mine = torch.nn.Parameter(torch.linspace(-1, 1, len(gradients)).to(device, dtype))
    ours = steps_after(FusedAdamW([mine], **options), mine, gradients.to(device))
    wide = options.pop("master_weights", False)
    for name in ("stochastic_rounding", "ema_decay"):
        options.pop(name, None)
    plain = torch.nn.Parameter(torch.linspace(-1, 1, len(gradients)).to(dtype).to(torch.float32 if wide else dtype))
    theirs = steps_after(torch.optim.AdamW([plain], **options, foreach=True), plain, gradients.to(dtype))
    if kind == "no memory":  # 0 * inf of the step before is NaN there
        theirs = theirs.where(theirs.isfinite() | ~gradients.isfinite(), ours.to(theirs.dtype))
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    if dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_one_gradient_of_any_size_leaves_finite_what_torch_leaves_finite(device, kind):
    gradients = torch.tensor([*EVERY_SIZE, math.inf, -math.inf, math.nan])
    assert_survives_as_in_torch(kind, gradients, device)


@pytest.mark.parametrize("kind", ["amsgrad", "float64", "bfloat16", "master of bfloat16", "stochastic"])
def test_one_gradient_of_any_size_in_the_emulated_cuda_kernels(emulated, monkeypatch, kind):
    monkeypatch.setattr(optimizer, "choose", lambda op, device_type: {"adamw": emulated.adamw}[op])
    assert_survives_as_in_torch(kind, torch.tensor([*EVERY_SIZE, math.inf, -math.inf, math.nan]))


def assert_clips_by_the_true_norm(dtype, largest, clip, device="cpu"):
    """The step that clipping in float64 gives."""
    gradients = torch.tensor([1.0, -largest, largest / 2, 3.0], dtype=torch.float64).to(dtype).repeat(1000)
    mine = torch.nn.Parameter(torch.ones(4000, dtype=dtype, device=device))
    truth = torch.nn.Parameter(torch.ones(4000, dtype=torch.float64))
    mine.grad, truth.grad = gradients.to(device, copy=True), gradients.double()
    o, plain = FusedAdamW([mine], lr=0.1, max_grad_norm=clip), torch.optim.AdamW([truth], lr=0.1)
    norm = torch.nn.utils.clip_grad_norm_([truth], clip)
    o.step(), plain.step()
    assert float(o.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    torch.testing.assert_close(mine.detach().cpu().double(), truth.detach(), rtol=2**-8, atol=0)


# dtype, the largest gradient, the norm to clip to. With 0.01 what gradients are divided by leaves float32.
LARGEST = [
    (torch.float32, 1e20, 1.0),
    (torch.float32, 3e36, 1.0),
    (torch.float32, 3e36, 0.01),
    (torch.bfloat16, 1e30, 1.0),
    (torch.bfloat16, 3e36, 0.01),
    (torch.float16, 6e4, 1.0),
    (torch.float64, 1e100, 1.0),
]


@pytest.mark.parametrize("case", LARGEST, ids=str)
def test_clipping_by_a_norm_whose_square_leaves_float32(device, case):
    assert_clips_by_the_true_norm(*case, device)


@pytest.mark.parametrize("backend", [name for name, missing in explain("adamw", "cpu") if missing is None])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["lr", "lr in float64"])
def test_a_parameter_without_a_dimension_beside_float64_keeps_its_dtype(lr, backend):
    wide = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    one = torch.nn.Parameter(torch.randn(()).bfloat16())
    before = one.detach().clone()
    wide.grad, one.grad = torch.randn_like(wide), torch.ones_like(one)
    with kernels.backend(backend):
        FusedAdamW([wide, one], lr=lr, weight_decay=0.0, max_grad_norm=1.0, stochastic_rounding=True).step()
    torch.testing.assert_close(one.detach(), before - 0.1, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing_in_clipping(device, default):
    torch.set_default_dtype(default)
    try:
        assert_clips_by_the_true_norm(torch.float32, 3e36, 0.01, device)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", [case for case in LARGEST if case[0] != torch.float16], ids=str)
def test_clipping_by_such_a_norm_in_the_emulated_cuda_kernels(emulated, monkeypatch, case):
    functions = {"grad_norm": emulated.grad_norm, "adamw": emulated.adamw}
    monkeypatch.setattr(optimizer, "choose", lambda op, device_type: functions[op])
    assert_clips_by_the_true_norm(*case)


# --- 16 bits: master weights, stochastic rounding ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_train_as_float32_does(device, dtype):
    params, wide = make_params(dtype, device), [torch.nn.Parameter(p.float()) for p in make_params(dtype, device)]
    a, b = FusedAdamW(params, lr=1e-4, master_weights=True), FusedAdamW(wide, lr=1e-4)
    run(a, params, 30)
    run(b, wide, 30, dtype=dtype)
    assert_same(state_of(a, params, "master"), values(wide))
    assert_same(values(params), values(wide).to(dtype))


def test_philox_gives_the_numbers_of_its_paper():
    """Random123's known answer of philox4x32-7 for counter and key 0."""
    bits = optimizer.random_bits(0, 0, 0, 0, 8, torch.device("cpu"))
    words = [int(low) | int(high) << 16 for low, high in bits.view(4, 2)]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_stochastic_rounding_is_right_on_average(device):
    """Every number lands beside the exact one; the mean error over many is 0 within five standard errors."""
    n = 200_000
    params = [torch.nn.Parameter(torch.randn(n).to(device, torch.bfloat16)) for _ in range(2)]
    exact = [torch.nn.Parameter(p.detach().cpu().double()) for p in params]
    for step, (p, q) in enumerate(zip(params, exact)):
        q.grad = torch.randn(n, generator=torch.Generator().manual_seed(step)).bfloat16().double()
        p.grad = q.grad.to(device, torch.bfloat16)
    options = {"lr": 1e-3, "weight_decay": 0.1}
    o, truth = FusedAdamW(params, **options, stochastic_rounding=True), torch.optim.AdamW(exact, **options)
    o.step(), truth.step()
    rounding = []
    for p, q in zip(params, exact):
        for x, y in (
            (p, q),
            (o.state[p]["exp_avg"], truth.state[q]["exp_avg"]),
            (o.state[p]["exp_avg_sq"], truth.state[q]["exp_avg_sq"]),
        ):
            x, y = x.detach().cpu().double(), y.detach()
            ulp = 2.0 ** (y.abs().clamp(min=1e-30).log2().floor() - 7)
            error = (x - y) / ulp
            assert error.abs().max() < 1.001  # beside a power of two both neighbours are not one ulp away
            assert abs(error.mean()) < 5 * error.std() / math.sqrt(n)
            assert 0.3 < error.std() < 0.5  # sqrt(E[f (1 - f)]) = 0.41 for uniform f
            rounding.append(error)
    correlation = torch.corrcoef(torch.stack(rounding)) - torch.eye(len(rounding))
    assert correlation.abs().max() < 5 / math.sqrt(n)  # every parameter and moment draws its own bits


def test_stochastic_rounding_learns_where_rounding_to_nearest_stands_still(device):
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device=device))
        o = FusedAdamW([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=stochastic)
        for _ in range(40):
            p.grad = torch.ones_like(p)
            o.step()
        moved = 1 - float(p.detach().float().mean())
        assert moved == pytest.approx(40e-4, rel=0.1) if stochastic else moved == 0


def test_stochastic_rounding_is_the_same_in_all_implementations_and_never_twice_the_same(device):
    results = []
    for name in ("reference", None):
        with kernels.backend(name) if name else contextlib.nullcontext():
            params = make_params(torch.bfloat16, device)
            o = FusedAdamW(params, lr=1e-3, stochastic_rounding=True, amsgrad=True)
            run(o, params, 1)
            results.append(values(params).float())
    assert (results[0] == results[1]).float().mean() > 0.999  # another rounding of float32 rarely changes the outcome
    same = [torch.nn.Parameter(torch.full((20_000,), 1.0, dtype=torch.bfloat16, device=device)) for _ in range(2)]
    o = FusedAdamW(same, lr=1e-3, weight_decay=0.0, stochastic_rounding=True)
    seen = []
    for _ in range(2):
        for p in same:
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        o.step()
        seen += [p.detach().cpu().clone() for p in same]
    for i in range(4):
        for j in range(i):
            assert 0.3 < (seen[i] == seen[j]).float().mean() < 0.9


def test_what_is_not_finite_stays_so_under_stochastic_rounding(device):
    p = torch.nn.Parameter(torch.ones(16, dtype=torch.bfloat16, device=device))
    o = FusedAdamW([p], stochastic_rounding=True)
    p.grad = torch.ones_like(p)
    p.grad[2], p.grad[9] = math.nan, math.inf
    o.step()
    finite = torch.isfinite(p.detach()).cpu()
    assert finite.tolist() == [i not in (2, 9) for i in range(16)]
    assert torch.isnan(o.state[p]["exp_avg"][2])
    assert torch.isinf(o.state[p]["exp_avg"][9])


# --- moving averages, gradients left at zero ---------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.3, 0.5, 0.999])
def test_the_moving_average_is_what_its_formula_says(device, decay):
    params = make_params(device=device)
    o = FusedAdamW(params, lr=1e-2, ema_decay=decay)
    expected = values(params).double()
    for step in range(20):
        run(o, params, 1, first=step)
        expected = decay * expected + (1 - decay) * values(params).double()
    torch.testing.assert_close(state_of(o, params, "ema").double(), expected, rtol=3e-6, atol=1e-6)
    assert [p is q for (p, _), q in zip(o.ema_parameters(), params)] == [True] * len(params)
    weights, averages = values(params), state_of(o, params, "ema")
    with contextlib.suppress(KeyError), o.swap_ema():
        assert_same(values(params), averages)
        raise KeyError
    assert_same(values(params), weights)


def test_zero_grad_leaves_zeros_in_the_same_tensors(device):
    params = make_params(device=device)
    o = FusedAdamW(params, zero_grad=True, max_grad_norm=1.0)
    set_grads(params, 0)
    grads = [p.grad for p in params]
    o.step()
    assert all(p.grad is g and not g.any() for p, g in zip(params, grads))
    without = make_params(device=device)
    run(FusedAdamW(without, max_grad_norm=1.0), without, 1)
    assert_same(values(params), values(without))


# --- gradient scaling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16, "master_weights": True}, {"dtype": torch.bfloat16, "stochastic_rounding": True}],
    ids=str,
)
@pytest.mark.parametrize("zero_grad", [False, True])
def test_an_inf_skips_the_step_on_the_device(device, options, zero_grad):
    options = dict(options)
    params = make_params(options.pop("dtype", torch.float32), device)
    o = FusedAdamW(params, **options, ema_decay=0.9, amsgrad=True, max_grad_norm=1.0, zero_grad=zero_grad)
    run(o, params, 2)
    weights, state = values(params), copy.deepcopy(o.state_dict())
    set_grads(params, 5)
    params[0].grad[0, 0] = math.inf
    o.found_inf, o.grad_scale = torch.ones((), device=device), torch.full((), 8.0, device=device)
    o.step()
    assert_same(values(params), weights)
    assert_same(o.state_dict(), state)
    assert all(bool(p.grad.any()) != zero_grad for p in params if p.numel())
    o.found_inf.zero_()
    set_grads(params, 5)
    o.step()
    assert not torch.equal(values(params), weights)
    assert float(o.state[params[0]]["step"]) == 3


UNSCALED = {
    "float32": {},
    "clipped": {"max_grad_norm": 0.5, "ema_decay": 0.9, "amsgrad": True, "maximize": True},
    "float64": {"dtype": torch.float64, "max_grad_norm": 0.5},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16, "max_grad_norm": 0.5},
    "master": {"dtype": torch.bfloat16, "master_weights": True},
    "master, clipped": {"dtype": torch.float16, "master_weights": True, "max_grad_norm": 0.5},
    "stochastic": {"dtype": torch.bfloat16, "stochastic_rounding": True, "max_grad_norm": 0.5},
}
TRANSPOSED = [(29, 701), (17, 33), (5, 1)]


def gradients_after_scaled_steps(optimizer, params, strided=lambda x: x):
    """Of three steps, the second of which is skipped."""
    seen = []
    for step, skipped in enumerate((False, True, False)):
        set_grads(params, step, scale=96.0)
        for p in params:
            p.grad = strided(p.grad)
        device = params[0].device
        optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x, device=device) for x in (96.0, float(skipped)))
        optimizer.step()
        seen.append(values([p.grad for p in params]))
    return torch.stack(seen)


def assert_leaves_what_torch_leaves(kind, device="cpu"):
    options = dict(UNSCALED[kind])
    dtype = options.pop("dtype", torch.float32)
    mine, plain = make_params(dtype, device), make_params(dtype)
    ours = gradients_after_scaled_steps(FusedAdamW(mine, **options), mine)
    theirs = gradients_after_scaled_steps(torch.optim.AdamW(plain, fused=True), plain)
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("kind", UNSCALED)
def test_a_scaled_step_leaves_the_gradients_that_torch_leaves(device, kind):
    assert_leaves_what_torch_leaves(kind, device)


@pytest.mark.parametrize("kind", [kind for kind, options in UNSCALED.items() if options.get("dtype") != torch.float16])
def test_a_scaled_step_of_the_emulated_cuda_kernels_leaves_them_too(emulated, monkeypatch, kind):
    functions = {"grad_norm": emulated.grad_norm, "adamw": emulated.adamw}
    monkeypatch.setattr(optimizer, "choose", lambda op, device_type: functions[op])
    assert_leaves_what_torch_leaves(kind)


@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clip"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["", "1"])
def test_a_scale_of_any_size_costs_no_digits(device, dtype, clip, shape):
    """No power of two, nor is a third a number of float32: what is unscaled has the digits of its own dtype, averages too."""
    mine, plain = make_params(dtype, device), make_params(dtype)
    a = FusedAdamW(mine, lr=1e-2, max_grad_norm=clip, ema_decay=0.7)
    b = torch.optim.AdamW(plain, lr=1e-2)
    a.grad_scale = torch.full(shape, 3.0, device=device)
    a.found_inf = torch.zeros(shape, device=device)
    expected = values(plain)
    for step in range(3):
        run(a, mine, 1, first=step, scale=3.0)
        run(b, plain, 1, first=step, clip=clip)
        expected = 0.7 * expected + 0.3 * values(plain)
    tiny = 1e-11 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(values(mine), values(plain), rtol=tiny, atol=tiny)
    torch.testing.assert_close(state_of(a, mine, "ema"), expected, rtol=tiny, atol=tiny)
    if clip is not None:
        assert a.grad_norm.shape == ()


def test_a_scaled_step_leaves_them_in_any_layout(device):
    mine, plain = make_params(device=device, shapes=TRANSPOSED), make_params(shapes=TRANSPOSED)
    ours = gradients_after_scaled_steps(FusedAdamW(mine), mine, lambda x: x.t().contiguous().t())
    theirs = gradients_after_scaled_steps(torch.optim.AdamW(plain, fused=True), plain)
    torch.testing.assert_close(ours, theirs)


def test_gradients_left_at_zero_are_zero_after_a_scaled_step_too(device):
    params = make_params(device=device)
    assert not gradients_after_scaled_steps(FusedAdamW(params, zero_grad=True, max_grad_norm=0.5), params).any()


@pytest.mark.parametrize("clip", [None, 0.5])
def test_with_a_grad_scaler(device, clip):
    """Against a for-loop AdamW: scaled losses, an overflow in the third step."""
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(3)).to(device)
    results = []
    for ours in (True, False):
        layer = torch.nn.Linear(40, 30).to(device)
        layer.load_state_dict({"weight": torch.linspace(-1, 1, 1200).view(30, 40), "bias": torch.zeros(30)})
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=2)
        if ours:
            o = FusedAdamW(layer.parameters(), lr=1e-2, max_grad_norm=clip)
        else:
            o = torch.optim.AdamW(layer.parameters(), lr=1e-2, foreach=False)
        for step in range(6):
            o.zero_grad()
            loss = (layer(x) ** 2).mean() * (math.inf if step == 2 else 1.0)
            scaler.scale(loss).backward()
            if not ours and clip is not None:
                scaler.unscale_(o)
                torch.nn.utils.clip_grad_norm_(layer.parameters(), clip)
            scaler.step(o)
            scaler.update()
        results.append((values(layer.parameters()), scaler.get_scale()))
        assert float(o.state[layer.weight]["step"]) == 5
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)


def test_the_norm_is_of_unscaled_gradients(device):
    params = make_params(device=device)
    set_grads(params, 0)
    expected = float(torch.cat([p.grad.double().flatten() for p in params]).norm())
    set_grads(params, 0, scale=64.0)
    o = FusedAdamW(params, max_grad_norm=1.0)
    o.grad_scale = torch.tensor(64.0)  # wherever it is
    o.step()
    assert float(o.grad_norm) == pytest.approx(expected, rel=1e-6)


# --- checkpoints -----------------------------------------------------------------------------------------------------

KEPT = {
    "float32": {},
    "all": {"amsgrad": True, "ema_decay": 0.9, "max_grad_norm": 0.5, "maximize": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "master": {"dtype": torch.bfloat16, "master_weights": True, "ema_decay": 0.9, "amsgrad": True},
    "stochastic": {"dtype": torch.bfloat16, "stochastic_rounding": True, "ema_decay": 0.9},
    "lr on the device": {"lr": "tensor"},
}


@pytest.mark.parametrize("case", KEPT)
def test_a_resumed_run_gives_the_same_bits(device, case):
    def start():
        options = dict(KEPT[case])
        params = make_params(options.pop("dtype", torch.float32), device)
        if options.get("lr") == "tensor":
            options["lr"] = torch.tensor(1e-3, device=device)
        return params, FusedAdamW(params, **options)

    params, whole = start()
    run(whole, params, 3)
    saved, weights = reloaded(whole.state_dict()), [p.detach().clone() for p in params]
    run(whole, params, 3, first=3)
    again, resumed = start()
    with torch.no_grad():
        for p, w in zip(again, weights):
            p.copy_(w)
    resumed.load_state_dict(saved)
    assert_same(resumed.state_dict()["state"], saved["state"])
    run(resumed, again, 3, first=3)
    assert_same(values(again), values(params))
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("kind", ["fused", "foreach", "for-loop", "capturable"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_checkpoints_go_both_ways(device, kind, amsgrad):
    if kind == "capturable" and device == "cpu":
        pytest.skip("torch.optim.AdamW(capturable=True) has no step on the CPU")
    flags = {
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "for-loop": {"foreach": False},
        "capturable": {"capturable": True},
    }
    a, b = make_params(device=device), make_params(device=device)
    options = {"lr": 1e-2, "weight_decay": 0.3, "amsgrad": amsgrad}
    theirs, ours = torch.optim.AdamW(a, **options, **flags[kind]), FusedAdamW(b, **options)
    run(theirs, a, 4)
    run(ours, b, 4)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine["state"][0].keys() == other["state"][0].keys()
    assert mine["param_groups"][0].keys() == other["param_groups"][0].keys()
    # Each goes on from the other's state.
    ours, theirs = FusedAdamW(b, lr=1.0), torch.optim.AdamW(a, lr=1.0, **flags[kind])
    ours.load_state_dict(reloaded(other))
    theirs.load_state_dict(reloaded(mine))
    assert ours.param_groups[0]["weight_decay"] == theirs.param_groups[0]["weight_decay"] == 0.3
    run(theirs, a, 4, first=4)
    run(ours, b, 4, first=4)
    torch.testing.assert_close(values(a), values(b), rtol=1e-5, atol=1e-6)
    assert not torch.equal(values(a), values(make_params()))


def test_a_checkpoint_changes_its_options(device):
    """Of plain bfloat16 into master weights, which start from the parameter; and back."""
    params = make_params(torch.bfloat16, device)
    plain = FusedAdamW(params, ema_decay=0.9)
    run(plain, params, 2)
    master = FusedAdamW(params, master_weights=True)
    before = values(params).float()
    master.load_state_dict(reloaded(plain.state_dict()))
    assert set(master.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert master.state[params[0]]["exp_avg"].dtype == torch.float32
    for group in master.param_groups:
        group["lr"] = 0.0
    run(master, params, 1)
    assert_same(state_of(master, params, "master"), before)
    back = FusedAdamW(params)
    back.load_state_dict(reloaded(master.state_dict()))
    assert set(back.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert back.state[params[0]]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_goes_on_alone(device, copied):
    params = make_params(device=device)
    o = FusedAdamW(params, ema_decay=0.9, max_grad_norm=0.5)
    run(o, params, 2)
    other = copied(o)
    others = other.param_groups[0]["params"]
    run(o, params, 2, first=2)
    assert not torch.equal(values(others), values(params))
    run(other, others, 2, first=2)
    assert_same(values(others), values(params))


# --- as torch.optim.Optimizer ------------------------------------------------------------------------------------------


def test_changes_between_steps(device):
    """Schedules of lr and betas, groups that come later, gradients that are missing, closures, as in torch."""
    results = []
    for cls in (FusedAdamW, torch.optim.AdamW):
        params = make_params(device=device)
        late = make_params(device=device, shapes=[(9, 4)], seed=7)
        o = cls(params, lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=20)
        for step in range(12):
            set_grads(params + late, step)
            if step % 3 == 1:
                params[0].grad = params[4].grad = None
            if step == 4:
                o.add_param_group({"params": late, "lr": 1e-2, "amsgrad": True, "weight_decay": 0.0})
            if step == 8:
                o.param_groups[0]["amsgrad"] = o.param_groups[0]["maximize"] = True
                for group in o.param_groups:
                    if group["amsgrad"] and cls is torch.optim.AdamW:  # which makes the state in the first step alone
                        for p in group["params"]:
                            o.state[p].setdefault("max_exp_avg_sq", torch.zeros_like(p))
            assert o.step(lambda: torch.tensor(3.0)) == 3.0
            if step < 4:
                schedule.step()
        results.append(values(params + late))
        results.append(torch.stack([o.state[p]["step"].cpu() for p in params + late]))
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-6)
    assert_same(results[1], results[3])


def test_autograd_refuses_to_go_back_through_what_a_step_has_changed(device):
    weight, x = torch.nn.Parameter(torch.ones(3, device=device)), torch.ones(3, device=device, requires_grad=True)
    y = (weight * x).sum()
    weight.grad = torch.ones_like(weight)
    FusedAdamW([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_nothing_to_do_is_done(device):
    params = make_params(device=device)
    o = FusedAdamW(params, max_grad_norm=1.0)
    before = values(params)
    assert o.step() is None
    assert o.step(lambda: 5) == 5
    assert_same(values(params), before)
    assert not o.state_dict()["state"]


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "gaps", "gradient", "unaligned"])
def test_every_layout(device, layout):
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(2, 6, 5, 4, 3, generator=generator)
    if layout == "channels_last":
        p = start.to(device, memory_format=torch.channels_last)
        g = grad.to(device, memory_format=torch.channels_last)
    elif layout == "transposed":
        p, g = (x.to(device).transpose(0, 2).contiguous().transpose(0, 2) for x in (start, grad))
    elif layout == "gaps":
        p, g = (torch.stack((x, x), -1).to(device)[..., 0] for x in (start, grad))
    elif layout == "unaligned":
        p, g = (torch.cat((x.new_zeros(1), x.flatten())).to(device)[1:].view(6, 5, 4, 3) for x in (start, grad))
    else:
        p, g = start.to(device), grad.to(device).transpose(0, 1).contiguous().transpose(0, 1)
    p = torch.nn.Parameter(p)
    q = torch.nn.Parameter(start.clone())
    a, b = FusedAdamW([p], max_grad_norm=0.1, ema_decay=0.9, zero_grad=True), torch.optim.AdamW([q])
    strides = p.stride()
    for _ in range(2):
        p.grad, q.grad = g.clone(memory_format=torch.preserve_format), grad.clone()
        torch.nn.utils.clip_grad_norm_([q], 0.1)
        a.step(), b.step()
    assert p.stride() == strides
    assert not p.grad.any()
    torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-6, atol=1e-7)
    saved = reloaded(a.state_dict())
    a.load_state_dict(saved)
    assert_same(a.state_dict()["state"], saved["state"])


def test_many_small_tensors_in_many_groups(own):
    """More than one launch on a GPU holds, of tensors and of groups."""
    shapes = [(1 + i % 7,) for i in range(1700)]
    mine, plain = make_params(device=own, shapes=shapes), make_params(torch.float64, shapes=shapes)

    def groups(params):
        return [{"params": params[i::40], "lr": 1e-3 * (1 + i)} for i in range(40)]

    a, b = FusedAdamW(groups(mine), max_grad_norm=0.5), torch.optim.AdamW(groups(plain))
    run(a, mine, 2)
    run(b, plain, 2, clip=0.5, dtype=torch.float32)
    torch.testing.assert_close(values(mine).double(), values(plain), rtol=1e-6, atol=1e-6)
    assert all(float(o.state[p]["step"]) == 2 for o, ps in ((a, mine), (b, plain)) for p in ps)


def test_registered_operators_keep_their_promises(own):
    ticket = torch.zeros(1, dtype=torch.int32, device=own)
    tests = ("test_schema", "test_faketensor")
    params, grads = (torch.randn(33, 7, device=own) for _ in range(2))
    zeros = [torch.zeros(33, 7, device=own) for _ in range(2)]
    ops = torch.ops.wikigpt
    torch.library.opcheck(ops.grad_norm.default, ([grads, grads.bfloat16()], None, ticket), test_utils=tests)
    update = optimizer.Update(
        [params], [grads], [zeros[0]], [zeros[1]], [], [], [], [torch.zeros((), device=own)], [], None, None, None, ticket,
        [1e-3, 0.9, 0.999, 1e-8, 0.01, 0.0], [1], [0],
    )  # fmt: skip
    torch.library.opcheck(ops.adamw_.default, tuple(update), test_utils=tests)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 0.5, "ema_decay": 0.9}, {"dtype": torch.bfloat16, "stochastic_rounding": True, "zero_grad": True}],
    ids=str,
)
@pytest.mark.parametrize("device", [("cuda", "cuda"), ("cuda", "triton"), ("cuda", "torch")], ids="-".join, indirect=True)
def test_a_cuda_graph_holds_the_step(device, options):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    results = []
    for captured in (False, True):
        params = make_params(dtype, device)
        lr = torch.tensor(1e-3, device=device)
        o = FusedAdamW(params, lr=lr, **options)
        set_grads(params, 0)
        grads = [p.grad for p in params]
        o.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                o.step()
        for step in range(1, 6):
            set_grads(params, step)
            for p, grad in zip(params, grads):
                grad.copy_(p.grad)
                p.grad = grad
            lr.fill_(1e-3 * step)
            graph.replay() if captured else o.step()
        results.append([values(params), state_of(o, params, "step")])
    assert_same(results[0], results[1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{"ema_decay": 0.9}, {"amsgrad": True, "lr": "tensor"}, {"dtype": torch.bfloat16, "stochastic_rounding": True}],
    ids=str,
)
@pytest.mark.parametrize("device", [("cuda", "cuda"), ("cuda", "triton"), ("cuda", "torch")], ids="-".join, indirect=True)
def test_a_step_does_not_wait_for_the_gpu(device, options):
    options = dict(options)
    params = make_params(options.pop("dtype", torch.float32), device)
    if options.get("lr") == "tensor":
        options["lr"] = torch.tensor(1e-3, device=device)
    o = FusedAdamW(params, max_grad_norm=0.5, **options)
    o.grad_scale, o.found_inf = torch.tensor(2.0, device=device), torch.tensor(0.0, device=device)
    run(o, params, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        o.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- the CUDA kernels, emulated ----------------------------------------------------------------------------------------

CODES = {torch.float32: 0, torch.bfloat16: 2, torch.float64: 3}
POINTERS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "ema", "step")


class Entry(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("numel", ctypes.c_int64), ("index", ctypes.c_uint32), ("group", ctypes.c_uint16), ("vector", ctypes.c_uint16),
    )  # fmt: skip


class Group(ctypes.Structure):
    _fields_ = (
        ("lr_tensor", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "log_beta1", "log_beta2", "eps", "weight_decay")),
        ("lr_is_double", ctypes.c_bool), ("maximize", ctypes.c_bool),
    )  # fmt: skip


class Options(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("norm", "grad_scale", "found_inf")),
        ("max_norm", ctypes.c_double), ("ema_decay", ctypes.c_double), ("seed", ctypes.c_uint32),
        *((name, ctypes.c_bool) for name in ("norm_is_double", "decoupled", "zero_grad", "stochastic")),
    )  # fmt: skip


class Emulated:
    """The two implementations that optimizer.cpp makes of csrc/optimizer.cu, with pointers to the CPU's memory."""

    def __init__(self, library):
        self.library = library
        self.ticket = torch.zeros(1, dtype=torch.int32)

    def entries(self, lists, groups=()):
        made = []
        for i, tensors in enumerate(zip(*lists.values())):
            pointers = {name: t.data_ptr() for name, t in zip(lists, tensors)}
            vector = all(p % 16 == 0 for name, p in pointers.items() if name != "step")
            group = next((g for g, (part, _, _) in enumerate(groups) if part.start <= i < part.stop), 0)
            made.append(Entry(**pointers, numel=tensors[0].numel(), index=i, group=group, vector=vector))
        return (Entry * len(made))(*made)

    def grad_norm(self, grads, grad_scale=None, ticket=None):
        chunks = [self.library.emulated_norm_chunks(ctypes.c_int64(g.numel())) for g in grads]
        partials = torch.full((max(1, sum(chunks)),), math.nan, dtype=torch.float64)
        result = torch.full((), math.nan, dtype=optimizer._norm_dtype(grads))
        scale = None if grad_scale is None else ctypes.c_void_p(grad_scale.data_ptr())
        dtypes, before = sorted({g.dtype for g in grads}, key=CODES.get), 0
        for dtype in dtypes:
            run = [i for i, g in enumerate(grads) if g.dtype == dtype]
            self.library.emulated_norm(
                self.entries({"grad": [grads[i] for i in run]}), len(run), CODES[dtype], ctypes.c_void_p(partials.data_ptr()),
                ctypes.c_int64(before), dtype == dtypes[-1], scale, ctypes.c_void_p(result.data_ptr()),
                result.dtype == torch.float64, ctypes.c_void_p(self.ticket.data_ptr()),
            )  # fmt: skip
            before += sum(chunks[i] for i in run)
        assert not self.ticket
        return result

    def adamw(self, u):
        lists = {
            "param": u.params, "grad": u.grads, "exp_avg": u.exp_avgs, "exp_avg_sq": u.exp_avg_sqs,
            "max_exp_avg_sq": u.max_exp_avg_sqs, "master": u.masters, "ema": u.emas, "step": u.steps,
        }  # fmt: skip
        groups = list(u.groups())
        made = [
            Group(
                lr.data_ptr() if u.lrs else None, 0.0 if u.lrs else lr, b1, b2, log(b1), log(b2), eps, decay,
                bool(u.lrs) and lr.dtype == torch.float64, bool(maximize),
            )
            for _, lr, (b1, b2, eps, decay, maximize) in groups
        ]  # fmt: skip
        options = Options(
            *(None if t is None else t.data_ptr() for t in (u.norm, u.grad_scale, u.found_inf)),
            u.max_norm, u.ema_decay, u.seed,
            u.norm is not None and u.norm.dtype == torch.float64, u.decoupled, u.zero_grad, u.stochastic,
        )  # fmt: skip
        entries = self.entries({name: tensors for name, tensors in lists.items() if tensors}, groups)
        for entry, index in zip(entries, u.indices):
            entry.index = index
        self.library.emulated_update(
            entries, len(entries), (Group * len(made))(*made), len(made), ctypes.byref(options), CODES[u.params[0].dtype],
            CODES[u.exp_avgs[0].dtype], ctypes.c_void_p(self.ticket.data_ptr()),
        )  # fmt: skip
        assert not self.ticket


def log(beta):
    return math.log(beta) if beta else -math.inf


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    source = ROOT / "tests" / "emulated_optimizer.cpp"
    subprocess.run(["g++", "-std=c++20", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_norm_chunks.restype = ctypes.c_int64
    return Emulated(loaded)


EMULATED = {
    "float32": {},
    "all": {"amsgrad": True, "ema_decay": 0.9, "max_grad_norm": 0.5, "maximize": True, "zero_grad": True, "betas": (0.4, 0.0)},
    "lr on the device": {"lr": torch.tensor(1e-2, dtype=torch.float64), "max_grad_norm": 0.5},
    "float64": {"dtype": torch.float64, "ema_decay": 0.3, "max_grad_norm": 0.5},
    "bfloat16": {"dtype": torch.bfloat16, "ema_decay": 0.9, "max_grad_norm": 0.5, "amsgrad": True},
    "master": {"dtype": torch.bfloat16, "master_weights": True, "ema_decay": 0.9, "amsgrad": True},
    "stochastic": {
        "dtype": torch.bfloat16,
        "stochastic_rounding": True,
        "max_grad_norm": 0.5,
        "amsgrad": True,
        "zero_grad": True,
    },
    "adam": {"class": FusedAdam, "weight_decay": 0.3},
}


@pytest.mark.parametrize("case", EMULATED)
def test_the_cuda_kernels_emulated_give_what_the_reference_gives(emulated, monkeypatch, case):
    """Three steps, the second one skipped, in two groups with odd ends and one tensor that is not aligned."""
    options = {"lr": 1e-2, "weight_decay": 0.1, **EMULATED[case]}
    dtype, cls = options.pop("dtype", torch.float32), options.pop("class", FusedAdamW)
    shapes = [(29, 401), (37,), (1,), (0,), (), (4099,)]
    runs = []
    for ours in (True, False):
        params = make_params(dtype, shapes=shapes)
        params[5] = torch.nn.Parameter(torch.cat((params[5].detach()[:1], params[5].detach()))[1:])
        groups = [{"params": params[:2]}, {"params": params[2:], "betas": (0.8, 0.99), "eps": 1e-3}]
        o = cls(groups, **options)
        functions = {"grad_norm": emulated.grad_norm, "adamw": emulated.adamw}
        if not ours:
            functions = {"grad_norm": optimizer.grad_norm_reference, "adamw": optimizer.adamw_reference}
        monkeypatch.setattr(optimizer, "choose", lambda op, device_type, functions=functions: functions[op])
        o.grad_scale = torch.tensor(4.0)
        for step in range(3):
            o.found_inf = torch.tensor(float(step == 1))
            set_grads(params, step, scale=4.0)
            before = [p.detach().clone() for p in params]
            o.step()
            assert (step == 1) == all(torch.equal(p, b) for p, b in zip(params, before))
            assert all(bool(p.grad.any()) != bool(options.get("zero_grad")) for p in params if p.numel())
        states = {key: state_of(o, params, key) for key in o.state[params[0]]}
        runs.append({"param": values(params), **states})
        assert (states["step"] == 2).all()
        if o.max_grad_norm is not None:
            runs[-1]["norm"] = o.grad_norm[None]
    assert runs[0].keys() == runs[1].keys()
    for key, a in runs[0].items():
        b = runs[1][key]
        assert a.dtype == b.dtype
        a, b = a.double(), b.double()
        if (
            dtype == torch.bfloat16 and a.numel() > 6
        ):  # where float32 differs in its last bit, another number may be the nearest
            assert torch.isclose(a, b, rtol=2e-6, atol=1e-9).double().mean() > 0.995, key
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)
        else:
            tiny = 1e-13 if dtype == torch.float64 and key != "norm" else 2e-6
            torch.testing.assert_close(
                a, b, rtol=tiny, atol=tiny * float(b.abs().max()), msg=lambda text, key=key: f"{key}: {text}"
            )


def test_a_ticket_is_drawn_between_two_fences(emulated):
    """So that the last block sees what the others did: without them a GPU may show it an older norm, or a later step."""
    grads = [torch.randn(40_000)]
    emulated.grad_norm(grads)
    params, steps = [torch.randn(40_000)], [torch.zeros(())]
    moments = [[torch.zeros(40_000)] for _ in range(2)]
    emulated.adamw(
        optimizer.Update(
            params, grads, *moments, [], [], [], steps, [], None, None, None, None, [1e-3, 0.9, 0.99, 1e-8, 0.0, 0.0], [1], [0]
        )
    )
    assert emulated.library.emulated_missing_fences() == 0


def test_many_tensors_take_several_emulated_launches(emulated, monkeypatch):
    functions = {"grad_norm": emulated.grad_norm, "adamw": emulated.adamw}
    monkeypatch.setattr(optimizer, "choose", lambda op, device_type: functions[op])
    shapes = [(1 + i % 7,) for i in range(380)]
    mine, plain = make_params(shapes=shapes), make_params(torch.float64, shapes=shapes)

    def groups(params):
        return [{"params": params[i::18], "lr": 1e-3 * (1 + i)} for i in range(18)]

    before = emulated.library.emulated_launches()
    a, b = FusedAdamW(groups(mine), max_grad_norm=0.5), torch.optim.AdamW(groups(plain))
    run(a, mine, 1)
    run(b, plain, 1, clip=0.5, dtype=torch.float32)
    assert emulated.library.emulated_launches() - before == 1 + 2  # 370 parameters or 16 groups a launch
    torch.testing.assert_close(values(mine).double(), values(plain), rtol=1e-6, atol=1e-6)
    assert all(float(a.state[p]["step"]) == 1 for p in mine)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, r"lr: got -0.001, allowed is a finite number from 0"),
        ({"lr": math.nan}, r"lr: got nan"),
        ({"lr": torch.tensor([1e-3, 1e-3])}, r"lr: got a tensor of 2 elements, allowed is one"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]: got 1.0, allowed is a number from 0 to below 1"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\]: got -0.1"),
        ({"betas": (0.9,)}, r"betas: got \(0.9,\), allowed are two numbers"),
        ({"eps": -1.0}, r"eps: got -1.0"),
        ({"weight_decay": -0.1}, r"weight_decay: got -0.1"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm: got 0.0, allowed is a finite number above 0, or None"),
        ({"max_grad_norm": math.nan}, r"max_grad_norm: got nan"),
        ({"ema_decay": 1.0}, r"ema_decay: got 1.0, allowed is a number from 0 to below 1, or None"),
        ({"differentiable": True}, r"differentiable: got True, allowed is False"),
        ({"master_weights": True, "stochastic_rounding": True}, r"stochastic_rounding: got True beside master_weights=True"),
        ({"stochastic_rounding": True}, r"stochastic_rounding: got parameters of torch.float32, allowed are bfloat16"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FusedAdamW(make_params(), **options)


OPTIONS = {"lr": 1e-2, "betas": (0.75, 0.5), "eps": 0.125, "weight_decay": 0.25, "max_grad_norm": 0.5, "ema_decay": 0.5}


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.array, Fraction])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_may_be_numbers_of_any_type(device, name, kind):
    """Also in the checkpoint, which torch.load reads with weights_only=True."""
    given = tuple(map(kind, OPTIONS[name])) if name == "betas" else kind(OPTIONS[name])
    results = []
    for options in ({**OPTIONS, name: given}, OPTIONS):
        params = make_params(device=device)
        o = FusedAdamW(params, **options)
        run(o, params, 2)
        results.append([values(params), reloaded(o.state_dict())["state"]])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("wrong", ["0.1", [0.1], 1j], ids=repr)
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_is_no_number_is_named(name, wrong):
    with pytest.raises(TypeError, match=rf"{name}.*: got {type(wrong).__name__}, allowed is a"):
        FusedAdamW(make_params(), **{name: (wrong, 0.9) if name == "betas" else wrong})


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_parameters_that_are_no_floats_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"params: number 1 is {dtype}, torch.strided, allowed are dense tensors of float32"):
        FusedAdamW([torch.ones(3), torch.ones(3, dtype=dtype)])


def test_parameters_that_cannot_be_written_one_by_one_are_refused():
    with pytest.raises(ValueError, match="params: number 1 is expanded, several of its elements share one place in memory"):
        FusedAdamW([torch.ones(3), torch.ones(1, 4).expand(3, 4)])
    FusedAdamW([torch.ones(1, 4).expand(1, 4)])


def test_bad_groups_are_refused_and_leave_the_optimizer_as_it_was():
    o = FusedAdamW(make_params())
    with pytest.raises(ValueError, match=r"lr: got -1"):
        o.add_param_group({"params": make_params(shapes=[(3,)]), "lr": -1.0})
    assert len(o.param_groups) == 1
    with pytest.raises(TypeError):
        FusedAdamW([3.0])
    with pytest.raises(ValueError, match="empty parameter list"):
        FusedAdamW([])


def test_bad_gradients_are_refused_before_anything_changes(own):
    table = torch.nn.Embedding(10, 4, sparse=True).to(own)
    other = torch.nn.Parameter(torch.ones(4, device=own))
    o = FusedAdamW([other, table.weight], max_grad_norm=1.0)
    (table(torch.tensor([1, 2], device=own)).sum() + other.sum()).backward()
    before = values([other, table.weight])
    with pytest.raises(ValueError, match=r"params: the gradient of number 1 is torch.sparse_coo, allowed are dense ones"):
        o.step()
    assert_same(values([other, table.weight]), before)


def test_an_expanded_gradient_is_read_and_refused_where_it_is_written():
    p, q = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    p.grad, q.grad = torch.tensor(2.0).expand(4), torch.full((4,), 2.0)
    FusedAdamW([p]).step()
    FusedAdamW([q]).step()
    assert torch.equal(p, q)
    o = FusedAdamW([q, p], zero_grad=True)
    with pytest.raises(ValueError, match="params: the gradient of number 1 is expanded"):
        o.step()
    assert torch.equal(p, q)
    p.data = torch.ones(1).expand(4)
    with pytest.raises(ValueError, match="params: number 1 is expanded"):
        o.step()


@pytest.mark.gpu
def test_mixed_devices_are_refused():
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="cuda"))
    a.grad, b.grad = torch.ones(3), torch.ones(3, device="cuda")
    with pytest.raises(ValueError, match=r"params: number 1 is on cuda:0, the first one on cpu; allowed is one device"):
        FusedAdamW([a, b]).step()


def test_mixed_devices_are_refused_without_a_gpu_too():
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="meta"))
    a.grad, b.grad = torch.ones(3), torch.ones(3, device="meta")
    o = FusedAdamW([a])
    o.param_groups[0]["params"].append(b)  # the constructor has its own refusals of a meta tensor
    with pytest.raises(ValueError, match=r"params: number 1 is on meta, the first one on cpu; allowed is one device"):
        o.step()


def grow(o, params):
    params[1].data = torch.cat((params[1].detach(), params[1].detach()))
    params[1].grad = torch.ones_like(params[1])


def short_gradient(o, params):
    params[1].data = torch.cat((params[1].detach(), params[1].detach()))  # the gradient stays as it was


def narrow_parameter(o, params):
    params[1].data = params[1].detach().bfloat16()
    params[1].grad = None
    params[1].grad = torch.ones_like(params[1])


def narrow_moment(o, params):
    o.state[params[1]]["exp_avg"] = o.state[params[1]]["exp_avg"].bfloat16()


def load_fewer_rows(o, params):
    saved = o.state_dict()
    for state in saved["state"].values():
        state["exp_avg"] = state["exp_avg"][:32].clone()
    o.load_state_dict(saved)


@pytest.mark.parametrize("change", [grow, short_gradient, narrow_parameter, narrow_moment, load_fewer_rows])
def test_tensors_that_no_longer_fit_their_parameter_are_refused(device, change):
    """A kernel would read and write what is not theirs."""
    params = make_params(device=device, shapes=[(64, 16), (64, 16)])
    o = FusedAdamW(params)
    run(o, params, 1)
    set_grads(params, 1)
    change(o, params)
    with pytest.raises((ValueError, RuntimeError), match=r"shape|dtype"):
        o.step()


def assert_infinity_stays(dtype, weight_decay, device="cpu"):
    mine, plain = (torch.nn.Parameter(torch.tensor([-math.inf, 1.0, math.inf] * 11).to(d, dtype)) for d in (device, "cpu"))
    a = FusedAdamW([mine], lr=0.1, weight_decay=weight_decay)
    b = torch.optim.AdamW([plain], lr=0.1, weight_decay=weight_decay)
    for grad in (0.0, 1.0, -2.0):
        mine.grad, plain.grad = torch.full_like(mine, grad), torch.full_like(plain, grad)
        a.step(), b.step()
    torch.testing.assert_close(mine.detach().cpu(), plain.detach())
    torch.testing.assert_close(a.state[mine]["exp_avg"].cpu(), b.state[plain]["exp_avg"])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_of_infinity_stays_one(device, dtype, weight_decay):
    assert_infinity_stays(dtype, weight_decay, device)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_of_infinity_stays_one_in_the_emulated_cuda_kernels(emulated, monkeypatch, dtype, weight_decay):
    monkeypatch.setattr(optimizer, "choose", lambda op, device_type: {"adamw": emulated.adamw}[op])
    assert_infinity_stays(dtype, weight_decay)


@pytest.mark.parametrize(
    "reset", [lambda o, p: o.state.__setitem__(p, {}), lambda o, p: o.state[p].clear()], ids=["new", "clear"]
)
def test_a_state_that_was_reset_starts_anew(device, reset):
    params = make_params(device=device, shapes=[(5,), (7,)])
    o = FusedAdamW(params)
    run(o, params, 3)
    reset(o, params[0])
    run(o, params, 1)
    assert [float(o.state[p]["step"]) for p in params] == [1, 4]


def test_the_norm_of_scaled_gradients_may_leave_float32(device):
    p = torch.nn.Parameter(torch.ones(16, device=device))
    p.grad = torch.full_like(p, 3e38)
    o = FusedAdamW([p], max_grad_norm=1.0, lr=0.1, weight_decay=0.0)
    o.grad_scale = torch.tensor(65536.0, device=device)
    o.step()
    assert float(o.grad_norm) == pytest.approx(4 * 3e38 / 65536, rel=1e-5)
    torch.testing.assert_close(p.detach().cpu(), torch.full((16,), 0.9))


def test_a_gradient_of_negative_bit_is_read_as_it_is(device):
    p = torch.nn.Parameter(torch.tensor(0.0, device=device))
    p.grad = torch.complex(torch.tensor(1.0), torch.tensor(2.0)).to(device).conj().imag
    assert p.grad.is_neg()
    o = FusedAdamW([p], lr=0.1, weight_decay=0.0)
    o.step()
    assert p.item() == pytest.approx(0.1)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16])
def test_a_count_of_steps_that_is_a_number_keeps_its_digits(default):
    params = make_params(shapes=[(3,)])
    o = torch.optim.AdamW(params)
    run(o, params, 1)
    saved = o.state_dict()
    saved["state"][0]["step"] = 100_001
    mine = FusedAdamW(params)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        mine.load_state_dict(saved)
    finally:
        torch.set_default_dtype(before)
    assert float(mine.state[params[0]]["step"]) == 100_001


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_options_may_be_switched_on_between_steps(device, option):
    params = make_params(torch.bfloat16, device, [(40,)])
    o = FusedAdamW(params, lr=1e-5)
    run(o, params, 1)
    setattr(o, option, True)
    before = values(params)
    run(o, params, 300 if option == "stochastic_rounding" else 1, first=1)
    if option == "master_weights":
        assert o.state[params[0]]["master"].dtype == torch.float32
    else:  # steps too small for rounding to the nearest
        assert not torch.equal(before, values(params))


def test_a_direct_call_of_the_operator_stays_inside_its_memory(own):
    one, two = torch.ones(3, device=own), torch.ones(4, device=own)
    step, ticket = torch.zeros((), device=own), torch.zeros(1, dtype=torch.int32, device=own)
    hyper = [1e-3, 0.9, 0.999, 1e-8, 0.01, 0.0]

    def call(*, param=one, grad=one, m=one, v=one, step=step, hyper=hyper, counts=(1,)):
        call = torch.ops.wikigpt.adamw_
        rest = [[], [], [], [step], [], None, None, None, ticket, hyper, list(counts), [0], 1.0, 0.0, True, False, False, 0]
        call([param], [grad], [m], [v], *rest)

    for changes, message in (
        ({"grad": two}, "grads: tensor 0 has another shape"),
        ({"v": two}, "exp_avg_sqs: tensor 0 has another shape"),
        ({"m": one.double()}, "exp_avgs: have another dtype"),
        ({"grad": one.half()}, "grads: tensor 0 has another dtype"),
        ({"param": two.expand(5, 4)}, "params: tensor 0 does not fill its memory"),
        ({"step": torch.zeros(2, device=own)}, "steps: tensor 0 must have one element"),
        ({"hyper": hyper[:5]}, "hyper: 6 numbers"),
        ({"counts": (2,)}, "counts: more than there are params"),
        ({"counts": (0,)}, "counts: fewer than there are params"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**changes)
