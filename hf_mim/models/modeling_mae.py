"""MAE: masked autoencoders are scalable vision learners (He et al., CVPR 2022, arXiv 2111.06377)."""

from dataclasses import dataclass

import torch

from .configuration_mae import MAEConfig
from .decoders import PixelDecoder
from .heads import BackboneHead, ClassificationHead
from .losses import mean_and_variance, mean_squared_error, standardize
from .masking import gather, split_at_random
from .recording import pretraining_forward
from .signals import error_over_constant, spread
from .vit import MIMPreTrainedModel, PretrainingOutput, ViTEncoder, are_ids_absent, unpatchify


@dataclass
class MAEOutput(PretrainingOutput):
    """Predictions and targets `[B, Nm, P]` (by row, column, channel); context_ids `[B, Nv]`, target_ids `[B, Nm]`."""


class MAEPreTrainedModel(MIMPreTrainedModel):
    config_class = MAEConfig
    base_model_prefix = "encoder"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]


class MAEModel(MAEPreTrainedModel, ViTEncoder):
    """The encoder of MAE."""


class MAEForPreTraining(MAEPreTrainedModel):
    """Encoder on the visible patches, decoder, reconstruction loss on the masked patches."""

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.encoder = MAEModel(config)
        self.decoder = PixelDecoder(config)
        self.post_init()

    def draw_masks(self, batch_size, grid, device=None, *, context_ids=None, target_ids=None, noise=None) -> dict:
        """Draw the ids of one pass over a grid of `(rows, columns)` patches. Ids that are given stay as they are.

        Returns the arguments of `forward`: `context_ids [B, Nv]` and `target_ids [B, Nm]`, int64 on `device`. With
        `noise [B, N]`, the patches with the smallest noise stay visible. Raises ValueError if only one kind of ids is
        given, or if the grid has too few patches to mask.
        """
        if are_ids_absent(context_ids, target_ids):
            noise = torch.rand(batch_size, grid[0] * grid[1], device=device) if noise is None else noise
            context_ids, target_ids = split_at_random(noise, self.config.num_visible(grid))
        return {"context_ids": context_ids, "target_ids": target_ids}

    @pretraining_forward
    def forward(self, pixel_values, context_ids=None, target_ids=None, noise=None, valid_pixels=None) -> MAEOutput:
        """Reconstruct masked patches.

        Args:
            pixel_values: normalised images `[B, C, H, W]`.
            context_ids, target_ids: `[B, Nv]` visible and `[B, Nm]` masked patches, raster indices; drawn if absent.
            noise: `[B, N]`; the patches with the smallest noise stay visible. Drawn if absent.
            valid_pixels: bool `[B, C, H, W]`, False for pixels without data, which are 0 in `pixel_values` and left out
                of the loss. Default: all have data.
        """
        patches, grid = self.encoder.cut(pixel_values)
        given = {"context_ids": context_ids, "target_ids": target_ids, "noise": noise}
        masks = self.draw_masks(len(patches), grid, patches.device, **given)
        context_ids, target_ids = masks["context_ids"], masks["target_ids"]
        latents = self.encoder.encode(gather(patches, context_ids), grid, context_ids)
        predictions = self.decoder(latents, grid, context_ids, target_ids)
        targets, valid = gather(patches, target_ids).float(), self.valid_values(valid_pixels, target_ids)
        if self.config.norm_pix_loss:
            targets = standardize(targets, valid)
        return MAEOutput(
            loss=mean_squared_error(predictions.float(), targets, valid),
            predictions=predictions,
            targets=targets,
            metrics={
                "feature_std": spread(latents[:, self.config.num_prefix_tokens :]),
                "error_over_constant": error_over_constant(predictions[..., None], targets[..., None], valid),
            },
            **masks,
        )

    def valid_values(self, valid_pixels, target_ids):
        """Which values of the targets have data, bool `[B, Nm, P]`; None: all."""
        return None if valid_pixels is None else gather(self.encoder.cut(valid_pixels)[0], target_ids)

    @torch.no_grad()
    def reconstruct(self, pixel_values, valid_pixels=None, **masks) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask normalised images `[B, C, H, W]` and fill the masked patches with the model's predictions.

        `masks` are the ids or the noise of `forward`, drawn if absent. Returns the reconstruction `[B, C, H, W]`
        (float32, normalised as the images) and the mask `[B, 1, H, W]`, True where masked. Visible patches show the
        true pixels. With `norm_pix_loss` the model predicts standardised patches, so each gets the mean and variance of
        the true patch, of its `valid_pixels`.
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


class MAEForImageClassification(ClassificationHead, MAEPreTrainedModel):
    """The encoder of MAE and a linear classifier."""

    encoder_class = MAEModel


class MAEBackbone(BackboneHead, MAEPreTrainedModel):
    """The encoder of MAE as feature maps, for detection and segmentation."""

    encoder_class = MAEModel
