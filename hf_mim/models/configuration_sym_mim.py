"""Configuration of SymMIM (Nguyen and Park, ICPR 2024, arXiv 2408.12772)."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .configuration_vit import (
    MIMConfig,
    check_at_least_1,
    check_decoder,
    check_norm_pix_loss,
    fill_decoder_sizes,
)
from .target_encoder import check_target


@strict
class SymMIMConfig(MIMConfig):
    """A ViT encoder on one half of a checkerboard, a light decoder that reconstructs the other half, and a contrast
    with the moving average of the encoder, which sees one half of a coarser checkerboard.

    No code of the paper was released. What it leaves open is decided here: see `SymMIMForPreTraining`.

    Args:
        mask_cell: side, in patches, of the cells of the target encoder's checkerboard (32 / 16 = 2 in the paper).
        mask_phase: "random" draws for each image, and for each of its two checkerboards, which half is visible; with
            "fixed" one half of the places is never predicted (an ablation).
        mask_pattern: "checkerboard", or "random" halves (an ablation).
        masks_per_image: masks of each image that a training step predicts for one pass of the target encoder. There are
            1 or 2 checkerboards, and the second shows the other half. In evaluation mode it is one.
        norm_pix_loss: reconstruct each patch standardised by its own mean and variance.
        contrast_weight: the weight of the contrast beside the reconstruction; 0: no target encoder, which is MAE on
            checkerboards.
        temperature: divides the logits of the contrast (.2 in MoCo v3).
        projector_hidden_size: width of the hidden layers of projector and predictor; by default 4096 at ViT-Base and in
            proportion elsewhere.
        projector_size: width of what is compared (256 in MoCo v3).
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads: as in `MAEConfig`.
        momentum_start, momentum_end, momentum_schedule: momentum of the EMA target, and how it changes over the run.

    The rest is in `MIMConfig`.
    """

    model_type = "sym_mim"

    mask_cell: int = 2
    mask_phase: Literal["random", "fixed"] = "random"
    mask_pattern: Literal["checkerboard", "random"] = "checkerboard"
    masks_per_image: int = 1
    norm_pix_loss: bool = True
    contrast_weight: float | int = 1.0
    temperature: float | int = 0.2
    projector_hidden_size: int | None = None
    projector_size: int = 256
    decoder_hidden_size: int | None = None
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int | None = None
    momentum_start: float | int = 0.99
    momentum_end: float | int = 1.0
    momentum_schedule: Literal["linear", "cosine"] = "cosine"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        fill_decoder_sizes(self)
        if self.projector_hidden_size is None:
            self.projector_hidden_size = 16 * self.hidden_size // 3
        self.check_fields()

    def check_fields(self) -> None:
        super().check_fields()
        check_decoder(self)
        check_norm_pix_loss(self)
        check_at_least_1(self, "mask_cell", "masks_per_image", "projector_hidden_size", "projector_size")
        self.check_grid(self.grid_size)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not self.contrast_weight >= 0:
            raise ValueError(f"contrast_weight must be 0 or more, got {self.contrast_weight}")
        if self.masks_per_image > 1 and not self.contrast_weight:
            raise ValueError(
                f"masks_per_image must be 1 with contrast_weight 0, not {self.masks_per_image}: there is no pass of a "
                "target encoder that several masks could share"
            )
        if self.masks_per_image > 2 and self.mask_pattern == "checkerboard":
            raise ValueError(
                f"masks_per_image must be 1 or 2 with mask_pattern 'checkerboard', which has two halves, not "
                f"{self.masks_per_image}"
            )
        check_target(self)

    def check_batch(self, images: int) -> None:
        if self.contrast_weight and images < 2:
            raise ValueError(
                f"per_device_train_batch_size must be 2 or more on a single process, not {images}: the contrast finds "
                "an image among others; contrast_weight 0 trains without it"
            )

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise ValueError for a grid of patches that cannot be divided into two halves by both checkerboards."""
        if max(grid) == 1:
            raise ValueError(
                "image_size must hold two patches at least, and there is one: lower patch_size or raise image_size"
            )
        if self.contrast_weight and self.mask_pattern == "checkerboard" and max(grid) <= self.mask_cell:
            raise ValueError(
                f"mask_cell must be below {max(grid)}, so that {grid[0]}×{grid[1]} patches have two cells at least, "
                f"not {self.mask_cell}"
            )
