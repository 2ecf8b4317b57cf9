"""Hugging Face interchange: the same logits here and in transformers, both ways. None reaches the network."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import huggingface_hub
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig
from transformers.models.llama import modeling_llama

from wikigpt import checkpoint
from wikigpt import hub as hub_module
from wikigpt.data import BPETokenizer, ByteTokenizer, WordTokenizer, tokenizer_from_json
from wikigpt.errors import UserError
from wikigpt.hub import from_pretrained, load_tokenizer, save_pretrained
from wikigpt.model import GPT, GPTConfig

VOCAB, CONTEXT = 97, 24

GPT2: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "n_inner": {"n_inner": 40},
    "exact gelu": {"activation_function": "gelu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    "reordered": {"reorder_and_upcast_attn": True},
}
LLAMA: dict[str, dict[str, Any]] = {
    "plain": {},
    "GQA": {"num_key_value_heads": 2},
    "MQA": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 10},
    "attention_bias": {"attention_bias": True, "num_key_value_heads": 2},
    "mlp_bias": {"mlp_bias": True},
    "all biases": {"attention_bias": True, "mlp_bias": True},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "epsilon": {"rms_norm_eps": 1e-2},
}
CASES = [("gpt2", name) for name in GPT2] + [("llama", name) for name in LLAMA]
OURS: dict[str, dict[str, Any]] = {
    "gpt2": {"bias": True},
    "gpt2 untied": {"tie_embeddings": False},
    "gpt2 without bias": {"bias": False},
    "gpt2 exact gelu": {"activation": "gelu", "intermediate_size": 44, "norm_eps": 1e-2},
    "llama": {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False},
    "llama all else": {
        "position": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "n_kv_head": 2,
        "head_dim": 10,
        "tie_embeddings": False,
        "intermediate_size": 44,
        "rope_theta": 500.0,
        "norm_eps": 1e-2,
    },
}
LLAMA_LIKE: dict[str, Any] = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu"}


@pytest.fixture
def exact(monkeypatch):
    """transformers rounds RMSNorm and the rotary angles to float32 in a float64 model; here it does not."""

    def rms_norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotary(self, x, position_ids):
        parameters, dim = self.config.rope_parameters, self.config.head_dim
        inv_freq = parameters["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = position_ids[..., None].double() * torch.cat((inv_freq, inv_freq))
        return angle.cos(), angle.sin()

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", rms_norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary)


def randomised(model, seed=0):
    """Every parameter random around 0 (norm weights around 1), so that none of them can be lost unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if ("norm" in name and name.endswith("weight")) or "ln_" in name else 0.0
            p.copy_(centre + 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def theirs(kind, dtype=torch.float64, **changes):
    """A small random model of transformers."""
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
        config: Any = GPT2Config(vocab_size=VOCAB, bos_token_id=1, eos_token_id=1, **(sizes | changes))
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=CONTEXT, **(sizes | changes))
    return randomised(AutoModelForCausalLM.from_config(config).to(dtype))


def ours(**changes):
    config = {
        "vocab_size": VOCAB,
        "context_length": CONTEXT,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        **changes,
    }
    return randomised(GPT(GPTConfig(**config)).double())


def idx(seed=1):
    return torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model):
    output = model(idx())
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_same_logits(a, b, rtol=1e-10):
    a, b = logits(a), logits(b)
    error = ((a - b).norm() / b.norm()).item()
    assert error < rtol, f"relative error {error:.1e}"


def edit(path, **changes):
    """Change entries of a JSON file; a value of ... removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def load_both(directory):
    """The directory in transformers, with all that it says about keys."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    return model.eval()


