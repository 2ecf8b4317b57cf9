"""What a run computes on: its processes, and on a GPU the step as one graph and the moments that its stream passes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from wikigpt.errors import UserError

# Dense bf16 peak in FLOP/s of the vendors' data sheets, by a part of the device's name.
_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "B200": 2250e12, "L4": 121e12}


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; a lone process is rank 0 of 1."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def pick_device(name: str) -> torch.device:
    """auto: a CUDA GPU where there is one, else the CPU. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device on this machine (or a CPU build of torch); use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device


@contextlib.contextmanager
def processes(device_name: str) -> Iterator[Processes]:
    """Join the process group when torchrun started this process; leave it at the end."""
    device = pick_device(device_name)
    try:
        size = int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: it is torchrun's, a number; unset it") from None
    if size == 1:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:
        raise UserError(f"cannot join the other processes ({error}); start them with torchrun") from None
    try:
        yield Processes(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def pick_precision(name: str, device: torch.device) -> str:
    """fp32 or bf16; auto: bf16 where it is the faster of the two."""
    if name != "auto":
        return name
    from wikigpt.kernels.linear_cross_entropy import MULTIPLIES_BF16

    return "bf16" if device.type == "cuda" or (device.type == "cpu" and MULTIPLIES_BF16) else "fp32"


def peak_flops(device: torch.device) -> float | None:
    """Of the device in bf16, per second, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in _PEAK.items() if part in name), None)


class StepGraph:
    """`step(places) -> loss`, run as one CUDA graph: the host then starts one graph a step instead of hundreds of kernels.

    The first steps run as they are, on a stream of their own as capture asks for: they compile kernels and make the
    optimiser's state. Where capture fails, all steps do: `failed` is the reason then, else None, and one line in the log says
    it. Whoever times graphs must look at `failed`.
    """

    WARMUP = 3

    def __init__(self, step: Callable[[Tensor], Tensor], drop_gradients: Callable[[], None], log: Callable[[str], None]):
        self.step, self.drop_gradients, self.log, self.calls = step, drop_gradients, log, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failed: str | None = None

    def __call__(self, places: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.WARMUP:
            stream = torch.cuda.Stream(places.device)
            stream.wait_stream(torch.cuda.current_stream(places.device))
            with torch.cuda.stream(stream):
                loss = self.step(places)
            torch.cuda.current_stream(places.device).wait_stream(stream)
            return loss
        if self.graph is None and self.failed is None:
            self._capture(places)
        if self.graph is None:
            return self.step(places)
        self.places.copy_(places)
        self.graph.replay()
        return self.loss

    def _capture(self, places: Tensor) -> None:
        self.places = places.clone()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(places.device)
        try:
            with torch.cuda.graph(graph):
                self.loss = self.step(self.places)
        except Exception as error:  # whatever it is: the same step, run as it is, decides whether it is one of the program
            self.failed = (str(error).strip() or type(error).__name__).splitlines()[0]
        else:
            self.graph = graph
            return
        # Where the end of a capture fails too, torch leaves its stream as the current one and the generator waiting for the
        # end. A clone of the generator's state waits for nothing, and has drawn nothing in the capture. Gradients hold what
        # no kernel has written, and the next backward would add to them.
        torch.cuda.set_stream(stream)
        for generator in torch.cuda.default_generators:
            generator.graphsafe_set_state(generator.clone_state())
        self.drop_gradients()
        self.log(f"no CUDA graph, steps run one kernel at a time: {self.failed}")


class Mark:
    """A moment in the device's work. On a GPU the host does not wait for it until it asks."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(device))
        self.time = time.perf_counter()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def since(self, earlier: Mark) -> float:
        """Seconds from `earlier` to this moment, which both must have passed."""
        if self.event is None or earlier.event is None:
            return self.time - earlier.time
        return earlier.event.elapsed_time(self.event) / 1000


@dataclass
class Reading:
    """A loss on its way from the device to the log, and the steps since the last one."""

    loss: Tensor  # on the host once `end` has passed
    begin: Mark
    end: Mark
    step: int
    steps: int
    seconds: float
    lr: float


class Speed:
    """Readings of a run, each handed to `report` with the seconds that its steps took.

    A GPU is still working on the steps of a reading when it is made, so `report` gets the one before, for which nobody has to
    wait; `settle` waits for the last one.
    """

    def __init__(self, device: torch.device, step: int, report: Callable[[Reading, float], None]):
        self.device, self.report = device, report
        self.busy, self.trained, self.readings = 0.0, 0, 0  # seconds and steps spent in training alone
        self._underway: Reading | None = None
        self._first = (0.0, 0)
        self.restart(step)

    def restart(self, step: int) -> None:
        """What came since the last reading was no training."""
        self._step, self._mark = step, Mark(self.device)

    def read(self, loss: Tensor, step: int, end: Mark, seconds: float, lr: float) -> None:
        """`loss` of the steps that ended at `end`: a scalar on the device."""
        if self.device.type == "cuda":
            loss = torch.empty((), pin_memory=True).copy_(loss, non_blocking=True)
        reading = Reading(loss, self._mark, end, step, step - self._step, seconds, lr)
        self._step, self._mark = step, end
        before, self._underway = self._underway, reading
        if self.device.type != "cuda":
            self.settle()
        elif before is not None:
            self._hand(before)

    def settle(self) -> None:
        reading, self._underway = self._underway, None
        if reading is not None:
            self._hand(reading)

    def _hand(self, reading: Reading) -> None:
        reading.end.wait()
        took = reading.end.since(reading.begin)
        self.busy, self.trained, self.readings = self.busy + took, self.trained + reading.steps, self.readings + 1
        if self.readings == 1:
            self._first = (self.busy, self.trained)
        self.report(reading, took)

    # Without the first reading, which holds what was compiled.
    @property
    def warm_seconds(self) -> float:
        return self.busy - self._first[0]

    @property
    def warm_mean(self) -> float:
        """Steps per second."""
        return (self.trained - self._first[1]) / max(self.warm_seconds, 1e-9)

    @property
    def mean(self) -> float:
        """Steps per second; NaN where none were timed."""
        return self.trained / self.busy if self.busy > 0 else float("nan")


__all__ = ["Mark", "Processes", "Reading", "Speed", "StepGraph", "peak_flops", "pick_device", "pick_precision", "processes"]
