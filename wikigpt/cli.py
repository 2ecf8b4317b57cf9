"""The `wikigpt` command. Each subcommand parses, calls one function of the library and prints what it returns."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from . import __version__
from .cli_group import Group
from .errors import UserError
from .output import show_any_character
from .settings_help import keys_epilog

if TYPE_CHECKING:
    from .config import Config
    from .data import Tokenizer
    from .model import GPT

RUNS = Path("runs")
DEFAULT_PRESET = "cpu-small"
MOST_TOKENS = 1_000_000  # of one text: more is a slip of the finger

app = typer.Typer(
    name="wikigpt",
    cls=Group,
    help="Train a GPT on WikiText-2 with fused kernels, measure it, and use it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(cls=Group, help="Look at the text and its tokens.", no_args_is_help=True)
app.add_typer(data_app, name="data")
config_app = typer.Typer(cls=Group, help="Look at the settings of training.", no_args_is_help=True)
app.add_typer(config_app, name="config")
# Paths and texts may hold brackets and colons, which rich would take for its own.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

_CHECKPOINT_HELP = "a run directory, a .pth file, or a Hugging Face directory or name; default: the newest run in runs/"
CheckpointOption = typer.Option(None, "--checkpoint", "-c", help=_CHECKPOINT_HELP)
CheckpointArgument = typer.Argument(None, help=_CHECKPOINT_HELP)
DeviceOption = typer.Option("auto", help="auto, cpu, cuda, cuda:1 ...")
BackendOption = typer.Option(None, help="which kernels: auto, reference, torch, triton")
DatasetOption = typer.Option(None, help="wikitext-2, wikitext-2-raw, auto, pydoc, or a path such as 'texts/*.txt'")
DataDirOption = typer.Option(None, help="folder with train.txt valid.txt test.txt (or WIKIGPT_DATA_DIR)")


def newest_run() -> Path:
    """The run in runs/ that wrote its model last."""
    from .checkpoint import NAME

    found = sorted(RUNS.glob(f"*/{NAME}"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError("no trained model in runs/; train one with `wikigpt train`, or name one with --checkpoint")
    return found[-1].parent


def load(source: str | None, device: str, backend: str | None = None) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    from .checkpoint import load_model
    from .model import check_backend
    from .train import pick_device

    on = pick_device(device)
    check_backend(backend, on.type)
    if source is None:
        source = str(newest_run())
        if sys.stderr.isatty():
            print(f"model: {source}, the newest run", file=sys.stderr)
    loaded = load_model(source, on, backend)
    if loaded.tokenizer is None:
        raise UserError(f"{source} holds no tokenizer that wikigpt can read; use a checkpoint of `wikigpt train`")
    return loaded.model, loaded.tokenizer, loaded.content


@contextlib.contextmanager
def refused(what: str | None = None) -> Iterator[None]:
    """What the library refuses inside was given by the user."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"{what}: {str(error).removeprefix('backend: ')}" if what else str(error)) from error


def show_origin(dataset: Any) -> None:
    console.print(f"data: {dataset.name}, {dataset.origin}")


def show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"wikigpt {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Print the version and leave."),
) -> None:
    show_any_character()


@data_app.command("info")
def data_info(
    dataset: str = typer.Option("wikitext-2", help="wikitext-2, wikitext-2-raw, auto, pydoc, or a path"),
    data_dir: Path | None = DataDirOption,
    tokenizer: str = typer.Option("word", help="word, bpe or byte"),
    vocab_size: int | None = typer.Option(None, min=2, max=2**31 - 1, help="limit of the vocabulary (bpe: 8192)"),
) -> None:
    """Lines, words, tokens and types of each split."""
    from .data import info, prepare

    prepared = prepare(dataset, tokenizer, vocab_size, data_dir)
    show_origin(prepared)
    console.print(info(prepared))
    console.print(f"token files: {prepared.directory}")


