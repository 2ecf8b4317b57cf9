"""Checkpoints: nothing is lost, nothing foreign is loaded."""

import errno
import os
import pickle
import subprocess
import sys

import pytest
import torch

from wikigpt import checkpoint
from wikigpt.data import WordTokenizer
from wikigpt.errors import UserError
from wikigpt.files import writable_directory, write_atomically
from wikigpt.model import GPT, GPTConfig


@pytest.fixture
def content():
    torch.manual_seed(0)
    tokenizer = WordTokenizer.train("a b c d\ne f g h\n")
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, context_length=8, n_layer=1, n_head=2, n_embd=16))
    return {
        "model": model.state_dict(),
        "model_config": model.config.to_dict(),
        "tokenizer": tokenizer.to_json(),
    }


def test_a_saved_model_comes_back_with_its_tokenizer(tmp_path, content):
    checkpoint.save(tmp_path / checkpoint.NAME, content)
    loaded = checkpoint.load_model(tmp_path)
    assert not loaded.model.training
    assert all(torch.equal(v, content["model"][k]) for k, v in loaded.model.state_dict().items())
    assert loaded.tokenizer.to_json() == content["tokenizer"]
    assert os.listdir(tmp_path) == [checkpoint.NAME]


def test_a_backend_can_be_chosen_on_loading(tmp_path, content):
    checkpoint.save(tmp_path / "a.pth", content)
    assert checkpoint.load_model(tmp_path / "a.pth", backend="reference").model.config.backend == "reference"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*none.pth"):
        checkpoint.load(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"no checkpoint at .*wiki-gpt.pth: train one with"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, content, keep):
    path = tmp_path / "a.pth"
    checkpoint.save(path, content)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="is not a checkpoint of wikigpt, or it is damaged"):
        checkpoint.load(path)


def test_bytes_that_changed_on_the_disk_are_noticed(tmp_path, content):
    path = tmp_path / "a.pth"
    checkpoint.save(path, content | {"more": torch.randn(20000)})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    for i in range(middle, middle + 4096):
        data[i] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.pth is damaged: its part .* is not what was written; use another copy"):
        checkpoint.load(path)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("write", [lambda p: p.write_text("hello"), lambda p: p.write_bytes(pickle.dumps(Attack()))])
def test_a_foreign_file_is_refused_and_runs_no_code(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    write(path)
    with pytest.raises(UserError, match="is not a checkpoint of wikigpt"):
        checkpoint.load(path)
    assert not (tmp_path / "pwned").exists()


def test_another_projects_pytorch_file_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a PyTorch file, but not a checkpoint of wikigpt"):
        checkpoint.load(tmp_path / "a.pth")


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    torch.save({"format": "wikigpt", "version": 99}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="newer wikigpt"):
        checkpoint.load(tmp_path / "a.pth")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, content):
    content["tokenizer"] = WordTokenizer.train("a b c d e f g h i j k l m n\n").to_json()
    checkpoint.save(tmp_path / "a.pth", content)
    with pytest.raises(UserError, match="its tokenizer has 16 types, its model"):
        checkpoint.load_model(tmp_path / "a.pth")


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path, content):
    content["model_config"]["n_embd"] = 32
    checkpoint.save(tmp_path / "a.pth", content)
    with pytest.raises(UserError, match="do not fit its configuration"):
        checkpoint.load_model(tmp_path / "a.pth")


def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(tmp_path, content):
    """A file-size limit of the operating system makes write() fail in the middle, as a full disk does."""
    path = tmp_path / "a.pth"
    checkpoint.save(path, content)
    before = path.read_bytes()
    code = f"""
import resource, signal, torch
from wikigpt import checkpoint
from wikigpt.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    checkpoint.save({str(path)!r}, {{"model": {{"w": torch.randn(100000)}}}})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "the file that was there before is unharmed" in done.stdout, done.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_crash_before_the_rename_leaves_the_old_checkpoint(tmp_path, content, monkeypatch):
    path = tmp_path / "a.pth"
    checkpoint.save(path, content)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="Input/output error; the file that was there before is unharmed"):
        checkpoint.save(path, {"model": {}})
    assert path.read_bytes() == before


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/run.*choose another with --out"):
        writable_directory(tmp_path / "file" / "run")


def test_a_text_file_is_no_checkpoint(tmp_path):
    # What the unpickler takes for its instructions: "(" and "q" end in an IndexError.
    (tmp_path / "a.pth").write_text("root:x:0:0:root:/root:/bin/bash\n(q\nnobody:x:\n")
    (tmp_path / "b.pth").write_text("q\x00")
    for name in ("a.pth", "b.pth"):
        with pytest.raises(UserError, match="is not a checkpoint of wikigpt"):
            checkpoint.load(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [{"version": "x"}, {"tokenizer": None}, {"tokenizer": "{"}, {"model": None}, {"model_config": {"layers": 3}}],
    ids=str,
)
def test_a_checkpoint_of_nonsense_is_one_line(tmp_path, content, change):
    whole = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **content, "tokenizer": "null", **change}
    torch.save(whole, tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        checkpoint.load_model(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


def test_a_name_that_is_too_long_is_one_short_line():
    with pytest.raises(UserError, match="File name too long") as error:
        checkpoint.load_model("a" * 5000)
    assert len(str(error.value)) < 250


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: it is no file"):
        write_atomically(tmp_path / "pipe", lambda file: file.write(b"x"))
    assert not (tmp_path / "pipe").is_file()
