"""What the README and the pages in docs/ show is run, or at least exists."""

import re

import pytest

from tests.conftest import ROOT
from wikigpt.config import GROUPS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_python_example_runs(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(code, page.name, "exec"), {})


def test_the_readme_has_a_python_example():
    assert "```python" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_option_that_is_shown_exists(page):
    from typer.main import get_command

    from wikigpt.cli import app

    commands = get_command(app).commands
    for line in re.findall(r"^(?:.*-m )?wikigpt ([a-z].*)$", page.read_text(), re.MULTILINE):
        name, *words = line.split("#")[0].split()
        known = {option for p in commands[name].params for option in p.opts} | {"--help", "--dataset", "--data-dir"}
        shown = [w for w in words if re.fullmatch(r"--[a-z-]+|-c", w)]
        assert set(shown) <= known, line


def test_what_is_said_about_installing_works_from_a_checkout():
    """Nothing is published, and an isolated build sees no torch."""
    sources = [path for name in ("wikigpt", "bench", "kernels") for path in (ROOT / name).rglob("*.py")]
    for file in [*PAGES, *sorted((ROOT / "docs" / "kernels").glob("*.md")), *sources]:
        for command in re.findall(r"""pip install [^`\n]*?["']([^"'`]*\[\w+\])""", file.read_text()):
            assert command.startswith(".["), f"{file}: {command}"
        for command in re.findall(r"pip install [^`\n]*\[(?:train|bench|dev)\]", file.read_text()):
            assert "--no-build-isolation" in command, f"{file}: {command}"


@pytest.mark.parametrize("name", ["README.md", "docs/translation.md", "docs/question-answering.md", "docs/code-generation.md"])
def test_the_environment_of_make_is_activated_before_a_bare_command(name):
    text = (ROOT / name).read_text()
    assert text.index(". .venv/bin/activate") < re.search("^(wikigpt|pytest|python) ", text, re.MULTILINE).start()


def test_every_setting_is_in_the_table_and_nothing_else():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    settings = {f for group in GROUPS.values() for f in group.__dataclass_fields__} - {"vocab_size"}
    assert documented - {"vocab_size"} == settings
