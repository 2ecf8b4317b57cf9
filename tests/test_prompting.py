"""Prompts of `wikigpt generate`: where they come from, what becomes of one that is too long, how continuations are printed."""

import io
import sys

import pytest
import torch
from rich.console import Console

from wikigpt.data import ByteTokenizer, WordTokenizer
from wikigpt.errors import UserError
from wikigpt.model import GPT, GPTConfig
from wikigpt.prompting import converse, fit, read_prompts, show

WORD = WordTokenizer.train("the cat sat on the mat and the dog sat on the log\n")
CONTEXT = 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=257, context_length=CONTEXT, n_layer=1, n_head=1, n_embd=8)).eval()


def typed(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def console(terminal):
    return Console(force_terminal=terminal, width=100, color_system=None, highlight=False)


# --- where prompts come from ----------------------------------------------------------------------------------------


def test_a_dash_is_all_of_standard_input_without_its_last_line_break(monkeypatch):
    typed(monkeypatch, b"one\ntwo\r\n\n")
    assert read_prompts(["a", "-"], []) == ["a", "one\ntwo\n"]


def test_a_file_is_one_prompt_after_those_that_were_typed(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\n")
    (tmp_path / "two.txt").write_text("a\nb")
    assert read_prompts(["c"], [tmp_path / "one.txt", tmp_path / "two.txt"]) == ["c", "caf\u00e9", "a\nb"]


@pytest.mark.parametrize(("name", "says"), [("missing", "No such file"), ("folder", "directory"), ("bytes", "not UTF-8 text")])
def test_a_prompt_file_that_cannot_be_read_is_named(tmp_path, name, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=says) as error:
        read_prompts([], [tmp_path / name])
    assert str(tmp_path / name) in str(error.value)


def test_standard_input_that_is_no_text_is_named(monkeypatch):
    typed(monkeypatch, b"ab\xff")
    with pytest.raises(UserError, match="standard input is not UTF-8 text"):
        read_prompts(["-"], [])


def test_standard_input_is_read_once():
    with pytest.raises(UserError, match="'-' once"):
        read_prompts(["-", "-"], [])


# --- prompts that are too long --------------------------------------------------------------------------------------


def test_a_prompt_that_fits_is_shown_as_it_is(model, capsys):
    assert fit(model, ByteTokenizer(), ["a b"]) == [("a b", [*b"a b"])]
    assert capsys.readouterr().err == ""


def test_a_prompt_that_is_too_long_keeps_its_end_and_one_line_says_so(model, capsys):
    [(text, ids)] = fit(model, ByteTokenizer(), ["abcdefghijklmnop"])
    assert (text, ids) == ("\u2026 ijklmnop", [*b"ijklmnop"])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "note: the prompt has 16 tokens, the model's context holds 8: only the last 8 are used\n"


def test_of_several_prompts_the_long_one_is_numbered(model, capsys):
    fit(model, ByteTokenizer(), ["a", "abcdefghijklmnop"])
    assert capsys.readouterr().err.startswith("note: prompt 2 has 16 tokens")


def test_words_that_are_left_are_shown_as_text(model):
    [(text, ids)] = fit(model, WORD, ["the cat sat on the mat and the dog sat ."])
    assert len(ids) == CONTEXT
    assert text == "\u2026 on the mat and the dog sat <unk>"


def test_a_token_that_the_model_lacks_is_refused_before_anything_is_printed(model, capsys):
    class Larger(ByteTokenizer):
        def encode(self, text):
            return super().encode(text) + 300

    with pytest.raises(UserError, match="outside the model's vocabulary"):
        fit(model, Larger(), ["a"])
    assert capsys.readouterr().out == ""


# --- what is printed ------------------------------------------------------------------------------------------------


def after(rows, stream):
    """A model that goes on with the numbers of its prompts."""
    texts = [f"+{row[0]}" for row in rows]
    if stream:
        stream(texts[0])
    return texts


def test_one_prompt_streams(capsys):
    show(console(False), [("a", [1])], after)
    assert capsys.readouterr().out == "a+1\n"


def test_in_a_pipe_an_empty_line_separates_several(capsys):
    show(console(False), [("a", [1]), ("[b] :cat:", [2])], after)
    assert capsys.readouterr().out == "a+1\n\n[b] :cat:+2\n"


def test_on_a_terminal_a_line_with_its_number_separates_several(capsys):
    show(console(True), [("a", [1]), ("b", [2])], after)
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip("\u2500 ") for line in lines] == ["1 of 2", "a+1", "2 of 2", "b+2"]


# --- at a terminal --------------------------------------------------------------------------------------------------


def says(monkeypatch, *lines):
    """What a person types; an exception is a key such as Ctrl-D."""
    asked = []

    def answer(prompt):
        asked.append(prompt)
        line = lines[len(asked) - 1]
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    return asked


@pytest.mark.parametrize("leave", ["", "  ", EOFError, KeyboardInterrupt], ids=["empty", "blanks", "Ctrl-D", "Ctrl-C"])
def test_each_line_is_continued_until_the_person_leaves(model, monkeypatch, capsys, leave):
    asked = says(monkeypatch, "a", "b", leave)
    converse(console(False), model, ByteTokenizer(), after)
    assert asked == ["> "] * 3
    assert capsys.readouterr().out.splitlines()[1:3] == ["a+97", "b+98"]


def test_ctrl_c_stops_a_text_and_not_the_conversation(model, monkeypatch, capsys):
    def stopped(rows, stream):
        if rows == [[97]]:
            stream(" and")
            raise KeyboardInterrupt
        return after(rows, stream)

    says(monkeypatch, "a", "b", "")
    converse(console(False), model, ByteTokenizer(), stopped)
    assert capsys.readouterr().out.splitlines()[1:] == ["a and", "b+98"]
