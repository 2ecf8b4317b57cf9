"""Training: exact resume, signals, divergence, accumulation, several processes. Real processes where it matters."""

import contextlib
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wikigpt import checkpoint
from wikigpt.config import resolve
from wikigpt.data import prepare
from wikigpt.errors import UserError
from wikigpt.evaluate import perplexity
from wikigpt.train import Optimizers, Processes, StepGraph, TextBatches, TextTask, Trainer, lr_factor, owned, read_log

TINY = [
    "n_layer=2", "n_head=2", "n_embd=32", "context_length=32", "batch_size=4", "steps=12", "warmup_steps=3",
    "eval_interval=6", "save_interval=4", "log_interval=1", "eval_tokens=512", "tensorboard=false", "device=cpu",
]  # fmt: skip
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder with three small splits of a made-up language with some structure."""
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    words = [f"w{i}" for i in range(50)]
    for split, lines in (("train", 400), ("valid", 60), ("test", 60)):
        rows = []
        for _ in range(lines):
            start = int(torch.randint(50, (1,), generator=generator))
            rows.append(" ".join(words[(start + 3 * i) % 50] for i in range(12)))
        (folder / f"{split}.txt").write_text("\n".join(rows) + "\n")
    os.environ["WIKIGPT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    return folder


def make_trainer(text, out, *changes, resume=False):
    config = resolve(None, None, [*TINY, f"dataset={text}", *changes])
    dataset = prepare(config.data.dataset, config.data.tokenizer, config.data.vocab_size)
    lines = []
    trainer = Trainer(config, TextTask(dataset), Path(out), Processes(0, 1, torch.device("cpu")), resume, lines.append)
    trainer.lines = lines
    return trainer


def command(text, out, *arguments):
    options = [a for a in arguments if a.startswith("--")]
    changes = [*TINY, f"dataset={text}", *(a for a in arguments if not a.startswith("--"))]
    return [sys.executable, "-m", "wikigpt", "--threads", "1", "train", "--out", str(out), *options, *changes]


def losses(directory):
    return {line["step"]: line["loss"] for line in read_log(Path(directory)) if "loss" in line}


def weights(path):
    return checkpoint.load(path)["model"]


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_all_that_it_promises(text, tmp_path):
    trainer = make_trainer(text, tmp_path / "run", "steps=60", "lr=1e-2", "tensorboard=true")
    result = trainer.run()
    assert result.final["test"].per_token < 15  # 50 words; the text is predictable after the first word of a line
    for split in ("valid", "test"):
        assert result.final[split].tokens == len(trainer.task.dataset.tokens[split])
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "log.jsonl", "loss.png", "tensorboard", "last.pth", "wiki-gpt.pth"}
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert set(losses(tmp_path / "run")) == set(range(1, 61))
    assert resolve(file=tmp_path / "run" / "config.yaml").train.lr == 1e-2


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_model(text, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_trainer(text, tmp_path / name, "steps=3", f"seed={seed}", "dropout=0.1").run()
    a, b, c = (weights(tmp_path / name / "last.pth") for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["wte.weight"], c["wte.weight"])


def test_wiki_gpt_holds_the_weights_with_the_best_validation_loss(text, tmp_path):
    trainer = make_trainer(text, tmp_path, "steps=18", "lr=1e-2")
    trainer.run()
    best = min(line["valid_loss"] for line in read_log(tmp_path) if "valid_loss" in line)
    assert trainer.best == pytest.approx(best)
    trainer.best = -1.0  # nothing can be better now
    before = (tmp_path / "wiki-gpt.pth").read_bytes()
    trainer._validate()
    assert (tmp_path / "wiki-gpt.pth").read_bytes() == before


@pytest.mark.parametrize("change", ["optimizer=muon", "ema_decay=0.9", "precision=bf16", "schedule=wsd", "position=alibi"])
def test_every_way_to_train_lowers_the_loss(text, tmp_path, change):
    make_trainer(text, tmp_path, "steps=25", "lr=1e-2", change).run()
    values = losses(tmp_path)
    assert values[25] < values[1] - 0.3


def test_the_moving_average_is_what_its_formula_says(text, tmp_path):
    trainer = make_trainer(text, tmp_path, "ema_decay=0.8")
    expected = trainer.model.wte.weight.detach().double().clone()
    for _ in range(3):
        trainer.train_step()
        expected = 0.8 * expected + 0.2 * trainer.model.wte.weight.detach().double()
    torch.testing.assert_close(trainer.ema.wte.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_torchs_adamw_resumes_and_gives_the_same_run(text, tmp_path):
    """Run directories of earlier versions, whose optimiser was torch.optim.AdamW."""
    whole = make_trainer(text, tmp_path / "whole", "ema_decay=0.9", "steps=6", "save_interval=100")
    whole.run()
    out = tmp_path / "run"
    first = make_trainer(text, out, "ema_decay=0.9", "steps=6")
    theirs = torch.optim.AdamW(first.optimizers.adamw.param_groups, betas=(0.9, 0.95))
    for _ in range(3):
        first.optimizers.adamw.step = lambda: None  # in its place:
        first.optimizers.adamw.zero_grad = lambda set_to_none: None
        first.train_step()
        for group, own in zip(theirs.param_groups, first.optimizers.adamw.param_groups):
            group["lr"] = own["lr"]
        torch.nn.utils.clip_grad_norm_(first.model.parameters(), first.config.train.clip_grad_norm)
        theirs.step()
        theirs.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(first.ema.parameters()), list(first.model.parameters()), 0.1)
    first.optimizers.state_dict = lambda: [theirs.state_dict()]
    first._save()
    resumed = make_trainer(text, out, "ema_decay=0.9", "steps=6", resume=True)
    resumed.run()
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(whole.ema.parameters(), resumed.ema.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_averages_are_saved_once(text, tmp_path):
    trainer = make_trainer(text, tmp_path, "ema_decay=0.9", "steps=2")
    trainer.run()
    state = checkpoint.load(tmp_path / "last.pth")
    assert {key for entry in state["optimizer"][0]["state"].values() for key in entry} == {"step", "exp_avg", "exp_avg_sq"}
    again = make_trainer(text, tmp_path, "ema_decay=0.9", "steps=4", resume=True)
    for p, q in zip(again.ema.parameters(), trainer.ema.parameters()):
        assert torch.equal(p, q)
    before = again.ema.wte.weight.clone()
    again.train_step()
    assert not torch.equal(again.ema.wte.weight, before)


# --- batches --------------------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_block_once_and_the_next_one_in_another_order():
    batches = TextBatches(torch.arange(1000), length=10, seed=3)
    epochs = [batches.get(e * batches.count, batches.count)[0] for e in range(2)]
    for x in epochs:
        offset = int(x.min())
        assert sorted(x[:, 0].tolist()) == list(range(offset, offset + 10 * batches.count, 10))
    assert not torch.equal(epochs[0], epochs[1])


def test_targets_are_the_next_tokens():
    x, y = TextBatches(torch.arange(1000), length=10, seed=3).get(5, 7)
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("count", [1, 7, 99, 250])
def test_a_sequence_does_not_depend_on_the_batch_that_it_comes_in(count):
    batches = TextBatches(torch.arange(1000), length=10, seed=3)
    first = batches.count - 4  # across one or more ends of an epoch
    together = batches.places(first, count)
    assert together.tolist() == [int(batches.places(i, 1)) for i in range(first, first + count)]
    assert torch.equal(batches.at(together)[0][:, 0], together)


def test_a_text_shorter_than_two_contexts_is_refused():
    with pytest.raises(UserError, match="the train split has 15 tokens, fewer than two contexts of 10"):
        TextBatches(torch.arange(15), length=10, seed=0)


# --- schedule -------------------------------------------------------------------------------------------------------


def test_the_schedules_by_hand():
    cosine = resolve(None, None, ["warmup_steps=9", "min_lr_fraction=0.1"]).train
    assert lr_factor(cosine, 0, 0.0) == pytest.approx(0.1)
    assert lr_factor(cosine, 9, 0.0) == pytest.approx(1.0)
    assert lr_factor(cosine, 50, 0.5) == pytest.approx(0.55)
    assert lr_factor(cosine, 99, 1.0) == pytest.approx(0.1)
    wsd = resolve(None, None, ["warmup_steps=0", "schedule=wsd", "decay_fraction=0.2", "min_lr_fraction=0"]).train
    assert lr_factor(wsd, 5, 0.79) == pytest.approx(1.0)
    assert lr_factor(wsd, 5, 0.9) == pytest.approx(0.5)
    assert lr_factor(wsd, 5, 1.0) == pytest.approx(0.0)


# --- accumulation ---------------------------------------------------------------------------------------------------


def test_gradient_accumulation_equals_the_big_batch(text, tmp_path):
    big = make_trainer(text, tmp_path / "big", "batch_size=8")
    small = make_trainer(text, tmp_path / "small", "batch_size=2", "accumulate=4")
    for _ in range(4):
        torch.testing.assert_close(big.train_step(), small.train_step(), rtol=1e-5, atol=1e-5)
    for a, b in zip(big.model.parameters(), small.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# --- interruption ---------------------------------------------------------------------------------------------------


def wait_for(condition, process, seconds=90):
    limit = time.time() + seconds
    while not condition():
        assert process.poll() is None, f"the process ended early:\n{process.stdout.read()}"
        assert time.time() < limit, "timed out"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["dropout=0.1", "ema_decay=0.9"], id="adamw"),
        pytest.param(["optimizer=muon", "ema_decay=0.9", "accumulate=2"], id="muon", marks=pytest.mark.full),
    ],
)
def test_a_run_killed_with_sigkill_and_resumed_gives_the_same_bits(text, tmp_path, options):
    whole = ["steps=40", "save_interval=7", *options]
    subprocess.run(command(text, tmp_path / "whole", *whole), check=True, capture_output=True, env=ONE_THREAD)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(text, killed, *whole),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ONE_THREAD,
    )
    # In the middle: a checkpoint is there and steps beyond it have been done.
    wait_for(lambda: (killed / "last.pth").exists() and max(losses(killed), default=0) >= 9, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stopped_at = checkpoint.load(killed / "last.pth")["step"]
    assert 7 <= stopped_at < 40
    done = subprocess.run(
        [sys.executable, "-m", "wikigpt", "--threads", "1", "train", "--out", str(killed), "--resume"],
        capture_output=True, text=True, env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    a, b = checkpoint.load(tmp_path / "whole" / "last.pth"), checkpoint.load(killed / "last.pth")
    assert a["step"] == b["step"] == 40
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert losses(tmp_path / "whole") == losses(killed)


@pytest.mark.slow
def test_a_signal_saves_and_exits_cleanly_and_the_run_goes_on_later(text, tmp_path):
    out = tmp_path / "run"
    start = command(text, out, "steps=100000", "eval_interval=100000", "save_interval=100000")
    resume = [sys.executable, "-m", "wikigpt", "--threads", "1", "train", "--resume", "--out", str(out)]
    step = 0
    for number, arguments in ((signal.SIGINT, start), (signal.SIGTERM, resume)):
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD
        )  # fmt: skip
        wait_for(lambda: max(losses(out), default=0) >= step + 5, process)  # noqa: B023
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert f"interrupted by {number.name}" in output
        assert "Traceback" not in output
        assert step == 0 or f"resumed at step {step}" in output
        assert checkpoint.load(out / "last.pth")["step"] >= step + 5
        step = checkpoint.load(out / "last.pth")["step"]
        assert checkpoint.load_model(out).tokenizer is not None  # usable as it is


def test_divergence_stops_with_a_message_and_keeps_the_last_good_checkpoint(text, tmp_path):
    trainer = make_trainer(text, tmp_path, "steps=50", "save_interval=2")
    steps = iter(range(100))
    real = trainer.forward

    def breaks_at_step_5(x, y):
        return real(x, y) * (float("nan") if next(steps) == 5 else 1.0)

    trainer.forward = breaks_at_step_5
    with pytest.raises(UserError, match=r"training diverged: the loss is nan at step 5; the last good checkpoint is"):
        trainer.run()
    saved = checkpoint.load(tmp_path / "last.pth")
    assert saved["step"] == 4
    assert all(v.isfinite().all() for v in saved["model"].values())


# --- nothing is lost ------------------------------------------------------------------------------------------------


def stopping(trainer, where):
    """Run, and send Ctrl-C from inside a step's report or an evaluation: `where` is a step or (name, step)."""

    def on_step(step, steps, figures):
        if step == where:
            signal.raise_signal(signal.SIGINT)

    def on_evaluate(split, done, total):
        if (split, trainer.step) == where:
            signal.raise_signal(signal.SIGINT)

    return trainer.run(on_step, on_evaluate)


