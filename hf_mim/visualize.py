"""Pictures of a run: its curves, and what MAE reconstructs."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from hf_mim.data import DeviceAugment
from hf_mim.models.masking import gather
from hf_mim.models.vit import patchify, unpatchify

INK, MUTED, GRID = "#1f2328", "#656d76", "#d8dee4"
COLORS = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#9a6700")


def plot_training(log_history: list[dict], path: str | Path):
    """Draw the loss over optimizer steps, and below it what was logged of these: the standard deviations that a
    collapse would send to zero, and the online probe's k-NN accuracy and RankMe.

    `log_history` is that of Trainer's state.
    """
    spreads = sorted({name for entry in log_history for name in entry if name.endswith("_std") and "loss" in entry})
    panels = [("loss", ["loss"], None), ("feature spread\n(0: collapse)", spreads, 0)]
    panels += [("probe: k-NN\naccuracy", ["probe_knn"], None), ("probe: RankMe", ["probe_rank_me"], 0)]
    logged = {name for entry in log_history for name in entry}
    panels = [panel for panel in panels if logged & set(panel[1])]
    figure = Figure(figsize=(7, 1.4 + 1.8 * len(panels)), layout="constrained")
    heights = [2 if names == ["loss"] else 1 for _, names, _ in panels]
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (label, names, bottom) in zip(axes, panels, strict=True):
        for name, color in zip(names, COLORS if len(names) == 1 else COLORS[1:], strict=False):
            points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
            ax.plot(*zip(*points, strict=True), color=color, linewidth=1.5, label=name)
        if len(names) > 1:
            ax.legend(frameon=False, labelcolor=INK)
        ax.set_ylabel(label)
        ax.set_ylim(bottom=bottom)
        ax.grid(color=GRID, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=MUTED)
    axes[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=120)


@torch.no_grad()
def reconstruct(model, pixel_values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What an `MAEForPreTraining` makes of normalised images `[B, C, H, W]`.

    Returns the reconstruction `[B, C, H, W]`, in the same normalisation: the true pixels in the visible patches, the
    predicted ones in the masked; where the model predicts standardised patches, they get the true patch's mean and
    variance back. And the mask `[B, 1, H, W]`: True where masked. `noise [B, N]` settles the masks, as in the model.
    """
    patch_size = model.config.patch_height_width
    grid = tuple(side // patch for side, patch in zip(pixel_values.shape[2:], patch_size, strict=True))
    output = model(pixel_values, noise=noise)
    patches = patchify(pixel_values, patch_size).float()
    predictions = output.predictions.float()
    if model.config.norm_pix_loss:
        masked = gather(patches, output.target_ids)
        predictions = predictions * (masked.var(-1, keepdim=True) + 1e-6).sqrt() + masked.mean(-1, keepdim=True)
    places = output.target_ids[..., None].expand_as(predictions)
    images = unpatchify(patches.scatter(1, places, predictions), patch_size, grid)
    mask = torch.zeros_like(patches).scatter(1, places, 1.0)
    return images, unpatchify(mask, patch_size, grid)[:, :1].bool()


def plot_reconstructions(model, images: Tensor, augment: DeviceAugment, path: str | Path, seed: int = 0):
    """Draw original, masked image and reconstruction, one column for each of the images, uint8 `[B, C, H, W]`.

    Of images with more than 3 channels the first three are shown as RGB, of two the first as grey.
    """
    pixel_values = augment.normalize(images)
    num_patches = model.config.grid_size[0] * model.config.grid_size[1]
    noise = torch.rand(len(images), num_patches, generator=torch.Generator().manual_seed(seed)).to(images.device)
    reconstruction, mask = reconstruct(model, pixel_values, noise)
    rows = {
        "original": images,
        "masked": images.masked_fill(mask, 128),
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
    figure.savefig(path, dpi=120)
