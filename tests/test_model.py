"""The model as a specification: what holds for every combination of positions, norm, activation, grouping."""

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.conftest import assert_as_accurate_as
from wikigpt import kernels
from wikigpt.config import ACTIVATIONS, NORMS, POSITIONS
from wikigpt.errors import UserError
from wikigpt.model import GPT, GPTConfig, check_backend

VOCAB, CONTEXT = 61, 16

# Every choice of the architecture: 3 positions x 2 norms x 3 activations x (MHA, GQA).
CHOICES = [
    pytest.param(
        {"position": position, "norm": norm, "activation": activation, "n_kv_head": n_kv_head},
        id=f"{position}-{norm}-{activation}-{'mha' if n_kv_head == 4 else 'gqa'}",
    )
    for position, norm, activation, n_kv_head in itertools.product(POSITIONS, NORMS, ACTIVATIONS, (4, 2))
]
# Where the rest of the block does not matter: positions with MHA and GQA.
ATTENTIONS = [
    pytest.param({"position": position, "n_kv_head": n_kv_head}, id=f"{position}-{n_kv_head}")
    for position, n_kv_head in itertools.product(POSITIONS, (4, 2))
]
# Every norm with every activation, positions and grouping in turn: interpreted kernels take seconds for each.
MIXED = [CHOICES[6 * (2 * (i % 3) + i // 3) + 2 * (i % 3) + i % 2] for i in range(6)]


def make(dtype=torch.float64, **changes):
    """A small model in eval mode, every parameter random so that nothing is 0 or 1."""
    config = {
        "vocab_size": VOCAB,
        "context_length": CONTEXT,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        **changes,
    }
    model = GPT(GPTConfig(**config)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(centre + 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def tokens(seed=1, length=CONTEXT):
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def assert_close(got, expected, tolerance=1e-10):
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"relative error {error:.1e}"


def gradients(model, idx, targets):
    model.zero_grad(set_to_none=True)
    loss = model(idx, targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


# ---- decoding ----


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("prefill", [(5, 6), (1, 10), (11,)], ids=str)
def test_decoding_with_a_cache_gives_the_logits_of_one_forward_pass(choice, prefill):
    """The prompt in pieces, then token by token."""
    model, idx = make(**choice), tokens()
    pieces = [*prefill, *[1] * (CONTEXT - sum(prefill))]
    cache = model.make_cache(2)
    with torch.no_grad():
        steps = torch.cat([model(piece, cache=cache) for piece in idx.split(pieces, dim=1)], dim=1)
        assert_close(steps, model(idx))
    assert cache.length == CONTEXT


@pytest.mark.parametrize("choice", ATTENTIONS)
def test_a_cache_holds_as_many_heads_as_there_are_for_keys(choice):
    cache = make(**choice).make_cache(3)
    shapes = {tensor.shape for layer in cache.layers for tensor in layer}
    assert shapes == {(3, choice["n_kv_head"], CONTEXT, 8)}


def test_a_cache_has_the_dtype_that_autocast_computes_in():
    model = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.make_cache(1)
    assert {tensor.dtype for layer in half.layers for tensor in layer} == {torch.bfloat16}
    assert {tensor.dtype for layer in model.make_cache(1).layers for tensor in layer} == {torch.float32}


def test_a_cache_works_where_gradients_are_recorded():
    model, idx = make(), tokens()
    cache = model.make_cache(2)
    steps = torch.cat([model(piece, cache=cache) for piece in idx.split(8, dim=1)], dim=1)
    assert_close(steps, model(idx))


@pytest.mark.parametrize("choice", ATTENTIONS)
def test_decoding_with_a_cache_works_under_autocast(choice):
    model, idx = make(torch.float32, **choice), tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model.make_cache(2)
        steps = torch.cat([model(piece, cache=cache) for piece in idx.split([5, 6, 1, 1, 1, 1, 1], 1)], dim=1)
        assert_close(steps.float(), model(idx).float(), 3e-2)


@pytest.mark.parametrize("past", [0, 9])
def test_more_positions_than_the_context_are_refused(past):
    model, cache = make(), None
    if past:
        cache = model.make_cache(2)
        model(tokens(length=past), cache=cache)
    with pytest.raises(ValueError, match=f"idx: {CONTEXT + 1} positions, the model's context_length is {CONTEXT}"):
        model(tokens(length=CONTEXT + 1 - past), cache=cache)


def test_attention_weights_refuse_more_positions_than_the_context():
    with pytest.raises(ValueError, match=f"idx: {CONTEXT + 1} positions"):
        make().attention_weights(tokens(length=CONTEXT + 1))


# ---- what a forward pass computes ----


@pytest.mark.parametrize("choice", CHOICES)
def test_a_later_token_changes_no_earlier_logit(choice):
    model, idx = make(**choice), tokens()
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(idx), model(changed)
    torch.testing.assert_close(after[:, :9], before[:, :9], rtol=1e-12, atol=1e-12)
    assert ((after - before)[:, 9:].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("position", POSITIONS)
def test_the_order_of_earlier_tokens_matters(position):
    model, idx = make(position=position), tokens()
    idx[:, :2] = torch.tensor([3, 4])
    swapped = idx.clone()
    swapped[:, :2] = torch.tensor([4, 3])
    with torch.no_grad():
        assert ((model(idx) - model(swapped))[:, -1].abs().amax(-1) > 1e-6).all()


def test_rotary_positions_see_a_shifted_text_as_the_same():
    """What a block makes of a text does not depend on where the text stands."""
    model, idx = make(position="rotary", n_layer=1), tokens(length=8)
    x = model.wte(idx)
    outputs = []
    for positions in (torch.arange(8), torch.arange(8) + 7):
        rotary = kernels.rotary_cos_sin(positions, 8, 10_000.0, torch.float64)
        outputs.append(torch.cat(model.blocks[0](x, None, rotary, None, None)))
    assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("choice", CHOICES)
def test_the_backends_reference_and_torch_agree_in_loss_and_every_gradient(choice):
    idx, targets = tokens(), tokens(2)
    loss, grads = gradients(make(**choice, backend="reference"), idx, targets)
    torch_loss, torch_grads = gradients(make(**choice, backend="torch"), idx, targets)
    assert_close(torch_loss, loss)
    assert grads.keys() == torch_grads.keys()
    for name, grad in grads.items():
        assert grad.norm() > 0, name
        assert_close(torch_grads[name], grad, 1e-9)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_default_backend_agrees_with_the_reference_in_float32(choice):
    """Here the op of csrc/ takes part, which knows no float64."""
    idx, targets = tokens(), tokens(2)
    loss, grads = gradients(make(**choice, backend="reference"), idx, targets)
    auto_loss, auto_grads = gradients(make(torch.float32, **choice), idx, targets)
    assert_close(auto_loss, loss, 1e-5)
    for name, grad in grads.items():
        assert_close(auto_grads[name], grad, 1e-4)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: test_gpu.py runs the model on it")
@pytest.mark.parametrize("choice", [*MIXED, *ATTENTIONS])
def test_the_triton_backend_agrees_with_the_reference_in_loss_and_every_gradient(choice):
    idx, targets = tokens(), tokens(2)
    truth = gradients(make(**choice, backend="reference"), idx, targets)
    plain = gradients(make(torch.float32, **choice, backend="reference"), idx, targets)
    ours = gradients(make(torch.float32, **choice, backend="triton"), idx, targets)
    assert_as_accurate_as(ours[0], plain[0], truth[0])
    for name, expected in truth[1].items():
        assert_as_accurate_as(ours[1][name], plain[1][name], expected, absolute=1e-7)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: test_gpu.py runs the model on it")
@pytest.mark.parametrize("choice", ATTENTIONS)
def test_the_triton_backend_generates_with_the_cache_what_it_computes_at_once(choice):
    model, idx = make(torch.float32, **choice, backend="triton").eval(), tokens()
    cache = model.make_cache(len(idx))
    parts = [model(part, cache=cache) for part in (idx[:, :3], idx[:, 3:7], idx[:, 7:8])]
    torch.testing.assert_close(torch.cat(parts, 1), model(idx[:, :8]), rtol=1e-5, atol=1e-5)


def test_a_backend_that_does_not_exist_here_says_why():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot compute"):
        make(backend="cuda")(tokens())


def test_a_backend_that_cannot_run_is_refused_before_a_model_is_made(monkeypatch):
    for name in ("cuda", "cpu", "cudnn", *(() if kernels._dispatch.interpreting() else ("triton",))):
        with pytest.raises(UserError, match=f"^backend: (got )?'{name}'"):
            check_backend(name, "cpu")
        monkeypatch.setattr(kernels._dispatch, "_forced", name)  # as WIKIGPT_BACKEND sets it
        for unset in (None, "auto"):
            with pytest.raises(UserError, match=f"^WIKIGPT_BACKEND: (got )?'{name}'"):
                check_backend(unset, "cpu")
        check_backend("torch", "cpu")  # the model's own setting goes before
        monkeypatch.undo()
    for name in (None, "auto", "torch", "reference"):
        check_backend(name, "cpu", "adamw", "sample")


def test_an_op_outside_the_model_follows_the_environment_alone(monkeypatch):
    monkeypatch.setattr(kernels._dispatch, "_forced", "cuda")
    with pytest.raises(UserError, match=r"^WIKIGPT_BACKEND: 'cuda' cannot compute sample on cpu: .*; use auto"):
        check_backend("torch", "cpu", "sample")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_the_mean_cross_entropy_of_the_logits(dtype):
    model, idx, targets = make(dtype), tokens(), tokens(2)
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    assert_close(model(idx, targets), expected, 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_of_minus_100_are_ignored(dtype):
    model, idx, targets = make(dtype), tokens(), tokens(2)
    targets[:, ::3] = -100
    kept = targets != -100
    expected = F.cross_entropy(model(idx)[kept], targets[kept])
    assert_close(model(idx, targets), expected, 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_losses_are_those_of_each_token_and_0_where_ignored(dtype):
    model, idx, targets = make(dtype), tokens(), tokens(2)
    targets[:, ::3] = -100
    expected = F.cross_entropy(model(idx).mT, targets, reduction="none")
    torch.testing.assert_close(model.token_losses(idx, targets), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_head_is_the_token_embedding_where_tied(tie_embeddings):
    model = make(tie_embeddings=tie_embeddings)
    assert (model.head.weight is model.wte.weight) == tie_embeddings
    with torch.no_grad():
        expected = model.hidden(tokens()) @ (model.wte if tie_embeddings else model.head).weight.T
        torch.testing.assert_close(model(tokens()), expected)


def test_dropout_works_in_training_and_not_in_eval():
    model, idx = make(dropout=0.5), tokens()
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


@pytest.mark.parametrize("bias", [True, False])
def test_bias_is_the_option_of_every_linear_and_layer_norm(bias):
    names = {name for name, _ in make(bias=bias).named_parameters() if name.endswith("bias")}
    layers = [f"blocks.{i}.{part}.bias" for i in range(2) for part in ("norm1", "norm2", "attn.qkv", "attn.proj")]
    mlp = [f"blocks.{i}.mlp.{part}.bias" for i in range(2) for part in ("fc", "proj")]
    assert names == ({"norm.bias", *layers, *mlp} if bias else set())


# ---- against a second implementation, by hand ----


def test_the_model_is_gpt2_as_the_paper_writes_it():
    """Pre-norm blocks, scaled dot products, tanh-GELU, learned positions: one head at a time."""
    model, idx = make(n_layer=1, tie_embeddings=False), tokens()
    p = dict(model.named_parameters())

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return centred / scale * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    x = p["wte.weight"][idx] + p["wpe.weight"][: idx.shape[1]]
    q, k, v = linear(norm(x, "blocks.0.norm1"), "blocks.0.attn.qkv").chunk(3, dim=-1)
    heads = []
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(8)
        scores = scores + torch.full((CONTEXT, CONTEXT), -math.inf).triu(1)
        heads.append(scores.softmax(-1) @ v[..., part])
    x = x + linear(torch.cat(heads, -1), "blocks.0.attn.proj")
    h = linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.fc")
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    x = norm(x + linear(h, "blocks.0.mlp.proj"), "norm")
    assert_close(model(idx), x @ p["head.weight"].T)


# ---- attention weights ----


@pytest.mark.parametrize("choice", ATTENTIONS)
def test_rows_of_the_attention_weights_sum_to_1(choice):
    weights = make(**choice).attention_weights(tokens())
    assert weights.shape == (2, 2, 4, CONTEXT, CONTEXT)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 4, CONTEXT, dtype=torch.float64))


@pytest.mark.parametrize("choice", ATTENTIONS)
def test_attention_weights_are_causal(choice):
    weights = make(**choice).attention_weights(tokens())
    below = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
    assert (weights[..., ~below] == 0).all()
    assert (weights[..., below] > 0).all()


@pytest.mark.parametrize("choice", ATTENTIONS)
def test_attention_weights_are_those_that_the_forward_pass_used(choice):
    model, idx = make(**choice, n_layer=1), tokens()
    attn, seen = model.blocks[0].attn, []
    attn.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    weights = model.attention_weights(idx)[0]
    [((x, rotary, _, _), output)] = seen
    value = attn.heads(x, rotary)[2].repeat_interleave(4 // choice["n_kv_head"], dim=1)
    assert_close(attn.proj((weights @ value).transpose(1, 2).flatten(2)), output)


def test_attention_weights_leave_the_mode_and_no_hooks():
    model = make(dropout=0.5).train()
    assert torch.equal(model.attention_weights(tokens()), model.attention_weights(tokens()))
    assert model.training
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


# ---- initialisation ----


@pytest.mark.parametrize("bias", [True, False])
def test_initial_weights_have_the_standard_deviations_of_gpt2(bias):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=400, context_length=64, n_layer=8, n_head=4, n_embd=64, bias=bias))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            std = 0.02 / math.sqrt(16) if name.endswith(("attn.proj.weight", "mlp.proj.weight")) else 0.02
            # 6 standard errors of a standard deviation and of a mean.
            assert abs(p.std().item() / std - 1) < 6 / math.sqrt(2 * p.numel()), name
            assert abs(p.mean().item()) < 6 * std / math.sqrt(p.numel()), name


def test_initial_biases_are_0_and_norm_weights_1():
    model = GPT(GPTConfig(vocab_size=VOCAB, n_layer=2, n_head=4, n_embd=32))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name


def test_the_first_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=VOCAB, context_length=CONTEXT, n_layer=2, n_head=4, n_embd=32))
    assert abs(model(tokens(), tokens(2)).item() - math.log(VOCAB)) < 0.05


# ---- configuration ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: 0}, rf"^{name}: got 0, must be 1 or more")
            for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_kv_head", "n_embd")
        ),
        ({"position": "sinus"}, "^position: got 'sinus', allowed are learned, rotary, alibi"),
        ({"norm": "batch"}, "^norm: got 'batch', allowed are layernorm, rmsnorm"),
        ({"activation": "relu"}, "^activation: got 'relu', allowed are gelu, gelu_tanh, swiglu"),
        ({"backend": "cudnn"}, "^backend: got 'cudnn', allowed are auto, reference"),
        ({"n_head": 5}, "^n_head: 5 does not divide n_embd 32"),
        ({"n_kv_head": 3}, "^n_kv_head: 3 does not divide n_head 4"),
        ({"position": "rotary", "head_dim": 7}, "^head_dim: got 7, rotary positions need an even one"),
        ({"dropout": 1.0}, "^dropout: got 1.0, must be at least 0 and below 1"),
        ({"dropout": -0.1}, "^dropout: got -0.1"),
        ({"dropout": float("nan")}, "^dropout: got nan"),
        ({"norm_eps": 0.0}, "^norm_eps: got 0.0, must be above 0 and at most 1"),
        ({"rope_theta": float("inf")}, "^rope_theta: got inf, must be above 0, and finite"),
        ({"head_dim": 1025}, "^head_dim: got 1025, must be 1024 or less"),
        ({"n_embd": 2**31}, "^n_embd: got 2147483648, must be from 1 to 2147483647"),
        ({"head_dim": 0}, "^head_dim: got 0"),
        ({"intermediate_size": 0}, "^intermediate_size: got 0"),
    ],
)
def test_a_config_that_makes_no_model_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{"n_head": 4, "n_embd": 32, **changes})


def test_a_config_survives_its_dict():
    config = GPTConfig(n_head=6, n_kv_head=2, n_embd=48, position="rotary", activation="swiglu", dropout=0.1)
    assert GPTConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("n_embd", "activation", "size"),
    [(512, "gelu", 2048), (512, "swiglu", 1376), (96, "swiglu", 256), (32, "swiglu", 96)],
)
def test_the_default_intermediate_size(n_embd, activation, size):
    """4 n_embd; with a gate 8/3 n_embd, so that the parameters are as many, up to the next multiple of 32."""
    assert GPTConfig(n_head=4, n_embd=n_embd, activation=activation).intermediate_size == size


