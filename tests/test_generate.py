"""Text generation: sampling, the cache, batches, streaming. Models are tiny and random, all on the CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wikigpt.kernels import sample

from wikigpt.data import BPETokenizer, ByteTokenizer, WordTokenizer
from wikigpt.errors import UserError
from wikigpt.generate import check_sampling, complete, cropped, generate
from wikigpt.model import GPT, GPTConfig

VOCAB, CONTEXT = 97, 24


def make_model(vocab_size=VOCAB, context_length=CONTEXT, **config):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, context_length=context_length, n_layer=2, n_head=2, n_embd=32, **config))
    for p in model.parameters():
        if p.dim() > 1:
            # Wider than GPT-2's, so that the tokens depend on the whole prompt.
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def random_prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


def one_by_one(model, prompt, max_new_tokens):
    """Greedy generation without a cache, for what fits into the context."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# ---- generate ----


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 1},
        {"position": "alibi"},
    ],
    ids=["learned", "rotary", "alibi"],
)
def test_the_cache_changes_no_token(config):
    model = make_model(**config)
    [prompt] = random_prompts(7)
    assert generate(model, [prompt], 17, temperature=0) == [one_by_one(model, prompt, 17)]


def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone(model):
    prompts = random_prompts(5, 3, 5, 1, 12, 3)
    alone = [one_by_one(model, prompt, 8) for prompt in prompts]
    assert generate(model, prompts, 8, temperature=0) == alone


def test_a_large_batch_gives_what_each_prompt_gives_alone():
    # From 4 rows and 32 new tokens on, the head is multiplied in another layout.
    model = make_model(context_length=64)
    prompts = random_prompts(4, 4, 4, 4, 4)
    alone = [one_by_one(model, prompt, 40) for prompt in prompts]
    assert generate(model, prompts, 40, temperature=0) == alone


def test_prompts_can_be_a_tensor(model):
    prompts = random_prompts(5, 5)
    new = generate(model, torch.tensor(prompts), 4, temperature=0)
    assert new == generate(model, prompts, 4, temperature=0)


def test_a_full_context_drops_its_older_half(model):
    [prompt] = random_prompts(CONTEXT)
    expected, window = [], prompt
    for _ in range(2 * CONTEXT):
        if len(window) > CONTEXT:
            window = window[-CONTEXT // 2 :]
        expected += one_by_one(model, window, 1)
        window = [*window, expected[-1]]
    assert generate(model, [prompt], 2 * CONTEXT, temperature=0) == [expected]


def test_a_context_of_one_token_is_enough():
    model = make_model(context_length=1)
    [new] = generate(model, [[3]], 4, temperature=0)
    assert new == [one_by_one(model, [token], 1)[0] for token in [3, *new[:-1]]]


def test_the_same_seed_gives_the_same_tokens(model):
    prompts = random_prompts(4, 6, 4)
    assert generate(model, prompts, 12, seed=5) == generate(model, prompts, 12, seed=5)


def test_another_seed_gives_other_tokens(model):
    prompts = random_prompts(4, 6, 4)
    assert generate(model, prompts, 12, seed=5) != generate(model, prompts, 12, seed=6)


def test_a_rows_random_numbers_depend_on_no_other_prompt(model):
    prompts = random_prompts(4, 6, 4, 9)
    others = [[1, 2, 3], *prompts[1:3], [5]]
    options = {"temperature": 2.0, "top_p": 0.9, "seed": 5}
    assert generate(model, prompts, 12, **options)[1:3] == generate(model, others, 12, **options)[1:3]


def test_rows_of_the_same_prompt_are_drawn_independently(model):
    a, b = generate(model, random_prompts(4) * 2, 12, temperature=3.0, seed=5)
    assert a != b


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_sampling_arguments_reach_the_sampler(model, filters):
    prompts = random_prompts(5)
    greedy = generate(model, prompts, 8, temperature=0)
    assert generate(model, prompts, 8, temperature=3.0, **filters) == greedy


def test_a_model_that_computes_nan_is_refused():
    model = make_model()
    model.head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits: row 0 has NaN"):
        generate(model, [[1]], 3)


def test_numbers_may_be_numpys(model):
    numbers = {"max_new_tokens": 8, "top_k": 5, "seed": 3, "eos_id": 7}
    ours = generate(model, [[1, 2]], temperature=0.5, **numbers)
    assert (
        generate(model, np.array([[1, 2]]), temperature=np.float32(0.5), **{k: np.int64(v) for k, v in numbers.items()}) == ours
    )


@pytest.mark.parametrize(("name", "wrong"), [("max_new_tokens", 8.0), ("seed", "3"), ("top_k", 2.0)])
def test_what_is_no_integer_is_named(model, name, wrong):
    with pytest.raises(TypeError, match=f"{name}: got {type(wrong).__name__}, allowed"):
        generate(model, [[1]], **{"max_new_tokens": 3, name: wrong})


@pytest.mark.parametrize("step", [0, 2])
def test_nan_is_seen_in_what_comes_from_the_device_anyway(model, monkeypatch, step):
    """As on a GPU, where sample itself does not wait to raise: its id is -1."""
    monkeypatch.setattr("wikigpt.kernels.sampling.checks_values", lambda device_type: False)
    calls = []

    def sample_of_bad_logits(logits, *args, **kwargs):
        assert not kwargs.get("check_nan")
        calls.append(logits)
        bad = logits.clone()
        if len(calls) > step:
            bad[1] = float("nan")
        return sample(bad, *args, **kwargs)

    monkeypatch.setattr("wikigpt.generate.sample", sample_of_bad_logits)
    with pytest.raises(ValueError, match=r"logits: row 2 has NaN, \+inf or nothing but -inf"):
        generate(model, [[1, 2], [1], [3, 4]], 5)


def test_each_row_ends_with_its_first_eos(model):
    prompts = random_prompts(5, 5, 5)
    full = generate(model, prompts, 10, temperature=0)
    eos = full[0][3]
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in full]
    assert generate(model, prompts, 10, temperature=0, eos_id=eos) == ended


