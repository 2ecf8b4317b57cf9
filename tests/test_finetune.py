"""Fine-tuning on prompt/completion pairs: reading, encoding, training, the examples of the how-to pages."""

import json
import random
import runpy
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wikigpt import GPT, GPTConfig, checkpoint
from wikigpt import pairs as pairs_module
from wikigpt.bleu import evaluate_bleu
from wikigpt.data import BPETokenizer, ByteTokenizer, WordTokenizer, train_tokenizer
from wikigpt.errors import UserError
from wikigpt.finetune import finetune, pairs_loss
from wikigpt.pairs import Pair, encode_pairs, read_pairs
from wikigpt.train import PairBatches, read_log

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
TASKS = ("digits", "questions", "code")
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TINY: dict[str, Any] = {
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 2,
    "steps": 12,
    "batch_size": 8,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digit_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    numbers: set[tuple[int, ...]] = set()
    while len(numbers) < count:
        numbers.add(tuple(rng.randrange(10) for _ in range(rng.randint(1, 4))))
    rows = [(" ".join(map(str, n)) + " =", " ".join(WORDS[i] for i in n)) for n in sorted(numbers)]
    rng.shuffle(rows)
    return rows


def write_pairs(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def pairs_file(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", digit_pairs(40, seed=1))


def load_run(path: Path) -> tuple[GPT, Any]:
    loaded = checkpoint.load_model(path)
    assert loaded.tokenizer is not None
    return loaded.model, loaded.tokenizer


def quiet(_: str) -> None:
    pass


# ---- reading ----


def test_pairs_are_read_with_the_line_they_come_from(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a", "completion": " b\\n"}\r\n\n' + '{"completion": "é", "id": 7, "prompt": "c"}'.encode()
    )
    pairs = read_pairs(path)
    assert pairs == [Pair("a", " b\n"), Pair("c", "é")]
    assert [pair.where for pair in pairs] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a" "completion": "b"}', "not JSON .*column 16"),
        (b'["a", "b"]', "a list, not an object"),
        (b"1" * 5000, "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "a", "completions": "b"}', "no 'completion'; rename 'completions' to it"),
        (b'{"prompt": "a", "answer": "b"}', "no 'completion'; each line is one object like"),
        (b'{"prompt": 3, "completion": "b"}', "'prompt' is a number; put it in quotes"),
        (b'{"prompt": "a", "completion": null}', "'completion' is null"),
        (b'{"prompt": "a", "completion": ["b"]}', "'completion' is a list"),
        (b'{"prompt": "a", "completion": " \\n"}', "the completion is empty"),
        (b'{"prompt": "", "completion": "b"}', "the prompt is empty"),
        (b'{"prompt": "caf\xe9", "completion": "b"}', "byte 16 is not UTF-8"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_pairs_is_a_user_error(tmp_path, content):
    (tmp_path / "pairs.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="is empty: it needs lines like"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_a_missing_file_and_a_directory_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match="Is a directory"):
        read_pairs(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_another_unicode_is_named_by_its_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes('{"prompt": "a", "completion": "b"}\n'.encode(encoding))
    with pytest.raises(UserError, match=rf"pairs.jsonl is {encoding.upper()} text: save it as UTF-8, e.g. iconv -f {encoding}"):
        read_pairs(path)


def test_line_ends_of_windows_and_line_separators_within_a_string_are_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes('{"prompt": "a\u2028b", "completion": "c\x85"}\r\n{"prompt": "d", "completion": "e"}\r\n'.encode())
    assert read_pairs(path) == [Pair("a\u2028b", "c\x85"), Pair("d", "e")]


def test_a_large_file_is_read_line_by_line(tmp_path):
    """Its bytes are never in memory as a whole: 40 MB of other keys take little more than their pairs do."""
    path = tmp_path / "pairs.jsonl"
    line = json.dumps({"prompt": "a", "completion": "b", "notes": "x" * 1_000_000}) + "\n"
    path.write_text(line * 40)
    tracemalloc.start()
    pairs = read_pairs(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pairs) == 40
    assert peak < 10e6


# ---- encoding ----


def test_more_pairs_than_memory_holds_name_the_longest(monkeypatch):
    monkeypatch.setattr(pairs_module, "machine_memory", lambda device: 1000)
    pairs = [Pair("a", "b", "f:1"), Pair("a" * 40, "b" * 10, "f:2")]
    with pytest.raises(UserError, match="2 pairs, padded to the 50 tokens of f:2, take"):
        encode_pairs(pairs, ByteTokenizer(), 64)
    assert encode_pairs(pairs[:1], ByteTokenizer(), 64)[0].shape == (1, 2)


def test_targets_are_the_completion_and_eos_and_nothing_of_prompt_or_padding():
    tok = ByteTokenizer()
    ids, targets = encode_pairs([Pair("ab", "cd"), Pair("e", "f")], tok, 16)
    a, b, c, d, e, f = b"abcdef"
    eos = tok.eos_id
    assert ids.tolist() == [[a, b, c, d], [e, f, eos, eos]]
    assert targets.tolist() == [[-100, c, d, eos], [f, eos, -100, -100]]


@pytest.mark.parametrize("kind", ["word", "bpe", "byte"])
def test_prompt_and_targets_decode_to_the_pair(kind):
    pair = Pair("3 1 4 =", " three one four")
    tok = train_tokenizer(kind, f"{pair.prompt}{pair.completion}\n" * 2)
    ids, targets = encode_pairs([pair], tok, 64)
    kept = targets[0] != -100
    start = int(kept.nonzero()[0]) + 1
    assert tok.decode(ids[0, :start].tolist()) == pair.prompt
    assert tok.decode(targets[0, kept][:-1].tolist()).strip() == pair.completion.strip()
    assert targets[0, -1] == tok.eos_id


def test_a_pair_fills_the_context_to_the_last_token_and_no_further():
    ids, _ = encode_pairs([Pair("abc", "defgh")], ByteTokenizer(), 8)
    assert ids.shape == (1, 8)
    pairs = [Pair("a", "b", "p.jsonl:1"), Pair("abc", "defghi", "p.jsonl:2")]
    with pytest.raises(UserError, match=r"p.jsonl:2: 3 prompt and 6 completion tokens are 9, .* context is 8"):
        encode_pairs(pairs, ByteTokenizer(), 8)


def test_the_share_of_unknown_words_is_reported():
    tok = WordTokenizer.train("a b = <unk>")
    lines: list[str] = []
    encode_pairs([Pair("a x =", "y")], tok, 8, lines.append)
    assert lines == ["2 of 4 words (50.0%) are unknown to the vocabulary: <unk>"]


def test_a_completion_of_several_lines_needs_another_tokenizer_than_words():
    pairs = [Pair("a", "b\nc", "p.jsonl:1")]
    with pytest.raises(UserError, match=r"p.jsonl:1: .*use --tokenizer bpe or byte"):
        encode_pairs(pairs, WordTokenizer.train("a b c <unk>"), 8)
    assert encode_pairs(pairs, ByteTokenizer(), 8)[0].shape == (1, 4)


def test_a_final_line_break_of_a_completion_is_no_second_eos_for_words():
    tok = WordTokenizer.train("a b <unk>")
    _, targets = encode_pairs([Pair("a", "b\n")], tok, 8)
    assert targets.tolist() == [[tok.encode("b")[0], tok.eos_id]]


def test_no_pairs_to_encode_is_a_value_error():
    with pytest.raises(ValueError, match="pairs: got none"):
        encode_pairs([], ByteTokenizer(), 8)


def test_the_loss_of_pairs_does_not_depend_on_prompts_padding_or_batches():
    torch.manual_seed(0)
    tok = ByteTokenizer()
    model = GPT(GPTConfig(vocab_size=257, context_length=32, n_layer=1, n_head=2, n_embd=32))
    pairs = [Pair("ab", "cd"), Pair("efghij", "k"), Pair("l", "mnopqrst")]
    losses, tokens = 0.0, 0
    for pair in pairs:
        sequence = [*tok.encode(pair.prompt + pair.completion).tolist(), tok.eos_id]
        logits = model(torch.tensor([sequence[:-1]]))[0]
        n = len(pair.completion) + 1
        losses += torch.nn.functional.cross_entropy(logits[-n:], torch.tensor(sequence[-n:]), reduction="sum").item()
        tokens += n
    ids, targets = encode_pairs(pairs, tok, 32)
    for batch_size in (1, 2, 3):
        assert pairs_loss(model, ids, targets, batch_size) == pytest.approx(losses / tokens, rel=1e-5)


# ---- training ----


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2))])
def test_a_toy_translation_is_learnt_from_scratch_to_bleu_95_on_unseen_numbers(tmp_path, seed):
    rows = digit_pairs(1000, seed)
    path = finetune(
        write_pairs(tmp_path / "train.jsonl", rows[:800]),
        tmp_path / "run",
        seed=seed,
        device="cpu",
        log=quiet,
    )
    test = read_pairs(write_pairs(tmp_path / "test.jsonl", rows[800:]))
    assert evaluate_bleu(*load_run(path), test).score > 95


def test_a_run_with_numpys_numbers_leaves_a_checkpoint_that_can_be_read(pairs_file, tmp_path):
    numbers = {"steps": np.int64(1), "batch_size": np.int32(4), "lr": np.float64(1e-3), "seed": np.int64(1)}
    out = finetune(pairs_file, tmp_path / "out", **numbers, valid_fraction=np.float32(0.25), log=quiet)
    assert checkpoint.load(out)["config"]["train"]["lr"] == 1e-3


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(pairs_file, tmp_path):
    first, again, other = (
        checkpoint.load(finetune(pairs_file, tmp_path / name, seed=seed, log=quiet, **TINY))["model"]
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


def test_the_callers_random_state_is_left_alone(pairs_file, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    finetune(pairs_file, tmp_path / "run", log=quiet, **TINY)
    assert torch.equal(torch.rand(4), expected)


def test_the_checkpoint_keeps_the_best_validation(pairs_file, tmp_path):
    lines: list[str] = []
    # A learning rate that makes the loss rise again.
    settings = {**TINY, "steps": 60, "lr": 0.3}
    path = finetune(pairs_file, tmp_path / "run", log=lines.append, **settings)
    losses = [float(line.split("validation loss ")[1].split()[0]) for line in lines if "validation loss" in line]
    assert min(losses) < losses[-1]
    content = checkpoint.load(path)
    assert content["valid_loss"] == pytest.approx(min(losses), abs=1e-4)
    assert content["step"] == 3 * (losses.index(min(losses)) + 1)


def test_the_saved_weights_have_the_validation_loss_that_is_recorded(pairs_file, tmp_path):
    path = finetune(pairs_file, tmp_path / "run", valid_fraction=0.25, seed=4, log=quiet, **TINY)
    model, tok = load_run(path)
    pairs = read_pairs(pairs_file)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    ids, targets = encode_pairs([pairs[i] for i in order[:10]], tok, 128)
    recorded = checkpoint.load(path)["valid_loss"]
    assert pairs_loss(model, ids, targets) == pytest.approx(recorded, rel=1e-5)


def test_training_starts_from_the_checkpoint_and_keeps_its_tokenizer(pairs_file, tmp_path):
    first = finetune(pairs_file, tmp_path / "first", log=quiet, **TINY)
    rest: dict[str, Any] = {"steps": 1, "batch_size": 8, "device": "cpu"}
    second = finetune(pairs_file, tmp_path / "second", checkpoint=first, lr=1e-9, log=quiet, **rest)
    before, after = checkpoint.load(first), checkpoint.load(second)
    assert after["tokenizer"] == before["tokenizer"]
    assert after["model_config"] == before["model_config"]
    for name, weight in before["model"].items():
        torch.testing.assert_close(after["model"][name], weight, rtol=0, atol=1e-7)


def test_a_hugging_face_directory_can_be_fine_tuned(pairs_file, tmp_path):
    torch.manual_seed(0)
    tok = BPETokenizer.train(pairs_file.read_text(), 300)
    GPT(GPTConfig(tok.vocab_size, 64, n_layer=1, n_head=2, n_embd=32)).save_pretrained(str(tmp_path / "hf"), tok)
    settings: dict[str, Any] = {"steps": 12, "batch_size": 8, "device": "cpu"}
    path = finetune(pairs_file, tmp_path / "run", checkpoint=tmp_path / "hf", log=quiet, **settings)
    assert load_run(path)[1].encode("3 1 4 =").tolist() == tok.encode("3 1 4 =").tolist()


def test_words_of_a_vocabulary_from_scratch_are_all_known_even_if_they_occur_once(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", [("capital of France", "Paris"), ("capital of Peru", "Lima")])
    lines: list[str] = []
    _, tok = load_run(finetune(path, tmp_path / "run", log=lines.append, **TINY))
    assert {"France", "Paris", "Lima"} <= set(tok.types)
    assert not any("<unk>" in line for line in lines)


def test_a_single_pair_or_no_validation_trains_on_all_pairs(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", [("a =", "b")])
    for fraction in (0.1, 0.0):
        content = checkpoint.load(finetune(path, tmp_path / str(fraction), valid_fraction=fraction, log=quiet, **TINY))
        assert content["valid_loss"] is None
        assert content["step"] == TINY["steps"]  # with nothing to choose by, the newest weights


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_best_weights(pairs_file, tmp_path, monkeypatch):
    steps = 0
    forward = GPT.forward

    def fails_at_the_ninth(self, idx, targets=None, cache=None):
        nonlocal steps
        steps += torch.is_grad_enabled()
        return forward(self, idx, targets, cache) * (float("nan") if steps == 9 else 1.0)

    monkeypatch.setattr(GPT, "forward", fails_at_the_ninth)
    with pytest.raises(UserError, match=r"the loss is nan at step 8; the last good checkpoint is .*last.pth"):
        finetune(pairs_file, tmp_path / "run", log=quiet, **TINY)
    loaded = checkpoint.load_model(tmp_path / "run")
    assert loaded.content["step"] == 8
    assert all(weight.isfinite().all() for weight in loaded.model.state_dict().values())


def test_no_progress_bar_is_drawn_where_there_is_no_terminal(pairs_file, tmp_path, capsys):
    finetune(pairs_file, tmp_path / "run", **TINY)
    captured = capsys.readouterr()
    assert "40 pairs: 36 to train, 4 to validate" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 1, "steps": 1}, "both epochs and steps"),
        ({"steps": 0}, "--steps is 0"),
        ({"epochs": -1, "steps": None}, "--epochs is -1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"valid_fraction": 1.0}, "--valid-fraction is 1.0"),
        ({"tokenizer": "char"}, "unknown tokenizer 'char'"),
        ({"n_head": 3}, "n_head: 3 does not divide n_embd 32"),
        ({"device": "nonsense"}, "unknown device"),
    ],
)
def test_impossible_settings_are_user_errors_and_write_nothing(pairs_file, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        finetune(pairs_file, tmp_path / "run", log=quiet, **{**TINY, **settings})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [{"tokenizer": "word"}, {"n_layer": 1}, {"n_embd": 32}, {"n_head": 2}])
def test_what_a_checkpoint_has_cannot_be_chosen_again(pairs_file, tmp_path, option):
    with pytest.raises(UserError, match="is for training from scratch"):
        finetune(pairs_file, tmp_path / "run", checkpoint=tmp_path / "first", log=quiet, **option)


def test_a_run_does_not_overwrite_the_checkpoint_it_starts_from(pairs_file, tmp_path):
    first = finetune(pairs_file, tmp_path / "first", log=quiet, **TINY)
    for source in (first, tmp_path / "first"):
        with pytest.raises(UserError, match="choose another --out"):
            finetune(pairs_file, tmp_path / "first", checkpoint=source, steps=1, device="cpu", overwrite=True, log=quiet)


# ---- the run directory ----


def test_a_run_has_a_log_and_a_picture_like_any_other(pairs_file, tmp_path):
    finetune(pairs_file, tmp_path / "run", log=quiet, **TINY)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.yaml", "last.pth", "log.jsonl", "loss.png", "tensorboard", "wiki-gpt.pth",
    }  # fmt: skip
    log = read_log(tmp_path / "run")
    assert {line["step"] for line in log if "valid_loss" in line} == set(range(1, 13))
    assert {line["step"] for line in log if "loss" in line} == set(range(1, 13))


def test_tokens_per_second_count_the_tokens_of_the_pairs_without_padding():
    ids, targets = encode_pairs([Pair("ab", "cd"), Pair("efghij", "k"), Pair("l", "mnopqrst")], ByteTokenizer(), 32)
    assert PairBatches(ids, targets, seed=0).mean_length == pytest.approx((4 + 7 + 9) / 3)


def test_a_run_that_is_there_is_overwritten_when_asked_alone(pairs_file, tmp_path):
    path = finetune(pairs_file, tmp_path / "run", log=quiet, **TINY)
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds a run already; add --resume to go on with it or --overwrite to replace it"):
        finetune(pairs_file, tmp_path / "run", log=quiet, **TINY)
    assert path.read_bytes() == before
    finetune(pairs_file, tmp_path / "run", overwrite=True, seed=1, log=quiet, **TINY)
    assert path.read_bytes() != before


def test_a_run_that_was_stopped_and_resumed_gives_the_same_bits(pairs_file, tmp_path):
    whole = finetune(pairs_file, tmp_path / "whole", log=quiet, **TINY)

    def stops(trainer):
        def at_step_5(step, steps, figures):
            if step == 5:
                signal.raise_signal(signal.SIGINT)

        return trainer.run(at_step_5)

    stopped = finetune(pairs_file, tmp_path / "stopped", log=quiet, run=stops, **TINY)
    assert checkpoint.load(tmp_path / "stopped" / "last.pth")["step"] in (5, 6)
    lines: list[str] = []
    assert finetune(None, tmp_path / "stopped", resume=True, device="cpu", log=lines.append) == stopped
    a, b = checkpoint.load(whole.parent / "last.pth"), checkpoint.load(stopped.parent / "last.pth")
    assert a["step"] == b["step"] == 12
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def test_a_resumed_run_keeps_its_settings_and_its_pairs(pairs_file, tmp_path):
    finetune(pairs_file, tmp_path / "run", log=quiet, **TINY)
    with pytest.raises(UserError, match=r"--batch-size: the run in .* has its own; leave it out beside --resume"):
        finetune(None, tmp_path / "run", resume=True, batch_size=4, device="cpu", log=quiet)
    other = write_pairs(tmp_path / "other.jsonl", digit_pairs(41, seed=2))
    with pytest.raises(UserError, match="was trained on other data"):
        finetune(other, tmp_path / "run", resume=True, device="cpu", log=quiet)
    with pytest.raises(UserError, match="no file of pairs"):
        finetune(None, tmp_path / "new", device="cpu", log=quiet)


# ---- examples of the how-to pages ----


def test_the_examples_are_what_their_script_writes(tmp_path):
    runpy.run_path(str(EXAMPLES / "make.py"))["main"](tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        file.name: file.read_bytes() for file in EXAMPLES.glob("*.jsonl")
    }


@pytest.mark.parametrize("task", TASKS)
def test_the_examples_test_on_prompts_that_they_do_not_train_on(task):
    train, test = (read_pairs(EXAMPLES / f"{task}{part}.jsonl") for part in ("", "-test"))
    assert len(test) >= 20
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in test}


def test_importing_the_module_does_not_import_what_only_a_run_needs():
    code = "import sys, wikigpt.finetune, wikigpt.bleu; print({'rich', 'sacrebleu', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "set()"
