"""docs/benchmarks.md and, for each machine, a page and plots under docs/benchmarks/: from bench/results/<machine>/.

    python -m bench.report [--results bench/results] [--out docs] [--smoke]

The page begins with ours against the best of the others; every row stands on the machine's own page. Nothing comes from
elsewhere: what has no result is left out or a dash, and results of `--sizes smoke` are left out (unless --smoke asks for them),
since they prove that a benchmark runs and nothing else. bench/results/<machine>/notes.md, by hand, is put under its machine.
Plots are made by bench/plots.py.

What no benchmark measures, such as how long `make train` takes, is a table made by hand: in any .json file of
bench/results/<machine>/ a part that holds "table", a list of rows. The keys of the rows are the columns; those that are
equal in all rows are said once under the table. "title" is its heading, "note" (if given) a paragraph above it. Without
such a file there is no section.

    {"first hour": {"title": "The first commands", "note": "2 cores; wall time", "table": [
        {"command": "make train", "conditions": "quiet", "seconds": 0, "machine": "...", "commit": "...", "date": "2026-01-02"},
        {"command": "make train", "conditions": "two busy processes beside it", "seconds": 0, ...}]}}
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import plots, records
from .records import Record
from .suite import INSTALL, ours
from .tables import EVERYTHING, milliseconds, standings

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = "-"
Rows = list[dict[str, Any]]

HEAD = """# Benchmarks

Made by `python -m bench.report` from [bench/results](../bench/results). What is not here was not measured; a dash says so in a
table. How it is measured and how to rerun it stand at the end.
"""
SUMMARY = """The time of the fastest of the others, in the same run and on the same numbers, divided by the time of ours:
above 1 ours is faster, **bold** where it is slower. Mean: geometric, over all shapes and directions. "Host time" is
what a call costs the processor before a GPU has anything to do, where PyTorch's own operators are C++."""
TAIL = f"""## How it is measured

`pytest bench/` compares every op with its peers in the same run: PyTorch's own operators, `torch.compile` of the
reference and, where installed (`{INSTALL}`), flash-attn, Liger, quack and cut-cross-entropy. Each result is compared
with float64 before it is timed; a wrong one is timed too, is an error, and says that it is wrong. On a GPU time is that
of the device, by CUDA events around calls whose launches are queued beforehand, each with an L2 cache full of clean
lines of other data; whole steps of a model are timed as a caller waits for them. Implementations take turns, a sample
each, and medians are shown. The fraction of the ceiling is that of one large product of matrices, or of one large copy,
measured in the same run.

## How to rerun

```
make bench ARGS="--sizes default"          # smoke: is everything right, in minutes; default; full
pytest bench/bench_norm.py --benchmark-json=bench/results/<machine>/norm.json
pytest bench/bench_norm.py --benchmark-save=before    # and later --benchmark-compare, --benchmark-histogram=FILE
make gpu-check                             # all that needs a GPU, in nine minutes -> bench/results/<machine>/
make gpu-check                             # again: goes on with what is left; ARGS="--only ops/norm --again": that once more
python -m bench.report                     # this page
```

`make gpu-check` asks first whether every op is right, then how fast it is, then trains, then runs the GPU tests; minute by
minute in [gpu-check.md](gpu-check.md). A file of results is a journal: a line for each finished row, test and part.
"""


