"""patch(model): the same logits, loss and gradients as transformers' own modules, in everything people do with a model."""

import contextlib
import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.llama import modeling_llama
from wikigpt.kernels import backend

from tests.conftest import assert_as_accurate_as
from tests.test_transformers import DECODERS, ENCODER, SLIDING, SMALL, tokens
from wikigpt.integrations import lazy_logits
from wikigpt.integrations import patch as patching
from wikigpt.integrations.lazy_logits import LazyLogits
from wikigpt.integrations.transformers import patch, unpatch

FAMILIES = {
    **{name: DECODERS[name] for name in ("GPT-2", "Llama", "Mistral", "Qwen 3", "Gemma 3")},
    "Qwen 2": ("Qwen2ForCausalLM", "Qwen2Config", SMALL),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**SMALL, "head_dim": 8}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {
        **SMALL, "head_dim": 8, "sliding_window": 4, "layer_types": SLIDING, "query_pre_attn_scalar": 5,
        "final_logit_softcapping": 3.0}),
    "Phi": ("PhiForCausalLM", "PhiConfig", {**SMALL, "partial_rotary_factor": 0.5}),
}  # fmt: skip
EXPERTS = {**SMALL, "head_dim": 8, "num_experts_per_tok": 1, "output_router_logits": True, "router_aux_loss_coef": 0.7}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
# Norms without a bias, packed MLPs, scaled logits, experts with a loss of their router, text models in a shell with images.
MORE = {
    "Cohere": ("CohereForCausalLM", "CohereConfig", {**SMALL, "head_dim": 8, "logit_scale": 0.3}),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", {**SMALL, "logits_scaling": 3.0}),
    "Phi 3": ("Phi3ForCausalLM", "Phi3Config", SMALL),
    "GLM": ("GlmForCausalLM", "GlmConfig", {**SMALL, "head_dim": 8}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**EXPERTS, "num_local_experts": 2}),
    "Qwen 3 MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**EXPERTS, "num_local_experts": 2}),
    "DeepSeek V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        **SMALL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 12, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "LLaVA": ("LlavaForConditionalGeneration", "LlavaConfig", {
        "text_config": {**SMALL, "model_type": "llama"}, "vision_config": {**VISION, "model_type": "clip_vision_model"},
        "image_token_index": 60}),
    "PaliGemma": ("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", {
        "text_config": {**SMALL, "head_dim": 8, "model_type": "gemma"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"}, "image_token_index": 60, "projection_dim": 32}),
    "Gemma 3 with images": ("Gemma3ForConditionalGeneration", "Gemma3Config", {
        "text_config": {**SMALL, "head_dim": 8, "sliding_window": 4, "layer_types": SLIDING},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"}, "image_token_index": 60, "mm_tokens_per_image": 4}),
    "OPT": ("OPTForCausalLM", "OPTConfig", {**ENCODER, "word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0}),
}  # fmt: skip


def build(name, **changes):
    """A small model in training mode, without dropout, with random weights that are far from any symmetry."""
    model_class, config_class, settings = {**FAMILIES, **MORE}[name]
    config = getattr(transformers, config_class)(**{**settings, "attn_implementation": "eager", **changes})
    config._experts_implementation = "eager"  # the others know no float64
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.train()


def batch(ignored=4, **size):
    ids = tokens(**size)
    labels = ids.clone()
    labels[0, :ignored] = -100
    return {"input_ids": ids, "labels": labels}


def step(model, *batches):
    """(logits, losses, gradients) of a training step; the logits come from a second call, in eval mode."""
    model.zero_grad()
    losses = torch.stack([model(**x).loss for x in batches])
    losses.sum().backward()
    model.eval()
    with torch.no_grad():
        logits = torch.stack([model(**x).logits for x in batches])
    model.train()
    return logits, losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def float64_stays():
    """transformers computes norms, softmax and loss in float32 whatever comes in; here float64 stays what it is."""
    softmax, to = F.softmax, torch.Tensor.to

    def keep(x, *args, **kwargs):
        narrower = x.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype"))
        return x if narrower else to(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(F, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim))
        patched.setattr(torch.Tensor, "to", keep)
        patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def in_float64(model, *batches):
    with float64_stays():
        return step(copy.deepcopy(model).double(), *batches)


def assert_steps_agree(ours, plain, truth):
    """The numeric rule for the logits, the loss and each gradient."""
    assert_as_accurate_as(ours[0], plain[0], truth[0])
    assert_as_accurate_as(ours[1], plain[1], truth[1])
    assert ours[2].keys() == plain[2].keys() == truth[2].keys()
    largest = max(grad.abs().max() for grad in truth[2].values())
    for name, grad in truth[2].items():  # one that is zero but for rounding (the bias of a key) has no scale of its own
        assert_as_accurate_as(ours[2][name], plain[2][name], grad, absolute=1e-6 * largest)


# --- the same numbers -----------------------------------------------------------------------------------------------


# On a CPU a module's own forward is used where our op would call the same operators: "torch" forces our way.
HOW = ("auto", "torch")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_logits_loss_and_gradients_stay(name, how):
    model, x = build(name), batch()
    plain, truth = step(model, x), in_float64(model, x)
    assert patch(model)["loss"] == [""]
    with backend(how):
        assert isinstance(model(**x).logits, LazyLogits)
        assert_steps_agree(step(model, x), plain, truth)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2"])
def test_the_interpreted_kernels_give_the_same_numbers(name):
    model, x = build(name), batch(length=7)
    plain, truth = step(model, x), in_float64(model, x)
    patch(model)
    with backend("triton"):
        assert_steps_agree(step(model, x), plain, truth)


def assert_norms_agree(ours, plain, truth):
    """The numeric rule for all logits, losses and gradients each together: in 16 bits a single number is rounded by chance."""
    grads = [torch.cat([grad.double().flatten() for grad in result[2].values()]) for result in (ours, plain, truth)]
    for a, b, c in (grads, *([result[i].double() for result in (ours, plain, truth)] for i in (0, 1))):
        assert torch.isfinite(a).all()
        assert (a - c).norm() <= 2 * (b - c).norm()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_loss_and_gradients_stay_in_bfloat16(name, how):
    model, x = build(name).bfloat16(), [batch(seed=seed) for seed in range(8)]
    plain, truth = step(model, *x), in_float64(model, *x)
    patch(model)
    with backend(how):
        ours = step(model, *x)
    assert ours[0].dtype == plain[0].dtype == torch.bfloat16
    assert ours[1].dtype == plain[1].dtype == torch.float32
    assert_norms_agree(ours, plain, truth)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2"])
def test_logits_loss_and_gradients_stay_under_autocast(name, how):
    model, x = build(name), [batch(seed=seed) for seed in range(8)]
    truth = in_float64(model, *x)

    def results():
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, *x)

    plain = results()
    patch(model)
    with backend(how):
        ours = results()
    assert {grad.dtype for grad in ours[2].values()} == {torch.float32}
    assert_norms_agree(ours, plain, truth)


# --- what is swapped ------------------------------------------------------------------------------------------------

LAYERS = [f"model.layers.{i}" for i in (0, 1)]
PRE_NORMS = [f"{layer}.{norm}" for layer in LAYERS for norm in ("input_layernorm", "post_attention_layernorm")]
BLOCKS = [f"transformer.h.{i}" for i in (0, 1)]


def test_the_summary_names_every_module_that_was_swapped():
    assert patch(build("Llama")) == {
        "norm": [*PRE_NORMS, "model.norm"],
        "activation": [f"{layer}.mlp" for layer in LAYERS],
        "rotary": [f"{layer}.self_attn" for layer in LAYERS],
        "loss": [""],
    }
    assert patch(build("GPT-2")) == {
        "norm": [*(f"{block}.{norm}" for block in BLOCKS for norm in ("ln_1", "ln_2")), "transformer.ln_f"],
        "activation": [f"{block}.mlp.act" for block in BLOCKS],
        "rotary": [],
        "loss": [""],
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_left_of_the_original_computation(name, monkeypatch):
    """Counted at our functions: every norm, MLP, rotary embedding and loss of the model comes through them."""
    calls = dict.fromkeys(
        ("rms_norm", "layer_norm", "bias_gelu", "swiglu", "geglu", "apply_rotary_emb_qk", "linear_cross_entropy"), 0
    )
    for function in calls:
        module = patching if hasattr(patching, function) else lazy_logits
        ours = getattr(module, function)

        def counted(*args, function=function, ours=ours, **kwargs):
            calls[function] += 1
            return ours(*args, **kwargs)

        monkeypatch.setattr(module, function, counted)
    model = build(name)
    patch(model)
    calls.update(dict.fromkeys(calls, 0))
    with backend("torch"):
        model(**batch())
    norms = {"GPT-2": 5, "Gemma 2": 9, "Gemma 3": 13, "Qwen 3": 9, "Phi": 3}.get(name, 5)
    assert calls["rms_norm"] + calls["layer_norm"] == norms
    assert calls["bias_gelu"] + calls["swiglu"] + calls["geglu"] == 2
    assert calls["apply_rotary_emb_qk"] == (0 if name == "GPT-2" else 2)
    assert calls["linear_cross_entropy"] == 1


@pytest.mark.parametrize("kind", ["norm", "activation", "rotary", "loss"])
def test_each_kind_can_be_chosen_alone(kind):
    kinds = ("norm", "activation", "rotary", "loss")
    model = build("Llama")
    swapped = patch(model, **{other: other == kind for other in kinds})
    assert list(swapped) == [kind]
    changed = [name for name, module in model.named_modules() if isinstance(module, patching._Swapped)]
    assert changed == swapped[kind]


def test_patching_twice_is_harmless():
    model = build("Gemma 3")
    assert patch(model) == patch(model)
    unpatch(model)
    assert not any(isinstance(module, patching._Swapped) for module in model.modules())


class OutsideTheRoot(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states):
        return self.weight * hidden_states / (hidden_states.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Gated(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        out = super().forward(hidden_states)
        return out if gate is None else out * F.silu(gate)


class Sparse(modeling_llama.LlamaMLP):
    def forward(self, x):
        return self.down_proj(F.relu(self.act_fn(self.gate_proj(x))) * self.up_proj(x))


@pytest.mark.parametrize("name", ["OutsideTheRoot", "Gated", "Sparse"])
def test_a_module_that_only_looks_alike_is_left_alone(name):
    model = build("Llama")
    if name == "Sparse":
        path, model.model.layers[1].mlp = "model.layers.1.mlp", Sparse(model.config)
    else:
        path, model.model.norm = "model.norm", globals()[name](32, 1e-2)
    swapped = patch(model)
    assert path not in swapped["norm"] + swapped["activation"]
    assert len(swapped["norm"] + swapped["activation"]) == 6


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu"])
def test_the_activation_is_recognised_by_its_values(act):
    known = {"silu": None, "gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
    model = build("Llama", hidden_act=act)
    if act in known:
        assert patch(model)["activation"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert model.model.layers[0].mlp._approximate == known[act]
    else:
        assert patch(model)["activation"] == []


def test_norms_without_a_bias_and_packed_projections_are_swapped():
    layers = ("model.layers.0", "model.layers.1")
    assert patch(build("Cohere"))["norm"] == [*(f"{layer}.input_layernorm" for layer in layers), "model.norm"]
    for name in ("Phi 3", "GLM"):
        assert patch(build(name))["activation"] == [f"{layer}.mlp" for layer in layers]


@pytest.mark.parametrize("name", ["Mixtral", "Qwen 3 MoE", "gpt-oss"])
def test_the_loss_of_a_router_is_kept(name):
    model, x = build(name), batch()
    plain = model(**x)
    patch(model)
    ours = model(**x)
    torch.testing.assert_close(ours.aux_loss, plain.aux_loss)
    without = model(**x, output_router_logits=False)
    assert without.aux_loss is None
    torch.testing.assert_close(ours.loss, without.loss + 0.7 * plain.aux_loss)


def test_a_loss_of_more_than_a_cross_entropy_is_left_alone():
    class WithPenalty(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
            out = super().forward(input_ids, labels=labels, **kwargs)
            return type(out)(loss=out.loss + 1e-4 * out.logits.square().mean(), logits=out.logits)

    assert patch(WithPenalty(transformers.LlamaConfig(**SMALL)))["loss"] == []


class Doubled(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        out = super().forward(input_ids, labels=labels, **kwargs)
        return type(out)(loss=None if out.loss is None else 2 * out.loss, logits=out.logits)


def test_the_loss_of_a_forward_that_calls_super_is_swapped():
    torch.manual_seed(0)
    model = Doubled(transformers.LlamaConfig(**SMALL, attn_implementation="eager")).train()
    plain = model(**batch())
    assert patch(model)["loss"] == [""]
    ours = model(**batch())
    assert isinstance(ours.logits, LazyLogits)
    torch.testing.assert_close(ours.loss, plain.loss)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(**batch()).loss, plain.loss)


def test_cos_and_sin_of_unequal_halves_keep_their_rotary_embedding():
    model = build("Llama")
    rotary = model.model.rotary_emb
    rotary.forward = lambda *args: None  # an instance's own forward is never looked at: the class counts
    assert patch(model)["rotary"]
    model = build("Llama")

    class Unequal(type(rotary)):
        def forward(self, x, position_ids):
            return tuple(t * torch.arange(1, 9) for t in super().forward(x, position_ids))

    model.model.rotary_emb.__class__ = Unequal
    assert patch(model)["rotary"] == []


def test_a_forward_replaced_on_the_instance_is_left_alone():
    model = build("Llama")
    model.model.norm.forward = model.model.norm.forward
    assert "model.norm" not in patch(model)["norm"]


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model: got str, allowed is a torch.nn.Module"):
        patch("gpt2")


def test_a_model_with_nothing_to_swap_is_refused():
    with pytest.raises(
        ValueError, match=r"model: found nothing to swap in Linear \(looked for norm, activation, rotary, loss\)"
    ):
        patch(nn.Linear(2, 2))


# --- however the process is set up ----------------------------------------------------------------------------------

SETTINGS = {
    **{f"default dtype {d}": lambda d=d: default_dtype(getattr(torch, d)) for d in ("bfloat16", "float16", "float64")},
    "default device meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "a forced backend": lambda: backend("triton"),
    "deterministic algorithms": lambda: deterministic(),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2"])
def test_the_same_modules_are_swapped_whatever_the_setting_of_the_process(name, setting):
    expected, model = patch(build(name)), build(name)
    dtype = torch.get_default_dtype()
    with SETTINGS[setting]():
        inside = torch.get_default_dtype()
        assert patch(model) == expected
        assert torch.get_default_dtype() == inside
    assert torch.get_default_dtype() == dtype


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2"])
def test_a_model_made_under_a_setting_is_swapped_as_any(name, setting):
    expected = patch(build(name))
    with SETTINGS[setting]():
        assert patch(build(name)) == expected


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_a_model_on_the_meta_device_is_swapped_as_any(name):
    expected = patch(build(name))
    with torch.device("meta"):
        model = build(name)
    assert patch(model) == expected
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_model_is_patched_on_the_meta_device_and_filled_later():
    original = build("Llama")
    with torch.device("meta"):
        model = build("Llama")
    patch(model)
    model.to_empty(device="cpu").load_state_dict(original.state_dict())
    for ours, theirs in zip(model.buffers(), original.buffers()):
        ours.copy_(theirs)
    with backend("torch"):
        torch.testing.assert_close(model(**batch()).loss, original(**batch()).loss)


def test_patching_draws_nothing_from_the_random_generators():
    model = build("Llama")
    torch.manual_seed(3)
    patch(model)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), after)


# --- the loss and its logits ----------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    """(patched, the same model as it was)"""
    model = build("Llama")
    original = copy.deepcopy(model)
    patch(model)
    return model, original


def test_logits_are_not_made_in_training_and_are_given_everywhere_else(pair):
    model, _ = pair
    x = batch()
    model.lm_head.register_forward_hook(lambda *_: None)
    assert isinstance(model(**x).logits, torch.Tensor)  # a hook wants to see them
    model.lm_head._forward_hooks.clear()
    assert isinstance(model(**x).logits, LazyLogits)
    for logits in (model(x["input_ids"]).logits, model(x["input_ids"], logits_to_keep=5).logits, model.eval()(**x).logits):
        assert isinstance(logits, torch.Tensor)


def test_without_the_loss_logits_are_given_in_training():
    model = build("Llama")
    patch(model, loss=False)
    assert model(**batch()).logits.shape == (2, 13, 61)


@pytest.mark.parametrize("options", [
    {"num_items_in_batch": 9}, {"num_items_in_batch": torch.tensor(9)}, {"ignore_index": 5},
    {"shift_labels": tokens(seed=8)}, {"logits_to_keep": 13}, {"return_dict": False}, {"output_hidden_states": True},
    {"use_cache": True}, {"labels": None},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_every_option_of_the_forward_means_what_it_meant(pair, options):
    ours, theirs = (model(**{**batch(ignored=0), **options}) for model in pair)
    assert type(ours) is type(theirs)
    if isinstance(ours, tuple):
        torch.testing.assert_close(ours[0], theirs[0])
        return
    assert set(theirs) == set(ours)
    torch.testing.assert_close(*(m.logits.tensor() if isinstance(m.logits, LazyLogits) else m.logits for m in (ours, theirs)))
    if options.get("labels", True) is not None:
        torch.testing.assert_close(ours.loss, theirs.loss)
    for a, b in zip(ours.hidden_states or (), theirs.hidden_states or ()):
        torch.testing.assert_close(a, b)


def test_arguments_may_be_given_by_position(pair):
    x = batch()
    mask = torch.ones_like(x["input_ids"])
    mask[0, :4] = 0
    ours, theirs = (model(x["input_ids"], mask, None, None, None, x["labels"]).loss for model in pair)
    torch.testing.assert_close(ours, theirs)


def test_all_labels_ignored_is_nan_as_before(pair):
    for model in pair:
        assert model(**batch(ignored=13, batch=1)).loss.isnan()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_loss_function_of_the_users_own_is_called(when):
    model = build("Llama")
    if when == "after":
        patch(model)
    model.loss_function = lambda logits, labels, **_: logits.square().mean()
    if when == "before":
        assert patch(model)["loss"] == []
    out = model(**batch())
    torch.testing.assert_close(out.loss, out.logits.square().mean())


class WithItsOwnLoss(transformers.LlamaForCausalLM):
    loss_type = None

    @property
    def loss_function(self):
        return lambda logits, labels, **_: 3 * F.cross_entropy(logits[:, :-1].reshape(-1, 61), labels[:, 1:].reshape(-1))


def test_a_loss_function_of_the_class_is_called():
    model = WithItsOwnLoss(transformers.LlamaConfig(**SMALL)).train()
    plain = model(**batch())
    assert patch(model)["loss"] == [""]
    ours = model(**batch())
    assert isinstance(ours.logits, LazyLogits)
    torch.testing.assert_close(ours.loss, plain.loss)


def test_a_lora_on_the_head_gets_its_gradient():
    peft = pytest.importorskip("peft")
    model = build("Llama")
    patch(model)
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).train()
    out = wrapped(**batch())
    out.loss.backward()
    assert isinstance(out.logits, torch.Tensor)
    assert all(p.grad.abs().max() > 0 for name, p in wrapped.named_parameters() if "lora" in name)


# --- undoing, copying, saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_unpatching_restores_every_bit(name):
    model, x = build(name), batch()
    classes, attributes = [type(m) for m in model.modules()], [list(m.__dict__) for m in model.modules()]
    before, keys = step(model, x), list(model.state_dict())
    patch(model)
    step(model, x)
    assert list(model.state_dict()) == keys
    unpatch(model)
    after = step(model, x)
    assert [type(m) for m in model.modules()] == classes
    assert [list(m.__dict__) for m in model.modules()] == attributes
    for a, b in zip((*before[:2], *before[2].values()), (*after[:2], *after[2].values())):
        assert torch.equal(a, b)


def test_unpatching_what_is_not_patched_is_harmless():
    unpatch(build("Llama"))


def test_what_is_wrapped_after_patching_must_be_unwrapped_before_unpatching():
    model = build("Llama")
    patch(model)
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x)
    with pytest.raises(ValueError, match=r"model: model.norm was wrapped after patch\(\); undo that first"):
        unpatch(model)
    assert isinstance(model, patching._Swapped)
    del model.model.norm.forward
    unpatch(model)


def test_other_models_of_the_process_do_not_change(monkeypatch):
    other, x = build("Llama"), batch()
    before, rotary = step(other, x), modeling_llama.apply_rotary_pos_emb
    patch(build("Llama"))
    assert modeling_llama.apply_rotary_pos_emb is rotary
    after = step(other, x)
    assert torch.equal(after[1], before[1])
    assert all(torch.equal(after[2][name], grad) for name, grad in before[2].items())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 3"])
def test_a_copy_is_patched_too_and_apart(name, duplicate):
    model, x = build(name), batch()
    patch(model)
    other = duplicate(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(other(**x).loss, model(**x).loss)
    unpatch(other)
    assert isinstance(model, patching._Swapped)
    assert not isinstance(other, patching._Swapped)


def test_a_patched_model_is_saved_as_what_it_was(tmp_path, pair):
    model, original = pair
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").train()
    assert type(loaded) is transformers.LlamaForCausalLM
    assert torch.equal(loaded(**batch()).loss, original(**batch()).loss)


def test_names_and_signature_stay(pair):
    model, original = pair
    assert repr(model) == repr(original)
    assert inspect.signature(model.forward) == inspect.signature(original.forward)
    assert isinstance(model.model.norm, modeling_llama.LlamaRMSNorm)


# --- inside other machinery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2", "Gemma 3"])
def test_it_compiles_without_a_graph_break(name):
    model, x = build(name), batch()
    plain = step(model, x)
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with backend("torch"):
        loss = compiled(**x).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), plain[1][0])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[2][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model, x = build(name), batch()
    patch(model)
    before = step(model, x)
    model.gradient_checkpointing_enable()
    after = step(model, x)
    for parameter, grad in before[2].items():
        torch.testing.assert_close(after[2][parameter], grad)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 3"])
def test_it_generates_the_same_tokens(name, cache):
    model = build(name).eval()
    ids, mask = tokens(), torch.ones(2, 13, dtype=torch.long)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    before = model.generate(ids, **options)
    patch(model)
    assert torch.equal(model.generate(ids, **options), before)


@pytest.mark.parametrize("first", ["patch", "peft"])
def test_lora_trains_the_same(first):
    peft = pytest.importorskip("peft")

    def wrapped(patched):
        model = build("Llama")
        if patched and first == "patch":
            patch(model)
        torch.manual_seed(1)
        targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).train()
        if patched and first == "peft":
            swapped = patch(model)
            assert len(swapped["norm"]) == 5
            assert len(swapped["activation"]) == len(swapped["rotary"]) == 2
            assert swapped["loss"] == ["base_model.model"]
        return model

    x = batch()
    plain, ours = wrapped(False), wrapped(True)
    truth = in_float64(plain, x)
    assert_steps_agree(step(ours, x), step(plain, x), truth)
    assert isinstance(ours(**x).logits, LazyLogits)


def test_a_norm_kept_in_float32_in_a_bfloat16_model_keeps_its_output_dtype():
    model = build("Llama").bfloat16()
    model.model.norm.float()
    x = torch.randn(2, 3, 32).bfloat16()
    before = model.model.norm(x)
    patch(model)
    with backend("torch"):
        assert model.model.norm(x).dtype == torch.float32
        assert torch.equal(model.model.norm(x), before)


def trained(patched, out, **options):
    """(the Trainer after four steps on ragged labels, its log)"""
    model = build("Llama")
    if patched:
        patch(model)
    generator = torch.Generator().manual_seed(7)
    rows = []
    for i in range(24):
        ids = torch.randint(3, 61, (16,), generator=generator)
        labels = ids.clone()
        labels[: i % 7] = -100
        rows.append({"input_ids": ids, "labels": labels})
    arguments = transformers.TrainingArguments(
        out, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=3, learning_rate=1e-3, logging_steps=1,
        eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, seed=0, **options,
    )  # fmt: skip
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8], compute_metrics=metrics)
    trainer.train()
    assert seen == [(8, 16, 61)] * 2
    return trainer


@pytest.mark.parametrize("options", [
    {}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}, {"bf16": True},
], ids=lambda options: next(iter(options), "plain"))  # fmt: skip
def test_trainer_logs_the_same_losses_gradients_and_metrics(tmp_path, options):
    pytest.importorskip("accelerate")
    plain, ours = (trained(patched, tmp_path, **options) for patched in (False, True))
    tolerance = {"rtol": 2e-2, "atol": 0.0} if "bf16" in options else {"rtol": 1e-4, "atol": 1e-6}
    for a, b in zip(ours.state.log_history, plain.state.log_history, strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
            assert (key in a) == (key in b)
            if key in a:
                torch.testing.assert_close(a[key], b[key], **tolerance)


def test_trainers_mixed_precision_must_be_undone_before_unpatching(tmp_path):
    pytest.importorskip("accelerate")
    trainer = trained(True, tmp_path, bf16=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM was wrapped after patch"):
        unpatch(trainer.model)
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    unpatch(trainer.model)
    assert type(trainer.model) is transformers.LlamaForCausalLM


# --- training on real text ------------------------------------------------------------------------------------------

BYTES = {
    "Llama": {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "eos_token_id": None},
    "GPT-2": {"vocab_size": 256, "n_embd": 64},
}


def loss_curve(name, data, seed, how=None):
    """Losses of 50 steps of AdamW on random pieces of the text; weights and pieces come from the seed. how: patched, and the
    backend."""
    settings = {**FAMILIES[name][2], **BYTES[name]}
    config = getattr(transformers, FAMILIES[name][1])(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, FAMILIES[name][0])(config).train()
    if how is not None:
        patch(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with backend(how or "auto"):
        for _ in range(50):
            ids = torch.stack([data[i : i + 64] for i in torch.randint(len(data) - 64, (16,)).tolist()])
            loss = model(input_ids=ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", pytest.param("GPT-2", marks=pytest.mark.full)])
def test_fifty_steps_on_wikitext_stay_within_the_spread_of_seeds(name, wikitext):
    """The spread at a step is the standard deviation of the unpatched losses of four seeds at that step. At every step the
    patched model is nearer than that to the unpatched one of the same seed."""
    data = torch.frombuffer(bytearray((wikitext / "train.txt").read_bytes()[:500_000]), dtype=torch.uint8).long()
    plain = torch.stack([loss_curve(name, data, seed) for seed in range(4)])
    assert plain[:, -1].max() < 0.7 * plain[:, 0].min()  # they learn
    for how in HOW:
        ours = loss_curve(name, data, 0, how)
        distance, spread = (ours - plain[0]).abs(), plain.std(0)
        print(f"{name}, {how}: distance at most {distance.max():.1e}, spread at least {spread.min():.1e}")
        assert (distance < spread).all()
