"""Configuration of MAE (He et al., CVPR 2022, arXiv 2111.06377)."""

import math
from collections.abc import Callable

from huggingface_hub.dataclasses import strict

from .configuration_vit import MIMConfig, check_width


@strict
class MAEConfig(MIMConfig):
    """A ViT encoder on the visible patches, a light decoder that reconstructs the masked ones.

    Args:
        mask_ratio: share of the patches that is masked; `int(N · (1 - mask_ratio))` stay visible.
        norm_pix_loss: reconstruct each patch standardised by its own mean and variance (Table 1d of the paper).
        decoder_hidden_size: 512 in the paper; for smaller encoders 2/3 of their width by default.
        decoder_num_hidden_layers: 8 in the paper.
        decoder_num_attention_heads: one for every 32 of the decoder's width by default, as in the paper.

    The rest is in `MIMConfig`.
    """

    model_type = "mim_mae"

    mask_ratio: float | int = 0.75
    norm_pix_loss: bool = True
    decoder_hidden_size: int | None = None
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        fill_decoder_sizes(self)
        self.check_fields()

    def check_fields(self):
        super().check_fields()
        check_decoder(self)
        self.num_visible(self.grid_size)
        if self.norm_pix_loss and self.num_channels * math.prod(self.patch_height_width) < 2:
            raise ValueError("norm_pix_loss must be False for patches of a single value, which have no variance")

    def num_visible(self, grid: tuple[int, int]) -> int:
        """Patches that stay visible on a grid. Raises ValueError if that is none or all."""
        return num_visible(self.mask_ratio, grid, rounding=int)


def fill_decoder_sizes(config):
    """Where unset: the paper's 512 × 16 heads at ViT-Base and above, in proportion below."""
    if config.decoder_hidden_size is None:
        config.decoder_hidden_size = min(512, max(32, config.hidden_size * 2 // 3 // 32 * 32))
    if config.decoder_num_attention_heads is None:
        config.decoder_num_attention_heads = max(1, config.decoder_hidden_size // 32)


def check_decoder(config):
    """Raise ValueError for decoder sizes that do not fit."""
    check_width(
        "decoder_hidden_size",
        config.decoder_hidden_size,
        "decoder_num_attention_heads",
        config.decoder_num_attention_heads,
    )
    if config.decoder_num_hidden_layers < 1:
        raise ValueError(f"decoder_num_hidden_layers must be at least 1, got {config.decoder_num_hidden_layers}")


def num_visible(mask_ratio: float, grid: tuple[int, int], rounding: Callable, least_masked: int = 1) -> int:
    """How many patches of a grid stay visible. Raises ValueError for a ratio that keeps nothing or everything."""
    num_patches = grid[0] * grid[1]
    visible = rounding(num_patches * (1 - mask_ratio)) if 0 <= mask_ratio <= 1 else 0
    if not 1 <= visible <= num_patches - least_masked:
        raise ValueError(
            f"mask_ratio must leave between 1 and {num_patches - least_masked} of the {num_patches} patches visible, "
            f"got {mask_ratio}, which leaves {visible}"
        )
    return visible
