"""How all pictures look: colours, and rows of images with a label, a title and a note."""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hf_mim.files import replacing

INK, MUTED, GRID = "#1f2328", "#656d76", "#d8dee4"
# Okabe and Ito's colours, which colour-blind people can tell apart, without the yellow that is hard to see on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# What is hidden from a model is transparent, and these stripes lie behind it: no image looks like them.
HIDDEN, STRIPES = "#f3f5f7", "#8c959f"
SCALE = "viridis"  # of maps: equally readable for colour-blind people, and in grey
TEXT, SMALL = 10, 8.5  # points
DPI = 120


class Picture(Figure):
    """A figure of matplotlib that a notebook shows without pyplot.

    drawn: what `draw_rows` has drawn (title, rows, note, scales), for a page that lays them out in its own way.
    """

    drawn: "tuple[str, Sequence[Row], str, Sequence[Scale]]"

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, dpi=DPI, format="png")
        return file.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the figure in the format that the name says, completely or not at all."""
        with replacing(path) as aside:
            self.savefig(aside, dpi=DPI, format=Path(path).suffix.removeprefix(".") or "png")


@dataclass
class Row:
    """Pictures with one label.

    pictures: RGB or RGBA `[h, w, 3 or 4]` in 0..1. What is transparent is shown as hidden.
    boxes: for each picture, rectangles to mark, (left, top, width, height) in its pixels.
    below: a short text under each picture.
    """

    label: str
    pictures: Sequence[np.ndarray]
    boxes: Sequence[Sequence[tuple[float, float, float, float]]] = ()
    below: Sequence[str] = ()


@dataclass
class Scale:
    """The colours of a map: `low` to `high`, and what they mean."""

    meaning: str
    low: float
    high: float
    cmap: str = SCALE

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """RGBA of values; those that are NaN are transparent."""
        colors = matplotlib.colormaps[self.cmap](Normalize(self.low, self.high)(np.nan_to_num(values, nan=self.low)))
        colors[..., 3] = ~np.isnan(values)
        return colors


def draw_rows(title: str, rows: Sequence[Row], note: str = "", scales: Sequence[Scale] = ()) -> Picture:
    """Rows of pictures: a label at the left of each, title and note above, colour scales below."""
    drawn = title, rows, note, scales
    columns = max(len(row.pictures) for row in rows)
    height, width = max((row.pictures[0].shape[:2] for row in rows), key=lambda shape: shape[0] / shape[1])
    side = min(2.2, max(1.2, 8.4 / columns))  # inches
    cell, left, gap = (side, side * height / width), 1.35, 0.07
    total = max(left + columns * (side + gap) + 0.1, 6.0)
    title, note = _wrapped(title, total, TEXT + 2), _wrapped(note, total, SMALL)
    top = 0.12 + 0.24 * (title.count("\n") + 1) + (0.08 + 0.165 * (note.count("\n") + 1) if note else 0.04)
    heights = [cell[1] + gap + (0.2 if row.below else 0) for row in rows]
    bottom = 0.62 if scales else 0.08
    full = top + sum(heights) + bottom
    figure = Picture(figsize=(total, full), facecolor="white")
    figure.drawn = drawn
    write: Any = {"va": "top", "ha": "left", "transform": figure.dpi_scale_trans}
    figure.text(0.1, full - 0.1, title, fontsize=TEXT + 2, color=INK, weight="bold", **write)
    figure.text(0.1, full - 0.2 - 0.24 * (title.count("\n") + 1), note, fontsize=SMALL, color=MUTED, **write)
    y = full - top
    for row, tall in zip(rows, heights, strict=True):
        y -= tall
        middle = y + tall - gap - cell[1] / 2
        about: Any = dict(fontsize=TEXT, color=INK, va="center", transform=figure.dpi_scale_trans)
        figure.text(0.1, middle, textwrap.fill(row.label, 14, break_long_words=False), **about)
        for column, picture in enumerate(row.pictures):
            place = left + column * (side + gap), y + tall - gap - cell[1], *cell
            left_edge, low, wide, high = place
            axes = figure.add_axes((left_edge / total, low / full, wide / total, high / full))
            boxes = row.boxes[column] if row.boxes else ()
            show_picture(axes, picture, boxes)
            if row.below:
                axes.set_xlabel(row.below[column], fontsize=SMALL, color=MUTED, labelpad=2)
    span = (total - left - 0.1) / max(len(scales), 1)
    for number, scale in enumerate(scales):
        axes = figure.add_axes(((left + number * span) / total, 0.42 / full, min(span - 0.3, 3.2) / total, 0.1 / full))
        axes.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=scale.cmap, extent=(scale.low, scale.high, 0, 1))
        axes.set_yticks([])
        axes.tick_params(labelsize=SMALL, colors=MUTED, length=2)
        axes.set_xlabel(scale.meaning, fontsize=SMALL, color=INK, labelpad=1)
    return figure


def show_picture(axes: Axes, picture: np.ndarray, boxes: Sequence[Sequence[float]] = ()) -> None:
    """An image without ticks, with stripes where it is transparent."""
    axes.patch.set(facecolor=HIDDEN, edgecolor=STRIPES, hatch="/////", linewidth=0)
    axes.imshow(np.clip(picture, 0, 1), aspect="equal")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    for x, y, width, height in boxes:  # white on black, to be seen on any image
        for color, thick in (("black", 3.0), ("white", 1.4)):
            about: Any = dict(fill=False, edgecolor=color, linewidth=thick, clip_on=False)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, **about))


def _wrapped(text: str, inches: float, points: float) -> str:
    """The text in lines that fit: a letter is about half as wide as it is high."""
    return "\n".join(textwrap.wrap(text, max(20, math.floor((inches - 0.2) * 72 / (0.54 * points)))))
