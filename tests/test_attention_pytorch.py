"""Our attention under PyTorch's names: activated for unchanged models (here on the CPU's dispatch keys), and varlen_attn."""

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
    sdpa_kernel,
    varlen,
)
from torch.testing._internal.two_tensor import TwoTensor
from wikigpt.kernels.attention import op, pytorch
from wikigpt.kernels.attention.reference import attention_reference

from tests.conftest import assert_as_accurate_as
from wikigpt import kernels


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What a call of `activate_flash_attention_impl("wikigpt")` in the test will count: problems that came to ours (traced ones
    too), kernels of ours that ran, and operators that went on to PyTorch's own kernel."""
    counted = SimpleNamespace(ours=[], ran=[], own=[])
    attention, own, function = pytorch.attention, pytorch._own, op._function

    def count_ran(implementation, direction):
        counted.ran.append(direction)
        return function(implementation, direction)

    def count_ours(x, backend=None):
        counted.ours.append(x)
        return attention(x, backend)

    def count_own(operator, key):
        kernel = own(operator, key)
        if kernel is None:
            return None

        def call_boxed(*args, **kwargs):
            counted.own.append(operator)
            return kernel.call_boxed(*args, **kwargs)

        return SimpleNamespace(call_boxed=call_boxed)

    monkeypatch.setattr(pytorch, "attention", count_ours)
    monkeypatch.setattr(pytorch, "_own", count_own)
    monkeypatch.setattr(op, "_function", count_ran)
    monkeypatch.setitem(torch.nn.attention._registry._FLASH_ATTENTION_IMPLS, "wikigpt", lambda: pytorch._activate("CPU"))
    yield counted
    restore_flash_attention_impl(_raise_warn=False)


@pytest.fixture
def active(calls: SimpleNamespace) -> SimpleNamespace:
    activate_flash_attention_impl("wikigpt")
    return calls


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def results(function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output of `function` and the gradients of all inputs for a random loss, computed in `dtype`."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    out = function(*leaves)
    loss = (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype)).sum()
    return [out.detach(), *torch.autograd.grad(loss, leaves)]


def check_against_pytorch(function, inputs: list[Tensor], calls: SimpleNamespace) -> None:
    dtype = inputs[0].dtype
    with sdpa_kernel(SDPBackend.MATH):
        truth, plain = results(function, inputs, torch.float64), results(function, inputs, dtype)
    calls.own.clear()
    assert not calls.ours
    ours = results(function, inputs, dtype)
    assert calls.ours
    assert not calls.own
    for mine, theirs, true in zip(ours, plain, truth):
        assert mine.dtype == dtype
        assert_as_accurate_as(mine, theirs, true, absolute=torch.finfo(dtype).eps / 4)


# --- the registry ---------------------------------------------------------------------------------------------------


def test_importing_the_kernels_makes_the_implementation_known_and_does_not_activate_it():
    assert "wikigpt" in list_flash_attention_impls()
    assert current_flash_attention_impl() is None


def test_the_implementation_is_the_current_one_from_activation_to_restoration(calls):
    activate_flash_attention_impl("wikigpt")
    assert current_flash_attention_impl() == "wikigpt"
    restore_flash_attention_impl()
    assert current_flash_attention_impl() is None


@pytest.mark.parametrize("times", [1, 2])
def test_restoring_gives_back_pytorchs_own_however_often_either_was_called(calls, times):
    q = normal(1, 2, 5, 8, seed=0)
    expected = F.scaled_dot_product_attention(q, q, q)
    for _ in range(times):
        activate_flash_attention_impl("wikigpt")
    F.scaled_dot_product_attention(q, q, q)
    assert len(calls.ours) == 1
    for _ in range(times):
        restore_flash_attention_impl()
    out = F.scaled_dot_product_attention(q, q, q)
    assert len(calls.ours) == 1
    assert type(out.grad_fn) is type(expected.grad_fn)
    assert torch.equal(out, expected)


