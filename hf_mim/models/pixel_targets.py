"""Pixels of the masked patches as targets: what MAE and every other method that reconstructs shares."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .losses import mean_and_variance, standardize
from .masking import gather
from .vit import unpatchify

if TYPE_CHECKING:
    from .vit import MIMPreTrainedModel as Base  # stands after the mixin among the bases
    from .vit import ViTEncoder
else:
    Base = object


def pixel_targets(
    patches: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor | None, norm_pix_loss: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Patches `[B, N, P]` → the targets `[B, Nm, P]` (float32) at `ids [B, Nm]`, and which of their values have data.

    valid: bool `[B, N, P]`, the values of the patches with data; None: all, also in what is returned.
    """
    targets, valid = gather(patches, ids).float(), None if valid is None else gather(valid, ids)
    return standardize(targets, valid) if norm_pix_loss else targets, valid


def fill_patches(
    patches: torch.Tensor, ids: torch.Tensor, predictions: torch.Tensor, valid: torch.Tensor | None, norm_pix_loss: bool
) -> torch.Tensor:
    """Patches `[B, N, P]` with those at `ids` replaced by predictions of `pixel_targets`, float32.

    With `norm_pix_loss` each gets the mean and variance of the true patch, of its `valid` values.
    """
    patches, predictions = patches.float(), predictions.float()
    if norm_pix_loss:
        mean, variance = mean_and_variance(gather(patches, ids), None if valid is None else gather(valid, ids))
        predictions = predictions * (variance + 1e-6).sqrt() + mean
    return patches.scatter(1, ids[..., None].expand_as(predictions), predictions)


def masked_pixels(ids: torch.Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Where the patches at `ids [B, Nm]` lie in the image: bool `[B, 1, H, W]`."""
    mask = torch.zeros(len(ids), grid[0] * grid[1], dtype=torch.bool, device=ids.device).scatter(1, ids, True)
    return unpatchify(mask[..., None].expand(-1, -1, patch_size[0] * patch_size[1]), patch_size, grid)


class PixelTargets(Base):
    """For pretraining models that predict pixels; it stands before the `PreTrainedModel` among the bases.

    The model has an `encoder` and `config.norm_pix_loss`, and its predictions are pixels in the order of `target_ids`.
    """

    if TYPE_CHECKING:
        encoder: ViTEncoder
        draw_masks: Callable[..., dict[str, torch.Tensor]]

    def valid_values(self, valid_pixels: torch.Tensor | None) -> torch.Tensor | None:
        """Which values of the patches have data, bool `[B, N, P]`; None: all."""
        return None if valid_pixels is None else self.encoder.cut(valid_pixels)[0]

    @torch.no_grad()
    def reconstruct(
        self, pixel_values: torch.Tensor, valid_pixels: torch.Tensor | None = None, **masks: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask normalised images `[B, C, H, W]` and fill the masked patches with the model's predictions.

        `masks` are the ids or the noise of `forward`, drawn if absent. Returns the reconstruction `[B, C, H, W]`
        (float32, normalised as the images) and the mask `[B, 1, H, W]`, True where masked. All other patches show the
        true pixels, also those that the pass has left out. With `norm_pix_loss` the model predicts standardised
        patches, so each gets the mean and variance of the true patch, of its `valid_pixels`.
        """
        patches, grid = self.encoder.cut(pixel_values)
        masks = self.draw_masks(len(patches), grid, patches.device, **masks)
        output = self(pixel_values, valid_pixels=valid_pixels, **masks)
        ids, size = output.target_ids, self.config.patch_height_width
        about = self.valid_values(valid_pixels), self.config.norm_pix_loss
        filled = fill_patches(patches, ids, output.predictions, *about)
        return unpatchify(filled, size, grid), masked_pixels(ids, size, grid)
