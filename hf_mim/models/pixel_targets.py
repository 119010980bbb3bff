"""Pixels of the masked patches as targets: what MAE and every other method that reconstructs shares."""

import torch

from .losses import mean_and_variance, standardize
from .masking import gather
from .vit import unpatchify


class PixelTargets:
    """For pretraining models that predict pixels; it stands before the `PreTrainedModel` among the bases.

    The model has an `encoder` and `config.norm_pix_loss`, and its predictions are pixels in the order of `target_ids`.
    """

    def pixel_targets(self, patches, target_ids, valid_pixels=None):
        """Patches `[B, N, P]` → the targets `[B, Nm, P]` (float32), and which of their values have data (None: all)."""
        targets, valid = gather(patches, target_ids).float(), self.valid_values(valid_pixels, target_ids)
        return standardize(targets, valid) if self.config.norm_pix_loss else targets, valid

    def valid_values(self, valid_pixels, target_ids):
        """Which values of the targets have data, bool `[B, Nm, P]`; None: all."""
        return None if valid_pixels is None else gather(self.encoder.cut(valid_pixels)[0], target_ids)

    @torch.no_grad()
    def reconstruct(self, pixel_values, valid_pixels=None, **masks) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask normalised images `[B, C, H, W]` and fill the masked patches with the model's predictions.

        `masks` are the ids or the noise of `forward`, drawn if absent. Returns the reconstruction `[B, C, H, W]`
        (float32, normalised as the images) and the mask `[B, 1, H, W]`, True where masked. All other patches show the
        true pixels, also those that the pass has left out. With `norm_pix_loss` the model predicts standardised
        patches, so each gets the mean and variance of the true patch, of its `valid_pixels`.
        """
        output = self(pixel_values, valid_pixels=valid_pixels, **masks)
        patches, grid = self.encoder.cut(pixel_values.float())
        predictions = output.predictions.float()
        if self.config.norm_pix_loss:
            masked, valid = gather(patches, output.target_ids), self.valid_values(valid_pixels, output.target_ids)
            mean, variance = mean_and_variance(masked, valid)
            predictions = predictions * (variance + 1e-6).sqrt() + mean
        places = output.target_ids[..., None].expand_as(predictions)
        images = patches.scatter(1, places, predictions)
        mask = torch.zeros_like(patches).scatter(1, places, 1.0)
        images, mask = (unpatchify(x, self.config.patch_height_width, grid) for x in (images, mask))
        return images, mask[:, :1].bool()
