"""Configuration of Latent MIM (Wei, Gupta, Morgado, ECCV 2024, arXiv 2407.15837)."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .configuration_vit import MIMConfig, check_decoder, fill_decoder_sizes, num_visible
from .target_encoder import check_momentum


@strict
class LatentMIMConfig(MIMConfig):
    """A ViT encoder on few visible patches, a cross-attention decoder that predicts the latents of the others.

    Args:
        mask_ratio: share of the patches that is masked; `round(N · (1 - mask_ratio))` stay visible (20 of 196).
        patch_gap: pixels between neighbouring patches in training: from each cell of patch + gap, one patch is cut at a
            random offset. Training images have `grid · (patch + gap)` pixels a side (`training_size`).
        loss_type: "patch_discrimination" (InfoNCE among the patches of an image) or "norm_l2" (regression on
            layer-normalised targets).
        temperature: of the discrimination.
        similarity_weight: λ of the similarity term. It squares means over the batch, so each rank has its own.
        similarity_start, similarity_end: its target for the mean pairwise cosine, moved along a cosine.
        projector_hidden_size: width of the 3-layer head on both encoders; by default 4096 at ViT-Base and in
            proportion elsewhere.
        decoder_num_hidden_layers: 3 in the paper. Decoder width and heads as in `MAEConfig`.
        momentum_start, momentum_end, momentum_schedule: of the EMA target.

    The rest is in `MIMConfig`.
    """

    model_type = "latent_mim"
    mask_token_std: ClassVar[float] = 0.0
    rescaled_positions: ClassVar[bool] = True

    mask_ratio: float | int = 0.9
    patch_gap: int = 4
    loss_type: Literal["patch_discrimination", "norm_l2"] = "patch_discrimination"
    temperature: float | int = 0.2
    similarity_weight: float | int = 0.1
    similarity_start: float | int = 0.75
    similarity_end: float | int = 0.25
    projector_hidden_size: int | None = None
    decoder_hidden_size: int | None = None
    decoder_num_hidden_layers: int = 3
    decoder_num_attention_heads: int | None = None
    momentum_start: float | int = 0.99
    momentum_end: float | int = 1.0
    momentum_schedule: Literal["linear", "cosine"] = "cosine"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        fill_decoder_sizes(self)
        if self.projector_hidden_size is None:
            self.projector_hidden_size = 16 * self.hidden_size // 3
        self.check_fields()

    def check_fields(self):
        super().check_fields()
        check_decoder(self)
        if self.projector_hidden_size < 1:
            raise ValueError(f"projector_hidden_size must be at least 1, got {self.projector_hidden_size}")
        self.num_visible(self.grid_size)
        if self.patch_gap < 0:
            raise ValueError(f"patch_gap must be 0 or more pixels, got {self.patch_gap}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not self.similarity_weight >= 0:
            raise ValueError(f"similarity_weight must be 0 or more, got {self.similarity_weight}")
        check_momentum(self)

    def num_visible(self, grid: tuple[int, int]) -> int:
        """Patches that stay visible on a grid. Raises ValueError unless at least 1 does and 2 are masked: predictions
        are standardised over the masked ones."""
        return num_visible(self.mask_ratio, grid, rounding=round, least_masked=2)

    @property
    def training_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the pretraining model takes: a cell of patch + gap for each patch."""
        return tuple(
            count * (patch + self.patch_gap)
            for count, patch in zip(self.grid_size, self.patch_height_width, strict=True)
        )