# --- what was measured ------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    folder: str
    parts: list[Record]
    notes: str
    tables: list[Record] = field(default_factory=list)  # by hand

    @property
    def rows(self) -> Rows:
        return [row for part in self.parts for row in part.rows if "median" in row and "op" in row]

    @property
    def facts(self) -> dict[str, Any]:
        return next((part.content["machine"] for part in self.parts if part.content.get("machine")), {})

    @property
    def gpu(self) -> bool:
        return "gpu" in self.facts

    @property
    def title(self) -> str:
        first, *_ = self.notes.splitlines() or [""]
        return self.facts.get("gpu") or self.facts.get("cpu") or first.removeprefix("# ").strip() or self.folder

    def of(self, file: str) -> dict[str, dict[str, Any]]:
        return {part.name: part.content for part in self.parts if part.file == file}

    def caption(self, parts: Iterable[Record] | None = None) -> str:
        """Hardware, versions, dates and commits, for a plot or a heading."""
        chosen = [part for part in (self.parts if parts is None else parts) if part.content.get("date")]
        versions: dict[str, str] = {}
        for part in chosen:
            versions |= part.content.get("machine", {}).get("versions", {})
        dates = sorted({part.content["date"][:10] for part in chosen})
        commits = sorted({_short(part.content.get("commit", "not known")) for part in chosen})
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "no date"
        return f"{self.title}; {shown}; {when}, commit {', '.join(commits)}"


def _short(commit: str) -> str:
    name, _, rest = commit.partition(" ")
    return f"{name[:10]} {rest}".strip() if len(name) == 40 else commit


def machines(results: Path, smoke: bool = False) -> list[Machine]:
    """GPUs first. Parts that failed have no rows; parts of smoke sizes are left out."""
    found: dict[str, Machine] = {}
    for path in sorted(results.iterdir()) if results.is_dir() else []:
        if path.is_dir():
            notes = path / "notes.md"
            found[path.name] = Machine(path.name, [], notes.read_text() if notes.exists() else "")
    for record in records.load(results):
        if "table" in record.content:
            found[record.folder].tables.append(record)
        elif smoke or record.content.get("sizes") != "smoke":
            found[record.folder].parts.append(record)
    return sorted((m for m in found.values() if m.parts or m.notes or m.tables), key=lambda m: (not m.gpu, m.folder))


# --- goals ------------------------------------------------------------------------------------------------------------

FASTEST = "the fastest of the others"