# ---- from transformers ----


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_a_model_of_transformers_gives_the_same_logits_here(tmp_path, exact, kind, case):
    model = theirs(kind, **{"gpt2": GPT2, "llama": LLAMA}[kind][case])
    model.save_pretrained(tmp_path)
    assert_same_logits(from_pretrained(str(tmp_path), dtype=torch.float64), model)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logits_agree_in_float32_with_transformers_as_it_is(tmp_path, kind):
    model = theirs(kind, torch.float32)
    model.save_pretrained(tmp_path)
    assert_same_logits(from_pretrained(str(tmp_path)), model, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("size", ["20KB", "5GB"])
def test_shards_and_a_single_file_load_alike(tmp_path, exact, kind, size):
    model = theirs(kind)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "20KB")
    assert_same_logits(from_pretrained(str(tmp_path), dtype=torch.float64), model)


def test_pytorch_model_bin_loads(tmp_path, exact):
    model = theirs("gpt2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_logits(from_pretrained(str(tmp_path), dtype=torch.float64), model)


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    theirs("gpt2").config.save_pretrained(tmp_path)
    torch.save({"run": os.getcwd}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="damaged or no file of weights"):
        from_pretrained(str(tmp_path))


def test_the_names_of_the_hubs_gpt2_load(tmp_path, exact):
    """No prefix, causal masks among the weights, as in the file of 2019."""
    model = theirs("gpt2")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    mask = torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.float64)
    save_file(
        {**weights, "h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)},
        tmp_path / "model.safetensors",
    )
    assert_same_logits(from_pretrained(str(tmp_path), dtype=torch.float64), model)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_config_that_leaves_defaults_out_means_them(tmp_path, exact, kind):
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    defaults = {
        "gpt2": "activation_function n_inner layer_norm_epsilon tie_word_embeddings resid_pdrop "
        "scale_attn_weights scale_attn_by_inverse_layer_idx add_cross_attention reorder_and_upcast_attn",
        "llama": "num_key_value_heads head_dim rms_norm_eps hidden_act tie_word_embeddings "
        "attention_bias mlp_bias rope_parameters attention_dropout",
    }
    edit(tmp_path / "config.json", **dict.fromkeys(defaults[kind].split(), ...))
    assert_same_logits(from_pretrained(str(tmp_path), dtype=torch.float64), model)


def test_rope_theta_of_transformers_4_is_read(tmp_path, exact):
    model = theirs("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    model.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", rope_parameters=..., rope_theta=500.0, rope_scaling=None)
    assert_same_logits(from_pretrained(str(tmp_path), dtype=torch.float64), model)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_float32_without_a_change(tmp_path, stored):
    model = theirs("llama", stored)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(str(tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.wte.weight, model.model.embed_tokens.weight.float())


def test_the_option_dtype_is_the_dtype_of_every_parameter(tmp_path):
    theirs("gpt2").save_pretrained(tmp_path)
    assert {p.dtype for p in from_pretrained(str(tmp_path), dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_tied_embeddings_are_one_parameter(tmp_path):
    theirs("gpt2").save_pretrained(tmp_path)
    model = from_pretrained(str(tmp_path))
    assert model.head.weight is model.wte.weight


def test_a_copy_of_the_tied_embedding_in_the_file_is_no_problem(tmp_path, exact):
    model = theirs("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    assert_same_logits(from_pretrained(str(tmp_path), dtype=torch.float64), model)


def test_overrides_reach_the_config(tmp_path):
    theirs("llama").save_pretrained(tmp_path)
    config = from_pretrained(str(tmp_path), backend="reference", dropout=0.25, context_length=8).config
    assert (config.backend, config.dropout, config.context_length) == ("reference", 0.25, 8)


def test_an_override_that_would_change_the_model_is_refused(tmp_path):
    theirs("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"overrides: got 'n_head', allowed are"):
        from_pretrained(str(tmp_path), n_head=2)


def test_loading_leaves_the_random_generator_alone(tmp_path):
    theirs("gpt2").save_pretrained(tmp_path)
    before = torch.get_rng_state()
    from_pretrained(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_is_in_eval_mode_and_trains(tmp_path):
    theirs("llama", torch.float32).save_pretrained(tmp_path)
    model = from_pretrained(str(tmp_path))
    assert not model.training
    model(idx(), idx(2)).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


# ---- to transformers ----


@pytest.mark.parametrize("case", OURS)
def test_a_saved_model_gives_the_same_logits_in_transformers(tmp_path, exact, case):
    model = ours(**OURS[case])
    save_pretrained(model, tmp_path)
    assert_same_logits(load_both(tmp_path), model)


@pytest.mark.parametrize("case", OURS)
def test_a_saved_model_comes_back_with_its_logits(tmp_path, case):
    model = ours(**OURS[case])
    model.save_pretrained(str(tmp_path))
    assert_same_logits(GPT.from_pretrained(str(tmp_path), dtype=torch.float64), model)


@pytest.mark.parametrize("case", OURS)
def test_a_saved_model_comes_back_with_its_config(tmp_path, case):
    model = ours(**OURS[case], dropout=0.125)
    save_pretrained(model, tmp_path)
    expected = model.config.to_dict() | ({"bias": True} if case == "gpt2 without bias" else {})
    assert from_pretrained(str(tmp_path)).config.to_dict() == expected


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_transformers_to_wikigpt_to_transformers_is_the_same_model(tmp_path, exact, kind, case):
    model = theirs(kind, **{"gpt2": GPT2, "llama": LLAMA}[kind][case])
    model.save_pretrained(tmp_path / "a")
    save_pretrained(from_pretrained(str(tmp_path / "a"), dtype=torch.float64), tmp_path / "b")
    assert_same_logits(load_both(tmp_path / "b"), model)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_saved_weights_have_the_names_that_transformers_writes(tmp_path, kind):
    model = theirs(kind)
    model.save_pretrained(tmp_path / "a")
    save_pretrained(from_pretrained(str(tmp_path / "a"), dtype=torch.float64), tmp_path / "b")
    a, b = (load_file(tmp_path / side / "model.safetensors") for side in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_keeps_its_dtype_and_says_so(tmp_path, dtype):
    save_pretrained(ours().to(dtype), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["dtype"] == content["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype


def test_saving_again_needs_overwrite_replaces_and_leaves_no_temporary_file(tmp_path):
    first = ours()
    save_pretrained(first, tmp_path)
    second = randomised(ours(), seed=5)
    with pytest.raises(UserError, match=r"is not empty \(config.json, model.safetensors\); name another directory, or add"):
        save_pretrained(second, tmp_path)
    assert_same_logits(from_pretrained(str(tmp_path), dtype=torch.float64), first)
    save_pretrained(second, tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert_same_logits(from_pretrained(str(tmp_path), dtype=torch.float64), second)


def test_overwriting_leaves_the_users_files_and_nothing_of_another_model(tmp_path):
    theirs("gpt2").save_pretrained(tmp_path, max_shard_size="20KB")
    for name in ("README.md", "pytorch_model.bin", "vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / ".git").mkdir()
    save_pretrained(model := randomised(ours(), seed=5), tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md", ".git"}
    assert_same_logits(from_pretrained(str(tmp_path), dtype=torch.float64), model)
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", ["wiki-gpt.pth", "last.pth"])
def test_a_run_directory_is_no_place_for_an_export(tmp_path, name):
    (tmp_path / name).write_bytes(b"weights")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds a run or a checkpoint"):
            save_pretrained(ours(), tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_no_place_for_an_export(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file; name a directory"):
        save_pretrained(ours(), tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("written", range(6))
def test_an_export_that_is_interrupted_while_it_writes_leaves_what_was_there(tmp_path, monkeypatch, written):
    """Six files, the interrupt before one of them."""
    model = ours(vocab_size=257)
    save_pretrained(model, tmp_path / "old")
    write, files = hub_module.write_bytes, []

    def interrupted(path, content):
        if len(files) == written:
            raise KeyboardInterrupt
        files.append(path)
        write(path, content)

    monkeypatch.setattr(hub_module, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(ours(vocab_size=257), tmp_path / "new", ByteTokenizer())
    assert not (tmp_path / "new").exists()
    files.clear()
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(randomised(ours(vocab_size=257), seed=5), tmp_path / "old", ByteTokenizer(), overwrite=True)
    assert {path.name for path in (tmp_path / "old").iterdir()} == {"config.json", "model.safetensors"}
    assert_same_logits(from_pretrained(str(tmp_path / "old"), dtype=torch.float64), model)


@pytest.mark.parametrize("moved", range(6))
def test_a_process_killed_while_files_take_their_places_leaves_no_half_model_that_loads(tmp_path, monkeypatch, moved):
    save_pretrained(ours(vocab_size=257), tmp_path)
    replace, places = os.replace, []

    def killed(source, target):
        if not Path(source).name.startswith("."):  # not those of write_atomically
            places.append(target)
            if len(places) > moved:
                raise SystemExit
        replace(source, target)

    monkeypatch.setattr(hub_module.os, "replace", killed)
    monkeypatch.setattr(hub_module.shutil, "rmtree", lambda *_, **__: None)  # nobody cleans up
    second = randomised(ours(vocab_size=257), seed=5)
    with contextlib.suppress(SystemExit):
        save_pretrained(second, tmp_path, ByteTokenizer(), overwrite=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"has no config\.json"):
        from_pretrained(str(tmp_path))
    save_pretrained(second, tmp_path, ByteTokenizer(), overwrite=True)  # the next one removes what is left
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert_same_logits(from_pretrained(str(tmp_path), dtype=torch.float64), second)


def test_a_full_disk_during_an_export_is_one_line(tmp_path, monkeypatch):
    def full(path, content):
        raise UserError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(hub_module, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_pretrained(ours(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_transformers_model_saved_by_us_generates_what_greedy_decoding_here_gives(tmp_path, exact):
    model = ours(**OURS["llama"])
    save_pretrained(model, tmp_path)
    expected = idx()[:1, :4]
    for _ in range(8):
        with torch.no_grad():
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    prompt = expected[:, :4]
    got = load_both(tmp_path).generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8, pad_token_id=0
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"position": "alibi"}, "position='alibi'"),
        ({"norm": "rmsnorm"}, "norm='rmsnorm'"),
        ({"activation": "swiglu"}, "activation='swiglu'"),
        ({"n_kv_head": 2}, "n_kv_head=2"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"position": "rotary"}, "norm='layernorm', activation='gelu_tanh'"),
        ({**LLAMA_LIKE, "norm": "layernorm"}, "norm='layernorm'"),
        ({**LLAMA_LIKE, "n_embd": 30, "head_dim": 8}, "n_embd=30"),
    ],
)
def test_a_model_that_fits_no_layout_is_refused_by_the_setting_that_does_not(tmp_path, changes, named):
    model = GPT(GPTConfig(vocab_size=VOCAB, **{"n_layer": 1, "n_head": 4, "n_embd": 32, **changes}))
    with pytest.raises(UserError, match=r"there are two Hugging Face layouts: GPT-2 .* and Llama") as error:
        save_pretrained(model, tmp_path / "new")
    assert named in str(error.value).split(" cannot be saved")[0]
    assert not (tmp_path / "new").exists()


# ---- errors of loading ----


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("gpt2", {"model_type": "mamba"}, "model_type is 'mamba'"),
        ("gpt2", {"model_type": ...}, "model_type is None"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("gpt2", {"n_embd": ...}, "lacks n_embd"),
        ("gpt2", {"n_layer": 0}, "n_layer: got 0"),
        ("gpt2", {"n_layer": "two"}, "makes no model"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters.rope_type is 'yarn'",
        ),
        (
            "llama",
            {"rope_parameters": ..., "rope_scaling": {"type": "linear"}},
            "rope_scaling.rope_type is 'linear'",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_a_gpt_cannot_express_is_refused_by_the_key(tmp_path, kind, changes, named):
    theirs(kind).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(UserError) as error:
        from_pretrained(str(tmp_path))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("gpt2", "transformer.h.1.mlp.c_fc.bias"), ("llama", "model.layers.1.mlp.up_proj.weight")],
)
def test_missing_weights_are_listed(tmp_path, kind, name):
    theirs(kind).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"lacks weights .*: {name}; use"):
        from_pretrained(str(tmp_path))


def test_unknown_weights_are_listed(tmp_path):
    theirs("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has unknown weights .*: model\.layers\.0\.self_attn\.q_norm\.weight; use"):
        from_pretrained(str(tmp_path))


def test_a_weight_of_another_shape_is_named(tmp_path):
    theirs("gpt2").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", n_inner=40)
    with pytest.raises(UserError, match=r"mlp\.c_fc\.\w+ has shape .*, by config.json it is"):
        from_pretrained(str(tmp_path))


def test_a_head_that_is_not_the_tied_embedding_is_refused(tmp_path):
    theirs("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight is not the token embedding"):
        from_pretrained(str(tmp_path))


def test_a_truncated_file_is_damaged(tmp_path):
    theirs("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        from_pretrained(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path):
    theirs("gpt2").save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match=r"names model-00002-of-\d+\.safetensors, which is not there"):
        from_pretrained(str(tmp_path))


@pytest.mark.parametrize(("left", "named"), [("config.json", "has no weights"), ("model.safetensors", "has no config.json")])
def test_a_directory_that_lacks_a_file_says_which(tmp_path, left, named):
    theirs("gpt2").save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != left:
            path.unlink()
    with pytest.raises(UserError, match=named):
        from_pretrained(str(tmp_path))


def test_a_file_is_no_source(tmp_path):
    (tmp_path / "weights").write_bytes(b"")
    with pytest.raises(UserError, match="is a file: give the directory"):
        from_pretrained(str(tmp_path / "weights"))


def test_json_that_is_none_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        from_pretrained(str(tmp_path))


# ---- the Hub ----


def test_without_a_network_the_error_names_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"no directory 'gpt2'.*check the name, connect, or .*hf download gpt2") as error:
        from_pretrained("gpt2")
    assert "\n" not in str(error.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of folders: tmp_path/<name>. Records what is asked for."""
    asked = []

    def snapshot_download(name, allow_patterns, **options):
        asked.append(allow_patterns)
        folder = tmp_path / "cache" / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in (tmp_path / name).iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                (folder / path.name).write_bytes(path.read_bytes())
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_name_on_the_hub_loads_its_safetensors_alone(tmp_path, hub, exact):
    model = theirs("gpt2")
    model.save_pretrained(tmp_path / "tiny")
    for name in ("pytorch_model.bin", "tf_model.h5"):
        (tmp_path / "tiny" / name).write_bytes(b"large")
    assert_same_logits(from_pretrained("tiny", dtype=torch.float64), model)
    assert {p.name for p in (tmp_path / "cache/tiny").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_a_name_on_the_hub_without_safetensors_loads_its_bin(tmp_path, hub, exact):
    model = theirs("gpt2")
    model.config.save_pretrained(tmp_path / "tiny")
    torch.save(model.state_dict(), tmp_path / "tiny/pytorch_model.bin")
    assert_same_logits(from_pretrained("tiny", dtype=torch.float64), model)


def test_the_tokenizer_of_a_name_on_the_hub_downloads_no_weights(tmp_path, hub):
    save_pretrained(ours(vocab_size=257), tmp_path / "tiny", ByteTokenizer())
    assert isinstance(load_tokenizer("tiny"), ByteTokenizer)
    assert not any("safetensors" in pattern or "bin" in pattern for patterns in hub for pattern in patterns)


def test_an_unreachable_hub_leaves_what_was_downloaded_before(tmp_path, monkeypatch, exact):
    model = theirs("gpt2")
    model.save_pretrained(tmp_path / "tiny")

    def unreachable(url, timeout):
        raise OSError("no route to host")

    def snapshot_download(name, allow_patterns, local_files_only=False, **options):
        assert local_files_only
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same_logits(from_pretrained("tiny", dtype=torch.float64), model)


# ---- tokenizers ----

TEXT = (
    " \n = Cats = \n \n The cat sat on the mat . \n The <unk> sat ; don 't . \n"
    "def f ( x ) :\n    return x  # naïve 日本\n\n\n The mat .\n"
) * 3
TOKENIZERS: dict[str, Any] = {
    "word": WordTokenizer.train(TEXT, min_count=2),
    "bpe": BPETokenizer.train(TEXT, 300),
    "byte": ByteTokenizer(),
}
ANY_TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("\n\r\t \x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2028\u3000<>"),
    )
)
TEXTS = st.lists(st.one_of(ANY_TEXT, st.sampled_from(["<eos>", "<unk>", " ", "\n", "cat", "The", " sat"]))).map("".join)


def loaded_tokenizer(directory):
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For each kind of tokenizer: the directory of a saved model, and what transformers loads from it."""
    both = {}
    for kind, tokenizer in TOKENIZERS.items():
        directory = tmp_path_factory.mktemp(kind)
        save_pretrained(ours(vocab_size=tokenizer.vocab_size), directory, tokenizer)
        both[kind] = directory, AutoTokenizer.from_pretrained(directory)
    return both


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_transformers_gives_the_ids_that_we_give(saved, kind, text):
    assert saved[kind][1](text)["input_ids"] == TOKENIZERS[kind].encode(text).tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_transformers_gives_the_text_that_we_give(saved, kind, data):
    ours_ = TOKENIZERS[kind]
    special = (ours_.eos_id, getattr(ours_, "unk_id", 0))
    ids = data.draw(st.lists(st.one_of(st.integers(0, ours_.vocab_size - 1), st.sampled_from(special))))
    if kind != "word":  # ours leaves <eos> out, there it is skipped by option
        ids = [i for i in ids if i != ours_.eos_id]
    assert saved[kind][1].decode(ids) == ours_.decode(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_transformers_knows_the_special_tokens_and_the_length(saved, kind):
    tokenizer = saved[kind][1]
    unk_id = getattr(TOKENIZERS[kind], "unk_id", None)
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (TOKENIZERS[kind].eos_id, unk_id)
    assert (tokenizer.model_max_length, len(tokenizer)) == (CONTEXT, TOKENIZERS[kind].vocab_size)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_transformers_makes_of_a_text_feeds_its_model(saved, kind):
    """GPT-2 of transformers adds token_type_ids to the embeddings, so there must be none, in any version."""
    directory, tokenizer = saved[kind]
    settings_ = json.loads((directory / "tokenizer_config.json").read_text())
    assert settings_["model_input_names"] == ["input_ids", "attention_mask"]
    batch = tokenizer("The cat sat", return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        expected = from_pretrained(str(directory), dtype=torch.float64)(batch["input_ids"])
        torch.testing.assert_close(load_both(directory)(**batch).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_generation_stops_at_our_end_of_text(saved, kind):
    generation = transformers.GenerationConfig.from_pretrained(saved[kind][0])
    assert generation.eos_token_id == generation.pad_token_id == TOKENIZERS[kind].eos_id


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_our_tokenizer_comes_back_exactly(saved, kind):
    loaded = loaded_tokenizer(saved[kind][0])
    assert loaded.fingerprint() == TOKENIZERS[kind].fingerprint()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_load_model_gives_a_saved_model_and_its_tokenizer(saved, kind):
    loaded = checkpoint.load_model(saved[kind][0], backend="reference")
    assert loaded.model.config.backend == "reference"
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.fingerprint() == TOKENIZERS[kind].fingerprint()


def test_a_tokenizer_with_more_types_than_the_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="the tokenizer has 257 types, the model 97"):
        save_pretrained(ours(), tmp_path / "new", ByteTokenizer())
    assert not (tmp_path / "new").exists()


def test_a_directory_without_a_tokenizer_has_none(tmp_path):
    save_pretrained(ours(), tmp_path)
    assert load_tokenizer(tmp_path) is None


# ---- tokenizers of others ----


@pytest.fixture(params=["tokenizer.json", "vocab.json and merges.txt"])
def gpt2_tokenizer(request, tmp_path):
    """A directory as the Hub has it for GPT-2, and transformers' tokenizer for it."""
    bpe = TOKENIZERS["bpe"]
    vocab = {token: i for i, token in enumerate([*bpe.vocab, "<|endoftext|>"])}
    tokenizer = transformers.GPT2Tokenizer(vocab=vocab, merges=[*map(tuple, bpe.merges)])  # type: ignore[list-item]
    if request.param == "tokenizer.json":
        tokenizer.save_pretrained(tmp_path)
    else:
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in bpe.merges))
    return tmp_path, tokenizer


@pytest.mark.parametrize("text", [TEXT, "a\n\n\n  b\r\n", "cat<|endoftext|>sat", "", "😀 é"])
def test_a_gpt2_tokenizer_gives_the_ids_of_transformers(gpt2_tokenizer, text):
    directory, expected = gpt2_tokenizer
    assert loaded_tokenizer(directory).encode(text).tolist() == expected(text)["input_ids"]


def test_a_gpt2_tokenizer_decodes_what_it_encodes(gpt2_tokenizer):
    tokenizer = loaded_tokenizer(gpt2_tokenizer[0])
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_gpt2_tokenizer_knows_its_end_of_text_and_size(gpt2_tokenizer):
    tokenizer = loaded_tokenizer(gpt2_tokenizer[0])
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (
        len(TOKENIZERS["bpe"].vocab),
        len(TOKENIZERS["bpe"].vocab) + 1,
    )


def test_a_tokenizer_of_the_hub_survives_a_checkpoint(gpt2_tokenizer):
    tokenizer = loaded_tokenizer(gpt2_tokenizer[0])
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert again.fingerprint() == tokenizer.fingerprint()


def test_a_tokenizer_of_the_hub_is_saved_again(gpt2_tokenizer, tmp_path):
    directory, expected = gpt2_tokenizer
    tokenizer = loaded_tokenizer(directory)
    save_pretrained(ours(vocab_size=320), tmp_path / "new", tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new")
    text = TEXT + "<|endoftext|>"
    assert loaded(text)["input_ids"] == expected(text)["input_ids"]
    assert loaded.eos_token_id == tokenizer.eos_id


@pytest.mark.parametrize(
    ("settings_", "config"),
    [
        ({"eos_token": "cat"}, {"eos_token_id": 5}),
        ({"eos_token": {"content": "cat", "special": True}}, {"eos_token_id": 5}),
        ({}, {"eos_token_id": 1}),
        (None, {"eos_token_id": [1, 5]}),
    ],
)
def test_the_end_of_text_is_what_the_directory_says(tmp_path, settings_, config):
    from tokenizers import Tokenizer, models

    model = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "<|endoftext|>": 2}, unk_token="the"))
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    if settings_ is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    assert loaded_tokenizer(tmp_path).eos_id == 1


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"the": 0}, unk_token="the")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="names no end-of-text token: set eos_token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "wikigpt_tokenizer.json"])
def test_a_damaged_tokenizer_is_named(tmp_path, name):
    (tmp_path / name).write_text('{"kind": ')
    with pytest.raises(UserError, match=name):
        load_tokenizer(tmp_path)
