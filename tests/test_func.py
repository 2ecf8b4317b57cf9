"""torch.func: grad, jacrev and vmap of every op that has a backward of its own give what they give of the reference."""

import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap
from wikigpt.kernels import (
    apply_rotary_emb,
    bias_gelu,
    cross_entropy,
    flash_attn_func,
    flash_attn_varlen_func,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    scaled_dot_product_attention,
    swiglu,
)
from wikigpt.kernels._dispatch import _table

SAMPLES = 3


def _ends(*ends):
    return torch.tensor(ends, dtype=torch.int32)


def _attention(*shape):
    return [shape] * 3


def _varlen(q, k, v, backend):
    return flash_attn_varlen_func(q, k, v, _ends(0, 2, 5), _ends(0, 2, 5), 3, 3, causal=True, backend=backend)


def _cos_sin():
    angles = torch.arange(10.0).view(5, 2)
    return angles.cos(), angles.sin()


TARGET = torch.tensor([1, 5, -100, 0])
# name: (op of the dispatch table, shapes of the inputs that are differentiated, the function)
OPS = {
    "layer_norm": ("layer_norm", [(4, 6), (6,), (6,)], lambda x, w, b, backend: layer_norm(x, w, b, backend=backend)),
    "rms_norm with a residual": (
        "rms_norm",
        [(4, 6), (6,), (4, 6)],
        lambda x, w, r, backend: sum(rms_norm(x, w, residual=r, prenorm=True, backend=backend)),
    ),
    "bias_gelu": ("bias_gelu", [(4, 6), (6,)], lambda x, b, backend: bias_gelu(x, b, backend=backend)),
    "swiglu": ("swiglu", [(4, 6), (4, 6)], lambda x, y, backend: swiglu(x, y, backend=backend)),
    "rotary": ("rotary", [(1, 2, 5, 8)], lambda x, backend: apply_rotary_emb(x, *_cos_sin(), backend=backend)),
    "cross_entropy": ("cross_entropy", [(4, 7)], lambda x, backend: cross_entropy(x, TARGET, backend=backend)),
    "cross_entropy of each token": (
        "cross_entropy",
        [(4, 7)],
        lambda x, backend: cross_entropy(x, TARGET, reduction="none", softcap=5.0, backend=backend),
    ),
    "linear_cross_entropy": (
        "linear_cross_entropy",
        [(4, 6), (7, 6)],
        lambda x, w, backend: linear_cross_entropy(x, w, TARGET, z_loss=0.1, backend=backend),
    ),
    "linear_cross_entropy of each token": (
        "linear_cross_entropy",
        [(4, 6), (7, 6), (7,)],
        lambda x, w, b, backend: linear_cross_entropy(x, w, TARGET, linear_bias=b, reduction="none", backend=backend),
    ),
    "scaled_dot_product_attention": (
        "attention",
        _attention(1, 2, 3, 4),
        lambda q, k, v, backend: scaled_dot_product_attention(q, k, v, is_causal=True, backend=backend),
    ),
    "flash_attn_func": (
        "flash_attention",
        [*_attention(1, 3, 2, 4), (1, 2, 3, 3)],
        lambda q, k, v, bias, backend: flash_attn_func(q, k, v, softcap=3.0, attn_bias=bias, backend=backend),
    ),
    "its lse": (
        "flash_attention",
        _attention(1, 3, 2, 4),
        lambda q, k, v, backend: flash_attn_func(q, k, v, causal=True, return_attn_probs=True, backend=backend)[1],
    ),
    "its sinks": (
        "flash_attention",
        [*_attention(1, 3, 2, 4), (2,)],
        lambda q, k, v, sinks, backend: flash_attn_func(q, k, v, s_aux=sinks, backend=backend),
    ),
    "flash_attn_varlen_func": ("flash_attention", _attention(5, 2, 4), _varlen),
}


def _scalar(function, backend):
    return lambda *inputs: function(*inputs, backend=backend).sin().sum()


