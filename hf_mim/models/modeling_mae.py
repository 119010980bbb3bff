"""MAE: masked autoencoders are scalable vision learners (He et al., CVPR 2022, arXiv 2111.06377)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .configuration_mae import MAEConfig
from .decoders import CrossPixelDecoder, PixelDecoder
from .flops import pixel_decoder_flops, trained_encoder_flops
from .heads import BackboneHead, ClassificationHead
from .losses import mean_squared_error
from .masking import gather, patches_of_units, split_at_random
from .pixel_targets import PixelTargets, pixel_targets
from .recording import pretraining_forward
from .signals import error_over_constant, spread
from .vit import MIMPreTrainedModel, PretrainingOutput, ViTEncoder, are_ids_absent


@dataclass
class MAEOutput(PretrainingOutput):
    """Predictions and targets `[B, Nm, P]` (by row, column, channel); context_ids `[B, Nv]`, target_ids `[B, Nm]`."""


class MAEPreTrainedModel(MIMPreTrainedModel):
    config_class = MAEConfig
    base_model_prefix = "encoder"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]


class MAEModel(MAEPreTrainedModel, ViTEncoder):
    """The encoder of MAE."""


class MAEForPreTraining(PixelTargets, MAEPreTrainedModel):
    """Encoder on the visible patches, decoder, reconstruction loss on the masked patches."""

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.encoder = MAEModel(config)
        self.decoder = (CrossPixelDecoder if config.decoder_attention == "cross" else PixelDecoder)(config)
        self.post_init()

    def training_masks(self) -> dict[str, Any]:
        return {"target_share": self.config.decoder_targets}

    def draw_masks(
        self,
        batch_size: int,
        grid: tuple[int, int],
        device: torch.device | str | None = None,
        *,
        context_ids: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        target_share: float = 1.0,
    ) -> dict[str, Any]:
        """Draw the ids of one pass over a grid of `(rows, columns)` patches. Ids that are given stay as they are.

        Returns the arguments of `forward`: `context_ids [B, Nv]` and `target_ids [B, Nm]`, int64 on `device`. With
        `noise [B, N]`, the patches with the smallest noise stay visible; if masks have units, N is their number. Below
        1, `target_share` leaves a random share of the masked patches. Raises ValueError if only one kind of ids is
        given, or if the grid has too few patches to mask.
        """
        if are_ids_absent(context_ids, target_ids):
            unit, visible = self.config.mask_unit, self.config.num_visible(grid)
            units = math.prod(self.config.units(grid))
            noise = torch.rand(batch_size, units, device=device) if noise is None else noise
            context_ids, target_ids = split_at_random(noise, visible // unit**2)
            if unit > 1:
                context_ids, target_ids = (patches_of_units(ids, grid, unit) for ids in (context_ids, target_ids))
            if target_share < 1:
                order = torch.rand(target_ids.shape, device=device).argsort(dim=1)
                target_ids = target_ids.gather(1, order[:, : max(1, round(order.shape[1] * target_share))])
        return {"context_ids": context_ids, "target_ids": target_ids}

    def step_flops(self, images: int, grid: tuple[int, int], masks: Mapping[str, torch.Tensor]) -> float:
        context, masked = masks["context_ids"].shape[1], masks["target_ids"].shape[1]
        decoder = pixel_decoder_flops(self.config, context, masked)
        return images * (trained_encoder_flops(self.config, context) + 3 * decoder)

    @pretraining_forward
    def forward(
        self,
        pixel_values: torch.Tensor,
        context_ids: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        valid_pixels: torch.Tensor | None = None,
    ) -> MAEOutput:
        """Reconstruct masked patches.

        Args:
            pixel_values: normalised images `[B, C, H, W]`.
            context_ids, target_ids: `[B, Nv]` visible and `[B, Nm]` masked patches, raster indices; drawn if absent, in
                train mode only `config.decoder_targets` of the masked ones.
            noise: `[B, N]`; the patches (or units of patches) with the smallest noise stay visible. Drawn if absent.
            valid_pixels: bool `[B, C, H, W]`, False for pixels without data, which are 0 in `pixel_values` and left out
                of the loss. Default: all have data.
        """
        patches, grid = self.encoder.cut(pixel_values)
        given: dict[str, Any] = {"context_ids": context_ids, "target_ids": target_ids, "noise": noise}
        given |= self.training_masks() if self.training else {}
        masks = self.draw_masks(len(patches), grid, patches.device, **given)
        context_ids, target_ids = masks["context_ids"], masks["target_ids"]
        latents = self.encoder.encode(gather(patches, context_ids), grid, context_ids)
        predictions = self.decoder(latents, grid, context_ids, target_ids)
        targets, valid = pixel_targets(patches, target_ids, self.valid_values(valid_pixels), self.config.norm_pix_loss)
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


class MAEForImageClassification(ClassificationHead, MAEPreTrainedModel):
    """The encoder of MAE and a linear classifier."""

    encoder_class = MAEModel


class MAEBackbone(BackboneHead, MAEPreTrainedModel):
    """The encoder of MAE as feature maps, for detection and segmentation."""

    encoder_class = MAEModel
