"""The one table that decides which implementation of an op runs."""

import os
import subprocess
import sys

import pytest
import torch
from wikigpt.kernels import _dispatch

from tests.conftest import ROOT
from wikigpt import kernels


def test_importing_the_kernels_needs_torch_and_nothing_else():
    others = ("triton", "sympy", "torch._dynamo", "transformers", "rich", "tokenizers", "matplotlib", "wikigpt.model")
    code = f"import sys, wikigpt.kernels; print([m for m in {others} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_top_level_package_named_kernels_is_installed():
    code = "from importlib.util import find_spec; spec = find_spec('kernels'); print(spec and spec.origin)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert str(ROOT / "kernels") not in done.stdout


def test_the_folder_found_as_top_level_kernels_registers_nothing():
    code = """if True:
        import kernels, wikigpt.kernels, torch
        kernel = torch._C._dispatch_dump("wikigpt::attention")
        import transformers
        assert kernel and torch._C._dispatch_dump("wikigpt::attention") == kernel
        x = torch.ones(1, 3, 2, 16, requires_grad=True)
        wikigpt.kernels.flash_attn_func(x, x, x, softcap=2.0).sum().backward()
        print(kernels.__file__, hasattr(kernels, "layer_norm"))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == [str(ROOT / "kernels" / "__init__.py"), "False"], done.stderr


def test_every_op_has_a_reference_that_runs_everywhere():
    for op in kernels.ops():
        for device in ("cpu", "cuda", "mps"):
            assert ("reference", None) in kernels.explain(op, device)


def test_the_first_available_implementation_is_chosen():
    assert _dispatch.choose("linear_cross_entropy", "cpu").__name__ == "_fused"
    assert _dispatch.choose("linear_cross_entropy", "mps").__name__ == "linear_cross_entropy_reference"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_compiled_function_can_choose_without_a_graph_break(device):
    def reasons(x):
        for op in kernels.ops():
            for _, why_not in kernels.explain(op, device):
                x = x + (why_not is None)
        return x

    expected = sum(why_not is None for op in kernels.ops() for _, why_not in kernels.explain(op, device))
    assert torch.compile(reasons, fullgraph=True, backend="eager")(torch.zeros(())) == expected


def test_a_backend_block_forces_one_implementation_and_ends_with_the_block():
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    with kernels.backend("reference"):
        assert _dispatch.choose("layer_norm", "cpu").__name__ == "layer_norm_reference"
        with kernels.backend("torch"):
            assert _dispatch.choose("layer_norm", "cpu").__name__ == "_layer_norm_torch"
        assert _dispatch.choose("layer_norm", "cpu").__name__ == "layer_norm_reference"
        assert kernels.layer_norm(x).dtype == torch.bfloat16
    assert _dispatch.choose("layer_norm", "cpu").__name__ == "_layer_norm_torch"


def test_a_backend_block_ends_when_an_exception_leaves_it():
    with pytest.raises(RuntimeError, match="inside"), kernels.backend("reference"):
        raise RuntimeError("inside")
    assert _dispatch.forced_backend() is None


def test_an_argument_of_the_call_wins_over_the_block():
    with kernels.backend("torch"):
        assert _dispatch.choose("layer_norm", "cpu", "reference").__name__ == "layer_norm_reference"


def test_an_unknown_backend_names_the_allowed_ones():
    with pytest.raises(ValueError, match=r"backend: got 'cudnn', allowed are auto, reference, torch"):
        _dispatch.check_backend("cudnn")
    with pytest.raises(ValueError, match="cudnn"), kernels.backend("cudnn"):
        pass


def test_forcing_what_is_not_available_raises_with_the_reason():
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy on cuda: cpu: runs on cpu, not on cuda"):
        _dispatch.choose("linear_cross_entropy", "cuda", "cpu")
    with kernels.backend("cuda"), pytest.raises(RuntimeError, match="layer_norm has no cuda implementation"):
        kernels.layer_norm(torch.randn(2, 4))


@pytest.mark.parametrize(("value", "chosen"), [("reference", "layer_norm_reference"), ("torch", "_layer_norm_torch")])
def test_the_environment_variable_forces_a_backend_for_the_process(value, chosen):
    code = "from wikigpt.kernels import _dispatch; print(_dispatch.choose('layer_norm', 'cpu').__name__)"
    done = subprocess.run(
        [sys.executable, "-c", "import wikigpt.kernels; " + code],
        capture_output=True, text=True, check=True, env={**os.environ, "WIKIGPT_BACKEND": value},
    )  # fmt: skip
    assert done.stdout.strip() == chosen
