"""The machine that gpu-check is planned for has no network: what it needs to import is there, or it does without."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

LINES = (Path(__file__).parent / "gpu_machine.txt").read_text().splitlines()
PACKAGES = {canonicalize_name((r := Requirement(line)).name): r for line in LINES if not line.startswith("#")}
IMPORTED_AS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "cpuinfo": "py-cpuinfo", "pynvml": "nvidia-ml-py"}
OURS = {"wikigpt", "kernels", "bench", "tests", "setup"}


def imported(node: ast.AST) -> list[str]:
    """The modules that one statement or call names."""
    match node:
        case ast.Import(names=names):
            return [name.name for name in names]
        case ast.ImportFrom(module=str(module), level=0):
            return [module]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]):
            return [] if module.startswith(".") else [module]
    return []


def strings(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def called(node: ast.AST) -> str:
    """The last part of the name of what is called."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def outside_of_guards(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that a missing package does not stop: `try` with `except ImportError`, `if TYPE_CHECKING`; and what
    stands in for a module of Python, which is there."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Try) and any(
            handler.type is not None and "ImportError" in ast.unparse(handler.type) for handler in node.handlers
        ):
            if not set(top_level(node.body)) <= sys.stdlib_module_names:
                for handler in node.handlers:
                    yield from outside_of_guards(handler)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from outside_of_guards(node)


def top_level(nodes: Iterable[ast.AST]) -> list[str]:
    return [module.partition(".")[0] for node in nodes for module in imported(node)]


def needed(source: str) -> set[str]:
    """The packages that a file imports, also inside its functions, less those that it can do without: of
    `pytest.importorskip` and of `Peer(..., package=...)`."""
    tree = ast.parse(source)
    optional = set().union(*(strings(n) for n in ast.walk(tree) if called(n) in ("importorskip", "Peer")), set())
    return set(top_level(outside_of_guards(tree))) - optional - OURS - set(sys.stdlib_module_names)


def gpu_tests() -> set[Path]:
    """Files with tests of a GPU, conftest.py, and the files of tests/ that those import."""
    found: set[Path] = set()
    mark = ".".join(("pytest", "mark", "gpu"))  # in one piece this file would be one of them
    waiting = [path for path in (ROOT / "tests").glob("*.py") if path.name == "conftest.py" or mark in path.read_text()]
    while waiting:
        found.add(path := waiting.pop())
        names = re.findall(r"\btests(?:\.| import )(\w+)", path.read_text())
        waiting += [file for name in names if (file := ROOT / "tests" / f"{name}.py").exists() and file not in found]
    return found


def files() -> list[Path]:
    packages = (path for folder in ("wikigpt", "kernels", "bench") for path in (ROOT / folder).rglob("*.py"))
    return sorted({*packages, *gpu_tests(), ROOT / "setup.py"})


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_file_imports_is_on_the_machine_of_gpu_check(path):
    modules = needed(path.read_text())
    assert not {module for module in modules if canonicalize_name(IMPORTED_AS.get(module, module)) not in PACKAGES}


def test_versions_there_are_those_that_the_project_asks_for():
    wanted = map(Requirement, importlib.metadata.requires("wikigpt") or [])
    there = {"extra": "train", "python_version": "3.12"}
    wanted = [requirement for requirement in wanted if requirement.marker is None or requirement.marker.evaluate(there)]
    assert "torch" in {requirement.name for requirement in wanted}
    for requirement in wanted:
        for found in PACKAGES[canonicalize_name(requirement.name)].specifier:
            assert found.version in requirement.specifier, requirement


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import flash_attn.layers as x, os", {"flash_attn"}),
        ("def f():\n    from liger_kernel.ops import rms_norm", {"liger_kernel"}),
        ("from . import machine\nfrom bench import suite", set()),
        ("x = importlib.import_module('quack.cross_entropy')", {"quack"}),
        ("def f():\n    import quack\nPEERS = [Peer(f, 'cuda', 'quack')]", set()),
        ("def f():\n    import quack\nPEERS = [suite.Peer(f, package='quack')]\nimport flashinfer", {"flashinfer"}),
        ("import pytest\npeft = pytest.importorskip('peft')\nfrom peft import LoraConfig", {"pytest"}),
        ("try:\n    import a\nexcept ImportError:\n    import b", {"b"}),
        ("try:\n    import tomllib\nexcept ImportError:\n    import tomli", set()),
        ("x = importlib.import_module('.kernel', __package__)", set()),
        ("try:\n    import a\nexcept OSError:\n    a = None", {"a"}),
        ("if TYPE_CHECKING:\n    import a", set()),
    ],
)
def test_a_package_that_may_be_missing_is_told_from_one_that_is_needed(source, found):
    assert needed(source) == found


def test_the_files_of_gpu_check_are_among_those_looked_at():
    names = {str(path.relative_to(ROOT)) for path in files()}
    wanted = {"bench/gpu_check.py", "tests/conftest.py", "tests/test_gpu.py", "tests/norm_cases.py", "wikigpt/train/trainer.py"}
    assert wanted <= names


def test_the_tests_start_without_the_plugin_of_the_benchmarks():
    command = [sys.executable, "-m", "pytest", "-p", "no:benchmark", "-q", "--collect-only", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(gpu_tests()), ids=lambda path: path.stem)
def test_no_test_of_a_gpu_uses_the_plugin_of_the_benchmarks(path):
    arguments = {n.arg for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.arg)}
    assert "benchmark" not in arguments