def test_head_dim_and_intermediate_size_are_free():
    model, idx = make(head_dim=10, intermediate_size=44, n_kv_head=2), tokens()
    assert model.blocks[0].attn.qkv.weight.shape == (80, 32)
    assert model.blocks[0].attn.proj.weight.shape == (32, 40)
    assert model.blocks[0].mlp.fc.weight.shape == (44, 32)
    assert model(idx).shape == (2, CONTEXT, VOCAB)


# ---- the machinery of PyTorch ----


@pytest.mark.slow
def test_compiled_without_a_graph_break_the_loss_and_gradients_are_the_same():
    model, idx, targets = make(torch.float32, n_layer=1), tokens(), tokens(2)
    loss, grads = gradients(model, idx, targets)
    model.zero_grad(set_to_none=True)
    compiled_loss = torch.compile(model, fullgraph=True)(idx, targets)
    compiled_loss.backward()
    assert_close(compiled_loss, loss, 1e-6)
    for name, p in model.named_parameters():
        assert_close(p.grad, grads[name], 1e-4)


@pytest.mark.parametrize("choice", CHOICES)
def test_autocast_to_bf16_is_close(choice):
    model, idx, targets = make(torch.float32, **choice), tokens(), tokens(2)
    loss, grads = gradients(model, idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        half_loss = model(idx, targets)
    model.zero_grad(set_to_none=True)
    half_loss.backward()
    assert_close(half_loss, loss, 1e-2)
    for name, p in model.named_parameters():
        assert_close(p.grad, grads[name], 0.1)


def test_a_model_in_bfloat16_is_close():
    model = make(torch.float32)
    with torch.no_grad():
        assert_close(make(torch.bfloat16)(tokens()).float(), model(tokens()), 3e-2)


@pytest.mark.parametrize("choice", ATTENTIONS)
def test_checkpointed_blocks_give_the_same_gradients(choice):
    model, idx, targets = make(**choice), tokens(), tokens(2)
    loss, grads = gradients(model, idx, targets)
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    checkpointed_loss, checkpointed = gradients(model, idx, targets)
    assert torch.equal(checkpointed_loss, loss)
    assert all(torch.equal(checkpointed[name], grads[name]) for name in grads)


# ---- counting ----


def test_the_parameters_are_as_many_as_by_hand():
    # GPT-2 small, Radford et al. 2019; 124,439,808 as counted in transformers.
    config = GPTConfig(vocab_size=50257, context_length=1024, n_layer=12, n_head=12, n_embd=768)
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_parameters() == 124_439_808
    assert model.num_parameters(embeddings=False) == 124_439_808 - 768 * (50257 + 1024)


def test_the_parameters_of_an_untied_llama_are_as_many_as_by_hand():
    model = make(
        position="rotary",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
        n_kv_head=2,
        intermediate_size=44,
    )
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 44 + 2 * 32
    assert model.num_parameters() == 2 * layer + 32 + 2 * VOCAB * 32
    assert model.num_parameters(embeddings=False) == 2 * layer + 32 + VOCAB * 32


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_flops_of_a_token_are_as_many_as_by_hand(tie_embeddings):
    model = make(tie_embeddings=tie_embeddings)
    matrices = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + VOCAB * 32
    assert model.flops_per_token(10) == 6 * matrices + 12 * 2 * 32 * 10


def test_flops_count_attention_with_every_query_head():
    fewer = make(n_kv_head=1, head_dim=16)
    assert fewer.flops_per_token(10) - fewer.flops_per_token(0) == 12 * 2 * 4 * 16 * 10