@app.command()
def presets() -> None:
    """The configurations that `train --preset` and `config show` know by name: their sizes, and what they are for."""
    from .config import presets as names
    from .config import resolve
    from .output import count
    from .settings_help import purpose

    table = Table("preset", "layers", "width", "context", "parameters", "for", box=None, pad_edge=False)
    for name in names():
        settings = resolve(name)
        model = settings.model
        sizes = (str(size) for size in (model.n_layer, model.n_embd, model.context_length))
        table.add_row(name, *sizes, count(parameters(settings)), purpose(name))
    # A line each where no terminal limits it.
    (console if console.is_terminal else Console(width=200, highlight=False)).print(table)


def parameters(settings: Config) -> int:
    """Of the model that these settings train on WikiText-2, whose vocabulary is known."""
    from .data.tokenizers import BPE_VOCAB_SIZE
    from .memory import count_parameters

    types = {"word": 33278, "bpe": BPE_VOCAB_SIZE, "byte": 257}[settings.data.tokenizer]
    return count_parameters(settings.model, settings.data.vocab_size or types)


@config_app.command("show")
def config_show(
    preset: str | None = typer.Argument(None, metavar="PRESET", help=f"see wikigpt presets; default: {DEFAULT_PRESET}"),
    overrides: list[str] = typer.Argument(None, metavar="KEY=VALUE", help="any setting, see wikigpt config keys"),
    config: Path | None = typer.Option(None, help="YAML or TOML file with settings, on top of the preset"),
) -> None:
    """The whole configuration that `train` would run with, as YAML for --config."""
    from .config import dump, resolve

    changes = list(overrides or ())
    if preset is None or "=" in preset:  # the first override then
        preset, changes = DEFAULT_PRESET, [preset, *changes] if preset else []
    console.print(dump(resolve(preset, config, changes)), end="")


@config_app.command("keys")
def config_keys() -> None:
    """Every setting with its default and what it is for."""
    from .settings_help import table

    console.print(table(console.width))


