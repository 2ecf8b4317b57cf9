"""The figures of a run: log.jsonl (a JSON object a line), TensorBoard, and the picture of the loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wikigpt.errors import UserError
from wikigpt.files import write_atomically, write_bytes

from .directory import BOARD, LOG, PICTURE


class Log:
    """Takes figures by step. Raises UserError where log.jsonl cannot be written; without TensorBoard it goes on."""

    def __init__(self, directory: Path, tensorboard: bool, say: Callable[[str], None]):
        self.path, self.say = directory / LOG, say
        self.board: Any = None
        # Figures of steps that a resumed run is about to do again were taken away by forget_after.
        self._open_board = directory / BOARD if tensorboard else None

    def record(self, step: int, **figures: float) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; the run can be resumed from its last save") from error
        try:
            for name, value in figures.items():
                if (board := self._board(step)) is not None:
                    board.add_scalar(name, value, step)
        except OSError as error:
            self._drop_board(error)

    def _board(self, step: int) -> Any:
        """TensorBoard's writer, made at the first figure."""
        if self._open_board is not None:
            folder, self._open_board = self._open_board, None
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return None
            self.board = SummaryWriter(str(folder), purge_step=step)
        return self.board

    def _drop_board(self, error: OSError) -> None:
        self.board = None
        self.say(f"TensorBoard logs end here: {error.strerror or error}")

    def close(self) -> None:
        try:
            if self.board is not None:
                self.board.close()
        except OSError as error:
            self._drop_board(error)


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The figures of a run, one dict per line of log.jsonl; a line that a crash has cut off is left out."""
    path = directory / LOG
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            figures = json.loads(line)
        except ValueError:
            continue
        if isinstance(figures, dict) and type(figures.get("step")) is int:
            lines.append(figures)
    return lines


def forget_after(directory: Path, step: int) -> None:
    """Drop the figures of steps that a resumed run is about to do again."""
    if (directory / LOG).is_file():
        kept = [json.dumps(figures) + "\n" for figures in read_log(directory) if figures["step"] <= step]
        write_bytes(directory / LOG, "".join(kept).encode())


def plot_loss(directory: Path) -> Path | None:
    """Draw loss.png from log.jsonl: training loss and validation loss by step. None where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = read_log(directory)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "train", "-"), ("valid_loss", "validation", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=3, linewidth=1.2)
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)")
    # Any name of a folder: no mathematics, no half characters.
    axes.set_title(directory.resolve().name.encode("utf-8", "replace").decode(), parse_math=False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    write_atomically(directory / PICTURE, lambda f: figure.savefig(f, format="png", dpi=130))
    return directory / PICTURE


__all__ = ["Log", "forget_after", "plot_loss", "read_log"]
