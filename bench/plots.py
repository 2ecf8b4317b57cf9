"""The plots of docs/benchmarks.md: each as NAME.svg and NAME-dark.svg for the page, and NAME.png for everywhere else.

Under every plot stand hardware, versions, date and commit of the results in it. Ours is always the same strong colour, filled
and drawn on top, its variants are hollow. A peer has the same colour and marker in every plot, hollow and larger than ours, so
that what coincides can still be seen.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from . import NO_BREAK

if TYPE_CHECKING:
    from .records import Record
    from .report import Machine

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    faint: str
    ours: str
    peers: tuple[str, ...]


# Each hue keeps a contrast of 3 and more with its paper; neighbours differ in lightness too, for those who see fewer colours.
LIGHT = Theme("#ffffff", "#24292f", "#d0d7de", "#0969da",
              ("#c2410c", "#2f7d4f", "#8250df", "#9a6700", "#bf3989", "#1b7c83", "#57606a", "#7a4a1e"))  # fmt: skip
DARK = Theme("#0d1117", "#e6edf3", "#30363d", "#58a6ff",
             ("#ff9b5e", "#56d364", "#d2a8ff", "#e3b341", "#ff80c0", "#56d4dd", "#9aa4af", "#c69a6d"))  # fmt: skip
Make = Callable[[Theme], Figure]
Value = Callable[[dict[str, Any]], float]
MARKERS = ("s", "^", "D", "v", "P", "X", "*", "h")
# Peer -> its colour. 0 is what PyTorch users write, 1 the same compiled (attention: cuDNN). Those that meet in no plot share.
PEERS = {
    "SDPA flash": 0, "SDPA cuDNN": 1, "FlexAttention": 2, "flash-attn 2": 3, "flash-attn 3": 4, "SDPA efficient": 5,
    "SDPA math": 6, "reference": 7, "torch": 0, "torch.compile": 1, "liger": 2, "quack": 3, "torch fused": 4,
    "torch foreach": 5, "torch for-loop": 6, "SDPA": 7, "linear + cross_entropy": 0, "sdpa-compile": 1, "transformers": 2,
    "seed document": 3, "F.linear_cross_entropy, chunks": 4, "linear + cross_entropy, float32": 5,
    "F.linear_cross_entropy, accurate": 6, "cut_cross_entropy": 7, "plain PyTorch": 0, "plain PyTorch, compiled": 1,
    "flashinfer": 2, "torch, softmax + multinomial": 3, "plain PyTorch, vocabulary padded, compiled": 5, "F.cross_entropy": 0,
    "torch, sort + multinomial": 6, "torch, topk + multinomial": 7,
}  # fmt: skip


def _before(name: str) -> int:
    """How many peers have taken this one's colour before it, each with another marker."""
    names = list(PEERS)
    earlier = names[: names.index(name)] if name in PEERS else names
    return sum(PEERS[other] == PEERS.get(name, 0) for other in earlier)


def is_ours(name: str) -> bool:
    return name == "ours" or name.startswith("ours,")


@dataclass
class Style:
    """Colour and marker of every implementation in a plot."""

    theme: Theme
    names: Sequence[str]

    def __post_init__(self) -> None:
        known = [name for name in PEERS if name in self.names]
        others = sorted(name for name in self.names if not is_ours(name) and name not in known)
        taken = {PEERS[name] for name in known}
        free = [i for i in range(len(self.theme.peers)) if i not in taken] or list(range(len(self.theme.peers)))
        self.peers = known + others
        self.colors = {name: PEERS[name] for name in known} | {name: free[i % len(free)] for i, name in enumerate(others)}
        self.variants = sorted(name for name in self.names if is_ours(name))

    def color(self, name: str) -> str:
        return self.theme.ours if is_ours(name) else self.theme.peers[self.colors[name]]

    def line(self, name: str) -> dict[str, Any]:
        if is_ours(name):
            i = self.variants.index(name)
            shared = {"color": self.theme.ours, "marker": ("o", *MARKERS)[i % 9], "linewidth": 2.4, "zorder": 3}
            hollow = {} if name == "ours" else {"markerfacecolor": "none", "markeredgewidth": 1.4}
            return {**shared, **hollow, "linestyle": ("-", "--", ":", "-.")[i % 4]}
        marker = MARKERS[(self.colors[name] + _before(name)) % len(MARKERS)]
        return {"color": self.color(name), "marker": marker, "linewidth": 1.3, "zorder": 2, "markersize": 8,
                "markerfacecolor": "none", "markeredgewidth": 1.4}  # fmt: skip

    def order(self) -> list[str]:
        return [*self.variants, *self.peers]


