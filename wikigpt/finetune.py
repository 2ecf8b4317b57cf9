"""Training on prompt/completion pairs (translation, question answering, code), from a checkpoint or scratch.

A task of the trainer like any other: the run directory, its lock, --resume, the log and the picture are those of `wikigpt
train`. The loss counts completions only. The weights with the lowest validation loss are kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint as checkpoints
from .config import Config, DataConfig, TrainConfig, resolve
from .data import Tokenizer, WordTokenizer, train_tokenizer
from .errors import UserError, integer
from .model import GPT, GPTConfig
from .pairs import Pair, encode_pairs, read_pairs
from .train import LAST, PairsTask, Processes, Result, Trainer, owned, pairs_perplexity, pick_device

MODEL = {"n_layer": 2, "n_embd": 64, "n_head": 4}  # from scratch: small data sets, seconds on a CPU
LR_SCRATCH, LR_CHECKPOINT = 2e-3, 1e-4
EPOCHS, MIN_STEPS = 20, 500
EVALUATIONS = 20  # validations (and lines of log) in a run


def finetune(
    pairs_path: str | Path | None,
    out: str | Path,
    *,
    checkpoint: str | Path | None = None,
    tokenizer: str | None = None,
    n_layer: int | None = None,
    n_embd: int | None = None,
    n_head: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    valid_fraction: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
    run: Callable[[Trainer], Result] = Trainer.run,
) -> Path:
    """Train on the pairs and write `out`/wiki-gpt.pth, whose path is returned.

    `checkpoint` is where to start (a file, a run directory or a Hugging Face directory); None trains a small
    model from scratch, with a tokenizer ("word", "bpe" or "byte"; None is "word") made from the pairs. `lr`
    None is 2e-3 from scratch and 1e-4 from a checkpoint; batch_size None is 32, seed 0, valid_fraction 0.1. Without `epochs`
    and `steps` it is 20 epochs, and at least 500 steps. `log` gets lines of text, `run` may watch the trainer. The same
    arguments on the same machine give the same weights.

    resume=True goes on with the run in `out`, which knows its settings and its pairs: only `steps`, `epochs`, `lr` and
    `device` may be given beside it, and `pairs_path` where the file has moved. overwrite=True replaces it.

    Raises UserError for unusable pairs or settings, for a directory that holds another run or belongs to another process,
    and for a loss that is no longer finite; the best weights until then stay in the file.
    """
    # Python's own numbers: a checkpoint that holds numpy's cannot be read again.
    numbers = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "seed": seed}
    given: dict[str, Any] = {name: integer(name, x) for name, x in numbers.items() if x is not None}
    given |= {name: float(x) for name, x in (("lr", lr), ("valid_fraction", valid_fraction)) if x is not None}
    _check(given)
    sizes = {"tokenizer": tokenizer, "n_layer": n_layer, "n_embd": n_embd, "n_head": n_head}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    out, target = Path(out), pick_device(device)
    with owned(out, resume, overwrite), torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        if resume:
            saved = checkpoints.load(out / LAST)
            if saved.get("task", {}).get("kind") != "pairs":
                raise UserError(f"{out} holds no run of `wikigpt finetune`; go on with it by `wikigpt train --resume`")
            fixed = sorted({*given, *sizes, *({"checkpoint"} if checkpoint else ())} - {"steps", "epochs", "lr"})
            if fixed:
                raise UserError(f"--{fixed[0].replace('_', '-')}: the run in {out} has its own; leave it out beside --resume")
            pairs_path = pairs_path or saved["task"]["pairs"]
            if not Path(pairs_path).is_file():
                raise UserError(f"the pairs of the run are no longer at {pairs_path}; name the file: finetune FILE --resume")
            model, tok = checkpoints.model_from(saved), checkpoints.tokenizer_from(saved)
            assert tok is not None
            base, settings = saved["config"], {**saved["task"], "pairs": str(Path(pairs_path).resolve())}
            settings = {key: value for key, value in settings.items() if key not in ("kind", "origin")}
            pairs = read_pairs(pairs_path)
        else:
            if pairs_path is None:
                raise UserError("no file of pairs: name one, or add --resume to go on with the run in --out")
            pairs = read_pairs(pairs_path)
            torch.manual_seed(given.get("seed", 0))
            model, tok = _start(pairs, checkpoint, sizes, out, target)
            base = None
            settings = {
                "pairs": str(Path(pairs_path).resolve()),
                "checkpoint": None if checkpoint is None else str(checkpoint),
                "valid_fraction": given.get("valid_fraction", 0.1),
                "seed": given.get("seed", 0),
            }
        ids, targets = encode_pairs(pairs, tok, model.config.context_length, log)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(settings["seed"]))
        n_valid = min(math.ceil(settings["valid_fraction"] * len(pairs)), len(pairs) - 1)
        n_train = len(pairs) - n_valid
        config = _config(given, base, settings, n_train, model.config, target)
        parts = [(ids[rows], targets[rows]) for rows in (order[n_valid:], order[:n_valid])]
        task = PairsTask(tok, parts[0], parts[1], _fingerprint(ids, targets, tok), settings)
        log(
            f"{len(pairs):,} pairs: {n_train:,} to train, {n_valid:,} to validate; {tok.kind} vocabulary of "
            f"{tok.vocab_size:,}; model of {model.num_parameters():,} parameters on {target}"
        )
        run(Trainer(config, task, out, Processes(0, 1, target), resume, log, model))
    return out / checkpoints.NAME


def _check(given: dict[str, Any]) -> None:
    if "epochs" in given and "steps" in given:
        raise UserError("both epochs and steps are given; give one of the two")
    for name in ("epochs", "steps", "batch_size"):
        if given.get(name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {given[name]}; it must be 1 or more")
    if not 0 < given.get("lr", 1.0) < math.inf:
        raise UserError(f"--lr is {given['lr']}; it must be above 0, for example {LR_CHECKPOINT}")
    if not 0 <= given.get("valid_fraction", 0.0) < 1:
        raise UserError(f"--valid-fraction is {given['valid_fraction']}; it must be at least 0 and below 1")
    if not -(2**63) <= given.get("seed", 0) < 2**63:
        raise UserError(f"--seed is {given['seed']}; it must fit into 64 bits")


def _start(
    pairs: list[Pair], checkpoint: str | Path | None, sizes: dict[str, Any], out: Path, device: torch.device
) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer to begin with."""
    if checkpoint is None:
        kind = sizes.pop("tokenizer", "word")
        return _scratch(pairs, kind, sizes)
    for name in sizes:
        raise UserError(f"--{name.replace('_', '-')} is for training from scratch; leave it out, {checkpoint} has its own")
    if out.resolve() in (Path(checkpoint).resolve(), Path(checkpoint).resolve().parent):
        raise UserError(f"{out} holds the checkpoint to start from; choose another --out to keep it")
    loaded = checkpoints.load_model(checkpoint, device)
    if loaded.tokenizer is None:
        raise UserError(f"{checkpoint} has no tokenizer; put the tokenizer's files beside the model")
    return loaded.model, loaded.tokenizer


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


