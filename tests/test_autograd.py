"""How an eager call with a gradient, or one that writes into its arguments, reaches a registered op (kernels/_autograd.py)."""

import os

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from wikigpt.kernels import (
    apply_rotary_emb,
    apply_rotary_emb_qk,
    attention_weights,
    cross_entropy,
    flash_attn_func,
    flash_attn_with_kvcache,
    linear_cross_entropy,
    rms_norm,
    rotary_cos_sin,
    scaled_dot_product_attention,
)

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


# --- whoever watches sees the op ------------------------------------------------------------------------------------


class Wrapped(torch.Tensor):
    """Computes with the tensor inside."""

    @staticmethod
    def __new__(cls, inside):
        wrapped = torch.Tensor._make_subclass(cls, inside.detach())
        wrapped.inside = inside
        return wrapped

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        def unwrap(x):
            return x.inside if isinstance(x, Wrapped) and "inside" in vars(x) else x

        with torch._C.DisableTorchFunctionSubclass():
            return func(*map(unwrap, args), **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")
def test_the_gradient_of_a_tensor_inside_another_arrives():
    inside = torch.randn(3, 4, requires_grad=True)
    norm(Wrapped(inside)).sin().sum().backward()
    plain = inside.detach().requires_grad_()
    norm(plain).sin().sum().backward()
    torch.testing.assert_close(inside.grad, plain.grad)


def half_rotary(x):
    return apply_rotary_emb(x, *rotary_cos_sin(torch.arange(x.shape[2]), 64))


@pytest.mark.parametrize("heads", [4, 9, 16])
def test_a_recorded_rotary_in_16_bits_is_right_for_another_number_of_heads(heads):
    recorded = make_fx(half_rotary, tracing_mode="symbolic")(torch.randn(1, 8, 512, 64).bfloat16())
    x = torch.randn(2, heads, 512, 64).bfloat16()
    torch.testing.assert_close(recorded(x), half_rotary(x), rtol=0, atol=0)


# --- numbers have no gradient ---------------------------------------------------------------------------------------


def attend(**options):
    x = torch.randn(1, 3, 2, 4)
    return flash_attn_func(x, x, x, **options)


def sdpa(**options):
    x = torch.randn(1, 2, 3, 4)
    return scaled_dot_product_attention(x, x, x, **options)


def loss(**options):
    return cross_entropy(torch.randn(3, 5), torch.tensor([0, 4, 2]), **options)


def head(**options):
    return linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2]), **options)


NUMBERS = [
    (attend, "softmax_scale"), (attend, "softcap"), (sdpa, "scale"), (loss, "softcap"), (loss, "z_loss"), (head, "softcap"),
    (head, "z_loss"), (lambda **options: rms_norm(torch.randn(3, 4), **options), "eps"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize(("function", "name"), NUMBERS)
def test_a_number_that_is_a_tensor_with_a_gradient_is_refused_not_cut_off(function, name, backend):
    number = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match=f"{name}: got a tensor that requires a gradient"):
        function(**{name: number}, backend=backend)
    torch.manual_seed(0)
    expected = function(**{name: 0.5}, backend=backend)
    torch.manual_seed(0)
    torch.testing.assert_close(function(**{name: number.detach()}, backend=backend), expected)


def test_the_weights_of_attention_have_a_gradient_for_their_scale():
    scale = torch.tensor(0.5, requires_grad=True)
    q, k = torch.randn(2, 1, 2, 3, 4)
    attention_weights(q, k, scale=scale)[..., 0].sum().backward()
    assert scale.grad != 0
