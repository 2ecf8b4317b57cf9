"""The tables at the end of `pytest bench/`: every row, then how we stand against each peer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from .suite import Report, Row, ours


@dataclass(frozen=True)
class Standing:
    """Ours against one peer in one operation: the peer's time divided by ours in each cell (shape)."""

    op: str
    peer: str
    ratios: dict[str, float]

    @property
    def mean(self) -> float:
        """Geometric, as of ratios it is the only one for which 2x and 0.5x cancel."""
        return math.exp(statistics.fmean(math.log(ratio) for ratio in self.ratios.values()))

    @property
    def worst(self) -> tuple[str, float]:
        return min(self.ratios.items(), key=lambda item: item[1])

    @property
    def best(self) -> tuple[str, float]:
        return max(self.ratios.items(), key=lambda item: item[1])


EVERYTHING = "everything"


def standings(medians: Iterable[tuple[str, str, str, float]]) -> list[Standing]:
    """From (op, shape, implementation, median seconds): by op and peer, then by peer over all ops, where those are many.

    Variants of ours ("ours, blocked") are not peers. The forms of attention are cells of one op.
    """
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for op, shape, name, median in medians:
        op, head_dim, form = op.partition(", head_dim")
        shape = f"head_dim{form}, {shape}" if head_dim else shape
        cells.setdefault((op, shape), {})[name] = median
    found: dict[tuple[str, str], dict[str, float]] = {}
    for (op, shape), times in cells.items():
        for name, median in times.items():
            if "ours" in times and not ours(name):
                found.setdefault((op, name), {})[shape] = median / times["ours"]
    overall: dict[str, dict[str, float]] = {}
    for (op, peer), ratios in found.items():
        overall.setdefault(peer, {}).update({f"{op}, {shape}": ratio for shape, ratio in ratios.items()})
    many = {peer for peer in overall if len([op for op, name in found if name == peer]) > 1}
    return [
        *(Standing(op, peer, ratios) for (op, peer), ratios in found.items()),
        *(Standing(EVERYTHING, peer, ratios) for peer, ratios in overall.items() if peer in many),
    ]


def print_tables(report: Report) -> None:
    console = Console(width=150, highlight=False)
    measured = [row for row in report.rows if row.samples is not None]
    for op in dict.fromkeys(row.op for row in measured):
        console.print(_rows([row for row in measured if row.op == op]))
    against = standings((row.op, row.shape, row.name, row.samples.median) for row in measured if row.samples)
    if against:
        console.print(_summary(against))
    for row in report.rows:
        if row.wrong is not None:
            console.print(f"WRONG  {row.wrong}", markup=False)
    for reason, tests in report.missing.items():
        console.print(f"{reason}:", markup=False)
        for test, names in tests.items():
            console.print(f"  {test}: {' | '.join(sorted(names))}", markup=False)
    if any(row.samples and row.samples.with_host for row in measured):
        console.print("* waits for the device itself: the time holds the host's part")


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _rows(rows: list[Row]) -> Table:
    extra = list(dict.fromkeys(key for row in rows for key in row.columns))
    table = Table(title=f"{rows[0].op}, on {rows[0].info['device']}", title_justify="left", pad_edge=False)
    for name in ("shape", "implementation"):
        table.add_column(name)
    for name in ("median ms", "± iqr", *extra, "time / ours"):
        table.add_column(name, justify="right")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.shape, []).append(row)
    for shape, members in groups.items():
        base = next((row.samples.median for row in members if row.name == "ours" and row.samples), None)
        for i, row in enumerate(members):
            assert row.samples is not None
            quartiles = statistics.quantiles(row.samples.seconds, n=4) if len(row.samples.seconds) > 1 else [0.0] * 3
            factor = "" if base is None or row.name == "ours" else f"{row.samples.median / base:.2f}x"
            table.add_row(
                shape if i == 0 else "", row.name + ("*" if row.samples.with_host else ""),
                milliseconds(row.samples.median), milliseconds(quartiles[2] - quartiles[0]),
                *(row.columns.get(key, "") for key in extra), factor,
                style="bold" if row.name == "ours" else None, end_section=i == len(members) - 1,
            )  # fmt: skip
    return table


def _summary(against: list[Standing]) -> Table:
    table = Table(title="Time of each peer / time of ours", title_justify="left", pad_edge=False)
    for name in ("operation", "peer"):
        table.add_column(name)
    for name in ("cells", "geometric mean", "worst", "best"):
        table.add_column(name, justify="right")
    table.add_column("worst cell")
    before = None
    for standing in against:
        shape, worst = standing.worst
        table.add_row(
            standing.op if standing.op != before else "", standing.peer, str(len(standing.ratios)), f"{standing.mean:.2f}x",
            f"{worst:.2f}x", f"{standing.best[1]:.2f}x", shape, style="red" if standing.mean < 1 else None,
        )  # fmt: skip
        before = standing.op
    return table
