"""Latent MIM: towards latent masked image modeling (Wei, Gupta, Morgado, ECCV 2024, arXiv 2407.15837)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_latent_mim import LatentMIMConfig
from .decoders import CrossAttentionLayer
from .flops import attention_flops, encoder_flops, linear_flops, mlp_flops, product_flops, trained_encoder_flops
from .heads import BackboneHead, ClassificationHead
from .losses import masked_sum, mean_over, normalized_l2, patch_discrimination, standardize
from .masking import gather, split_at_random
from .positions import PositionEmbeddings
from .recording import pretraining_forward
from .signals import error_over_constant, spread, target_signals
from .target_encoder import TargetNetworkMixin, cosine, target_encoder_config
from .vit import MIMPreTrainedModel, PretrainingOutput, ViTEncoder, are_ids_absent


@dataclass
class LatentMIMOutput(PretrainingOutput):
    """Predictions and targets `[B, Nm, D]`; context_ids `[B, Nv]`, target_ids `[B, Nm]`, patch_offsets
    `[B, gh, gw, 2]`."""

    patch_offsets: torch.Tensor | None = None


def patchify_with_gap(
    pixel_values: torch.Tensor, patch_size: tuple[int, int], patch_offsets: torch.Tensor, gap: int
) -> torch.Tensor:
    """`[B, C, gh·(ph+gap), gw·(pw+gap)]` → `[B, N, P]`: from each cell the patch at its offset `[B, gh, gw, 2]` (row,
    column, each in {0..gap}), flattened by row, column, channel."""
    batch, channels = pixel_values.shape[:2]
    rows, columns = patch_offsets.shape[1:3]
    cells = pixel_values.reshape(batch, channels, rows, patch_size[0] + gap, columns, patch_size[1] + gap)
    device = pixel_values.device
    image = torch.arange(batch, device=device)[:, None, None, None, None]
    row = torch.arange(rows, device=device)[:, None, None, None]
    column = torch.arange(columns, device=device)[:, None, None]
    inside_rows = patch_offsets[..., 0, None, None] + torch.arange(patch_size[0], device=device)[:, None]
    inside_columns = patch_offsets[..., 1, None, None] + torch.arange(patch_size[1], device=device)
    patches = cells[image, :, row, inside_rows, column, inside_columns]
    return patches.reshape(batch, rows * columns, -1)


def mean_pairwise_cosine(tokens: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cosine over all pairs of tokens `[B, K, D]` of an image, averaged over the batch: 1/K for orthogonal tokens,
    1 for equal ones. A token and itself are a pair too, as in the released code. Only `valid [B, K]` tokens count."""
    # The mean over pairs of unit vectors is the squared length of their mean.
    units = F.normalize(tokens, dim=-1)
    if valid is None:
        return units.mean(dim=1).square().sum(dim=-1).mean()
    means = masked_sum(units, valid[..., None], 1) / valid.sum(dim=1, keepdim=True).clamp(min=1)
    return mean_over(means.square().sum(dim=-1), valid.any(dim=1))


def log_of_choices(targets: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor | float:
    """ln of the number of targets `[B, K, D]` among which a prediction chooses; the mean over the `valid [B, K]`."""
    if valid is None:
        return math.log(targets.shape[1])
    choices = valid.sum(dim=1, keepdim=True).clamp(min=1).log().expand(valid.shape)
    return mean_over(choices, valid)


class LatentMIMPreTrainedModel(MIMPreTrainedModel):
    config_class = LatentMIMConfig
    base_model_prefix = "encoder"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^projector\.", r"^target_"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SimilarityTarget):
            init.constant_(module.value, self.config.similarity_start)


class LatentMIMModel(LatentMIMPreTrainedModel, ViTEncoder):
    """The encoder of Latent MIM; its projector is not part of the features."""


class Projector(nn.Module):
    """The head on both encoders: Linears `D → width → … → D` without bias, LayerNorm after each, GELU between."""

    def __init__(self, config: LatentMIMConfig):
        super().__init__()
        hidden = [config.projector_hidden_size] * (config.projector_num_layers - 1)
        widths = [config.hidden_size, *hidden, config.hidden_size]
        self.linears = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in zip(widths[:-1], widths[1:], strict=True))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-5) for width in widths[1:])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for linear, norm in zip(self.linears[:-1], self.norms[:-1], strict=True):
            tokens = F.gelu(norm(linear(tokens)))
        return self.norms[-1](self.linears[-1](tokens))


