"""Building and installing: sdist, wheel, what is left out where a tool is missing, and the pure functions of setup.py.

Every build is one of a copy of the repository, without a network. Compilers are told not to optimise: what they are called
with and what becomes of it is what is tested here.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

specification = importlib.util.spec_from_file_location("wikigpt_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(specification)
specification.loader.exec_module(setup)

CUDA_SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
SETTINGS = ("WIKIGPT_NO_EXT", "WIKIGPT_NO_CUDA", "FORCE_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX")


def run(*command, cwd, **environment):
    """What it printed. No setting of the outer environment reaches it, and no network either."""
    clean = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "PYTHONPATH", "PYTEST_XDIST_WORKER")}
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
        env={**clean, **nowhere, "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(0o755)
    return path


def said(output):
    return [line.strip() for line in output.splitlines() if line.strip().startswith("wikigpt: ")]


def copy(folder, csrc="*"):
    """The files that an installation is made of, without what earlier builds left."""
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, folder)
    for name in ("wikigpt", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (folder / "csrc").mkdir()
    for file in (ROOT / "csrc").glob(csrc):
        shutil.copy(file, folder / "csrc")
    return folder


def environment(folder):
    """The python of a new virtual environment that has what this one has, but for wikigpt."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (packages,) = folder.glob("lib/*/site-packages")
    # A folder in a .pth file adds its packages, not its own .pth files, among them that of an editable wikigpt.
    (packages / "outer.pth").write_text(str(Path(importlib.util.find_spec("torch").origin).parent.parent) + "\n")
    return folder / "bin" / "python"


def pip(python, *arguments, **keywords):
    return run(sys.executable, "-m", "pip", "--python", python, *arguments, "--no-deps", **keywords)


def stub_toolkit(folder, compiles):
    """A CUDA toolkit that answers every question, and compiles or does not. Returns CUDA_HOME and its log."""
    log = folder / "nvcc.log"
    script(
        folder / "bin" / "nvcc",
        f"""
        case "$1" in
          --version) echo "Cuda compilation tools, release 13.0, V13.0.88";;
          --list-gpu-arch) for a in 75 80 86 90 100 120; do echo compute_$a; done;;
          --dryrun) echo '#$ LIBRARIES=  "-L{folder}/lib/stubs" "-L{folder}/lib"' >&2;;
          *) echo "$@" >> {log}; {TOUCH if compiles else "echo cannot >&2; exit 1"}
        esac
        """,
    )
    (folder / "lib").mkdir()
    (folder / "lib" / "libcudart_static.a").touch()
    return folder, log


# Writes an empty file for each -o.
TOUCH = 'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done'


@pytest.mark.slow
def test_sdist_to_wheel_to_import(tmp_path):
    """One build for many checks; with CUDA kernels where nvcc is, and they load where no GPU and no CUDA torch are."""
    source = copy(tmp_path / "source")
    build = "import setuptools.build_meta as build; build.build_sdist('../sdist')"
    # Isolated, as pip does it: the folder kernels/ must not be found in place of Hugging Face's package.
    run(sys.executable, "-I", "-c", build, cwd=source, WIKIGPT_NO_EXT="1")
    (archive,) = (tmp_path / "sdist").glob("wikigpt-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert {file.name for file in (unpacked / "csrc").iterdir()} == {file.name for file in (source / "csrc").iterdir()}

    settings = {"CXX": str(script(tmp_path / "c++", f'exec {shlex.quote(shutil.which("c++"))} "$@" -O0'))}
    with_cuda = bool(CUDA_SOURCES) and shutil.which("nvcc") is not None
    if with_cuda:
        nvcc = script(tmp_path / "cuda/bin/nvcc", f'exec {shlex.quote(shutil.which("nvcc"))} "$@" -Xcicc -O0 -Xptxas -O0')
        settings.update(FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0", CUDA_HOME=str(nvcc.parent.parent))
    python = environment(tmp_path / "venv")
    wheel = (sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", tmp_path, ".")
    output = run(*wheel, cwd=unpacked, **settings)
    assert len(said(output)) == (0 if with_cuda else 1), output
    (wheel,) = tmp_path.glob("wikigpt-*.whl")
    pip(python, "install", wheel, cwd=tmp_path)

    check = f"""
        import torch
        from wikigpt import _C
        import wikigpt.kernels
        assert {str(tmp_path)!r} in _C.__file__ and {str(tmp_path)!r} in wikigpt.kernels.__file__
        built = _C.build_info()
        assert built["torch"] == torch.__version__ and built["stable_abi"] == "2.11"
        assert built["cuda_targets"] == "9.0" if {with_cuda} else built["no_cuda_because"]
        assert _C.finds_cuda_stream() == (torch.version.cuda is not None)
        h, w, t = torch.randn(5, 12), torch.randn(33, 12), torch.arange(5)
        with wikigpt.kernels.backend("cpu"):
            loss = wikigpt.kernels.linear_cross_entropy(h, w, t)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(h @ w.T, t))
        names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("wikigpt::")]
        print(*(n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")))
    """
    on_cuda = run(python, "-c", textwrap.dedent(check), cwd=tmp_path)
    for source in CUDA_SOURCES if with_cuda else ():
        # The operators that a .cu file is for are those of the .cpp file beside it.
        operators = setup.re.findall(r'm\.impl\("(\w+)"', source.with_suffix(".cpp").read_text())
        assert operators
        assert all(f"wikigpt::{name}" in on_cuda.split() for name in operators), on_cuda
    doctor = run(python, "-m", "wikigpt", "doctor", cwd=tmp_path, COLUMNS="200")
    assert "for torch 2.11 and later" in doctor
    assert ("CUDA kernels of wikigpt._C: for 9.0, by nvcc" if with_cuda else "CUDA kernels of wikigpt._C: none, ") in doctor


def old_setuptools(folder):
    """The wheel of setuptools 65.5: Python 3.10 and 3.11 come with it, or the index has it."""
    if sys.version_info >= (3, 12):
        pytest.skip("Python 3.12 and later cannot run setuptools 65.5")
    bundled = importlib.util.find_spec("ensurepip")  # some systems leave it out
    found = sorted((Path(bundled.origin).parent / "_bundled").glob("setuptools-65.5.*.whl")) if bundled else []
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), "setuptools==65.5.1"]
        subprocess.run(command, capture_output=True, timeout=60)
        found = sorted(folder.glob("setuptools-65.5.*.whl"))
    if not found:
        pytest.skip("setuptools 65.5 is not here, and there is no index")
    return found[0]


@pytest.mark.slow
def test_setuptools_of_before_licence_expressions_builds_the_same_wheel(tmp_path):
    """They want a table where newer ones want a string, and failed on it with a page of traceback."""
    source, python = copy(tmp_path / "source"), environment(tmp_path / "venv")
    pip(python, "install", old_setuptools(tmp_path), cwd=tmp_path)
    settings = {"CXX": str(script(tmp_path / "c++", TOUCH)), "WIKIGPT_NO_CUDA": "1"}
    build = "import setuptools, sys; print('by', setuptools.__version__); setuptools.build_meta.build_wheel(sys.argv[1])"
    wheels = []
    for name, interpreter in (("old", python), ("new", sys.executable)):
        output = run(interpreter, "-I", "-c", f"import setuptools.build_meta; {build}", tmp_path / name, cwd=source, **settings)
        assert ("by 65.5." in output) == (name == "old")
        (file,) = (tmp_path / name).glob("*.whl")
        with zipfile.ZipFile(file) as wheel:
            (metadata,) = (path for path in wheel.namelist() if path.endswith("/METADATA"))
            assert "License: MIT\n" in wheel.read(metadata).decode()
            assert any(path.endswith("/LICENSE") for path in wheel.namelist())
            wheels.append({path for path in wheel.namelist() if ".dist-info/" not in path})
        shutil.rmtree(source / "build")
    assert wheels[0] == wheels[1]
    assert any(path.startswith("wikigpt/_C.") for path in wheels[0])


@pytest.mark.slow
def test_without_a_compiler_the_install_says_so_and_trains(tmp_path):
    source, python = copy(tmp_path / "source"), environment(tmp_path / "venv")
    (tmp_path / "empty").mkdir()
    nothing = {"PATH": str(tmp_path / "empty")}
    output = pip(python, "install", "-v", "--no-build-isolation", ".", cwd=source, **nothing)
    (line,) = said(output)
    assert "no C++ compiler" in line
    assert "c++ is not on PATH" in line

    loss = """
        import torch
        import wikigpt.kernels
        h, w, t = torch.randn(5, 12), torch.randn(33, 12), torch.arange(5)
        torch.testing.assert_close(wikigpt.kernels.linear_cross_entropy(h, w, t), torch.nn.functional.cross_entropy(h @ w.T, t))
        print(wikigpt.kernels._dispatch.extension())  # what `wikigpt doctor` prints
    """
    assert "csrc/ was not built" in run(python, "-c", textwrap.dedent(loss), cwd=tmp_path, **nothing)
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("the cat sat on the mat and the dog sat on the log\n" * 40)
    tiny = ("n_layer=1", "n_head=2", "n_embd=16", "context_length=16", "steps=3", "batch_size=2", "tensorboard=false")
    train = (
        python,
        "-m",
        "wikigpt",
        "--threads",
        "1",
        "train",
        "--preset",
        "quick",
        "--dataset",
        "text",
        "--out",
        "run",
        *tiny,
    )
    assert "test perplexity" in run(*train, cwd=tmp_path, WIKIGPT_CACHE_DIR=str(tmp_path / "cache"), **nothing)


@pytest.mark.slow
def test_what_the_compilers_are_called_with(tmp_path):
    """Stubs in their place: nvcc writes objects that the linker is given; where it fails or may not be called, neither the
    compiler nor the linker hears of CUDA, as in every build without it."""
    source = copy(tmp_path / "source", csrc="module.cpp")
    (source / "csrc" / "first.cu").touch()
    (source / "csrc" / "second.cu").touch()
    home, nvcc = stub_toolkit(tmp_path / "cuda", compiles=True)
    broken, broken_nvcc = stub_toolkit(tmp_path / "broken", compiles=False)
    log = tmp_path / "c++.log"
    settings = {"CXX": str(script(tmp_path / "c++", f'echo "$@" >> {log}\n{TOUCH}')), "FORCE_CUDA": "1"}

    def build(**environment):
        """What setup.py said, and the commands that compiled and linked."""
        log.unlink(missing_ok=True)
        output = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, **settings, **environment)
        # The compiler is asked for its version too.
        return said(output), *(line for line in log.read_text().splitlines() if " -o " in line)

    (line,), compiled, linked = build(CUDA_HOME=str(home), WIKIGPT_NO_CUDA="1")
    assert line == "wikigpt: the CUDA kernels are left out: WIKIGPT_NO_CUDA=1"
    assert not nvcc.exists()
    assert "-DWIKIGPT_CUDA" not in compiled
    assert "cuda" not in linked.replace(str(source), "")

    (line,), compiled, linked = build(CUDA_HOME=str(broken))
    assert line.startswith("wikigpt: the CUDA kernels are left out: nvcc failed")
    assert broken_nvcc.exists()
    assert "-DWIKIGPT_CUDA" not in compiled
    assert '-DWIKIGPT_NO_CUDA_BECAUSE="nvcc failed' in compiled
    assert "cuda" not in linked.replace(str(source), "")

    lines, compiled, linked = build(CUDA_HOME=str(home), MAX_JOBS="4")
    assert lines == []
    targets = ["8.0", "8.6", "9.0", "10.0", "12.0+PTX"]
    commands = [command.split() for command in nvcc.read_text().splitlines()]
    assert len(commands) == 2
    for command in commands:
        options = [word for word in command if word.startswith("-gencode")]
        assert options == [option for target in targets for option in setup.gencode(target)]
        assert "--threads=2" in command
    assert '-DWIKIGPT_CUDA="13.0"' in compiled
    assert f'-DWIKIGPT_CUDA_TARGETS="{" ".join(targets)}"' in compiled
    for part in ("first.cuda.o", "second.cuda.o", f"-L{home}/lib", "-lcudart_static", "-Wl,--exclude-libs,ALL"):
        assert part in linked


def test_plugins_of_setuptools_are_not_looked_for_in_the_folder_kernels(tmp_path):
    """Hugging Face's package of that name has one, and every command of setup.py ended in its ModuleNotFoundError."""
    run(sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, cwd=ROOT, WIKIGPT_NO_EXT="1")
    assert (tmp_path / "wikigpt.egg-info" / "PKG-INFO").is_file()


# --- the functions of setup.py ---

NVCC_12_8 = ["5.0", "7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.1", "12.0"]


@pytest.mark.parametrize(
    ("arch_list", "chosen", "left"),
    [
        ("", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"], []),
        ("9.0", ["9.0"], []),
        ("8.0;9.0a+PTX", ["8.0", "9.0a+PTX"], []),
        ("7.5 8.0 8.6+PTX", ["8.0", "8.6+PTX"], ["7.5"]),
        ("8.0, 13.0", ["8.0"], ["13.0"]),
        ("Hopper", [], ["Hopper"]),
    ],
)
def test_targets_of_an_architecture_list(arch_list, chosen, left):
    assert setup.targets(arch_list, NVCC_12_8) == (chosen, left)


def test_an_old_nvcc_compiles_what_it_knows():
    assert setup.targets("", ["7.5", "8.0", "8.6", "8.9", "9.0"]) == (["8.0", "8.6", "8.9", "9.0+PTX"], [])
    assert setup.targets("", ["5.0", "7.5"]) == ([], [])


def test_options_of_a_target():
    assert setup.gencode("9.0a") == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert setup.gencode("12.0+PTX") == ["-gencode=arch=compute_120,code=sm_120", "-gencode=arch=compute_120,code=compute_120"]


@pytest.mark.parametrize(
    ("settings", "torch_cuda", "reason"),
    [
        ({"WIKIGPT_NO_CUDA": "1", "FORCE_CUDA": "1"}, "13.0", "WIKIGPT_NO_CUDA=1"),
        ({}, None, "torch is built without CUDA"),
        ({"CUDA_HOME": "/nowhere"}, "13.0", "CUDA_HOME=/nowhere has no bin/nvcc"),
        ({}, "12.8", "nvcc 13.0 is newer than torch's CUDA 12.8"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5"}, None, "for none of 7.5"),
    ],
)
def test_why_cuda_is_left_out(settings, torch_cuda, reason, tmp_path):
    home, _ = stub_toolkit(tmp_path / "cuda", compiles=True)
    with pytest.raises(setup.LeftOut, match=reason):
        setup.plan_cuda({"CUDA_HOME": str(home), **settings}, torch_cuda)


@pytest.mark.parametrize(
    ("settings", "torch_cuda"),
    [({}, "13.0"), ({}, "13.2"), ({}, "14.0"), ({"FORCE_CUDA": "1"}, None), ({"TORCH_CUDA_ARCH_LIST": "9.0"}, None)],
)
def test_when_cuda_is_built(settings, torch_cuda, tmp_path):
    home, _ = stub_toolkit(tmp_path / "cuda", compiles=True)
    toolkit, chosen = setup.plan_cuda({"CUDA_HOME": str(home), **settings}, torch_cuda)
    assert (toolkit.version, toolkit.libraries) == ("13.0", str(home / "lib"))
    assert chosen == (["9.0"] if "TORCH_CUDA_ARCH_LIST" in settings else ["8.0", "8.6", "9.0", "10.0", "12.0+PTX"])


def test_nvcc_is_found_on_path_and_a_broken_one_is_named(tmp_path):
    home, _ = stub_toolkit(tmp_path / "cuda", compiles=True)
    assert setup.find_toolkit({"PATH": str(home / "bin")}).nvcc == str(home / "bin" / "nvcc")
    script(tmp_path / "broken" / "bin" / "nvcc", "exit 3")
    with pytest.raises(setup.LeftOut, match="broken/bin/nvcc does not work"):
        setup.find_toolkit({"CUDA_HOME": str(tmp_path / "broken")})
    (home / "lib" / "libcudart_static.a").unlink()
    with pytest.raises(setup.LeftOut, match="no libcudart_static"):
        setup.find_toolkit({"CUDA_HOME": str(home)})
