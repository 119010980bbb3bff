"""Small pictures in lines, each with a caption."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from hf_mim.visualize.style import COLORS, INK, MUTED

SIDE, CAPTION = 1.25, 0.5  # inches
LETTERS = 19  # of a caption's line


@dataclass(frozen=True)
class Tile:
    """A picture, uint8 `[h, w, 3]` or grey `[h, w]` (None: it is not there), with the lines of its caption.

    framed: draw a frame around it, as around a query.
    """

    picture: np.ndarray | None
    caption: Sequence[str] = ()
    framed: bool = False


def contact_sheet(lines: Sequence[Sequence[Tile]], title: str = "") -> Figure:
    """Draw lines of pictures. A line may be shorter than the others."""
    columns = max(map(len, lines), default=1)
    height = max((len(tile.caption) for line in lines for tile in line), default=0) * 0.13 + 0.1
    size = SIDE * columns + 0.2, (SIDE + height) * max(1, len(lines)) + 0.4
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(max(1, len(lines)), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for line, row in zip(lines, axes, strict=False):
        for tile, ax in zip(line, row, strict=False):
            _draw(ax, tile)
    figure.suptitle(title, color=INK, fontsize=9)
    return figure


def _draw(ax, tile: Tile):
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(tile.framed)
    ax.spines[:].set(color=COLORS[0], linewidth=2)
    if tile.picture is None:
        ax.text(0.5, 0.5, "no picture", ha="center", va="center", color=MUTED, fontsize=7, transform=ax.transAxes)
        ax.set_box_aspect(1)
    else:
        ax.imshow(tile.picture, cmap="gray", vmin=0, vmax=255)
    shown = (textwrap.shorten(text, LETTERS, placeholder="…") if " " in text else _cut(text) for text in tile.caption)
    # parse_math: a name with two dollar signs is no formula
    ax.set_xlabel("\n".join(shown), color=INK, fontsize=6.5, parse_math=False)


def _cut(text: str) -> str:
    """The end of a long name, which tells more than its beginning."""
    return text if len(text) <= LETTERS else f"…{text[1 - LETTERS :]}"
