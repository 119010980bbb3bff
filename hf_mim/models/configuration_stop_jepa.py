"""Configuration of StoP-JEPA (Bar et al., ICML 2024, arXiv 2308.00566) and of I-JEPA, its case without noise."""

import math
from dataclasses import fields
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .configuration_vit import MIMConfig, check_width
from .masking import BlockMasks
from .target_encoder import check_momentum


@strict
class StopJepaConfig(MIMConfig):
    """A ViT on a context block, a predictor of the target encoder's tokens, masked tokens at stochastic positions.

    Args:
        position_noise_std: standard deviation σ of the positional noise, drawn in the encoder's width; 0 is I-JEPA.
        noise_on: which tokens have it; of the three, "target" is the paper's best.
        tie_noise_projection: noise goes through the predictor's input projection, as it must: trained apart, the
            projection shrinks to zero and the noise with it.
        use_mask_token: masked tokens carry a learned token: I-JEPA's token, and m̃ of StoP's paper. StoP's released
            code has none; the projection's bias stands in for it there.
        position_embedding: "sincos" tables, or "learned" ones.
        num_targets, target_scale, target_aspect_ratio, context_scale: multi-block masks (I-JEPA, section 3).
        mask_trim: contexts are cut to the batch's smallest at "random", or by "raster" order as released.
        block_range: block corners over the whole grid ("inclusive"), or never in the last row and column
            ("exclusive"), as released.
        num_candidates: masks drawn for each image, of which the one with the largest context is kept.
        predictor_hidden_size: 384 in the paper; half the encoder's width by default where that is less.
        predictor_num_hidden_layers: by default 6 up to ViT-Base, 12 above (I-JEPA, appendix A).
        predictor_num_attention_heads: as the encoder by default.
        momentum_start, momentum_end, momentum_schedule: of the EMA target.

    The rest is in `MIMConfig`; there is no CLS token.
    """

    model_type = "stop_jepa"
    initialization: ClassVar[str] = "trunc_normal"

    use_cls_token: bool = False
    position_noise_std: float | int = 0.25
    noise_on: Literal["target", "context", "both"] = "target"
    tie_noise_projection: bool = True
    use_mask_token: bool = True
    position_embedding: Literal["sincos", "learned"] = "sincos"
    num_targets: int = BlockMasks.num_targets
    target_scale: list[float | int] | tuple[float | int, float | int] = BlockMasks.target_scale
    target_aspect_ratio: list[float | int] | tuple[float | int, float | int] = BlockMasks.target_aspect_ratio
    context_scale: list[float | int] | tuple[float | int, float | int] = BlockMasks.context_scale
    mask_trim: Literal["random", "raster"] = BlockMasks.mask_trim
    block_range: Literal["inclusive", "exclusive"] = BlockMasks.block_range
    num_candidates: int = BlockMasks.num_candidates
    predictor_hidden_size: int | None = None
    predictor_num_hidden_layers: int | None = None
    predictor_num_attention_heads: int | None = None
    momentum_start: float | int = 0.996
    momentum_end: float | int = 1.0
    momentum_schedule: Literal["linear", "cosine"] = "linear"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.predictor_num_hidden_layers is None:
            self.predictor_num_hidden_layers = 6 if self.num_hidden_layers <= 12 else 12
        if self.predictor_num_attention_heads is None:
            self.predictor_num_attention_heads = self.num_attention_heads
        if self.predictor_hidden_size is None:
            step = math.lcm(4, max(1, self.predictor_num_attention_heads))
            self.predictor_hidden_size = max(step, min(384, self.hidden_size // 2) // step * step)
        self.check_fields()

    def check_fields(self):
        super().check_fields()
        check_width(
            "predictor_hidden_size",
            self.predictor_hidden_size,
            "predictor_num_attention_heads",
            self.predictor_num_attention_heads,
        )
        if self.predictor_num_hidden_layers < 1:
            raise ValueError(f"predictor_num_hidden_layers must be at least 1, got {self.predictor_num_hidden_layers}")
        if not self.position_noise_std >= 0:
            raise ValueError(f"position_noise_std must be 0 or more, got {self.position_noise_std}")
        if self.use_cls_token:
            raise ValueError("use_cls_token must be False: I-JEPA and StoP have no CLS token")
        check_momentum(self)
        self.masking.check(self.grid_size)

    @property
    def masking(self) -> BlockMasks:
        """What `sample_multi_block` draws."""
        return BlockMasks(**{field.name: getattr(self, field.name) for field in fields(BlockMasks)})

    @property
    def learned_positions(self) -> bool:
        return self.position_embedding == "learned"