def ratios(rows: Rows, peers: Sequence[str] | None = None) -> list[float]:
    """In each group the time of the fastest peer (of those named) divided by ours."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["name"]] = row["median"]
    found = []
    for times in groups.values():
        rivals = peers or [name for name in times if not name.startswith("ours") and name != "reference"]
        others = [times[name] for name in rivals if name in times]
        if "ours" in times and others:
            found.append(min(others) / times["ours"])
    return found


def mean_and_worst(values: list[float], show: Callable[[float], str] = lambda x: f"{x:.2f}x") -> str:
    if not values:
        return NOT_MEASURED
    mean = math.exp(statistics.fmean(math.log(value) for value in values))
    return f"{show(mean)}, worst {show(min(values))}"


def _percent(x: float) -> str:
    return f"{x:.0%}"


def _ours(rows: Rows, key: str) -> list[float]:
    return [row[key] for row in rows if row["name"] == "ours" and row.get(key)]


def _large(rows: Rows) -> Rows:
    """Norms of 64 MB in bf16 and more: smaller ones are bound by the launch."""
    return [row for row in rows if row["axes"]["m"] * row["axes"]["n"] >= 2**25]


def _starts(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: row["op"].startswith(names)


def _logits(rows: Rows) -> str:
    """Peak memory beyond the returned gradients, as a part of the logits."""
    parts = []
    for row in rows:
        if row["name"] == "ours":
            n, d, v = (row["axes"][key] for key in "ndv")
            gradients = (n + v) * d if row["axes"]["backward"] else 0
            parts.append(max(0.0, row["peak_bytes"] / 2 - gradients) / (n * v))
    return f", {max(parts):.1%} of the logits at most" if parts else ""


def _tokens(model: str, *peers: str) -> Callable[[Machine], str]:
    def figure(machine: Machine) -> str:
        """The fastest of our ways to train against the fastest of these peers."""
        rates: dict[str, float] = {}
        for row in machine.rows:
            if row["op"].startswith("training step") and row["shape"].startswith(model):
                rates[row["name"]] = row["tokens_per_second"]
        mine = [rate for name, rate in rates.items() if name.startswith("ours")]
        theirs = [rates[peer] for peer in peers if peer in rates]
        return f"{max(mine) / max(theirs):.2f}x" if mine and theirs else NOT_MEASURED

    return figure


def _mfu(machine: Machine) -> str:
    rows = [r for r in machine.rows if r["op"].startswith("training step") and r["shape"].startswith("12 layers x 768")]
    found = [row["mfu"] for row in rows if row["name"].startswith("ours") and row.get("mfu")]
    return f"{max(found):.1%}" if found else NOT_MEASURED


def _on_wikitext(machine: Machine) -> dict[str, dict[str, Any]]:
    """The runs on WikiText-2: without it training takes another text, whose perplexity says nothing."""
    return {name: part for name, part in machine.of("wikitext").items() if part.get("dataset", "").startswith("wikitext")}


def _perplexity(machine: Machine) -> str:
    runs = _on_wikitext(machine)
    shown = [f"{name} {part['valid_perplexity']:.1f}" for name, part in runs.items() if "valid_perplexity" in part]
    return "; ".join(shown) or NOT_MEASURED


def _of(chosen: Callable[[dict[str, Any]], bool], show: Callable[[Rows], str]) -> Callable[[Machine], str]:
    def figure(machine: Machine) -> str:
        rows = [row for row in machine.rows if chosen(row)]
        return show(rows) if rows else NOT_MEASURED

    return figure


ATTENTION_PEERS = ("SDPA flash", "SDPA cuDNN", "FlexAttention")
# what, measured against, goal, figure
GOALS: list[tuple[str, str, str, Callable[[Machine], str]]] = [
    ("attention forward, head_dim 64 and 128, S 512 to 16k", "the fastest of SDPA flash, SDPA cuDNN, FlexAttention", "1.0x",
     _of(_starts("attention forward, "), lambda rows: mean_and_worst(ratios(rows, ATTENTION_PEERS)))),
    ("attention forward and backward, the same cells", "the same", "0.9x",
     _of(_starts("attention forward and backward"), lambda rows: mean_and_worst(ratios(rows, ATTENTION_PEERS)))),
    ("decoding, batch 1 to 64, context 8k to 128k", "bandwidth of a copy", "85%",
     _of(_starts("decoding"), lambda rows: mean_and_worst(_ours(rows, "of_ceiling"), _percent))),
    ("layer_norm, rms_norm, 64 MB and more", "bandwidth of a copy", "90%",
     _of(_starts("layer_norm", "rms_norm"), lambda rows: mean_and_worst(_ours(_large(rows), "of_ceiling"), _percent))),
    ("layer_norm, rms_norm, all", FASTEST, "1.0x",
     _of(_starts("layer_norm", "rms_norm"), lambda rows: mean_and_worst(ratios(rows)))),
    ("linear cross-entropy", "linear + cross_entropy; memory of the logits", "faster; under 5%",
     _of(_starts("linear cross-entropy"),
         lambda rows: mean_and_worst(ratios(rows, ("linear + cross_entropy",))) + _logits(rows))),
    ("bias_gelu, swiglu, geglu, rotary", "bandwidth of a copy", "90%",
     _of(_starts("bias_gelu", "swiglu", "geglu", "rotary"), lambda rows: mean_and_worst(_ours(rows, "of_ceiling"), _percent))),
    ("FusedAdamW with clipping", "fused AdamW and clip_grad_norm_: the fastest of the others", "1.5x",
     _of(_starts("AdamW"), lambda rows: mean_and_worst(ratios(rows)))),
    ("sampling with top_p", "a sort, softmax and multinomial", "5.0x",
     _of(_starts("sample, top_p"), lambda rows: mean_and_worst(ratios(rows, ("torch, sort + multinomial",))))),
    ("training, 6 layers x 512", "plain PyTorch: SDPA, torch.compile, fused AdamW, vocabulary padded or not", "2.0x",
     _tokens("6 layers x 512", "plain PyTorch, compiled", "plain PyTorch, vocabulary padded, compiled")),
    ("training, 6 layers x 512", "the source document's model code", "5.0x", _tokens("6 layers x 512", "seed document")),
    ("training, GPT-2 small, S 1024, bf16", "bf16 peak in the data sheet (MFU)", "55%", _mfu),
    ("WikiText-2 for the same time", "validation perplexity", "the lowest", _perplexity),
]  # fmt: skip


def _against(op: str, peer: str) -> Callable[[Machine], str]:
    return _of(lambda row: row["op"] == op, lambda rows: mean_and_worst(ratios(rows, (peer,))))


CPU_GOALS: list[tuple[str, str, str, Callable[[Machine], str]]] = [
    *((f"training step, {precision}", against, goal, _against(f"training step, {precision}", peer))
      for precision in ("fp32", "bf16")
      for peer, against, goal in (
          ("plain PyTorch, compiled", "plain PyTorch: SDPA, torch.compile, fused AdamW", "1.3x"),
          ("plain PyTorch", "plain PyTorch, eager", "2.0x"))),
    ("generation, batch 1 and 8", "transformers' generate", "1.5x", _against("generation", "transformers")),
]  # fmt: skip


def cpu_goals(found: Sequence[Machine]) -> str:
    """Every goal on a CPU, a column for each that has been measured."""
    measured = [machine for machine in found if not machine.gpu and machine.rows]
    body = [(what, against, goal, *(figure(machine) for machine in measured)) for what, against, goal, figure in CPU_GOALS]
    return table(("", "measured against", "goal", *(machine.title for machine in measured)), body, left=3 + len(measured))


def goals(found: Sequence[Machine]) -> str:
    """Every goal on each H100 and H200 that has run."""
    columns = [machine for name in ("H100", "H200") for machine in found if machine.gpu and name in machine.title]
    head = ("", "measured against", "goal", *(machine.title for machine in columns))
    return table(head, ([*words, *(figure(machine) for machine in columns)] for *words, figure in GOALS), len(head))


# --- the page ---------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], body: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns are text, the others numbers."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in body)])


_DIRECTION = re.compile(r",? (forward and backward|forward|backward)(?=,|$)")


def family(op: str) -> str:
    """An operation without its direction and form: "attention" of "attention forward, head_dim 64, causal"."""
    if op.startswith("patched"):  # whole models, whose directions are different things
        return op
    return (
        _DIRECTION.sub("", op.partition(", head_dim")[0])
        .partition(", top_")[0]
        .partition(", min_")[0]
        .removesuffix(", no filter")
    )


def families(rows: Rows) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(family(row["op"]), []).append(row)
    return found


def best_of_others(rows: Rows) -> dict[str, tuple[float, str]]:
    """In each group that has ours: the time of the fastest peer divided by ours, and its name. The reference is a peer where
    there is no other."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["name"]] = row["median"]
    found = {}
    for group, times in groups.items():
        others = {name: time for name, time in times.items() if not ours(name)}
        rivals = {name: time for name, time in others.items() if name != "reference"} or others
        if "ours" in times and rivals:
            fastest = min(rivals, key=lambda name: rivals[name])
            found[group] = rivals[fastest] / times["ours"], fastest
    return found


