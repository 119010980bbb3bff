"""Pictures of a run: its curves, and the reconstructions of a model that predicts pixels."""

from pathlib import Path

from matplotlib.figure import Figure

from hf_mim.data import DeviceAugment
from hf_mim.files import replacing
from hf_mim.trainer_utils import seeded

INK, MUTED, GRID = "#1f2328", "#656d76", "#d8dee4"
COLORS = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#9a6700")


def plot_training(log_history: list[dict], path: str | Path):
    """Draw the loss over optimizer steps and, below it, what was logged of these: the standard deviations that go to
    zero in a collapse, and the online probe's k-NN accuracy and RankMe.

    `log_history` is that of Trainer's state.
    """
    spreads = sorted({name for entry in log_history for name in entry if name.endswith("_std") and "loss" in entry})
    panels = [("loss", ["loss"], None), ("feature spread\n(0: collapse)", spreads, 0)]
    panels += [("probe: k-NN\naccuracy", ["probe_knn"], None), ("probe: RankMe", ["probe_rank_me"], 0)]
    logged = {name for entry in log_history for name in entry}
    panels = [panel for panel in panels if logged & set(panel[1])] or [("no loss was logged", ["loss"], None)]
    figure = Figure(figsize=(7, 1.4 + 1.8 * len(panels)), layout="constrained")
    heights = [2 if names == ["loss"] else 1 for _, names, _ in panels]
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (label, names, bottom) in zip(axes, panels, strict=True):
        for name, color in zip(names, COLORS if len(names) == 1 else COLORS[1:], strict=False):
            points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
            steps, values = zip(*points, strict=True) if points else ((), ())
            ax.plot(steps, values, color=color, linewidth=1.5, label=name)
        if len(names) > 1:
            ax.legend(frameon=False, labelcolor=INK)
        ax.set_ylabel(label)
        ax.set_ylim(bottom=bottom)
        ax.grid(color=GRID, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=MUTED)
    axes[-1].set_xlabel("optimizer step")
    _write(figure, path)


def plot_reconstructions(model, images, augment: DeviceAugment, path: str | Path, seed: int = 0):
    """Draw original, masked image and reconstruction, a column for each of the images `[B, C, H, W]`, of any depth.

    `model` needs `reconstruct` (MAE). The first three channels are shown as RGB, or the first as grey if there are
    fewer than three. Pixels without data have the mean colour.
    """
    with seeded(seed, images.device):  # the masks are drawn on the CPU, so that they are the same for every device
        masks = model.draw_masks(len(images), model.config.grid_size, "cpu")
    masks = {name: value.to(images.device) for name, value in masks.items()}
    normalized = augment.normalize(images)
    if augment.nodata:
        masks["valid_pixels"] = ~images.isnan()
    reconstruction, mask = model.reconstruct(normalized, **masks)
    original = augment.denormalize(normalized)
    rows = {
        "original": original,
        "masked": original.masked_fill(mask, 128),
        "reconstruction": augment.denormalize(reconstruction),
    }
    height, width = images.shape[2:]
    side = 1.3
    figure = Figure(figsize=(side * len(images) + 0.3, 3 * side * height / width), layout="constrained")
    axes = figure.subplots(3, len(images), squeeze=False)
    for line, (title, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(title, color=INK)
        for ax, picture in zip(line, pictures.cpu(), strict=True):
            shown = picture[:3] if len(picture) >= 3 else picture[:1]
            ax.imshow(shown.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    _write(figure, path)


def _write(figure: Figure, path: str | Path):
    """Write a figure in the format that the name says, completely or not at all."""
    with replacing(path) as aside:
        figure.savefig(aside, dpi=120, format=Path(path).suffix.removeprefix(".") or "png")
