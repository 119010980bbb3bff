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
    """Draw the loss, and below it the standard deviations that a collapse would send to zero, over optimizer steps.

    `log_history` is that of Trainer's state; an entry without `loss` is left out.
    """
    entries = [entry for entry in log_history if "loss" in entry]
    steps = [entry["step"] for entry in entries]
    spreads = sorted({name for entry in entries for name in entry if name.endswith("_std")})
    figure = Figure(figsize=(7, 5 if spreads else 3.2), layout="constrained")
    axes = figure.subplots(2 if spreads else 1, sharex=True, squeeze=False, height_ratios=[2, 1] if spreads else [1])[
        :, 0
    ]
    axes[0].plot(steps, [entry["loss"] for entry in entries], color=COLORS[0], linewidth=1.5)
    axes[0].set_ylabel("loss")
    for name, color in zip(spreads, COLORS[1:], strict=False):
        axes[1].plot(steps, [entry.get(name) for entry in entries], color=color, linewidth=1.5, label=name)
    if spreads:
        axes[1].set_ylim(bottom=0)
        axes[1].set_ylabel("feature spread\n(0: collapse)")
        axes[1].legend(frameon=False, labelcolor=INK)
    axes[-1].set_xlabel("optimizer step")
    for ax in axes:
        ax.grid(color=GRID, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=MUTED)
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