def _config(
    given: dict[str, Any],
    base: dict[str, Any] | None,
    settings: dict[str, Any],
    n_train: int,
    model: GPTConfig,
    device: torch.device,
) -> Config:
    """The settings of the run: those given, then those of the run that is resumed, then those of this page."""
    if base is not None:
        config = resolve(base=base)
        config.model = model
        train = config.train
    else:
        train = TrainConfig(
            batch_size=given.get("batch_size", 32),
            lr=LR_SCRATCH if settings["checkpoint"] is None else LR_CHECKPOINT,
            seed=settings["seed"],
            weight_decay=0.01,
            beta2=0.999,
            min_lr_fraction=0.0,
            precision="bf16" if device.type == "cuda" else "fp32",
            cuda_graph=False,  # batches are as long as their longest pair
        )
        config = Config(DataConfig(), model, train)
    train.device = str(device)
    train.lr = given.get("lr", train.lr)
    per_epoch = math.ceil(n_train / train.batch_size)
    if "steps" in given or "epochs" in given or base is None:
        train.steps = given.get("steps") or (
            given["epochs"] * per_epoch if "epochs" in given else max(EPOCHS * per_epoch, MIN_STEPS)
        )
        train.warmup_steps = min(100, math.ceil(train.steps / 10))
        train.eval_interval = train.save_interval = math.ceil(train.steps / EVALUATIONS)
        train.log_interval = max(1, train.eval_interval // 5)
    return config


def _fingerprint(ids: Tensor, targets: Tensor, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer.fingerprint().encode())
    for part in (ids, targets):
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def pairs_loss(model: GPT, ids: Tensor, targets: Tensor, batch_size: int = 32) -> float:
    """Mean cross-entropy in nats of the completion tokens of encoded pairs, each (N, S) int64."""
    found = pairs_perplexity(model, ids, targets, batch_size)
    return found.nats / found.tokens


__all__ = ["finetune", "pairs_loss"]
