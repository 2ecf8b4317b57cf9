"""attn_implementation="wikigpt" in Hugging Face transformers: the same numbers as "eager", for every way a model masks."""

import copy
import functools
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AttentionInterface, DynamicCache, StaticCache, masking_utils

from tests.conftest import assert_as_accurate_as
from wikigpt import kernels
from wikigpt.integrations import transformers as integration
from wikigpt.integrations.transformers import DescribedMask, register, wikigpt_attention_forward, wikigpt_mask

VOCAB, LENGTH = 61, 13
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
ENCODER = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
SEQ2SEQ = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention"]

DECODERS = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**SMALL, "sliding_window": 4}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {
        **SMALL, "head_dim": 8, "sliding_window": 4, "layer_types": SLIDING, "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 1.0}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {
        **SMALL, "head_dim": 8, "sliding_window": 4, "layer_types": SLIDING}),
    "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", {**SMALL, "head_dim": 8}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {
        **SMALL, "head_dim": 8, "sliding_window": 4, "layer_types": SLIDING, "num_local_experts": 2,
        "num_experts_per_tok": 1}),
    "Llama 4": ("Llama4ForCausalLM", "Llama4TextConfig", {
        **SMALL, "head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2, "num_experts_per_tok": 1,
        "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0], "intermediate_size_mlp": 48,
        "for_llm_compressor": False}),
    "DeepSeek V3.2": ("DeepseekV32ForCausalLM", "DeepseekV32Config", {
        **SMALL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 12, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "moe_intermediate_size": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1}),
}  # fmt: skip
OTHERS = {
    "BERT": ("BertForMaskedLM", "BertConfig", {**ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "ModernBERT": ("ModernBertForMaskedLM", "ModernBertConfig", {
        **ENCODER, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}),
    "BART": ("BartForConditionalGeneration", "BartConfig", {**SEQ2SEQ, "dropout": 0.0, "max_position_embeddings": 64}),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {
        **SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "dropout": 0.0}),
    "T5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "pad_token_id": 0,
        "eos_token_id": None, "decoder_start_token_id": 0}),
    "ViT": ("ViTForImageClassification", "ViTConfig", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 12,
        "patch_size": 4, "num_labels": 5, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
}  # fmt: skip
MODELS = {**DECODERS, **OTHERS}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register()


def build(name):
    """A small model with attn_implementation="wikigpt" and random weights."""
    model_class, config_class, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings, attn_implementation="wikigpt", experts_implementation="eager")
    model = getattr(transformers, model_class)(config)
    for parameter in model.parameters():  # far from uniform attention, so that a wrong mask shows
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def eager(model, dtype=torch.float32):
    other = copy.deepcopy(model).to(dtype)
    other.set_attn_implementation("eager")
    return other