def ratio(value: float) -> str:
    return f"**{value:.2f}x**" if value < 1 else f"{value:.2f}x"


def summary(rows: Rows) -> str:
    """A line for each op: ours against the best of the others."""
    body = []
    for op, members in families(rows).items():
        found = best_of_others(members)
        if not found:
            continue
        mean = math.exp(statistics.fmean(math.log(value) for value, _ in found.values()))
        group, (worst, _) = min(found.items(), key=lambda item: item[1][0])
        names = "; ".join(dict.fromkeys(name for _, name in found.values()))
        where = group.removeprefix(op).removeprefix(",").strip()
        many = len(found) > 1
        body.append([op, names, str(len(found)), ratio(mean), ratio(worst) if many else "", where if many else ""])
    return table(("op", "fastest of the others", "shapes", "mean", "worst", "worst shape"), body, 2)


def against_each(rows: Rows, overall: bool = False) -> str:
    """By operation and peer; or by peer over all operations."""
    found = standings((row["op"], row["shape"], row["name"], row["median"]) for row in rows)
    body = []
    for s in found:
        if (s.op == EVERYTHING) == overall:
            shape, worst = s.worst
            body.append([s.op, s.peer, str(len(s.ratios)), ratio(s.mean), ratio(worst), shape, ratio(s.best[1])])
    return table(("operation", "peer", "shapes", "mean", "worst", "worst shape", "best"), body, 2) if body else ""


