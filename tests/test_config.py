"""Where the settings of a run come from, and what happens to wrong ones."""

import pytest

from wikigpt.config import dump, presets, resolve
from wikigpt.errors import UserError


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
        (["train.warmup_step=1"], r"did you mean warmup_steps"),
        (["n_layers=2"], r"unknown key 'n_layers'; did you mean n_layer"),
        (["modle.n_layer=2"], r"unknown group 'modle'; did you mean model"),
        (["backend"], r"'backend': expected key=value"),
        (["n_layer=two"], r"model.n_layer must be int, got 'two'"),
        (["n_layer=2.5"], r"model.n_layer must be int"),
        (["compile=maybe"], r"train.compile must be bool"),
        (["steps=0"], r"steps: got 0, must be 1 or more"),
        (["optimizer=sgd"], r"optimizer: got 'sgd', allowed are adamw, muon"),
        (["n_head=3"], r"n_head: 3 does not divide n_embd 512"),
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
        ("a.yaml", "- 1", "expected groups data, model, train"),
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