def test_activating_on_cuda_leaves_the_cpu_alone(calls, monkeypatch):
    monkeypatch.setattr(pytorch, "explain", lambda op, device: [("triton", None)])
    activation = pytorch._activate()
    try:
        F.scaled_dot_product_attention(*[normal(1, 2, 5, 8, seed=0)] * 3)
        assert not calls.ours
        assert not calls.own
    finally:
        activation.remove()


def test_activating_where_no_kernel_of_ours_runs_names_the_reason(calls, monkeypatch):
    missing = [("triton", "triton is not installed"), ("cpu", "runs on cpu, not on cuda"), ("reference", None)]
    monkeypatch.setattr(pytorch, "explain", lambda op, device: missing)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        activate_flash_attention_impl("wikigpt")
    assert current_flash_attention_impl() is None


def test_activating_in_a_pytorch_without_the_interface_names_the_version_it_needs(calls, monkeypatch):
    monkeypatch.delattr(torch.library, "get_kernel")
    with pytest.raises(RuntimeError, match=r"needs torch 2\.11"):
        activate_flash_attention_impl("wikigpt")


def test_an_activation_that_fails_leaves_nothing_behind(calls, monkeypatch):
    impl, tag, made = torch.library.Library.impl, torch.compiler.config.cache_key_tag, []

    def fail_at_the_third(*args, **kwargs):
        made.append(args[1])
        if len(made) == 3:
            raise OSError("no")
        return impl(*args, **kwargs)

    monkeypatch.setattr(torch.library.Library, "impl", fail_at_the_third)
    with pytest.raises(OSError, match="no") as _error:  # its traceback holds the activation
        activate_flash_attention_impl("wikigpt")
    F.scaled_dot_product_attention(*[torch.randn(1, 2, 5, 8)] * 3)
    assert not calls.ours
    assert torch.compiler.config.cache_key_tag == tag
    assert current_flash_attention_impl() is None


# --- unchanged models -----------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]) >= torch.tensor([[7], [4]])
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


MODELS = {
    "own module": Decoder,
    "MultiheadAttention": SelfAttention,
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(24, 3, 48, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_unchanged_model_runs_ours_with_the_same_output_and_gradients(active, name):
    torch.manual_seed(0)
    model = MODELS[name]()
    names = [name for name, _ in model.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters)), (x,))

    check_against_pytorch(function, [normal(2, 7, 24, seed=1), *model.parameters()], active)
    assert len(active.ours) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_floating_dtype_of_ours_runs_ours(active, dtype):
    inputs = [normal(2, 2, n, 8, seed=n, dtype=dtype) for n in (5, 7, 7)]
    check_against_pytorch(F.scaled_dot_product_attention, inputs, active)


def boolean(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) > 0.4


