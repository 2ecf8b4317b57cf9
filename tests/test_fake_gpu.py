"""The fake GPU itself: what it says it is, what it keeps of a launch, and that it finds the faults for which it is there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton, which compiles and launches, is for Linux alone")

from bench import fake_gpu
from tests import fake_gpu_cases as cases
from tests.conftest import ROOT

Process = Callable[..., Any]


@pytest.fixture(scope="module")
def there() -> Iterator[Process]:
    """Runs a function of fake_gpu_cases in a process with a fake H100."""
    with fake_gpu.process(90) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


# --- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counting", [False, True], ids=["compiled", "counted"])
def test_a_launch_is_kept_with_its_grid_and_arguments(counting, there):
    launches, addresses = there(cases.launch, (3, 2), counting)
    assert [launch.kernel for launch in launches] == ["fake_gpu_cases.scaled"]
    launch = launches[0]
    assert launch.grid == (3, 2, 1)
    assert launch.num_warps == 4
    assert [launch.arguments[name] for name in ("X", "Y", "n", "factor")] == [*addresses, 50, 0.5]
    assert launch.aligned == {"X", "Y"}


def test_kernels_are_forgotten_when_it_is_asked_to(there):
    assert there(cases.forget_and_compile_again) == [1, 0, 1]


@pytest.mark.parametrize(
    ("grid", "axis"), [((2**31,), "x"), ((1, 70_000), "y"), ((1, 1, 70_000), "z"), ((0,), "x")], ids=lambda part: str(part)
)
def test_a_grid_beyond_the_limits_is_found(grid, axis, there):
    launches, _ = there(cases.launch, grid, True)
    assert [line.split(": ")[1].split(" is")[0] for line in fake_gpu.broken_limits(launches, 90)] == [f"grid {axis}"]


def test_the_largest_grid_is_within_the_limits(there):
    launches, _ = there(cases.launch, (2**31 - 1, 65_535, 65_535), True)
    assert not fake_gpu.broken_limits(launches, 90)


def test_a_pointer_that_is_not_aligned_as_its_kernel_expects_is_found(there):
    assert [line.split(" is")[0] for line in fake_gpu.broken_limits(there(cases.launch_unaligned), 90)] == [
        "fake_gpu_cases.scaled: X"
    ]


@pytest.mark.parametrize(("arch", "shared", "fits"), [(90, 232_448, True), (90, 232_449, False), (80, 232_448, False)])
def test_shared_memory_beyond_the_limit_is_found(arch, shared, fits):
    launch = fake_gpu.Launch("kernel", (1, 1, 1), 0, 4, shared, {}, frozenset())
    assert (not fake_gpu.broken_limits([launch], arch)) == fits


@pytest.mark.parametrize("fault", [(4104,), (4096, 258), (4096, 256, 257)], ids=["address", "stride", "box"])
def test_a_tensor_descriptor_that_a_gpu_refuses_is_refused(fault, there):
    assert there(cases.describe) == 0
    assert there(cases.describe, *fault) != 0


def test_a_launch_on_another_device_than_its_tensors_is_seen(there):
    assert there(cases.launch_for_the_second_device, True) == [1]
    assert there(cases.launch_for_the_second_device, False) == [0]


def test_a_length_that_is_specialised_is_counted(there):
    assert there(cases.compile_lengths, "scaled") == 3  # 1, multiples of 16, all others
    assert there(cases.compile_lengths, "scaled_of_any_length") == 1


# --- synchronisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.WAITS)
def test_what_waits_for_the_device_is_found(name, there):
    assert there(cases.wait, name, "strictly") is not None


@pytest.mark.parametrize("name", cases.WAITS)
def test_waiting_is_allowed_where_it_is_said_so_and_without_strictness(name, there):
    assert there(cases.wait, name, "allowed") is None
    assert there(cases.wait, name, "freely") is None


def test_the_call_that_waits_is_named(there):
    assert there(cases.wait, "Tensor.item", "strictly").startswith("Tensor.item:")


def test_waiting_inside_a_registered_operator_is_found(there):
    assert there(cases.wait_inside_an_op).startswith("Tensor.item:")


def test_a_number_for_masked_places_waits_for_nothing(there):
    there(cases.assign_under_a_mask)


# --- what PyTorch says ----------------------------------------------------------------------------------------------


def test_every_tensor_says_that_it_is_on_the_gpu(there):
    facts = there(cases.facts)
    assert {facts[name] for name in ("device", "of a result", "of a module", "inside a device")} == {"cuda:0"}
    assert facts["is_cuda"] is True
    assert facts["index"] == 0
    assert facts["of a generator"] == "cuda:0"
    assert facts["on meta"] == "meta"


def test_the_card_is_an_h100_that_nobody_takes_for_one(there):
    facts = there(cases.facts)
    assert facts["available"] is True
    assert (facts["capability"], facts["multiprocessors"]) == ((9, 0), 132)
    assert facts["name"].startswith("fake ")


def test_autocast_is_that_of_a_gpu(there):
    assert there(cases.facts)["autocast"] == (True, torch.float16, torch.float16)


def test_products_may_have_a_wider_result(there):
    assert there(cases.facts)["wide product"] == torch.float32


def test_nothing_is_compiled_by_pytorch(there):
    assert there(cases.facts)["compiled"] is True


def test_a_graph_runs_once_when_it_is_captured(there):
    assert there(cases.capture) == (1, True, False)


def test_events_measure_the_time_of_the_host(there):
    assert 20 <= there(cases.elapsed) < 2000


def test_the_current_device_is_that_of_the_innermost_block(there):
    assert there(cases.current_devices) == [0, 1, 0, 1, 0]


def test_the_extensions_operators_compute(there):
    weight, token = there(cases.step_of_adamw)
    assert weight == pytest.approx(0.5, abs=1e-3)
    assert token >= 0


# --- installing -----------------------------------------------------------------------------------------------------


def test_a_second_fake_of_another_kind_is_refused(there):
    same, message = there(cases.install_again)
    assert same
    assert "sm_90" in message


def test_it_is_not_installed_unless_it_is_asked_for():
    assert fake_gpu.installed() is None


@pytest.mark.parametrize("arguments", ["70", "90, 'some'"])
def test_what_it_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match="allowed are 80, 90, 100; real and none"):
        eval(f"fake_gpu.install({arguments})")


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` with nothing but this of what concerns Triton and the fake."""
    left = {name: value for name, value in os.environ.items() if name not in (fake_gpu.ASKED, "TRITON_INTERPRET")}
    everything = {**left, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=everything, capture_output=True, text=True)


def test_what_kernels_would_write_is_zero_unless_memory_is_to_be_left_as_it_comes():
    code = "import bench, torch; x = torch.ones(2**20); del x; print(torch.empty(2**20, device='cuda').sum().item())"
    assert in_a_process(code, **{fake_gpu.ASKED: "90"}).stdout.strip() == "0.0"
    assert in_a_process(code, **{fake_gpu.ASKED: "90,untouched"}).stdout.strip() != ""


def test_what_cannot_be_asked_for_is_refused():
    assert "allowed are an architecture" in in_a_process("import bench", **{fake_gpu.ASKED: "90,real"}).stderr


@pytest.mark.parametrize(
    ("before", "message"),
    [("import wikigpt.kernels", "before the fake GPU"), ("import triton", "TRITON_INTERPRET was set")],
    ids=["kernels imported", "triton interprets"],
)
def test_it_is_refused_where_it_is_too_late(before, message):
    code = f"{before}; from bench import fake_gpu; fake_gpu.install(90)"
    assert message in in_a_process(code, TRITON_INTERPRET="1").stderr