def rows_of(rows: Rows) -> str:
    """Every row of one operation."""
    optional = {
        "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}" if "tokens_per_second" in r else None,
        "TFLOP/s": lambda r: f"{r['flops_per_second'] / 1e12:.4g}" if "flops_per_second" in r else None,
        "GB/s": lambda r: f"{r['bytes_per_second'] / 1e9:,.4g}" if "bytes_per_second" in r else None,
        "of ceiling": lambda r: f"{r['of_ceiling']:.0%}" if "of_ceiling" in r else None,
        "MFU": lambda r: f"{r['mfu']:.1%}" if "mfu" in r else None,
        "peak MiB": lambda r: f"{r['peak_bytes'] / 2**20:,.1f}" if "peak_bytes" in r else None,
    }
    shown = {name: cell for name, cell in optional.items() if any(cell(row) is not None for row in rows)}
    ours = {row["shape"]: row["median"] for row in rows if row["name"] == "ours"}
    body, before = [], None
    for row in rows:
        base = ours.get(row["shape"])
        factor = f"{row['median'] / base:.2f}" if base and row["name"] != "ours" else ""
        body.append([row["shape"] if row["shape"] != before else "", row["name"], milliseconds(row["median"]),
                     *(cell(row) or "" for cell in shown.values()), factor])  # fmt: skip
        before = row["shape"]
    return table(("shape", "implementation", "ms", *shown, "time / ours"), body, 2)


def picture(path: Path, title: str) -> str:
    """The plot for a light and a dark page."""
    place = f"benchmarks/{path.name}"
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{place}-dark.svg">'
        f'<img alt="{title}" src="{place}.svg"></picture>'
    )


def wikitext(runs: dict[str, dict[str, Any]]) -> str:
    body = []
    for name, part in runs.items():
        if "valid_perplexity" in part:
            mfu = f"{part['mfu']:.1%}" if part.get("mfu") else ""
            rate, perplexities = part["tokens_per_second"], (part["valid_perplexity"], part["test_perplexity"])
            body.append([name, f"{part['training_seconds']:.0f}", f"{part['steps']:,}", f"{rate:,.0f}", mfu,
                         *(f"{value:.1f}" for value in perplexities)])  # fmt: skip
    if not body:
        return ""
    head = ("run", "seconds", "steps", "tokens/s", "MFU", "validation perplexity", "test perplexity")
    return table(head, body)


def profiled(part: dict[str, Any]) -> str:
    """Where the time of a training step goes."""
    sections = []
    for name, found in part.items():
        if not isinstance(found, dict) or "ms_per_step" not in found:
            continue
        facts = [f"{found['ms_per_step']:.2f} ms a step", f"{found['tokens_per_second']:,.0f} tokens/s"]
        if found.get("mfu"):
            facts.append(f"MFU {found['mfu']:.1%}")
        if "ours_fraction" in found:
            facts += [f"{found['ours_fraction']:.0%} of the device's time in our kernels",
                      f"idle {found['idle_fraction'] or 0:.1%} ({found['gaps_per_step']:.0f} gaps a step, "
                      f"median {found['median_gap_us']:.1f} us)"]  # fmt: skip
        text = f"**{name}**: {', '.join(facts)}."
        if found.get("top"):
            body = [[f"`{k['name'][:70]}`", "yes" if k["ours"] else "", f"{k['fraction']:.1%}", f"{k['ms_per_step']:.3f}",
                     f"{k['calls_per_step']:.0f}"] for k in found["top"][:8]]  # fmt: skip
            text += "\n\n" + table(("kernel", "ours", "of the time", "ms a step", "calls a step"), body, 2)
        sections.append(text)
    return "\n\n".join(sections)


