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
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = torch.randint(self.length, (1,), generator=generator)
            self._starts = torch.randperm(self.blocks, generator=generator) * self.length + offset
            self._epoch = epoch
        return self._starts

    def get(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (count, length), int64, of sequences first .. first + count - 1."""
        starts = torch.stack([self.starts(i // self.blocks)[i % self.blocks] for i in range(first, first + count)])
        index = starts[:, None] + torch.arange(self.length + 1)
        block = self.tokens[index.to(self.tokens.device)].long()
        return block[:, :-1], block[:, 1:]


# --- optimiser ------------------------------------------------------------------------------------------------------


class Optimizers:
    """AdamW for everything, or Muon (Jordan et al. 2024) for the matrices inside the blocks and AdamW for the rest."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device):
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
        self.all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
        ]
        if hidden:
            self.all.append(torch.optim.Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=0.95))
        self.base_lr = [config.lr, config.muon_lr]

    def step(self, factor: float) -> None:
        for optimizer, lr in zip(self.all, self.base_lr):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [o.state_dict() for o in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.all, states):
            optimizer.load_state_dict(state)


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
        self.optimizers = Optimizers(self.wrapped, train, device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if train.ema_decay > 0 else None
        if self.ema is not None and processes.size > 1 and train.parallel == "fsdp":
            raise UserError("train.ema_decay: not available with train.parallel=fsdp; use ddp or ema_decay=0")
        self.forward = torch.compile(self.wrapped) if train.compile else self.wrapped
        to_device = torch.from_numpy(dataset.tokens["train"].astype("int32")).to(device)
        self.batches = Batches(to_device, config.model.context_length, train.seed)
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

    def _record(self, **figures: Any) -> None:
        if not self.processes.first:
            return
        with open(self.directory / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, **figures}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, self.step)

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
        """One optimiser step; returns the mean loss of its tokens on this process (a scalar on the device)."""
        train, model = self.config.train, self.forward
        device = self.processes.device
        first = self.step * self.sequences_per_step + self.processes.rank * train.batch_size * train.accumulate
        total = torch.zeros((), device=device)
        for micro in range(train.accumulate):
            x, y = self.batches.get(first + micro * train.batch_size, train.batch_size)
            last = micro == train.accumulate - 1
            # Gradients travel between processes once a step, with the last micro-batch.
            hold = (
                self.wrapped.no_sync()
                if not last and isinstance(self.wrapped, nn.parallel.DistributedDataParallel)
                else contextlib.nullcontext()
            )
            with hold:
                with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                    loss = model(x, y)
                if train.accumulate > 1:
                    loss = loss / train.accumulate
                loss.backward()
            total += loss.detach()
        if train.clip_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_grad_norm)
        if device.type == "cpu":
            # Free here; on a GPU it would stall the stream, so there it is looked at when lines are logged.
            self._check(total)
        self.optimizers.step(lr_factor(train, self.step, self.progress()))
        if self.ema is not None:
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - train.ema_decay)
        self.step += 1
        return total

    def _check(self, loss: Tensor) -> float:
        """The loss of the last step over all processes. Raises UserError where it is not finite."""
        value = loss.detach().clone()
        if self.processes.size > 1:
            dist.all_reduce(value)
            value /= self.processes.size
        number = float(value)
        if not math.isfinite(number):
            path = self.directory / LAST
            kept = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint had been written yet"
            raise UserError(
                f"training diverged: the loss is {number} at step {self.step}; {kept}; "
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
        self._record(valid_loss=loss, valid_perplexity=valid.per_token)
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
        valid: Perplexity | None = None
        begin_seconds, begin = self.seconds, time.perf_counter()
        logged_step, logged_at = self.step, time.perf_counter()
        busy, trained = 0.0, 0  # seconds and steps spent in training alone
        loss = torch.full((), self.train_loss)
        with Interrupt() as interrupt:
            while self.progress() < 1.0:
                loss = self.train_step()
                # Time in validation and saving counts too: the limit is what the user waits.
                self.seconds = begin_seconds + time.perf_counter() - begin
                self._agree(interrupt)
                if interrupt.signal is not None:
                    break
                due = self.step % train.log_interval == 0 or self.progress() >= 1.0
                if due:
                    self.train_loss = self._check(loss)
                    now = time.perf_counter()
                    busy, trained = busy + now - logged_at, trained + self.step - logged_step
                    rate = (self.step - logged_step) * self.tokens_per_step / max(now - logged_at, 1e-9)
                    figures = {"loss": self.train_loss, "tokens_per_second": rate, "seconds": self.seconds}
                    figures["lr"] = train.lr * lr_factor(train, self.step, self.progress())
                    if (mfu := self._mfu(rate)) is not None:
                        figures["mfu"] = mfu
                    self._record(**figures)
                    if on_step is not None and self.processes.first:
                        on_step(self.step, train.steps, figures)
                    logged_step, logged_at = self.step, time.perf_counter()
                if self.step % train.eval_interval == 0 and self.progress() < 1.0:
                    self._check(loss)
                    valid = self._validate(train.eval_tokens)
                    self.log(f"step {self.step}: train loss {float(loss):.3f}, validation perplexity {valid.per_token:.1f}")
                    self.model.train()
                    logged_step, logged_at = self.step, time.perf_counter()
                if self.step % train.save_interval == 0:
                    self._check(loss)
                    self._save()
                    logged_step, logged_at = self.step, time.perf_counter()
        self.train_loss = self._check(loss) if self.step > 0 else math.nan
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
            self._record(test_perplexity=result[0].per_token)
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