def _grad(function, inputs, backend):
    return grad(_scalar(function, backend), tuple(range(len(inputs))))(*(x[0] for x in inputs))


def _per_sample(function, inputs, backend):
    """Weights are shared, as in per-sample gradients of a model."""
    return vmap(grad(_scalar(function, backend), tuple(range(len(inputs)))), (0, *[None] * (len(inputs) - 1)))(
        inputs[0], *(x[0] for x in inputs[1:])
    )


def _every_input_mapped(function, inputs, backend):
    return vmap(grad(_scalar(function, backend), tuple(range(len(inputs)))))(*inputs)


def _mapped_in_another_dimension(function, inputs, backend):
    moved = [x.movedim(0, -1) for x in inputs]
    return vmap(lambda *x: function(*x, backend=backend), in_dims=-1)(*moved)


def _jacobian(function, inputs, backend):
    return jacrev(lambda *x: function(*x, backend=backend), tuple(range(len(inputs))))(*(x[0] for x in inputs))


def _mapped_twice(function, inputs, backend):
    twice = [torch.stack((x, x.flip(0))) for x in inputs]
    return vmap(vmap(grad(_scalar(function, backend))))(*twice)


def _batched_gradients(function, inputs, backend):
    """As torch.autograd.functional.jacobian(vectorize=True) takes them."""
    inputs = [x[0].requires_grad_() for x in inputs]
    out = function(*inputs, backend=backend)
    upstream = torch.linspace(-1, 1, 3 * out.numel()).view(3, *out.shape)
    grads = torch.autograd.grad(out, inputs, upstream, is_grads_batched=True, allow_unused=True)
    return tuple(torch.zeros(3, *x.shape) if g is None else g for x, g in zip(inputs, grads))


TRANSFORMS = [
    _grad, _per_sample, _every_input_mapped, _mapped_in_another_dimension, _jacobian, _mapped_twice, _batched_gradients
]  # fmt: skip


def _cases():
    for name, (op, _, _) in OPS.items():
        for backend in [i.backend for i in _table[op] if i.backend != "reference"]:
            if (op, backend) != ("flash_attention", "torch"):  # which refuses most of what these are
                yield pytest.param(name, backend, id=f"{name}-{backend}")


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize(("name", "backend"), list(_cases()))
def test_a_transform_gives_what_it_gives_of_the_reference(name, backend, transform, recwarn):
    _, shapes, function = OPS[name]
    inputs = [torch.randn(SAMPLES, *shape) for shape in shapes]
    want, got = transform(function, inputs, "reference"), transform(function, inputs, backend)
    for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # PyTorch's fused attention for the CPU has no batching rule, and says so in processes that no one has told not to.
    assert not [w for w in recwarn if "performance drop" in str(w.message) and "aten::_scaled_dot" not in str(w.message)]


@pytest.mark.parametrize(("name", "backend"), list(_cases()))
def test_forward_over_reverse_is_right_or_refused_in_words(name, backend):
    _, shapes, function = OPS[name]
    inputs = tuple(torch.randn(shape) for shape in shapes)

    def product(backend):
        return jvp(grad(_scalar(function, backend)), inputs, inputs)[1]

    want = product("reference")
    if backend == "torch" and OPS[name][0] != "attention":
        torch.testing.assert_close(product(backend), want, rtol=1e-4, atol=1e-5)
        return
    of_pytorch = "use forward AD with _scaled_dot_product"
    with pytest.raises(NotImplementedError, match=f"has no forward-mode derivative .use backend='reference'|{of_pytorch}"):
        product(backend)


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func", "its sinks"])
def test_no_samples_give_nothing(name):
    _, shapes, function = OPS[name]
    inputs = [torch.randn(0, *shape) for shape in shapes]
    got = vmap(grad(_scalar(function, "cpu"), tuple(range(len(inputs)))))(*inputs)
    assert [x.shape for x in got] == [x.shape for x in inputs]
