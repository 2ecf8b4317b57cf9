"""A GPU for a process that has none: everything runs up to the launch, which is noted and does nothing.

    recorder = fake_gpu.install(90)             # before wikigpt.kernels is imported
    y = rms_norm(torch.randn(4, 64, device="cuda"))
    recorder.launches                           # [Launch("norm_triton._forward", grid=(1, 1, 1), ...)]

In such a process every tensor says in Python that it is on a GPU while PyTorch's C++ sees tensors of the CPU, so what PyTorch
computes is computed and what a kernel of ours writes is not. Kernels are compiled for the architecture by the real compiler and
launched by Triton's own launcher into a libcuda of ours (fake_cuda.c). csrc's operators compute with their implementations for
the CPU. torch.compile gives back what it is given, a captured graph runs once and its replay does nothing, durations are the
host's, synchronisation is over at once.

What it cannot show: what kernels compute, their time, memory that a GPU would not have, and a tensor that was left on the host,
as all of them claim the GPU (strictness finds those made by a factory that names no device).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import multiprocessing
import operator
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _device

ASKED = "WIKIGPT_FAKE_GPU"
"""In the environment "90" installs the fake of this architecture. After commas: "none" compiles nothing, "untouched" leaves
memory as it comes, so that tensors may be larger than the machine."""

_torch: Any = torch  # what is patched is not what its types say

GiB, MiB, KiB = 2**30, 2**20, 2**10


@dataclass(frozen=True)
class Card:
    """What PyTorch says of a device. The name begins with "fake", so that no result can pass for a GPU's."""

    name: str
    multiprocessors: int
    memory: int
    l2: int
    shared: int  # of a block


CARDS = {
    80: Card("fake NVIDIA A100-SXM4-80GB", 108, 80 * GiB, 40 * MiB, 163 * KiB),
    90: Card("fake NVIDIA H100 80GB HBM3", 132, 80 * GiB, 50 * MiB, 227 * KiB),
    100: Card("fake NVIDIA B200", 148, 180 * GiB, 126 * MiB, 227 * KiB),
}


class HostSynchronisation(RuntimeError):
    """Under strictness: a call that on a GPU makes the host wait for the device, or puts a tensor on the host."""


# --- what was launched ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch, as the driver got it. A pointer among the arguments is its address, a tensor descriptor the address that it
    describes. `aligned` names arguments that the kernel was compiled to find at a multiple of 16."""

    kernel: str  # file.function
    grid: tuple[int, int, int]
    device: int  # that was current
    num_warps: int
    shared: int  # bytes
    arguments: dict[str, Any]
    aligned: frozenset[str]


@dataclass(frozen=True)
class _Signature:
    """A compiled kernel's parameters, in order: (name, type), and which of them it takes to be multiples of 16."""

    kernel: str
    parameters: list[tuple[str, str]]
    aligned: frozenset[str]


