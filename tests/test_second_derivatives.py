"""Second derivatives of the ops with backwards of their own: right, or refused, never silently 0."""

import pytest
import torch
from wikigpt.kernels import (
    apply_rotary_emb,
    apply_rotary_emb_qk,
    bias_gelu,
    geglu,
    gelu,
    layer_norm,
    rms_norm,
    rotary_cos_sin,
    swiglu,
)
from wikigpt.kernels._dispatch import why_not_triton

interpreted = pytest.mark.skipif(why_not_triton("cpu") is not None, reason=str(why_not_triton("cpu")))
BACKENDS = ["auto", "torch", pytest.param("triton", marks=interpreted)]
COS, SIN = rotary_cos_sin(torch.arange(5), 8)

CALLS = {
    "layer_norm": lambda x, r, w, b, **o: layer_norm(x, w, b, **o),
    "layer_norm with residual": lambda x, r, w, b, **o: sum(layer_norm(x, w, b, residual=r, prenorm=True, **o)),
    "layer_norm over two dimensions": lambda x, r, w, b, **o: layer_norm(x, w.repeat(5, 1), b.repeat(5, 1), **o),
    "rms_norm": lambda x, r, w, b, **o: rms_norm(x, w, **o),
    "rms_norm with residual": lambda x, r, w, b, **o: sum(rms_norm(x, w, residual=r, bias=b, prenorm=True, **o)),
    "rms_norm of 1 + weight": lambda x, r, w, b, **o: rms_norm(x, w, unit_offset=True, **o),
    "bias_gelu": lambda x, r, w, b, **o: bias_gelu(x, b, **o),
    "bias_gelu tanh": lambda x, r, w, b, **o: bias_gelu(x, b, "tanh", **o),
    "swiglu": lambda x, r, w, b, **o: swiglu(x, r, gate_bias=w, up_bias=b, **o),
    "swiglu packed": lambda x, r, w, b, **o: swiglu(torch.cat((x, r), -1), **o),
    "geglu": lambda x, r, w, b, **o: geglu(x, r, gate_bias=w, **o),
    "geglu packed": lambda x, r, w, b, **o: geglu(torch.cat((x, r), -1), approximate="none", **o),
    "gelu": lambda x, r, w, b, backend: gelu(x, backend="torch" if backend == "triton" else backend),
    "rotary": lambda x, r, w, b, **o: apply_rotary_emb(x, COS, SIN, **o),
    "rotary in place": lambda x, r, w, b, **o: apply_rotary_emb(x * 1, COS, SIN, inplace=True, **o),
    "rotary of pairs": lambda x, r, w, b, **o: apply_rotary_emb(x, COS, SIN, interleaved=True, **o),
    "rotary of two": lambda x, r, w, b, **o: sum(apply_rotary_emb_qk(x, r, COS, SIN, **o)),
}
REFUSED = [call for call in CALLS if call != "gelu" and not call.startswith("rotary")]  # by Triton, whose backwards are kernels
LARGE = ["layer_norm", "rms_norm", "bias_gelu", "swiglu packed", "geglu packed", "rotary", "rotary of pairs"]


def second_derivatives(call, backend, batch):
    """Of the norm of the first gradients, by every input: a gradient penalty."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 2, 5, 8), (batch, 2, 5, 8), (8,), (8,)]
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    y = CALLS[call](*leaves, backend=backend)
    first = torch.autograd.grad((y**3).sum(), leaves, create_graph=True, allow_unused=True)
    penalty = sum((grad**2).sum() for grad in first if grad is not None)
    return torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)


def assert_right(call, backend, batch):
    for mine, expected in zip(second_derivatives(call, backend, batch), second_derivatives(call, "reference", batch)):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_second_derivatives_are_right_or_refused(call, backend):
    if backend == "triton" and call in REFUSED:
        with pytest.raises(NotImplementedError, match=r"no second derivative \(use backend='reference'"):
            second_derivatives(call, backend, batch=3)
    else:
        assert_right(call, backend, batch=3)


@pytest.mark.parametrize("call", LARGE)
def test_second_derivatives_of_large_inputs_on_the_cpu(call):
    """Where PyTorch's operators take another way."""
    assert_right(call, "auto", batch=2**18 // 80 + 1)