@contextmanager
def _paper(theme: Theme) -> Any:
    settings = {
        "figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "savefig.facecolor": theme.paper,
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.titlecolor": theme.ink, "axes.edgecolor": theme.faint,
        "xtick.color": theme.ink, "ytick.color": theme.ink, "grid.color": theme.faint, "legend.frameon": False,
        "font.size": 10, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "lines.markersize": 5, "svg.hashsalt": "wikigpt",
        "svg.fonttype": "none",
    }  # fmt: skip
    with rc_context(settings):  # type: ignore[arg-type]
        yield


def _save(path: Path, title: str, caption: str, make: Make) -> Path:
    """Draw a figure for both papers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for theme, name in ((LIGHT, path.name), (DARK, f"{path.name}-dark")):
        with _paper(theme):
            figure = make(theme)
            FigureCanvasAgg(figure)
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
            # An empty line keeps the layout's room for what is written under it.
            figure.supxlabel(_wrapped(caption, int(figure.get_figwidth() * 17)), x=0.01, ha="left", fontsize=7.5)
            figure.savefig(path.with_name(f"{name}.svg"), metadata={"Date": None})
            if theme is LIGHT:
                figure.savefig(path.with_name(f"{name}.png"), dpi=130)
    return path


def _wrapped(text: str, width: int) -> str:
    """Lines that break behind commas, wherever a part between two fits a line."""
    kept = ", ".join(part.replace(" ", NO_BREAK) if len(part) < width else part for part in text.split(", "))
    return textwrap.fill(kept, width).replace(NO_BREAK, " ")


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))


def _count(value: float, _: object = None) -> str:
    """A number on an axis, short enough that ticks keep apart."""
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e5 else f"{value:,g}"


def _legend(figure: Figure, style: Style, **changes: Any) -> None:
    handles = [Line2D([], [], label=name, **style.line(name) | changes) for name in style.order()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9)


def _panels(rows: Rows, key: Callable[[dict[str, Any]], str]) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _names(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows))


# --- by sequence length -----------------------------------------------------------------------------------------------


def by_length(rows: Rows, value: Value, label: str) -> Make:
    """A panel for each operation, a line for each implementation, sequence length on the horizontal axis. Values that differ by
    more than a factor of 20 stand on a logarithmic axis."""
    panels = _panels(rows, lambda row: row["op"])

    def make(theme: Theme) -> Figure:
        style = Style(theme, _names(rows))
        columns = min(2, len(panels))
        lines = -(-len(panels) // columns)
        figure = _figure(5.0 * columns + 2.2, 2.7 * lines + 0.9)
        axes = figure.subplots(lines, columns, squeeze=False).flat
        for axis, (title, members) in zip(axes, panels.items()):
            for name in style.order():
                points = sorted((row["axes"]["s"], value(row)) for row in members if row["name"] == name)
                if points:
                    axis.plot(*zip(*points), **style.line(name))
            lengths = sorted({row["axes"]["s"] for row in members})
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{s // 1024}k" if s % 1024 == 0 else str(s) for s in lengths])
            axis.minorticks_off()
            axis.set(title=title, xlabel="sequence length", ylabel=label)
            values = [value(row) for row in members]
            if max(values) > 20 * min(values):
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_minor_locator(NullLocator())
            else:
                axis.set_ylim(0, 1.08 * max(values))
            axis.yaxis.set_major_formatter(_count)
        for axis in list(axes)[len(panels) :]:
            axis.set_visible(False)
        _legend(figure, style)
        return figure

    return make


# --- fraction of the roofline -----------------------------------------------------------------------------------------


CEILINGS = {"matmul": "one large product", "copy": "one large copy"}


def roofline(rows: Rows) -> Make:
    """A line of dots for each group: ours and the peers, as parts of the ceiling that was measured in the same run."""
    panels = _panels(rows, lambda row: row["op"])

    def make(theme: Theme) -> Figure:
        style = Style(theme, _names(rows))
        groups = [(op, shape) for op, members in panels.items() for shape in dict.fromkeys(row["shape"] for row in members)]
        ceilings = {row["ceiling"] for row in rows}
        figure = _figure(10.5, 0.24 * (len(groups) + len(panels)) + 1.8)
        axis = figure.subplots()
        place, ticks, labels = 0.0, [], []
        for op, members in panels.items():
            axis.text(0.0, place, op, fontsize=9, fontweight="bold", va="center")
            if len(ceilings) > 1:
                axis.text(1.0, place, f"100%: {CEILINGS[members[0]['ceiling']]} ", fontsize=7.5, va="center", ha="right")
            place += 1
            for shape in dict.fromkeys(row["shape"] for row in members):
                here = [row for row in members if row["shape"] == shape]
                for row in sorted(here, key=lambda row: (is_ours(row["name"]), row["name"] == "ours")):
                    look = style.line(row["name"])
                    look |= {"markersize": 8 if row["name"] == "ours" else 7, "linestyle": "none", "clip_on": False}
                    axis.plot(row["of_ceiling"], place, **look)
                ticks.append(place)
                labels.append(shape)
                place += 1
        axis.set_yticks(ticks, labels, fontsize=7.5)
        axis.set_ylim(place - 0.3, -0.7)
        axis.axvline(1.0, color=theme.ink, linewidth=1)
        axis.set_xlim(left=0, right=max(1.05, 1.05 * max(row["of_ceiling"] for row in rows)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        what = CEILINGS[ceilings.pop()] if len(ceilings) == 1 else "the ceiling"
        axis.set_xlabel(f"part of the rate of {what}, measured in the same run")
        _legend(figure, style, linestyle="none")
        return figure

    return make


# --- bars -------------------------------------------------------------------------------------------------------------


def bars(rows: Rows, value: Value, label: str) -> Make:
    """A panel for each group, a bar for each implementation."""
    panels = _panels(rows, lambda row: row["group"])

    def make(theme: Theme) -> Figure:
        style = Style(theme, _names(rows))
        counts = [len(members) for members in panels.values()]
        room = 96 - 3 * max(len(row["name"]) for row in rows) // 4  # letters of a title beside the names
        figure = _figure(9.0, 0.3 * sum(counts) + 0.75 * len(panels) + 0.8)
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[count + 1.2 for count in counts])[:, 0]
        for axis, (title, members) in zip(axes, panels.items()):
            values = [value(row) for row in members]
            places = range(len(members))
            axis.barh(places, values, color=[style.color(row["name"]) for row in members], height=0.7)
            for place, number in zip(places, values):
                axis.annotate(f"{number:,.0f}", (number, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
            axis.set_yticks(places, _names(members))
            axis.invert_yaxis()
            axis.set_xlim(0, 1.16 * max(values))
            axis.xaxis.set_major_locator(MaxNLocator(6))
            axis.xaxis.set_major_formatter(_count)
            axis.grid(axis="y", visible=False)
            axis.set_title(_wrapped(title, room), loc="left")
        axes[-1].set_xlabel(label)
        return figure

    return make


def curves(runs: dict[str, dict[str, Any]]) -> Make:
    """Loss by time of the runs of WikiText-2."""

    def make(theme: Theme) -> Figure:
        style = Style(theme, list(runs))
        figure = _figure(9.0, 4.2)
        axis = figure.subplots()
        for name in sorted(runs, key=lambda name: runs[name]["valid_perplexity"]):
            part = runs[name]
            look = style.line(name) | {
                "marker": "",
                "linewidth": 1.4,
                "label": f"{name}: validation perplexity {part['valid_perplexity']:.1f}",
            }
            axis.plot(*zip(*part["curve"]), **look)
        axis.set(xlabel="seconds of training", ylabel="training loss, nats a token")
        axis.legend()
        return figure

    return make


# --- all of a machine -------------------------------------------------------------------------------------------------


def _memory(row: dict[str, Any]) -> float:
    return row["peak_bytes"] / 2**20


def _attention(row: dict[str, Any]) -> bool:
    return row["op"].startswith("attention") and "s" in row.get("axes", {})


def _step(row: dict[str, Any]) -> bool:
    return row["op"].startswith("training step")


KINDS = ("attention", "norms", "losses", "others")  # a plot of all would be too long to read


def _kind(op: str) -> str:
    for kind, words in zip(KINDS, (("attention", "decoding"), ("layer_norm", "rms_norm"), ("cross-entropy",))):
        if any(word in op for word in words):
            return kind
    return KINDS[-1]


def _bound(kind: str, row: dict[str, Any]) -> bool:
    """Rows of a kind of ops that have a ceiling; the references are no rivals."""
    return "of_ceiling" in row and not _step(row) and row["name"] != "reference" and _kind(row["op"]) == kind


# title, name of the file, which rows, how
PLOTS: list[tuple[str, str, Callable[[dict[str, Any]], bool], Callable[[Rows], Make]]] = [
    ("Speed by sequence length", "speed", lambda row: _attention(row) and "flops_per_second" in row,
     lambda rows: by_length(rows, lambda row: row["flops_per_second"] / 1e12, "TFLOP/s")),
    *((f"Fraction of the roofline: {name}", f"roofline-{name}", functools.partial(_bound, name), roofline) for name in KINDS),
    ("Peak memory of attention", "memory-attention", lambda row: _attention(row) and bool(row.get("peak_bytes")),
     lambda rows: by_length(rows, _memory, "MiB beyond the inputs")),
    ("Peak memory of the loss", "memory-loss",
     lambda row: row["op"].startswith("linear cross-entropy") and bool(row.get("peak_bytes")),
     lambda rows: bars(rows, _memory, "MiB beyond the inputs")),
    ("Training, tokens per second", "training", _step,
     lambda rows: bars(rows, lambda row: row["tokens_per_second"], "tokens/s")),
    ("Memory of a training step", "memory-training", lambda row: _step(row) and bool(row.get("peak_bytes")),
     lambda rows: bars(rows, _memory, "peak MiB")),
]  # fmt: skip


def draw(machine: Machine, out: Path) -> dict[str, Path | None]:
    """title -> path without a suffix, or None where there is no result for it."""
    found: dict[str, Path | None] = {}
    for title, name, wanted, make in PLOTS:
        parts: list[Record] = [part for part in machine.parts if any(wanted(row) for row in part.rows if "op" in row)]
        rows = [row for row in machine.rows if wanted(row)]
        found[title] = _save(out / f"{machine.folder}-{name}", title, machine.caption(parts), make(rows)) if rows else None
    runs = {name: part for name, part in machine.of("wikitext").items() if part.get("curve")}
    parts = [part for part in machine.parts if part.file == "wikitext" and part.name in runs]
    title, path = "WikiText-2 for a fixed time", out / f"{machine.folder}-wikitext"
    found[title] = _save(path, title, machine.caption(parts), curves(runs)) if runs else None
    return found
