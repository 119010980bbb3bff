"""Several runs side by side, with what they are compared with: a table of results, and a picture of how they learned.

rows = [Row("MAE", {"20-NN": [0.61, 0.63]}, curves=[{0: 0.31, 6400: 0.45}, {0: 0.30, 6400: 0.44}])]
print(table(rows))
plot_curves(rows, {"raw pixels": 0.39}, "comparison.png")
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

from hf_mim.hub.card_text import markdown_table, shown
from hf_mim.visualize.style import COLORS, GRID, INK, MUTED, Picture

MARKERS = "osD^vPX"
DASHES = ("--", "-.", (0, (1, 1)))


@dataclass
class Row:
    """One line of a comparison: a run with several seeds, or a reference.

    Each list has a value for each seed that is there.

    values: column → values, accuracies and other shares in 0..1.
    images_seen, minutes, devices: what the training took; empty without one.
    curves: images seen → accuracy of the features, measured while the run trained.
    notes: what a reader has to know, such as why a seed failed.
    """

    name: str
    values: dict[str, list[float]] = field(default_factory=dict)
    images_seen: list[int] = field(default_factory=list)
    minutes: list[float] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    curves: list[dict[int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, sample standard deviation: that of n - 1), None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def as_text(values: Sequence[float], percent: bool) -> str:
    """`61.3 ± 0.4`; "" for no values."""
    if not values:
        return ""
    factor = 100 if percent else 1
    return " ± ".join(f"{factor * x:.1f}" for x in spread(values) if x is not None)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown. Shares are in percent, which the head of their column says."""
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    # A measure that is no share, such as RankMe, has values above 1.
    percent = {column: all(x <= 1 for row in rows for x in row.values.get(column, [])) for column in columns}
    lines = []
    for row in rows:
        line = {"": shown(row.name)}
        for column in columns:
            unit = " (%)" if percent[column] else ""
            line[f"{shown(column)}{unit}"] = as_text(row.values.get(column, []), percent[column])
        line["images seen"] = f"{statistics.fmean(row.images_seen):,.0f}" if row.images_seen else ""
        line["minutes"] = f"{statistics.fmean(row.minutes):.1f}" if row.minutes else ""
        line["device"] = shown(", ".join(dict.fromkeys(row.devices)))
        if any(other.notes for other in rows):
            line["note"] = shown("; ".join(row.notes))
        lines.append(line)
    return markdown_table(lines)


def mean_curve(curves: Sequence[dict[int, float]]) -> list[tuple[int, float, float]]:
    """(images seen, mean, sample standard deviation or 0) wherever one of the curves has a value."""
    places = sorted({images for curve in curves for images in curve})
    found = [(images, spread([curve[images] for curve in curves if images in curve])) for images in places]
    return [(images, mean, deviation or 0.0) for images, (mean, deviation) in found]


def plot_curves(
    rows: Sequence[Row], levels: dict[str, float], path: str | Path, measure: str = "20-NN accuracy"
) -> None:
    """Draw accuracy over images seen: for each row with curves the mean over its seeds, and ± one standard deviation.

    Args:
        levels: name → accuracy, drawn as a horizontal line. Each run's own accuracy before training is one too.
        measure: what the curves show.
    """
    figure = Picture(figsize=(8, 4.8), layout="constrained")
    ax, handles = figure.subplots(), []
    drawn = [row for row in rows if any(row.curves)]
    for number, row in enumerate(drawn):
        images, mean, deviation = zip(*mean_curve(row.curves), strict=True)
        mean, deviation = (100 * np.array(values) for values in (mean, deviation))
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        handles += ax.plot(images, mean, color=color, marker=marker, markersize=4, linewidth=1.6, label=row.name)
        ax.fill_between(images, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
        if images[0] == 0:
            ax.axhline(mean[0], color=color, linestyle=":", linewidth=1)
    for (name, level), dashes in zip(levels.items(), DASHES, strict=False):
        handles.append(ax.axhline(100 * level, color=INK, linestyle=dashes, linewidth=1.2, label=name))
    if any(0 in curve for row in drawn for curve in row.curves):
        handles.append(Line2D([], [], color=MUTED, linestyle=":", linewidth=1, label="untrained, in the run's colour"))
    if not drawn:
        ax.text(0.5, 0.5, "no accuracy was measured yet", ha="center", color=MUTED, transform=ax.transAxes)
    ax.set_xlabel("images seen in pretraining", color=INK)
    ax.set_ylabel(f"{measure} (%)", color=INK)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.locator_params(axis="x", integer=True)
    ax.grid(color=GRID, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=MUTED)
    seeds = max((len(row.curves) for row in drawn), default=0)
    title = f"Line: mean over {seeds} seeds; band: ± 1 standard deviation" if seeds > 1 else "One seed"
    ax.set_title(title, color=MUTED, fontsize=9)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, labelcolor=INK, fontsize=9)
    figure.save(path)
