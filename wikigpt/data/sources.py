"""Where a text comes from: WikiText-2 (a local copy or the Hub), the Python manual, the user's files.

`locate` finds the files and reads none of them, so that a data set that is already tokenised opens at once;
`read` reads, checks and splits. `load_text` is the two together.
"""

import codecs
import difflib
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
import threading
import unicodedata
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from wikigpt.errors import UserError

T = TypeVar("T")
SPLITS = ("train", "valid", "test")
NAMINGS = ("{}.txt", "wiki.{}.tokens", "wiki.{}.raw")
HUB_REPO = "Salesforce/wikitext"
HUB_CONFIGS = {"wikitext-2": "wikitext-2-v1", "wikitext-2-raw": "wikitext-2-raw-v1"}
NAMES = (*HUB_CONFIGS, "auto", "pydoc")
HUB_SECONDS = 6.0  # for the Hub's first answer; the downloads that follow have the hub library's own timeouts

# sha256 of WikiText-2's files. Of train.txt with its lines sorted: copies differ in the order of articles.
WIKITEXT2 = {
    "train": "74cd11b8ccd28cbdc68b2e442d2b70d5cbc814a362de80d6797f8837fd4a4058",
    "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}


@dataclass(frozen=True)
class Text:
    """A text in three splits and where it is from; a `fallback` stands in for what was asked for."""

    name: str
    splits: dict[str, str]  # "train", "valid", "test"; each ends with a newline
    origin: str
    fallback: bool = False


@dataclass(frozen=True)
class Source:
    """A text not yet read: its files by split, or {"all": files} yet to be split, or {} for the manual."""

    name: str
    files: dict[str, list[Path]]
    origin: str
    fallback: bool = False

    def key(self) -> list[Any]:
        """Identifies the text without reading it: path, size and time of change stand in for the content.

        An edit that keeps both size and mtime_ns would go unnoticed: the price of opening big files at once.
        """
        state: list[Any] = [sys.version] if not self.files else []
        for split, files in self.files.items():
            for path in files:
                stat = path.stat()
                state.append([split, str(path.resolve()), stat.st_size, stat.st_mtime_ns])
        return [self.name, self.origin, self.fallback, state]


def load_text(dataset: str = "wikitext-2", data_dir: str | Path | None = None, cache_dir: str | Path | None = None) -> Text:
    """The text called `dataset`: "wikitext-2", "wikitext-2-raw", "auto", "pydoc", or a path, folder or glob.

    WikiText-2 is taken from `data_dir` or WIKIGPT_DATA_DIR if one is set, else from the Hub, downloaded once. "auto" is
    WikiText-2, or the Python manual where neither is set and the Hub cannot be reached.
    Raises UserError for whatever is missing, empty, undecodable, unknown or unreachable.
    """
    return read(locate(dataset, data_dir, cache_dir))


def locate(dataset: str, data_dir: str | Path | None = None, cache_dir: str | Path | None = None) -> Source:
    """Finds the files of `dataset` (downloading them if need be) and reads none. Raises UserError."""
    if dataset in HUB_CONFIGS or dataset == "auto":
        name = "wikitext-2" if dataset == "auto" else dataset
        # A folder that was named is meant: nothing takes its place.
        if data_dir:
            return _local(name, Path(data_dir), "--data-dir")
        if folder := os.environ.get("WIKIGPT_DATA_DIR"):
            return _local(name, Path(folder), "WIKIGPT_DATA_DIR")
        try:
            return _from_hub(name, cache_dir)
        except Unreachable as error:
            if dataset != "auto":
                raise UserError(f"{error}, or take whatever text there is with --dataset auto") from None
            return _manual_instead(error)
    if data_dir:
        raise UserError(
            f"--data-dir belongs to {', '.join(HUB_CONFIGS)} and auto, not to {dataset!r}: "
            "give your own files as --dataset path/to/*.txt"
        )
    return Source("pydoc", {}, _MANUAL) if dataset == "pydoc" else _users_files(dataset)


def read(source: Source) -> Text:
    """Reads, checks and splits what `locate` found. Raises UserError."""
    if not source.files:
        return Text(source.name, _pydoc(), source.origin, source.fallback)
    splits = {split: "".join(map(_read, files)) for split, files in source.files.items()}
    for split, text in splits.items():
        if not text.strip():
            raise UserError(f"{source.files[split][0]} is empty: give a file with text in it")
    if "all" in splits:
        splits = _split(splits["all"], source.name)
    origin = source.origin
    if source.name in HUB_CONFIGS:
        changed = [split for split in SPLITS if _digest(split, splits[split]) != WIKITEXT2[split]]
        if source.name == "wikitext-2" and changed:
            origin += f" (warning: {', '.join(changed)} not as published: results do not compare with papers)"
        if source.name == "wikitext-2-raw":
            if not changed:
                raise UserError(
                    f"{source.files['train'][0].parent} has the word-level WikiText-2, not the raw one: "
                    "use --dataset wikitext-2, or a folder with wiki.train.raw, wiki.valid.raw, wiki.test.raw"
                )
            splits = {split: clean_raw(text) for split, text in splits.items()}
    return Text(source.name, splits, origin, source.fallback)


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path and its permissions") from None
    text = decode(content, path).replace("\r\n", "\n")
    return text if text.endswith("\n") or not text else text + "\n"


def decode(content: bytes, name: str | Path) -> str:
    """The text of a file in UTF-8, without its byte-order mark. Raises UserError for whatever is not such text."""
    refuse_marked(content, name)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start:,}): convert it, e.g. iconv -f latin1 -t utf-8") from None
    if (place := text.find("\0")) >= 0:
        place = len(text[:place].encode())
        raise UserError(
            f"{name} is no text: byte {place:,} is 0; a UTF-16 file without its mark needs iconv -f utf-16le -t utf-8"
        )
    return text.removeprefix("\ufeff")


