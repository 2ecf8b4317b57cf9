"""make hub-kernel: what it writes is loaded by Hugging Face's package kernels and put into a Llama by its kernelize."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest
import wikigpt.kernels

from tests.conftest import ROOT
from wikigpt import hub_kernel

installed = [d.metadata["Name"] for d in importlib.metadata.distributions()]
needs_package = pytest.mark.skipif("kernels" not in installed, reason="needs Hugging Face's package kernels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    hub_kernel.write(folder)
    return folder


def run(code, folder):
    """In a process that does not see the repository, whose folder kernels/ would be found for the package."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    start = f"import sys, pathlib; folder = pathlib.Path({str(folder)!r}); assert {str(ROOT)!r} not in sys.path\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_there_is_one_build_for_each_backend(folder):
    assert sorted(path.name for path in (folder / "build").iterdir()) == ["torch-cpu", "torch-cuda"]
    ids = set()
    for build in (folder / "build").iterdir():
        metadata = json.loads((build / "metadata.json").read_text())
        assert metadata["backend"] == {"type": build.name.removeprefix("torch-")}
        assert f'\nNAMESPACE = "{metadata["id"]}"\n' in (build / "_dispatch.py").read_text()
        ids.add(metadata["id"])
    assert len(ids) == 2


def test_writing_again_gives_the_same_files(folder, tmp_path):
    hub_kernel.write(tmp_path)
    hub_kernel.write(tmp_path)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*") if path.is_file())
    assert all((folder / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)


def test_a_folder_with_something_else_in_it_is_not_deleted(tmp_path):
    (tmp_path / "build" / "lib").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"folder: .* holds lib, which is no build of a kernel"):
        hub_kernel.write(tmp_path)
    assert (tmp_path / "build" / "lib").is_dir()


def test_no_file_calls_an_operator_by_a_namespace_of_its_own(folder):
    """Except those of the compiled extension, which belong to the installed wikigpt."""
    for path in (folder / "build" / "torch-cpu").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not re.search(
                r"ops\.wikigpt\.(?!linear_cross_entropy_cpu\b|cross_entropy_rows_cpu\b|sample_rows\b|adamw_)", line
            ), f"{path.name}: {line}"


def test_no_file_imports_from_above_the_folder(folder):
    for path in (folder / "build" / "torch-cpu").rglob("*.py"):
        lines = path.read_text().splitlines()
        assert not [line for line in lines if line.strip().startswith(("import wikigpt", "from wikigpt", "from kernels"))]


@needs_package
def test_the_package_loads_it_with_its_own_operators_beside_wikigpts(folder):
    code = """if True:
        import kernels, torch, wikigpt.kernels
        kernel = kernels.get_local_kernel(folder)
        assert kernel.__file__.startswith(str(folder)), kernel.__file__
        x = torch.randn(2, 5, 4, 16, requires_grad=True)
        ours, theirs = (k.flash_attn_func(x, x, x, causal=True) for k in (kernel, wikigpt.kernels))
        (gradient,) = torch.autograd.grad(ours.square().sum(), x)
        (expected,) = torch.autograd.grad(theirs.square().sum(), x)
        assert torch.equal(gradient, expected)
        assert kernel.rms_norm is not wikigpt.kernels.rms_norm
        assert hasattr(getattr(torch.ops, kernel._dispatch.NAMESPACE), "attention")
        print(kernel._dispatch.NAMESPACE, *kernel.__all__)
    """
    namespace, *names = run(code, folder).split()
    assert namespace.startswith("_wikigpt_cpu_")
    assert names == wikigpt.kernels.__all__


LLAMA = """if True:
    import torch
    # transformers 5.23 takes the package from 0.18.2 on, but 0.17.2 was the newest to be had: with 0.18 nothing is proven.
    from transformers.utils import import_utils
    import_utils.is_kernels_available = lambda *_, **__: True
    import transformers
    from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(61, (2, 13))

    def step():
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    before = step()
    names = ("RMSNorm", "rotary_pos_emb")
    mapping = {name: {"cpu": LocalLayerRepository(folder, layer_name=name)} for name in names}
    mode = Mode.TRAINING | Mode.TORCH_COMPILE
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=mode, device="cpu", use_fallback=True)
    norms = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert len(norms) == 5
    assert {m.forward.__func__.__globals__["__name__"].split(".")[0][:13] for m in norms} == {"_wikigpt_cpu_"}
    rotary = model.model.layers[0].self_attn._kernel_funcs["rotary_pos_emb"]
    assert rotary.forward.__func__.__globals__["__name__"].startswith("_wikigpt_cpu_")
    for a, b in zip(step(), before):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, labels=ids).loss, before[0])
    print("same")
"""


@needs_package
def test_kernelize_puts_norms_and_rotary_embedding_into_a_llama(folder):
    assert run(LLAMA, folder).endswith("same\n")


LAYERS = """if True:
    import functools, torch
    from transformers.utils import import_utils
    import_utils.is_kernels_available = lambda *_, **__: True
    import transformers.activations as theirs
    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
    from torch import nn
    from torch.nn import functional as F

    class Packed(nn.Module):
        def forward(self, x):
            gate, up = x.chunk(2, -1)
            return self.act(gate) * up

    def packed(act):
        return type("Packed", (Packed,), {"act": staticmethod(act)})()

    layers = {
        "LayerNorm": nn.LayerNorm(16), "GeLU": theirs.GELUActivation(), "GeluTanh": theirs.GELUTanh(),
        "NewGELU": theirs.NewGELUActivation(), "SiluAndMul": packed(F.silu), "GeluAndMul": packed(F.gelu),
        "GeluTanhAndMul": packed(functools.partial(F.gelu, approximate="tanh")),
    }
    x = torch.randn(3, 16, requires_grad=True)
    for name, layer in layers.items():
        replace_kernel_forward_from_hub(type(layer), name)
        before = layer(x)
        (expected,) = torch.autograd.grad(before.sum(), x)
        with use_kernel_mapping({name: {"cpu": LocalLayerRepository(folder, layer_name=name)}}, inherit_mapping=False):
            kernelize(layer, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
        assert layer.forward.__func__.__globals__["__name__"].startswith("_wikigpt_cpu_"), name
        after = layer(x)
        torch.testing.assert_close(after, before)
        torch.testing.assert_close(torch.autograd.grad(after.sum(), x)[0], expected)
        print(name)
"""


@needs_package
def test_kernelize_accepts_every_other_layer(folder):
    from wikigpt.kernels import layers

    assert sorted([*run(LAYERS, folder).split(), "RMSNorm", "rotary_pos_emb"]) == sorted(layers.__all__)
