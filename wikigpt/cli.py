"""The `wikigpt` command. Each subcommand parses, calls one function of the library and prints what it returns."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import UserError

if TYPE_CHECKING:
    from .data import Tokenizer
    from .model import GPT

RUNS = Path("runs")

app = typer.Typer(
    name="wikigpt",
    help="Train a GPT on WikiText-2 with fused kernels, measure it, and use it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at the text and its tokens.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console(highlight=False, soft_wrap=True)

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
    from .train import pick_device

    loaded = load_model(source or newest_run(), pick_device(device), backend)
    if loaded.tokenizer is None:
        raise UserError(f"{source} holds no tokenizer that wikigpt can read; use a checkpoint of `wikigpt train`")
    return loaded.model, loaded.tokenizer, loaded.content


def show_origin(dataset: Any) -> None:
    console.print(f"data: {dataset.name}, {dataset.origin}")


@app.callback()
def common(
    threads: int = typer.Option(0, help="CPU threads (0: one per core)", min=0),
) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


@data_app.command("info")
def data_info(
    dataset: str = typer.Option("wikitext-2", help="wikitext-2, wikitext-2-raw, auto, pydoc, or a path"),
    data_dir: Path | None = DataDirOption,
    tokenizer: str = typer.Option("word", help="word, bpe or byte"),
    vocab_size: int | None = typer.Option(None, help="limit of the vocabulary (bpe: 8192)"),
) -> None:
    """Lines, words, tokens and types of each split."""
    from .data import info, prepare

    prepared = prepare(dataset, tokenizer, vocab_size, data_dir)
    show_origin(prepared)
    console.print(info(prepared))
    console.print(f"vocabulary: {prepared.tokenizer.vocab_size} types; token files in {prepared.directory}")


@app.command()
def train(
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="any setting, for example train.lr=3e-4 model.n_layer=6"
    ),
    preset: str = typer.Option("cpu-small", help="quick, cpu-small, wikitext-2 or gpt2-small"),
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
    from .train import LAST, Trainer, processes

    given = {"dataset": dataset, "data_dir": data_dir, "device": device, "backend": backend, "steps": steps,
             "max_seconds": max_seconds, "batch_size": batch_size, "seed": seed}  # fmt: skip
    changes = [*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value is not None)]
    first = os.environ.get("RANK", "0") == "0"
    if resume:
        if out is None:
            raise UserError("--resume needs --out RUN_DIRECTORY")
        last = out / LAST
        if not last.is_file():
            raise UserError(f"nothing to resume in {out}: no {LAST} there; leave --resume out to start a run")
        settings = resolve(None, config, changes, base=checkpoints.load(last)["config"])
    else:
        settings = resolve(preset, config, changes)
        if out is None:
            out = RUNS / f"{preset}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        elif first and not overwrite and any((out / name).exists() for name in (LAST, checkpoints.NAME)):
            raise UserError(f"{out} holds a run already; add --resume to go on with it or --overwrite to replace it")

    prepared = prepare(settings.data.dataset, settings.data.tokenizer, settings.data.vocab_size, settings.data.data_dir)
    with processes(settings.train.device) as group:
        if group.first:
            # Only now, when nothing that the user may have got wrong is left.
            checkpoints.writable_directory(out)
            for name in (LAST, checkpoints.NAME, "log.jsonl") if not resume else ():
                (out / name).unlink(missing_ok=True)
        trainer = Trainer(settings, prepared, out, group, resume, log=console.print)
        if group.first:
            show_origin(prepared)
            model = trainer.model
            console.print(
                f"model: {model.num_parameters() / 1e6:.2f}M parameters "
                f"({model.num_parameters(embeddings=False) / 1e6:.2f}M without embeddings), vocabulary "
                f"{model.config.vocab_size}, context {model.config.context_length}, on {group.device} x {group.size}"
            )
            console.print(f"run: {out} (Ctrl-C saves and stops; --resume goes on)")
            if resume:
                console.print(f"resumed at step {trainer.step}")
        result = run_with_progress(trainer)
        if not group.first:
            return
    if result.interrupted:
        console.print(f"saved {out / LAST}; go on with: wikigpt train --resume --out {out}")
        return
    console.print(f"test perplexity: {result.test.per_token:.2f}  (sliding window, every token)")  # type: ignore[union-attr]
    if prepared.tokenizer.kind != "word":
        console.print(f"test perplexity per word: {result.test.per_word:.2f}")  # type: ignore[union-attr]
    console.print(f"speed: {result.tokens_per_second:,.0f} tokens/s in training, {result.seconds:.0f} s in all")
    from .generate import complete

    loaded = checkpoints.load_model(out, trainer.processes.device)
    assert loaded.tokenizer is not None

    console.print("\n[bold]a continuation[/bold]")
    text = complete(loaded.model, loaded.tokenizer, [prompt], 50, temperature=0.8, top_k=40, seed=0, stop_at_eos=False)[0]
    console.print(prompt + text, markup=False)
    console.print(
        f"\ncheckpoint: {out / checkpoints.NAME}\nlog:        {out / 'log.jsonl'} (and tensorboard --logdir {out})"
        f"\nloss curve: {out / 'loss.png'}"
    )


def run_with_progress(trainer: Any) -> Any:
    """Run with a progress bar on a terminal, with a line now and then elsewhere."""
    if not trainer.processes.first:
        return trainer.run()

    def line(figures: dict[str, float]) -> str:
        mfu = f", MFU {figures['mfu']:.1%}" if "mfu" in figures else ""
        return f"loss {figures['loss']:.3f}, {figures['tokens_per_second']:,.0f} tokens/s{mfu}"

    if not sys.stdout.isatty():
        last = [0.0]

        def on_step(step: int, steps: int, figures: dict[str, float]) -> None:
            if figures["seconds"] - last[0] >= 10:
                last[0] = figures["seconds"]
                console.print(f"step {step}/{steps}: {line(figures)}")

        return trainer.run(on_step)

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

        def on_tty_step(step: int, steps: int, figures: dict[str, float]) -> None:
            progress.update(task, completed=trainer.progress(), text=f"step {step}/{steps}, {line(figures)}")

        return trainer.run(on_tty_step)


@app.command()
def evaluate(
    checkpoint: str | None = CheckpointArgument,
    split: str = typer.Option("test", help="train, valid or test"),
    dataset: str | None = DatasetOption,
    data_dir: Path | None = DataDirOption,
    stride: int | None = typer.Option(None, help="tokens the window moves by; default half the context"),
    dynamic_lr: float = typer.Option(0.0, help="> 0: dynamic evaluation with this SGD learning rate"),
    bleu: Path | None = typer.Option(None, help="JSONL of prompt/completion pairs: report BLEU instead"),
    hypotheses: Path | None = typer.Option(None, help="with --bleu: write the model's completions here"),
    max_new_tokens: int | None = typer.Option(None, help="with --bleu: longest completion"),
    device: str = DeviceOption,
    backend: str | None = BackendOption,
) -> None:
    """Perplexity on a split as papers count it, or BLEU on prompt/completion pairs."""
    model, tokenizer, content = load(checkpoint, device, backend)
    if bleu is not None:
        from .bleu import evaluate_bleu, write_hypotheses
        from .pairs import read_pairs

        result = evaluate_bleu(model, tokenizer, read_pairs(bleu), max_new_tokens=max_new_tokens)
        console.print(str(result), markup=False)
        if hypotheses is not None:
            write_hypotheses(result, hypotheses)
            console.print(f"completions: {hypotheses}")
        return
    from .data import prepare
    from .evaluate import perplexity

    saved = content.get("config", {}).get("data", {})
    prepared = prepare(
        dataset or saved.get("dataset", "wikitext-2"),
        data_dir=data_dir or saved.get("data_dir"),
        tokenizer_json=tokenizer.to_json(),
    )
    if split not in prepared.tokens:
        raise UserError(f"unknown split {split!r}; use {', '.join(prepared.tokens)}")
    show_origin(prepared)
    tokens, stats = prepared.tokens[split], prepared.stats[split]
    length = model.config.context_length
    rows = [("sliding window", stride or max(1, length // 2))]
    if stride is None:
        rows.append(("blocked", length))
    table = Table("protocol", "stride", "tokens", "nats/token", "perplexity", "per word")
    for name, step in rows:
        with console.status(f"{split}: {name}"):
            figure = perplexity(model, tokens, tokenizer.first_id, stride=step, stats=stats, dynamic_lr=dynamic_lr)
        nats = figure.nats / figure.tokens
        table.add_row(
            name + (" (dynamic)" if dynamic_lr else ""), str(step), f"{figure.tokens:,}", f"{nats:.4f}",
            f"{figure.per_token:.2f}", f"{figure.per_word:.2f}",
        )  # fmt: skip
    console.print(table)


@app.command()
def generate(
    prompts: list[str] = typer.Argument(..., metavar="PROMPT...", help="text to continue; several are done as a batch"),
    checkpoint: str | None = CheckpointOption,
    max_new_tokens: int = typer.Option(100, min=1, help="tokens to add"),
    temperature: float = typer.Option(0.8, min=0.0, help="0: always the likeliest token"),
    top_k: int | None = typer.Option(None, min=1, help="choose among the k likeliest tokens"),
    top_p: float | None = typer.Option(
        None, min=1e-6, max=1.0, help="choose among the likeliest tokens of this total probability"
    ),
    min_p: float | None = typer.Option(
        None, min=0.0, max=1.0, help="drop tokens below this fraction of the likeliest one's probability"
    ),
    seed: int | None = typer.Option(None, help="same seed, same text"),
    stop_at_eos: bool = typer.Option(True, help="stop where the model ends the text (word-level: the paragraph)"),
    device: str = DeviceOption,
    backend: str | None = BackendOption,
) -> None:
    """Continue a text; one prompt streams as it is made."""
    from .generate import complete

    model, tokenizer, _ = load(checkpoint, device, backend)
    options: Any = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    options["stop_at_eos"] = stop_at_eos
    if len(prompts) == 1:
        sys.stdout.write(prompts[0])

        def show(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        complete(model, tokenizer, prompts, max_new_tokens, stream_text=show, **options)
        sys.stdout.write("\n")
        return
    for prompt, text in zip(prompts, complete(model, tokenizer, prompts, max_new_tokens, **options)):
        console.print(prompt + text, markup=False)


@app.command()
def finetune(
    pairs: Path = typer.Argument(..., help='JSONL file, a line each: {"prompt": ..., "completion": ...}'),
    out: Path = typer.Option(..., help="run directory to write"),
    checkpoint: str | None = typer.Option(
        None, "--checkpoint", "-c", help="model to start from; default: a small one from scratch"
    ),
    tokenizer: str | None = typer.Option(None, help="from scratch: word, bpe or byte (default word)"),
    n_layer: int | None = typer.Option(None, help="from scratch: number of layers"),
    n_embd: int | None = typer.Option(None, help="from scratch: width"),
    n_head: int | None = typer.Option(None, help="from scratch: number of heads"),
    epochs: int | None = typer.Option(None, help="passes over the pairs"),
    steps: int | None = typer.Option(None, help="optimiser steps, in place of --epochs"),
    batch_size: int = typer.Option(32, help="pairs per step"),
    lr: float | None = typer.Option(None, help="highest learning rate"),
    valid_fraction: float = typer.Option(0.1, help="share of the pairs kept for validation"),
    seed: int = typer.Option(0, help="seed of weights and order"),
    device: str = DeviceOption,
) -> None:
    """Learn prompt -> completion pairs (translation, questions, code); the loss counts completions only."""
    from .finetune import finetune as run

    path = run(
        pairs, out, checkpoint=checkpoint, tokenizer=tokenizer, n_layer=n_layer, n_embd=n_embd, n_head=n_head,
        epochs=epochs, steps=steps, batch_size=batch_size, lr=lr, seed=seed, device=device,
        valid_fraction=valid_fraction, log=lambda line: console.print(line, markup=False),
    )  # fmt: skip
    console.print(f"checkpoint: {path}")


@app.command()
def attention(
    text: str = typer.Argument(..., help="the text whose attention is drawn"),
    checkpoint: str | None = CheckpointOption,
    layer: int | None = typer.Option(None, min=0, help="layer, from 0; default: all"),
    head: int | None = typer.Option(None, min=0, help="head, from 0; default: all"),
    out: Path = typer.Option(Path("attention.png"), help="picture to write"),
    device: str = DeviceOption,
) -> None:
    """Draw the attention weights of a text: who looks at whom, in every layer and head or in one."""
    from .attention_map import draw

    model, tokenizer, _ = load(checkpoint, device)
    draw(model, tokenizer, text, out, layer=layer, head=head)
    console.print(f"wrote {out}")


@app.command()
def export(
    directory: Path = typer.Argument(..., help="directory to write"),
    checkpoint: str | None = CheckpointOption,
) -> None:
    """Write the model for `transformers.AutoModelForCausalLM` and vLLM (GPT-2 or Llama layout, safetensors)."""
    from . import hub
    from .checkpoint import load_model

    loaded = load_model(checkpoint or newest_run())
    hub.save_pretrained(loaded.model, directory, loaded.tokenizer)
    console.print(f"wrote {directory}; load it with transformers.AutoModelForCausalLM.from_pretrained({str(directory)!r})")


@app.command()
def doctor() -> None:
    """What this machine has, and which implementation of every op it gets, with the reason."""
    import torch

    from . import __version__, kernels
    from .kernels._dispatch import extension

    module, missing = extension()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    console.print(f"wikigpt {__version__}, Python {platform.python_version()}, torch {torch.__version__}, GPU: {gpu}")
    console.print(f"CPU threads: {torch.get_num_threads()}")
    if module is not None:
        built = module.build_info()
        console.print(
            f"extension wikigpt._C: {built['instruction_set']}, built by {built['compiler']} with torch {built['torch']} "
            f"for torch {built['stable_abi']} and later"
        )
        cuda = f"for {built['cuda_targets']}, by nvcc {built['cuda']}" if built["cuda"] else f"none, {built['no_cuda_because']}"
        console.print(f"CUDA kernels of wikigpt._C: {cuda}")
    else:
        console.print(f"extension wikigpt._C: {missing}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table("op", f"on {device}", "others", title="implementations")
    for op in kernels.ops():
        rows = kernels.explain(op, device)
        chosen = next((backend for backend, reason in rows if reason is None), "none")
        others = [f"{backend}: {reason or 'available'}" for backend, reason in rows if backend != chosen]
        table.add_row(op, chosen, "\n".join(others))
    console.print(table)