def refuse_marked(content: bytes, name: str | Path) -> None:
    """Raises UserError where a byte-order mark names another encoding than UTF-8. Windows editors write "Unicode" as UTF-16."""
    for encoding, *marks in (
        ("utf-32", codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # first: the mark of UTF-16 LE begins that of UTF-32 LE
        ("utf-16", codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    ):
        if content.startswith(tuple(marks)):
            raise UserError(f"{name} is {encoding.upper()} text: save it as UTF-8, e.g. iconv -f {encoding} -t utf-8")


# ---- WikiText-2: a local copy ----


def _local(dataset: str, folder: Path, said: str) -> Source:
    """The copy in `folder`, which `said` names: an option or a variable."""
    namings = NAMINGS[::-1] if dataset == "wikitext-2-raw" else NAMINGS[:2]
    folder = folder.expanduser()
    for place in (folder / dataset, folder):  # the published archives unpack to a folder of that name
        for naming in namings:
            files = {split: [place / naming.format(split)] for split in SPLITS}
            if all(file.is_file() for [file] in files.values()):
                return Source(dataset, files, f"local copy {place}")
    names = [[naming.format(split) for split in SPLITS] for naming in namings]
    remedy = f"correct {said}, or leave it out to download {dataset}"
    if not folder.is_dir():
        raise UserError(f"{folder} is {'a file, not a folder' if folder.exists() else 'not there'}: {remedy}")
    present = [name for row in names for name in row if (folder / name).is_file()]
    raise UserError(
        f"no complete {dataset} in {folder} (found {' '.join(present) or 'nothing'}; looked for "
        f"{', or '.join(map(' '.join, names))}): {remedy}"
    )


def _digest(split: str, text: str) -> str:
    content = text.encode()
    return _sha256(b"\n".join(sorted(content.split(b"\n"))) if split == "train" else content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---- WikiText-2: the Hub ----


class Unreachable(UserError):
    """The Hub did not answer, or not with the text."""


def _from_hub(dataset: str, cache_dir: str | Path | None) -> Source:
    folder = cache_root(cache_dir) / dataset
    origin = _downloaded(folder)
    if origin is None:
        files = _download(dataset)
        publish(folder, files, lambda: _downloaded(folder) is not None)
        origin = json.loads(files["manifest.json"])["origin"]
    return Source(dataset, {split: [folder / f"{split}.txt"] for split in SPLITS}, origin)


def _downloaded(folder: Path) -> str | None:
    """The origin of the text that was downloaded into `folder`, or None where there is no whole one."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in manifest["sizes"].items())
        return manifest["origin"] if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _download(dataset: str) -> dict[str, bytes]:
    """The three splits and a manifest, as files by name. Raises UserError if the Hub fails or misleads."""
    config, texts, commit = HUB_CONFIGS[dataset], {}, "main"
    for split, hub_split in zip(SPLITS, ("train", "validation", "test")):
        filename = f"{config}/{hub_split}-00000-of-00001.parquet"
        try:
            # The first answer fixes the commit, so that the three files are of one version.
            rows, commit = _download_rows(filename, commit)
        except UserError:
            raise
        except Exception as error:  # three generations of HTTP libraries below, with no base class in common
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
            way = "unset HF_HUB_OFFLINE" if type(error).__name__ == "OfflineModeIsEnabled" else "name a proxy in HTTPS_PROXY"
            raise Unreachable(
                f"cannot download {dataset} from the Hugging Face Hub ({reason}): give a local copy with --data-dir or "
                f"WIKIGPT_DATA_DIR, or {way}"
            ) from None
        # The Hub's rows are the original file's lines with their line ends, except that a line of white space
        # is "" there. In the original files all such lines are " \n", so this restores them byte for byte.
        texts[split] = "".join(row or " \n" for row in rows)
        if dataset == "wikitext-2" and _digest(split, texts[split]) != WIKITEXT2[split]:
            raise _corrupted(filename, "its text is not that of WikiText-2")
    files = {f"{split}.txt": text.encode() for split, text in texts.items()}
    origin = f"Hugging Face Hub, {HUB_REPO} {config} at {commit[:12]}"
    manifest = {"origin": origin, "sizes": {name: len(content) for name, content in files.items()}}
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def _download_rows(filename: str, revision: str) -> tuple[list[str], str]:
    """The column "text" of a parquet file on the Hub, its sha256 being what the Hub says, and its commit."""
    import pyarrow.parquet
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(HUB_REPO, filename, repo_type="dataset", revision=revision)
    # hf_hub_download retries an unreachable Hub for a minute, so ask this first. An LFS file's etag is its
    # sha256.
    metadata = _within(HUB_SECONDS, lambda: get_hf_file_metadata(url, timeout=HUB_SECONDS - 1))
    commit = metadata.commit_hash or revision
    # A folder of our own, not the hub's cache: a broken download goes with it and cannot spoil the next one.
    with tempfile.TemporaryDirectory(prefix="wikigpt-") as folder:
        path = Path(hf_hub_download(HUB_REPO, filename, repo_type="dataset", revision=commit, local_dir=folder))
        digest = _sha256(path.read_bytes())
        if digest != metadata.etag:
            raise _corrupted(filename, f"its sha256 is {digest}, on the Hub it is {metadata.etag}")
        return pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist(), commit


def _corrupted(filename: str, reason: str) -> UserError:
    return UserError(f"the download of {filename} is corrupted ({reason}): try again, or give a local copy with --data-dir")


def _within(seconds: float, call: Callable[[], T]) -> T:
    """call(), or TimeoutError: slow name servers and lists of dead addresses outlast any socket timeout."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(seconds)
    except FutureTimeout:
        raise TimeoutError(f"no answer in {seconds:g} s") from None


# ---- the Python manual, for machines that have neither ----

_MANUAL = "the Python manual (pydoc_data.topics) of this machine"
_WORD = re.compile(r"\d+\.\d+|\w+(?:['\u2019]\w+)*|([^\w\s])\1*")


def _manual_instead(reason: UserError) -> Source:
    """The manual, with a notice on stderr that says why."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text as Plain

    notice = (
        "The text is the Python manual (pydoc_data.topics), a few hundred kilobytes.\n"
        f"Good to see everything run; its results compare with nothing published.\nWhy: {reason}."
    )
    Console(stderr=True).print(Panel(Plain(notice), title="NOT WikiText-2", border_style="bold red"))
    return Source("pydoc", {}, _MANUAL, fallback=True)


def _pydoc() -> dict[str, str]:
    """The manual as lines of words and punctuation with spaces between, split by whole topics (90/5/5)."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no pydoc_data: give your own files as --dataset path/to/*.txt") from None
    # Topics contain one another ("compound" has all of "if"). A paragraph stays in the longest topic that has
    # it, so that nothing held out was seen in training.
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        lines = []
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            rows = paragraph.split("\n")
            # Indented paragraphs are code and grammar, where lines matter; prose becomes one line.
            for row in rows if any(row.startswith("   ") for row in rows) else [" ".join(rows)]:
                line = " ".join(word[0] for word in _WORD.finditer(re.sub(r"[*=~^\"-]{4,}", " ", row)))
                if line and line not in seen:
                    seen.add(line)
                    lines.append(line + "\n")
        kept[name] = "".join(lines)
    room = dict.fromkeys(("valid", "test"), 0.055 * sum(map(len, kept.values())))
    splits = dict.fromkeys(SPLITS, "")
    for name in sorted(kept, key=lambda name: _sha256(name.encode())):  # a shuffle that every machine repeats
        split = next((split for split in room if len(kept[name]) <= room[split]), "train")
        splits[split] += kept[name]
        if split in room:
            room[split] -= len(kept[name])
    return splits


# ---- the user's files ----


def _users_files(dataset: str) -> Source:
    path = Path(dataset).expanduser()
    is_folder = dataset != "" and path.is_dir()
    if is_folder:
        found = [file for file in path.iterdir() if not file.name.startswith(".")]
    else:
        found = [path] if path.is_file() else [Path(file) for file in glob.glob(str(path), recursive=True)]
    files = sorted(file for file in found if file.is_file())
    if not files:
        if is_folder or glob.has_magic(dataset):
            raise UserError(f"no file matches {dataset}: check the path, or quote the pattern")
        if path.suffix or len(path.parts) > 1:
            raise UserError(f"there is no file {dataset}: check the path, or use one of {', '.join(NAMES)}")
        near = difflib.get_close_matches(dataset, NAMES, 1, 0.5)
        raise UserError(
            f"unknown dataset {dataset!r}: {f'did you mean {near[0]!r}? ' if near else ''}"
            f"There are {', '.join(NAMES)}, or path/to/*.txt for your own files"
        )
    by_name = {file.name: file for file in files if file.parent == files[0].parent}
    for naming in NAMINGS:
        named = {split: [by_name[name]] for split in SPLITS if (name := naming.format(split)) in by_name}
        if len(named) == 3:
            return Source(dataset, named, f"local files {dataset}")
        if len(named) == 2:
            missing = next(naming.format(split) for split in SPLITS if split not in named)
            raise UserError(f"{dataset} has two of three splits: add {missing}, or give one file to be split")
    return Source(dataset, {"all": files}, f"local files {dataset}")


def _split(text: str, name: str) -> dict[str, str]:
    """The first 90% of the paragraphs, the next 5%, the last 5%; of the lines, where paragraphs are few.

    `text` ends with a newline, and is the three joined.
    """
    lines = [line + "\n" for line in text.split("\n")[:-1]]
    filled = [i for i, line in enumerate(lines) if line.strip()]
    paragraphs = [i for i in filled if i == filled[0] or not lines[i - 1].strip()]
    starts = paragraphs if len(paragraphs) >= 20 else filled
    if len(starts) < 3:
        raise UserError(f"{name} has too few lines to split: give more text, or train.txt, valid.txt and test.txt")
    held_out = max(1, round(len(starts) / 20))
    valid, test = starts[-2 * held_out], starts[-held_out]
    parts = lines[:valid], lines[valid:test], lines[test:]
    return {split: "".join(part) for split, part in zip(SPLITS, parts)}


# ---- cleaning ----


def clean_raw(text: str) -> str:
    """Undoes what the making of WikiText left in its raw text; cleaning twice is cleaning once.

    NFC; one space between words, none around lines; at most one blank line in a row; "1 @,@ 000" -> "1,000";
    " = = Section = = " -> "== Section ==". Ends with a newline.
    """
    lines = [" ".join(line.split()) for line in unicodedata.normalize("NFC", text).split("\n")]
    text = tidy_headings(join_escapes("\n".join(lines)))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def join_escapes(text: str) -> str:
    """ "fifty @-@ one" -> "fifty-one"; " @,@ " and " @.@ " likewise."""
    # Neighbours that are not @ themselves: joining can then never make a new escape.
    return re.sub(r"(?<=[^\s@]) @([-,.])@ (?=[^\s@])", r"\1", text)


def tidy_headings(text: str) -> str:
    """Lines like " = = Section = = " -> "== Section ==" where both sides have the same number of signs."""

    def tidy(match: re.Match[str]) -> str:
        left, title, right = match["left"].replace(" ", ""), match["title"], match["right"].replace(" ", "")
        return f"{left} {title} {right}" if left == right else match[0]

    pattern = r"^ ?(?P<left>=(?: ?=)*) (?P<title>[^=\s](?:.*[^=\s])?) (?P<right>=(?: ?=)*) ?$"
    return re.sub(pattern, tidy, text, flags=re.MULTILINE)


# ---- the cache ----


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, WIKIGPT_CACHE_DIR, $XDG_CACHE_HOME/wikigpt or ~/.cache/wikigpt: the first that is set."""
    if cache_dir or (cache_dir := os.environ.get("WIKIGPT_CACHE_DIR")):
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wikigpt"


def publish(folder: Path, files: Mapping[str, bytes], is_whole: Callable[[], bool]) -> None:
    """Writes `files` as `folder`, which appears whole or not at all. Raises UserError if it cannot.

    A folder that is there already stays if `is_whole()` (another process was first) and is replaced if not.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            new = work / "new"
            new.mkdir()
            for name, content in files.items():
                with (new / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            for attempt in range(10):  # other processes may be mending the same folder at this moment
                try:
                    os.replace(new, folder)
                    break
                except OSError:
                    if folder.exists() and is_whole():
                        break
                    if attempt == 9:
                        raise
                    with suppress(OSError):
                        os.replace(folder, work / f"old{attempt}")
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {folder.parent} ({error.strerror}): "
            "set WIKIGPT_CACHE_DIR to a folder that can be written"
        ) from None
