"""Interactive MIM: interactive masked image modeling for several modalities (Vu et al., arXiv 2409.08885)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .blocks import run_layers, vit_layers
from .configuration_interactive_mim import InteractiveMIMConfig
from .decoders import InteractionLayer
from .flops import interaction_layers_flops, linear_flops, patch_values, trained_encoder_flops, vit_layers_flops
from .heads import BackboneHead, ClassificationHead
from .losses import mean_squared_error
from .masking import gather, split_at_random, split_modalities
from .pixel_targets import PixelTargets, fill_patches, masked_pixels, pixel_targets
from .positions import PositionEmbeddings
from .recording import pretraining_forward
from .signals import error_over_constant, spread
from .vit import (
    MIMPreTrainedModel,
    PretrainingOutput,
    ViTEmbeddings,
    ViTEncoder,
    are_ids_absent,
    unpatchify,
)


@dataclass
class InteractiveMIMOutput(PretrainingOutput):
    """context_ids `[B, U]`: the places that the encoder sees; visible, bool `[B, U, M]`: the modalities that it sees
    there (absent: all). target_ids `[B, M, Nm]`: the masked places of each modality, or `[B, Nm]` for one modality.
    Predictions and targets `[B, Nm, P]`: for each modality, one after the other, the pixels of its masked patches."""

    visible: Tensor | None = None


class ModalityEmbeddings(ViTEmbeddings):
    """The token of a place is the sum of the embeddings of the modalities that are visible there.

    One Linear of all channels is this sum: its columns are the embeddings of the modalities, and its bias is the sum of
    their biases. A modality that is not visible has zeros for pixels, and its bias is taken off: that is `absent`.
    So the encoder of whole images is a plain ViT, which every export can hold.
    """

    def __init__(self, config: InteractiveMIMConfig):
        super().__init__(config)
        self.channels = list(config.modality_channels.values())
        partly = len(self.channels) > 1 and config.modality_masking == "independent"
        self.absent = nn.Parameter(torch.empty(len(self.channels), config.hidden_size)) if partly else None

    def forward(
        self, patches: Tensor, grid: tuple[int, int], patch_ids: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """`visible`, bool `[B, K, M]`: the modalities that are visible at each place; None: all."""
        if visible is None:
            return super().forward(patches, grid, patch_ids)
        parts = zip(visible.split(1, dim=-1), self.channels, strict=True)
        shown = torch.cat([part.expand(-1, -1, count) for part, count in parts], dim=-1)  # [B, K, C]
        pixels = patches.unflatten(-1, (-1, sum(self.channels)))
        tokens = super().forward((pixels * shown[..., None, :]).flatten(-2), grid, patch_ids)
        if self.absent is None:
            return tokens
        start = tokens.shape[1] - visible.shape[1]
        off = (~visible).to(tokens.dtype) @ self.absent.to(tokens.dtype)
        return torch.cat([tokens[:, :start], tokens[:, start:] + off], dim=1)


class InteractiveMIMPreTrainedModel(MIMPreTrainedModel):
    config_class = InteractiveMIMConfig
    base_model_prefix = "encoder"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "absent", None) is not None:
            init.zeros_(cast(nn.Parameter, module.absent))


class InteractiveMIMModel(InteractiveMIMPreTrainedModel, ViTEncoder):
    """The encoder of Interactive MIM."""

    embeddings_class = ModalityEmbeddings
    own_arguments = ("visible",)

    def forward(
        self,
        pixel_values: Tensor,
        patch_ids: Tensor | None = None,
        modalities: Sequence[str] | None = None,
        valid_pixels: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """As `ViTEncoder.forward`, of all modalities or of some.

        Args:
            pixel_values: `[B, C, H, W]`; the channels of modalities that are left out are not read, and may be missing.
            modalities: names of those to read; default: `config.modalities_seen`.
            valid_pixels: bool, of the shape of `pixel_values`, False for pixels without data, which are 0 there. A
                modality is left out of an image or a patch where it has no data at all. Default: all have data.
        """
        names = self.config.modalities_seen if modalities is None else list(modalities)
        if names is None and valid_pixels is None:
            return super().forward(pixel_values, patch_ids, **kwargs)
        own = self.config.channels_of_modalities
        names = list(own) if names is None else names
        self.config.check_seen(names)
        chosen = [channel for name, part in own.items() if name in names for channel in range(part.start, part.stop)]
        valid_pixels = torch.ones_like(pixel_values, dtype=torch.bool) if valid_pixels is None else valid_pixels
        if pixel_values.shape[1] == len(chosen) < self.config.num_channels:
            pixel_values, valid_pixels = (self._widened(x, chosen) for x in (pixel_values, valid_pixels))
        visible = self.with_data(self.cut(valid_pixels)[0])
        visible = visible if patch_ids is None else gather(visible, patch_ids)
        visible = visible & torch.tensor([name in names for name in own], device=visible.device)
        return super().forward(pixel_values, patch_ids, visible=visible, **kwargs)

    def _widened(self, values: Tensor, channels: list[int]) -> Tensor:
        """These channels `[B, c, H, W]` among all, of which the others are 0."""
        whole = values.new_zeros(values.shape[0], self.config.num_channels, *values.shape[2:])
        whole[:, channels] = values
        return whole

    def with_data(self, valid: Tensor) -> Tensor:
        """Which values of patches have data, bool `[B, N, P]` → whether a modality has any there, `[B, N, M]`."""
        values = valid.unflatten(-1, (-1, self.config.num_channels)).any(dim=-2)
        return torch.stack([values[..., part].any(-1) for part in self.config.channels_of_modalities.values()], dim=-1)

    def plain_state_dict(self) -> dict[str, Tensor]:
        state, config = self.state_dict(), self.config
        absent = state.pop("embeddings.absent", None)
        if config.modalities_seen is None:
            return state
        weight = state["embeddings.projection.weight"].clone().unflatten(-1, (-1, config.num_channels))
        for number, (name, part) in enumerate(config.channels_of_modalities.items()):
            if name not in config.modalities_seen:
                weight[..., part] = 0
                if absent is not None:
                    state["embeddings.projection.bias"] = state["embeddings.projection.bias"] + absent[number]
        return state | {"embeddings.projection.weight": weight.flatten(-2)}


class InteractionDecoder(nn.Module):
    """Masked tokens, one for each masked patch of each modality, read the visible tokens; then a light transformer of
    both, and a head for the pixels of each modality."""

    def __init__(self, config: InteractiveMIMConfig):
        super().__init__()
        width, heads = config.decoder_hidden_size, config.decoder_num_attention_heads
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.empty(len(config.modalities), 1, width))
        self.position_embeddings = PositionEmbeddings(config, width)
        blocks = range(config.interaction_num_layers)
        self.interaction = nn.ModuleList(InteractionLayer(config, width, heads) for _ in blocks)
        self.layers = vit_layers(config, width, config.decoder_num_hidden_layers, heads)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        pixels = math.prod(config.patch_height_width)
        self.heads = nn.ModuleList(nn.Linear(width, pixels * count) for count in config.modality_channels.values())

    def forward(self, latents: Tensor, grid: tuple[int, int], context_ids: Tensor, target_ids: Tensor) -> list[Tensor]:
        """Latents `[B, prefix + U, D]` of the places `context_ids [B, U]` → for each modality the predictions
        `[B, Nm, P]` of its `target_ids [B, M, Nm]`."""
        prefix, places = self.position_embeddings(grid, self.mask_token.dtype)
        context = self.embed(latents) + torch.cat([prefix.expand(len(latents), -1, -1), places[context_ids]], dim=1)
        queries = (self.mask_token + places[target_ids]).flatten(1, 2)
        for layer in self.interaction:
            queries = layer(queries, context)
        tokens = torch.cat([context, queries], dim=1)
        tokens = self.norm(run_layers(self.layers, tokens, num_queries=queries.shape[1]))
        parts = tokens.unflatten(1, target_ids.shape[1:]).unbind(dim=1)
        return [head(part) for head, part in zip(self.heads, parts, strict=True)]


class InteractiveMIMForPreTraining(PixelTargets, InteractiveMIMPreTrainedModel):
    """Encoder on the visible patches of all modalities, decoder with interaction, reconstruction of the masked ones.

    From the paper: masked tokens, which carry nothing of the image in MAE, first read the visible tokens by
    cross-attention. Its network is a Swin, and no code was released. Decided here, for a ViT: the token of a place is
    the sum of the embeddings of the modalities that are visible there, so their number costs nothing and one can be
    left out; with independent masks, the modalities have to predict each other; the loss is the mean over modalities of
    the squared error on their masked patches. With one modality and no interaction it is MAE.
    """

    encoder: InteractiveMIMModel

    def __init__(self, config: InteractiveMIMConfig):
        super().__init__(config)
        self.encoder = InteractiveMIMModel(config)
        self.decoder = InteractionDecoder(config)
        self.post_init()

    def draw_masks(
        self,
        batch_size: int,
        grid: tuple[int, int],
        device: torch.device | str | None = None,
        *,
        context_ids: Tensor | None = None,
        target_ids: Tensor | None = None,
        visible: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Any]:
        """Draw the ids of one pass over a grid of `(rows, columns)` patches. What is given stays as it is.

        Returns the arguments of `forward`: `context_ids [B, U]`, `target_ids [B, M, Nm]` (`[B, Nm]` for one modality),
        int64, and for independent masks `visible`, bool `[B, U, M]`, all on `device`. With `noise [B, N]`, the patches
        of the first modality with the smallest noise stay visible. For each image, the masks of the modalities are
        independent and uniform. In a training, `modality_dropout` hides all but one modality of some images, whose
        targets stay. How many places they share is drawn once for the batch, because its tensors have to be
        rectangular. Raises ValueError if only one kind of ids is given, or if the grid has too few patches to mask.
        """
        count, places, number = self.config.num_visible(grid), grid[0] * grid[1], len(self.config.modalities)
        if not are_ids_absent(context_ids, target_ids):
            given = {"context_ids": context_ids, "target_ids": target_ids}
            return given if visible is None else given | {"visible": visible}
        noise = torch.rand(batch_size, places, device=device) if noise is None else noise
        if number > 1 and self.config.modality_masking == "independent":
            dropout = self.config.modality_dropout if self.training else 0.0
            context_ids, target_ids, visible = split_modalities(noise, count, number, dropout)
            return {"context_ids": context_ids, "target_ids": target_ids, "visible": visible}
        context_ids, target_ids = split_at_random(noise, count)
        if number > 1:
            target_ids = target_ids[:, None].expand(-1, number, -1)
        return {"context_ids": context_ids, "target_ids": target_ids}

    def step_flops(self, images: int, grid: tuple[int, int], masks: Mapping[str, Tensor]) -> float:
        config, context, masked = self.config, masks["context_ids"].shape[1], masks["target_ids"].shape[-1]
        width, memory = config.decoder_hidden_size, config.num_prefix_tokens + context
        number = len(config.modalities)
        queries = number * masked
        decoder = linear_flops(memory, config.hidden_size, width)
        decoder += interaction_layers_flops(config.interaction_num_layers, queries, memory, width)
        decoder += vit_layers_flops(config.decoder_num_hidden_layers, memory + queries, width, queries)
        decoder += linear_flops(masked, width, patch_values(config))  # all heads together
        absent = linear_flops(context, number, config.hidden_size) if "visible" in masks else 0
        return images * (trained_encoder_flops(config, context) + 2 * absent + 3 * decoder)

    @pretraining_forward
    def forward(
        self,
        pixel_values: Tensor,
        context_ids: Tensor | None = None,
        target_ids: Tensor | None = None,
        visible: Tensor | None = None,
        noise: Tensor | None = None,
        valid_pixels: Tensor | None = None,
    ) -> InteractiveMIMOutput:
        """Reconstruct the masked patches of each modality.

        Args:
            pixel_values: normalised images `[B, C, H, W]`, the channels in the order of `config.modalities`.
            context_ids: `[B, U]` the places that the encoder sees; drawn if absent.
            target_ids: `[B, M, Nm]`, or `[B, 1, Nm]` or `[B, Nm]` for the same places in all modalities.
            visible: bool `[B, U, M]`, the modalities that are visible at each of these places; default: all.
            noise: `[B, N]`; the patches of the first modality with the smallest noise stay visible.
            valid_pixels: bool `[B, C, H, W]`, False for pixels without data, which are 0 in `pixel_values` and left out
                of the loss. A patch without any data in a modality is not visible there. Default: all have data.
        """
        patches, grid = self.encoder.cut(pixel_values)
        given = {"context_ids": context_ids, "target_ids": target_ids, "visible": visible, "noise": noise}
        masks = self.draw_masks(len(patches), grid, patches.device, **given)
        places = self._of_each_modality(masks["target_ids"])
        context_ids, num_prefix = masks["context_ids"], self.config.num_prefix_tokens
        names, valid, shown = self.config.modality_channels, self.valid_values(valid_pixels), masks.get("visible")
        if valid is not None:
            with_data = gather(self.encoder.with_data(valid), context_ids)
            shown = with_data if shown is None else shown & with_data
        tokens = self.encoder.encode(gather(patches, context_ids), grid, context_ids, visible=shown)
        predictions = torch.cat(self.decoder(tokens, grid, context_ids, places), dim=-1)
        pairs = [
            pixel_targets(self._modality(patches, name), ids, self._modality(valid, name), self.config.norm_pix_loss)
            for name, ids in zip(names, places.unbind(dim=1), strict=True)
        ]
        losses = {
            name: mean_squared_error(predicted.float(), *pair)
            for name, predicted, pair in zip(names, self._parts(predictions), pairs, strict=True)
        }
        targets = torch.cat([own for own, _ in pairs], dim=-1)
        kept = None if valid is None else torch.cat([own for _, own in pairs], dim=-1)
        loss, more = self._mean_of_modalities(losses, None if valid is None else [own for _, own in pairs])
        metrics = {
            "feature_std": spread(tokens[:, num_prefix:]),
            "error_over_constant": error_over_constant(predictions[..., None], targets[..., None], kept),
        } | more
        return InteractiveMIMOutput(loss=loss, predictions=predictions, targets=targets, metrics=metrics, **masks)

    @staticmethod
    def _mean_of_modalities(
        losses: dict[str, Tensor], valid: Sequence[Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(the mean of these losses, the metrics of several). `valid`: which targets of each have data; None: all. A
        modality without any in this batch has no share in the mean, and its metric is NaN, which no log counts."""
        every = torch.stack([*losses.values()])
        if valid is None:
            loss = every.mean()
        else:
            known = torch.stack([own.any() for own in valid])
            loss, every = every.sum() / known.sum().clamp(min=1), torch.where(known, every, torch.nan)
        if len(losses) == 1:
            return loss, {}
        return loss, {f"reconstruction_{name}": one for name, one in zip(losses, every.detach(), strict=True)}

    def _of_each_modality(self, target_ids: Tensor) -> Tensor:
        """`[B, M, Nm]`, for ids `[B, Nm]` or `[B, 1, Nm]` too."""
        return (target_ids[:, None] if target_ids.ndim == 2 else target_ids).expand(-1, len(self.config.modalities), -1)

    def _parts(self, predictions: Tensor) -> tuple[Tensor, ...]:
        """Predictions `[B, Nm, P]` of all modalities → those of each."""
        pixels = math.prod(self.config.patch_height_width)
        return predictions.split([pixels * count for count in self.config.modality_channels.values()], dim=-1)

    def _modality(self, patches: Tensor | None, name: str) -> Tensor | None:
        """Patches `[B, N, P]` → those of one modality. None stays None."""
        if patches is None:
            return None
        pixels = patches.unflatten(-1, (-1, self.config.num_channels))
        return pixels[..., self.config.channels_of_modalities[name]].flatten(-2)

    @torch.no_grad()
    def reconstruct(
        self, pixel_values: Tensor, valid_pixels: Tensor | None = None, **masks: Any
    ) -> tuple[Tensor, Tensor]:
        """As `PixelTargets.reconstruct`, of all modalities. The mask is `[B, C, H, W]` for several modalities."""
        output = self(pixel_values, valid_pixels=valid_pixels, **masks)
        patches, grid = self.encoder.cut(pixel_values)
        valid, size = self.valid_values(valid_pixels), self.config.patch_height_width
        places = self._of_each_modality(output.target_ids)
        images, hidden, parts = [], [], (self._parts(output.predictions), places.unbind(dim=1))
        for name, predicted, ids in zip(self.config.modality_channels, *parts, strict=True):
            about = predicted, self._modality(valid, name), self.config.norm_pix_loss
            images.append(unpatchify(fill_patches(self._modality(patches, name), ids, *about), size, grid))
            hidden.append(masked_pixels(ids, size, grid).expand_as(images[-1]))
        return torch.cat(images, dim=1), torch.cat(hidden, dim=1) if len(hidden) > 1 else hidden[0][:, :1]


class InteractiveMIMForImageClassification(ClassificationHead, InteractiveMIMPreTrainedModel):
    """The encoder of Interactive MIM and a linear classifier."""

    encoder_class = InteractiveMIMModel


class InteractiveMIMBackbone(BackboneHead, InteractiveMIMPreTrainedModel):
    """The encoder of Interactive MIM as feature maps, for detection and segmentation."""

    encoder_class = InteractiveMIMModel
