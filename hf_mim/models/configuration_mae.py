"""Configuration of MAE (He et al., CVPR 2022, arXiv 2111.06377)."""

from huggingface_hub.dataclasses import strict

from .configuration_vit import MIMConfig, check_decoder, check_norm_pix_loss, fill_decoder_sizes, num_visible


@strict
class MAEConfig(MIMConfig):
    """A ViT encoder on the visible patches, and a light decoder that reconstructs the masked ones.

    Args:
        mask_ratio: share of the patches that is masked; `int(N · (1 - mask_ratio))` stay visible.
        norm_pix_loss: reconstruct each patch standardised by its own mean and variance (Table 1d of the paper).
        decoder_hidden_size: 512 in the paper; by default 512, or 2/3 of the encoder's width where that is less.
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
        check_norm_pix_loss(self)

    def num_visible(self, grid: tuple[int, int]) -> int:
        """How many patches of a grid stay visible. Raises ValueError if that is none or all."""
        return num_visible(self.mask_ratio, grid, rounding=int)