SHAPES = ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8))
CALLS = {
    "causal, more keys than queries": (SHAPES, {"is_causal": True}),
    "causal, more queries than keys": (((2, 4, 7, 8), (2, 4, 5, 8), (2, 4, 5, 8)), {"is_causal": True}),
    "boolean mask": (SHAPES, {"attn_mask": boolean(2, 1, 5, 7)}),
    "boolean mask of two dimensions": (SHAPES, {"attn_mask": boolean(5, 7)}),
    "rows that see nothing": (SHAPES, {"attn_mask": torch.arange(5)[:, None] > 2}),
    "scale": (SHAPES, {"scale": 0.3}),
    "grouped queries": (((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)), {"enable_gqa": True}),
    "values of another width": (((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 16)), {}),
    "three dimensions": (((4, 5, 8), (4, 7, 8), (4, 7, 8)), {"attn_mask": boolean(4, 5, 7)}),
    "five dimensions": (((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8)), {}),
    "five dimensions with a mask": (((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8)), {"attn_mask": boolean(3, 1, 5, 7)}),
    "no queries": (((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_call_runs_ours(active, name):
    shapes, options = CALLS[name]
    inputs = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    if name == "no queries":
        out = F.scaled_dot_product_attention(*inputs)
        assert out.shape == (2, 4, 0, 8)
        assert (len(active.ours), len(active.own)) == (1, 0)
    else:
        check_against_pytorch(lambda *qkv: F.scaled_dot_product_attention(*qkv, **options), inputs, active)


def test_an_additive_mask_runs_ours_and_gets_its_gradient(active):
    inputs = [*(normal(*shape, seed=i) for i, shape in enumerate(SHAPES)), normal(1, 4, 5, 7, seed=8)]
    check_against_pytorch(F.scaled_dot_product_attention, inputs, active)


def test_a_float32_mask_of_half_precision_queries_runs_ours(active):
    q, mask = normal(2, 2, 5, 8, seed=0, dtype=torch.bfloat16), normal(5, 5, seed=1)
    out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert (len(active.ours), len(active.own), out.dtype) == (1, 0, torch.bfloat16)
    grad_q, grad_mask = torch.autograd.grad(out.float().square().sum(), (q, mask))
    leaves = [tensor.detach().float().requires_grad_() for tensor in (q, mask)]
    expected = F.scaled_dot_product_attention(leaves[0], leaves[0], leaves[0], attn_mask=leaves[1])
    grads = torch.autograd.grad(expected.square().sum(), leaves)
    assert (grad_q.dtype, grad_mask.dtype) == (torch.bfloat16, torch.float32)
    for ours, wide in zip((out, grad_q, grad_mask), (expected, *grads)):
        torch.testing.assert_close(ours.float(), wide, rtol=2e-2, atol=5e-2)


def test_dropout_runs_ours_and_draws_from_pytorchs_generator(active):
    q, k, v = (normal(*shape, seed=i) for i, shape in enumerate(SHAPES))
    outs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outs.append(F.scaled_dot_product_attention(q, k, v, dropout_p=0.4))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    torch.testing.assert_close(outs[0], attention_reference(active.ours[0])[0].transpose(1, 2))
    assert active.ours[0].dropout_p == 0.4


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)], ids=["BHS", "BSH", "SBH", "HBS"])
def test_the_output_lies_in_memory_as_the_query_does(active, order):
    sizes = (2, 3, 5)
    memory = torch.randn(*(sizes[i] for i in order), 8)
    query = memory.permute(*(order.index(i) for i in range(3)), 3)
    assert query.shape == (2, 3, 5, 8)
    assert F.scaled_dot_product_attention(query, query, query).stride() == query.stride()


@pytest.mark.parametrize("expanded", [False, True], ids=["slice of a projection", "expanded batch"])
def test_the_output_of_a_query_with_gaps_is_dense_in_the_order_of_its_dimensions(active, expanded):
    if expanded:
        q = torch.randn(1, 3, 5, 8).expand(2, 3, 5, 8)
        dense = (120, 40, 8, 1)
    else:
        q = torch.randn(2, 5, 3, 3, 8)[:, :, 0].transpose(1, 2)
        dense = (120, 8, 24, 1)
    assert F.scaled_dot_product_attention(q, q, q).stride() == dense


def test_attention_under_no_grad_and_inference_mode_runs_ours(active):
    q = normal(1, 2, 5, 8, seed=0)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = F.scaled_dot_product_attention(q, q, q)
        assert not out.requires_grad
    assert (len(active.ours), len(active.own)) == (2, 0)


# --- what is not ours -----------------------------------------------------------------------------------------------


def two_tensors() -> Tensor:
    return TwoTensor(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))


