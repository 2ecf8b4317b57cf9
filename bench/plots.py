"""The plots of docs/benchmarks.md: each as NAME.svg and NAME-dark.svg for the page, and NAME.png for everywhere else.

Under every plot stand hardware, versions, date and commit of the results in it. Ours is always the same strong colour and is
drawn on top; a peer has the same colour in every plot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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
# Peers in the order in which they take colours; those that are not named follow.
PEERS = (
    "SDPA flash", "SDPA cuDNN", "FlexAttention", "flash-attn 2", "flash-attn 3", "SDPA efficient", "reference", "SDPA math",
    "torch", "torch.compile", "liger", "quack", "plain PyTorch", "plain PyTorch, compiled", "transformers", "seed document",
    "linear + cross_entropy", "linear + cross_entropy, float32", "F.linear_cross_entropy, chunks",
    "F.linear_cross_entropy, accurate", "cut_cross_entropy",
)  # fmt: skip


def is_ours(name: str) -> bool:
    return name == "ours" or name.startswith("ours,")


@dataclass
class Style:
    """Colour and marker of every implementation in a plot."""

    theme: Theme
    names: Sequence[str]

    def __post_init__(self) -> None:
        known = [name for name in PEERS if name in self.names]
        self.peers = known + sorted(name for name in self.names if not is_ours(name) and name not in known)
        self.variants = sorted(name for name in self.names if is_ours(name))

    def color(self, name: str) -> str:
        return self.theme.ours if is_ours(name) else self.theme.peers[self.peers.index(name) % len(self.theme.peers)]

    def line(self, name: str) -> dict[str, Any]:
        if is_ours(name):
            dash = ("-", "--", ":", "-.")[self.variants.index(name) % 4]
            return {"color": self.theme.ours, "marker": "o", "linewidth": 2.4, "linestyle": dash, "zorder": 3}
        marker = MARKERS[self.peers.index(name) % len(MARKERS)]
        return {"color": self.color(name), "marker": marker, "linewidth": 1.3, "zorder": 2}

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
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


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


def by_length(rows: Rows, value: Value, label: str, log: bool) -> Make:
    """A panel for each operation, a line for each implementation, sequence length on the horizontal axis."""
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
            if log:
                axis.set_yscale("log")
                axis.grid(which="both")
                for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                    which(lambda value, _: f"{value:,.0f}" if f"{value:e}"[0] in "125" else "")
            else:
                axis.set_ylim(bottom=0)
        for axis in list(axes)[len(panels) :]:
            axis.set_visible(False)
        _legend(figure, style)
        return figure

    return make


# --- fraction of the roofline -----------------------------------------------------------------------------------------


def roofline(rows: Rows) -> Make:
    """A line of dots for each group: ours and the peers, as parts of the ceiling that was measured in the same run."""
    panels = _panels(rows, lambda row: row["op"])

    def make(theme: Theme) -> Figure:
        style = Style(theme, _names(rows))
        groups = [(op, shape) for op, members in panels.items() for shape in dict.fromkeys(row["shape"] for row in members)]
        figure = _figure(10.5, 0.24 * (len(groups) + len(panels)) + 1.8)
        axis = figure.subplots()
        place, ticks, labels = 0.0, [], []
        for op, members in panels.items():
            axis.text(0.0, place, op, fontsize=9, fontweight="bold", va="center")
            place += 1
            for shape in dict.fromkeys(row["shape"] for row in members):
                here = [row for row in members if row["shape"] == shape]
                for row in sorted(here, key=lambda row: is_ours(row["name"])):
                    look = style.line(row["name"])
                    axis.plot(row["of_ceiling"], place, marker=look["marker"], color=look["color"], zorder=look["zorder"],
                              markersize=8 if row["name"] == "ours" else 5, linestyle="none")  # fmt: skip
                ticks.append(place)
                labels.append(f"{shape}  ({'of matmul' if here[0]['ceiling'] == 'matmul' else 'of copy'})")
                place += 1
        axis.set_yticks(ticks, labels, fontsize=7.5)
        axis.set_ylim(place - 0.3, -0.7)
        axis.axvline(1.0, color=theme.ink, linewidth=1)
        axis.set_xlim(left=0, right=max(1.05, 1.05 * max(row["of_ceiling"] for row in rows)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.set_xlabel("part of the ceiling measured in the same run: one large product, one large copy")
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
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.grid(axis="y", visible=False)
            axis.set_title(title, loc="left")
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
            look = style.line(name) | {"marker": "", "label": f"{name}: validation perplexity {part['valid_perplexity']:.1f}"}
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
     lambda rows: by_length(rows, lambda row: row["flops_per_second"] / 1e12, "TFLOP/s", False)),
    *((f"Fraction of the roofline: {name}", f"roofline-{name}", functools.partial(_bound, name), roofline) for name in KINDS),
    ("Peak memory of attention", "memory-attention", lambda row: _attention(row) and bool(row.get("peak_bytes")),
     lambda rows: by_length(rows, _memory, "MiB beyond the inputs", True)),
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