MOMENTS = {
    "in a step": 3,
    "in the first step": 1,
    "in a validation": ("validation", 6),
    "in the last validation": ("validation", 12),
    "in the final validation": ("final validation", 12),
    "in the test": ("final test", 12),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_any_moment_leaves_a_run_that_goes_on_to_the_same_end(text, tmp_path, moment, capfd):
    whole = make_trainer(text, tmp_path / "whole", "dropout=0.1").run()
    stopped = stopping(make_trainer(text, tmp_path / "run", "dropout=0.1"), MOMENTS[moment])
    assert stopped.interrupted
    assert not stopped.final
    assert "SIGINT: finishing this step and saving" in capfd.readouterr().err
    assert checkpoint.load_model(tmp_path / "run").tokenizer is not None  # usable as it is
    resumed = make_trainer(text, tmp_path / "run", "dropout=0.1", resume=True).run()
    assert not resumed.interrupted
    for name in ("last.pth", "wiki-gpt.pth"):
        a, b = weights(tmp_path / "whole" / name), weights(tmp_path / "run" / name)
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert resumed.final == whole.final
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_save(text, tmp_path):
    def twice(step, steps, figures):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(text, tmp_path).run(twice)
    assert checkpoint.load(tmp_path / "last.pth")["step"] == 4
    assert make_trainer(text, tmp_path, resume=True).run().steps == 12
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_ends_the_run_and_leaves_what_can_be_resumed(text, tmp_path, monkeypatch):
    trainer, real = make_trainer(text, tmp_path), os.fsync

    def full(file):
        if trainer.step >= 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; the file that was there before is unharmed; free some space"):
        trainer.run()
    monkeypatch.setattr(os, "fsync", real)
    assert checkpoint.load(tmp_path / "last.pth")["step"] == 4
    assert not list(tmp_path.glob(".*.tmp"))
    assert make_trainer(text, tmp_path, resume=True).run().steps == 12


def test_a_run_that_fails_in_its_first_step_leaves_nothing_and_the_run_that_it_was_to_replace(text, tmp_path):
    for name in ("new", "old"):
        if name == "old":
            make_trainer(text, tmp_path / name, "steps=2").run()
        before = {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        with owned(tmp_path / name, overwrite=True):
            trainer = make_trainer(text, tmp_path / name, "tensorboard=true")
            trainer.forward = lambda x, y: trainer.model(x, y) * float("nan")  # noqa: B023
            with pytest.raises(UserError, match="the loss is nan at step 0; no checkpoint had been written yet"):
                trainer.run()
        assert {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_a_run_that_is_to_be_replaced_stays_until_the_new_one_is_on_the_disk(text, tmp_path, monkeypatch):
    make_trainer(text, tmp_path, "steps=2").run()
    before = {name: (tmp_path / name).read_bytes() for name in ("last.pth", "wiki-gpt.pth")}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with owned(tmp_path, overwrite=True), monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device; the file that was there before is unharmed"):
            make_trainer(text, tmp_path, "seed=1").run()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    # Killed between the new last.pth and the removal of the rest: what is left is not taken for the new run's.
    with owned(tmp_path, overwrite=True), monkeypatch.context() as patch:
        patch.setattr("wikigpt.train.trainer.clear", lambda directory: exit(9))
        with pytest.raises(SystemExit):
            make_trainer(text, tmp_path, "seed=1").run()
    resumed = make_trainer(text, tmp_path, "seed=1", resume=True)
    assert (resumed.step, resumed.best_step) == (1, None)
    assert not (tmp_path / "wiki-gpt.pth").exists()
    assert resumed.run().steps == 12


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "loss.png", "tensorboard/notes.txt", ".mine.tmp"])
def test_files_of_others_in_the_directory_are_neither_replaced_nor_removed_unasked(text, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    if name != ".mine.tmp":
        with pytest.raises(UserError, match=f"holds {name.split('/')[0]} already"), owned(tmp_path):
            pass
    with owned(tmp_path, overwrite=name != ".mine.tmp"):
        make_trainer(text, tmp_path, "steps=1", "tensorboard=true").run()
    if name in ("tensorboard/notes.txt", ".mine.tmp"):
        assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("gone", [BrokenPipeError, SystemExit])
def test_a_reader_of_the_output_who_has_gone_stops_the_run_where_nothing_is_lost(text, tmp_path, gone):
    def on_step(step, steps, figures):
        if step >= 5:
            raise gone

    with pytest.raises(gone):
        make_trainer(text, tmp_path, "save_interval=100").run(on_step)
    assert checkpoint.load(tmp_path / "last.pth")["step"] == 5
    assert make_trainer(text, tmp_path, resume=True).run().steps == 12


def test_weights_that_give_no_finite_loss_are_not_saved(text, tmp_path):
    trainer = make_trainer(text, tmp_path / "a", "steps=50", "save_interval=1")

    def spoil(step, steps, figures):
        if step == 5:
            with torch.no_grad():
                trainer.model.wte.weight.mul_(float("inf"))

    with pytest.raises(UserError, match="the loss is nan at step 5; the last good checkpoint is"):
        trainer.run(spoil)
    assert checkpoint.load(tmp_path / "a" / "last.pth")["step"] == 4
    with pytest.raises(UserError, match="no checkpoint had been written yet"):
        make_trainer(text, tmp_path / "b", "steps=1", "lr=1e30", "warmup_steps=0").run()
    assert not list((tmp_path / "b").iterdir())


def test_a_name_that_matplotlib_cannot_draw_costs_no_figures(text, tmp_path):
    result = make_trainer(text, tmp_path / r"lr$\frac$", "steps=1").run()
    assert result.final
    assert (tmp_path / r"lr$\frac$" / "loss.png").exists()


@pytest.mark.parametrize("units", [True, False])
def test_precision_auto_is_what_the_cpu_has_units_for_and_stays_so_on_resume(text, tmp_path, monkeypatch, units):
    head = importlib.import_module("wikigpt.kernels.linear_cross_entropy")
    monkeypatch.setattr(head, "MULTIPLIES_BF16", units)
    trainer = make_trainer(text, tmp_path, "steps=1", "precision=auto")
    assert trainer.config.train.precision == ("bf16" if units else "fp32")
    trainer.run()
    assert checkpoint.load(tmp_path / "last.pth")["config"]["train"]["precision"] == trainer.config.train.precision


def test_a_closed_terminal_saves(text, tmp_path):
    def on_step(step, steps, figures):
        if step == 3:
            signal.raise_signal(signal.SIGHUP)

    assert make_trainer(text, tmp_path).run(on_step).interrupted
    assert checkpoint.load(tmp_path / "last.pth")["step"] == 3


def test_the_figures_in_the_end_are_those_of_evaluate_in_bf16_too(text, tmp_path):
    trainer = make_trainer(text, tmp_path, "precision=bf16", "steps=6")
    result = trainer.run()
    kept = checkpoint.load_model(tmp_path)
    for split in ("valid", "test"):
        tokens = trainer.task.dataset.tokens[split]
        stats = trainer.task.dataset.stats[split]
        assert result.final[split] == perplexity(kept.model, tokens, kept.tokenizer.first_id, stats=stats)


def test_a_damaged_wiki_gpt_does_not_stop_a_resume(text, tmp_path):
    make_trainer(text, tmp_path, "steps=2").run()
    (tmp_path / "wiki-gpt.pth").write_bytes(b"damaged")
    trainer = make_trainer(text, tmp_path, "steps=4", resume=True)
    assert "the next validation replaces it" in trainer.lines[-1]
    assert trainer.run().best_step == 4


def test_a_run_directory_belongs_to_one_process(text, tmp_path):
    code = f"""
import sys, time
from wikigpt.train.directory import owned
with owned({str(tmp_path / "run")!r}):
    print("mine", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    for how in ({}, {"overwrite": True}):
        with (
            pytest.raises(UserError, match=f"process {process.pid} is training into .*run: stop it, wait for it"),
            owned(tmp_path / "run", **how),
        ):
            pass
    process.kill()
    process.wait()
    (tmp_path / "run" / ".last.pth.123.tmp").write_bytes(b"half of a checkpoint")  # as kill -9 during a save leaves it
    with owned(tmp_path / "run"):
        assert not list((tmp_path / "run").glob("*.tmp"))
    assert not list((tmp_path / "run").iterdir())


def test_resuming_and_overwriting_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="--resume goes on with a run and --overwrite replaces it"), owned(tmp_path, True, True):
        pass


@pytest.mark.parametrize(
    ("change", "name"),
    [("n_embd=64", "model.n_embd"), ("context_length=16", "model.context_length"), ("optimizer=muon", "train.optimizer"),
     ("seed=7", "train.seed"), ("ema_decay=0.9", "train.ema_decay"),
     ("eval_tokens=64", "train.eval_tokens"), ("tokenizer=byte", "data.tokenizer")],
)  # fmt: skip
def test_resuming_with_settings_of_another_run_is_refused_by_name(text, tmp_path, change, name):
    make_trainer(text, tmp_path, "steps=1").run()
    with pytest.raises(UserError, match=rf"{name}: the run in .* has .*, got .*leave the setting out"):
        make_trainer(text, tmp_path, change, resume=True)


def test_resuming_with_other_steps_than_those_done_or_another_number_of_sequences_is_refused(text, tmp_path):
    make_trainer(text, tmp_path, "steps=3").run()
    with pytest.raises(UserError, match=r"train.batch_size x train.accumulate x processes: the run in .* has 4 a step, got 2"):
        make_trainer(text, tmp_path, "batch_size=2", resume=True)
    with pytest.raises(UserError, match=r"train.steps: the run in .* has done 3 steps, got 2"):
        make_trainer(text, tmp_path, "steps=2", resume=True)
    assert make_trainer(text, tmp_path, "steps=4", "batch_size=2", "accumulate=2", resume=True).run().steps == 4


def test_resuming_may_change_limits_and_learning_rate_and_says_so(text, tmp_path):
    make_trainer(text, tmp_path, "steps=2").run()
    trainer = make_trainer(text, tmp_path, "steps=4", "lr=1e-4", resume=True)
    assert "changed since the run began: train.steps 2 -> 4, train.lr 0.001 -> 0.0001" in trainer.lines
    assert trainer.run().steps == 4


def test_a_line_of_the_log_that_a_crash_has_cut_off_does_not_stop_a_resume(text, tmp_path):
    make_trainer(text, tmp_path, "steps=2").run()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": "x"}\n{"step": null}\n[]\n{"step": 3, "lo')
    assert make_trainer(text, tmp_path, "steps=4", resume=True).run().steps == 4
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]


# --- what is printed ------------------------------------------------------------------------------------------------


def test_every_validation_looks_at_the_same_tokens_and_the_figures_in_the_end_are_of_the_kept_weights(text, tmp_path):
    trainer, seen = make_trainer(text, tmp_path, "eval_interval=2", "final_tokens=300"), []
    real = trainer.task.validate
    trainer.task.validate = lambda *rest: seen.append(real(*rest)) or seen[-1]

    def spoil(step, steps, figures):
        if step == 7:
            with torch.no_grad():
                trainer.model.wte.weight.mul_(30)

    result = trainer.run(spoil)
    assert len({valid.tokens for valid in seen}) == 1
    values = [line["valid_loss"] for line in read_log(tmp_path) if "valid_loss" in line]
    assert result.best_step == 2 * (values.index(min(values)) + 1)
    assert result.best_step == 6
    kept = checkpoint.load_model(tmp_path)
    assert kept.content["step"] == result.best_step
    assert kept.content["valid_loss"] == pytest.approx(min(values))
    assert real(kept.model, trainer.config, lambda done, total: None).nats / seen[0].tokens == pytest.approx(min(values))
    for split in ("valid", "test"):
        again = perplexity(
            kept.model, trainer.task.dataset.tokens[split], kept.tokenizer.first_id, stride=32, sample=300
        )  # fmt: skip
        assert result.final[split] == again


def test_a_better_file_is_not_overwritten_by_a_resumed_run(text, tmp_path):
    """Where a run was killed between the file and last.pth, the file is the younger of the two."""
    trainer = make_trainer(text, tmp_path, "save_interval=100", "eval_interval=4", "steps=8")
    trainer.run()
    best = torch.load(tmp_path / "wiki-gpt.pth", weights_only=True) | {"valid_loss": 0.5, "step": 77}
    torch.save(best, tmp_path / "wiki-gpt.pth")
    resumed = make_trainer(text, tmp_path, "save_interval=100", "eval_interval=4", "steps=12", resume=True)
    assert resumed.run().best_step == 77
    assert checkpoint.load(tmp_path)["step"] == 77


def test_a_limit_in_seconds_says_that_it_ended_the_run(text, tmp_path):
    trainer = make_trainer(text, tmp_path, "steps=1000000", "max_seconds=3", "final_tokens=100", "eval_tokens=100")
    result = trainer.run()
    assert f"stopped at step {result.steps:,} of 1,000,000: train.max_seconds=3 is over" in trainer.lines
    assert any("of training to go, until train.max_seconds=3 is over" in line for line in trainer.lines)
    assert result.final["test"].tokens <= 100 + 32


# --- bad input ------------------------------------------------------------------------------------------------------


def test_resuming_with_other_data_is_refused(text, tmp_path):
    make_trainer(text, tmp_path / "run", "steps=2").run()
    other = tmp_path / "other.txt"
    other.write_text("completely different words here\n" * 300)
    with pytest.raises(UserError, match="was trained on other data or with another vocabulary"):
        make_trainer(other, tmp_path / "run", "steps=4", resume=True)


def test_resuming_an_empty_directory_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"nothing to resume in .*: no last.pth"):
        make_trainer(text, tmp_path, resume=True)


def test_a_device_that_is_not_there_is_refused():
    from wikigpt.train import pick_device

    with pytest.raises(UserError, match="unknown device 'gpu'"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device on this machine"):
            pick_device("cuda")


# --- several processes ----------------------------------------------------------------------------------------------


def torchrun(text, out, *changes, processes=2):
    """A run under torchrun; returns its losses by step."""
    arguments = command(text, out, *changes)
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    done = subprocess.run([*start, *arguments[1:]], capture_output=True, text=True, env=ONE_THREAD, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(out)


@pytest.mark.slow
def test_ddp_and_fsdp_on_two_processes_follow_one_process_with_the_double_batch_and_resume(text, tmp_path):
    subprocess.run(command(text, tmp_path / "one", "batch_size=8"), check=True, capture_output=True, env=ONE_THREAD)
    one = losses(tmp_path / "one")
    assert set(one) == set(range(1, 13))
    for name in ("ddp", "fsdp"):
        two = torchrun(text, tmp_path / name, "batch_size=4", f"parallel={name}")
        assert set(two) == set(one)
        for step in one:
            assert two[step] == pytest.approx(one[step], rel=2e-4), f"{name}, step {step}"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, "-m", "wikigpt", "train", "--resume", "--out", str(tmp_path / "fsdp"), "steps=14"],
        capture_output=True, text=True, env=ONE_THREAD, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(losses(tmp_path / "fsdp")) == 14
    assert checkpoint.load_model(tmp_path / "fsdp").model.num_parameters() > 0


# --- a captured step, on a GPU that is not there --------------------------------------------------------------------


class FakeCuda:
    """What a capture touches, where the optimiser's step cannot be captured and the end of the capture fails for that: as on a
    GPU the capture's stream then stays the current one, and the generator goes on waiting."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.stream, self.capturing = monkeypatch, "usual", False
        for name in ("graph", "current_stream", "set_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "Stream", self.current_stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "default_generators", (self,))

    def current_stream(self, device):
        return SimpleNamespace(name=self.stream, wait_stream=lambda stream: None)

    def set_stream(self, stream):
        self.stream = stream.name

    def clone_state(self):
        return torch.get_rng_state()

    def graphsafe_set_state(self, state):
        torch.set_rng_state(state)
        self.capturing = False

    @contextlib.contextmanager
    def graph(self, graph):
        def refuse(optimizers):
            raise RuntimeError("operation not permitted when stream is capturing")

        self.stream, self.capturing, random = "of the capture", True, torch.get_rng_state()
        with self.monkeypatch.context() as patch:
            patch.setattr(Optimizers, "step", refuse)
            with contextlib.suppress(RuntimeError):
                yield
        torch.set_rng_state(random)  # a capture draws no number
        raise RuntimeError("operation failed due to a previous error during capture\nmore of it")


def test_a_capture_that_fails_leaves_a_run_as_it_would_be_without(text, tmp_path, monkeypatch):
    cuda, runs = FakeCuda(monkeypatch), []
    for captured in (False, True):
        trainer, lines = make_trainer(text, tmp_path / str(captured), "dropout=0.2"), []
        if captured:
            trainer.compute = StepGraph(trainer._compute, trainer.optimizers.drop_gradients, lines.append)
        losses = [float(trainer.train_step()) for _ in range(7)]
        runs.append((losses, list(trainer.model.parameters())))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(p, q) for p, q in zip(runs[0][1], runs[1][1]))
    assert (cuda.stream, cuda.capturing) == ("usual", False)
    assert lines == ["no CUDA graph, steps run one kernel at a time: operation failed due to a previous error during capture"]


def test_whoever_times_a_captured_step_can_see_why_it_is_none(text, tmp_path, monkeypatch):
    FakeCuda(monkeypatch)
    trainer = make_trainer(text, tmp_path)
    graph = StepGraph(trainer._compute, trainer.optimizers.drop_gradients, lambda line: None)
    places = trainer.batches.places(0, 4)
    for _ in range(StepGraph.WARMUP):
        graph(places)
    assert (graph.failed, graph.graph) == (None, None)
    graph(places)
    assert graph.failed == "operation failed due to a previous error during capture"


def test_the_log_is_one_json_object_a_line(text, tmp_path):
    make_trainer(text, tmp_path, "steps=2").run()
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        assert {"step"} < set(json.loads(line))
