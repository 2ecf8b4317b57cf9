"""What tests/test_fake_gpu.py runs in a process with a fake GPU: kernels and calls, some with a planted fault."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

from bench import fake_gpu

RECORDER = fake_gpu.install_if_asked()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from wikigpt.kernels import _launch as launch_helpers  # noqa: E402

from wikigpt import kernels  # noqa: E402

Found = tuple[list[fake_gpu.Launch], dict[str, int]]


@triton.jit
def scaled(X, Y, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n) * factor, mask=i < n)


@triton.jit(do_not_specialize=["n"])
def scaled_of_any_length(X, Y, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n) * factor, mask=i < n)


def recorder() -> fake_gpu.Recorder:
    assert RECORDER is not None
    RECORDER.clear()
    return RECORDER


def numbers(n: int = 64) -> torch.Tensor:
    return torch.zeros(n, device="cuda")


def launch(grid: tuple[int, ...] = (1,), counting: bool = False) -> tuple[list[fake_gpu.Launch], list[int]]:
    """(launches of `scaled`, the addresses it was given)"""
    r, x, y = recorder(), numbers(), numbers()
    if counting:
        with r.counting():
            scaled[grid](x, y, 50, 0.5, BLOCK=64)
            return r.launches, [x.data_ptr(), y.data_ptr()]
    scaled[grid](x, y, 50, 0.5, BLOCK=64)
    return r.launches, [x.data_ptr(), y.data_ptr()]


def launch_unaligned() -> list[fake_gpu.Launch]:
    """A kernel that is kept and launched again without a look at the pointers."""
    r, x, y = recorder(), numbers(), numbers()
    kernel = scaled[(1,)](x, y, 48, 0.5, BLOCK=64)
    r.clear()
    kernel[(1, 1, 1)](x[1:], y, 48, 0.5, 64)
    return r.launches


def launch_for_the_second_device(guarded: bool) -> list[int]:
    r = recorder()
    with r.tensors_on(1):
        x, y = numbers(), numbers()
        if guarded:
            with launch_helpers.device_of(x):
                scaled[(1,)](x, y, 64, 0.5, BLOCK=64)
        else:
            scaled[(1,)](x, y, 64, 0.5, BLOCK=64)
    return [launch.device for launch in r.launches]


def compile_lengths(name: str) -> int:
    """How many kernels lengths 1 to 40 compile."""
    kernel = {"scaled": scaled, "scaled_of_any_length": scaled_of_any_length}[name]
    r, x, y = recorder(), numbers(), numbers()
    with r.counting():
        for n in range(1, 41):
            kernel[(1,)](x, y, n, 0.5, BLOCK=64)
        return r.compiled[f"fake_gpu_cases.{name}"]


def forget_and_compile_again() -> list[int]:
    r, x, y = recorder(), numbers(), numbers()
    counts = []
    for forgetting in (False, False, True):
        r.forget_kernels() if forgetting else r.clear()
        scaled[(1,)](x, y, 64, 0.5, BLOCK=64)
        counts.append(r.compiled["fake_gpu_cases.scaled"])
    return counts


def describe(address: int = 4096, stride: int = 256, box: int = 64) -> int:
    """The driver's answer to a tensor descriptor of (100, 128) numbers of bfloat16, read in blocks of (box, 64)."""
    two, longs, ints = 2, ctypes.c_uint64 * 2, ctypes.c_uint32 * 2
    return fake_gpu._library().cuTensorMapEncodeTiled(
        ctypes.create_string_buffer(128), 9, two, ctypes.c_void_p(address), longs(128, 100), longs(stride, 0), ints(64, box),
        ints(1, 1), 0, 3, 0, 0,
    )  # fmt: skip


# --- what waits for a device --------------------------------------------------------------------------------------------

WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "Tensor.item": lambda x: x[0].item(),
    "Tensor.tolist": lambda x: x.tolist(),
    "Tensor.__bool__": lambda x: bool(x[0] > 0),
    "Tensor.__int__": lambda x: int(x[0]),
    "Tensor.__float__": lambda x: float(x[0]),
    "Tensor.__index__": lambda x: [0][x[0].int()],
    'Tensor.to("cpu")': lambda x: x.cpu(),
    "Tensor.numpy": lambda x: x.numpy(),
    "Tensor.nonzero": lambda x: x.nonzero(),
    "torch.nonzero": lambda x: torch.nonzero(x),
    "torch.equal": lambda x: torch.equal(x, x),
    "torch.where": lambda x: torch.where(x > 0),
    "Tensor.__getitem__": lambda x: x[x > 0],
    "Tensor.__setitem__": lambda x: x.__setitem__(x == 0, x.clone()),
    "torch.tensor": lambda x: torch.tensor([1.0], device="cuda"),
    "without a device": lambda x: torch.zeros(3),
    "torch.cuda.synchronize": lambda x: torch.cuda.synchronize(),
    "Event.synchronize": lambda x: torch.cuda.Event().synchronize(),
    "Stream.synchronize": lambda x: torch.cuda.current_stream().synchronize(),
}


