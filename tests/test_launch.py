"""Every public function up to the launch, on a GPU that is not there: compiled for it, specialised, launched, not computed.

Between the interpreter, which shows what kernels compute, and hardware: what would fail or stall there before a kernel begins.
Processes with a fake GPU (bench/fake_gpu.py) run what tests/launch_cases.py names, because in this one Triton interprets.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton, which compiles and launches, is for Linux alone")

from wikigpt.kernels._dispatch import extension_lacks

from bench import bench_host, fake_gpu
from tests import launch_cases as cases
from wikigpt import kernels

pytestmark = pytest.mark.slow

Process = Callable[..., Any]  # (function of launch_cases, arguments) -> what it gives there
# What is compiled for other architectures: matrix units, descriptors and block sizes differ there.
OTHER_ARCHITECTURES = ("flash causal", "flash mask", "flash head_dim 1, far apart", "kvcache paged", "layer_norm", "rotary")


@pytest.fixture(scope="module")
def process() -> Iterator[Callable[[int], Process]]:
    """Processes with a fake GPU, by architecture. Each lives as long as this file, because it takes seconds to start; what is
    compiled in it is in Triton's own cache for the next."""
    pools: dict[int, ProcessPoolExecutor] = {}

    def of(arch: int) -> Process:
        if arch not in pools:
            pools[arch] = fake_gpu.process(arch)
        return lambda function, *arguments: pools[arch].submit(function, *arguments).result()

    yield of
    for pool in pools.values():
        pool.shutdown()


@pytest.fixture
def h100(process) -> Process:
    return process(90)


def needs_extension(names: Iterable[Any], chosen: Container[Any]) -> list[Any]:
    """Parameters, those chosen skipped where csrc/ is not built: what stands in for its operators waits for the device."""
    mark = pytest.mark.skipif(extension_lacks("cpu", "sample_rows") is not None, reason="csrc/ is not built")
    return [pytest.param(name, marks=mark) if name in chosen else name for name in names]


# --- each function and feature --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", needs_extension(cases.CASES, cases.EXTENSION))
def test_it_is_launched_within_the_limits_and_waits_for_nothing(name, h100):
    """Compiled for sm_90, forward and backward. One test, because what takes the time is to compile."""
    found = h100(cases.run, name)
    assert found.launches or name in cases.EXTENSION
    assert not fake_gpu.broken_limits(found.launches, 90)


# Of wikigpt.kernels, what is no op with a kernel of its own.
NO_OPS = {"CrossEntropyAux", "attention_weights", "backend", "debug_checks", "explain", "gelu", "ops"}


def test_every_public_function_is_launched_here(h100):
    public = {name for name in kernels.__all__ if callable(getattr(kernels, name))}
    assert public - h100(cases.functions_called) == NO_OPS


@pytest.mark.parametrize("arch", [80, 100], ids="sm_{}".format)
@pytest.mark.parametrize("name", OTHER_ARCHITECTURES)
def test_it_is_launched_within_the_limits_of_other_architectures(name, arch, process):
    found = process(arch)(cases.run, name)
    assert found.launches
    assert not fake_gpu.broken_limits(found.launches, arch)


@pytest.mark.parametrize("name", needs_extension(cases.MODELS, cases.MODELS))
def test_a_model_waits_for_nothing(name, h100):
    found = h100(cases.run_model, name)
    assert found.launches
    assert not fake_gpu.broken_limits(found.launches, 90)


@pytest.mark.parametrize("name", cases.ATTENTION | cases.OTHERS | cases.ADAMW)
def test_it_is_launched_where_its_tensors_are(name, h100):
    launches = h100(cases.run_elsewhere, name).launches
    assert launches
    assert {launch.device for launch in launches} == {1}, "0 is the current device, the tensors are on 1"


def test_a_kernel_that_is_launched_again_gets_arguments_of_its_own(h100):
    """AdamW looks for its kernel once a step. Sizes that Triton compiles anew for stand between those that it does not."""
    given, expected = h100(cases.adamw_in_triton, (64, 80, 5, 0, 4096, 1, 80, 33, 160))
    assert given == expected


@pytest.mark.parametrize("name", cases.EXTREMES)
def test_extreme_shapes_are_launched_within_the_limits(name, h100):
    found = h100(cases.run_extreme, name)
    assert found.launches
    assert not fake_gpu.broken_limits(found.launches, 90)


@pytest.mark.parametrize("name", cases.SWEEPS)
def test_other_sizes_compile_no_other_kernel(name, h100):
    compiled = h100(cases.sweep, name).compiled
    assert compiled
    allowed = cases.SWEEPS[name].allowed
    assert not {kernel: count for kernel, count in compiled.items() if count > allowed.get(kernel, 1)}


# --- host time ------------------------------------------------------------------------------------------------------

# Of ours in times of PyTorch's, what was measured (bench/bench_host.py) and half of it more: a mark against slipping, no goal.
HOST_LIMITS = {
    ("rms_norm", "no grad"): 12,
    ("rms_norm", "forward with grad"): 15,
    ("rms_norm", "forward + backward"): 6,
    ("layer_norm", "no grad"): 40,
    ("layer_norm", "forward with grad"): 50,
    ("layer_norm", "forward + backward"): 15,
    ("flash_attn_func", "no grad"): 28,
    ("flash_attn_func", "forward with grad"): 40,
    ("flash_attn_func", "forward + backward"): 13,
    ("scaled_dot_product_attention", "no grad"): 31,
    ("scaled_dot_product_attention", "forward with grad"): 54,
    ("scaled_dot_product_attention", "forward + backward"): 14,
    ("kvcache append + decode", "no grad"): 24,
    ("swiglu", "no grad"): 44,
    ("swiglu", "forward with grad"): 45,
    ("swiglu", "forward + backward"): 11,
    ("apply_rotary_emb", "no grad"): 11,
    ("apply_rotary_emb", "forward with grad"): 11,
    ("apply_rotary_emb", "forward + backward"): 6,
    ("cross_entropy", "no grad"): 51,
    ("cross_entropy", "forward with grad"): 49,
    ("cross_entropy", "forward + backward"): 17,
    ("linear_cross_entropy", "no grad"): 30,
    ("linear_cross_entropy", "forward with grad"): 33,
    ("linear_cross_entropy", "forward + backward"): 12,
    ("AdamW step", "no grad"): 1.1,
    ("sample", "no grad"): 1.2,
}
EXTENSION = (("AdamW step", "no grad"), ("sample", "no grad"))


@pytest.fixture(scope="module")
def host() -> Iterator[bench_host.Worker]:
    worker = bench_host.Worker()
    yield worker
    worker.close()


def test_every_call_has_a_limit():
    assert HOST_LIMITS.keys() == set(bench_host.cases())


@pytest.mark.parametrize("case", needs_extension(HOST_LIMITS, EXTENSION), ids=", ".join)
def test_a_call_costs_the_host_no_more_than_it_did(case, host):
    peer = bench_host.OPS[case[0]][1][0]
    for rounds in (10, 60):  # on a busy machine the least of a few may be too much
        seconds = host.measure(case, rounds)
        ratio = min(seconds["ours"]) / min(seconds[peer])
        if ratio <= HOST_LIMITS[case]:
            break
    assert ratio <= HOST_LIMITS[case]