FOREIGN = {
    "float64": lambda: ([torch.randn(1, 2, 5, 8, dtype=torch.float64)] * 3, {}),
    "head_dim above 1024": lambda: ([torch.randn(1, 1, 5, 1032)] * 3, {}),
    "head_dim 0": lambda: ([torch.randn(1, 2, 5, 0)] * 3, {}),
    "two dimensions": lambda: ([torch.randn(5, 8)] * 3, {}),
    "broadcast batch": lambda: ([torch.randn(2, 2, 5, 8), *[torch.randn(1, 2, 5, 8)] * 2], {}),
    "mask and is_causal": lambda: ([torch.randn(1, 2, 5, 8)] * 3, {"attn_mask": boolean(5, 5), "is_causal": True}),
    "broadcast batches of one size": lambda: ([torch.randn(2, 1, 2, 5, 8), *[torch.randn(1, 2, 2, 5, 8)] * 2], {}),
    "negative scale": lambda: ([torch.randn(1, 2, 5, 8)] * 3, {"scale": -1.0}),
    "everything dropped": lambda: ([torch.randn(1, 2, 5, 8)] * 3, {"dropout_p": 1.0}),
    "tensor subclass": lambda: ([two_tensors()] * 3, {}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_ours_reaches_pytorchs_own_exactly_once_with_its_result(calls, name):
    inputs, options = FOREIGN[name]()
    expected = F.scaled_dot_product_attention(*inputs, **options)
    activate_flash_attention_impl("wikigpt")
    out = F.scaled_dot_product_attention(*inputs, **options)
    assert calls.own == ["scaled_dot_product_attention"]
    assert not calls.ours
    assert torch.equal(out, expected)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_give_what_pytorch_gives(calls, layout):
    if layout == torch.jagged:
        q = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 5)], layout=layout).transpose(1, 2)
    else:
        q = torch.nested.nested_tensor([torch.randn(2, n, 8) for n in (3, 5)])
    expected = F.scaled_dot_product_attention(q, q, q)
    activate_flash_attention_impl("wikigpt")
    out = F.scaled_dot_product_attention(q, q, q)
    assert all(torch.equal(a, b) for a, b in zip(out.unbind(), expected.unbind()))


def test_the_gradient_of_what_is_not_ours_is_pytorchs(calls):
    inputs = [normal(1, 2, 5, 8, seed=i) for i in range(3)]
    expected = results(F.scaled_dot_product_attention, inputs, torch.float64)
    activate_flash_attention_impl("wikigpt")
    got = results(F.scaled_dot_product_attention, inputs, torch.float64)
    assert calls.own == ["scaled_dot_product_attention"]
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("choice", ["sdpa_kernel", "backend"])
def test_a_user_who_asks_for_pytorchs_own_gets_it(active, choice):
    q = normal(1, 2, 5, 8, seed=0)
    with sdpa_kernel(SDPBackend.MATH) if choice == "sdpa_kernel" else kernels.backend("torch"):
        F.scaled_dot_product_attention(q, q, q)
    assert (len(active.ours), len(active.own)) == (0, 1)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_transforms_give_what_pytorch_gives(calls, transform):
    q, k, v = (normal(3, 1, 2, n, 8, seed=n).detach() for n in (5, 7, 7))

    def function() -> Tensor:
        if transform == "vmap":
            return torch.func.vmap(F.scaled_dot_product_attention)(q, k, v)
        return torch.func.grad(lambda query: F.scaled_dot_product_attention(query, k[0], v[0]).square().sum())(q[0])

    expected = function()
    assert expected.abs().max() > 0
    activate_flash_attention_impl("wikigpt")
    torch.testing.assert_close(function(), expected)


