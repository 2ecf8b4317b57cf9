"""The data layer: texts and their origins, tokenizers, token files. No test reaches the network."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from hashlib import sha256
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from wikigpt.data import (
    BPETokenizer,
    ByteTokenizer,
    WordTokenizer,
    check_context,
    clean_raw,
    detokenize,
    info,
    load_text,
    prepare,
    sources,
    store,
    tokenizer_from_json,
    train_tokenizer,
)
from wikigpt.errors import UserError

REPO = Path(__file__).resolve().parents[1]
SPLITS = ("train", "valid", "test")
SMALL = {
    "train": " \n = Cats = \n \n The cat sat on the mat . \n The <unk> sat . \n",
    "valid": " \n = Dogs = \n \n The dog sat . \n",
    "test": " \n = Cows = \n \n The cow sat on the cat . \n",
}


@pytest.fixture(scope="session")
def wikitext_words(wikitext, tmp_path_factory):
    return prepare(data_dir=wikitext, cache_dir=tmp_path_factory.mktemp("wikitext-words"))


@pytest.fixture(autouse=True)
def offline_machine(monkeypatch, tmp_path):
    """A cache of its own for each test, no data folder set, and a Hub that cannot be reached."""

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.delenv("WIKIGPT_DATA_DIR", raising=False)
    monkeypatch.setenv("WIKIGPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)


def write(folder: Path, texts: dict[str, str], naming: str = "{}.txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        (folder / naming.format(split)).write_bytes(text.encode())
    return folder


@pytest.fixture
def small(tmp_path) -> Path:
    return write(tmp_path / "small", SMALL)


def message(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def run_python(code: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_importing_the_data_layer_does_not_import_torch():
    process = run_python("import sys, wikigpt.data; print('torch' in sys.modules)")
    assert process.communicate()[0].strip() == "False"


# ---- WikiText-2, the real one ----


@pytest.mark.parametrize(("split", "count"), [("train", 2_088_628), ("valid", 217_646), ("test", 245_569)])
def test_wikitext2_has_the_number_of_words_and_eos_that_papers_report(wikitext_words, split, count):
    assert len(wikitext_words.tokens[split]) == count == wikitext_words.stats[split].tokens


def test_wikitext2_has_the_vocabulary_that_papers_report(wikitext_words):
    assert wikitext_words.tokenizer.vocab_size == 33_278 == wikitext_words.stats["train"].types


def test_every_wikitext2_line_ends_in_one_eos(wikitext_words):
    eos = (wikitext_words.tokens["train"] == wikitext_words.tokenizer.eos_id).sum()
    assert eos == wikitext_words.stats["train"].lines == 36_718


def test_wikitext2_tokens_decode_to_its_text(wikitext, wikitext_words):
    lines = (wikitext / "valid.txt").read_text("utf-8").split("\n")
    decoded = wikitext_words.tokenizer.decode(wikitext_words.tokens["valid"])
    assert decoded == "\n".join(line.strip(" ") for line in lines)


def test_wikitext2_is_encoded_in_less_than_five_seconds(wikitext, wikitext_words):
    text = (wikitext / "train.txt").read_text("utf-8")
    start = time.perf_counter()
    wikitext_words.tokenizer.encode(text)
    assert time.perf_counter() - start < 5


def test_the_published_text_has_no_warning_in_its_origin(wikitext):
    assert load_text(data_dir=wikitext).origin == f"local copy {wikitext}"


def test_the_order_of_articles_in_train_does_not_matter_to_the_check(wikitext, tmp_path):
    for split in ("valid", "test"):
        (tmp_path / f"{split}.txt").symlink_to(wikitext / f"{split}.txt")
    lines = (wikitext / "train.txt").read_bytes().splitlines(keepends=True)
    (tmp_path / "train.txt").write_bytes(b"".join(lines[1000:] + lines[:1000]))
    assert "warning" not in load_text(data_dir=tmp_path).origin


def test_a_folder_of_word_level_text_is_refused_as_raw(wikitext):
    assert "word-level" in message(load_text, "wikitext-2-raw", data_dir=wikitext)


# ---- WikiText-2 from the Hub ----


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with the given texts; `hub.damage` is appended to what is downloaded, `hub.downloads` counts."""
    state = SimpleNamespace(damage=b"", downloads=0, folders=[])

    def serve(config: str, texts: dict[str, str]) -> SimpleNamespace:
        for split, hub_split in zip(SPLITS, ("train", "validation", "test")):
            path = tmp_path / "hub" / config / f"{hub_split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            # As the data set's script on the Hub makes rows of a file.
            rows = [line if line.strip() else "" for line in texts[split].splitlines(keepends=True)]
            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
        return state

    def metadata(url, **kwargs):
        config, name = url.split("/")[-2:]
        content = (tmp_path / "hub" / config / name).read_bytes()
        return SimpleNamespace(etag=sha256(content).hexdigest(), commit_hash="c0ffee" * 6)

    def download(repo, filename, *, repo_type, revision, local_dir):
        assert (repo, repo_type, revision) == ("Salesforce/wikitext", "dataset", "c0ffee" * 6)
        state.downloads += 1
        state.folders.append(local_dir)
        path = Path(local_dir) / Path(filename).name
        path.write_bytes((tmp_path / "hub" / filename).read_bytes() + state.damage)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return serve


