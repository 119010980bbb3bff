"""Configuration of Latent MIM (Wei, Gupta, Morgado, ECCV 2024, arXiv 2407.15837)."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .configuration_vit import MIMConfig, check_at_least_1, check_decoder, fill_decoder_sizes, num_visible
from .target_encoder import check_target


@strict
class LatentMIMConfig(MIMConfig):
    """A ViT encoder on few visible patches, and a cross-attention decoder that predicts the latents of the others.

    Args:
        mask_ratio: share of the patches that is masked; `round(N · (1 - mask_ratio))` stay visible (20 of 196).
        patch_gap: pixels between neighbouring patches in training. The image is divided into cells of patch + gap, and
            from each cell one patch is cut at a random offset. So training images have `grid · (patch + gap)` pixels a
            side (`training_size`).
        loss_type: "patch_discrimination" (InfoNCE among the patches of an image) or "norm_l2" (regression on
            layer-normalised targets).
        temperature: divides the logits of the patch discrimination.
        similarity_weight: λ, the weight of the similarity term. The term squares means over the batch, so each rank
            computes its own.
        similarity_start, similarity_end: the mean pairwise cosine that the similarity term pulls to, at the start and
            the end of training; between them it follows a cosine.
        projector_hidden_size: width of the hidden layers of the head on both encoders; by default 4096 at ViT-Base and
            in proportion elsewhere.
        projector_num_layers: Linears of this head.
        mask_target: the target encoder sees only the masked patches, as in the paper; if not, it sees all of them.
        decoder_num_hidden_layers: 3 in the paper. Decoder width and heads as in `MAEConfig`.
        momentum_start, momentum_end, momentum_schedule: momentum of the EMA target, and how it changes over the run.
        target_config: sizes of a frozen target encoder, which `--target_from` fills in; default: the target is the
            moving average of the encoder.

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
    projector_num_layers: int = 3
    mask_target: bool = True
    decoder_hidden_size: int | None = None
    decoder_num_hidden_layers: int = 3
    decoder_num_attention_heads: int | None = None
    momentum_start: float | int = 0.99
    momentum_end: float | int = 1.0
    momentum_schedule: Literal["linear", "cosine"] = "cosine"
    target_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        fill_decoder_sizes(self)
        if self.projector_hidden_size is None:
            self.projector_hidden_size = 16 * self.hidden_size // 3
        self.check_fields()

    def check_fields(self) -> None:
        super().check_fields()
        check_decoder(self)
        check_at_least_1(self, "projector_hidden_size", "projector_num_layers")
        self.num_visible(self.grid_size)
        if self.patch_gap < 0:
            raise ValueError(f"patch_gap must be 0 or more pixels, got {self.patch_gap}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not self.similarity_weight >= 0:
            raise ValueError(f"similarity_weight must be 0 or more, got {self.similarity_weight}")
        check_target(self)

    def num_visible(self, grid: tuple[int, int]) -> int:
        """How many patches of a grid stay visible. Raises ValueError unless at least 1 is visible and 2 are masked:
        predictions are standardised over the masked ones."""
        return num_visible(self.mask_ratio, grid, rounding=round, least_masked=2)

    @property
    def training_size(self) -> tuple[int, int]:
        """(height, width) in pixels of training images: a cell of patch + gap for each patch."""
        rows, columns = self.grid_size
        patch_height, patch_width = self.patch_height_width
        return rows * (patch_height + self.patch_gap), columns * (patch_width + self.patch_gap)