def tested(parts: dict[str, dict[str, Any]]) -> str:
    """What the tests on this machine said."""
    if not parts:
        return ""
    body = []
    for name, part in parts.items():
        outcomes = [entry["outcome"] for entry in part.get("tests", {}).values()]
        counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
        state = "passed" if part.get("passed") else f"FAILED ({part.get('error') or 'it did not end'})"
        body.append([name, state, f"{part.get('seconds', 0):.0f}", counts or (part.get("tail") or [""])[-1].strip("= ")])
    bad = [
        f"- **{entry['outcome']}**: {test}"
        for part in parts.values()
        for test, entry in part.get("tests", {}).items()
        if entry["outcome"] in ("failed", "running")
    ]
    return "\n".join([table(("tests", "", "seconds", "outcomes"), body, 2), *([""] if bad else []), *bad])


def judged(parts: dict[str, dict[str, Any]]) -> str:
    """Is every op right here: cases, the largest error in parts of plain PyTorch's, what is wrong."""
    body, wrong = [], []
    for op, part in parts.items():
        rows = part.get("rows", [])
        errors = [pair for row in rows for pair in row["errors"].values()]
        worst = max((mine / plain for mine, plain, _ in errors if plain), default=None)
        right = sum(row["ok"] for row in rows)
        body.append([op, f"{right} of {len(rows)}", "" if worst is None else f"{worst:.2f}x"])
        wrong += [f"- **wrong**: {op}: {row['name']}: {row['wrong']}" for row in rows if not row["ok"]]
    if not body:
        return ""
    head = ("op", "cases right", "largest error / plain PyTorch's, both against float64")
    return "\n".join([table(head, body), *([""] if wrong else []), *wrong])


