"""The list of settings is what config.py says, and is known without torch."""

import dataclasses
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from wikigpt.config import GROUPS, presets, resolve
from wikigpt.settings_help import keys_epilog, purpose, settings, table


def test_every_field_of_the_configuration_is_listed_with_its_default():
    fields = [(group, f.name, f.default) for group, cls in GROUPS.items() for f in dataclasses.fields(cls)]
    fields.remove(next(field for field in fields if field[:2] == ("model", "vocab_size")))  # comes from the tokenizer
    assert [(s.group, s.key, eval(s.default)) for s in settings()] == fields


def test_a_setting_is_explained_by_the_comment_beside_it():
    [steps] = [s for s in settings() if (s.group, s.key) == ("train", "steps")]
    assert (steps.type, steps.comment) == ("int", "optimiser steps")


def test_what_the_table_shows_can_be_given():
    words = [line.split()[0] for line in table(1000).splitlines()]
    assert len(words) == len(settings())
    assert resolve(None, None, [w for w in words if w.startswith("train.") and w.endswith(("=cosine", "=fp32", "=none"))])


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_line_of_the_table_is_wider_than_asked_for(width):
    assert max(map(len, table(width).splitlines())) <= width


def test_the_end_of_a_help_page_has_no_markup_of_its_own():
    assert "[" not in keys_epilog().replace("\\[", "")


def test_every_preset_says_what_it_is_for():
    for preset in presets():
        assert 20 < len(purpose(preset)) < 120
        assert not purpose(preset).endswith(".")


def test_neither_torch_nor_numpy_is_needed():
    code = (
        "import sys; from wikigpt.settings_help import keys_epilog; keys_epilog(); print({'torch', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"
