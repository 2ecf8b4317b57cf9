"""What the command line prints: progress on a terminal and elsewhere, any character, numbers; where it may write."""

import io
import os
import sys

import pytest
from rich.console import Console

from wikigpt import output
from wikigpt.errors import UserError
from wikigpt.output import check_file, count, duration, progress, show_any_character


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    monkeypatch.setattr(output, "time", Clock())
    return output.time


def test_away_from_a_terminal_progress_is_a_line_every_ten_seconds_on_standard_error(clock, capsys):
    with progress("test, blocked", Console(force_terminal=False)) as on_step:
        for done in range(1, 101):
            clock.now = 0.3 * done
            on_step(done, 100)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["test, blocked: 34%, about 20 s left", "test, blocked: 68%, about 10 s left"]


def test_what_is_quick_says_nothing(clock, capsys):
    with progress("x", Console(force_terminal=False)) as on_step:
        on_step(1, 2)
        clock.now = 11.0
        on_step(2, 2)  # the end is seen by its result
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_progress_is_a_bar_that_is_gone_at_the_end():
    file = io.StringIO()
    with progress("[x]", Console(file=file, force_terminal=True, width=80)) as on_step:
        on_step(1, 2)
    shown = file.getvalue()
    assert "[x]" in shown
    assert "50%" in shown
    assert shown.endswith("\x1b[1A\x1b[2K")  # up a line, and that line emptied


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (812, "812"),
        (999, "999"),
        (1000, "1.00k"),
        (5_060_000, "5.06M"),
        (9_999_999, "10.0M"),
        (85_000_000, "85.0M"),
        (124_439_808, "124M"),
        (999_499_999, "999M"),
        (999_900_000, "1.00B"),
        (1_557_611_200, "1.56B"),
    ],
)
def test_numbers_of_parameters_have_three_digits_and_a_unit(number, text):
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_have_units(seconds, text):
    assert duration(seconds) == text


def test_a_character_that_the_terminal_lacks_is_a_question_mark(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    show_any_character()
    print("caf\u00e9", flush=True)
    assert file.getvalue() == b"caf?\n"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (".", "is a folder"),
        ("none/a.png", "none does not exist"),
        ("file/a.png", "file is no folder"),
        ("pipe", "a device or a pipe"),
        ("a" * 5000, "too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_before_the_work(tmp_path, name, says):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=says) as error:
        check_file(tmp_path / name)
    assert len(str(error.value)) < 500


def test_a_file_that_can_be_written_may_be_there_already(tmp_path):
    (tmp_path / "file").touch()
    check_file(tmp_path / "file")
    check_file(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
