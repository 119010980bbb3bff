"""Configuration of MAE (He et al., CVPR 2022, arXiv 2111.06377)."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .configuration_vit import (
    MIMConfig,
    check_at_least_1,
    check_decoder,
    check_norm_pix_loss,
    fill_decoder_sizes,
    num_visible,
)


@strict
class MAEConfig(MIMConfig):
    """A ViT encoder on the visible patches, and a light decoder that reconstructs the masked ones.

    Args:
        mask_ratio: share of the patches that is masked; `int(N · (1 - mask_ratio))` stay visible.
        mask_unit: side, in patches, of the squares that are masked or visible as a whole (Pixio, arXiv 2512.15715);
            `mask_ratio` is the share of the squares that is masked. 1: each patch by itself.
        norm_pix_loss: reconstruct each patch standardised by its own mean and variance (Table 1d of the paper).
        decoder_attention: "self": the decoder is a transformer of visible and masked tokens, as in the paper; "cross":
            masked tokens attend to the encoder's tokens alone (CrossMAE, arXiv 2401.14391), so that each patch is
            predicted by itself.
        decoder_targets: share of the masked patches that a training step predicts; they are drawn at random. It can be
            below 1 only with decoder_attention "cross". In evaluation mode all are predicted.
        decoder_hidden_size: 512 in the paper; by default 512, or 2/3 of the encoder's width where that is less.
        decoder_num_hidden_layers: 8 in the paper.
        decoder_num_attention_heads: one for every 32 of the decoder's width by default, as in the paper.

    The rest is in `MIMConfig`.
    """

    model_type = "mim_mae"

    mask_ratio: float | int = 0.75
    mask_unit: int = 1
    norm_pix_loss: bool = True
    decoder_attention: Literal["self", "cross"] = "self"
    decoder_targets: float | int = 1.0
    decoder_hidden_size: int | None = None
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        fill_decoder_sizes(self)
        self.check_fields()

    def check_fields(self) -> None:
        super().check_fields()
        check_decoder(self)
        check_at_least_1(self, "mask_unit")
        self.num_visible(self.grid_size)
        if not 0 < self.decoder_targets <= 1:
            raise ValueError(f"decoder_targets must be above 0 and at most 1, got {self.decoder_targets}")
        if self.decoder_targets < 1 and self.decoder_attention == "self":
            raise ValueError(
                f"decoder_targets must be 1 with decoder_attention 'self', not {self.decoder_targets}: masked tokens "
                "attend to each other there; decoder_attention 'cross' takes a share"
            )
        check_norm_pix_loss(self)

    def num_visible(self, grid: tuple[int, int]) -> int:
        """How many patches of a grid stay visible. Raises ValueError if that is none or all, or if the grid cannot be
        divided into units."""
        units, of = self.units(grid), "patches" if self.mask_unit == 1 else "units"
        return num_visible(self.mask_ratio, units, rounding=int, of=of) * self.mask_unit**2

    def units(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of units in a grid of patches. Raises ValueError for one that cannot be divided."""
        if self.mask_unit > 1 and set(grid) == {self.mask_unit}:
            raise ValueError(
                f"mask_unit must be below {grid[0]}, so that a grid of {grid[0]}×{grid[1]} patches has two units at "
                f"least, not {self.mask_unit}"
            )
        if any(side % self.mask_unit for side in grid):
            raise ValueError(
                f"mask_unit must divide the sides of the grid of {grid[0]}×{grid[1]} patches, not {self.mask_unit}"
            )
        return grid[0] // self.mask_unit, grid[1] // self.mask_unit
