"""Pictures of attention weights: which earlier tokens each token of a text attends to."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import UserError
from .files import write_atomically
from .generate import check_tokens
from .model import GPT
from .output import check_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .data import Tokenizer

MAX_LABELS = 60  # tokens that are all named along the axis of a large picture
LABEL_LENGTH = 16  # characters of a token's name
DPI = 150
FORMATS = (".png", ".pdf", ".svg")


def draw(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    path: str | Path,
    layer: int | None = None,
    head: int | None = None,
) -> None:
    """Write a picture of the attention weights on `text`; where layer or head is None, all of them side by side.

    The suffix of `path` chooses the format: png, pdf or svg. Layers and heads count from 0. Raises UserError for a text that
    is empty or longer than the context, for a layer or head that the model has not, and where `path` cannot be written.
    """
    check_output(path)
    picture = figure(model, tokenizer, text, layer, head)
    with warnings.catch_warnings():
        # A box in place of a character that matplotlib's font lacks is all that can be done about it.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        write_atomically(path, lambda file: picture.savefig(file, format=_format(path), dpi=DPI, bbox_inches="tight"))


def check_output(path: str | Path) -> None:
    """Raises UserError for a path that `draw` cannot write: known before there is a model."""
    path = Path(path)
    if f".{_format(path)}" not in FORMATS:
        raise UserError(f"{path} has no type of picture that can be written: end its name with {' or '.join(FORMATS)}")
    check_file(path)


def _format(path: str | Path) -> str:
    return Path(path).suffix.lower().removeprefix(".")


def figure(model: GPT, tokenizer: Tokenizer, text: str, layer: int | None = None, head: int | None = None) -> Figure:
    """The picture that `draw` writes."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    layers = _chosen("layer", layer, model.config.n_layer)
    heads = _chosen("head", head, model.config.n_head)
    ids = tokenizer.encode(text).tolist()
    if not ids:
        raise UserError("the text is empty, so there is no attention to draw: give at least one word")
    ids = tokenizer.encode_prompt(text)
    check_tokens(model, ids)
    idx = torch.tensor([ids], device=model.head.weight.device)
    weights = model.attention_weights(idx)[:, 0].float().cpu().numpy()  # (n_layer, H, S, S)
    future = np.triu(np.ones(weights.shape[-2:], dtype=bool), k=1)
    labels = [_shortened(tokenizer.token(i)) for i in ids]

    panels = [(i, j) for i in layers for j in heads]
    columns = len(heads) if len(layers) > 1 and len(heads) > 1 else math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    if len(panels) == 1:
        side = min(max(0.2 * len(ids), 4.0), 0.2 * MAX_LABELS)  # inches
        most_labels = MAX_LABELS
    else:
        side = min(3.0, max(1.2, 16.0 / columns))
        most_labels = int(side * 9)  # at 8 points each
    step = math.ceil(len(ids) / most_labels)
    size = 10.0 if len(panels) == 1 else 6.5  # points

    picture = Figure(figsize=(side * columns + 1.8, side * rows + 1.6), layout="constrained")
    grid = picture.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    # Most weights are small: the square root spreads their colours.
    norm = PowerNorm(0.5, vmin=0.0, vmax=1.0)
    image: Any = None
    for axes, (i, j) in zip(grid.flat, panels):
        shown = np.ma.masked_array(weights[i, j], future)  # what lies in the future stays blank
        image = axes.imshow(shown, norm=norm, cmap="viridis", interpolation="nearest")
        places = range(0, len(ids), step)
        axes.set_xticks(places, labels[::step], rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(places, labels[::step], fontsize=size, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panels) > 1:
            axes.set_title(_name(i, j, len(layers) > 1, len(heads) > 1), fontsize=8)
    for k, axes in enumerate(grid.flat):
        if k >= len(panels):
            axes.remove()
        elif k + columns >= len(panels):
            axes.xaxis.set_tick_params(labelbottom=True)  # the lowest of its column, though not in the last row
    name = _name(layer, head, layer is not None, head is not None)
    title = f"Attention weights, {name or 'all layers and heads'}"
    if len(panels) == 1:
        axes.set(title=title, xlabel="attends to", ylabel="query token")
    else:
        picture.suptitle(title)
        picture.supxlabel("attends to")
        picture.supylabel("query token")
    picture.colorbar(image, ax=picture.axes, label="attention weight (each row sums to 1)", shrink=0.8, aspect=30)
    return picture


def _chosen(what: str, index: int | None, count: int) -> list[int]:
    if index is not None and not 0 <= index < count:
        raise UserError(f"{what} {index} does not exist: this model has {what}s 0 to {count - 1}")
    return list(range(count)) if index is None else [index]


def _name(layer: int | None, head: int | None, with_layer: bool, with_head: bool) -> str:
    parts = ([f"layer {layer}"] if with_layer else []) + ([f"head {head}"] if with_head else [])
    return ", ".join(parts)


def _shortened(label: str) -> str:
    return label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "\u2026"


__all__ = ["check_output", "draw", "figure"]