def wait(name: str, how: str) -> str | None:
    """What HostSynchronisation says of a call, or None. how: "strictly", "allowed" inside strictness, or "freely"."""
    r, x = recorder(), numbers()
    try:
        if how == "freely":
            WAITS[name](x)
        else:
            with r.strictly():
                if how == "strictly":
                    WAITS[name](x)
                else:
                    with r.may_synchronise():
                        WAITS[name](x)
    except fake_gpu.HostSynchronisation as error:
        return str(error)
    return None


def wait_inside_an_op() -> str | None:
    """A registered operator whose body reads a value."""

    @torch.library.custom_op("fake_gpu_cases::reads", mutates_args=())
    def reads(x: torch.Tensor) -> torch.Tensor:
        return x * x[0].item()

    r, x = recorder(), numbers()
    try:
        with r.strictly():
            reads(x)
    except fake_gpu.HostSynchronisation as error:
        return str(error)
    return None


def assign_under_a_mask() -> None:
    """A number goes to masked places without a look at how many there are."""
    r, x = recorder(), numbers()
    with r.strictly():
        x[x == 0] = 1.0


# --- what PyTorch says in such a process ----------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    x = torch.empty(3, device="cuda")
    properties = torch.cuda.get_device_properties(0)
    with torch.autocast("cuda"):
        autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), (x[None] @ x[:, None]).dtype)
    with torch.device("cuda"):
        inside = torch.ones(2)
    return {
        "device": str(x.device),
        "is_cuda": x.is_cuda,
        "index": x.get_device(),
        "of a result": str((x + 1).device),
        "of a module": str(torch.nn.Linear(2, 2).to("cuda").weight.device),
        "inside a device": str(inside.device),
        "of a generator": str(torch.Generator("cuda").device),
        "on meta": str(torch.empty(3, device="meta").device),
        "available": torch.cuda.is_available(),
        "name": properties.name,
        "capability": torch.cuda.get_device_capability(),
        "multiprocessors": properties.multi_processor_count,
        "current": torch.cuda.current_device(),
        "autocast": autocast,
        "compiled": torch.compile(facts) is facts and torch.compile(dynamic=False)(facts) is facts,
        "wide product": torch.mm(x[:, None].bfloat16(), x[None].bfloat16(), out_dtype=torch.float32).dtype,
    }


def capture() -> tuple[int, bool, bool]:
    """(how often the body ran, whether it was said to be captured inside, and afterwards)"""
    graph, ran, seen = torch.cuda.CUDAGraph(), [], []
    with torch.cuda.graph(graph):
        ran.append(1)
        seen.append(torch.cuda.is_current_stream_capturing())
    graph.replay()
    return len(ran), seen[0], torch.cuda.is_current_stream_capturing()


def elapsed() -> float:
    """Milliseconds that an event saw of 20."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    time.sleep(0.02)
    end.record()
    return begin.elapsed_time(end)


def current_devices() -> list[int]:
    seen = [torch.cuda.current_device()]
    with torch.cuda.device(1):
        seen.append(torch.cuda.current_device())
        with torch.cuda.device("cuda:0"):
            seen.append(torch.cuda.current_device())
        seen.append(torch.cuda.current_device())
    return [*seen, torch.cuda.current_device()]


def step_of_adamw() -> tuple[float, float]:
    """A parameter after a step of csrc's operator, and the least id that its sampling gives."""
    p = torch.nn.Parameter(torch.ones(3, device="cuda"))
    p.grad = torch.ones_like(p)
    kernels.FusedAdamW([p], lr=0.5, weight_decay=0.0).step()
    return float(p.detach()[0]), float(kernels.sample(torch.zeros(2, 9, device="cuda")).min())


def install_again() -> tuple[bool, str]:
    same = fake_gpu.install(90) is RECORDER
    try:
        fake_gpu.install(80)
    except RuntimeError as error:
        return same, str(error)
    return same, ""
