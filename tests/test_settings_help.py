"""The list of settings is what config.py says, and is known without torch."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from wikigpt.config import presets, resolve, settings
from wikigpt.settings_help import keys_epilog, purpose, table


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