def test_the_stream_shows_each_token_of_each_row_once(model):
    streamed: list[list[int]] = [[], [], []]
    prompts = random_prompts(5, 3, 5)
    eos = generate(model, prompts, 10, temperature=0)[0][3]
    new = generate(model, prompts, 10, temperature=0, eos_id=eos, stream=lambda row, token: streamed[row].append(token))
    assert streamed == new


def test_an_empty_prompt_starts_from_eos(model):
    without = generate(model, [[]], 6, temperature=0, eos_id=11)
    assert without == generate(model, [[11]], 6, temperature=0, eos_id=11)


def test_an_empty_prompt_without_eos_is_refused(model):
    with pytest.raises(ValueError, match="prompt_ids"):
        generate(model, [[1], []], 6)


def test_no_new_tokens_are_none(model):
    assert generate(model, random_prompts(3, 4), 0) == [[], []]


def test_a_negative_number_of_tokens_is_refused(model):
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, [[1]], -1)


def test_a_prompt_longer_than_the_context_names_both_lengths(model):
    with pytest.raises(UserError, match=rf"{CONTEXT + 1} tokens.*\b{CONTEXT}\b"):
        generate(model, random_prompts(CONTEXT + 1), 1)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 2**80])
def test_a_seed_of_more_than_64_bits_is_refused(model, seed):
    with pytest.raises(ValueError, match=f"seed: got {seed}, must have at most 64 bits"):
        generate(model, [[1]], 1, seed=seed)


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_a_seed_may_have_64_bits(model, seed):
    assert generate(model, [[1]], 3, seed=seed) == generate(model, [[1]], 3, seed=seed)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", float("inf")), ("temperature", float("nan")), ("top_k", 0), ("top_p", 0.0), ("min_p", 1.1)],
)
def test_sampling_arguments_can_be_checked_before_there_is_a_model(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}, must be"):
        check_sampling(**{name: value})
    check_sampling(temperature=0.0, top_k=None, top_p=1.0, min_p=0.0)


@pytest.mark.parametrize("token", [VOCAB, -1])
def test_a_token_outside_the_vocabulary_is_named(model, token):
    with pytest.raises(UserError, match=f"id {token} .*vocabulary of {VOCAB}"):
        generate(model, [[1, token]], 1)


def test_dropout_is_off_while_generating():
    model = make_model(dropout=0.5)
    prompts = random_prompts(5)
    expected = generate(model, prompts, 10, temperature=0)
    model.train()
    assert generate(model, prompts, 10, temperature=0) == expected


def test_the_model_is_in_training_mode_again_after_a_failure():
    def fail(row, token):
        raise KeyboardInterrupt

    model = make_model(dropout=0.5).train()
    with pytest.raises(KeyboardInterrupt):
        generate(model, [[1]], 3, stream=fail)
    assert model.training
    assert model.blocks[0].mlp.training


def test_generation_runs_in_inference_mode(model):
    modes = []
    generate(model, [[1]], 2, stream=lambda row, token: modes.append(torch.is_inference_mode_enabled()))
    assert modes == [True, True]


# ---- complete ----

TEXT = "He said \" the cat 's hat ( red ) cost $ 5 @.@ 50 \" , do n't you ?\n = = Cats = = \nA well @-@ fed cat .\n"
WORD = WordTokenizer.train(TEXT)
BPE = BPETokenizer.train("the cat sat on the mat, caf\u00e9 \U0001f600.\n" * 20, 300)


