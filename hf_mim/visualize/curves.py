"""The curves of a run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hf_mim.visualize.style import COLORS, GRID, INK, MUTED, SMALL, TEXT, Picture

WIDTH = 8.4  # inches


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis: those logged under names that match the pattern.

    line: (value, meaning) of a horizontal line to compare with.
    """

    title: str
    names: str
    bottom: float | None = 0.0
    line: tuple[float, str] | None = None


PANELS = (
    Panel("loss", "loss|eval_loss|patch_discrimination|norm_l2|.+_loss", None),
    Panel("error / error of the best constant", "error_over_constant", 0.0, (1.0, "a constant prediction")),
    Panel("feature spread (0: collapse)", r"(?!probe_).+_std"),
    Panel("cosine between tokens (1: all alike)", "similarity_.+"),
    Panel("learning rate", "learning_rate"),
    Panel("share of the time spent waiting for images", "data_wait_share"),
    Panel("probe: k-NN accuracy", "probe_knn", None),
    Panel("probe: RankMe", "probe_rank_me"),
)


def plot_training(log_history: Sequence[dict], title: str = "Training") -> Picture:
    """The loss over optimizer steps, and what else was logged: its parts, the error beside that of a constant
    prediction, signs of collapse, the learning rate, the time spent waiting for images, the online probe.

    `log_history` is that of Trainer's state. A log that the run made at its end, and that sums it up, is left out.
    """
    history = [entry for entry in log_history if "train_loss" not in entry]
    logged = {panel: _curves(history, panel.names) for panel in PANELS}
    panels = [panel for panel in PANELS if logged[panel] or panel is PANELS[0]]
    lines = -(-(len(panels) - 1) // 2)
    figure = Picture(figsize=(WIDTH, 3.2 + 1.75 * lines), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(1 + lines, 2, height_ratios=[1.7, *[1] * lines])
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=TEXT + 2, color=INK)
    figure.supxlabel("optimizer step", fontsize=SMALL, color=INK)
    first = None
    for number, panel in enumerate(panels):
        place = grid[0, :] if number == 0 else grid[(number + 1) // 2, (number + 1) % 2]
        axes = first = figure.add_subplot(place) if first is None else figure.add_subplot(place, sharex=first)
        _draw(axes, panel, logged[panel])
    return figure


def plot_epochs(rows: Sequence[dict], title: str = "") -> Picture:
    """The training loss and, where it was measured, the test accuracy over epochs: `rows` of fine-tuning's table."""
    figure = Picture(figsize=(WIDTH, 4.6), layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=TEXT, color=INK, parse_math=False)
    figure.supxlabel("epoch", fontsize=SMALL, color=INK)
    for axes, name in zip(figure.subplots(2, sharex=True), ("training loss", "test accuracy"), strict=True):
        points = [(row["epoch"], row[name]) for row in rows if row[name] is not None]
        _draw(axes, Panel(name, name, None), {name: points})
    return figure


def _curves(history: Sequence[dict], names: str) -> dict[str, list[tuple[int, float]]]:
    """Name → (step, value) of what was logged under the names that match; `loss` first, the others by name."""
    found = {name for entry in history for name in entry if re.fullmatch(names, name)}
    ordered = sorted(found, key=lambda name: (name != "loss", name))
    return {
        name: [(entry["step"], entry[name]) for entry in history if entry.get(name) is not None] for name in ordered
    }


def _draw(axes, panel: Panel, curves: dict[str, list[tuple[int, float]]]):
    title = f"{panel.title}{' and its parts' if panel is PANELS[0] and len(curves) > 1 else ''}"
    axes.set_title(title if curves else "no loss was logged", loc="left", fontsize=SMALL, color=INK)
    for (name, points), color in zip(curves.items(), COLORS, strict=False):
        marker = "o" if len(points) < 8 else None
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.5, label=name, marker=marker, markersize=3)
    if panel.line is not None:
        axes.axhline(panel.line[0], color=MUTED, linewidth=1, linestyle="--", label=panel.line[1])
    if len(curves) > 1 or panel.line is not None:
        axes.legend(frameon=False, labelcolor=INK, fontsize=SMALL - 1)
    if panel.bottom is not None:
        highest = max(value for points in curves.values() for _, value in points)
        axes.set_ylim(panel.bottom, 1.08 * max(highest, panel.line[0] if panel.line else 0) or 1.0)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=SMALL)
