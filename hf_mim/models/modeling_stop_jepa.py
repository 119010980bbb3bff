"""StoP-JEPA: predicting masked tokens in stochastic locations (Bar et al., ICML 2024, arXiv 2308.00566).

Without noise it is I-JEPA: self-supervised learning from images with a joint-embedding predictive architecture
(Assran et al., CVPR 2023, arXiv 2301.08243).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import run_layers, vit_layers
from .configuration_stop_jepa import StopJepaConfig
from .flops import encoder_flops, linear_flops, trained_encoder_flops, vit_layers_flops
from .heads import BackboneHead, ClassificationHead
from .linear_layers import bias_of, input_dtype, product_without_bias
from .losses import smooth_l1
from .masking import gather, sample_multi_block
from .positions import PositionEmbeddings
from .recording import pretraining_forward
from .signals import error_over_constant, spread, target_signals
from .target_encoder import TargetNetworkMixin, target_encoder_config
from .vit import MIMPreTrainedModel, PretrainingOutput, ViTEncoder, are_ids_absent


@dataclass
class StopJepaOutput(PretrainingOutput):
    """Predictions and targets `[B, M, Nt, D]`; context_ids `[B, Nc]`, target_ids `[B, M, Nt]`; position_noise
    `[B, M, Nt, D]` and context_noise `[B, M, Nc, D]`, where there was any."""

    position_noise: torch.Tensor | None = None
    context_noise: torch.Tensor | None = None


class StopJepaPreTrainedModel(MIMPreTrainedModel):
    """The encoder that the papers evaluate, and that every head here starts from, is the *target*. If the target is
    frozen (`config.target_config`), it is another model's, and the encoder is the online one."""

    config_class = StopJepaConfig
    base_model_prefix = "target_encoder"
    _keys_to_ignore_on_load_unexpected = [r"^encoder\.", r"^predictor\."]

    def __init__(self, config: StopJepaConfig):
        super().__init__(config)
        if config.target_config is not None:
            self.base_model_prefix = "encoder"
            self._keys_to_ignore_on_load_unexpected = {r"^target_encoder\.", r"^predictor\."}  # type: ignore[assignment]  # as transformers makes it


class StopJepaModel(StopJepaPreTrainedModel, ViTEncoder):
    """The target encoder of I-JEPA or StoP-JEPA."""


