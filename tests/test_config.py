"""Where the settings of a run come from, and what happens to wrong ones."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import wikigpt.kernels as kernels
from wikigpt.kernels.attention import reference

from wikigpt.config import BACKENDS, GROUPS, MAX_HEAD_DIM, GPTConfig, TrainConfig, dump, presets, resolve, settings
from wikigpt.errors import UserError
from wikigpt.train import TextBatches

DOCS = Path(__file__).resolve().parent.parent / "docs" / "training.md"


def test_later_sources_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: {lr: 1e-4, seed: 7}\nmodel: {n_layer: 3}\n")
    config = resolve("quick", file, ["train.lr=5e-4"])
    assert config.train.lr == 5e-4  # command line
    assert config.train.seed == 7  # file
    assert config.model.n_layer == 3  # file over preset
    assert config.model.context_length == 128  # preset
    assert config.train.beta1 == 0.9  # default


def test_toml_is_read_too(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[train]\nlr = 0.002\nmax_seconds = 30\n")
    config = resolve(None, file)
    assert (config.train.lr, config.train.max_seconds) == (0.002, 30.0)


def test_a_key_without_its_group_is_found():
    assert resolve(overrides=["n_layer=2"]).model.n_layer == 2


@pytest.mark.parametrize("name", presets())
def test_every_preset_resolves_and_survives_a_round_trip_through_yaml(name, tmp_path):
    config = resolve(name)
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert resolve(file=file) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.learning_rat=1"], r"unknown key train.learning_rat"),
        (["train.warmup_step=1"], r"did you mean train.warmup_steps"),
        (["train.n_layer=2"], r"unknown key train.n_layer; here it is model.n_layer"),
        (["n_layer_=2"], r"unknown key n_layer_; did you mean model.n_layer"),
        (["modle.n_layer=2"], r"unknown group 'modle'; did you mean model"),
        (["backend"], r"'backend': expected key=value"),
        (["n_layer=two"], r"model.n_layer must be a whole number, got 'two'"),
        (["n_layer=2.5"], r"model.n_layer must be a whole number"),
        (["compile=maybe"], r"train.compile must be true or false"),
        (["steps=0"], r"steps: got 0, must be 1 or more"),
        (["optimizer=sgd"], r"optimizer: got 'sgd', allowed are adamw, muon"),
        (["n_head=3"], r"command line: model.n_head: 3 does not divide n_embd 512"),
        (["=5"], r"'=5': expected key=value"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_valid_one(overrides, message):
    with pytest.raises(UserError, match=message):
        resolve(overrides=overrides)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="unknown preset 'cpu-smal'; did you mean cpu-small"):
        resolve("cpu-smal")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "train: [1", "not valid YAML"),
        ("a.yaml", "- 1", 'expected groups data, model, train, as in "train: {lr: 1e-3}", got a list'),
        ("a.yaml", "{[1]: 2}", "not valid YAML"),
        ("a.yaml", "train: !!python/object:os.system {}", "not valid YAML"),
        ("a.yaml", "lr = 3", "expected groups .* got text"),
        ("a.yaml", "lr: 1e-3", "lr stands outside its group; write train: {lr: ...}"),
        ("a.yaml", "train: {lr: 1}\ndata: {}\ntrain: {seed: 1}", "train is given twice, again in line 3"),
        ("a.yaml", "train: {lr: 1, seed: 1, lr: 2}", "lr is given twice"),
        ("a.toml", "[train]\nlr = 1\n[train]\nlr = 2", "not valid TOML"),
        ("a.yaml", "data: {dataset: yes}", "data.dataset must be text, got True"),
        ("a.yaml", "train: {steps: 1.5}", "train.steps must be a whole number, got 1.5"),
        ("a.yaml", "train: {lr: .nan}", "a.yaml: train.lr: got nan"),
        ("a.yaml", "train: {lr: [1]}", r"train.lr must be a number, got \[1\]"),
        ("a.yaml", "train: 3", "train must hold key: value lines"),
        ("a.toml", "train = ", "not valid TOML"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        resolve(file=file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the configuration .*none.yaml: No such file"):
        resolve(file=tmp_path / "none.yaml")


def test_a_folder_is_no_configuration_but_a_runs_folder_has_one(tmp_path):
    with pytest.raises(UserError, match=r"is a folder; --config takes a file$"):
        resolve(file=tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=f"takes a file, for example {tmp_path}/config.yaml"):
        resolve(file=tmp_path)


@pytest.mark.parametrize("text", ["", "# train: {lr: 1}\n", "train:\n#  lr: 1\n"])
def test_a_file_of_nothing_but_comments_changes_nothing(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    assert resolve(file=tmp_path / "run.yaml") == resolve()


@pytest.mark.parametrize("name", ["run.yaml", "run.toml"])
def test_a_file_in_another_unicode_is_named_by_its_byte_order_mark_and_that_of_utf8_is_fine(tmp_path, name):
    text = "train: {seed: 5}\n" if name == "run.yaml" else "[train]\nseed = 5\n"
    file = tmp_path / name
    file.write_bytes(text.encode("utf-8-sig"))
    assert resolve(file=file).train.seed == 5
    file.write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match=r"run.* is UTF-16 text: save it as UTF-8, e.g. iconv -f utf-16 -t utf-8"):
        resolve(file=file)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("learning_rate", "train.lr"),
        ("per_device_train_batch_size", "train.batch_size"),
        ("gradient_accumulation_steps", "train.accumulate"),
        ("max_steps", "train.steps"),
        ("max_iters", "train.steps"),
        ("num_hidden_layers", "model.n_layer"),
        ("hidden_size", "model.n_embd"),
        ("num_attention_heads", "model.n_head"),
        ("n_positions", "model.context_length"),
        ("block_size", "model.context_length"),
        ("max_position_embeddings", "model.context_length"),
        ("warmup_iters", "train.warmup_steps"),
        ("eval_iters", "train.eval_tokens"),
        ("grad_clip", "train.clip_grad_norm"),
        ("max_grad_norm", "train.clip_grad_norm"),
        ("adam_beta1", "train.beta1"),
        ("lr_scheduler_type", "train.schedule"),
        ("bf16", "train.precision"),
        ("dtype", "train.precision"),
        ("init_from", "`wikigpt finetune --checkpoint`"),
        ("output_dir", "--out"),
    ],
)
def test_the_names_of_transformers_and_nanogpt_are_known(theirs, ours):
    for name in (theirs, f"train.{theirs}", theirs.upper(), theirs.replace("_", "-")):
        with pytest.raises(UserError, match=f"unknown key {name}; here it is {re.escape(ours)}$"):
            resolve(overrides=[f"{name}=1"])


@pytest.mark.parametrize("name", ["foo", "x", "temperature", "checkpoint"])
def test_a_name_like_none_of_ours_gets_no_guess(name):
    with pytest.raises(UserError, match=f"unknown key {name}; `wikigpt train --help` and docs/training.md list all keys"):
        resolve(overrides=[f"{name}=1"])
    with pytest.raises(UserError, match=f"unknown key data.{name}; data has dataset, data_dir, tokenizer, vocab_size"):
        resolve(overrides=[f"data.{name}=1"])


# --- values ---------------------------------------------------------------------------------------------------------

NONSENSE = ["0", "-1", "1", "0.5", "3", "inf", "-inf", "nan", "1e400", "1" + "0" * 30, "", "none", "yes", "wrong words", "{}"]
COUNT, WORD = ("1", "3"), ()  # what of NONSENSE is a value, by the kind of setting
MEANINGFUL = {
    "data.dataset": set(NONSENSE) - {""},  # names of files that may be there
    "data.data_dir": set(NONSENSE) - {""},
    "data.tokenizer": WORD,
    "data.vocab_size": ("3", "none"),
    "model.context_length": ("3",),
    **dict.fromkeys(["model.n_layer", "model.n_embd", "model.n_head"], COUNT),
    **dict.fromkeys(["model.n_kv_head", "model.head_dim", "model.intermediate_size"], (*COUNT, "none")),
    **dict.fromkeys(["model.position", "model.norm", "model.activation", "model.backend"], WORD),
    **dict.fromkeys(["model.bias", "model.tie_embeddings"], ("0", "1", "yes")),
    "model.dropout": ("0", "0.5"),
    "model.norm_eps": ("1", "0.5"),
    "model.rope_theta": ("1", "0.5", "3", "1" + "0" * 30),
    **dict.fromkeys(["train.steps", "train.batch_size", "train.accumulate", "train.eval_tokens"], COUNT),
    **dict.fromkeys(["train.log_interval", "train.eval_interval", "train.save_interval"], COUNT),
    "train.final_tokens": (*COUNT, "none"),
    "train.max_seconds": ("1", "0.5", "3", "none", "1" + "0" * 30),
    **dict.fromkeys(["train.optimizer", "train.schedule", "train.precision", "train.parallel", "train.device"], WORD),
    **dict.fromkeys(
        ["train.lr", "train.muon_lr", "train.weight_decay", "train.clip_grad_norm"], ("0", "1", "0.5", "3", "1" + "0" * 30)
    ),
    "train.warmup_steps": ("0", "1", "3"),
    **dict.fromkeys(["train.min_lr_fraction", "train.decay_fraction"], ("0", "1", "0.5")),
    **dict.fromkeys(["train.beta1", "train.beta2", "train.ema_decay"], ("0", "0.5")),
    **dict.fromkeys(["train.compile", "train.cuda_graph", "train.tensorboard"], ("0", "1", "yes")),
    "train.seed": ("0", "-1", "1", "3"),
}
# Settings beside which the one in question has an effect and fits.
BESIDE = {
    "train.muon_lr": ["optimizer=muon"],
    "train.decay_fraction": ["schedule=wsd"],
    "model.rope_theta": ["position=rotary"],
    "model.n_embd": ["n_head=1"],
    "model.n_head": ["n_embd=6"],
    "model.n_kv_head": ["n_head=6", "n_embd=6"],
}


@pytest.mark.parametrize("setting", settings(), ids=lambda s: f"{s.group}.{s.name}")
def test_a_value_is_meaningful_or_refused_by_the_name_of_its_setting(setting):
    name = f"{setting.group}.{setting.name}"
    for value in NONSENSE:
        overrides = [*BESIDE.get(name, ()), f"{name}={value}"]
        if value in MEANINGFUL[name]:
            resolve(overrides=overrides)
            continue
        with pytest.raises(UserError) as error:
            resolve(overrides=overrides)
        assert name in str(error.value), value
        assert "\n" not in str(error.value)


def test_the_table_of_nonsense_knows_every_setting():
    assert set(MEANINGFUL) == {f"{s.group}.{s.name}" for s in settings()}


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**53 + 1, 2**64 - 1])
def test_a_seed_is_any_that_torch_takes_to_the_last_bit(seed):
    assert resolve(overrides=[f"seed={seed}"]).train.seed == seed
    torch.Generator().manual_seed(seed)
    starts = [TextBatches(torch.arange(100), 4, s).starts(0).tolist() for s in (seed, 1337)]
    assert starts[0] != starts[1]


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64, 2**80])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(UserError, match=f"train.seed: got {seed}, must be from -9223372036854775808 to 18446744073709551615"):
        resolve(overrides=[f"seed={seed}"])


def test_the_vocabulary_of_the_model_is_the_tokenizers_wherever_it_is_asked_for(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {vocab_size: 50}\n")
    for source in ({"overrides": ["model.vocab_size=50"]}, {"file": tmp_path / "run.yaml"}):
        with pytest.raises(UserError, match=r"model.vocab_size comes from the tokenizer: leave it out, or set data.vocab_size"):
            resolve(**source)
    assert resolve(overrides=["vocab_size=50"]).data.vocab_size == 50
    assert resolve(base={"model": {"vocab_size": 50, "n_layer": 2}}).model.n_layer == 2  # a run's own


@pytest.mark.parametrize(
    ("override", "without"),
    [
        ("muon_lr=0.1", "train.optimizer=muon"),
        ("decay_fraction=0.5", "train.schedule=wsd"),
        ("rope_theta=500000", "model.position=rotary"),
    ],
)
def test_an_override_without_effect_is_refused(override, without):
    with pytest.raises(UserError, match=f"command line: .* has no effect without {without}; use that or leave it out"):
        resolve(overrides=[override])
    resolve(overrides=[override, without])


def test_what_only_several_processes_need_is_refused_for_one(monkeypatch):
    with pytest.raises(UserError, match=r"train.parallel has no effect without torchrun"):
        resolve(overrides=["parallel=fsdp"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve(overrides=["parallel=fsdp"]).train.parallel == "fsdp"


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match=r"train.ema_decay: not available with parallel=fsdp"):
        resolve(overrides=["ema_decay=0.9", "parallel=fsdp"])
    with pytest.raises(UserError, match=r"data.vocab_size: got 300, a byte vocabulary has 257 tokens"):
        resolve(overrides=["tokenizer=byte", "vocab_size=300"])


def test_numbers_of_numpy_become_pythons_own_which_checkpoints_hold():
    config = TrainConfig(steps=np.int64(5), lr=np.float32(0.5))
    assert (type(config.steps), type(config.lr)) == (int, float)


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (TrainConfig, {"steps": 2.5}),
        (TrainConfig, {"compile": "no"}),
        (GPTConfig, {"dropout": "0.1"}),
        (GPTConfig, {"n_layer": "2"}),
    ],
)
def test_a_value_of_another_type_is_a_type_error_that_names_it(cls, change):
    with pytest.raises(TypeError, match=f"^{next(iter(change))}: got "):
        cls(**change)


# --- what is saved and listed ---------------------------------------------------------------------------------------


def test_a_saved_configuration_leaves_open_what_follows_from_the_rest(tmp_path):
    """So that n_head can be changed beside it: with head_dim and n_kv_head written down it would be another model."""
    file = tmp_path / "config.yaml"
    file.write_text(dump(resolve("quick")))
    changed = resolve(file=file, overrides=["n_head=8"]).model
    assert (changed.head_dim, changed.n_kv_head) == (16, 8)
    for overrides in (["n_kv_head=2"], ["head_dim=64"], ["n_head=7", "head_dim=64"], ["intermediate_size=100"]):
        config = resolve("quick", overrides=overrides)
        file.write_text(dump(config))
        assert resolve(file=file) == config


def test_every_setting_has_a_meaning():
    for setting in settings():
        assert setting.meaning
        assert setting.default == getattr(GROUPS[setting.group], setting.name)
    names = {(group, f.name) for group, cls in GROUPS.items() for f in dataclasses.fields(cls)}
    assert {(s.group, s.name) for s in settings()} == names - {("model", "vocab_size")}


def test_the_page_on_training_lists_every_setting_as_the_code_has_it():
    def shown(value):
        return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"

    page = DOCS.read_text()
    for group in GROUPS:
        rows = [f"| `{s.name}` | {shown(s.default)} | {s.meaning} |" for s in settings() if s.group == group]
        table = f"### {group}\n| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        assert table in page, f"docs/training.md should have\n{table}"


def test_backends_and_the_widest_head_are_those_of_the_kernels():
    assert kernels.BACKENDS == BACKENDS
    assert reference.MAX_HEAD_DIM == MAX_HEAD_DIM
    with pytest.raises(UserError, match=r"model.head_dim: got 2048, must be 1024 or less; use more heads"):
        resolve(overrides=["n_embd=2048", "n_head=1"])


def test_settings_are_checked_without_torch():
    code = "import sys, wikigpt.config as c; c.resolve('quick'); c.settings(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