def by_hand(record: Record) -> list[str]:
    """A table that somebody measured: what is equal in all its rows is said once under it."""
    content: dict[str, Any] = record.content
    rows = content["table"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    same = [key for key in columns if len(rows) > 1 and len({str(row.get(key)) for row in rows}) == 1]
    shown = [key for key in columns if key not in same]
    numbers = {key for key in shown if all(isinstance(row.get(key, 0), (int, float)) for row in rows)}
    shown.sort(key=lambda key: key in numbers)

    def cell(value: Any) -> str:
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    lines = [f"## {content.get('title', record.name)}", *([content["note"]] if content.get("note") else [])]
    lines.append(table(shown, ([cell(row.get(key, NOT_MEASURED)) for key in shown] for row in rows), len(shown) - len(numbers)))
    if same:
        lines.append("; ".join(f"{key}: {cell(rows[0][key])}" for key in same) + ".")
    return lines


def section(machine: Machine, out: Path) -> list[str]:
    """A machine on the common page: pictures, training, whether all is right. Its rows are on its own page."""
    lines = [f"## {machine.title}"]
    if not machine.parts:
        return [*lines, machine.notes.partition("\n")[2].strip()]
    lines.append(machine.caption() + ".")
    rows = machine.rows
    if rows:
        lines.append(f"[Every row, against each peer](benchmarks/{machine.folder}.md).")
    parts = [
        *((title, picture(path, f"{title}, {machine.title}"))
          for title, path in plots.draw(machine, out / "benchmarks").items() if path is not None),
        *((op, rows_of(members)) for op, members in families(rows).items() if op.startswith("training step")),
        ("WikiText-2 runs", wikitext(_on_wikitext(machine))),
        *([("Is every op right", judged(machine.of("verdict"))),
           ("Profile of a training step", profiled(machine.of("training").get("profile", {}))),
           ("Tests on this GPU", tested(machine.of("tests")))] if machine.gpu else []),
    ]  # fmt: skip
    for title, text in parts:
        if text:
            lines += [f"### {title[:1].upper()}{title[1:]}", text]
    missing: dict[str, list[str]] = {}
    for part in machine.parts:
        for reason, tests in part.content.get("missing", {}).items():
            if machine.gpu:
                missing.setdefault(reason, []).extend(f"{test}: {', '.join(names)}" for test, names in tests.items())
        if late := part.content.get("left_out_for_time"):
            missing.setdefault("left out when time was over", []).append(f"{part.name}: {len(late)} rows")
        for row in part.rows:
            if row.get("wrong") and "median" in row:
                missing.setdefault("WRONG", []).append(f"{row['group']}, {row['name']}: {row['wrong']}")
        if part.content.get("error"):
            missing.setdefault("failed", []).append(f"{part.file}/{part.name}: {part.content['error']}")
    for reason, what in missing.items():
        lines.append(f"{reason}: {'; '.join(what)}.")
    if machine.notes:
        lines.append(machine.notes.strip())
    return lines


def details(machine: Machine) -> str:
    """The page of a machine: every row, op by op."""
    rows = machine.rows
    lines = [f"# {machine.title}: every row", "Made by `python -m bench.report`; the summary is [here](../benchmarks.md).",
             machine.caption() + ".", "Ratios are the time of a peer divided by ours: above 1 ours is faster."]  # fmt: skip
    if overall := against_each(rows, overall=True):
        lines += ["## Each peer over all ops", overall]
    for name, members in families(rows).items():
        lines += [f"## {name[:1].upper()}{name[1:]}", against_each(members)]
        for op in dict.fromkeys(row["op"] for row in members):
            lines += [f"### {op}", rows_of([row for row in members if row["op"] == op])]
    return "\n\n".join(line for line in lines if line) + "\n"


def page(found: Sequence[Machine], out: Path) -> str:
    lines = [HEAD.strip()]
    if measured := [machine for machine in found if machine.rows]:
        lines += ["## Ours against the best of the others", SUMMARY]
        for machine in measured:
            lines += [f"### On {machine.title}", summary(machine.rows)]
    lines += ["## Goals on a GPU", "bf16, the peers in the same run; geometric mean and worst shape.", goals(found)]
    lines += ["## Goals on a CPU", "Peers in the same run, in turns; geometric mean and worst shape.", cpu_goals(found)]
    if not any(machine.gpu for machine in found):
        lines.append(
            "No GPU has run this yet. What is known without one (registers, spills, shared memory, instructions, the floor in "
            "time): [kernels/performance.md](kernels/performance.md)."
        )
    for machine in found:
        for record in machine.tables:
            lines += by_hand(record)
    for machine in found:
        if machine.parts or machine.notes:
            lines += section(machine, out)
    return "\n\n".join([*lines, TAIL])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of benchmarks.md and benchmarks/")
    parser.add_argument("--smoke", action="store_true", help="also results of smoke sizes, to try the page")
    args = parser.parse_args(arguments)
    if not args.results.is_dir():
        parser.error(f"--results: {args.results} is no folder")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        found = machines(args.results, args.smoke)
    except ValueError as error:
        parser.error(str(error))
    left_out = sum(record.content.get("sizes") == "smoke" for record in records.load(args.results))
    if left_out and not args.smoke:
        print(f"{left_out} parts of smoke sizes are left out, as they are no results (--smoke shows them)")
    (args.out / "benchmarks.md").write_text(page(found, args.out))
    print(f"{args.out / 'benchmarks.md'}, from")
    for machine in found:
        if machine.rows:
            path = args.out / "benchmarks" / f"{machine.folder}.md"
            path.parent.mkdir(exist_ok=True)
            path.write_text(details(machine))
        print(f"  {machine.title}: {len(machine.rows)} rows")


if __name__ == "__main__":
    main()
