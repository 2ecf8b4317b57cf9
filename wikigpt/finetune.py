"""Training on prompt/completion pairs (translation, question answering, code), from a checkpoint or scratch.

The loss counts completions only. The weights with the lowest validation loss are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint as checkpoints
from .data import Tokenizer, WordTokenizer, train_tokenizer
from .errors import UserError, integer
from .model import GPT, GPTConfig
from .pairs import IGNORE, Pair, encode_pairs, read_pairs
from .train import pick_device

MODEL = {"n_layer": 2, "n_embd": 64, "n_head": 4}  # from scratch: small data sets, seconds on a CPU
LR_SCRATCH, LR_CHECKPOINT = 2e-3, 1e-4
EPOCHS, MIN_STEPS = 20, 500
EVALUATIONS = 20  # validations (and lines of log) in a run


def finetune(
    pairs_path: str | Path,
    out: str | Path,
    *,
    checkpoint: str | Path | None = None,
    tokenizer: str | None = None,
    n_layer: int | None = None,
    n_embd: int | None = None,
    n_head: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    lr: float | None = None,
    seed: int = 0,
    device: str = "auto",
    valid_fraction: float = 0.1,
    log: Callable[[str], None] = print,
) -> Path:
    """Train on the pairs and write `out`/wiki-gpt.pth, whose path is returned.

    `checkpoint` is where to start (a file, a run directory or a Hugging Face directory); None trains a small
    model from scratch, with a tokenizer ("word", "bpe" or "byte"; None is "word") made from the pairs. `lr`
    None is 2e-3 from scratch and 1e-4 from a checkpoint. Without `epochs` and `steps` it is 20 epochs, and at
    least 500 steps. `log` gets lines of text. The same arguments on the same machine give the same weights.

    Raises UserError for unusable pairs or settings, and for a loss that is no longer finite; the best weights
    until then stay in the file.
    """
    # Python's own numbers: a checkpoint that holds numpy's cannot be read again.
    epochs, steps = (x if x is None else integer(name, x) for name, x in (("epochs", epochs), ("steps", steps)))
    batch_size, seed = integer("batch_size", batch_size), integer("seed", seed)
    lr, valid_fraction = lr if lr is None else float(lr), float(valid_fraction)
    _check(epochs=epochs, steps=steps, batch_size=batch_size, lr=lr, valid_fraction=valid_fraction)
    pairs = read_pairs(pairs_path)
    target = pick_device(device)
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        torch.manual_seed(seed)
        if checkpoint is None:
            sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head}
            model, tok = _scratch(pairs, tokenizer or "word", {k: v for k, v in sizes.items() if v is not None})
            model.to(target)
        else:
            for name, value in (
                ("tokenizer", tokenizer),
                ("n-layer", n_layer),
                ("n-embd", n_embd),
                ("n-head", n_head),
            ):
                if value is not None:
                    raise UserError(f"--{name} is for training from scratch; leave it out, {checkpoint} has its own")
            if Path(checkpoint).resolve() in (Path(out).resolve(), Path(out).resolve() / checkpoints.NAME):
                raise UserError(f"{out} holds the checkpoint to start from; choose another --out to keep it")
            loaded = checkpoints.load_model(checkpoint, target)
            if loaded.tokenizer is None:
                raise UserError(f"{checkpoint} has no tokenizer; put the tokenizer's files beside the model")
            model, tok = loaded.model, loaded.tokenizer
        generator = torch.Generator().manual_seed(seed)
        ids, targets = encode_pairs(pairs, tok, model.config.context_length, log)
        order = torch.randperm(len(pairs), generator=generator)
        n_valid = min(math.ceil(valid_fraction * len(pairs)), len(pairs) - 1)
        data = [(ids[rows], targets[rows]) for rows in (order[n_valid:], order[:n_valid])]
        n_train = len(pairs) - n_valid
        steps_per_epoch = math.ceil(n_train / batch_size)
        settings: dict[str, Any] = {
            "pairs": str(pairs_path),
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "steps": steps or (epochs * steps_per_epoch if epochs else max(EPOCHS * steps_per_epoch, MIN_STEPS)),
            "batch_size": batch_size,
            "lr": lr or (LR_SCRATCH if checkpoint is None else LR_CHECKPOINT),
            "seed": seed,
            "valid_fraction": valid_fraction,
        }
        log(
            f"{len(pairs):,} pairs: {n_train:,} to train, {n_valid:,} to validate; {tok.kind} vocabulary of "
            f"{tok.vocab_size:,}; model of {model.num_parameters():,} parameters on {target}"
        )
        path = checkpoints.writable_directory(out) / checkpoints.NAME
        _train(model, tok, data[0], data[1], settings, steps_per_epoch, generator, path, log)
    return path


def _check(**settings: float | None) -> None:
    if settings["epochs"] is not None and settings["steps"] is not None:
        raise UserError("both epochs and steps are given; give one of the two")
    for name in ("epochs", "steps", "batch_size"):
        value = settings[name]
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    lr, valid = settings["lr"], settings["valid_fraction"]
    if lr is not None and not 0 < lr < math.inf:
        raise UserError(f"--lr is {lr}; it must be above 0, for example {LR_CHECKPOINT}")
    if valid is None or not 0 <= valid < 1:
        raise UserError(f"--valid-fraction is {valid}; it must be at least 0 and below 1")


def _scratch(pairs: list[Pair], kind: str, sizes: dict[str, int]) -> tuple[GPT, Tokenizer]:
    text = "".join(f"{pair.prompt}\n{pair.completion}\n" for pair in pairs)
    # All words, where train_tokenizer leaves those that occur once to <unk>: an answer may occur once.
    tok = WordTokenizer.train(text) if kind == "word" else train_tokenizer(kind, text)
    longest = max(len(tok.encode(pair.prompt)) + len(tok.encode(pair.completion)) for pair in pairs)
    try:
        config = GPTConfig(
            vocab_size=tok.vocab_size,
            # Rotary positions, and room for longer prompts than those trained on.
            context_length=max(128, 2 * longest),
            position="rotary",
            **{**MODEL, **sizes},  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise UserError(f"{error}; change --n-layer, --n-embd or --n-head") from None
    return GPT(config), tok


def _train(
    model: GPT,
    tokenizer: Tokenizer,
    train: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor],
    settings: dict[str, Any],
    steps_per_epoch: int,
    generator: torch.Generator,
    path: Path,
    log: Callable[[str], None],
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    steps, batch_size, peak = settings["steps"], settings["batch_size"], settings["lr"]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}])
    warmup = min(100, math.ceil(steps / 10))
    interval = math.ceil(steps / EVALUATIONS)
    device = model.head.weight.device
    best, best_step, running, count = math.inf, 0, 0.0, 0

    def not_finite(what: str, step: int) -> UserError:
        kept = f"{path} keeps the weights of step {best_step}" if best_step else "no checkpoint was written"
        return UserError(f"the {what} loss is not finite at step {step}: {kept}; try a lower --lr than {peak}")

    console = Console(stderr=True)
    batches = _batches(*train, batch_size, generator)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("fine-tuning", total=steps)
        for step in range(1, steps + 1):
            if step <= warmup:
                lr = peak * step / warmup
            else:
                lr = peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.train()
            ids, targets = next(batches)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(ids.to(device), targets.to(device))
            if not math.isfinite(loss.item()):
                raise not_finite("train", step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.advance(task)
            running, count = running + loss.item(), count + 1
            if step % interval and step != steps:
                continue

            train_loss = running / count
            running, count = 0.0, 0
            text = f"step {step:,}/{steps:,}, epoch {step / steps_per_epoch:.1f}: train loss {train_loss:.4f}"
            if len(valid[0]):
                value = pairs_loss(model, *valid, batch_size)
                text += f", validation loss {value:.4f}"
            else:
                value = train_loss
            if not math.isfinite(value):
                raise not_finite("validation", step)
            if value < best:
                best, best_step = value, step
                text += " (best so far, saved)"
                content = {
                    "model": model.state_dict(),
                    "model_config": model.config.to_dict(),
                    "tokenizer": tokenizer.to_json(),
                    "config": settings,
                    "step": step,
                    "train_loss": train_loss,
                    "valid_loss": value if len(valid[0]) else None,
                }
                checkpoints.save(path, content)
            log(text)


def _batches(ids: Tensor, targets: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (B, S) without end, in a new random order each epoch, cut to the longest pair in the batch."""
    while True:
        for rows in torch.randperm(len(ids), generator=generator).split(batch_size):
            yield _cut(ids[rows], targets[rows])


def _cut(ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    length = int((targets != IGNORE).any(dim=0).nonzero().max()) + 1
    return ids[:, :length], targets[:, :length]


@torch.no_grad()
def pairs_loss(model: GPT, ids: Tensor, targets: Tensor, batch_size: int = 32) -> float:
    """Mean cross-entropy in nats of the completion tokens of encoded pairs, each (N, S) int64."""
    model.eval()
    device = model.head.weight.device
    total = 0.0
    for batch in zip(ids.split(batch_size), targets.split(batch_size)):
        i, t = _cut(*batch)
        total += model.token_losses(i.to(device), t.to(device)).sum().item()
    return total / int((targets != IGNORE).sum())


__all__ = ["finetune", "pairs_loss"]
