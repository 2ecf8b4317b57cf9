"""What `pytest bench/` prints at its end: every row, who is not here, how we stand against each peer, and last what is wrong.

Nothing is wider than the terminal or 100 columns: columns that do not fit are left out, and stand in --benchmark-json=FILE. At
smoke sizes there are no tables (unless -v asks for them) and no ratios: how many results are right is all that they can tell.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console

from . import NO_BREAK, width
from .suite import Report, Row, ours

SMOKE = "smoke sizes: not worth quoting"


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


def milliseconds(seconds: float, digits: int = 4) -> str:
    """Rounded to so many digits, or to a whole number where it has more."""
    return f"{seconds * 1e3:.{digits}g}" if seconds * 1e3 < 10**digits else f"{seconds * 1e3:.0f}"


def print_tables(report: Report, device: str, verbose: bool = False) -> None:
    console = Console(width=width(), highlight=False, markup=False, emoji=False, soft_wrap=True)
    measured = [row for row in report.rows if row.samples is not None]
    smoke = report.sizes == "smoke"
    if verbose or not smoke:
        for file in dict.fromkeys(row.file for row in measured):
            _print_rows(console, [row for row in measured if row.file == file], f"{file}, on {device}", smoke)
        if any(row.samples and row.samples.with_host for row in measured):
            console.print("* waits for the device itself: the time holds the host's part")
    _print_left_out(console, report)
    if smoke or not measured:
        _print_counts(console, report, device)
    else:
        _print_standings(console, standings((r.op, r.shape, r.name, r.samples.median) for r in measured if r.samples), device)
    _print_wrong(console, report)


def _title(console: Console, text: str) -> None:
    console.print()
    _paragraph(console, text, style="bold")


def _paragraph(console: Console, text: str, indent: str = "", style: str | None = None) -> None:
    lines = textwrap.fill(text, console.width, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False)
    console.print(lines.replace(NO_BREAK, " "), style=style)


# --- every row ----------------------------------------------------------------------------------------------------------

NAME = 24  # columns that the names of implementations have at least
# The first that have to go where there is no room for all.
DISPENSABLE = ("spread", "peak MiB", "extra MiB")


def _cells(members: list[Row], smoke: bool) -> list[dict[str, str]]:
    """What is shown of each implementation of one problem."""
    base = next((row.samples.median for row in members if row.name == "ours" and row.samples), None)
    found = []
    for row in members:
        assert row.samples is not None
        seconds, median = row.samples.seconds, row.samples.median
        q1, _, q3 = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [0.0] * 3
        cells = {"ms": milliseconds(median), "spread": f"{(q3 - q1) / median:.0%}" if median else "", **row.columns}
        if base is not None and row.name != "ours" and not smoke:
            cells["time / ours"] = f"{median / base:.2f}x"
        found.append(cells | ({"": "WRONG"} if row.wrong is not None else {}))
    return found


def _print_rows(console: Console, rows: list[Row], title: str, smoke: bool) -> None:
    """The problem on a line of its own, its implementations under it."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    cells = {group: _cells(members, smoke) for group, members in groups.items()}
    found = list(dict.fromkeys(key for of_group in cells.values() for of_row in of_group for key in of_row))
    shown = [key for key in found if key not in ("time / ours", "")] + [key for key in ("time / ours", "") if key in found]
    wide = {key: max(len(key), *(len(of_row.get(key, "")) for g in cells.values() for of_row in g)) + 2 for key in shown}
    while sum(wide[key] for key in shown) + NAME > console.width and len(shown) > 1:
        shown.remove(next((key for key in DISPENSABLE if key in shown), shown[1]))
    longest = max(len(row.name) for row in rows) + 3
    room = min(longest, console.width - sum(wide[key] for key in shown))
    _title(console, f"{title}: {SMOKE}" if smoke else title)
    console.print((" " * room + "".join(key.rjust(wide[key]) for key in shown)).rstrip())
    for group, members in groups.items():
        _paragraph(console, group)
        for row, of_row in zip(members, cells[group]):
            name = row.name + ("*" if row.samples and row.samples.with_host else "")
            first, *others = textwrap.wrap(name, room, initial_indent="  ", subsequent_indent="    ")
            line = first.ljust(room) + "".join(of_row.get(key, "").rjust(wide[key]) for key in shown)
            style = "bold red" if row.wrong is not None else "bold" if row.name == "ours" else None
            console.print("\n".join([line.rstrip(), *others]), style=style)


