"""The command line as a person meets it: what works, and one line with exit status 2 for what cannot."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.forked import run_module
from wikigpt import checkpoint
from wikigpt.data import WordTokenizer
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


@pytest.mark.parametrize("command", ["data", "train", "evaluate", "generate", "finetune", "attention", "export", "doctor"])
def test_every_command_explains_itself(place, command):
    done = wikigpt(command, "--help", cwd=place, copied=command != "doctor")  # one from nothing
    assert done.returncode == 0
    assert len(done.stdout) > 200


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
    "missing checkpoint": (["generate", "a", "-c", "runs/none"], "no checkpoint at"),
    "foreign checkpoint": (
        ["generate", "a", "-c", "foreign.pth"],
        "foreign.pth is not a checkpoint of wikigpt",
    ),
    "truncated checkpoint": (
        ["evaluate", "cut.pth"],
        "cut.pth is not a checkpoint of wikigpt, or it is damaged",
    ),
    "prompt too long": (["generate", " ".join(["the"] * 17)], "17"),
    "text too long": (["attention", " ".join(["the"] * 17)], "17"),
    "no such layer": (["attention", "the cat", "--layer", "2"], "layer"),
    "unknown split": (["evaluate", "--dataset", "text", "--split", "dev"], "unknown split 'dev'"),
    "bad stride": (["evaluate", "--dataset", "text", "--stride", "17"], "stride: got 17"),
    "malformed pairs": (["finetune", "bad.jsonl", "--out", "new"], "bad.jsonl:2"),
    "malformed pairs for BLEU": (["evaluate", "--bleu", "bad.jsonl"], "bad.jsonl:2"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_work_is_one_line_and_leaves_nothing_behind(place, case):
    arguments, message = CASES[case]
    (place / "empty.txt").write_text("")
    (place / "foreign.pth").write_text("hello")
    (place / "cut.pth").write_bytes((place / "runs" / "tiny" / checkpoint.NAME).read_bytes()[:500])
    (place / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    before = sorted(str(p) for p in place.rglob("*") if "cache" not in p.parts)
    # A proxy that answers nothing closes the network for the hub library.
    done = wikigpt(*arguments, cwd=place, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert sorted(str(p) for p in place.rglob("*") if "cache" not in p.parts) == before


def test_without_the_packages_for_training_the_command_says_what_to_install(place):
    code = "import sys; sys.modules['typer'] = None; from wikigpt.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install --no-build-isolation ".[train]"' in done.stderr
