"""Checkpoints of the Hub whose texts begin with a token of their own (Llama): a model sees what transformers shows it."""

import json
import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from wikigpt import checkpoint, finetune
from wikigpt.bleu import evaluate_bleu
from wikigpt.data import tokenizer_from_json
from wikigpt.evaluate import perplexity
from wikigpt.generate import complete
from wikigpt.hub import load_tokenizer, save_pretrained
from wikigpt.pairs import Pair, encode_pairs

UNK, BOS, EOS = range(3)
TEXT = "the cat sat on the mat\nand then the dog came"
# What the post-processor of tokenizer.json does: Llama's, one that ends texts too, those without a word on it.
FRAMES = {"bos": "<s> $A", "bos and eos": "<s> $A </s>", "eos": "$A </s>", "nothing": "$A", "none": None}


def write_tokenizer(directory, frame, settings):
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    model = Tokenizer(models.BPE(vocab, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    if FRAMES[frame] is not None:
        model.post_processor = processors.TemplateProcessing(single=FRAMES[frame], special_tokens=[("<s>", BOS), ("</s>", EOS)])
    model.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocab)


@pytest.fixture(params=FRAMES)
def llama(request, tmp_path):
    """A directory as the Hub has it for a Llama."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    vocab_size = write_tokenizer(tmp_path, request.param, settings)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=BOS, eos_token_id=EOS, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return tmp_path


def begins(directory):
    """What transformers puts before a text."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("cat")["input_ids"]
    return ids[: ids.index(tokenizer.convert_tokens_to_ids("c"))]


def test_a_prompt_begins_as_in_transformers(llama):
    tokenizer = load_tokenizer(llama)
    assert tokenizer.encode_prompt("cat") == begins(llama) + tokenizer.encode("cat").tolist()
    assert tokenizer.encode_prompt("") == [BOS]


def test_perplexity_is_that_of_transformers(llama):
    """Of a text after <s>, which begins every text of a Llama, whether or not its tokenizer writes it."""
    model, tokenizer, _ = checkpoint.load_model(llama)
    ids = tokenizer.encode(TEXT)
    ours = perplexity(model, ids, tokenizer.first_id)
    with torch.no_grad():
        whole = torch.tensor([[BOS, *ids]])
        loss = AutoModelForCausalLM.from_pretrained(llama)(whole, labels=whole).loss
    assert ours.per_token == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("prompt", ["the cat", "c"])
def test_greedy_continuations_are_those_of_transformers(llama, prompt):
    model, tokenizer, _ = checkpoint.load_model(llama)
    theirs = AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.tensor([begins(llama) + tokenizer.encode(prompt).tolist()])
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
    text = complete(model, tokenizer, [prompt], 12, temperature=0.0, stop_at_eos=False)[0]
    assert text == tokenizer.decode(expected.tolist())
    assert text


def test_an_empty_prompt_starts_from_bos(llama):
    model, tokenizer, _ = checkpoint.load_model(llama)
    theirs = AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.tensor([[BOS]])
    expected = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 1:]
    text = complete(model, tokenizer, [""], 8, temperature=0.0, stop_at_eos=False)[0]
    assert text == tokenizer.decode(expected.tolist())


def test_pairs_begin_so_in_fine_tuning(llama):
    tokenizer = load_tokenizer(llama)
    ids, targets = encode_pairs([Pair("cat", "dog")], tokenizer, 64)
    whole = [*begins(llama), *tokenizer.encode("cat"), *tokenizer.encode("dog")]
    assert ids[0].tolist() == whole
    assert targets[0].tolist() == [-100] * (len(whole) - 4) + [*tokenizer.encode("dog"), EOS]


def test_a_fine_tuned_checkpoint_keeps_its_beginning(llama, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "cat", "completion": "dog"}\n')
    path = finetune.finetune(pairs, tmp_path / "out", checkpoint=llama, steps=1, valid_fraction=0.0, log=lambda _: None)
    tokenizer = checkpoint.load_model(path).tokenizer
    assert tokenizer.encode_prompt("cat") == load_tokenizer(llama).encode_prompt("cat")


def test_bleu_prompts_begin_so(llama, monkeypatch):
    model, tokenizer, _ = checkpoint.load_model(llama)
    seen = []

    def generate(model, rows, *_, **__):
        seen.extend(rows)
        return [[EOS]] * len(rows)

    monkeypatch.setattr("wikigpt.generate.generate", generate)
    evaluate_bleu(model, tokenizer, [Pair("cat", "dog")])
    assert seen == [tokenizer.encode_prompt("cat")]


def test_the_beginning_shows_in_no_text(llama):
    tokenizer = load_tokenizer(llama)
    assert tokenizer.decode([BOS, *tokenizer.encode("the cat"), EOS]) == "the cat"
    assert tokenizer.token(BOS) == "<s>"


def test_a_model_saved_by_us_begins_so_in_transformers(llama, tmp_path):
    model, tokenizer, _ = checkpoint.load_model(llama)
    save_pretrained(model, tmp_path / "new", tokenizer)
    assert begins(tmp_path / "new") == begins(llama)
    assert AutoTokenizer.from_pretrained(tmp_path / "new").bos_token_id == BOS
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "new").config
    assert (config.bos_token_id, config.eos_token_id) == (BOS, EOS)
    assert load_tokenizer(tmp_path / "new").encode_prompt("a") == tokenizer.encode_prompt("a")


def test_the_tokenizer_survives_a_checkpoint(llama):
    tokenizer = load_tokenizer(llama)
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert (again.first_id, again.adds_bos) == (tokenizer.first_id, tokenizer.adds_bos)


@pytest.mark.parametrize(
    ("settings", "config", "first"),
    [
        ({"eos_token": "</s>", "bos_token": "<s>"}, {"bos_token_id": 0}, BOS),
        ({"eos_token": "</s>", "bos_token": None}, {"bos_token_id": 1}, BOS),
        ({"eos_token": "</s>"}, {}, EOS),
    ],
)
def test_an_empty_text_begins_with_what_the_directory_says(tmp_path, settings, config, first):
    write_tokenizer(tmp_path, "nothing", settings)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).first_id == first


@pytest.mark.parametrize("adds", [True, False])
def test_add_bos_token_counts_where_no_tokenizer_json_is(tmp_path, adds):
    (tmp_path / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1, "<s>": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    settings = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "add_bos_token": adds}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).encode_prompt("a") == ([2, 1] if adds else [1])
