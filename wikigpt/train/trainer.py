"""The loop: steps, logs, validations and saves, from the first step or from last.pth, to the end or to a signal."""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wikigpt import checkpoint
from wikigpt.config import Config, dump
from wikigpt.errors import UserError
from wikigpt.evaluate import Perplexity
from wikigpt.files import writable_directory, write_bytes
from wikigpt.memory import check_memory
from wikigpt.model import GPT
from wikigpt.output import duration

from .devices import Mark, Processes, Reading, Speed, StepGraph, peak_flops, pick_precision
from .directory import CONFIG, LAST, clear
from .interrupt import Interrupt, Stopped
from .log import Log, forget_after, plot_loss
from .optimizers import Optimizers, lr_factor
from .tasks import Progress, Task

OnStep = Callable[[int, int, dict[str, float]], None]  # (step, steps, figures)
OnEvaluate = Callable[[str, int, int], None]  # (split, done, total) in tokens

# What makes a run another one: --resume refuses a change of these. The learning rate, the limits and the device may change.
FIXED = {
    "data": ("tokenizer", "vocab_size"),
    "model": (
        "context_length", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim", "intermediate_size", "position", "norm",
        "activation", "bias", "tie_embeddings", "norm_eps", "rope_theta",
    ),
    "train": ("optimizer", "ema_decay", "seed", "eval_tokens"),
}  # fmt: skip


@dataclass
class Result:
    """What a finished (or interrupted) run reports. Losses are in nats per token."""

    directory: Path
    steps: int
    interrupted: bool
    train_loss: float
    best_step: int | None  # of the weights in wiki-gpt.pth; None where none are there
    final: dict[str, Perplexity] = field(default_factory=dict)  # of these weights, by split
    tokens_per_second: float = math.nan
    seconds: float = 0.0