REFUSED = {
    "fewer heads without enable_gqa": lambda q: F.scaled_dot_product_attention(q, q[:, :2], q[:, :2]),
    "other dtype": lambda q: F.scaled_dot_product_attention(q, q.double(), q.double()),
    "integer mask": lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=boolean(5, 5).int()),
    "mask of a wider dtype": lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=boolean(5, 5).double()),
    "mask of more dimensions": lambda q: F.scaled_dot_product_attention(q[0], q[0], q[0], attn_mask=boolean(1, 4, 5, 5)),
    "mask that does not broadcast": lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=boolean(4, 5)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_pytorch_refuses_is_refused_in_pytorchs_words(calls, name):
    q = normal(1, 4, 5, 8, seed=0)
    with pytest.raises(RuntimeError) as before:
        REFUSED[name](q)
    activate_flash_attention_impl("wikigpt")
    with pytest.raises(RuntimeError) as while_active:
        REFUSED[name](q)
    assert str(while_active.value).splitlines()[0] == str(before.value).splitlines()[0]


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode], ids=["grad", "no_grad", "inference_mode"])
def test_a_compiled_function_runs_ours_in_one_graph(active, mode):
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * 2, k, v, dropout_p=0.0, is_causal=True).transpose(1, 2).flatten(2)

    with mode():
        q, k, v = (normal(*shape, seed=i) for i, shape in enumerate(SHAPES))
        expected = function(q, k, v)
        active.ran.clear()
        out = torch.compile(function, backend="aot_eager", fullgraph=True)(q, k, v)
    assert active.ran == ["forward"]
    assert not active.own
    torch.testing.assert_close(out, expected)
    if mode is nullcontext:
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)))


def test_a_compiled_function_with_dynamic_shapes_runs_ours(active):
    compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (5, 9):
        q = torch.randn(2, n, 3, 8).transpose(1, 2)
        out = compiled(q, q, q, is_causal=True)
        with sdpa_kernel(SDPBackend.MATH):
            torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q, is_causal=True))
        assert out.stride() == q.stride()
    assert active.ours


def test_what_was_compiled_before_follows_activation_and_restoration(calls):
    torch.ops.aten.scaled_dot_product_attention.default._dispatch_cache.clear()  # as in a process that just began
    compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="aot_eager", fullgraph=True)
    q = torch.randn(1, 2, 5, 8)
    compiled(q)
    activate_flash_attention_impl("wikigpt")
    compiled(q)
    assert calls.ran == ["forward"]
    restore_flash_attention_impl()
    compiled(q)
    assert calls.ran == ["forward"]


def test_the_key_of_the_compile_cache_differs_while_active(calls):
    with torch.compiler.config.patch(cache_key_tag="mine"):
        activate_flash_attention_impl("wikigpt")
        assert torch.compiler.config.cache_key_tag not in ("", "mine")
        restore_flash_attention_impl()
        assert torch.compiler.config.cache_key_tag == "mine"


# --- the flash operators below the selector -------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
def test_the_flash_operator_called_by_name_runs_ours_with_its_gradients(active, causal, heads_first):
    flash, math = torch.ops.aten._scaled_dot_product_flash_attention, torch.ops.aten._scaled_dot_product_attention_math
    inputs = [normal(2, 3, 5, 8, seed=i) if heads_first else normal(2, 5, 3, 8, seed=i).transpose(1, 2) for i in range(3)]
    truth = results(lambda *qkv: math(*qkv, is_causal=causal)[0], inputs, torch.float64)
    plain = results(lambda *qkv: math(*qkv, is_causal=causal)[0], inputs, torch.float32)
    ours = results(lambda *qkv: flash(*qkv, 0.0, causal)[0], inputs, torch.float32)
    assert active.ran == ["forward", "backward"]
    for mine, theirs, true in zip(ours, plain, truth):
        assert_as_accurate_as(mine, theirs, true)
        assert mine.stride() == inputs[0].stride()


def test_the_flash_operator_returns_what_its_schema_and_meta_kernel_say(active):
    q = torch.randn(2, 3, 5, 8)
    got = torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)
    meta = torch.ops.aten._scaled_dot_product_flash_attention(*[q.to("meta")] * 3)
    for ours, expected in zip(got, meta):
        if isinstance(expected, Tensor):
            assert (ours.shape, ours.dtype, ours.stride()) == (expected.shape, expected.dtype, expected.stride())
        else:
            assert ours == expected