def tokens(batch=2, length=LENGTH, seed=1):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side, batch=2, length=LENGTH, masked=5):
    """The first sequence is padded, the others are not."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :masked] = side != "left"
    mask[0, length - masked :] = side != "right"
    return mask


def inputs(name, side=None):
    generator = torch.Generator().manual_seed(2)
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator)}
    x = {"decoder_input_ids": tokens(length=7, seed=3)} if name in ("BART", "Whisper", "T5") else {}
    if name == "Whisper":
        return {**x, "input_features": torch.randn(2, 8, 32, generator=generator)}
    return {"input_ids": tokens(), **x, **({} if side is None else {"attention_mask": padding(side)})}


def logits_of(model, x):
    """The logits at real positions, (positions, classes)."""
    dtype = next(model.parameters()).dtype
    logits = model(**{k: v.to(dtype) if k == "pixel_values" or k == "input_features" else v for k, v in x.items()}).logits
    if "attention_mask" in x and logits.shape[:2] == x["attention_mask"].shape:
        logits = logits[x["attention_mask"].bool()]
    return logits.flatten(0, -2)


def run(model, x):
    """(logits, loss, gradients) of one training step on random targets."""
    model.zero_grad()
    logits = logits_of(model, x)
    targets = torch.randint(logits.shape[-1], logits.shape[:1], generator=torch.Generator().manual_seed(4))
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    return logits.detach(), loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def in_float64(model, x):
    """What the eager model gives in float64: its attention asks for a softmax in float32, which this undoes."""
    softmax = torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim))
        return run(eager(model, torch.float64), x)


def assert_equals_eager(model, x):
    ours, plain, truth = run(model, x), run(eager(model), x), in_float64(model, x)
    assert_as_accurate_as(ours[0], plain[0], truth[0])
    assert_as_accurate_as(ours[1], plain[1], truth[1])
    assert ours[2].keys() == truth[2].keys()
    largest = max(grad.abs().max() for grad in truth[2].values())
    for name, grad in truth[2].items():  # one that is zero but for rounding (the bias of a key) has no scale of its own
        assert_as_accurate_as(ours[2][name], plain[2][name], grad, absolute=1e-6 * largest)


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_equal_eager(name):
    assert_equals_eager(build(name), inputs(name))


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2", "BERT"])
def test_logits_and_gradients_are_as_accurate_as_eagers_in_bfloat16(name):
    """All together, as a single number is rounded by chance; no ReLU and no experts, which rounding would switch."""
    model, x = build(name).bfloat16(), inputs(name)
    results = run(model, x), run(eager(model, model.dtype), x), in_float64(model, x)
    ours, plain, truth = (torch.cat([grad.double().flatten() for grad in grads.values()]) for _, _, grads in results)
    assert (ours - truth).norm() <= 2 * (plain - truth).norm()
    ours, plain, truth = (logits.double() for logits, _, _ in results)
    assert (ours - truth).norm() <= 2 * (plain - truth).norm()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("ViT", "Whisper")])
def test_padding_changes_nothing_at_real_positions(name, side):
    assert_equals_eager(build(name), inputs(name, side))


def test_the_triton_kernels_give_eagers_logits_loss_and_gradients():
    model = build("Llama")
    with kernels.backend("triton"):
        assert_equals_eager(model, inputs("Llama", "left"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model, x = build("Mistral").train(), inputs("Mistral", "left")
    expected = run(model, x)[2]
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(run(model, x)[2], expected)


def test_the_model_compiles_into_one_graph():
    model, x = build("Mistral"), inputs("Mistral", "left")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**x).logits, model(**x).logits, rtol=1e-4, atol=1e-4)


def test_dropout_is_that_of_the_model_in_training():
    model = build("Llama")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    x = inputs("Llama")
    expected = model(**x).logits
    assert torch.equal(model(**x).logits, expected)
    model.train()
    torch.manual_seed(0)
    once, again = model(**x).logits, model(**x).logits
    torch.manual_seed(0)
    assert torch.equal(model(**x).logits, once)
    assert not torch.equal(once, again)


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=["dynamic", "static", "beams"]
)
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", [*DECODERS, "BART", "T5"])
def test_generate_gives_eagers_tokens(name, side, options):
    model, x = build(name), inputs(name, side)
    if x.pop("decoder_input_ids", None) is not None:  # random weights repeat one token for ever unless it is drawn
        options = {**options, "do_sample": True, "temperature": 4.0, "top_k": 0}
    results = []
    for one in (model, eager(model)):
        torch.manual_seed(0)
        results.append(one.generate(**x, max_new_tokens=9, **{"do_sample": False, **options}))
    assert torch.equal(*results)
    assert results[0].unique().numel() > 5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "gpt-oss"])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(name, cache):
    model, ids = build(name), tokens()
    made = {"dynamic": DynamicCache, "static": functools.partial(StaticCache, max_cache_len=20)}[cache](config=model.config)
    pieces = [model(input_ids=piece, past_key_values=made).logits for piece in ids.split([6, 5, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How often attention takes the packed path and the other, and how many masks of queries by keys are built."""
    count = {"packed": 0, "other": 0, "masks": 0}

    def counted(name, module, function):
        def call(*args, **kwargs):
            count[name] += 1
            return original(*args, **kwargs)

        original = getattr(module, function)
        monkeypatch.setattr(module, function, call)

    counted("packed", integration, "flash_attn_varlen_func")
    counted("other", integration, "flash_attn_func")
    counted("masks", masking_utils, "sdpa_mask")
    return count


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("Llama 4", "DeepSeek V3.2")])
def test_no_mask_of_queries_by_keys_is_built(name, side, calls):
    run(build(name), inputs(name, None if name in ("ViT", "Whisper") else side))
    assert calls["other"] > 0
    assert calls["masks"] == 0


ROWS = [(5, 1, 7), (2, 8, 3)]


