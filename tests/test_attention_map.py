"""The picture of attention weights: what it shows, and that it is written whole or not at all."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from wikigpt.attention_map import check_output, draw, figure
from wikigpt.data import ByteTokenizer, WordTokenizer
from wikigpt.errors import UserError
from wikigpt.model import GPT, GPTConfig

LAYERS, HEADS, CONTEXT = 3, 2, 80
TEXT = "the cat sat on the mat , costs $ 5 $ and purrs ."
TOKENIZER = WordTokenizer.train(TEXT)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=TOKENIZER.vocab_size, context_length=CONTEXT, n_layer=LAYERS, n_head=HEADS, n_embd=32)
    model = GPT(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def panels(picture):
    """The drawn weights of each panel, masked arrays (S, S)."""
    return [axes.images[0].get_array() for axes in picture.axes if axes.images]


def axis_labels(axes):
    return [[label.get_text() for label in axis.get_ticklabels()] for axis in (axes.yaxis, axes.xaxis)]


def test_a_picture_is_written_as_png(model, tmp_path):
    draw(model, TOKENIZER, TEXT, tmp_path / "map.png", layer=1, head=0)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = imread(tmp_path / "map.png").shape
    assert min(height, width) > 400


def test_the_chosen_head_of_the_chosen_layer_is_drawn(model):
    idx = torch.tensor([TOKENIZER.encode(TEXT).tolist()])
    [drawn] = panels(figure(model, TOKENIZER, TEXT, layer=2, head=1))
    np.testing.assert_array_equal(drawn.filled(0.0), model.attention_weights(idx)[2, 0, 1].numpy())


def test_drawn_rows_sum_to_one(model):
    for drawn in panels(figure(model, TOKENIZER, TEXT)):
        np.testing.assert_allclose(drawn.sum(axis=1), 1.0, rtol=1e-5)


def test_exactly_the_future_is_blank(model):
    [drawn] = panels(figure(model, TOKENIZER, TEXT, layer=0, head=0))
    length = len(TEXT.split())
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn), ~np.tri(length, dtype=bool))


@pytest.mark.parametrize(
    ("layer", "head", "titles"),
    [
        (1, None, ["head 0", "head 1"]),
        (None, 1, ["layer 0", "layer 1", "layer 2"]),
        (None, None, [f"layer {layer}, head {head}" for layer in range(LAYERS) for head in range(HEADS)]),
    ],
)
def test_what_is_not_chosen_is_drawn_side_by_side(model, layer, head, titles):
    picture = figure(model, TOKENIZER, TEXT, layer, head)
    assert [axes.get_title() for axes in picture.axes if axes.images] == titles


def test_each_panel_shows_its_own_layer_and_head(model):
    weights = model.attention_weights(torch.tensor([TOKENIZER.encode(TEXT).tolist()]))[:, 0].flatten(0, 1)
    for drawn, expected in zip(panels(figure(model, TOKENIZER, TEXT)), weights.numpy()):
        np.testing.assert_array_equal(drawn.filled(0.0), expected)


def test_both_axes_name_the_tokens(model):
    axes = figure(model, TOKENIZER, TEXT, layer=0, head=0).axes[0]
    assert axis_labels(axes) == [TEXT.split()] * 2
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("query token", "attends to")


def test_all_of_sixty_tokens_are_named(model):
    axes = figure(model, TOKENIZER, "cat " * 60, layer=0, head=0).axes[0]
    assert axis_labels(axes)[0] == ["cat"] * 60


def test_of_more_tokens_every_second_is_named(model):
    axes = figure(model, TOKENIZER, "cat sat " * 40, layer=0, head=0).axes[0]
    assert axis_labels(axes)[0] == ["cat"] * 40


def test_neighbouring_labels_do_not_overlap(model):
    picture = figure(model, TOKENIZER, "purrs " * 60, layer=0, head=0)
    picture.draw_without_rendering()
    boxes = [label.get_window_extent() for label in picture.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))


def test_a_long_token_is_cut_short(model):
    word = "abcdefghij" * 3
    tokenizer = WordTokenizer(["<unk>", "<eos>", word])
    axes = figure(model, tokenizer, word, layer=0, head=0).axes[0]
    assert axis_labels(axes)[0] == ["abcdefghijabcde\u2026"]


def test_a_token_that_looks_like_a_formula_is_drawn_as_it_is(model, tmp_path):
    tokenizer = WordTokenizer(["<unk>", "<eos>", "$\\frac$"])
    draw(model, tokenizer, "$\\frac$", tmp_path / "map.png", layer=0, head=0)
    assert (tmp_path / "map.png").exists()


def test_characters_without_a_glyph_draw_without_a_warning(model, tmp_path, recwarn):
    tokenizer = WordTokenizer(["<unk>", "<eos>", "\u732b"])
    draw(model, tokenizer, "\u732b the", tmp_path / "map.png", layer=0, head=0)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 3, "head": 0}, "layer 3 .* 0 to 2"),
        ({"layer": -1}, "layer -1 .* 0 to 2"),
        ({"head": 2}, "head 2 .* 0 to 1"),
        ({"text": ""}, "empty"),
        ({"text": " "}, "empty"),
        ({"text": "cat " * (CONTEXT + 1)}, f"{CONTEXT + 1} tokens.*{CONTEXT}"),
        ({"tokenizer": ByteTokenizer(), "text": "the"}, "vocabulary"),
    ],
)
def test_a_mistake_is_named_and_leaves_no_file(model, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        draw(model, **{"tokenizer": TOKENIZER, "text": TEXT, "path": tmp_path / "map.png", **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "begin"), [("map.png", b"\x89PNG"), ("map.PDF", b"%PDF-"), ("map.svg", b"<?xml")], ids=["png", "pdf", "svg"]
)
def test_the_suffix_chooses_the_format(model, tmp_path, name, begin):
    draw(model, TOKENIZER, "the cat", tmp_path / name, layer=0, head=0)
    assert (tmp_path / name).read_bytes().startswith(begin)


@pytest.mark.parametrize("name", ["map.xyz", "map", ".png", "map.jpg"])
def test_another_type_of_picture_is_refused_and_those_that_can_be_written_are_named(tmp_path, name):
    with pytest.raises(UserError, match=r"end its name with \.png or \.pdf or \.svg"):
        check_output(tmp_path / name)


def test_a_path_below_a_file_is_refused_before_there_is_a_model(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is no folder"):
        check_output(tmp_path / "file" / "a.png")


def test_a_folder_that_does_not_exist_is_named(model, tmp_path):
    with pytest.raises(UserError, match="missing"):
        draw(model, TOKENIZER, TEXT, tmp_path / "missing" / "map.png", layer=0, head=0)


def test_a_failure_leaves_the_old_picture(model, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full(self, file, **options):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    path = tmp_path / "map.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(UserError, match="No space left"):
        draw(model, TOKENIZER, TEXT, path, layer=0, head=0)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("map.png", b"old")]