def accept(monkeypatch, texts: dict[str, str]) -> None:
    """Makes `texts` what WikiText-2 is known to contain."""
    digests = {split: sources._digest(split, text) for split, text in texts.items()}
    monkeypatch.setattr(sources, "WIKITEXT2", digests)


def test_the_original_files_are_restored_byte_for_byte_from_the_hubs_rows(wikitext, hub):
    originals = {split: (wikitext / f"{split}.txt").read_bytes() for split in SPLITS}
    hub("wikitext-2-v1", {split: content.decode() for split, content in originals.items()})
    assert {split: text.encode() for split, text in load_text().splits.items()} == originals


def test_the_origin_of_a_download_names_repository_and_commit(hub, monkeypatch):
    hub("wikitext-2-v1", SMALL)
    accept(monkeypatch, SMALL)
    assert load_text().origin == "Hugging Face Hub, Salesforce/wikitext wikitext-2-v1 at c0ffeec0ffee"


def test_a_text_is_downloaded_once(hub, monkeypatch):
    state = hub("wikitext-2-v1", SMALL)
    accept(monkeypatch, SMALL)
    assert load_text().splits == load_text().splits
    assert state.downloads == 3


def test_the_hubs_raw_text_is_cleaned(hub):
    hub("wikitext-2-raw-v1", SMALL)
    assert load_text("wikitext-2-raw").splits["valid"] == "= Dogs =\n\nThe dog sat .\n"


def test_a_download_that_is_not_what_the_hub_announced_is_an_error(hub):
    hub("wikitext-2-raw-v1", SMALL).damage = b"x"
    assert "train-00000-of-00001.parquet is corrupted (its sha256 is" in message(load_text, "wikitext-2-raw")


def test_a_download_with_another_text_is_an_error(hub, monkeypatch):
    hub("wikitext-2-v1", {**SMALL, "test": "something else\n"})
    accept(monkeypatch, SMALL)
    assert "test-00000-of-00001.parquet is corrupted" in message(load_text)


def test_a_corrupted_download_does_not_spoil_the_next_attempt(hub, monkeypatch):
    state = hub("wikitext-2-v1", SMALL)
    accept(monkeypatch, SMALL)
    state.damage = b"x"
    message(load_text)
    state.damage = b""
    assert load_text().splits == SMALL


def test_a_truncated_file_among_the_downloaded_is_downloaded_again(hub, monkeypatch):
    hub("wikitext-2-v1", SMALL)
    accept(monkeypatch, SMALL)
    load_text()
    (sources.cache_root() / "wikitext-2" / "valid.txt").write_text("half")
    assert load_text().splits == SMALL


def test_nothing_is_left_behind_by_a_download_but_the_text(hub):
    state = hub("wikitext-2-raw-v1", SMALL)
    load_text("wikitext-2-raw")
    assert not any(Path(folder).exists() for folder in state.folders)


def test_without_network_one_line_names_the_ways_out():
    text = message(load_text)
    assert "\n" not in text
    assert all(way in text for way in ("no route to host", "--data-dir", "WIKIGPT_DATA_DIR", "HTTPS_PROXY", "--dataset auto"))


def test_where_the_hub_is_switched_off_the_switch_is_named(monkeypatch):
    def offline(*args, **kwargs):
        raise huggingface_hub.errors.OfflineModeIsEnabled("Cannot reach the Hub: offline mode is enabled.")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    text = message(load_text)
    assert "unset HF_HUB_OFFLINE" in text
    assert "HTTPS_PROXY" not in text