class Trainer:
    """One training run of `task` in `directory`, which the caller owns. `log` receives lines for a person; all figures also
    go to log.jsonl. `model` is where to start, None a new one of config.model.

    Nothing is written before the first step is done. Raises UserError for a directory that cannot be written, a checkpoint or
    data that do not fit, and divergence.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        directory: Path,
        processes: Processes,
        resume: bool = False,
        log: Callable[[str], None] = print,
        model: GPT | None = None,
    ):
        self.config, self.task, self.directory, self.processes = config, task, directory, processes
        self._say = log
        self._lost: BaseException | None = None  # where the output has gone away: why
        train, device = config.train, processes.device
        if processes.first:
            writable_directory(directory)
        train.precision = pick_precision(train.precision, device)
        config.model.vocab_size = task.tokenizer.vocab_size if model is None else model.config.vocab_size
        self.batches = task.batches(config, device)
        check_memory(config, config.model.vocab_size, device, processes.size)
        state = self._read(config) if resume else None
        torch.manual_seed(train.seed)
        self.model = (GPT(config.model) if model is None else model).to(device)
        self.wrapped = self._parallel(self.model)
        captured = train.cuda_graph and device.type == "cuda" and processes.size == 1 and train.optimizer == "adamw"
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if train.ema_decay > 0 else None
        self.optimizers = Optimizers(self.wrapped, self.ema, train, device, captured)
        self.forward = torch.compile(self.wrapped) if train.compile else self.wrapped
        self.compute: Callable[[Tensor], Tensor] = self._compute
        if captured:
            self.compute = StepGraph(self._compute, self.optimizers.drop_gradients, self.log)
        self.step = 0
        self.seconds = 0.0
        self.best, self.best_step = math.inf, None  # type: tuple[float, int | None]
        self.train_loss = math.nan
        self.validated: int | None = None  # the step
        self._run = uuid.uuid4().hex  # tells the files of this run from those of one that it replaces
        self._begun = False  # something of this run is on the disk
        self._log: Log | None = None
        self._on_step: OnStep | None = None
        self._on_evaluate: OnEvaluate | None = None
        self._interrupt = Interrupt(self._notice)
        if state is not None:
            self._restore(state)

    @property
    def sequences_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.accumulate * self.processes.size

    @property
    def tokens_per_step(self) -> int:
        return round(self.sequences_per_step * self.batches.mean_length)

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

    @property
    def begun(self) -> bool:
        """Whether something of this run is on the disk."""
        return self._begun

    # --- state ---

    def _sharded(self) -> bool:
        return self.processes.size > 1 and self.config.train.parallel == "fsdp"

    def _model_state(self) -> dict[str, Any]:
        """The full weights under the names of GPT; every process must call it."""
        if not self._sharded():
            return self.model.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def log(self, line: str) -> None:
        """A line for a person, of the first process."""
        self._tell(self._say, line)

    def _tell(self, function: Callable[..., Any] | None, *words: Any) -> None:
        """function(*words) of the first process. Where the reader has gone, the run is to stop and save, not to fall."""
        if function is None or not self.processes.first or self._lost is not None:
            return
        try:
            function(*words)
        except (OSError, SystemExit) as error:  # rich and typer make SystemExit of a closed pipe
            self._lost = error

    @torch.no_grad()
    def check_weights(self) -> None:
        """Raises UserError where the weights give no finite loss: the loss of a step is that of the weights before it."""
        x, y = self.batches.at(self.batches.places(self.step * self.sequences_per_step, 1))
        training = self.model.training
        self.model.eval()  # draws no random numbers
        try:
            with self._autocast():
                loss = self.model(x, y)
        finally:
            self.model.train(training)
        self._check(self._mean(loss), self.step)

    def _save(self) -> None:
        """Write last.pth: everything an exact resume needs. Raises UserError, and writes nothing, for weights of no use."""
        self.check_weights()
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
                    "train_loss": self.train_loss,
                    "validated": self.validated,
                    "sequences_per_step": self.sequences_per_step,
                    "sharded": self._sharded(),
                },
            )
        self._barrier()

    def _content(self, weights: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": weights,
            "model_config": self.config.model.to_dict(),
            "tokenizer": self.task.tokenizer.to_json(),
            "config": self.config.to_dict(),
            "task": self.task.saved(),
            "dataset": self.task.fingerprint,
            "run": self._run,
            "step": self.step,
        }

    def _read(self, config: Config) -> dict[str, Any]:
        """last.pth, which must be of this run."""
        path = self.directory / LAST
        if not path.is_file():
            raise UserError(f"nothing to resume in {self.directory}: no {LAST}; start a run with --out {self.directory}")
        state = checkpoint.load(path)
        if "optimizer" not in state:
            raise UserError(f"{path} holds weights alone, nothing to resume; start a run with another --out")
        now, before = config.to_dict(), state["config"]
        for group, keys in FIXED.items():
            for key in keys:
                old = before.get(group, {}).get(key, now[group][key])
                if now[group][key] != old:
                    raise UserError(
                        f"{group}.{key}: the run in {self.directory} has {old}, got {now[group][key]}, and --resume goes on "
                        "with it as it is; leave the setting out, or start a run with another --out"
                    )
        if state["dataset"] != self.task.fingerprint:
            origin = state.get("task", {}).get("origin", "")
            raise UserError(
                f"{path} was trained on other data or with another vocabulary{origin and f' ({origin})'}; resume with the same "
                "dataset, or train anew"
            )
        sequences = state.get("sequences_per_step", self.sequences_per_step)
        if sequences != self.sequences_per_step:
            raise UserError(
                f"train.batch_size x train.accumulate x processes: the run in {self.directory} has {sequences} a step, "
                f"got {self.sequences_per_step}; leave the setting out, and start as many processes"
            )
        if self._sharded() and not state.get("sharded", True):
            raise UserError(f"train.parallel: the run in {self.directory} is not of fsdp, and cannot go on as such; use ddp")
        if config.train.steps < state["step"]:
            raise UserError(
                f"train.steps: the run in {self.directory} has done {state['step']:,} steps, got {config.train.steps:,}"
            )
        changed = [
            f"{group}.{key} {before[group][key]} -> {value}"
            for group, values in now.items()
            for key, value in values.items()
            if key in before.get(group, {}) and before[group][key] != value
        ]
        if changed:
            self.log(f"changed since the run began: {', '.join(changed)}")
        return state

    def _restore(self, state: dict[str, Any]) -> None:
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
        self.step, self.seconds, self.train_loss = state["step"], state["seconds"], state["train_loss"]
        self.validated = state.get("validated", self.step)
        # Which weights are the best says the file that holds them: it may be younger than last.pth.
        self._run = state.get("run", self._run)
        if (self.directory / checkpoint.NAME).is_file():
            try:
                kept = checkpoint.load(self.directory)
            except UserError as error:
                self.log(f"{error}; the next validation replaces it")
            else:
                if kept.get("run", self._run) == self._run:
                    loss = kept.get("valid_loss")
                    self.best, self.best_step = math.inf if loss is None else loss, kept["step"]
                elif self.processes.first:  # killed between the first save and clear()
                    clear(self.directory)
        torch.set_rng_state(state["random"][self.processes.rank % len(state["random"])])
        if self.processes.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"])
        self._begun = True
        if self.processes.first:
            forget_after(self.directory, self.step)
            self._open()
        self._barrier()

    def _open(self) -> None:
        """Write the configuration, and begin to log."""
        write_bytes(self.directory / CONFIG, dump(self.config).encode())
        self._log = Log(self.directory, self.config.train.tensorboard, self.log)

    def _begin(self) -> None:
        """After the first step of a new run: from here on it can be resumed."""
        self._save()  # in the place of the last.pth of a run that this one replaces
        self._begun = True
        if self.processes.first:
            clear(self.directory)
            self._open()

    def _barrier(self) -> None:
        if self.processes.size > 1:
            dist.barrier()

    def _record(self, step: int, **figures: float) -> None:
        if self._log is not None:
            self._log.record(step, **figures)

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
                with self._autocast():
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

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

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
            raise self._diverged("loss", number, step)
        return number

    def _diverged(self, what: str, number: float, step: int) -> UserError:
        path = self.directory / LAST
        # Before the first step nothing of this run is written; what lies there may be a run that it was to replace.
        kept = f"the last good checkpoint is {path}" if self._begun else "no checkpoint had been written yet"
        return UserError(
            f"training diverged: the {what} is {number} at step {step}; {kept}; "
            f"lower the learning rate (now {self.config.train.lr}) or raise train.warmup_steps"
        )

    # --- evaluation ---

    def _report(self, split: str) -> Progress:
        """Tells the caller how far an evaluation is, and ends it where a signal has come."""

        def progress(done: int, total: int) -> None:
            self._tell(self._on_evaluate, split, done, total)
            if self._lost is not None:
                raise Stopped
            self._interrupt.check()

        return progress

    def _together(self, evaluate: Callable[[], Any]) -> Any:
        """evaluate() of the first process, for all. Raises Stopped in all of them where a signal ends it."""
        result: list[Any] = [Stopped]
        if self.processes.first:
            with contextlib.suppress(Stopped):
                result[0] = evaluate()
        if self.processes.size > 1:
            dist.broadcast_object_list(result, src=0)
        if result[0] is Stopped:
            raise Stopped
        return result[0]

    def validate(self) -> Perplexity | None:
        """The weights as they are now, on the tokens that all validations share. Every process must call it."""
        weights = self._model_state() if self._sharded() else None

        def evaluate() -> Perplexity | None:
            model = self.ema if self.ema is not None else self.model
            if weights is not None:
                model = GPT(self.config.model).to(self.processes.device)
                model.load_state_dict(weights)
            with self._autocast():
                return self.task.validate(model, self.config, self._report("validation"))

        return self._together(evaluate)

    def _validates(self) -> bool:
        """Whether a validation is due."""
        return self.step > 0 and self.step % self.config.train.eval_interval == 0 and self.validated != self.step

    def _validate(self) -> None:
        """Validate, and keep the weights as wiki-gpt.pth where they are the best so far (or there is nothing to tell by)."""
        valid = self.validate()
        loss = None if valid is None else valid.nats / valid.tokens
        if loss is not None and not math.isfinite(loss):
            raise self._diverged("validation loss", loss, self.step)
        better = loss is None or loss < self.best or self.best_step is None
        text = f"step {self.step:,}/{self.config.train.steps:,}: train loss {self.train_loss:.4f}"
        if valid is not None:
            self._record(self.step, valid_loss=valid.nats / valid.tokens, valid_perplexity=valid.per_token)
            text += f", {self.task.describe(valid)}"
        if better:
            self._keep(loss)
            text += " (best so far, saved)" if valid is not None else " (saved)"
        self.log(text)
        self.validated = self.step
        self._barrier()

    def _keep(self, valid_loss: float | None) -> None:
        """Write the weights as they are now as wiki-gpt.pth."""
        self.best, self.best_step = math.inf if valid_loss is None else valid_loss, self.step
        weights = self.ema.state_dict() if self.ema is not None else self._model_state()
        if self.processes.first:
            content = {**self._content(weights), "valid_loss": valid_loss, "train_loss": self.train_loss}
            checkpoint.save(self.directory / checkpoint.NAME, content)

    def _final(self) -> dict[str, Perplexity]:
        """The figures of what lies in wiki-gpt.pth, in float32 as `wikigpt evaluate` has them."""

        def evaluate() -> dict[str, Perplexity]:
            best = checkpoint.load_model(self.directory, self.processes.device).model
            names = {"valid": "final validation", "test": "final test"}
            return self.task.final(best, self.config, lambda split: self._report(names.get(split, split)))

        found = self._together(evaluate)
        self._record(self.step, **{f"final_{split}_perplexity": figure.per_token for split, figure in found.items()})
        return found

    # --- the loop ---

    def _notice(self) -> str:
        if not self._begun:
            return "stopping after the first step (Ctrl-C again: at once)"
        return "finishing this step and saving (Ctrl-C again: stop at once, without what came since the last save)"

    def run(self, on_step: OnStep | None = None, on_evaluate: OnEvaluate | None = None) -> Result:
        """Train to the end (or to a signal). on_step(step, steps, figures) is called after each logged step,
        on_evaluate(split, done, total) during evaluations."""
        train = self.config.train
        self._on_step, self._on_evaluate, self._foretold = on_step, on_evaluate, False
        begin_step, begin = self.step, time.perf_counter()
        self.speed = Speed(self.processes.device, self.step, self._report_step)
        final: dict[str, Perplexity] = {}
        try:
            with self._interrupt as interrupt:
                stopped = self._train()
                if self.step > begin_step:
                    if not self._begun:
                        self._begin()
                    self._save()  # before anything that takes long
                try:
                    if stopped:
                        raise Stopped
                    if self.step < train.steps:
                        limit = f"train.max_seconds={train.max_seconds:g}"
                        self.log(f"stopped at step {self.step:,} of {train.steps:,}: {limit} is over")
                        if self.step < train.steps / 2:
                            self.log("less than half of the run: the model can hardly write yet, give it more seconds")
                    if self.validated != self.step:
                        self._validate()
                    final = self._final()
                except Stopped:
                    stopped = True
                    if self.best_step is None:
                        self._keep(None)
                        self._barrier()
                    name = signal.Signals(interrupt.signal).name if interrupt.signal is not None else "a signal"
                    self.log(f"interrupted by {name} at step {self.step:,}, saved")
                if self._log is not None:
                    self._draw()
        finally:
            if self._log is not None:
                self._log.close()
        if self._lost is not None:
            raise self._lost
        rate, seconds = self.speed.mean * self.tokens_per_step, time.perf_counter() - begin
        return Result(self.directory, self.step, stopped, self.train_loss, self.best_step, final, rate, seconds)

    def _train(self) -> bool:
        """Steps until a limit is reached, or until a signal: True then. The loss of the last one is finite."""
        train, speed = self.config.train, self.speed
        begin_seconds, begin = self.seconds, time.perf_counter()
        self.model.train()
        loss: Tensor | None = None

        def settle() -> None:
            """Log what is under way, and look at the loss of the last step, which must be finite."""
            speed.settle()
            if loss is not None:
                self.train_loss = self._check(self._mean(loss), self.step)

        try:
            if self.progress() < 1.0 and self._validates():
                self._validate()  # the one that a signal has ended
            while self.progress() < 1.0:
                loss = self.train_step()
                # Time in validation and saving counts too: the limit is what the user waits.
                self.seconds = begin_seconds + time.perf_counter() - begin
                asked = self._agree()
                first, over = not self._begun, self.progress() >= 1.0
                end = Mark(self.processes.device)
                if first:
                    settle()
                    self._begin()
                if over or self.step % train.log_interval == 0:
                    lr = train.lr * lr_factor(train, self.step, self.progress())
                    speed.read(self._mean(loss), self.step, end, self.seconds, lr)
                # Alone, a process may stop for a signal that came since; one of several must do as all do.
                asked = asked or (self.processes.size == 1 and (self._interrupt.signal is not None or self._lost is not None))
                if asked or over:
                    break
                validates, saves = self._validates(), self.step % train.save_interval == 0
                if validates or saves:
                    settle()
                if validates:
                    self._validate()
                if saves:
                    self._save()
                if first or validates or saves:
                    speed.restart(self.step)
        except Stopped:
            asked = True
        else:
            asked = loss is not None and asked
        settle()
        return asked

    def _report_step(self, reading: Reading, took: float) -> None:
        """Log what the device says of the last steps, which took so many seconds."""
        self.train_loss = self._check(reading.loss, reading.step)
        rate = reading.steps * self.tokens_per_step / max(took, 1e-9)
        figures = {"loss": self.train_loss, "tokens_per_second": rate, "seconds": reading.seconds, "lr": reading.lr}
        if (mfu := self._mfu(rate)) is not None:
            figures["mfu"] = mfu
        self._record(reading.step, **figures)
        self._tell(self._on_step, reading.step, self.config.train.steps, figures)
        if not self._foretold and self.speed.warm_seconds >= 1.0:
            self._foretold = True
            self._foretell(self.speed.warm_mean * self.tokens_per_step)

    def _foretell(self, tokens_per_second: float) -> None:
        """How long it will take, once something is known about it."""
        train = self.config.train
        left = (train.steps - self.step) * self.tokens_per_step / max(tokens_per_second, 1e-9)
        limited = train.max_seconds is not None and train.max_seconds - self.seconds < left
        if limited and train.max_seconds is not None:
            left = max(0.0, train.max_seconds - self.seconds)
        until = f", until train.max_seconds={train.max_seconds:g} is over" if limited else ""
        self.log(f"{tokens_per_second:,.0f} tokens/s: about {duration(left)} of training to go{until}")

    def _draw(self) -> None:
        """The picture is worth less than the figures that are printed after it."""
        try:
            plot_loss(self.directory)
        except Exception as error:  # whatever matplotlib may have against a name or a number
            reason = str(error).strip() or type(error).__name__
            self.log(f"no picture of the loss: {reason.splitlines()[0]}")

    def _agree(self) -> bool:
        """Whether to stop after this step. That and the clock are the same for all processes, so that none waits for another
        for ever."""
        asked = int(self._interrupt.signal or self._lost is not None)
        if self.processes.size > 1:
            both = torch.tensor([asked, self.seconds], dtype=torch.float64, device=self.processes.device)
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
            asked, self.seconds = int(both[0]), float(both[1])
        return asked != 0

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOP utilisation, or None where the device's peak is not known."""
        peak = peak_flops(self.processes.device)
        if peak is None:
            return None
        flops = self.model.flops_per_token(self.config.model.context_length)
        return flops * tokens_per_second / (peak * self.processes.size)


__all__ = ["Result", "Trainer"]
