"""Configuration of StoP-JEPA (Bar et al., ICML 2024, arXiv 2308.00566) and of I-JEPA, its case without noise."""

import math
from dataclasses import fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .configuration_vit import MIMConfig, check_at_least_1, check_width
from .masking import BlockMasks
from .target_encoder import check_target


@strict
class StopJepaConfig(MIMConfig):
    """A ViT on a context block, and a predictor of the target encoder's tokens, at positions with noise added.

    Args:
        position_noise_std: standard deviation σ of the positional noise, drawn in the encoder's width; 0 is I-JEPA.
        noise_on: which tokens get noise. "target" is the best of the three in the paper.
        tie_noise_projection: noise goes through the predictor's input projection. A projection of its own (False) would
            shrink to zero in training, and the noise with it.
        use_mask_token: masked tokens have a learned token added: that of I-JEPA, and m̃ of StoP's paper. StoP's released
            code has none; the bias of the projection takes its place there.
        position_embedding: "sincos" tables, or "learned" ones.
        num_targets, target_scale, target_aspect_ratio, context_scale: multi-block masks (I-JEPA, section 3).
        mask_trim: which patches are cut from a context that is longer than the smallest of the batch: "random" ones, or
            the last in "raster" order, as in the released code.
        block_range: blocks may reach the last row and column ("inclusive"), or never do ("exclusive"), as in the
            released code.
        num_candidates: masks drawn for each image, of which the one with the largest context is kept.
        masks_per_image: R masks of each image in training, predicted from one pass of the target encoder (data2vec 2.0,
            arXiv 2212.07525, section 3.2). In evaluation mode it is one. 4 masks gave 1.4 times the masks/s of 1 on a
            CPU, and 1.7 times with a `context_scale` of (0.4, 0.6).
        predictor_hidden_size: 384 in the paper; by default 384, or half the encoder's width where that is less.
        predictor_num_hidden_layers: by default 6 up to ViT-Base, 12 above (I-JEPA, appendix A).
        predictor_num_attention_heads: by default as many as the encoder has.
        momentum_start, momentum_end, momentum_schedule: momentum of the EMA target, and how it changes over the run.
        target_config: sizes of a frozen target encoder, which `--target_from` fills in; default: the target is the
            moving average of the encoder.

    The rest is in `MIMConfig`. There is no CLS token.
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
    masks_per_image: int = 1
    predictor_hidden_size: int | None = None
    predictor_num_hidden_layers: int | None = None
    predictor_num_attention_heads: int | None = None
    momentum_start: float | int = 0.996
    momentum_end: float | int = 1.0
    momentum_schedule: Literal["linear", "cosine"] = "linear"
    target_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.predictor_num_hidden_layers is None:
            self.predictor_num_hidden_layers = 6 if self.num_hidden_layers <= 12 else 12
        if self.predictor_num_attention_heads is None:
            self.predictor_num_attention_heads = self.num_attention_heads
        if self.predictor_hidden_size is None:
            step = math.lcm(4, max(1, self.predictor_num_attention_heads))
            self.predictor_hidden_size = max(step, min(384, self.hidden_size // 2) // step * step)
        self.check_fields()

    def check_fields(self) -> None:
        super().check_fields()
        check_width(self, "predictor_hidden_size", "predictor_num_attention_heads")
        check_at_least_1(self, "predictor_num_hidden_layers", "masks_per_image")
        if not self.position_noise_std >= 0:
            raise ValueError(f"position_noise_std must be 0 or more, got {self.position_noise_std}")
        if self.use_cls_token:
            raise ValueError("use_cls_token must be False: I-JEPA and StoP have no CLS token")
        check_target(self)
        self.masking.check(self.grid_size)
        self.masking.check_context(self.grid_size)

    @property
    def masking(self) -> BlockMasks:
        """What `sample_multi_block` draws."""
        return BlockMasks(**{field.name: getattr(self, field.name) for field in fields(BlockMasks)})

    @property
    def learned_positions(self) -> bool:
        return self.position_embedding == "learned"