@app.command(epilog=keys_epilog())
def train(
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="any setting, for example train.lr=3e-4 model.n_layer=6"
    ),
    preset: str | None = typer.Option(None, help=f"see wikigpt presets; default: {DEFAULT_PRESET}"),
    config: Path | None = typer.Option(None, help="YAML or TOML file with settings, on top of the preset"),
    out: Path | None = typer.Option(None, help="run directory; default runs/PRESET-DATE-TIME"),
    resume: bool = typer.Option(False, help="go on with the run in --out, exactly where it stopped"),
    overwrite: bool = typer.Option(False, help="replace the run in --out"),
    dataset: str | None = DatasetOption,
    data_dir: Path | None = DataDirOption,
    device: str | None = typer.Option(None, help="auto, cpu, cuda, cuda:1 ..."),
    backend: str | None = BackendOption,
    steps: int | None = typer.Option(None, help="optimiser steps"),
    max_seconds: float | None = typer.Option(None, help="stop after this time"),
    batch_size: int | None = typer.Option(None, help="sequences per process and micro-step"),
    seed: int | None = typer.Option(None, help="seed of weights, batches and dropout"),
    prompt: str = typer.Option("The history of the city", help="continued by the model at the end"),
) -> None:
    """Train a GPT; prints perplexities as it goes, and where it wrote checkpoint, log and loss curve.

    Ctrl-C stops after the step under way and saves; --resume goes on. Under torchrun it runs on several processes.
    """
    from . import checkpoint as checkpoints
    from .config import resolve
    from .data import prepare
    from .model import check_backend
    from .output import count
    from .train import LAST, TextTask, Trainer, owned, pick_device, processes

    given = {"dataset": dataset, "data_dir": data_dir, "device": device, "backend": backend, "steps": steps,
             "max_seconds": max_seconds, "batch_size": batch_size, "seed": seed}  # fmt: skip
    changes = [*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value is not None)]
    if resume and out is None:
        raise UserError("--resume needs --out RUN_DIRECTORY")
    if resume and preset is not None:
        raise UserError(f"--preset {preset}: the run in {out} has its settings; leave it out beside --resume")
    preset = preset or DEFAULT_PRESET
    settings = None if resume else resolve(preset, config, changes)
    out = out or RUNS / f"{preset}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    first = os.environ.get("RANK", "0") == "0"
    with owned(out, resume, overwrite) if first else contextlib.nullcontext():
        if settings is None:
            saved = checkpoints.load(out / LAST)
            if saved.get("task", {}).get("kind") == "pairs":
                raise UserError(f"{out} holds a run of `wikigpt finetune`; go on with it by `wikigpt finetune --resume`")
            settings = resolve(None, config, changes, base=saved["config"])
            del saved
        check_backend(settings.model.backend, pick_device(settings.train.device).type, "adamw", "grad_norm", "sample")
        prepared = prepare(settings.data.dataset, settings.data.tokenizer, settings.data.vocab_size, settings.data.data_dir)
        settings.data.dataset = source_name(prepared.name, settings.data.dataset)
        if settings.data.data_dir is not None:
            settings.data.data_dir = os.path.abspath(settings.data.data_dir)
        with processes(settings.train.device) as group:
            trainer = Trainer(settings, TextTask(prepared), out, group, resume, log=say)
            if group.first:
                show_origin(prepared)
                model = trainer.model
                inner = count(model.num_parameters(embeddings=False))
                console.print(
                    f"model: {count(model.num_parameters())} parameters ({inner} without embeddings), "
                    f"vocabulary {model.config.vocab_size:,}, context {model.config.context_length:,}, "
                    f"on {group.device}{f' x {group.size}' if group.size > 1 else ''}"
                )
                limit = settings.train.max_seconds
                console.print(
                    f"run: {out}, {settings.train.steps:,} steps of {trainer.tokens_per_step:,} tokens"
                    + (f", at most {limit:g} s of training" if limit is not None else "")
                    + " (Ctrl-C saves and stops; --resume goes on)"
                )
                if resume:
                    console.print(f"resumed at step {trainer.step}")
            result = run_with_progress(trainer, f"wikigpt train --resume --out {out}")
            if not group.first:
                return
    if result.interrupted:
        return
    show_final(result, prepared.tokenizer.kind == "word", settings.train.final_tokens)
    if result.tokens_per_second == result.tokens_per_second:  # some steps were timed
        console.print(f"speed: {result.tokens_per_second:,.0f} tokens/s in training, {result.seconds:.0f} s in all")
    from .generate import complete
    from .prompting import fit, show

    model = checkpoints.load_model(out, trainer.processes.device).model

    def go_on(rows: list[list[int]], stream: Any) -> list[str]:
        return complete(
            model, prepared.tokenizer, rows, 50, temperature=0.8, top_k=40, seed=0, stop_at_eos=False, stream_text=stream
        )

    console.print("\na continuation", style="bold")
    show(console, fit(model, prepared.tokenizer, [prompt]), go_on)
    console.print(
        f"\ncheckpoint: {out / checkpoints.NAME}\nlog:        {out / 'log.jsonl'} (and tensorboard --logdir {out})"
        f"\nloss curve: {out / 'loss.png'}"
    )


def source_name(found: str, asked: str) -> str:
    """What a run notes as its data set, so that it is found again: what auto stands for, and files by their whole path."""
    from .data.sources import NAMES

    return found if asked == "auto" else asked if asked in NAMES else os.path.abspath(os.path.expanduser(asked))


def say(line: str) -> None:
    console.print(line)


def show_final(result: Any, words: bool, sample: int | None) -> None:
    """The figures in the end: of the weights in wiki-gpt.pth, validation and test in the same way."""
    console.print(f"the weights of step {result.best_step:,}, with the lowest validation loss, are in wiki-gpt.pth:")
    names = {"valid": "validation", "test": "test"}
    for split, figure in result.final.items():
        per_word = "" if words or figure.per_word is None else f", {figure.per_word:.2f} per word"
        how = "whole split, sliding window" if sample is None else f"{figure.tokens:,} tokens of the split, blocked"
        console.print(f"  {names[split]} perplexity: {figure.per_token:.2f}{per_word}  ({how})")
    if sample is not None:
        console.print(f"  every token, as papers count it: wikigpt evaluate {result.directory}")


def run_with_progress(trainer: Any, resume: str) -> Any:
    """Run with a progress bar on a terminal, with a line now and then elsewhere. `resume` is the command that goes on."""
    if not trainer.processes.first:
        return trainer.run()
    try:
        result = watched_run(trainer)
    except KeyboardInterrupt:
        if trainer.begun:
            console.print(f"stopped at once; the last save can be gone on with: {resume}")
        raise
    if result.interrupted:
        console.print(f"go on with: {resume}")
    return result


