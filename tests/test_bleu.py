"""BLEU of completions: the score is sacrebleu's own, the decoding greedy and independent of batching."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wikigpt import GPT, GPTConfig
from wikigpt.bleu import BleuResult, evaluate_bleu, write_hypotheses
from wikigpt.data import ByteTokenizer, WordTokenizer
from wikigpt.errors import UserError
from wikigpt.pairs import Pair

TOKENIZER = WordTokenizer.train("a b c d e f g = , . <unk>\n")
PAIRS = [Pair(" ".join("abcdefg"[i : i + n]) + " =", "a b c , d e .") for n in (1, 2, 4) for i in range(4)]


def random_model(vocab_size: int = TOKENIZER.vocab_size, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=vocab_size, context_length=64, n_layer=1, n_head=2, n_embd=32)
    model = GPT(config).eval()
    for p in model.parameters():  # large weights, so that different prompts get different completions
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def says(monkeypatch: pytest.MonkeyPatch, *completions: list[int]) -> None:
    """The model's completions, whatever the model: one for each prompt, told apart by its first token."""

    def generate(model, prompt_ids, max_new_tokens, *, temperature, eos_id):
        return [list(completions[ids[0]]) for ids in prompt_ids]

    monkeypatch.setattr("wikigpt.generate.generate", generate)


def sacrebleu_command(references: Path, hypotheses: Path) -> str:
    command = [sys.executable, "-m", "sacrebleu", str(references), "-i", str(hypotheses), "-b", "-w", "4"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


def test_the_score_is_that_of_the_sacrebleu_command_on_the_written_hypotheses(tmp_path, monkeypatch):
    tokenizer = ByteTokenizer()
    texts = [
        "The cat sat on the mat.",
        "  two lines,\nlike-\nthese  in code",
        "",
        "naïve “quotes” & <skipped> x",
    ]
    truth = [
        "The cat sat on a mat.",
        "two lines,\nlike-\nthose in code\n",
        "something else here",
        "naïve “quotes” &",
    ]
    says(monkeypatch, *([*text.encode(), tokenizer.eos_id] for text in texts))
    pairs = [Pair(chr(i), completion) for i, completion in enumerate(truth)]

    result = evaluate_bleu(random_model(257), tokenizer, pairs)

    write_hypotheses(result, tmp_path / "hypotheses.txt")
    (tmp_path / "references.txt").write_text("".join(f"{' '.join(t.split())}\n" for t in truth), "utf-8")
    assert 10 < result.score < 90
    assert f"{result.score:.4f}" == sacrebleu_command(tmp_path / "references.txt", tmp_path / "hypotheses.txt")


def test_hypotheses_that_equal_the_references_score_100(monkeypatch):
    pairs = [Pair("a =", "a b c , d ."), Pair("b =", "e e f g ,")]
    [first, second] = [TOKENIZER.encode(pair.prompt)[0] for pair in pairs]
    answers = {first: pairs[0].completion, second: pairs[1].completion}
    says(monkeypatch, *(TOKENIZER.encode(answers.get(i, "")).tolist() for i in range(TOKENIZER.vocab_size)))

    result = evaluate_bleu(random_model(), TOKENIZER, pairs)

    assert result.score == pytest.approx(100)
    assert result.exact_match == 1


def test_exact_match_is_the_share_of_equal_completions(monkeypatch):
    says(monkeypatch, *([*text.encode()] for text in ("yes", "no", "yes", "yes")))
    pairs = [Pair(chr(i), "yes") for i in range(4)]
    assert evaluate_bleu(random_model(257), ByteTokenizer(), pairs).exact_match == 0.75


def test_short_answers_are_referred_to_exact_match(monkeypatch):
    says(monkeypatch, [*b"Paris"])
    text = str(evaluate_bleu(random_model(257), ByteTokenizer(), [Pair("\0", "Paris")]))
    assert "BLEU 0.00" in text
    assert "exact match 100.0% of 1" in text
    assert "go by exact match" in text


def test_decoding_is_greedy_whatever_the_batch_size():
    model = random_model()
    together = evaluate_bleu(model, TOKENIZER, PAIRS, batch_size=8, max_new_tokens=6).hypotheses
    alone = []
    for pair in PAIRS:
        ids = TOKENIZER.encode(pair.prompt).tolist()
        new: list[int] = []
        while len(new) < 6 and TOKENIZER.eos_id not in new:
            with torch.no_grad():
                new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
        alone.append(TOKENIZER.decode([i for i in new if i != TOKENIZER.eos_id]).strip())
    assert len(set(alone)) > 1
    assert together == alone


def test_the_default_length_allows_twice_the_longest_reference(monkeypatch):
    given = []

    def generate(model, prompt_ids, max_new_tokens, *, temperature, eos_id):
        given.append(max_new_tokens)
        return [[] for _ in prompt_ids]

    monkeypatch.setattr("wikigpt.generate.generate", generate)
    evaluate_bleu(random_model(), TOKENIZER, [Pair("a =", "a b c"), Pair("b =", "a")])
    assert given == [7]


def test_references_with_half_a_surrogate_pair_can_be_written(tmp_path, monkeypatch):
    says(monkeypatch, [*b"ok"])
    [completion] = json.loads('["\\ud83d ok"]')
    result = evaluate_bleu(random_model(257), ByteTokenizer(), [Pair("\0", completion)])
    assert result.references == ["? ok"]


def test_a_prompt_longer_than_the_context_is_named():
    pairs = [Pair("a =", "b"), Pair("a " * 65, "b", "pairs.jsonl:2")]
    with pytest.raises(UserError, match=r"pairs.jsonl:2: the prompt's 65 tokens .* context of 64"):
        evaluate_bleu(random_model(), TOKENIZER, pairs)


def test_completions_of_no_token_are_refused():
    with pytest.raises(ValueError, match="max_new_tokens: got 0, must be 1 or more"):
        evaluate_bleu(random_model(), TOKENIZER, PAIRS, max_new_tokens=0)


def test_progress_counts_pairs(monkeypatch):
    seen = []
    evaluate_bleu(random_model(), TOKENIZER, PAIRS, batch_size=5, max_new_tokens=1, progress=lambda *n: seen.append(n))
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_no_pairs_is_a_value_error():
    with pytest.raises(ValueError, match="pairs: got none"):
        evaluate_bleu(random_model(), TOKENIZER, [])


def test_hypotheses_that_cannot_be_written_are_a_user_error(tmp_path):
    result = BleuResult(0.0, "", ["a"], ["b"], 0.0)
    with pytest.raises(UserError, match="cannot write"):
        write_hypotheses(result, tmp_path / "missing" / "hypotheses.txt")