_FORMATS = {
    "i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "?", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp16": "e", "bf16": "H", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip


def _format(kind: str) -> str:
    return "Q" if kind.startswith(("*", "nvTmaDesc")) else _FORMATS[kind]


def _flat(name: str, kind: Any, has_tma: bool) -> Iterator[tuple[str, str]]:
    """The parameters of one argument: a tuple has several, a tensor descriptor its shape and strides besides."""
    if isinstance(kind, tuple):
        for i, part in enumerate(kind):
            yield from _flat(f"{name}.{i}", part, has_tma)
    elif kind.startswith("tensordesc"):
        rank = kind.partition("[")[2].partition("]")[0].count(",") + 1
        if has_tma:
            yield name, "nvTmaDesc"
        else:  # made inside the kernel from these
            yield name, "*" + kind.removeprefix("tensordesc<").partition("[")[0]
            yield from ((f"{name}.{what}", "i64") for what in range(2 * rank))
            yield from ((f"{name}.{what}", "i1") for what in ("padding", "round"))
        yield from ((f"{name}.shape.{i}", "i32") for i in range(rank))
        yield from ((f"{name}.stride.{i}", "i64") for i in range(rank))
    elif kind != "constexpr":
        yield name, kind


def _name(function: Any) -> str:
    """file.function: kernels of different ops may have the same name."""
    return f"{function.module.rpartition('.')[2]}.{function.fn.__name__}"


def _aligned(function: Any, attributes: Any) -> frozenset[str]:
    def name(path: Any) -> str:
        first, *rest = path
        return ".".join([function.arg_names[first], *map(str, rest)])

    return frozenset(
        name(path) for path, found in attributes.items() for what, value in found if (what, value) == ("tt.divisibility", 16)
    )


def _signature(kernel: Any) -> _Signature:
    source = kernel.src
    has_tma = bool(getattr(kernel.metadata, "tensordesc_meta", None))
    parameters = [part for name, kind in source.signature.items() for part in _flat(name, kind, has_tma)]
    return _Signature(_name(source.fn), parameters, _aligned(source.fn, source.attrs))


GRID = (2**31 - 1, 65_535, 65_535)  # CUDA's limits


def broken_limits(launches: Iterable[Launch], arch: int) -> list[str]:
    """What a GPU would refuse or read wrong in these launches, in words."""
    broken = []
    for launch in launches:
        for axis, size, most in zip("xyz", launch.grid, GRID):
            if not 1 <= size <= most:
                broken.append(f"{launch.kernel}: grid {axis} is {size:,}, allowed are 1 to {most:,}")
        if launch.shared > CARDS[arch].shared:
            broken.append(f"{launch.kernel}: {launch.shared:,} bytes of shared memory, allowed are {CARDS[arch].shared:,}")
        for name in sorted(launch.aligned):
            value = launch.arguments[name]
            if value % 16:
                broken.append(f"{launch.kernel}: {name} is {value}, the kernel was compiled for a multiple of 16")
    return broken


class _Record(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("parameters", ctypes.c_uint64 * 192),
    )


class Recorder:
    """What the process launched and compiled, and what the fake does."""

    def __init__(self, arch: int, compiles: str):
        self.arch, self.compiles, self.card = arch, compiles, CARDS[arch]
        self.compiled: Counter[str] = Counter()
        """Kernel -> specialisations of it that were compiled, or would have been."""
        self.device = 0  # that is current
        self.capturing = False
        self._strict = False
        self._counted: list[Launch] = []  # where nothing is compiled
        self._functions: dict[int, _Signature] = {}
        self._kernels: set[Any] = set()

    # --- launches ---

    def _variable(self, kind: Any, name: str) -> Any:
        return kind.in_dll(_library(), name)

    @property
    def launched(self) -> int:
        """Launches since the process began, those that were not kept too."""
        return self._variable(ctypes.c_long, "launched").value

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Launches inside the block are not kept in `launches`."""
        recording = self._variable(ctypes.c_int, "recording")
        recording.value = 0
        try:
            yield
        finally:
            recording.value = 1

    @property
    def launches(self) -> list[Launch]:
        """Those since `clear`, in order."""
        if self.compiles == "none":
            return list(self._counted)
        count = self._variable(ctypes.c_long, "n_launches").value
        records = self._variable(ctypes.POINTER(_Record), "launches")
        return [self._launch(records[i]) for i in range(count)]

    def _launch(self, record: Any) -> Launch:
        signature = self._functions[record.function]
        arguments = {}
        for (name, kind), word in zip(signature.parameters, record.parameters):
            form = _format(kind)
            arguments[name] = struct.unpack(form, word.to_bytes(8, "little")[: struct.calcsize(form)])[0]
        return Launch(
            signature.kernel, tuple(record.grid), record.stream & 0xFF, record.block[0] // 32, record.shared, arguments,
            signature.aligned,
        )  # fmt: skip

    def clear(self) -> None:
        """Forget launches and counts; compiled kernels stay."""
        self._counted.clear()
        self.compiled.clear()
        _library().forget()

    def forget_kernels(self) -> None:
        """Forget compiled kernels too, as a new process."""
        for kernel in self._kernels:
            kernel.device_caches.clear()
        self.clear()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Inside the block nothing is compiled, and specialisations are counted as in a new process."""
        before, self.compiles = self.compiles, "none"
        self.forget_kernels()
        try:
            yield
        finally:
            self.compiles = before
            self.forget_kernels()

    def _loaded(self, kernel: Any) -> None:
        """Tell libcuda what parameters a function has, so that it keeps them."""
        signature = self._functions[kernel.function] = _signature(kernel)
        sizes = bytes(struct.calcsize(_format(kind)) for _, kind in signature.parameters)
        if _library().describe(ctypes.c_uint64(kernel.function), len(sizes), sizes):
            raise RuntimeError(f"{signature.kernel} has {len(sizes)} parameters, more than fake_cuda.c keeps")

    # --- where tensors are ---

    @contextlib.contextmanager
    def tensors_on(self, device: int) -> Iterator[None]:
        """Inside the block every tensor claims to be on this device."""
        before, _torch.Tensor._claimed = _torch.Tensor._claimed, torch.device("cuda", device)
        try:
            yield
        finally:
            _torch.Tensor._claimed = before

    # --- synchronisation ---

    def synchronises(self, call: str) -> None:
        """HostSynchronisation under strictness."""
        if self._strict:
            raise HostSynchronisation(f"{call}: the host would wait for the device here")

    @contextlib.contextmanager
    def _strictness(self, strict: bool) -> Iterator[None]:
        before, self._strict = self._strict, strict
        try:
            yield
        finally:
            self._strict = before

    def strictly(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block what would wait for the device raises HostSynchronisation."""
        _refuse_synchronisation()
        return self._strictness(True)

    def may_synchronise(self) -> contextlib.AbstractContextManager[None]:
        return self._strictness(False)


# --- Triton's driver ------------------------------------------------------------------------------------------------


@functools.cache
def _library() -> ctypes.CDLL:
    """Our libcuda, built where it is not there yet, loaded by its soname before anybody asks for NVIDIA's."""
    source = Path(__file__).with_name("fake_cuda.c")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"wikigpt-fake-cuda-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for name in ("libcuda.so", "libcuda.so.1"):
        if not (folder / name).exists():
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                pass
            command = ["gcc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", file.name, str(source)]
            subprocess.run(command, check=True)
            os.replace(file.name, folder / name)  # all of it or nothing: another process may look for it now
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)


class _Uncompiled:
    """In the place of a compiled kernel: it keeps what it is launched with."""

    function = 0
    packed_metadata = ()

    def __init__(self, recorder: Recorder, function: Any, attributes: Any, num_warps: int):
        self.recorder, self.name, self.names = recorder, _name(function), function.arg_names
        self.aligned, self.num_warps = _aligned(function, attributes), num_warps

    def launch_metadata(self, *_: Any) -> None:
        return None

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        """Triton's way to launch once more what a launch has given back."""

        def launch(*arguments: Any) -> None:
            from triton.runtime.driver import driver

            stream = driver.active.get_current_stream(driver.active.get_current_device())
            self.run(*grid, stream, self.function, self.packed_metadata, None, None, None, *arguments)

        return launch

    def run(self, x: int, y: int, z: int, stream: int, *others: Any) -> None:
        # The function, its metadata, those of the launch and two hooks stand before the kernel's arguments.
        arguments = {name: _address(value) for name, value in zip(self.names, others[5:])}
        launch = Launch(self.name, (x, y, z), stream & 0xFF, self.num_warps, 0, arguments, self.aligned)
        self.recorder._counted.append(launch)


def _address(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_address(part) for part in value)
    base = getattr(value, "base", value)  # of a tensor descriptor
    return base.data_ptr() if isinstance(base, torch.Tensor) else value


def _install_driver(recorder: Recorder) -> None:
    library = _library()
    ctypes.c_int.in_dll(library, "shared_limit").value = recorder.card.shared
    ctypes.c_int.in_dll(library, "multiprocessors").value = recorder.card.multiprocessors
    ctypes.c_int.in_dll(library, "recording").value = 1

    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = torch.cuda.current_device
            self.get_current_stream = operator.index  # the default stream of device i is i

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", recorder.arch, 32)

    driver.set_active(Driver())
    do_compile, init_handles = JITFunction._do_compile, CompiledKernel._init_handles

    def counted(
        self: Any, key: Any, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> Any:
        recorder.compiled[_name(self)] += 1
        recorder._kernels.add(self)
        if recorder.compiles == "real":
            return do_compile(self, key, signature, device, constexprs, options, attrs, warmup)
        self.device_caches[device][0][key] = kernel = _Uncompiled(recorder, self, attrs, options.num_warps)
        return kernel

    def loaded(self: Any) -> None:
        fresh = self.module is None
        init_handles(self)
        if fresh:
            recorder._loaded(self)

    JITFunction._do_compile, CompiledKernel._init_handles = counted, loaded


# --- PyTorch's tensors ----------------------------------------------------------------------------------------------


def _host(device: Any) -> Any:
    """The device that C++ gets for what Python was asked: the CPU for a GPU."""
    if isinstance(device, int) or (device is not None and torch.device(device).type == "cuda"):
        return "cpu"
    return device


_COPIES = ("tensor", "as_tensor", "asarray")  # of what is on the host


def _made_there(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    """A factory that makes tensors on the CPU when it is asked for a GPU."""
    name = function.__name__
    make_there = _like_there(function)

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        if recorder._strict and not (name in _COPIES and isinstance(args[0], torch.Tensor)):
            if kwargs.get("device") is None:
                raise HostSynchronisation(f"torch.{name} without a device makes a tensor on the host")
            if name in _COPIES and torch.device(kwargs["device"]).type == "cuda":
                recorder.synchronises(f"torch.{name} of what is on the host")
        return make_there(*args, **kwargs)

    return make


def _like_there(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for one that takes the device of another tensor, where it is asked for none."""

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is None:
            return function(*args, **kwargs)
        kwargs["device"] = _host(device)
        made = function(*args, **kwargs)
        if kwargs["device"] is device and torch.device(device).type == "meta":
            made._claimed = torch.device("meta")
        return made

    return make


def _moved(function: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    @functools.wraps(function)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], (str, torch.device, int)):
            _check_target(recorder, args[0])
            args = (_host(args[0]), *args[1:])
        if kwargs.get("device") is not None:
            _check_target(recorder, kwargs["device"])
            kwargs["device"] = _host(kwargs["device"])
        return function(self, *args, **kwargs)

    return to


def _check_target(recorder: Recorder, device: Any) -> None:
    if recorder._strict and not isinstance(device, int) and torch.device(device).type == "cpu":
        recorder.synchronises('Tensor.to("cpu")')


_FACTORIES_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
_FACTORIES_NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")


def _install_tensors(recorder: Recorder) -> None:
    t = _torch.Tensor
    t._claimed = torch.device("cuda", 0)
    t.device = property(operator.attrgetter("_claimed"))  # no frame of Python, so it takes as long as PyTorch's
    t.is_cuda = property(lambda self: self._claimed.type == "cuda")
    t.is_cpu = property(lambda self: self._claimed.type == "cpu")
    t.get_device = lambda self: self._claimed.index
    t.to = _moved(t.to, recorder)
    t.cuda = lambda self, *args, **kwargs: self
    t.cpu = lambda self, *args, **kwargs: self.to("cpu")
    t.pin_memory = lambda self, *args: self
    t.is_pinned = lambda self, *args: False
    t.record_stream = lambda self, stream: None
    for name in _FACTORIES_NEW:
        setattr(t, name, _like_there(getattr(t, name)))

    factories: Any = _device._device_constructors()
    for name, function in [(function.__name__, function) for function in factories]:
        if hasattr(torch, name):
            setattr(torch, name, _made_there(recorder, function))
    for name in _FACTORIES_LIKE:
        setattr(torch, name, _like_there(getattr(torch, name)))
    context: Any = _device.DeviceContext  # of `with torch.device(...)` and torch.set_default_device
    init = context.__init__
    context.__init__ = lambda self, device: init(self, torch.device(_host(device)))

    class Generator(_torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, _host(device))

        def __init__(self, device: Any = "cpu"):
            place = torch.device(device)
            self.claimed = torch.device("cuda", recorder.device) if str(place) == "cuda" else place

        @property
        def device(self) -> torch.device:
            return self.claimed

    load = torch.load

    def load_there(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
        return load(f, _host(map_location) if isinstance(map_location, (str, torch.device)) else map_location, **kwargs)

    _torch.Generator, _torch.load = Generator, load_there
    _torch.mm, _torch.addmm = _wide_product(_torch.mm), _wide_product(_torch.addmm)


def _wide_product(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.mm and torch.addmm with an out_dtype, which PyTorch has for CUDA alone."""

    @functools.wraps(function)
    def product(*args: Any, out_dtype: Any = None, out: Any = None) -> Any:
        if out_dtype is None:
            return function(*args) if out is None else function(*args, out=out)
        wide = function(*(arg.to(out_dtype) for arg in args))
        return wide if out is None else out.copy_(wide)

    return product


# --- synchronisation ------------------------------------------------------------------------------------------------

# Of torch.Tensor and, under the same name, of torch.
_WAITS = (
    "item", "tolist", "numpy", "nonzero", "masked_select", "unique", "unique_consecutive", "equal", "allclose", "is_nonzero",
    "bincount", "argwhere", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__", "__contains__",
    "__repr__", "__format__",
)  # fmt: skip


@functools.cache
def _refuse_synchronisation() -> None:
    """What waits raises from now on, where the recorder is strict."""
    recorder = installed()
    assert recorder is not None

    def refusing(call: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def waits(*args: Any, **kwargs: Any) -> Any:
            recorder.synchronises(call)
            return function(*args, **kwargs)

        return waits

    for name in _WAITS:
        for place in (torch.Tensor, torch):
            if hasattr(place, name):
                setattr(place, name, refusing(f"{place.__name__}.{name}", getattr(place, name)))

    get, put, where = torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.where

    def masked(index: Any) -> bool:
        parts = index if isinstance(index, tuple) else (index,)
        return any(isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts)

    def getitem(self: Any, index: Any) -> Any:
        if recorder._strict and masked(index):
            recorder.synchronises("Tensor.__getitem__ of a mask")
        return get(self, index)

    def setitem(self: Any, index: Any, value: Any) -> None:
        if recorder._strict and masked(index) and isinstance(value, torch.Tensor) and value.dim() > 0:
            recorder.synchronises("Tensor.__setitem__ of a mask")
        put(self, index, value)

    def where_both(*args: Any, **kwargs: Any) -> Any:
        if len(args) + len(kwargs) == 1:
            recorder.synchronises("torch.where of a condition alone")
        return where(*args, **kwargs)

    _torch.Tensor.__getitem__, _torch.Tensor.__setitem__, _torch.where = getitem, setitem, where_both


# --- torch.cuda -----------------------------------------------------------------------------------------------------


class _Event:
    def __init__(self, *_: Any, **__: Any):
        self.moment: float | None = None

    def record(self, stream: Any = None) -> None:
        self.moment = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        if self.moment is None or end.moment is None:
            raise RuntimeError("an event was not recorded")
        return max((end.moment - self.moment) * 1e3, 1e-6)  # nothing lasts no time at all

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        _synchronize()


class _Stream:
    def __init__(self, device: Any = None, priority: int = 0, **_: Any):
        self.device_index = _index(device)
        self.device = torch.device("cuda", self.device_index)
        self.cuda_stream = self.stream_id = self.device_index

    def query(self) -> bool:
        return True

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        event = _Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        _synchronize()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class _Graph:
    """It has run once, when it was captured; a replay does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def capture_begin(self, *_: Any, **__: Any) -> None:
        _current().capturing = True

    def capture_end(self) -> None:
        _current().capturing = False

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def replay(self) -> None:
        pass

    reset = replay


class _Capture:
    """torch.cuda.graph"""

    def __init__(self, cuda_graph: _Graph, *_: Any, **__: Any):
        self.graph = cuda_graph

    def __enter__(self) -> None:
        self.graph.capture_begin()

    def __exit__(self, *_: Any) -> None:
        self.graph.capture_end()


class _OnDevice:
    """torch.cuda.device: the device that is current inside the block."""

    def __init__(self, device: Any):
        self.index = _index(device)

    def __enter__(self) -> None:
        recorder = _current()
        self.before, recorder.device = recorder.device, self.index

    def __exit__(self, *_: Any) -> None:
        _current().device = self.before


class _Autocast(torch.autocast):
    """Of the CPU, in the dtype of a GPU."""

    def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None):
        if device_type == "cuda":
            device_type, dtype = "cpu", torch.float16 if dtype is None else dtype
        super().__init__(device_type, dtype, enabled, cache_enabled)


DEVICES = 2


def _index(device: Any) -> int:
    if device is None:
        return _current().device
    if not isinstance(device, int):
        place = torch.device(device)
        if place.type != "cuda":
            raise ValueError(f"device: got {device}, expected a CUDA device")
        device = _current().device if place.index is None else place.index
    if device >= DEVICES:
        raise RuntimeError(f"device: got {device}, there are {DEVICES}")
    return device


def _synchronize(device: Any = None) -> None:
    _current().synchronises("torch.cuda.synchronize")


def _compile(model: Any = None, **_: Any) -> Any:
    return model if model is not None else lambda function: function


def _install_cuda(recorder: Recorder) -> None:
    card, (major, minor) = recorder.card, divmod(recorder.arch, 10)
    properties = SimpleNamespace(
        name=card.name, major=major, minor=minor, total_memory=card.memory, multi_processor_count=card.multiprocessors,
        L2_cache_size=card.l2, shared_memory_per_block=48 * KiB, shared_memory_per_block_optin=card.shared,
        shared_memory_per_multiprocessor=card.shared + KiB, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, warp_size=32, is_integrated=False, is_multi_gpu_board=False,
    )  # fmt: skip

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def zero(*_: Any, **__: Any) -> int:
        return 0

    def set_device(device: Any) -> None:
        recorder.device = _index(device)

    patches: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: recorder.arch >= 80,
        "init": nothing,
        "_lazy_init": nothing,
        "device_count": lambda: DEVICES,
        "current_device": lambda: recorder.device,
        "set_device": set_device,
        "device": _OnDevice,
        "device_of": lambda tensor: _OnDevice(tensor.device),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_name": lambda device=None: card.name,
        "get_arch_list": lambda: [f"sm_{recorder.arch}"],
        "synchronize": _synchronize,
        "_sleep": nothing,
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "set_stream": nothing,
        "CUDAGraph": _Graph,
        "graph": _Capture,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: recorder.capturing,
        "empty_cache": nothing,
        "mem_get_info": lambda device=None: (card.memory, card.memory),
        "memory_allocated": zero,
        "memory_reserved": zero,
        "max_memory_allocated": zero,
        "max_memory_reserved": zero,
        "reset_peak_memory_stats": nothing,
        "memory_stats": lambda device=None: {},
        "manual_seed": nothing,  # of the CPU's generator, which torch.manual_seed seeds
        "manual_seed_all": nothing,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
    }
    for name, patch in patches.items():
        setattr(torch.cuda, name, patch)
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "empty_cache", "mem_get_info"):
        setattr(torch.cuda.memory, name, patches[name])
    _torch._C._cuda_getCurrentRawStream = operator.index

    _torch.autocast = _torch.amp.autocast = _Autocast
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        function = getattr(torch, name)
        setattr(torch, name, functools.partial(_of_type, function))
    _torch.compile, _torch.nn.Module.compile = _compile, nothing


def _of_type(function: Callable[[str], Any], device_type: str = "cuda") -> Any:
    return function("cpu" if device_type == "cuda" else device_type)


# --- installing -----------------------------------------------------------------------------------------------------

_installed: Recorder | None = None


def installed() -> Recorder | None:
    return _installed


def _current() -> Recorder:
    assert _installed is not None
    return _installed


def _claim_extension() -> None:
    """Let the dispatch take csrc's operators for tensors on a GPU: C++ sees tensors of the CPU and computes."""
    try:
        module: Any = importlib.import_module("wikigpt._C")
    except ImportError:
        return  # not built: PyTorch's operators stand in, as on a GPU
    facts = module.build_info()
    module.build_info = lambda: facts | {"cuda": "fake"}


def install(arch: int = 90, compiles: str = "real", strict: bool = False) -> Recorder:
    """Put the fake GPU into this process, for good. compiles: "real", or "none", where specialisations are only counted.

    RuntimeError where it is too late: where wikigpt.kernels was imported, or triton to interpret.
    """
    global _installed
    if arch not in CARDS or compiles not in ("real", "none"):
        raise ValueError(f"got {arch} and {compiles!r}, allowed are {', '.join(map(str, CARDS))}; real and none")
    if _installed is not None:
        if (_installed.arch, _installed.compiles) != (arch, compiles):
            raise RuntimeError(
                f"the fake of sm_{_installed.arch}, compiles={_installed.compiles!r}, is in this process already"
            )
        return _installed
    if "wikigpt.kernels" in sys.modules:
        raise RuntimeError("wikigpt.kernels was imported before the fake GPU was installed")
    if os.environ.pop("TRITON_INTERPRET", "0") != "0" and "triton" in sys.modules:
        raise RuntimeError("TRITON_INTERPRET was set when triton was imported: nothing can be compiled in this process")
    # The first call of a registered operator imports it, and it makes tables of PyTorch's own functions.
    importlib.import_module("torch._dynamo")
    recorder = _installed = Recorder(arch, compiles)
    _install_cuda(recorder)
    _install_tensors(recorder)
    _install_driver(recorder)
    _claim_extension()
    if strict:
        _refuse_synchronisation()
        recorder._strict = True
    return recorder


def process(arch: int) -> ProcessPoolExecutor:
    """A process with a fake of this architecture, memory untouched, from when it imports `bench`: for one that has none."""
    kept = {name: os.environ.pop(name, None) for name in (ASKED, "TRITON_INTERPRET", "OMP_NUM_THREADS")}
    os.environ |= {ASKED: f"{arch},untouched", "OMP_NUM_THREADS": "1"}
    try:
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(int).result()  # it starts with the first task
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    return pool


def install_if_asked() -> Recorder | None:
    """Install what WIKIGPT_FAKE_GPU in the environment asks for."""
    asked = os.environ.get(ASKED)
    if not asked:
        return None
    arch, *options = asked.split(",")
    if not arch.isdecimal() or not {"none", "untouched"}.issuperset(options):
        raise ValueError(f"{ASKED}: got {asked!r}, allowed are an architecture and, after commas, none and untouched")
    recorder = install(int(arch), "none" if "none" in options else "real")
    if "untouched" not in options:
        _fill_with_zeros()
    return recorder


@functools.cache  # once
def _fill_with_zeros() -> None:
    """What kernels would write is zero from the start: what is made of it is finite, and the same in every run."""

    def zeroed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def make(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("pin_memory", None)  # which PyTorch has for a GPU alone
            made = function(*args, **kwargs)
            return made if made.is_meta else made.zero_()

        return make

    for name in ("empty", "empty_strided", "empty_like"):
        setattr(torch, name, zeroed(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        setattr(torch.Tensor, name, zeroed(getattr(torch.Tensor, name)))