def watched_run(trainer: Any) -> Any:
    def line(figures: dict[str, float]) -> str:
        mfu = f", MFU {figures['mfu']:.1%}" if "mfu" in figures else ""
        return f"loss {figures['loss']:.3f}, {figures['tokens_per_second']:,.0f} tokens/s{mfu}"

    if not console.is_terminal:
        last = time.monotonic()

        def due() -> bool:
            nonlocal last
            if time.monotonic() - last < 10:
                return False
            last = time.monotonic()
            return True

        def on_step(step: int, steps: int, figures: dict[str, float]) -> None:
            if due():
                console.print(f"step {step}/{steps}: {line(figures)}")

        def on_evaluate(split: str, done: int, total: int) -> None:
            if due():
                console.print(f"evaluating, {split}: {done / total:.0%}")

        return trainer.run(on_step, on_evaluate)

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=1.0, completed=trainer.progress(), text="")
        evaluation = progress.add_task("", total=1, text="", visible=False)

        def on_tty_step(step: int, steps: int, figures: dict[str, float]) -> None:
            progress.update(task, completed=trainer.progress(), text=f"step {step}/{steps}, {line(figures)}")

        def on_tty_evaluate(split: str, done: int, total: int) -> None:
            progress.update(evaluation, description=split, completed=done, total=total, visible=done < total)

        return trainer.run(on_tty_step, on_tty_evaluate)


@app.command()
def evaluate(
    checkpoint: str | None = CheckpointArgument,
    split: str | None = typer.Option(None, help="train, valid or test (default)"),
    dataset: str | None = DatasetOption,
    data_dir: Path | None = DataDirOption,
    stride: int | None = typer.Option(None, min=1, help="tokens the window moves by; default: half the context, and all of it"),
    dynamic_lr: float | None = typer.Option(None, help="> 0: dynamic evaluation with this SGD learning rate"),
    bleu: Path | None = typer.Option(None, help="JSONL of prompt/completion pairs: report BLEU instead"),
    hypotheses: Path | None = typer.Option(None, help="with --bleu: write the model's completions here"),
    max_new_tokens: int | None = typer.Option(None, min=1, max=MOST_TOKENS, help="with --bleu: longest completion"),
    device: str = DeviceOption,
    backend: str | None = BackendOption,
) -> None:
    """Perplexity on a split as papers count it, or BLEU on prompt/completion pairs."""
    with_bleu = {"--hypotheses": hypotheses, "--max-new-tokens": max_new_tokens}
    without = {"--split": split, "--dataset": dataset, "--data-dir": data_dir, "--stride": stride, "--dynamic-lr": dynamic_lr}
    for option, value in (with_bleu if bleu is None else without).items():
        if value is not None:
            raise UserError(f"{option} {'needs' if bleu is None else 'has no effect with'} --bleu: leave it out")
    if bleu is not None:
        report_bleu(checkpoint, bleu, hypotheses, max_new_tokens, device, backend)
    else:
        report_perplexity(
            checkpoint, "test" if split is None else split, dataset, data_dir, stride, dynamic_lr or 0.0, device, backend
        )


def report_bleu(
    checkpoint: str | None, pairs_file: Path, hypotheses: Path | None, most: int | None, device: str, backend: str | None
) -> None:
    from .bleu import evaluate_bleu, write_hypotheses
    from .output import check_file, progress
    from .pairs import read_pairs

    if hypotheses is not None:
        check_file(hypotheses)
    pairs = read_pairs(pairs_file)
    model, tokenizer, _ = load(checkpoint, device, backend)
    words = [token for pair in pairs for token in tokenizer.encode(pair.prompt).tolist()]
    if unknown := words.count(getattr(tokenizer, "unk_id", -1)):
        print(f"note: {unknown:,} of {len(words):,} words of the prompts are not in the vocabulary: <unk>", file=sys.stderr)
    with progress("completions", console) as on_step:
        result = evaluate_bleu(model, tokenizer, pairs, max_new_tokens=most, progress=on_step)
    console.print(str(result))
    if hypotheses is not None:
        write_hypotheses(result, hypotheses)
        console.print(f"completions: {hypotheses}")


