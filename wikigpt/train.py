"""Training: one process or many (torchrun), one step at a time, resumable to the bit.

Everything a step depends on is the configuration, the step number and the state in `last.pth`: the batch of a step is
computed from (seed, step) alone, and model, optimiser, moving average and random generators are saved. So a run that is
killed and resumed gives the same weights as one that was not.

A run directory holds: config.yaml, log.jsonl, loss.png, tensorboard/, last.pth (to resume), wiki-gpt.pth (to use: the
weights with the best validation loss).
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import wikigpt.kernels as kernels

from . import checkpoint
from .config import Config, TrainConfig, dump
from .data import Dataset
from .errors import UserError
from .evaluate import Perplexity, perplexity
from .model import GPT

LAST = "last.pth"

# Dense bf16 peak in FLOP/s of the vendors' data sheets, by a part of the device's name.
_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "B200": 2250e12, "L4": 121e12}


# --- data -----------------------------------------------------------------------------------------------------------


class Batches:
    """Shuffled blocks of a token stream. Sequence number i (0, 1, 2 ... over all epochs) is a function of (seed, i).

    Every epoch cuts the stream at another offset into blocks of `length` + 1 tokens (neighbours share one) and visits
    them in another order. Raises UserError where the stream is shorter than one block.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int):
        self.tokens, self.length, self.seed = tokens, length, seed
        # One block is left unused so that any offset below `length` has room.
        self.blocks = (tokens.numel() - 1) // length - 1
        if self.blocks < 1:
            raise UserError(
                f"the train split has {tokens.numel()} tokens, fewer than two contexts of {length}; "
                "use more text or a smaller model.context_length"
            )
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def starts(self, epoch: int) -> Tensor:
        """Where the blocks of an epoch begin, in the order of their visit: (blocks) int64 beside the tokens."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = torch.randint(self.length, (1,), generator=generator)
            starts = torch.randperm(self.blocks, generator=generator) * self.length + offset
            self._starts, self._epoch = starts.to(self.tokens.device), epoch
        return self._starts

    def places(self, first: int, count: int) -> Tensor:
        """Where the sequences first .. first + count - 1 begin, (count) int64 beside the tokens. Only at the start of an
        epoch does anything travel to the device."""
        pieces = []
        while count > 0:
            epoch, place = divmod(first, self.blocks)
            pieces.append(self.starts(epoch)[place : place + count])
            first, count = first + pieces[-1].numel(), count - pieces[-1].numel()
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets (count, length), int64, of the sequences that begin at `places`."""
        block = self.tokens[places[:, None] + torch.arange(self.length + 1, device=places.device)].long()
        return block[:, :-1], block[:, 1:]

    def get(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (count, length), int64, of sequences first .. first + count - 1."""
        return self.at(self.places(first, count))


# --- optimiser ------------------------------------------------------------------------------------------------------


class Optimizers:
    """AdamW for everything, or Muon (Jordan et al. 2024) for the matrices inside the blocks and AdamW for the rest.

    `ema` is a copy of the model that follows it as its moving average, or None. AdamW alone clips gradients and keeps the
    average in its own pass over the weights; beside Muon these are passes of their own.
    """

    def __init__(self, model: nn.Module, ema: nn.Module | None, config: TrainConfig, device: torch.device, captured: bool):
        self.model, self.ema, self.config, self.device, self.captured = model, ema, config, device, captured
        self.one_pass = config.optimizer == "adamw"
        hidden: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, p in model.named_parameters():
            if p.dim() == 2 and "blocks." in name and config.optimizer == "muon":
                hidden.append(p)
            else:
                (decayed if p.dim() == 2 else plain).append(p)
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.adamw = kernels.FusedAdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            max_grad_norm=config.clip_grad_norm if self.one_pass and config.clip_grad_norm > 0 else None,
            ema_decay=config.ema_decay if self.one_pass and ema is not None else None,
        )
        self.all: list[torch.optim.Optimizer] = [self.adamw]
        if hidden:
            self.all.append(torch.optim.Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=0.95))
        self.base_lr = [config.lr, config.muon_lr]
        self._place_lr()
        self._tie_ema()

    def _place_lr(self) -> None:
        """A captured step reads its learning rates from the device, where they can change."""
        if self.captured:
            for optimizer, lr in zip(self.all, self.base_lr):
                for group in optimizer.param_groups:
                    group["lr"] = torch.tensor(lr, device=self.device)

    def set_lr(self, factor: float) -> None:
        """Learning rates of the next step."""
        for optimizer, lr in zip(self.all, self.base_lr):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * factor)
                else:
                    group["lr"] = lr * factor

    def _tie_ema(self) -> None:
        """What AdamW keeps as averages are the weights of `ema` themselves."""
        if self.one_pass and self.ema is not None:
            for p, average in zip(self.model.parameters(), self.ema.parameters()):
                self.adamw.state[p]["ema"] = average.detach()

    def step(self) -> None:
        if not self.one_pass and self.config.clip_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        for optimizer in self.all:
            optimizer.step()
        self.drop_gradients()
        if not self.one_pass and self.ema is not None:
            with torch.no_grad():
                averages: list[Tensor] = list(self.ema.parameters())
                torch._foreach_lerp_(averages, list(self.model.parameters()), 1 - self.config.ema_decay)

    def drop_gradients(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """As torch's optimisers have them; the averages are the state of `ema` and not here."""
        states = [o.state_dict() for o in self.all]
        for number, state in states[0]["state"].items():
            states[0]["state"][number] = {key: value for key, value in state.items() if key != "ema"}
        return states

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.all, states):
            optimizer.load_state_dict(state)
        self._place_lr()
        self._tie_ema()