def packed(batch, rows=ROWS):
    """Each row of the batch holds sequences of these lengths, as position_ids say; without a cache, as in training."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows[:batch]])
    return {"input_ids": tokens(batch), "position_ids": positions, "use_cache": False}


def alone(model, ids, batch):
    """The logits of each sequence by itself, in the place that it has in the batch."""
    return torch.stack([torch.cat([model(part[None]).logits[0] for part in ids[b].split(ROWS[b])]) for b in range(batch)])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2", "Gemma 3", "Qwen 3"])
def test_packed_sequences_take_the_packed_path(name, batch, calls):
    model, x = build(name), packed(batch)
    together = model(**x).logits
    assert calls == {"packed": 2, "other": 0, "masks": 0}
    torch.testing.assert_close(together, alone(model, x["input_ids"], batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_packed_sequences_have_eagers_gradients(name):
    assert_equals_eager(build(name), packed(2))


@pytest.mark.parametrize("side", [None, "right"])
def test_cu_seq_lens_of_a_collator_keep_sequences_apart(side, calls):
    """gpt-oss does not look for sequences in position_ids; with a padding mask there is no packed path."""
    model, x = build("gpt-oss"), packed(1)
    ends = torch.tensor([0, 5, 6, 13])
    flat = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    mask = {} if side is None else {"attention_mask": padding(side, batch=1, masked=2)}
    together = model(**x, **flat, **mask).logits
    assert calls["packed"] == (2 if side is None else 0)
    n = LENGTH - (2 if mask else 0)
    torch.testing.assert_close(together[:, :n], alone(model, x["input_ids"], 1)[:, :n], rtol=1e-4, atol=1e-4)


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "both sides": masking_utils.bidirectional_mask_function,
    "window on both sides": masking_utils.sliding_window_bidirectional_mask_function(3),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    "unknown": masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, kv: kv != 5),
}
SIZES = {  # queries, keys, position of the first query, position of the first key
    "square": (13, 13, 0, 0),
    "later": (4, 13, 9, 0),
    "one later": (1, 13, 12, 0),
    "static cache, first": (6, 20, 0, 0),
    "static cache, later": (4, 20, 9, 0),
    "sliding cache": (4, 9, 9, 4),
}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_described_mask_means_what_the_dense_one_does(function, size, side):
    s, t, q_offset, kv_offset = SIZES[size]
    causal = "both sides" not in function
    problem = {
        "batch_size": 2, "q_length": s, "kv_length": t, "q_offset": q_offset, "kv_offset": kv_offset, "device": "cpu",
        "mask_function": FUNCTIONS[function], "attention_mask": None if side is None else padding(side).bool(),
    }  # fmt: skip
    mask = wikigpt_mask(**problem, allow_is_causal_skip=causal, allow_is_bidirectional_skip=not causal)
    dense = masking_utils.sdpa_mask(**problem, allow_is_causal_skip=False)
    if isinstance(mask, DescribedMask):
        assert torch.equal(mask & True, dense)
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 2, n, 16, generator=generator) for n in (s, t, t))
    layer = torch.nn.Module()
    layer.is_causal = causal
    ours, expected = (wikigpt_attention_forward(layer, q, k, v, m)[0] for m in (mask, dense))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_the_users_own_is_applied(dtype):
    model, ids = build("Llama"), tokens()
    seen = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(6)) < 0.5
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    ours = model(input_ids=ids, attention_mask=seen if dtype == torch.bool else additive).logits
    expected = eager(model)(input_ids=ids, attention_mask=additive).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


# --- registration ---------------------------------------------------------------------------------------------------


def test_registering_twice_changes_nothing():
    before = dict(AttentionInterface._global_mapping), dict(masking_utils.AttentionMaskInterface._global_mapping)
    register()
    assert (AttentionInterface._global_mapping, masking_utils.AttentionMaskInterface._global_mapping) == before
    assert before[0]["wikigpt"] is wikigpt_attention_forward
    assert before[1]["wikigpt"] is wikigpt_mask


def test_a_model_can_change_to_it_and_back(calls):
    model = eager(build("Llama"))
    model(tokens())
    assert calls["other"] == 0
    model.set_attn_implementation("wikigpt")
    model(tokens())
    assert calls["other"] == 2


def test_importing_it_imports_neither_transformers_nor_triton():
    code = "import sys, wikigpt.integrations.transformers; print({'transformers', 'triton'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_without_transformers_registering_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs Hugging Face transformers 5\.0 or newer"):
        register()


def test_blocks_of_keys_that_nothing_explains_are_refused():
    q = torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match='block_indices: Module has no indexer that reads them, use "sdpa" or "eager"'):
        wikigpt_attention_forward(torch.nn.Module(), q, q, q, None, block_indices=q)


def test_a_sink_of_each_query_takes_its_share_and_has_a_gradient():
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(2, 4, 5, 16, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, 4, 5, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    ours, _ = wikigpt_attention_forward(torch.nn.Module(), q, k, v, None, is_causal=False, sinks=sinks)
    scores = torch.cat([q @ k.mT / 4, sinks], dim=-1)
    expected = (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v, sinks)) for out in (ours, expected))):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_weights_that_are_asked_for_and_not_given_are_warned_of(caplog):
    q = torch.zeros(1, 2, 3, 16)
    _, weights = wikigpt_attention_forward(torch.nn.Module(), q, q, q, None, output_attentions=True)
    assert weights is None
    assert 'use "eager" for output_attentions=True' in caplog.text