def report_perplexity(
    checkpoint: str | None,
    split: str,
    dataset: str | None,
    data_dir: Path | None,
    stride: int | None,
    dynamic_lr: float,
    device: str,
    backend: str | None,
) -> None:
    from .data import prepare
    from .data.sources import SPLITS
    from .evaluate import check_dynamic_lr, perplexity, strides
    from .output import progress

    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; use {', '.join(SPLITS)}")
    check_dynamic_lr(dynamic_lr)
    model, tokenizer, content = load(checkpoint, device, backend)
    rows = strides(model.config.context_length, stride)
    saved = content.get("config", {}).get("data", {})
    prepared = prepare(
        saved.get("dataset", "wikitext-2") if dataset is None else dataset,
        data_dir=saved.get("data_dir") if data_dir is None else data_dir,
        tokenizer_json=tokenizer.to_json(),
    )
    show_origin(prepared)
    trained = content.get("task", {})
    if dataset is None and data_dir is None and trained.get("kind") == "text" and content["dataset"] != prepared.fingerprint:
        raise UserError(
            f"this is not the text that the model was trained on ({trained['origin']}); name that one with --data-dir or "
            "WIKIGPT_DATA_DIR, or this one with --dataset"
        )
    tokens, stats = prepared.tokens[split], prepared.stats[split]
    table = Table("protocol", "stride", "tokens", "nats/token", "perplexity", "per word")
    for name, step in rows:
        with progress(f"{split}, {name}", console) as on_step:
            figure = perplexity(
                model, tokens, tokenizer.first_id, stride=step, stats=stats, dynamic_lr=dynamic_lr, progress=on_step
            )
        table.add_row(
            name + (", dynamic" if dynamic_lr else ""), str(step), f"{figure.tokens:,}",
            f"{figure.nats / figure.tokens:.4f}", f"{figure.per_token:.2f}", f"{figure.per_word:.2f}",
        )  # fmt: skip
    console.print(table)


@app.command()
def generate(
    prompts: list[str] = typer.Argument(
        None,
        metavar="PROMPT",
        help="text to continue, - for standard input; several are a batch; none: asks for it",
    ),
    prompt_file: list[Path] = typer.Option([], help="file whose whole text is a prompt; may be given several times"),
    checkpoint: str | None = CheckpointOption,
    max_new_tokens: int = typer.Option(100, min=1, max=MOST_TOKENS, help="tokens to add"),
    # Their ranges are those of `sample`, which refuses inf and nan too.
    temperature: float = typer.Option(0.8, help="0: always the likeliest token; above 1: bolder"),
    top_k: int | None = typer.Option(None, help="choose among the k likeliest tokens"),
    top_p: float | None = typer.Option(None, help="choose among the likeliest tokens of this total probability"),
    min_p: float | None = typer.Option(None, help="drop tokens below this fraction of the likeliest one's probability"),
    seed: int | None = typer.Option(None, help="same seed, same text"),
    stop_at_eos: bool = typer.Option(True, help="stop where the model ends the text (word-level: the paragraph)"),
    device: str = DeviceOption,
    backend: str | None = BackendOption,
) -> None:
    """Continue a text; one prompt streams as it is made. Without a prompt, asks for one after the other on a terminal."""
    from .generate import check_sampling, check_seed, complete
    from .prompting import converse, fit, read_prompts, show

    options: Any = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    with refused():
        check_sampling(**options)
        check_seed(seed)
    texts = read_prompts(prompts or [], prompt_file)
    if not texts and not sys.stdin.isatty():
        raise UserError("no prompt: give a text, - to read standard input, or --prompt-file FILE")
    model, tokenizer, _ = load(checkpoint, device, backend)

    def go_on(rows: list[list[int]], stream: Any) -> list[str]:
        with refused("the model computes no probabilities"):
            return complete(
                model, tokenizer, rows, max_new_tokens, seed=seed, stop_at_eos=stop_at_eos, stream_text=stream, **options
            )

    if texts:
        show(console, fit(model, tokenizer, texts), go_on)
    else:
        converse(console, model, tokenizer, go_on)