# --- the end ------------------------------------------------------------------------------------------------------------


def _print_left_out(console: Console, report: Report) -> None:
    """Why there are fewer rows than implementations, a line for each reason."""
    lines = []
    for reason, tests in report.missing.items():
        names = sorted({name for of_test in tests.values() for name in of_test}, key=str.lower)
        lines.append(f"{reason}: {'; '.join(name.replace(' ', NO_BREAK) for name in names)}")
    unable: dict[tuple[str, str], int] = {}
    for row in report.rows:
        if row.cannot is not None:
            unable[row.name, row.cannot] = unable.get((row.name, row.cannot), 0) + 1
    lines += [f"{name} cannot, in {count} of the problems: {reason}" for (name, reason), count in unable.items()]
    if report.late:
        lines.append(f"the time limit had passed: {len(report.late)} rows")
    if lines:
        _title(console, "Not compared")
        for line in lines:
            _paragraph(console, line, "  ")


def _print_counts(console: Console, report: Report, device: str) -> None:
    """For each file how many results are right: all that problems too small for a ratio can tell."""
    files = list(dict.fromkeys(row.file for row in report.rows))
    if not files:
        return
    _title(console, f"Is every result right, on {device}{f' ({SMOKE})' if report.sizes == 'smoke' else ''}")
    room = max(map(len, files)) + 2
    console.print(" " * room + "problems   right   wrong   ours, ms")
    for file in files:
        rows = [row for row in report.rows if row.file == file]
        wrong = sum(row.wrong is not None for row in rows)
        right = sum(row.wrong is None and row.cannot is None for row in rows)
        times = sorted(row.samples.median for row in rows if row.name == "ours" and row.samples)
        took = " to ".join(dict.fromkeys(milliseconds(seconds, 2) for seconds in (times[:1] + times[-1:])))
        line = f"{file.ljust(room)}{len({row.group for row in rows}):8}{right:8}{wrong:8}   {took}"
        console.print(line.rstrip(), style="bold red" if wrong else None)
    if report.sizes == "smoke":
        _paragraph(console, "--sizes default measures what is worth quoting; -v shows every row.")


def _print_standings(console: Console, found: list[Standing], device: str) -> None:
    """Against each peer in each operation; what is slower once more under it."""
    found = [standing for standing in found if standing.op != EVERYTHING]
    if not found:
        return
    _title(console, f"Time of each peer / time of ours, on {device}: above 1 ours is faster")
    room = min(max(len(standing.peer) for standing in found) + 3, console.width - 46)
    console.print(" " * room + "shapes    mean   worst    best")
    for op in dict.fromkeys(standing.op for standing in found):
        console.print(op)
        for standing in (standing for standing in found if standing.op == op):
            shape, worst = standing.worst
            numbers = f"{len(standing.ratios):6}{standing.mean:7.2f}x"
            if len(standing.ratios) > 1:
                numbers += f"{worst:7.2f}x{standing.best[1]:7.2f}x"
            first, *others = textwrap.wrap(standing.peer, room, initial_indent="  ", subsequent_indent="    ")
            line = first.ljust(room) + numbers
            slower = standing.mean < 1
            remark = "  ours is slower" if slower else ""
            if len(standing.ratios) > 1 and len(f"{line}{remark}  worst: {shape}") <= console.width:
                remark += f"  worst: {shape}"
            console.print("\n".join([line + remark, *others]), style="red" if slower else None)
    losses = sum(standing.mean < 1 for standing in found)
    console.print(f"\nOurs is slower in {losses or 'none'} of these {len(found)} lines.")


def _print_wrong(console: Console, report: Report) -> None:
    """Last, as nothing above it counts where it stands."""
    wrong = [row.wrong for row in report.rows if row.wrong is not None]
    failed = [f"{file.removeprefix('bench.')}, {case}: {error}" for (file, _, case), error in report.errors.items()]
    if not wrong and not failed:
        return
    console.print()
    console.rule("WRONG", style="bold red", characters="=")
    for reason in [*wrong, *failed]:
        first, *others = reason.splitlines()
        _paragraph(console, f"WRONG  {first}", style="bold red")
        for line in others:
            _paragraph(console, line, "       ")
    console.print(f"{len(wrong)} of {len(report.rows)} results are wrong, {len(failed)} groups failed", style="bold red")