def test_a_hub_that_never_answers_is_given_up_in_seconds_without_noise(tmp_path):
    code = (
        "from wikigpt.data import load_text\nfrom wikigpt.errors import UserError\n"
        "try: load_text()\nexcept UserError as error: print(error)"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.perf_counter()
        output, noise = run_python(
            code, HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}", HF_HUB_OFFLINE="0"
        ).communicate()
    assert time.perf_counter() - start < 15
    assert (output.startswith("cannot download wikitext-2"), output.count("\n"), noise) == (True, 1, "")


def test_a_call_that_hangs_is_given_up():
    with pytest.raises(TimeoutError, match=r"no answer in 0\.01 s"):
        sources._within(0.01, lambda: time.sleep(1))


# ---- WikiText-2 from a local copy ----


@pytest.mark.parametrize("naming", ["{}.txt", "wiki.{}.tokens"])
def test_both_namings_of_a_local_copy_are_read(tmp_path, naming):
    assert load_text(data_dir=write(tmp_path, SMALL, naming)).splits == SMALL


def test_a_raw_local_copy_is_read_and_cleaned(tmp_path):
    text = load_text("wikitext-2-raw", data_dir=write(tmp_path, SMALL, "wiki.{}.raw"))
    assert text.splits["valid"] == "= Dogs =\n\nThe dog sat .\n"


def test_the_folder_that_an_archive_unpacks_to_is_found_in_the_data_folder(tmp_path):
    write(tmp_path / "wikitext-2", SMALL)
    assert load_text(data_dir=tmp_path).splits == SMALL


def test_the_data_folder_can_come_from_the_environment(small, monkeypatch):
    monkeypatch.setenv("WIKIGPT_DATA_DIR", str(small))
    assert load_text().splits == SMALL


def test_the_argument_wins_over_the_environment(small, monkeypatch):
    monkeypatch.setenv("WIKIGPT_DATA_DIR", "/nowhere")
    assert load_text(data_dir=small).splits == SMALL


def test_the_environments_folder_is_only_for_wikitext(monkeypatch, small, tmp_path):
    monkeypatch.setenv("WIKIGPT_DATA_DIR", str(small))
    own = tmp_path / "own.txt"
    own.write_text("one\ntwo\nthree\n")
    assert load_text(str(own)).splits["train"] == "one\n"


def test_an_own_version_of_wikitext2_is_taken_with_a_warning_that_names_the_splits(small, monkeypatch):
    accept(monkeypatch, {**SMALL, "valid": "other\n"})
    text = load_text(data_dir=small)
    assert text.splits == SMALL
    assert "(warning: valid not as published" in text.origin


def test_line_ends_of_windows_do_not_change_the_text(tmp_path):
    write(tmp_path, {split: text.replace("\n", "\r\n") for split, text in SMALL.items()})
    assert load_text(data_dir=tmp_path).splits == SMALL


def test_an_incomplete_local_copy_names_what_is_there_and_both_namings(tmp_path):
    (tmp_path / "train.txt").write_text("a\n")
    text = message(load_text, data_dir=tmp_path)
    assert str(tmp_path) in text
    assert "found train.txt; looked for train.txt valid.txt test.txt, or wiki.train.tokens" in text


# ---- the fallback ----


def test_auto_takes_the_local_copy(small):
    text = load_text("auto", data_dir=small)
    assert (text.name, text.fallback, text.splits) == ("wikitext-2", False, SMALL)


