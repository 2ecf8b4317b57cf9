"""The command line as a person meets it: what works, and one line with exit status 2 for what cannot."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from tests.forked import run_module
from wikigpt import __version__, checkpoint, cli, config, kernels
from wikigpt.config import settings
from wikigpt.data import WordTokenizer
from wikigpt.errors import UserError
from wikigpt.model import GPT, GPTConfig

SENTENCE = "the cat sat on the mat and the dog sat on the log"


def wikigpt(*arguments, cwd, env=None, copied=True):
    """`python -m wikigpt` in a process of its own: a copy of one that has imported torch, or one that begins with nothing."""
    words = ["--threads", "1", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "WIKIGPT_DATA_DIR": "", **(env or {})}
    if copied:
        return run_module("wikigpt", words, cwd=cwd, env=env, timeout=240)
    command = [sys.executable, "-m", "wikigpt", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with a small text, and a run in runs/tiny trained on nothing."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text").mkdir()
    for split in ("train", "valid", "test"):
        (folder / "text" / f"{split}.txt").write_text((SENTENCE + "\n") * (200 if split == "train" else 20))
    os.environ["WIKIGPT_CACHE_DIR"] = str(folder / "cache")
    torch.manual_seed(0)
    tokenizer = WordTokenizer.train(SENTENCE + "\n")
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, context_length=16, n_layer=2, n_head=2, n_embd=16))
    (folder / "runs" / "tiny").mkdir(parents=True)
    content = {
        "model": model.state_dict(),
        "model_config": model.config.to_dict(),
        "tokenizer": tokenizer.to_json(),
    }
    checkpoint.save(folder / "runs" / "tiny" / checkpoint.NAME, content)
    return folder


@pytest.fixture(scope="module")
def damaged(place):
    """The same with files beside it that are not what they should be."""
    (place / "empty.txt").write_text("")
    (place / "foreign.pth").write_text("hello")
    (place / "cut.pth").write_bytes((place / "runs" / "tiny" / checkpoint.NAME).read_bytes()[:500])
    tiny = checkpoint.load(place / "runs" / "tiny")
    damages = {
        "nan": {"model": {name: weight * float("nan") for name, weight in tiny["model"].items()}},
        "other": {"model_config": {**tiny["model_config"], "n_layer": 3}},
        "nonsense": {"model_config": {"layers": 3}},
    }
    for name, damage in damages.items():
        checkpoint.save(place / f"{name}.pth", {**tiny, **damage})
    torch.save({"format": checkpoint.FORMAT}, place / "noversion.pth")
    (place / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    return place


TINY = [
    "n_layer=1",
    "n_head=2",
    "n_embd=16",
    "context_length=16",
    "steps=4",
    "batch_size=2",
    "tensorboard=false",
]


# --- what works -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_evaluate_generate_attention_and_export_in_a_row(place, tmp_path):
    out = tmp_path / "run"
    done = wikigpt("train", "--preset", "quick", "--dataset", place / "text", "--out", out, *TINY, cwd=tmp_path, copied=False)
    assert done.returncode == 0, done.stderr
    for expected in (
        "test perplexity:",
        "tokens/s",
        "a continuation",
        "wiki-gpt.pth",
        "log.jsonl",
        "loss.png",
    ):
        assert expected in done.stdout

    done = wikigpt("evaluate", out, "--dataset", place / "text", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sliding window" in done.stdout
    assert "blocked" in done.stdout

    done = wikigpt("generate", "the cat", "-c", out, "--max-new-tokens", 5, "--seed", 1, cwd=tmp_path, copied=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat")
    again = wikigpt("generate", "the cat", "-c", out, "--max-new-tokens", 5, "--seed", 1, cwd=tmp_path)
    assert again.stdout == done.stdout

    done = wikigpt("attention", "the cat sat", "-c", out, "--out", tmp_path / "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    done = wikigpt("export", tmp_path / "hf", "-c", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_generate_takes_the_newest_run_when_none_is_named(place):
    done = wikigpt("generate", "the cat", "the dog", "--max-new-tokens", 3, cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the cat") == 1
    assert "the dog" in done.stdout


def test_several_prompts_are_separated_by_an_empty_line(place):
    done = wikigpt("generate", "the cat", "the dog", "--max-new-tokens", 3, cwd=place)
    first, second = done.stdout.split("\n\n")
    assert first.startswith("the cat")
    assert second.startswith("the dog")


def test_prompts_come_from_files_and_standard_input_too(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "prompt.txt").write_text("the dog\n")
    options = ["--max-new-tokens", "3", "--temperature", "0"]
    piped = CliRunner().invoke(cli.app, ["generate", "-", "--prompt-file", "prompt.txt", *options], input="the cat\n")
    typed = CliRunner().invoke(cli.app, ["generate", "the cat", "the dog", *options])
    assert piped.exit_code == 0
    assert piped.stdout == typed.stdout != ""


def test_a_prompt_that_is_too_long_is_cropped_and_one_line_says_so(place):
    done = wikigpt("generate", "the cat " * 2000, "--max-new-tokens", 3, cwd=place)
    assert done.returncode == 0
    assert done.stderr == "note: the prompt has 4,000 tokens, the model's context holds 16: only the last 16 are used\n"
    assert done.stdout.startswith("\u2026 the cat")
    assert len(done.stdout.split()) <= 1 + 16 + 3


def test_evaluate_names_the_protocol_and_fits_80_columns(place):
    done = wikigpt("evaluate", "--dataset", "text", cwd=place)
    assert done.returncode == 0, done.stderr
    assert [word in done.stdout for word in ("sliding window", "blocked", "dynamic")] == [True, True, False]
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80
    done = wikigpt("evaluate", "--dataset", "text", "--stride", 16, "--dynamic-lr", 0.01, cwd=place)
    assert "blocked, dynamic" in done.stdout
    assert "sliding window" not in done.stdout


def test_version(place):
    assert wikigpt("--version", cwd=place).stdout == f"wikigpt {__version__}\n"


def test_presets_have_a_line_each_with_sizes_and_purpose(place):
    _, *lines = wikigpt("presets", cwd=place).stdout.splitlines()
    assert [line.split()[0] for line in lines] == config.presets()
    [small] = [line for line in lines if line.startswith("cpu-small")]
    assert small.split()[1:5] == ["4", "128", "128", "5.06M"]
    assert small.rstrip().endswith("on two CPU cores")


def test_config_show_prints_what_train_would_run_with(place):
    (place / "more.yaml").write_text("train: {seed: 7}\n")
    done = wikigpt("config", "show", "quick", "--config", "more.yaml", "train.lr=0.5", "n_layer=2", cwd=place)
    assert done.stdout == config.dump(config.resolve("quick", place / "more.yaml", ["train.lr=0.5", "n_layer=2"]))
    (place / "shown.yaml").write_text(done.stdout)
    assert wikigpt("config", "show", "--config", "shown.yaml", cwd=place).stdout == done.stdout


def test_config_show_takes_the_preset_that_train_takes(place):
    shown = wikigpt("config", "show", "lr=0.5", cwd=place).stdout
    assert shown == config.dump(config.resolve(cli.DEFAULT_PRESET, None, ["lr=0.5"]))


@pytest.mark.parametrize("arguments", [["config", "keys"], ["train", "--help"]], ids=" ".join)
def test_every_setting_is_listed(place, arguments):
    shown = wikigpt(*arguments, cwd=place).stdout
    for setting in settings():
        assert re.search(rf"^ ?{setting.group}\.{setting.name}=", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines())) <= 80


def test_paths_and_texts_with_brackets_and_colons_are_printed_as_they_are(place):
    out = place / "[bold] :cat: [x].svg"
    done = wikigpt("attention", "the cat", "--layer", 0, "--head", 0, "--out", out, cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {out}\n"
    assert out.is_file()


def test_a_character_that_the_terminal_lacks_is_no_traceback(place):
    done = wikigpt("generate", "caf\u00e9", "--max-new-tokens", 1, cwd=place, env={"PYTHONIOENCODING": "ascii"}, copied=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("caf?")


def test_data_info_counts_each_split(place):
    done = wikigpt("data", "info", "--dataset", place / "text", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "2,800" in done.stdout  # 200 lines of 13 words and <eos>
    assert "280" in done.stdout


def test_doctor_names_an_implementation_for_every_op(place):
    done = wikigpt("doctor", cwd=place)
    assert done.returncode == 0, done.stderr
    for op in ("attention", "layer_norm", "linear_cross_entropy", "rms_norm", "rotary", "gelu", "swiglu"):
        assert op in done.stdout
    assert "wikigpt._C" in done.stdout
    assert len(done.stdout.splitlines()) <= 13
    assert done.stdout.count("runs on cuda, not on cpu (TRITON_INTERPRET=1") <= 1


def test_doctor_all_lists_each_implementation(place):
    done = wikigpt("doctor", "--all", cwd=place)
    assert done.stdout.count("reference: available") == len(kernels.ops())


@pytest.mark.parametrize(
    "command", ["data", "config", "presets", "train", "evaluate", "generate", "finetune", "attention", "export", "doctor"]
)
def test_every_command_explains_itself(place, command):
    done = wikigpt(command, "--help", cwd=place, copied=command != "doctor")  # one from nothing
    assert done.returncode == 0
    assert len(done.stdout) > 200


def test_words_of_a_prompt_that_the_vocabulary_lacks_are_counted(place):
    done = wikigpt("generate", "the zebra sat", "--max-new-tokens", 1, cwd=place)
    assert done.stderr == "note: 1 of 3 words of the prompt are not in the vocabulary: <unk>\n"


def test_words_of_pairs_that_the_vocabulary_lacks_are_counted(place, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "the zebra", "completion": "sat"}\n')
    done = wikigpt("evaluate", "--bleu", tmp_path / "pairs.jsonl", "--max-new-tokens", 1, cwd=place)
    assert "1 of 2 words of the prompts are not in the vocabulary: <unk>" in done.stderr


def test_evaluate_takes_the_text_that_the_model_was_trained_on_and_no_other_unasked(place, tmp_path):
    shutil.copytree(place / "text", tmp_path / "mine")
    run = tmp_path / "run"
    assert wikigpt("train", "--dataset", "mine", "--out", run, *TINY, cwd=tmp_path).returncode == 0
    assert wikigpt("evaluate", run, cwd=place).returncode == 0  # from another folder
    (tmp_path / "mine" / "test.txt").write_text("the log sat on the cat\n" * 30)
    done = wikigpt("evaluate", run, cwd=place)
    assert done.returncode == 2
    assert "not the text that the model was trained on (mine, local files mine)" in done.stderr
    assert wikigpt("evaluate", run, "--dataset", tmp_path / "mine", cwd=place).returncode == 0


# --- what cannot work -----------------------------------------------------------------------------------------------

CASES = {
    "missing data": (["train", "--data-dir", "nowhere"], "nowhere"),
    "missing text": (["train", "--dataset", "none/*.txt"], "none/*.txt"),
    "empty text": (["train", "--dataset", "empty.txt"], "empty.txt"),
    "unknown dataset": (["train", "--dataset", "wikitext-3"], "wikitext-2"),
    "no network": (["train", "--dataset", "wikitext-2"], "--data-dir"),
    "unknown key": (["train", "train.learnrate=1"], "unknown key train.learnrate"),
    "unknown preset": (["train", "--preset", "cpu-smal"], "did you mean cpu-small"),
    "unwritable output": (
        ["train", "--dataset", "text", "--out", "empty.txt/run"],
        "cannot write to empty.txt/run",
    ),
    "occupied output": (["train", "--dataset", "text", "--out", "runs/tiny"], "holds a run already"),
    "nothing to resume": (["train", "--resume", "--out", "new"], "nothing to resume in new"),
    "resume where": (["train", "--resume"], "--resume needs --out"),
    "no such device": (["train", "--dataset", "text", "--device", "gpu"], "unknown device 'gpu'"),
    "no such backend": (["train", "--dataset", "text", "--backend", "cudnn"], "backend: got 'cudnn'"),
    "no such backend for a text": (["generate", "a", "--backend", "foo"], "backend: got 'foo'"),
    "backend of another device": (
        ["generate", "a", "--backend", "triton"],
        "backend: 'triton' cannot compute attention on cpu",
    ),
    "backend without all ops": (["evaluate", "--backend", "cpu"], "backend: 'cpu' cannot compute"),
    "endless temperature": (["generate", "a", "--temperature", "inf"], "temperature: got inf"),
    "temperature of no number": (["generate", "a", "--temperature", "nan"], "temperature: got nan"),
    "negative temperature": (["generate", "a", "--temperature", "-1"], "temperature: got -1.0"),
    "seed of 80 bits": (["generate", "a", "--seed", str(2**80)], "seed: got 1208925819614629174706176"),
    "no prompt": (["generate"], "no prompt: give a text, - to read standard input, or --prompt-file"),
    "missing prompt file": (["generate", "--prompt-file", "none.txt"], "cannot read the prompt file none.txt"),
    "no zip file": (["generate", "a", "-c", "/etc/passwd"], "/etc/passwd is not a checkpoint of wikigpt"),
    "endless name": (["generate", "a", "-c", "a" * 5000], "File name too long"),
    "model of NaN": (["generate", "the", "-c", "nan.pth"], "the model computes no probabilities: logits: row 0 has NaN"),
    "checkpoint without version": (
        ["generate", "the", "-c", "noversion.pth"],
        "noversion.pth is damaged (KeyError: 'version')",
    ),
    "checkpoint of another model": (["generate", "the", "-c", "other.pth"], "do not fit its configuration"),
    "checkpoint of nonsense": (["generate", "the", "-c", "nonsense.pth"], "model_config makes no model"),
    "unknown type of picture": (["attention", "the", "--out", "a.xyz"], ".png or .pdf or .svg"),
    "picture below a file": (["attention", "the", "--out", "empty.txt/a.png"], "empty.txt is no folder"),
    "picture in no folder": (["attention", "the", "--out", "none/a.png"], "none does not exist; make that folder first"),
    "negative dynamic lr": (["evaluate", "--dataset", "text", "--dynamic-lr", "-1"], "dynamic_lr: got -1.0"),
    "completions without BLEU": (["evaluate", "--hypotheses", "h.txt"], "--hypotheses needs --bleu"),
    "stride with BLEU": (["evaluate", "--bleu", "bad.jsonl", "--stride", "4"], "--stride has no effect with --bleu"),
    "completions to a folder": (["evaluate", "--bleu", "bad.jsonl", "--hypotheses", "text"], "text is a folder"),
    "preset to show": (["config", "show", "cpu-smal"], "did you mean cpu-small"),
    "key to show": (["config", "show", "quick", "train.learnrate=1"], "unknown key train.learnrate"),
    "missing checkpoint": (["generate", "a", "-c", "runs/none"], "no checkpoint at"),
    "foreign checkpoint": (
        ["generate", "a", "-c", "foreign.pth"],
        "foreign.pth is not a checkpoint of wikigpt",
    ),
    "truncated checkpoint": (
        ["evaluate", "cut.pth"],
        "cut.pth is not a checkpoint of wikigpt, or it is damaged",
    ),
    "text too long": (["attention", " ".join(["the"] * 17)], "17"),
    "no such layer": (["attention", "the cat", "--layer", "2"], "layer"),
    "unknown split": (["evaluate", "--dataset", "text", "--split", "dev"], "unknown split 'dev'"),
    "bad stride": (["evaluate", "--dataset", "text", "--stride", "17"], "stride: got 17"),
    "malformed pairs": (["finetune", "bad.jsonl", "--out", "new"], "bad.jsonl:2"),
    "malformed pairs for BLEU": (["evaluate", "--bleu", "bad.jsonl"], "bad.jsonl:2"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_work_is_one_line_and_leaves_nothing_behind(damaged, case):
    place = damaged
    arguments, message = CASES[case]
    before = sorted(str(p) for p in place.rglob("*") if "cache" not in p.parts)
    # A proxy that answers nothing closes the network for the hub library.
    done = wikigpt(*arguments, cwd=place, env={"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"})
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert sorted(str(p) for p in place.rglob("*") if "cache" not in p.parts) == before


@pytest.mark.parametrize("arguments", [["doctor"], ["generate", "a"], ["evaluate"]], ids=lambda words: words[0])
def test_a_backend_of_the_environment_that_is_unknown_is_one_line(place, arguments, monkeypatch):
    monkeypatch.setattr(kernels._dispatch, "_forced", "foo")  # read once, when it is imported
    monkeypatch.chdir(place)
    result = CliRunner().invoke(cli.app, arguments)
    assert str(result.exception) == ("WIKIGPT_BACKEND: got 'foo', allowed are auto, reference, torch, cpu, cuda, triton")
    assert isinstance(result.exception, UserError)


@pytest.mark.parametrize(
    "arguments",
    [["evaluate", "--stride", "0"], ["evaluate", "--bleu", "x", "--max-new-tokens", "0"], ["generate", "--top-k", "x"]],
)
def test_a_number_out_of_its_range_is_refused_by_the_parser(place, arguments):
    done = wikigpt(*arguments, cwd=place)
    assert done.returncode == 2
    assert f"Invalid value for '{arguments[-2]}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_packages_for_training_the_command_says_what_to_install(place):
    code = "import sys; sys.modules['typer'] = None; from wikigpt.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install --no-build-isolation ".[train]"' in done.stderr
