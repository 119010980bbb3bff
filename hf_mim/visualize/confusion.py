"""The confusion of classes as a picture."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from hf_mim.visualize.style import INK, MUTED

NUMBERS, NAMES = 20, 60  # classes up to which the cells have numbers, and the axes names
LONGEST = 18  # letters of a name


def plot_confusion(confusion, classes: Sequence[str], title: str = "") -> Figure:
    """Draw counts `[C, C]`: rows are classes, columns what they were taken for. Shades are shares of a row."""
    counts = np.asarray(confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-12)
    side = min(3 + 0.35 * len(classes), 12)
    figure = Figure(figsize=(side, side), layout="constrained")
    ax = figure.subplots()
    picture = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.55 else INK
                ax.text(column, row, f"{count:.3g}", ha="center", va="center", color=color, fontsize=7)
    if len(classes) <= NAMES:
        names = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in classes]
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7, color=MUTED, parse_math=False)
        ax.set_yticks(range(len(names)), names, fontsize=7, color=MUTED, parse_math=False)
    ax.set_xlabel("taken for", color=INK)
    ax.set_ylabel("class", color=INK)
    ax.set_title(title, color=INK, fontsize=9)
    bar = figure.colorbar(picture, ax=ax, shrink=0.6)
    bar.set_label("share of the class's images", color=MUTED)
    return figure