@pytest.mark.parametrize("dataset", ["auto", "wikitext-2", "wikitext-2-raw"])
@pytest.mark.parametrize("said", ["--data-dir", "WIKIGPT_DATA_DIR"])
@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_nothing_takes_the_place_of_a_data_folder_that_was_named(tmp_path, monkeypatch, dataset, said, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a\n")
    if said == "WIKIGPT_DATA_DIR":
        monkeypatch.setenv(said, str(tmp_path / place))
        text = message(load_text, dataset)
    else:
        text = message(load_text, dataset, data_dir=tmp_path / place)
    assert str(tmp_path / place) in text
    assert {"nowhere": "is not there", "empty": "found nothing", "file": "is a file, not a folder"}[place] in text
    assert f"correct {said}, or leave it out" in text
    assert "\n" not in text


def test_auto_takes_the_hubs_text_where_no_folder_is_named(hub, monkeypatch):
    hub("wikitext-2-v1", SMALL)
    accept(monkeypatch, SMALL)
    text = load_text("auto")
    assert (text.name, text.fallback, text.splits) == ("wikitext-2", False, SMALL)


def test_auto_does_not_fall_back_from_a_download_that_is_corrupted(hub):
    hub("wikitext-2-v1", SMALL).damage = b"x"
    assert "is corrupted" in message(load_text, "auto")


def test_auto_falls_back_to_the_python_manual():
    text = load_text("auto")
    assert (text.name, text.fallback) == ("pydoc", True)


def test_the_fallback_is_announced_on_stderr_with_the_reason(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    load_text("auto")
    output = capsys.readouterr()
    assert ("NOT WikiText-2" in output.err, "no route to host" in output.err, output.out) == (True, True, "")
    assert all(way in output.err for way in ("--data-dir", "WIKIGPT_DATA_DIR", "HTTPS_PROXY"))
    assert "auto" not in output.err  # it is what runs


def test_the_manual_chosen_by_name_is_no_fallback(capsys):
    assert load_text("pydoc").fallback is False
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("split", "share"), [("train", 0.90), ("valid", 0.05), ("test", 0.05)])
def test_the_manual_is_split_90_5_5(split, share):
    splits = load_text("pydoc").splits
    assert len(splits[split]) / sum(map(len, splits.values())) == pytest.approx(share, abs=0.02)


def test_no_line_of_the_manual_is_both_trained_on_and_held_out():
    lines = {split: set(text.split("\n")[:-1]) for split, text in load_text("pydoc").splits.items()}
    assert not lines["train"] & (lines["valid"] | lines["test"])


def test_punctuation_in_the_manual_stands_apart_as_word_level_text_needs_it():
    words = load_text("pydoc").splits["train"].split()
    assert not [word for word in words if word[-1] in ".,;:)" and word[0].isalpha()]


# ---- the user's files ----


def test_a_pattern_joins_its_files_in_sorted_order(tmp_path):
    write(tmp_path, {"b": "b1\nb2", "a": "a1\n", "c": "c1\n"})
    assert "".join(load_text(str(tmp_path / "*.txt")).splits.values()) == "a1\nb1\nb2\nc1\n"


def test_a_folder_with_the_three_splits_keeps_them(small):
    (small / "readme.txt").write_text("not part of it\n")
    assert load_text(str(small)).splits == SMALL


def test_a_folder_without_them_is_split(tmp_path):
    write(tmp_path, {"poems": "1\n2\n", "prose": "3\n4\n"})
    assert load_text(str(tmp_path)).splits == {"train": "1\n2\n", "valid": "3\n", "test": "4\n"}


def test_twenty_paragraphs_are_split_between_paragraphs(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("one\n" * 100 + "".join(f"\ntitle {i}\ntext {i}\n" for i in range(1, 20)))
    assert load_text(str(file)).splits["valid"] == "title 18\ntext 18\n\n"


@given(st.text(alphabet="ab \n\u2028\x0c").map(lambda text: "x\ny\nz\n" + text + "\n"))
@settings(deadline=None)
def test_the_three_splits_are_the_text_and_none_is_blank(text):
    parts = sources._split(text, "own.txt")
    assert "".join(parts.values()) == text
    assert all(part.strip() for part in parts.values())


def test_a_byte_that_is_not_utf8_is_named_with_its_file_and_place(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"a\n" * 1000 + "caf\u00e9\n".encode("latin-1"))
    text = message(load_text, str(file))
    assert f"{file} is not UTF-8 text (byte 2,003)" in text
    assert "iconv" in text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_another_unicode_is_named_by_its_byte_order_mark(tmp_path, encoding):
    file = tmp_path / "windows.txt"
    file.write_bytes("one\ntwo\nthree\n".encode(encoding))
    assert f"{file} is {encoding.upper()} text: save it as UTF-8, e.g. iconv -f {encoding} -t utf-8" in message(
        load_text, str(file)
    )


def test_utf16_without_a_mark_is_not_read_as_a_text_of_zero_bytes(tmp_path):
    file = tmp_path / "windows.txt"
    file.write_bytes("one\ntwo\nthree\n".encode("utf-16-le"))
    assert f"{file} is no text: byte 1 is 0" in message(load_text, str(file))


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ("wikitxt-2", "unknown dataset 'wikitxt-2': did you mean 'wikitext-2'?"),
        ("xyzzy", "There are wikitext-2, wikitext-2-raw, auto, pydoc, or path/to/*.txt"),
        ("", "unknown dataset ''"),
        ("no/such/file.txt", "there is no file no/such/file.txt"),
        ("no/such/*.txt", "no file matches no/such/*.txt"),
        ("{folder}/empty", "no file matches"),
        ("{folder}/blank.txt", "blank.txt is empty"),
        ("{folder}/short.txt", "too few lines to split"),
        ("{folder}/two", "add valid.txt"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_one_line_that_says_why(tmp_path, dataset, says):
    (tmp_path / "empty").mkdir()
    write(tmp_path, {"blank": " \n\n", "short": "one\ntwo\n"})
    write(tmp_path / "two", {"train": "a\n", "test": "b\n"})
    text = message(load_text, dataset.format(folder=tmp_path))
    assert says in text
    assert "\n" not in text


def test_an_empty_split_is_an_error_that_names_the_file(small):
    (small / "valid.txt").write_text("")
    assert f"{small / 'valid.txt'} is empty" in message(load_text, data_dir=small)


def test_a_data_folder_for_another_dataset_is_refused(small):
    assert "--dataset path/to/*.txt" in message(load_text, "pydoc", data_dir=small)


# ---- cleaning ----


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" fifty @-@ one \n", "fifty-one\n"),
        (" 1 @,@ 000 @,@ 000 @.@ 5 \n", "1,000,000.5\n"),
        (" \n = Title = \n \n \n \n = = Part = = \n", "= Title =\n\n== Part ==\n"),
        ("a\t  b\u00a0c \r\n", "a b c\n"),
        ("cafe\u0301", "caf\u00e9\n"),
        ("x = = 2\n= = uneven =\n", "x = = 2\n= = uneven =\n"),
    ],
)
def test_cleaning_raw_text(raw, clean):
    assert clean_raw(raw) == clean