def lr_factor(config: TrainConfig, step: int, progress: float) -> float:
    """The learning rate of a step as a fraction of the highest; `progress` in 0..1 is the part of the run behind it."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    low = config.min_lr_fraction
    if config.schedule == "cosine":
        return warmup * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    if config.schedule == "wsd":
        left = min(1.0, max(0.0, 1 - progress) / config.decay_fraction) if config.decay_fraction > 0 else 1.0
        return warmup * (low + (1 - low) * left)
    return warmup


# --- processes ------------------------------------------------------------------------------------------------------


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
    return device


@contextlib.contextmanager
def processes(device_name: str) -> Iterator[Processes]:
    """Join the process group when torchrun started this process; leave it at the end."""
    device = pick_device(device_name)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


class Interrupt:
    """SIGINT and SIGTERM ask the loop to stop after the step under way; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Interrupt:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


# --- the device's time ------------------------------------------------------------------------------------------------


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


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a finished (or interrupted) run reports. Losses are in nats per token."""

    directory: Path
    steps: int
    interrupted: bool
    train_loss: float
    valid: Perplexity | None
    test: Perplexity | None
    tokens_per_second: float
    seconds: float


class Trainer:
    """One training run in `directory`. `log` receives lines for a person; all figures also go to log.jsonl.

    Raises UserError for a directory that cannot be written, a checkpoint or data that do not fit, and divergence.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        directory: Path,
        processes: Processes,
        resume: bool = False,
        log: Callable[[str], None] = print,
    ):
        self.config, self.dataset, self.directory, self.processes = config, dataset, directory, processes
        self.log = log if processes.first else lambda line: None
        train, device = config.train, processes.device
        if processes.first:
            checkpoint.writable_directory(directory)
        config.model.vocab_size = dataset.tokenizer.vocab_size
        torch.manual_seed(train.seed)
        self.model = GPT(config.model).to(device)
        self.wrapped = self._parallel(self.model)
        captured = train.cuda_graph and device.type == "cuda" and processes.size == 1 and train.optimizer == "adamw"
        if train.ema_decay > 0 and processes.size > 1 and train.parallel == "fsdp":
            raise UserError("train.ema_decay: not available with train.parallel=fsdp; use ddp or ema_decay=0")
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if train.ema_decay > 0 else None
        self.optimizers = Optimizers(self.wrapped, self.ema, train, device, captured)
        self.forward = torch.compile(self.wrapped) if train.compile else self.wrapped
        to_device = torch.from_numpy(dataset.tokens["train"].astype("int32")).to(device)
        self.batches = Batches(to_device, config.model.context_length, train.seed)
        self.compute: Callable[[Tensor], Tensor] = self._compute
        if captured:
            self.compute = StepGraph(self._compute, self.optimizers.drop_gradients, self.log)
        self.step = 0
        self.seconds = 0.0
        self.best = math.inf
        self.train_loss = math.nan
        if resume:
            self._load()
        if processes.first:
            checkpoint.write_atomically(directory / "config.yaml", lambda f: f.write(dump(config).encode()))

    @property
    def sequences_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.accumulate * self.processes.size

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.config.model.context_length

    def _parallel(self, model: GPT) -> nn.Module:
        if self.processes.size == 1:
            return model
        if self.config.train.parallel == "ddp":
            return nn.parallel.DistributedDataParallel(
                model, device_ids=[self.processes.device] if self.processes.device.type == "cuda" else None
            )
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        return model

    # --- state ---

    def _sharded(self) -> bool:
        return self.processes.size > 1 and self.config.train.parallel == "fsdp"

    def _model_state(self) -> dict[str, Any]:
        """The full weights under the names of GPT; every process must call it."""
        if not self._sharded():
            return self.model.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def _save(self) -> None:
        """Write last.pth: everything an exact resume needs."""
        weights = self._model_state()
        if self._sharded():
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            optimizer: Any = [get_optimizer_state_dict(self.model, o, options=options) for o in self.optimizers.all]
        else:
            optimizer = self.optimizers.state_dict()
        random = torch.get_rng_state()
        states = [random]
        if self.processes.size > 1:
            states = [torch.empty_like(random) for _ in range(self.processes.size)]
            if self.processes.device.type == "cuda":
                gathered: list[Any] = [None] * self.processes.size
                dist.all_gather_object(gathered, random)
                states = gathered
            else:
                dist.all_gather(states, random)
        if self.processes.first:
            checkpoint.save(
                self.directory / LAST,
                {
                    **self._content(weights),
                    "optimizer": optimizer,
                    "ema": self.ema.state_dict() if self.ema is not None else None,
                    "random": states,
                    "random_cuda": torch.cuda.get_rng_state() if self.processes.device.type == "cuda" else None,
                    "seconds": self.seconds,
                    "best": self.best,
                    "train_loss": self.train_loss,
                    "dataset": self.dataset.fingerprint,
                },
            )
        self._barrier()

    def _content(self, weights: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": weights,
            "model_config": self.config.model.to_dict(),
            "tokenizer": self.dataset.tokenizer.to_json(),
            "config": self.config.to_dict(),
            "step": self.step,
        }

    def _load(self) -> None:
        path = self.directory / LAST
        if not path.is_file():
            raise UserError(f"nothing to resume in {self.directory}: no {LAST}; start a run with --out {self.directory}")
        state = checkpoint.load(path)
        if state["dataset"] != self.dataset.fingerprint:
            raise UserError(
                f"{path} was trained on other data or with another vocabulary; resume with the same dataset, or train anew"
            )
        if self._sharded():
            from torch.distributed.checkpoint.state_dict import (
                StateDictOptions,
                set_model_state_dict,
                set_optimizer_state_dict,
            )

            options = StateDictOptions(full_state_dict=True)
            set_model_state_dict(self.model, state["model"], options=options)
            for optimizer, saved in zip(self.optimizers.all, state["optimizer"]):
                set_optimizer_state_dict(self.model, optimizer, saved, options=options)
        else:
            self.model.load_state_dict(state["model"])
            self.optimizers.load_state_dict(state["optimizer"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.best, self.train_loss = state["best"], state["train_loss"]
        torch.set_rng_state(state["random"][self.processes.rank % len(state["random"])])
        if self.processes.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"])
        if self.processes.first:
            self._forget_after(self.step)
        self._barrier()

    def _barrier(self) -> None:
        if self.processes.size > 1:
            dist.barrier()

    # --- log ---

    def _forget_after(self, step: int) -> None:
        """Drop log lines of steps that a resumed run is about to do again."""
        path = self.directory / "log.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
            checkpoint.write_atomically(path, lambda f: f.write("".join(x + "\n" for x in kept).encode()))

    def _record(self, step: int, **figures: Any) -> None:
        if not self.processes.first:
            return
        with open(self.directory / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)

    def _open_board(self) -> Any:
        if not (self.processes.first and self.config.train.tensorboard):
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.directory / "tensorboard"), purge_step=self.step)

    # --- one step ---

    def progress(self) -> float:
        """The part of the run that is done, 0..1, by steps or by time, whichever is further."""
        train = self.config.train
        done = self.step / train.steps
        return done if train.max_seconds is None else max(done, self.seconds / train.max_seconds)

    def train_step(self) -> Tensor:
        """One optimiser step; returns the mean loss of its tokens on this process: a scalar on the device, which the next
        step may overwrite."""
        train = self.config.train
        count = train.batch_size * train.accumulate
        places = self.batches.places(self.step * self.sequences_per_step + self.processes.rank * count, count)
        self.optimizers.set_lr(lr_factor(train, self.step, self.progress()))
        loss = self.compute(places)
        self.step += 1
        return loss

    def _compute(self, places: Tensor) -> Tensor:
        """All of a step that runs on the device, for sequences that begin at `places`. No value reaches the host."""
        train, device = self.config.train, self.processes.device
        total = torch.zeros((), device=device)
        for micro, part in enumerate(places.split(train.batch_size)):
            x, y = self.batches.at(part)
            last = micro == train.accumulate - 1
            # Gradients travel between processes once a step, with the last micro-batch.
            hold = (
                self.wrapped.no_sync()
                if not last and isinstance(self.wrapped, nn.parallel.DistributedDataParallel)
                else contextlib.nullcontext()
            )
            with hold:
                with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                    loss = self.forward(x, y)
                if train.accumulate > 1:
                    loss = loss / train.accumulate
                loss.backward()
            total += loss.detach()
        if device.type == "cpu":
            # Free here; on a GPU it would stall the stream, so there it is looked at when lines are logged.
            self._check(self._mean(total), self.step)
        self.optimizers.step()
        return total

    def _mean(self, loss: Tensor) -> Tensor:
        """The loss over all processes, a scalar on the device."""
        mean = loss.detach().clone()
        if self.processes.size > 1:
            dist.all_reduce(mean)
            mean /= self.processes.size
        return mean

    def _check(self, loss: Tensor, step: int) -> float:
        """The number in a scalar. Raises UserError where it is not finite."""
        number = float(loss)
        if not math.isfinite(number):
            path = self.directory / LAST
            kept = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint had been written yet"
            raise UserError(
                f"training diverged: the loss is {number} at step {step}; {kept}; "
                f"lower train.lr (now {self.config.train.lr}) or raise train.warmup_steps"
            )
        return number

    # --- evaluation ---

    def evaluate(self, split: str, tokens: int | None = None, stride: int | None = None) -> Perplexity:
        """Perplexity on the first `tokens` of a split (None: all). Every process must call it; all get the figure."""
        data = self.dataset.tokens[split][:tokens]
        stats = self.dataset.stats[split] if tokens is None or tokens >= len(self.dataset.tokens[split]) else None
        train = self.config.train
        weights = self._model_state() if self._sharded() else None
        result: list[Any] = [None]
        if self.processes.first:
            model = self.ema if self.ema is not None else self.model
            if weights is not None:
                model = GPT(self.config.model).to(self.processes.device)
                model.load_state_dict(weights)
            with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                result[0] = perplexity(
                    model,
                    data,
                    self.dataset.tokenizer.eos_id,
                    stride=stride or self.config.model.context_length,
                    stats=stats,
                )
        if self.processes.size > 1:
            dist.broadcast_object_list(result, src=0)
        return result[0]

    def _validate(self, tokens: int | None) -> Perplexity:
        """Validate, and keep the weights as wiki-gpt.pth where they are the best so far."""
        valid = self.evaluate("valid", tokens)
        loss = valid.nats / valid.tokens
        self._record(self.step, valid_loss=loss, valid_perplexity=valid.per_token)
        if loss < self.best or not (self.directory / checkpoint.NAME).exists():
            self.best = loss
            weights = self.ema.state_dict() if self.ema is not None else self._model_state()
            if self.processes.first:
                checkpoint.save(self.directory / checkpoint.NAME, self._content(weights))
        self._barrier()
        return valid

    # --- the loop ---

    def run(self, on_step: Callable[[int, int, dict[str, float]], None] | None = None) -> Result:
        """Train to the end (or to a signal). on_step(step, steps, figures) is called after each logged step."""
        train = self.config.train
        self._board = self._open_board()
        self.model.train()
        device = self.processes.device
        valid: Perplexity | None = None
        begin_seconds, begin = self.seconds, time.perf_counter()
        busy, trained = 0.0, 0  # seconds and steps spent in training alone
        logged_step, mark = self.step, Mark(device)
        underway: Reading | None = None
        loss = torch.full((), self.train_loss)

        def report(reading: Reading) -> None:
            nonlocal busy, trained
            reading.end.wait()
            self.train_loss = self._check(reading.loss, reading.step)
            took = reading.end.since(reading.begin)
            busy, trained = busy + took, trained + reading.steps
            rate = reading.steps * self.tokens_per_step / max(took, 1e-9)
            figures = {"loss": self.train_loss, "tokens_per_second": rate, "seconds": reading.seconds, "lr": reading.lr}
            if (mfu := self._mfu(rate)) is not None:
                figures["mfu"] = mfu
            self._record(reading.step, **figures)
            if on_step is not None and self.processes.first:
                on_step(reading.step, train.steps, figures)

        def settle() -> float:
            """Log what is under way; the loss of the last step, which must be finite."""
            nonlocal underway
            if underway is not None:
                report(underway)
            underway = None
            return self._check(self._mean(loss), self.step)

        with Interrupt() as interrupt:
            while self.progress() < 1.0:
                loss = self.train_step()
                # Time in validation and saving counts too: the limit is what the user waits.
                self.seconds = begin_seconds + time.perf_counter() - begin
                self._agree(interrupt)
                if interrupt.signal is not None:
                    break
                if self.step % train.log_interval == 0 or self.progress() >= 1.0:
                    value = self._mean(loss)
                    if device.type == "cuda":
                        value = torch.empty((), pin_memory=True).copy_(value, non_blocking=True)
                    end = Mark(device)
                    lr = train.lr * lr_factor(train, self.step, self.progress())
                    reading = Reading(value, mark, end, self.step, self.step - logged_step, self.seconds, lr)
                    # A GPU is working on this step still: the line before is what can be read without waiting.
                    now, underway = (underway, reading) if device.type == "cuda" else (reading, None)
                    if now is not None:
                        report(now)
                    logged_step, mark = self.step, end
                validates = self.step % train.eval_interval == 0 and self.progress() < 1.0
                saves = self.step % train.save_interval == 0
                if validates:
                    settle()
                    valid = self._validate(train.eval_tokens)
                    self.log(f"step {self.step}: train loss {float(loss):.3f}, validation perplexity {valid.per_token:.1f}")
                    self.model.train()
                if saves:
                    settle()
                    self._save()
                if validates or saves:
                    logged_step, mark = self.step, Mark(device)
        self.train_loss = settle() if self.step > 0 else math.nan
        stopped = interrupt.signal is not None
        test = None
        if stopped:
            self.log(f"interrupted by {signal.Signals(interrupt.signal or 0).name} at step {self.step}")
        else:
            valid = self._validate(None)
            self.log(f"step {self.step}: whole validation split, perplexity {valid.per_token:.2f}")
        self._save()
        if stopped and not (self.directory / checkpoint.NAME).exists():
            weights = self._model_state()
            if self.processes.first:
                checkpoint.save(self.directory / checkpoint.NAME, self._content(weights))
        if not stopped:
            test = self._test()
        if self._board is not None:
            self._board.close()
        if self.processes.first:
            plot_loss(self.directory)
        rate = trained * self.tokens_per_step / busy if busy > 0 else math.nan
        return Result(
            self.directory,
            self.step,
            stopped,
            self.train_loss,
            valid,
            test,
            rate,
            time.perf_counter() - begin,
        )

    def _agree(self, interrupt: Interrupt) -> None:
        """Whether to stop and what the clock says, the same for all processes, so that none waits for another for ever."""
        if self.processes.size == 1:
            return
        both = torch.tensor([interrupt.signal or 0, self.seconds], dtype=torch.float64, device=self.processes.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        interrupt.signal = int(both[0]) or None
        self.seconds = float(both[1])

    def _test(self) -> Perplexity:
        """Test perplexity, sliding window, of the weights with the best validation loss."""
        result: list[Any] = [None]
        if self.processes.first:
            best = checkpoint.load_model(self.directory, self.processes.device).model
            with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
                result[0] = perplexity(
                    best,
                    self.dataset.tokens["test"],
                    self.dataset.tokenizer.eos_id,
                    stats=self.dataset.stats["test"],
                )
            self._record(self.step, test_perplexity=result[0].per_token)
        if self.processes.size > 1:
            dist.broadcast_object_list(result, src=0)
        return result[0]

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOP utilisation, or None where the device's peak is not known."""
        if self.processes.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.processes.device)
        peak = next((value for part, value in _PEAK.items() if part in name), None)
        if peak is None:
            return None
        flops = self.model.flops_per_token(self.config.model.context_length)
        return flops * tokens_per_second / (peak * self.processes.size)


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The figures of a run, one dict per line of log.jsonl."""
    path = directory / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def plot_loss(directory: Path) -> Path | None:
    """Draw loss.png from log.jsonl: training loss and validation loss by step. None where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = read_log(directory)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "train", "-"), ("valid_loss", "validation", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=3, linewidth=1.2)
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=str(directory.name))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    path = directory / "loss.png"
    checkpoint.write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=130))
    return path


__all__ = ["Batches", "Result", "Trainer", "lr_factor", "plot_loss", "processes", "read_log"]