def test_the_flash_operator_with_dropout_reaches_pytorchs_own(calls):
    library = torch.library.Library("aten", "IMPL")  # a stand-in: PyTorch has none for the CPU
    made = []

    def stand_in(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        made.append((dropout_p, scale))
        empty = torch.empty(0)
        return query.clone(), empty, None, None, 1, 1, empty, empty, empty

    library.impl("_scaled_dot_product_flash_attention", stand_in, "CPU")
    activate_flash_attention_impl("wikigpt")
    q = torch.randn(1, 2, 5, 8)
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.5, scale=0.1)[0]
    assert torch.equal(out, q)
    assert made == [(0.5, 0.1)]
    assert calls.own == ["_scaled_dot_product_flash_attention"]


# --- varlen_attn ----------------------------------------------------------------------------------------------------

CU_Q, CU_K = torch.tensor([0, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 6, 7, 12], dtype=torch.int32)


def packed(groups: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(n, heads, 8, seed=i, dtype=dtype) for i, (n, heads) in enumerate(((8, 4), (12, groups), (12, groups)))]


def one_by_one(window: tuple[int, int] = (-1, -1), scale: float | None = None, used: tuple[int, ...] = (6, 1, 5)):
    """varlen_attn as a loop of F.scaled_dot_product_attention over the sequences."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for b, n in enumerate(used):
            s = int(CU_Q[b + 1] - CU_Q[b])
            qs, (ks, vs) = q[CU_Q[b] : CU_Q[b + 1]], (x[CU_K[b] : CU_K[b] + n] for x in (k, v))
            i, j = torch.arange(s)[:, None] + n - s, torch.arange(n)
            seen = torch.ones(s, n, dtype=torch.bool)
            if window[0] >= 0:
                seen &= j >= i - window[0]
            if window[1] >= 0:
                seen &= j <= i + window[1]
            heads_first = [x.transpose(0, 1)[None] for x in (qs, ks, vs)]
            out = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=scale, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return function


def test_varlen_attn_has_pytorchs_arguments():
    theirs, ours = (inspect.signature(f).parameters for f in (varlen.varlen_attn, kernels.varlen_attn))
    # An older PyTorch has fewer of them.
    common = [(p.name, p.kind, p.default) for p in ours.values() if p.name in theirs]
    assert common == [(p.name, p.kind, p.default) for p in theirs.values()]


VARLEN = {
    "full": ({}, {}),
    "causal": ({"window_size": (-1, 0)}, {"window": (-1, 0)}),
    "sliding window": ({"window_size": (2, 1)}, {"window": (2, 1)}),
    "scale": ({"scale": 0.2}, {"scale": 0.2}),
    "keys in use": ({"seqused_k": torch.tensor([4, 0, 5], dtype=torch.int32)}, {"used": (4, 0, 5)}),
    "split count": ({"num_splits": 1}, {}),
}


@pytest.mark.parametrize("name", VARLEN)
def test_varlen_attn_is_attention_of_each_sequence(name):
    options, loop = VARLEN[name]
    inputs = packed()
    truth, plain = (results(one_by_one(**loop), inputs, dtype) for dtype in (torch.float64, torch.float32))
    function = lambda *qkv: kernels.varlen_attn(*qkv, CU_Q, CU_K, 5, 6, enable_gqa=True, **options)  # noqa: E731
    for mine, theirs, true in zip(results(function, inputs, torch.float32), plain, truth):
        assert_as_accurate_as(mine, theirs, true)


def test_varlen_attn_returns_the_lse_where_it_is_requested():
    q, k, v = packed(groups=4)
    for aux in (None, varlen.AuxRequest(lse=False)):
        assert isinstance(kernels.varlen_attn(q, k, v, CU_Q, CU_K, 5, 6, return_aux=aux), Tensor)
    _, lse = kernels.varlen_attn(q, k, v, CU_Q, CU_K, 5, 6, return_aux=varlen.AuxRequest(lse=True))
    scores = torch.einsum("shd,thd->hst", q[3:], k[7:]) / 8**0.5
    assert lse.shape == (4, 8)
    torch.testing.assert_close(lse[:, 3:], scores.logsumexp(-1))


def test_varlen_attn_reads_paged_keys():
    rng = torch.Generator().manual_seed(0)
    pages_k, pages_v = (torch.randn(6, 4, 2, 8, generator=rng) for _ in range(2))
    table = torch.tensor([[3, 0], [5, 2]], dtype=torch.int32)
    used = torch.tensor([7, 5], dtype=torch.int32)
    q, cu = torch.randn(6, 4, 8, generator=rng), torch.tensor([0, 3, 6], dtype=torch.int32)
    options = {"window_size": (-1, 0), "enable_gqa": True, "return_aux": varlen.AuxRequest(lse=True)}
    out, lse = kernels.varlen_attn(q, pages_k, pages_v, cu, None, 3, 8, seqused_k=used, block_table=table, **options)
    k, v = (torch.cat([pages[table[b].long()].flatten(0, 1)[: used[b]] for b in range(2)]) for pages in (pages_k, pages_v))
    cu_k = torch.tensor([0, 7, 12], dtype=torch.int32)
    expected, expected_lse = kernels.varlen_attn(q, k, v, cu, cu_k, 3, 7, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


PAGES = {"block_table": torch.zeros(3, 2, dtype=torch.int32)}
USED = {"seqused_k": torch.ones(3, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enable_gqa": False}, "key: got 2 heads for 4"),
        ({"num_splits": 0}, "num_splits: got 0"),
        ({"cu_seq_k": None}, "cu_seq_k: got None"),
        ({"window_size": (-2, 0)}, "window_size"),
        ({**PAGES}, "block_table: needs seqused_k"),
        ({**PAGES, **USED}, "block_table: got 8 queries for 3 sequences"),
        ({"max_q": 4}, "max_seqlen_q: got 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_varlen_attn_names_the_argument_that_does_not_fit(options, named):
    q, k, v = packed()
    arguments = {"cu_seq_q": CU_Q, "cu_seq_k": CU_K, "max_q": 5, "max_k": 6, "enable_gqa": True, **options}
    with pytest.raises(ValueError, match=named):
        kernels.varlen_attn(q, k, v, **arguments)


def test_paged_varlen_attn_refuses_a_gradient():
    q, pages = normal(3, 2, 8, seed=0), torch.randn(2, 4, 2, 8)
    cu = torch.arange(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="gradient"):
        kernels.varlen_attn(q, pages, pages, cu, None, 1, 8, **PAGES, **USED)


@pytest.mark.parametrize("causal", [False, True])
def test_pytorchs_varlen_attn_runs_ours_while_active(active, causal):
    window = (-1, 0) if causal else (-1, -1)
    inputs = packed(groups=4)

    def function(run):
        return results(lambda *qkv: run(*qkv, CU_Q, CU_K, 5, 6, window_size=window), inputs, torch.float32)

    # PyTorch has no kernel for it on the CPU: that it runs at all, and through its backward, is ours.
    for theirs, ours in zip(function(varlen.varlen_attn), function(kernels.varlen_attn)):
        assert torch.equal(theirs, ours)


def test_pytorchs_varlen_attn_into_given_memory_runs_ours_while_active(active):
    if not hasattr(varlen, "varlen_attn_out"):
        pytest.skip("this PyTorch has no varlen_attn_out")
    q, k, v = (x.detach() for x in packed(groups=4))
    out = torch.empty_like(q)
    varlen.varlen_attn_out(out, q, k, v, CU_Q, CU_K, 5, 6)
    assert torch.equal(out, kernels.varlen_attn(q, k, v, CU_Q, CU_K, 5, 6))