@given(st.text() | st.text(alphabet="a= @-,.\n\u0338\u0301\u00a0\r"))
@settings(deadline=None, max_examples=400)
def test_cleaning_twice_is_cleaning_once(text):
    assert clean_raw(clean_raw(text)) == clean_raw(text)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("It grew to 60 cm ( 24 in ) , I think .", "It grew to 60 cm (24 in), I think."),
        ('He said " no " and " yes " .', 'He said "no" and "yes".'),
        ("the dog 's bone isn 't 1 @,@ 000 kg", "the dog's bone isn't 1,000 kg"),
        ("= = = Early life = = =", "=== Early life ==="),
    ],
)
def test_word_level_text_is_written_as_one_would_write_it(words, text):
    assert detokenize(words) == text


# ---- tokenizers ----

BPE = BPETokenizer.train("the cat sat on the mat, the cat sat.\n" * 20, 300)
WORD = WordTokenizer.train("b a b\n<unk> c a b\n")
ALL = pytest.mark.parametrize("tokenizer", [WORD, BPE, ByteTokenizer()], ids=lambda tokenizer: tokenizer.kind)


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=lambda tokenizer: tokenizer.kind)
@given(text=st.text() | st.text(alphabet="the cat\n\r\t \u00e9\U0001f600\0<eos>"))
@settings(deadline=None, max_examples=200)
def test_bpe_and_bytes_give_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", "<unk>"]), max_size=4), min_size=1, max_size=4))
def test_words_give_back_text_of_known_words(lines):
    text = "\n".join(" ".join(line) for line in lines)
    assert WORD.decode(WORD.encode(text)) == text


@ALL
def test_ids_are_int64(tokenizer):
    assert tokenizer.encode("a b\n").dtype == tokenizer.encode("").dtype == np.int64


def test_types_are_ordered_by_count_and_then_by_first_occurrence():
    assert WORD.types == ["b", "a", "<eos>", "<unk>", "c"]


def test_unk_and_eos_are_types_of_any_text():
    assert WordTokenizer.train("a").types == ["a", "<unk>", "<eos>"]


def test_an_unknown_word_is_unk():
    assert [WORD.types[i] for i in WORD.encode("a zebra\n")] == ["a", "<unk>", "<eos>"]