class SimilarityTarget(nn.Module):
    """The cosine that the similarity term pulls to. It is kept on the device, so that changing it waits for nothing."""

    value: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.empty(()), persistent=False)


class LatentMIMDecoder(nn.Module):
    """Mask queries, with visual cues added, attend to the visible latents and predict the latents of their patches."""

    def __init__(self, config: LatentMIMConfig):
        super().__init__()
        width, heads = config.decoder_hidden_size, config.decoder_num_attention_heads
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_cls_token else None
        self.position_embeddings = PositionEmbeddings(config, width)
        self.layers = nn.ModuleList(
            CrossAttentionLayer(config, width, heads) for _ in range(config.decoder_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, target_encoder_config(config).hidden_size)

    def visual_cues(
        self, visible: torch.Tensor, query_positions: torch.Tensor, visible_positions: torch.Tensor
    ) -> torch.Tensor:
        """The mean of the visible tokens `[B, Nv, Dd]`, weighted by closeness to each query: `[B, Nm, Dd]`."""
        closeness = query_positions @ visible_positions.transpose(1, 2) * query_positions.shape[-1] ** -0.5
        return closeness.softmax(dim=-1) @ visible

    def forward(
        self, latents: torch.Tensor, grid: tuple[int, int], context_ids: torch.Tensor, target_ids: torch.Tensor
    ) -> torch.Tensor:
        """Projected latents `[B, prefix + Nv, D]` → predictions `[B, Nm, D]`."""
        prefix, places = self.position_embeddings(grid, self.mask_token.dtype)
        num_prefix, prefix = len(prefix), prefix.expand(len(latents), -1, -1)
        context_positions, target_positions = places[context_ids], places[target_ids]

        visible = self.embed(latents)
        memory = visible + torch.cat([prefix, context_positions], dim=1)
        cues = self.visual_cues(visible[:, num_prefix:], target_positions, context_positions)
        queries = self.mask_token + cues + target_positions
        if self.cls_token is not None:
            queries = torch.cat([self.cls_token + prefix[:, :1], queries], dim=1)
        for layer in self.layers[:-1]:
            queries = layer(queries, memory)
        return self.head(self.norm(self.layers[-1](queries, memory, target_ids.shape[1])))


class LatentMIMForPreTraining(TargetNetworkMixin, LatentMIMPreTrainedModel):
    """Online encoder on the visible patches, target encoder on the masked ones, decoder from one to the other.

    With `mask_target=False` the target encoder sees all patches, and its tokens of the masked ones are the targets.

    The target is the EMA of the online encoder and of its projector. With `config.target_config` it is a frozen
    encoder, and its standardised tokens are the targets.
    """

    def __init__(self, config: LatentMIMConfig):
        super().__init__(config)
        self.encoder = LatentMIMModel(config)
        self.projector = Projector(config)
        if config.target_config is None:
            self.target_encoder, self.target_projector = LatentMIMModel(config), Projector(config)
        else:
            self.target_encoder, self.target_projector = ViTEncoder(target_encoder_config(config)), None
        self.decoder = LatentMIMDecoder(config)
        self.similarity_target = SimilarityTarget()
        self.post_init()

    def target_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        if self.target_projector is None:  # frozen
            return []
        return [(self.target_encoder, self.encoder), (self.target_projector, self.projector)]

    def set_progress(self, progress: float) -> None:
        """Move the similarity target along its cosine; call before each step."""
        self.similarity_target.value.fill_(cosine(self.config.similarity_start, self.config.similarity_end, progress))

    def draw_masks(
        self,
        batch_size: int,
        grid: tuple[int, int],
        device: torch.device | str | None = None,
        *,
        patch_offsets: torch.Tensor | None = None,
        context_ids: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Draw offsets and ids of one pass over a `(gh, gw)` grid of patches. What is given stays as it is.

        Returns the arguments of `forward`: `patch_offsets [B, gh, gw, 2]`, `context_ids [B, Nv]` and
        `target_ids [B, Nm]`, int64 on `device`. With `noise [B, N]`, the patches with the smallest noise stay visible.
        Raises ValueError if only one kind of ids is given, or if the grid has too few patches to mask.
        """
        if patch_offsets is None:
            patch_offsets = torch.randint(max(self.config.patch_gap, 1), (batch_size, *grid, 2), device=device)
        if are_ids_absent(context_ids, target_ids):
            noise = torch.rand(batch_size, grid[0] * grid[1], device=device) if noise is None else noise
            context_ids, target_ids = split_at_random(noise, self.config.num_visible(grid))
        return {"patch_offsets": patch_offsets, "context_ids": context_ids, "target_ids": target_ids}

    def draw(
        self, pixel_values: torch.Tensor, patch_offsets: torch.Tensor | None = None, **given: Any
    ) -> tuple[torch.Tensor, tuple[int, int], dict[str, Any]]:
        """Draw what `forward` was not given, and cut the images: returns patches `[B, N, P]`, their grid, the masks."""
        gap, patch_size = self.config.patch_gap, self.config.patch_height_width
        (height, width), (cell_height, cell_width) = pixel_values.shape[2:], (side + gap for side in patch_size)
        if height % cell_height or width % cell_width:
            raise ValueError(
                f"training images must have sides divisible by patch_size + patch_gap = {cell_height}×{cell_width}, "
                f"got {height}×{width}; config.training_size is {self.config.training_size}"
            )
        self.check_channels(pixel_values)
        grid = (height // cell_height, width // cell_width)
        masks = self.draw_masks(len(pixel_values), grid, pixel_values.device, patch_offsets=patch_offsets, **given)
        return patchify_with_gap(pixel_values, patch_size, masks["patch_offsets"], gap), grid, masks

    def loss(
        self, predictions: torch.Tensor, targets: torch.Tensor, visible: torch.Tensor, valid: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its parts; predictions, targets `[B, Nm, D]` and visible latents `[B, Nv, D]` are float32. Only
        `valid [B, Nm]` targets count."""
        if self.config.loss_type == "patch_discrimination":
            loss = patch_discrimination(predictions, targets, self.config.temperature, valid)
            # Constant predictions are standardised to 0. They find their targets by chance: 2 · temperature · ln Nm.
            error = loss.detach() / (2 * self.config.temperature * log_of_choices(targets, valid))
        else:
            loss = normalized_l2(predictions, targets, valid)
            error = error_over_constant(predictions, standardize(targets), valid)
        similarities = {
            "similarity_predictions": mean_pairwise_cosine(predictions, valid),
            "similarity_visible": mean_pairwise_cosine(visible),
        }
        metrics = {self.config.loss_type: loss.detach()} | {k: v.detach() for k, v in similarities.items()}
        metrics["error_over_constant"] = error
        if self.config.similarity_weight:
            gaps = torch.stack(list(similarities.values())) - self.similarity_target.value
            loss = loss + self.config.similarity_weight * gaps.square().sum()
        return loss, metrics

    def step_flops(self, images: int, grid: tuple[int, int], masks: Mapping[str, torch.Tensor]) -> float:
        config, target = self.config, target_encoder_config(self.config)
        context, masked = masks["context_ids"].shape[1], masks["target_ids"].shape[1]
        tokens, width = config.num_prefix_tokens + context, config.decoder_hidden_size
        hidden = [config.projector_hidden_size] * (config.projector_num_layers - 1)
        projector = config.hidden_size, *hidden, config.hidden_size
        decoder = linear_flops(tokens, config.hidden_size, width) + linear_flops(masked, width, target.hidden_size)
        queries = masked + int(config.use_cls_token)
        for computed in [queries] * (config.decoder_num_hidden_layers - 1) + [masked]:
            decoder += attention_flops(computed, queries, width)
            decoder += attention_flops(computed, tokens, width) + mlp_flops(computed, width)
        cues = product_flops(masked, width, context)  # twice; positions have no gradient
        trained = trained_encoder_flops(config, context) + 3 * (linear_flops(tokens, *projector) + decoder) + 3 * cues
        if config.loss_type == "patch_discrimination":
            trained += 2 * product_flops(masked, target.hidden_size, masked)  # targets have no gradient
        seen = masked if config.mask_target else grid[0] * grid[1]
        own = linear_flops(masked, *projector) if config.target_config is None else 0
        return images * (trained + encoder_flops(target, seen) + own)

    @pretraining_forward
    def forward(
        self,
        pixel_values: torch.Tensor,
        context_ids: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        patch_offsets: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        valid_pixels: torch.Tensor | None = None,
    ) -> LatentMIMOutput:
        """Predict the target network's latents of masked patches.

        Args:
            pixel_values: normalised images `[B, C, gh·(ph+gap), gw·(pw+gap)]`: `config.training_size`.
            context_ids, target_ids: `[B, Nv]` visible and `[B, Nm]` masked patches, raster indices; drawn if absent.
            patch_offsets: `[B, gh, gw, 2]` row and column of each patch in its cell; drawn from {0..gap-1} if absent.
            noise: `[B, N]`; the patches with the smallest noise stay visible. Drawn if absent.
            valid_pixels: bool `[B, C, H, W]`, False for pixels without data, which are 0 in `pixel_values`. Patches
                without any data are no targets. Default: all have data.
        """
        given = {"context_ids": context_ids, "target_ids": target_ids, "noise": noise}
        patches, grid, masks = self.draw(pixel_values, patch_offsets, **given)
        context_ids, target_ids = masks["context_ids"], masks["target_ids"]
        num_prefix, valid = self.config.num_prefix_tokens, None
        if valid_pixels is not None:
            cut = self.config.patch_height_width, masks["patch_offsets"], self.config.patch_gap
            valid = gather(patchify_with_gap(valid_pixels, *cut).any(dim=-1), target_ids)
        with torch.no_grad():
            seen = (gather(patches, target_ids), grid, target_ids) if self.config.mask_target else (patches, grid)
            targets = self.target_encoder.encode(*seen)[:, self.target_encoder.config.num_prefix_tokens :]
            targets = targets if self.config.mask_target else gather(targets, target_ids)
            if self.target_projector is None:
                targets = F.layer_norm(targets.float(), targets.shape[-1:])
            else:
                targets = self.target_projector(targets).float()
        latents = self.projector(self.encoder.encode(gather(patches, context_ids), grid, context_ids))
        predictions = self.decoder(latents, grid, context_ids, target_ids)
        with torch.autocast(pixel_values.device.type, enabled=False):  # logits of bfloat16 would be off by 1 %
            loss, metrics = self.loss(predictions.float(), targets, latents[:, num_prefix:].float(), valid)
        metrics["similarity_targets"] = mean_pairwise_cosine(targets, valid)
        metrics["feature_std"] = spread(latents[:, num_prefix:])
        metrics |= target_signals(targets, target_ids, patches.shape[1], valid)
        return LatentMIMOutput(loss=loss, predictions=predictions, targets=targets, metrics=metrics, **masks)


class LatentMIMForImageClassification(ClassificationHead, LatentMIMPreTrainedModel):
    """The encoder of Latent MIM and a linear classifier."""

    encoder_class = LatentMIMModel


class LatentMIMBackbone(BackboneHead, LatentMIMPreTrainedModel):
    """The encoder of Latent MIM as feature maps, for detection and segmentation."""

    encoder_class = LatentMIMModel
