"""What a run needs and what the machine has, asked before it starts."""

import itertools

import pytest
import torch

from wikigpt import memory
from wikigpt.config import presets, resolve
from wikigpt.errors import UserError
from wikigpt.memory import check_memory, count_parameters, estimate_memory, machine_memory
from wikigpt.model import GPT, GPTConfig

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def machine(monkeypatch):
    """A machine of 8 GiB."""
    monkeypatch.setattr(memory, "machine_memory", lambda device: 8 * GIB)


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_parameters_are_counted_without_a_model(position, norm, activation):
    for bias, tie, n_kv_head, head_dim in itertools.product((False, True), (False, True), (4, 2), (8, 6)):
        config = GPTConfig(
            61, 16, 2, 4, n_kv_head, 32, head_dim, None, position, norm, activation, bias, tie
        )  # fmt: skip
        assert count_parameters(config, 61) == GPT(config).num_parameters()


@pytest.mark.parametrize("name", presets())
def test_a_preset_fits_a_common_machine(machine, name):
    if name != "wikitext-2" and name != "gpt2-small":  # these are for a GPU
        check_memory(resolve(name), 33278, CPU)
    assert estimate_memory(resolve(name), 33278, "cuda") < 80 * GIB


@pytest.mark.parametrize("batch_size", [100_000_000, 2**31 - 1])
def test_a_batch_that_cannot_fit_is_refused_with_one_that_does(machine, batch_size):
    config = resolve("cpu-small", overrides=[f"batch_size={batch_size}"])
    with pytest.raises(UserError, match=rf"^train.batch_size: {batch_size:,} sequences of 128 tokens need .*TiB") as error:
        check_memory(config, 33278, CPU)
    assert "and this machine has 8.0 GiB" in str(error.value)
    fits = int(str(error.value).partition("train.batch_size=")[2].split()[0])
    config.train.batch_size = fits
    check_memory(config, 33278, CPU)
    assert 2 * GIB < estimate_memory(config, 33278, "cpu") < 8 * GIB


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["n_layer=2147483647"], "model of .*use a smaller model.n_embd or model.n_layer"),
        (["n_embd=1048576", "n_head=4096"], "model of .*use a smaller model.n_embd or model.n_layer"),
        (["context_length=1073741824"], "model.context_length: one sequence of 1,073,741,824 tokens"),
        (["context_length=100000", "model.backend=reference"], "model.context_length: one sequence of 100,000 tokens"),
        (["accumulate=2147483647"], "train.accumulate: 2,147,483,647 micro-steps"),
    ],
)
def test_what_else_cannot_fit_is_named(machine, overrides, named):
    with pytest.raises(UserError, match=named):
        check_memory(resolve("cpu-small", overrides=overrides), 33278, CPU)


def test_shards_need_a_part_of_what_the_whole_does(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = resolve(overrides=["parallel=fsdp", "n_embd=4096", "batch_size=1"])
    assert estimate_memory(config, 33278, "cuda", 8) < 0.4 * estimate_memory(config, 33278, "cuda")


@pytest.mark.parametrize(
    ("line", "file", "limit"),
    [
        ("0::/a/b", "a/b/memory.max", "4096"),
        ("0::/a/b", "a/memory.max", "4096"),
        ("0::/of/the/host", "memory.max", "4096"),
        ("4:cpu,memory:/a", "memory/a/memory.limit_in_bytes", "4096"),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, line, file, limit):
    whole = machine_memory(CPU)
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    read = memory.Path.read_text
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(
        memory.Path, "read_text", lambda self: f"1:cpu:/x\n{line}\n" if str(self) == "/proc/self/cgroup" else read(self)
    )
    path.write_text("max\n")
    assert machine_memory(CPU) >= whole
    path.write_text(f"{limit}\n")
    assert machine_memory(CPU) == 4096


def test_where_nothing_is_known_nothing_is_refused(monkeypatch):
    monkeypatch.delattr(memory.os, "sysconf")
    assert machine_memory(CPU) is None
    check_memory(resolve(overrides=["batch_size=2147483647"]), 33278, CPU)