def test_a_prompt_without_newline_gets_no_eos():
    assert WORD.eos_id not in WORD.encode("a b")


def test_each_newline_is_one_eos():
    assert [WORD.types[i] for i in WORD.encode("\n a \n\n")] == ["<eos>", "a", "<eos>", "<eos>"]


def test_a_limited_word_vocabulary_keeps_the_most_frequent():
    tokenizer = WordTokenizer.train("c c c b b a\n", vocab_size=4)
    assert (set(tokenizer.types), tokenizer.vocab_size) == ({"c", "b", "<unk>", "<eos>"}, 4)


def test_words_that_occur_once_train_unk_where_a_text_has_none():
    tokenizer = train_tokenizer("word", "twice twice once\n")
    assert tokenizer.decode(tokenizer.encode("once twice")) == "<unk> twice"


def test_words_that_occur_once_are_kept_where_a_text_has_unk():
    tokenizer = train_tokenizer("word", "twice twice once <unk>\n")
    assert tokenizer.decode(tokenizer.encode("once twice")) == "once twice"


def test_bpe_merges_what_is_frequent():
    assert len(BPE.encode(" the cat")) == 2


def test_bpe_has_at_most_the_size_asked_for():
    text = " ".join(str(i * i) for i in range(2000))
    assert BPETokenizer.train(text, 270).vocab_size == 270


def test_training_bpe_twice_gives_the_same():
    text = " ".join(str(i * i) for i in range(2000))
    assert BPETokenizer.train(text, 400).fingerprint() == BPETokenizer.train(text, 400).fingerprint()


def test_the_tokens_of_a_bpe_line_do_not_depend_on_the_next_line():
    tokenizer = BPETokenizer.train("the cat\n\n\n" * 20, 300)
    first, both = tokenizer.encode("the cat\n"), tokenizer.encode("the cat\n\n\n")
    assert np.array_equal(both[: len(first)], first)


def test_the_name_of_a_special_token_in_a_text_is_plain_text():
    assert BPE.eos_id not in BPE.encode("<eos><|endoftext|>")


def test_eos_is_the_id_after_the_bytes():
    assert (ByteTokenizer().eos_id, ByteTokenizer().vocab_size) == (256, 257)