def scripted(ids, tokenizer, prompt, model=None, **arguments):
    """(returned text, pieces that were streamed) where the model would choose `ids`."""

    def choose(model, rows, max_new_tokens, *, stream, **others):
        for token in ids:
            stream(0, token)
        return [list(ids)]

    pieces: list[str] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("wikigpt.generate.generate", choose)
        [text] = complete(model, tokenizer, [prompt], 99, stream_text=pieces.append, **arguments)
    return text, pieces


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer(), WORD], ids=lambda tokenizer: tokenizer.kind)
def test_text_goes_in_and_text_comes_out(tokenizer):
    model = make_model(vocab_size=tokenizer.vocab_size, context_length=64)
    prompts = ["the cat", "A"]
    rows = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    new = generate(model, rows, 12, seed=1, eos_id=tokenizer.eos_id)
    texts = complete(model, tokenizer, prompts, 12, seed=1)
    for prompt, row, ids, text in zip(prompts, rows, new, texts):
        if ids[-1] == tokenizer.eos_id:
            ids.pop()
        assert prompt + text == tokenizer.decode(row + ids, pretty=tokenizer.kind == "word")


@pytest.mark.parametrize("text", ["caf\u00e9 \U0001f600\u20ac!", "\U0001f600" * 4, "plain"])
@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=lambda tokenizer: tokenizer.kind)
def test_no_piece_holds_half_a_character(tokenizer, text):
    returned, pieces = scripted(tokenizer.encode(text).tolist(), tokenizer, "the cat")
    assert returned == "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_come_as_soon_as_a_character_is_whole():
    _, pieces = scripted(ByteTokenizer().encode("a\u00e9b").tolist(), ByteTokenizer(), "x")
    assert pieces == ["a", "\u00e9", "b"]


def test_bytes_that_never_make_a_character_come_at_the_end():
    returned, pieces = scripted([97, 0xE2, 0x82], ByteTokenizer(), "x")
    assert returned == "".join(pieces) == "a\ufffd"


def test_words_stream_one_by_one():
    ids = WORD.encode("the cat cost $ 5 ,").tolist()
    assert scripted(ids, WORD, "He said")[1] == [" the", " cat", " cost", " $", "5", ","]


@pytest.mark.parametrize(
    ("prompt", "words", "text"),
    [
        ("the cat", ", do n't you ?", ", don't you?"),
        ("the cat", "'s hat", "'s hat"),
        ("A well", "@-@ fed cat", "-fed cat"),
        ("A well @-@", "fed cat", "fed cat"),
        ("the hat (", "red ) .", "red)."),
        ('He said " the', 'cat " .', ' cat".'),
        ('He said "', 'the cat " .', 'the cat".'),
        ("= =", "Cats = =", " Cats =="),
        ("", "the cat", "the cat"),
        ("A cat .\n", "He said", "He said"),
        ("zebra", "cat", " cat"),
    ],
)
def test_words_are_put_right_behind_the_prompt(prompt, words, text):
    assert scripted(WORD.encode(words).tolist(), WORD, prompt)[0] == text


@given(
    prompt=st.lists(st.sampled_from(range(WORD.vocab_size)), max_size=8),
    new=st.lists(st.sampled_from(range(WORD.vocab_size)), max_size=16),
)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_streamed_words_add_up_to_the_text(prompt, new):
    text, pieces = scripted(new, WORD, WORD.decode(prompt), stop_at_eos=False)
    assert "".join(pieces) == text


def test_the_final_eos_is_not_in_the_text():
    text, pieces = scripted([*WORD.encode("the cat").tolist(), WORD.eos_id], WORD, "A")
    assert text == "".join(pieces) == " the cat"


def test_generation_goes_on_after_eos_where_asked():
    model = make_model(vocab_size=WORD.vocab_size, context_length=64)
    model.head.weight.data[WORD.eos_id] *= 20  # now <eos> comes often
    stopped = complete(model, WORD, ["the cat"], 30, seed=0)[0]
    through = complete(model, WORD, ["the cat"], 30, seed=0, stop_at_eos=False)[0]
    assert "\n" not in stopped
    assert through.startswith(stopped + "\n")


def test_a_prompt_may_be_given_as_its_tokens():
    model = make_model(vocab_size=257, context_length=64)
    assert complete(model, ByteTokenizer(), [[*b"the"]], 12, seed=1) == complete(model, ByteTokenizer(), ["the"], 12, seed=1)


@pytest.mark.parametrize(
    ("context", "first", "expected"),
    [(4, False, [*b"efgh"]), (4, True, [256, *b"fgh"]), (1, True, [*b"h"]), (8, False, [*b"abcdefgh"])],
)
def test_a_prompt_that_is_cropped_keeps_its_end_and_the_token_that_texts_begin_with(context, first, expected):
    tokenizer = ByteTokenizer()
    tokenizer.adds_bos = first
    ids, had = cropped(make_model(vocab_size=257, context_length=context), tokenizer, "abcdefgh")
    assert (ids, had) == (expected, 8 + first)


def test_only_one_prompt_can_be_streamed(model):
    with pytest.raises(ValueError, match="stream_text"):
        complete(model, WORD, ["the", "cat"], 3, stream_text=print)


def test_streamed_text_of_a_model_adds_up_to_its_text():
    model = make_model(vocab_size=257, context_length=64)
    for seed in range(5):
        pieces: list[str] = []
        [text] = complete(model, ByteTokenizer(), ["the"], 50, seed=seed, stream_text=pieces.append)
        assert "".join(pieces) == text
        assert "" not in pieces
