"""Every architecture of the installed transformers gives eager's numbers with ours, or is refused when it is made."""

import pytest
import torch
import transformers

from tests import architectures
from tests.architectures import EQUAL, Differs
from wikigpt.integrations import transformers as integration
from wikigpt.integrations.transformers import DescribedMask, register, why_not

KEYS, NOT_TRIED = architectures.keys(), architectures.why_not_tried()
IS_THE_PAGES = f"transformers {transformers.__version__}," in architectures.page()


@pytest.fixture(autouse=True, scope="module")
def _calls_are_counted():
    before = integration.wikigpt_attention_forward
    architectures.count_calls()
    yield
    integration.wikigpt_attention_forward = before
    register()


@pytest.mark.parametrize("key", [key for key in KEYS if key not in NOT_TRIED])
def test_it_gives_eagers_numbers_or_is_refused_when_it_is_made(key):
    try:
        found, _ = architectures.outcome(key)
    except Exception as error:
        if IS_THE_PAGES or isinstance(error, Differs):
            raise
        pytest.skip(f"not tiny in this version of transformers: {error}")
    if IS_THE_PAGES:
        assert architectures.documented()[key] == found


@pytest.mark.skipif(not IS_THE_PAGES, reason="the list is for another version of transformers")
@pytest.mark.parametrize("key", [key for key in KEYS if key in NOT_TRIED])
def test_what_is_listed_as_not_tried_cannot_be(key):
    if "package" in NOT_TRIED[key] and architectures.has(NOT_TRIED[key].split()[-1]):
        pytest.skip("its package is here")
    try:
        found, _ = architectures.outcome(key)
    except Differs:
        raise
    except Exception:  # a model says what it likes of a configuration or inputs that it does not
        return
    pytest.fail(f"{found}: it can be tried now, take it off NOT_TRIED")


@pytest.mark.skipif(not IS_THE_PAGES, reason="the page is of another version of transformers")
def test_the_page_is_what_the_command_writes():
    documented = architectures.documented()
    assert sorted(documented) == architectures.keys()
    assert {key: why for key, why in documented.items() if key in NOT_TRIED} == NOT_TRIED
    assert architectures.page() == architectures.written(documented)


# --- what is refused ------------------------------------------------------------------------------------------------


def bloom(implementation):
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM._from_config(config, attn_implementation=implementation)


def test_the_refusal_names_the_model_its_attention_and_the_way_out():
    with pytest.raises(ValueError, match=r'attn_implementation: got "wikigpt", but BloomModel .* BloomAttention.* Use "eager"'):
        bloom("wikigpt")


def test_the_class_that_a_user_loads_is_judged_with_the_models_that_it_names():
    for model in (transformers.BloomForCausalLM, transformers.FalconForCausalLM, transformers.DebertaForMaskedLM):
        assert model.__name__.removesuffix("ForCausalLM").removesuffix("ForMaskedLM") in why_not(model)
    for model in (transformers.LlamaForCausalLM, transformers.T5ForConditionalGeneration, transformers.BertForMaskedLM):
        assert why_not(model) is None
    for model in ("bloom", bloom("eager"), torch.nn.Linear):
        with pytest.raises(TypeError, match=r"model: got .*, need a class of models of transformers"):
            why_not(model)


def test_what_takes_its_attention_from_a_table_without_ours_is_refused_and_no_keyerror():
    config = transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match=r'FalconDecoderLayer takes its attention from .* Use "sdpa" or "eager"'):
        transformers.FalconForCausalLM._from_config(config, attn_implementation="wikigpt")


def test_a_refused_model_stays_as_it_was_when_it_is_changed_later():
    model = bloom("eager")
    with pytest.raises(ValueError, match='attn_implementation: got "wikigpt", but BloomModel'):
        model.set_attn_implementation("wikigpt")
    assert model.config._attn_implementation == "eager"


def test_a_part_that_is_refused_can_keep_another_implementation():
    """The picture part of GOT-OCR 2 has attention of its own, the text part does not."""
    model_class = transformers.GotOcr2ForConditionalGeneration
    with pytest.raises(ValueError, match=r"but GotOcr2VisionEncoder .*for this part alone"):
        model_class._from_config(architectures.tiny("got_ocr2"), attn_implementation="wikigpt")
    parts = {"": "wikigpt", "text_config": "wikigpt", "vision_config": "eager"}
    config = model_class._from_config(architectures.tiny("got_ocr2"), attn_implementation=parts).config
    assert config.text_config._attn_implementation == "wikigpt"
    assert config.vision_config._attn_implementation == "eager"


SOURCES = {
    "own": "softmax(q @ q.mT, dim=-1) @ q",
    "interface": "ALL_ATTENTION_FUNCTIONS.get_interface('eager', softmax)(q @ q.mT, dim=-1) @ q",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_models_without_a_source_file_are_judged_too(kind):
    """As those that are made in a notebook."""
    names = {"__name__": "notebook"}
    exec(
        f"""
import torch
from torch import nn
from torch.nn.functional import softmax
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

class Layer(nn.Module):
    def forward(self, q, attention_mask):
        return {SOURCES[kind]}

class Model(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
""",
        names,
    )
    assert (why_not(names["Model"]) is None) == (kind == "interface")


def test_a_mask_of_ours_cannot_be_added_to_scores_by_mistake():
    mask = DescribedMask((1, 1, 2, 2), torch.device("cpu"), dense=lambda: torch.ones(1, 1, 2, 2, dtype=torch.bool))
    for addition in (lambda s: s + mask, lambda s: mask + s, lambda s: s.add_(mask), lambda s: s - mask):
        with pytest.raises(ValueError, match=r'boolean.*use "eager"'):
            addition(torch.zeros(1, 1, 2, 2))


# --- eager's masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["splinter", "nllb-moe", "deepseek_v4"])
def test_models_that_know_eagers_masks_alone_get_them(key):
    assert architectures.build(key, "wikigpt").config._attn_implementation == integration.NAME_EAGER_MASKS
    assert architectures.outcome(key)[0] == EQUAL
