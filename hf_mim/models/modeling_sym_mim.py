"""SymMIM: symmetric masking for masked image modeling (Nguyen and Park, ICPR 2024, arXiv 2408.12772)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from .configuration_sym_mim import SymMIMConfig
from .decoders import PixelDecoder
from .flops import encoder_flops, linear_flops, pixel_decoder_flops, product_flops, trained_encoder_flops
from .heads import BackboneHead, ClassificationHead
from .losses import info_nce, mean_squared_error
from .masking import gather, split_at_random, split_checkerboard
from .pixel_targets import PixelTargets, pixel_targets
from .ranks import all_gather, mean_over_ranks, rank_and_count
from .recording import pretraining_forward
from .signals import error_over_constant, spread, target_signals
from .target_encoder import TargetNetworkMixin
from .vit import MIMPreTrainedModel, PretrainingOutput, ViTEncoder, are_ids_absent


@dataclass
class SymMIMOutput(PretrainingOutput):
    """Predictions and targets `[B·R, Nm, P]` (by row, column, channel) for R masks per image; context_ids `[B·R, Nv]`,
    target_ids `[B·R, Nm]`; target_context_ids `[B, Nc]`, which the target encoder has seen."""

    target_context_ids: torch.Tensor | None = None


class SymMIMPreTrainedModel(MIMPreTrainedModel):
    config_class = SymMIMConfig
    base_model_prefix = "encoder"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^projector\.", r"^predictor\.", r"^target_"]


class SymMIMModel(SymMIMPreTrainedModel, ViTEncoder):
    """The encoder of SymMIM."""


class BatchStandardize(nn.Module):
    """Each feature of a batch `[B, D]` gets mean 0 and variance 1, in float32.

    It is a BatchNorm without weights and without a memory of earlier batches, because what follows compares the images
    of one batch. In train mode, mean and variance are those of the images of all ranks.
    """

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        everywhere = mean_over_ranks if self.training else lambda mean: mean
        centred = features.float() - everywhere(features.float().mean(dim=0))
        return (centred * (everywhere(centred.square().mean(dim=0)) + self.eps).rsqrt()).to(features.dtype)


class ContrastMLP(nn.Sequential):
    """Linears without bias, a batch standardisation after each, ReLU between (MoCo v3, arXiv 2104.02057)."""

    def __init__(self, *widths: int):
        layers = []
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(inputs, outputs, bias=False), BatchStandardize(), nn.ReLU()]
        super().__init__(*layers[:-1])


class SymMIMForPreTraining(PixelTargets, TargetNetworkMixin, SymMIMPreTrainedModel):
    """Two checkerboards of one image, each with one half visible.

    The online encoder sees one half of the fine one, whose fields are patches, and the decoder reconstructs the other
    half. The target encoder, the EMA of the online one, sees one half of the coarse one, whose cells have `mask_cell`
    patches a side. InfoNCE ties the two views of an image: the keys are of all images of all ranks.

    The paper says no more than this, and no code was released. Decided here: both encoders get the visible patches
    only; which half is visible is drawn for each image and each checkerboard, or one half of the places would never be
    predicted; the decoder is MAE's; the contrast is MoCo v3's, of the mean of the patch tokens, where the projector has
    3 layers and the predictor 2; the loss is reconstruction + contrast_weight · contrast.
    """

    def __init__(self, config: SymMIMConfig):
        super().__init__(config)
        self.encoder = SymMIMModel(config)
        self.decoder = PixelDecoder(config)
        if config.contrast_weight:
            hidden, size = config.projector_hidden_size, config.projector_size
            widths = config.hidden_size, hidden, hidden, size
            self.projector, self.predictor = ContrastMLP(*widths), ContrastMLP(size, hidden, size)
            self.target_encoder, self.target_projector = SymMIMModel(config), ContrastMLP(*widths)
        self.post_init()

    def target_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        if not self.config.contrast_weight:
            return []
        return [(self.target_encoder, self.encoder), (self.target_projector, self.projector)]

    def target_networks(self) -> list[nn.Module]:
        return [target for target, _ in self.target_pairs()]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for target in self.target_networks()[1:]:
            target.train(mode)  # it has no drop path, and in train mode it standardises over the images of all ranks
        return self

    def training_masks(self) -> dict[str, Any]:
        return {"masks_per_image": self.config.masks_per_image}

    def draw_masks(
        self,
        batch_size: int,
        grid: tuple[int, int],
        device: torch.device | str | None = None,
        *,
        context_ids: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        target_context_ids: torch.Tensor | None = None,
        masks_per_image: int = 1,
    ) -> dict[str, Any]:
        """Draw the ids of one pass over a grid of `(rows, columns)` patches. Ids that are given stay as they are.

        Returns the arguments of `forward`: `context_ids [B·R, n]`, `target_ids [B·R, n]` and, if there is a contrast,
        `target_context_ids [B, m]`, int64 on `device`. The R = `masks_per_image` masks of the first image come first.
        If a checkerboard has unequal halves, some patches of the larger half are left out of the pass. Raises
        ValueError if only one of context and target is given, or if the grid cannot be halved.
        """
        self.config.check_grid(grid)
        if are_ids_absent(context_ids, target_ids):
            context_ids, target_ids = self._halves(batch_size, grid, 1, device, masks_per_image)
        ids = {"context_ids": context_ids, "target_ids": target_ids}
        if self.config.contrast_weight:
            if target_context_ids is None:
                target_context_ids, _ = self._halves(batch_size, grid, self.config.mask_cell, device)
            ids["target_context_ids"] = target_context_ids
        return ids

    def _halves(
        self, batch_size: int, grid: tuple[int, int], cell: int, device: torch.device | str, masks_per_image: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids of the visible half and of the other, of a checkerboard with such cells. The next mask of an image
        has them the other way round."""
        noise = torch.rand(batch_size * masks_per_image, grid[0] * grid[1], device=device)
        if self.config.mask_pattern == "random":
            return split_at_random(noise, noise.shape[1] // 2)
        inverted = torch.zeros(batch_size, dtype=torch.bool, device=device)
        if self.config.mask_phase == "random":
            inverted = torch.rand(batch_size, device=device) < 0.5
        inverted = (inverted[:, None] ^ (torch.arange(masks_per_image, device=device) % 2 == 1)).flatten()
        return split_checkerboard(grid, cell, inverted, noise)

    def contrast(
        self,
        tokens: torch.Tensor,
        patches: torch.Tensor,
        grid: tuple[int, int],
        target_context_ids: torch.Tensor,
        valid: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The InfoNCE of the online tokens `[B·R, prefix + n, D]`, and the target tokens `[B, m, D]`, float32.

        In evaluation mode the keys are those of this rank alone, so that one rank can do it by itself.
        """
        num_prefix = self.config.num_prefix_tokens
        with torch.no_grad():
            seen = gather(patches, target_context_ids)
            targets = self.target_encoder.encode(seen, grid, target_context_ids)[:, num_prefix:]
            keys, first = self.target_projector(targets.mean(dim=1)).float(), 0
            if self.training:
                first, keys = rank_and_count()[0] * len(keys), all_gather(keys)
        queries = self.predictor(self.projector(tokens[:, num_prefix:].mean(dim=1))).float()
        masks = len(queries) // len(seen)
        valid = None if valid is None else valid.repeat_interleave(masks)
        with torch.autocast(patches.device.type, enabled=False):  # logits of bfloat16 would be off by 1 %
            return info_nce(queries, keys, self.config.temperature, first, valid, masks), targets.float()

    def step_flops(self, images: int, grid: tuple[int, int], masks: Mapping[str, torch.Tensor]) -> float:
        config, (rows, context) = self.config, masks["context_ids"].shape
        decoder = pixel_decoder_flops(config, context, masks["target_ids"].shape[1])
        total = rows * (trained_encoder_flops(config, context) + 3 * decoder)
        if not config.contrast_weight:
            return total
        hidden, size = config.projector_hidden_size, config.projector_size
        projector = linear_flops(1, config.hidden_size, hidden, hidden, size)
        predictor = linear_flops(1, size, hidden, size)
        logits = product_flops(rows, size, images * rank_and_count()[1])  # keys have no gradient
        target = encoder_flops(config, masks["target_context_ids"].shape[1]) + projector
        return total + 3 * rows * (projector + predictor) + 2 * logits + images * target

    @pretraining_forward
    def forward(
        self,
        pixel_values: torch.Tensor,
        context_ids: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        target_context_ids: torch.Tensor | None = None,
        valid_pixels: torch.Tensor | None = None,
    ) -> SymMIMOutput:
        """Reconstruct one half of the patches from the other, and find the image among others.

        Args:
            pixel_values: normalised images `[B, C, H, W]`.
            context_ids, target_ids: `[B·R, n]` visible and masked patches, raster indices: R rows for each image, those
                of the first image first. Drawn if absent, R = `config.masks_per_image` in train mode, and 1 else.
            target_context_ids: `[B, m]` the patches that the target encoder sees; drawn if absent.
            valid_pixels: bool `[B, C, H, W]`, False for pixels without data, which are 0 in `pixel_values` and left out
                of the reconstruction. Images without any data do not count in the contrast. Default: all have data.
        """
        patches, grid = self.encoder.cut(pixel_values)
        given: dict[str, Any] = {
            "context_ids": context_ids,
            "target_ids": target_ids,
            "target_context_ids": target_context_ids,
        }
        given |= self.training_masks() if self.training else {}
        masks = self.draw_masks(len(patches), grid, patches.device, **given)
        context_ids, target_ids = masks["context_ids"], masks["target_ids"]
        tokens = self.encoder.encode(gather(patches, context_ids), grid, context_ids)
        predictions = self.decoder(tokens, grid, context_ids, target_ids)
        data = self.valid_values(valid_pixels)
        targets, valid = pixel_targets(patches, target_ids, data, self.config.norm_pix_loss)
        loss = mean_squared_error(predictions.float(), targets, valid)
        metrics = {
            "feature_std": spread(tokens[:, self.config.num_prefix_tokens :]),
            "error_over_constant": error_over_constant(predictions[..., None], targets[..., None], valid),
        }
        if self.config.contrast_weight:
            places = masks["target_context_ids"]
            known = None if data is None else data.any(dim=-1)  # [B, N]
            contrast, seen = self.contrast(tokens, patches, grid, places, None if known is None else known.any(dim=1))
            metrics |= {"reconstruction": loss.detach(), "contrast": contrast.detach()}
            metrics |= target_signals(seen, places, patches.shape[1], None if known is None else gather(known, places))
            loss = loss + self.config.contrast_weight * contrast
        return SymMIMOutput(loss=loss, predictions=predictions, targets=targets, metrics=metrics, **masks)


class SymMIMForImageClassification(ClassificationHead, SymMIMPreTrainedModel):
    """The encoder of SymMIM and a linear classifier."""

    encoder_class = SymMIMModel


class SymMIMBackbone(BackboneHead, SymMIMPreTrainedModel):
    """The encoder of SymMIM as feature maps, for detection and segmentation."""

    encoder_class = SymMIMModel