def test_half_a_character_decodes_to_the_replacement_character():
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=lambda tokenizer: tokenizer.kind)
def test_half_a_surrogate_pair_becomes_a_question_mark(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_pretty_decoding_undoes_the_spaces_of_word_level_text():
    assert ByteTokenizer().decode(ByteTokenizer().encode("twenty @-@ one ."), pretty=True) == "twenty-one."


@ALL
@pytest.mark.parametrize("beyond", [lambda size: size, lambda size: -1], ids=["above", "below"])
def test_an_id_outside_the_vocabulary_is_an_error_that_names_it(tokenizer, beyond):
    token_id = beyond(tokenizer.vocab_size)
    assert f"token id {token_id} is outside the {tokenizer.kind}" in message(tokenizer.decode, [0, token_id])


@ALL
def test_every_id_has_a_label_without_white_space(tokenizer):
    labels = [tokenizer.token(i) for i in range(tokenizer.vocab_size)]
    assert all(label and label.isprintable() and " " not in label for label in labels)
    assert labels[tokenizer.eos_id] == "<eos>"


@ALL
def test_a_tokenizer_survives_json(tokenizer):
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.fingerprint() == tokenizer.fingerprint()
    assert np.array_equal(again.encode("the cat b a\n"), tokenizer.encode("the cat b a\n"))


def test_different_tokenizers_have_different_fingerprints():
    tokenizers = [WORD, WordTokenizer.train("a b b\n"), BPE, BPETokenizer.train("x"), ByteTokenizer()]
    assert len({tokenizer.fingerprint() for tokenizer in tokenizers}) == 5


@pytest.mark.parametrize("content", [{}, {"kind": "tiktoken"}, {"kind": "word", "types": ["a"]}, None])
def test_json_that_is_no_tokenizer_is_an_error(content):
    assert "this is no tokenizer" in message(tokenizer_from_json, content)


@pytest.mark.parametrize(("kind", "size"), [("word", 1), ("bpe", 256), ("byte", 100), ("chars", None)])
def test_an_impossible_tokenizer_is_an_error(kind, size):
    assert str(size or kind) in message(train_tokenizer, kind, "a\n", size)


# ---- token files ----


def prepare_small(small: Path, **kwargs) -> store.Dataset:
    return prepare(data_dir=small, **kwargs)


def folders() -> list[str]:
    return [path.name for path in (sources.cache_root() / "tokens").glob("*")]


@pytest.mark.parametrize("kind", ["word", "bpe", "byte"])
def test_tokens_on_disk_are_the_encoded_text(small, kind):
    dataset = prepare_small(small, tokenizer=kind, vocab_size=300 if kind == "bpe" else None)
    for split in SPLITS:
        assert np.array_equal(dataset.tokens[split], dataset.tokenizer.encode(SMALL[split]))


def test_token_files_are_read_only(small):
    with pytest.raises(ValueError, match="read-only"):
        prepare_small(small).tokens["train"][0] = 1


@pytest.mark.parametrize(("types", "dtype"), [(2**16 - 3, np.uint16), (2**16 - 2, np.uint32)])
def test_ids_take_two_bytes_up_to_65535_types_and_four_above(tmp_path, types, dtype):
    words = " ".join(f"w{i}" for i in range(types))
    write(tmp_path, {"train": f"{words} <unk>\n", "valid": "w1\n", "test": "w1\n"})
    dataset = prepare_small(tmp_path)
    assert dataset.tokens["train"].dtype == dtype
    assert dataset.tokens["train"].max() == types + 1


def test_statistics_count_lines_words_tokens_types_unk_and_bytes(small):
    expected = store.SplitStats(lines=5, words=14, tokens=19, types=11, unk=1, bytes=60)
    assert prepare_small(small).stats["train"] == expected


def test_a_second_call_reads_no_text(small, monkeypatch):
    first = prepare_small(small)
    monkeypatch.setattr(store, "read", None)
    assert prepare_small(small).directory == first.directory


def test_a_second_call_on_wikitext2_takes_no_time(wikitext, wikitext_words):
    start = time.perf_counter()
    prepare(data_dir=wikitext, cache_dir=wikitext_words.directory.parents[1])
    assert time.perf_counter() - start < 0.5


def test_a_second_call_gives_the_same_dataset(small):
    first, second = prepare_small(small), prepare_small(small)
    assert all(np.array_equal(first.tokens[split], second.tokens[split]) for split in SPLITS)
    assert (first.stats, first.fingerprint, first.origin) == (second.stats, second.fingerprint, second.origin)
    assert first.tokenizer.fingerprint() == second.tokenizer.fingerprint()


def test_a_changed_file_is_tokenised_anew(small):
    prepare_small(small)
    (small / "train.txt").write_text("a new text <unk>\n")
    assert prepare_small(small).stats["train"].words == 4


def test_other_tokenizer_settings_are_another_data_set(small):
    assert prepare_small(small, vocab_size=5).tokenizer.vocab_size == 5
    assert prepare_small(small, vocab_size=6).tokenizer.vocab_size == 6


def test_the_fingerprint_does_not_depend_on_where_the_files_are(small, tmp_path):
    copy = shutil.copytree(small, tmp_path / "elsewhere")
    assert prepare_small(small).fingerprint == prepare_small(copy).fingerprint


def test_the_fingerprint_depends_on_the_text(small):
    before = prepare_small(small).fingerprint
    (small / "test.txt").write_text("another test\n")
    assert prepare_small(small).fingerprint != before


def test_the_fingerprint_depends_on_the_tokenizer(small):
    assert prepare_small(small).fingerprint != prepare_small(small, tokenizer="byte").fingerprint


def test_a_checkpoints_tokenizer_takes_the_place_of_a_new_one(small):
    dataset = prepare_small(small, tokenizer_json=WORD.to_json())
    assert dataset.tokenizer.fingerprint() == WORD.fingerprint()
    assert np.array_equal(dataset.tokens["test"], WORD.encode(SMALL["test"]))


def test_a_dataset_keeps_the_origin_of_its_text(small):
    first, second = prepare_small(small), prepare_small(small)
    assert first.origin == second.origin == load_text(data_dir=small).origin


def test_the_fallback_is_known_as_one_where_the_manual_is_tokenised_already():
    assert [prepare("pydoc").fallback, prepare("auto").fallback, prepare("auto").fallback] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("name", ["train.bin", "tokenizer.json", "manifest.json"])
def test_a_truncated_file_is_made_again(small, name):
    first = prepare_small(small)
    whole = (first.directory / name).read_bytes()
    (first.directory / name).write_bytes(whole[:-2])
    assert (prepare_small(small).directory / name).read_bytes() == whole


def test_a_missing_file_is_made_again(small):
    (prepare_small(small).directory / "valid.bin").unlink()
    assert len(prepare_small(small).tokens["valid"]) == prepare_small(small).stats["valid"].tokens


def test_only_the_data_set_is_left_in_the_cache(small):
    directory = prepare_small(small).directory
    (directory / "valid.bin").unlink()
    prepare_small(small)
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_full_disk_leaves_nothing_and_is_one_line(small, monkeypatch):
    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    assert "No space left on device" in message(prepare_small, small)
    assert folders() == []


def test_a_crash_just_before_the_end_leaves_nothing_visible(small):
    code = f"import os, wikigpt.data\nos.replace = lambda *paths: os._exit(9)\nwikigpt.data.prepare(data_dir={str(small)!r})"
    crashed = run_python(code)
    crashed.communicate()
    assert crashed.returncode == 9
    assert [name for name in folders() if not name.startswith(".")] == []


def test_two_processes_that_make_and_damage_the_same_files_both_get_whole_ones(small, tmp_path):
    rounds, start = 25, time.time() + 1.5
    code = (
        "import sys, time\nfrom wikigpt.data import prepare\n"
        f"for i in range({rounds}):\n"
        f"    time.sleep(max(0, {start} + i * 0.05 - time.time()))\n"
        f"    dataset = prepare(data_dir={str(small)!r}, cache_dir=f'{tmp_path}/{{i // 5}}')\n"
        "    print(dataset.fingerprint, *dataset.tokens['train'])\n"
        "    (dataset.directory / 'train.bin').unlink(missing_ok=True)\n"
    )
    processes = [run_python(code) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    expected = prepare_small(small)
    line = " ".join([expected.fingerprint, *map(str, expected.tokens["train"])]) + "\n"
    assert outputs == [(line * rounds, "")] * 2


def test_a_cache_that_cannot_be_written_is_one_line_with_the_way_out(small, tmp_path):
    (tmp_path / "file").write_text("")
    text = message(prepare_small, small, cache_dir=tmp_path / "file" / "cache")
    assert str(tmp_path / "file" / "cache") in text
    assert "WIKIGPT_CACHE_DIR" in text
    assert "\n" not in text


def test_the_cache_follows_xdg_where_nothing_else_is_set(monkeypatch, tmp_path):
    monkeypatch.delenv("WIKIGPT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.cache_root() == tmp_path / "wikigpt"


def test_an_unknown_tokenizer_is_an_error(small):
    assert "unknown tokenizer 'words': use one of word, bpe, byte" in message(prepare_small, small, tokenizer="words")


@pytest.mark.parametrize("settings", [{"tokenizer": "words"}, {"tokenizer": "bpe", "vocab_size": 256}, {"vocab_size": 0}])
def test_a_tokenizer_that_cannot_be_is_refused_before_a_text_is_sought(settings):
    assert "cannot download" not in message(prepare, **settings)


def test_a_bpe_vocabulary_beyond_what_the_text_has_room_for_costs_no_memory():
    assert BPETokenizer.train("ab ab\n", 2**31 - 1).vocab == BPETokenizer.train("ab ab\n", 1000).vocab


@pytest.mark.parametrize(("context_length", "fits"), [(9, True), (10, False)])
def test_a_train_split_that_no_context_fits_into_names_one_that_does(small, context_length, fits):
    dataset = prepare_small(small)  # 19 tokens
    if fits:
        check_context(dataset, context_length)
    else:
        says = "has 19 tokens, fewer than two contexts of 10; use more text or model.context_length=9"
        assert says in message(check_context, dataset, context_length)


def test_info_leaves_origin_and_unknown_words_to_those_that_have_them(small):
    output = StringIO()
    Console(file=output, width=100).print(info(prepare_small(small, tokenizer="byte")))
    assert "unk" not in output.getvalue()
    assert str(small) not in output.getvalue()


def test_info_is_a_table_of_the_splits(small):
    output = StringIO()
    Console(file=output, width=100).print(info(prepare_small(small)))
    rows = [line.split() for line in output.getvalue().replace("\u2502", " ").splitlines()]
    assert ["train", "5", "14", "19", "11", "5.26", "60"] in rows
