"""How an eager call with a gradient, or one that writes into its arguments, reaches a registered op (kernels/_autograd.py)."""

import os

import pytest
import torch
from wikigpt.kernels import apply_rotary_emb_qk, cross_entropy, flash_attn_with_kvcache, rms_norm, rotary_cos_sin

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: Triton compiles")


def norm(x):
    return rms_norm(x, torch.ones(x.shape[-1]), backend="triton")


def test_a_call_has_a_node_of_its_name_where_a_gradient_is_asked_for():
    x = torch.randn(3, 4, requires_grad=True)
    assert norm(x).grad_fn.name().startswith("norm")
    assert norm(x.detach()).grad_fn is None
    with torch.no_grad():
        assert norm(x).grad_fn is None


def test_hooks_of_saved_tensors_see_what_is_saved():
    packed = []

    def pack(tensor):
        packed.append(tensor.data_ptr())
        return tensor

    x = torch.randn(3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x).sum().backward()
    assert x.data_ptr() in packed


@pytest.mark.filterwarnings("ignore")  # that tracing is old, and that it sees no branches
def test_a_trace_holds_the_op():
    x = torch.randn(3, 4, requires_grad=True)
    traced = torch.jit.trace(norm, x, check_trace=False)
    assert "wikigpt::norm" in str(traced.graph)
    torch.testing.assert_close(traced(2 * x.detach()), norm(2 * x.detach()))


# --- what an op writes into counts as changed -----------------------------------------------------------------------


def rotate(q, k, backend):
    return apply_rotary_emb_qk(q, k, *rotary_cos_sin(torch.arange(3), 4), inplace=True, backend=backend)


def append(k_cache, v_cache, backend):
    q, k, v = torch.randn(3, 1, 1, 2, 4)
    return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=2, backend=backend)


WRITERS = {"rotary": (rotate, (1, 2, 3, 4)), "kvcache": (append, (1, 5, 2, 4))}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_into_counts_as_changed(name, backend):
    function, shape = WRITERS[name]
    written = [torch.randn(shape) for _ in range(2)]
    before = [tensor._version for tensor in written]
    function(*written, backend)
    assert all(tensor._version > was for tensor, was in zip(written, before))


@pytest.mark.parametrize("name", WRITERS)
def test_a_backward_that_needs_what_was_written_over_is_refused(name):
    function, shape = WRITERS[name]
    written = [torch.randn(shape) for _ in range(2)]
    y = torch.ones(shape, requires_grad=True) * written[0]
    with torch.no_grad():
        function(*written, "triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", WRITERS)
def test_tensors_of_inference_mode_are_written_into(name):
    function, shape = WRITERS[name]
    with torch.inference_mode():
        written = [torch.randn(shape) for _ in range(2)]
        before = [tensor.clone() for tensor in written]
        function(*written, "triton")
    assert not any(torch.equal(tensor, was) for tensor, was in zip(written, before))


def test_a_gradient_in_the_logits_place_makes_a_second_backward_an_error():
    z = torch.randn(3, 5, requires_grad=True)
    logits = z * 1
    loss = cross_entropy(logits, torch.tensor([0, 4, 2]), inplace_backward=True, backend="triton")
    before = logits._version
    loss.backward(retain_graph=True)
    assert logits._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