class StopJepaPredictor(nn.Module):
    """Context features → the target encoder's tokens in each target block. Blocks do not see each other."""

    def __init__(self, config: StopJepaConfig):
        super().__init__()
        width = config.predictor_hidden_size
        self.config = config
        self.embed = nn.Linear(config.hidden_size, width)
        self.noise_embed = None
        if config.position_noise_std and not config.tie_noise_projection:
            self.noise_embed = nn.Linear(config.hidden_size, width, bias=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_mask_token else None
        self.position_embeddings = PositionEmbeddings(config, width)
        self.layers = vit_layers(
            config, width, config.predictor_num_hidden_layers, config.predictor_num_attention_heads
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, target_encoder_config(config).hidden_size)

    def project_noise(self, noise: torch.Tensor | None) -> torch.Tensor:
        """A·n: noise in the encoder's width through the projection of the context (tied), without its bias."""
        projection = self.embed if self.noise_embed is None else self.noise_embed
        return product_without_bias(projection, noise.to(input_dtype(projection)))

    def masked_tokens(self, positions: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """m_j = A·n_j + ψ_j + m̃ for positions ψ `[B, M, Nt, Dp]`; noise `[B, M, Nt, D]` or None."""
        tokens = positions
        if noise is not None:
            tokens = tokens + self.project_noise(noise)
        if self.mask_token is not None:
            return tokens + self.mask_token
        # StoP's released code has no m̃. It projects noise by a Linear with bias, and the bias takes the place of m̃.
        return tokens if noise is None else tokens + bias_of(self.embed, noise)

    def context_tokens(
        self, features: torch.Tensor, positions: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """c_i = A·(s_i + n_i) + ψ_i: `[B, Nc, D]` → `[B, 1 or M, Nc, Dp]`; noise `[B, M, Nc, D]` or None."""
        tokens = (self.embed(features) + positions)[:, None]
        return tokens if noise is None else tokens + self.project_noise(noise)

    def forward(
        self,
        features: torch.Tensor,
        grid: tuple[int, int],
        context_ids: torch.Tensor,
        target_ids: torch.Tensor,
        position_noise: torch.Tensor | None = None,
        context_noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Context features `[B, Nc, D]` → predictions `[B, M, Nt, D]`."""
        _, places = self.position_embeddings(grid, input_dtype(self.embed))
        blocks, length = target_ids.shape[1:]
        context = self.context_tokens(features, places[context_ids], context_noise).expand(-1, blocks, -1, -1)
        masked = self.masked_tokens(places[target_ids], position_noise)
        tokens = torch.cat([context, masked], dim=2).flatten(0, 1)
        predictions = self.head(self.norm(run_layers(self.layers, tokens, num_queries=length)))
        return predictions.unflatten(0, (-1, blocks))


class StopJepaForPreTraining(TargetNetworkMixin, StopJepaPreTrainedModel):
    """Encoder of the context, target encoder (EMA or frozen) of the whole image, predictor from one to the other."""

    _can_compile_fullgraph = False  # masks are drawn outside of the graph, because their length depends on the data

    def __init__(self, config: StopJepaConfig):
        super().__init__(config)
        self.encoder = StopJepaModel(config)
        is_frozen = config.target_config is not None
        self.target_encoder = ViTEncoder(target_encoder_config(config)) if is_frozen else StopJepaModel(config)
        self.predictor = StopJepaPredictor(config)
        self.post_init()

    def target_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.target_encoder, self.encoder)] if self.config.target_config is None else []

    def draw_noise(
        self, tokens: str, *shape: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> torch.Tensor | None:
        """σ·n `[*shape, D]` if these `tokens` ("context" or "target") have noise by the config; else None."""
        if not self.config.position_noise_std or self.config.noise_on not in (tokens, "both"):
            return None
        noise = torch.randn(*shape, self.config.hidden_size, device=device, dtype=dtype)
        return noise * self.config.position_noise_std

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
        position_noise: torch.Tensor | None = None,
        context_noise: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        masks_per_image: int = 1,
    ) -> dict[str, Any]:
        """Draw ids and noise of one pass over a grid of `(rows, columns)` patches. What is given stays as it is.

        Returns the arguments of `forward`: `context_ids [B, Nc]` and `target_ids [B, M, Nt]`, int64 on `device`. If the
        config asks for noise, also `position_noise [B, M, Nt, D]` and `context_noise [B, M, Nc, D]`, of `dtype` (or
        torch's default), multiplied by σ. With several masks per image, B is the number of masks, and those of the
        first image come first. Raises ValueError if only one kind of ids is given, or if the grid is too small for the
        target blocks.
        """
        if are_ids_absent(context_ids, target_ids):
            masking = self.config.masking
            context_ids, target_ids = sample_multi_block(batch_size * masks_per_image, grid, masking, device)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        if position_noise is None:
            position_noise = self.draw_noise("target", *target_ids.shape, **like)
        if context_noise is None:
            context_noise = self.draw_noise("context", *target_ids.shape[:2], context_ids.shape[1], **like)
        masks = {"context_ids": context_ids, "target_ids": target_ids}
        noise = {"position_noise": position_noise, "context_noise": context_noise}
        return masks | {name: value for name, value in noise.items() if value is not None}

    def step_flops(self, images: int, grid: tuple[int, int], masks: Mapping[str, torch.Tensor]) -> float:
        config, target = self.config, target_encoder_config(self.config)
        (rows, context), (blocks, length) = masks["context_ids"].shape, masks["target_ids"].shape[1:]
        width, depth = config.predictor_hidden_size, config.predictor_num_hidden_layers
        block = vit_layers_flops(depth, context + length, width, queries=length)
        block += linear_flops(length, width, target.hidden_size)
        predictor = linear_flops(context, config.hidden_size, width) + blocks * block
        noisy = sum(noise.shape[:3].numel() for name, noise in masks.items() if name.endswith("_noise"))
        noise = linear_flops(noisy, config.hidden_size, width)  # it has no gradient
        trained = rows * (trained_encoder_flops(config, context) + 3 * predictor) + 2 * noise
        return trained + images * encoder_flops(target, grid[0] * grid[1])

    @pretraining_forward
    def forward(
        self,
        pixel_values: torch.Tensor,
        context_ids: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        position_noise: torch.Tensor | None = None,
        context_noise: torch.Tensor | None = None,
        valid_pixels: torch.Tensor | None = None,
    ) -> StopJepaOutput:
        """Predict the target encoder's tokens in the target blocks.

        Args:
            pixel_values: normalised images `[B, C, H, W]`.
            context_ids, target_ids: `[B, Nc]` context and `[B, M, Nt]` target patches, raster indices; drawn if absent,
                in train mode `config.masks_per_image` for each image. With R masks per image, B stands for B·R here and
                in the output, and the masks of the first image come first.
            position_noise: `[B, M, Nt, D]` for the masked tokens, σ applied; drawn if absent and the config has it.
            context_noise: the same for the context tokens, `[B, M, Nc, D]`.
            valid_pixels: bool `[B, C, H, W]`, False for pixels without data, which are 0 in `pixel_values`. Patches
                without any data are no targets. Default: all have data.
        """
        patches, grid = self.encoder.cut(pixel_values)
        given: dict[str, Any] = {"context_ids": context_ids, "target_ids": target_ids}
        given |= {"position_noise": position_noise, "context_noise": context_noise}
        given |= self.training_masks() if self.training else {}
        masks = self.draw_masks(len(patches), grid, patches.device, dtype=pixel_values.dtype, **given)
        context_ids, target_ids = masks["context_ids"], masks["target_ids"]
        with torch.no_grad():
            tokens = self.target_encoder.encode(patches, grid)[:, self.target_encoder.config.num_prefix_tokens :]
            tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])
            targets = gather(tokens, target_ids.flatten(1)).unflatten(1, target_ids.shape[1:])
        features = self.encoder.encode(gather(patches, context_ids), grid, context_ids)
        features = features[:, self.config.num_prefix_tokens :]
        valid, valid_targets = None, None
        if valid_pixels is not None:
            valid = self.encoder.cut(valid_pixels)[0].any(dim=-1)  # [B, N]
            valid_targets = gather(valid, target_ids.flatten(1)).unflatten(1, target_ids.shape[1:])
        noise = masks.get("position_noise"), masks.get("context_noise")
        predictions = self.predictor(features, grid, context_ids, target_ids, *noise)
        return StopJepaOutput(
            loss=smooth_l1(predictions.float(), targets, valid_targets),
            predictions=predictions,
            targets=targets,
            metrics=target_signals(tokens, valid=valid)
            | {
                "error_over_constant": error_over_constant(predictions, targets, valid_targets),
                "feature_std": spread(features),
                "context_share": targets.new_full((), context_ids.shape[1] / patches.shape[1]),
            },
            **masks,
        )


class StopJepaForImageClassification(ClassificationHead, StopJepaPreTrainedModel):
    """The target encoder and a linear classifier."""

    encoder_class = StopJepaModel


class StopJepaBackbone(BackboneHead, StopJepaPreTrainedModel):
    """The target encoder as feature maps, for detection and segmentation."""

    encoder_class = StopJepaModel
