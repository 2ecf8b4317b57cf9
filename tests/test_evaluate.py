"""Perplexity by the protocol of papers, by hand on tiny cases and against transformers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wikigpt import hub
from wikigpt.data.store import SplitStats
from wikigpt.errors import UserError
from wikigpt.evaluate import perplexity, strides, windows
from wikigpt.model import GPT, GPTConfig


def make_model(context_length=8, vocab_size=13, **options):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=vocab_size, context_length=context_length, n_layer=2, n_head=2, n_embd=16, **options)
    model = GPT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def tokens(n, vocab_size=13):
    return np.random.default_rng(n).integers(0, vocab_size, n).astype(np.uint16)


def by_hand(model, stream, stride):
    """One token at a time: the longest context the protocol allows, the definition written out."""
    ids = torch.from_numpy(np.concatenate(([0], stream)).astype(np.int64))
    length, total = model.config.context_length, 0.0
    for i in range(len(stream)):
        # Window that counts position i: windows end at length, length + stride, length + 2 stride ...
        end = length if i < length else length + math.ceil((i + 1 - length) / stride) * stride
        begin = end - length
        logits = model(ids[None, begin : i + 1])[0, -1].double()
        total -= torch.log_softmax(logits, -1)[ids[i + 1]].item()
    return total


@pytest.mark.parametrize("stride", [1, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 5, 8, 9, 20, 29])
def test_every_token_counts_once_with_the_context_of_the_protocol(n, stride):
    model, stream = make_model(), tokens(n)
    with torch.no_grad():
        figure = perplexity(model, stream, 0, stride=stride, batch_size=3)
        expected = by_hand(model, stream, stride)
    assert figure.tokens == n
    assert figure.nats == pytest.approx(expected, rel=1e-5)


@given(n=st.integers(1, 300), length=st.integers(1, 40), data=st.data())
@settings(max_examples=200, deadline=None)
def test_windows_count_every_position_exactly_once(n, length, data):
    stride = data.draw(st.integers(1, length))
    counted = []
    for begin, end, first in windows(n, length, stride):
        assert end - begin <= length
        assert begin <= first < end
        # Apart from the first window, a counted token has at least length - stride tokens before it.
        assert first == 0 or first - begin == length - stride
        counted += range(first, end)
    assert counted == list(range(n))


def test_the_stride_may_be_numpys_integer_and_is_named_where_it_is_none():
    model, stream = make_model(), tokens(20)
    assert perplexity(model, stream, 0, stride=np.int64(4)).nats == perplexity(model, stream, 0, stride=4).nats
    with pytest.raises(TypeError, match="stride: got float, allowed is int"):
        perplexity(model, stream, 0, stride=4.0)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    model = make_model()
    torch.nn.init.zeros_(model.norm.weight)
    torch.nn.init.zeros_(model.norm.bias)
    assert perplexity(model, tokens(50), 0).per_token == pytest.approx(13, rel=1e-6)


def test_blocked_evaluation_equals_transformers_loss_block_by_block(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=13, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = hub.from_pretrained(str(tmp_path)).eval()
    stream = tokens(30)
    ids = torch.from_numpy(np.concatenate(([0], stream)).astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for begin in range(0, 30, 8):
            x, y = ids[begin : min(begin + 8, 30)], ids[begin + 1 : begin + 9]
            total += F.cross_entropy(theirs(x[None]).logits[0], y, reduction="sum").item()
        figure = perplexity(ours, stream, 0, stride=8)
    assert figure.nats == pytest.approx(total, rel=1e-5)


def test_perplexity_per_word_counts_words_and_line_ends():
    stats = SplitStats(lines=3, words=17, tokens=50, types=9, unk=0, bytes=100)
    figure = perplexity(make_model(), tokens(50), 0, stats=stats)
    assert figure.per_word == pytest.approx(math.exp(figure.nats / 20))


def test_dynamic_evaluation_learns_a_repeating_text_and_leaves_the_weights_as_they_were():
    model, stream = make_model(), np.tile(np.arange(5, dtype=np.uint16), 40)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = perplexity(model, stream, 0, stride=8)
    dynamic = perplexity(model, stream, 0, stride=8, dynamic_lr=0.1)
    assert dynamic.tokens == plain.tokens
    assert dynamic.per_token < 0.7 * plain.per_token
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_token_the_model_does_not_know_is_named():
    with pytest.raises(UserError, match="token id 13 is out of range: the model's vocabulary has 13 entries"):
        perplexity(make_model(), np.array([1, 13, 2], dtype=np.uint16), 0)


@pytest.mark.parametrize("lr", [-1.0, math.nan, math.inf, 1e40])
def test_a_dynamic_learning_rate_that_cannot_be_is_refused(lr):
    with pytest.raises(UserError, match="dynamic_lr: got"):
        perplexity(make_model(), tokens(20), 0, dynamic_lr=lr)


@pytest.mark.parametrize(
    ("context", "stride", "protocols"),
    [
        (8, None, [("sliding window", 4), ("blocked", 8)]),
        (8, 3, [("sliding window", 3)]),
        (8, 8, [("blocked", 8)]),
        (1, None, [("blocked", 1)]),
    ],
)
def test_a_stride_of_the_whole_context_is_called_blocked(context, stride, protocols):
    assert strides(context, stride) == protocols


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_outside_the_context_is_refused(stride):
    with pytest.raises(UserError, match=f"stride: got {stride}, must be between 1 and the model's context_length 8"):
        perplexity(make_model(), tokens(5), 0, stride=stride)