@app.command()
def finetune(
    pairs: Path | None = typer.Argument(None, help='JSONL file, a line each: {"prompt": ..., "completion": ...}'),
    out: Path = typer.Option(..., help="run directory to write"),
    resume: bool = typer.Option(False, help="go on with the run in --out, exactly where it stopped"),
    overwrite: bool = typer.Option(False, help="replace the run in --out"),
    checkpoint: str | None = typer.Option(
        None, "--checkpoint", "-c", help="model to start from; default: a small one from scratch"
    ),
    tokenizer: str | None = typer.Option(None, help="from scratch: word, bpe or byte (default word)"),
    n_layer: int | None = typer.Option(None, help="from scratch: number of layers"),
    n_embd: int | None = typer.Option(None, help="from scratch: width"),
    n_head: int | None = typer.Option(None, help="from scratch: number of heads"),
    epochs: int | None = typer.Option(None, help="passes over the pairs"),
    steps: int | None = typer.Option(None, help="optimiser steps, in place of --epochs"),
    batch_size: int | None = typer.Option(None, help="pairs per step (default 32)"),
    lr: float | None = typer.Option(None, help="highest learning rate"),
    valid_fraction: float | None = typer.Option(None, help="share of the pairs kept for validation (default 0.1)"),
    seed: int | None = typer.Option(None, help="seed of weights and order (default 0)"),
    device: str = DeviceOption,
) -> None:
    """Learn prompt -> completion pairs (translation, questions, code); the loss counts completions only.

    Ctrl-C stops after the step under way and saves; --resume goes on.
    """
    from .finetune import finetune as run

    results: list[Any] = []

    def watched(trainer: Any) -> Any:
        results.append(run_with_progress(trainer, f"wikigpt finetune --resume --out {out}"))
        return results[0]

    path = run(
        pairs, out, checkpoint=checkpoint, tokenizer=tokenizer, n_layer=n_layer, n_embd=n_embd, n_head=n_head,
        epochs=epochs, steps=steps, batch_size=batch_size, lr=lr, seed=seed, device=device,
        valid_fraction=valid_fraction, resume=resume, overwrite=overwrite, log=say, run=watched,
    )  # fmt: skip
    if results[0].interrupted:
        return
    console.print(f"checkpoint: {path} (the weights of step {results[0].best_step:,})")
    console.print(f"log:        {out / 'log.jsonl'}, loss curve {out / 'loss.png'}")


@app.command()
def attention(
    text: str = typer.Argument(..., help="the text whose attention is drawn"),
    checkpoint: str | None = CheckpointOption,
    layer: int | None = typer.Option(None, min=0, help="layer, from 0; default: all"),
    head: int | None = typer.Option(None, min=0, help="head, from 0; default: all"),
    out: Path = typer.Option(Path("attention.png"), help="picture to write: .png, .pdf or .svg"),
    device: str = DeviceOption,
) -> None:
    """Draw the attention weights of a text: who looks at whom, in every layer and head or in one."""
    from .attention_map import check_output, draw

    check_output(out)
    model, tokenizer, _ = load(checkpoint, device)
    draw(model, tokenizer, text, out, layer=layer, head=head)
    console.print(f"wrote {out}")


@app.command()
def export(
    directory: Path = typer.Argument(..., help="directory to write"),
    checkpoint: str | None = CheckpointOption,
    overwrite: bool = typer.Option(False, help="replace the model in DIRECTORY; files of other kinds stay"),
) -> None:
    """Write the model for `transformers.AutoModelForCausalLM` and vLLM (GPT-2 or Llama layout, safetensors)."""
    from . import hub
    from .checkpoint import load_model

    loaded = load_model(checkpoint or newest_run())
    hub.save_pretrained(loaded.model, directory, loaded.tokenizer, overwrite)
    console.print(f"wrote {directory}; load it with transformers.AutoModelForCausalLM.from_pretrained({str(directory)!r})")


@app.command()
def doctor(
    every: bool = typer.Option(False, "--all", help="each op with each of its implementations"),
) -> None:
    """What this machine has, and which implementation of every op it gets, with the reason."""
    from .doctor import report, table

    with refused("WIKIGPT_BACKEND"):
        for line in report():
            console.print(line)
        if every:
            console.print(table())
        else:
            console.print("wikigpt doctor --all: each op with each of its implementations")
