"""Configuration that the methods share: what makes a ViT encoder."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

# width, depth, heads, MLP width
SIZES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
}


def pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """An int or `(height, width)` as `(height, width)`."""
    return (size, size) if isinstance(size, int) else cast(tuple[int, int], tuple(size))


def check_at_least_1(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")


def check_width(config: "MIMConfig", width_name: str, heads_name: str) -> None:
    """Raise ValueError unless a transformer of this width can have these heads and sine-cosine positions."""
    width, heads = getattr(config, width_name), getattr(config, heads_name)
    if min(heads, width) < 1 or width % heads or width % 4:
        raise ValueError(
            f"{width_name} must be divisible by {heads_name} and by 4 (for the position table), "
            f"got {width_name}={width} with {heads_name}={heads}"
        )


def fill_decoder_sizes(config: "MIMConfig") -> None:
    """Fill in what is unset: the paper's width of 512 with 16 heads from ViT-Base on, in proportion below."""
    if config.decoder_hidden_size is None:
        config.decoder_hidden_size = min(512, max(32, config.hidden_size * 2 // 3 // 32 * 32))
    if config.decoder_num_attention_heads is None:
        config.decoder_num_attention_heads = max(1, config.decoder_hidden_size // 32)


def check_decoder(config: "MIMConfig") -> None:
    """Raise ValueError for decoder sizes that do not fit."""
    check_width(config, "decoder_hidden_size", "decoder_num_attention_heads")
    check_at_least_1(config, "decoder_num_hidden_layers")


def check_norm_pix_loss(config: "MIMConfig") -> None:
    """Raise ValueError if pixels are to be standardised within patches that have no variance."""
    if config.norm_pix_loss and config.num_channels * math.prod(config.patch_height_width) < 2:
        raise ValueError("norm_pix_loss must be False for patches of a single value, which have no variance")


def num_visible(
    mask_ratio: float, grid: tuple[int, int], rounding: Callable, least_masked: int = 1, of: str = "patches"
) -> int:
    """How many patches of a grid stay visible. Raises ValueError for a ratio that keeps nothing or everything; it calls
    the patches `of`."""
    num_patches = grid[0] * grid[1]
    visible = rounding(num_patches * (1 - mask_ratio)) if 0 <= mask_ratio <= 1 else 0
    if not 1 <= visible <= num_patches - least_masked:
        raise ValueError(
            f"mask_ratio must leave between 1 and {num_patches - least_masked} of the {num_patches} {of} visible, "
            f"got {mask_ratio}, which leaves {visible}"
        )
    return visible


@strict
class MIMConfig(BackboneConfigMixin, PreTrainedConfig):
    """What the encoders of all methods have in common.

    Args:
        size: sets width, depth, heads and MLP width; the field of each overrides it.
        image_size: side in pixels, or (height, width), of the images that the encoder sees at evaluation.
        patch_size: side in pixels, or (height, width), of a patch.
        intermediate_size: MLP width; by default that of `size`, or 4 × `hidden_size` where that is given.
        drop_path_rate: stochastic depth of the last layer; it grows linearly from 0 at the first; only in train mode.
        use_cls_token: a learned CLS token goes before the patch tokens.
        num_register_tokens: learned tokens that stand after the CLS token, take part in attention and are not read
            (Darcet et al., ICLR 2024, arXiv 2309.16588). They have no position.
        pooling: what `pooler_output` and the classifier read: the mean of the patch tokens, or the CLS token.
        pool_before_norm: pool first and apply the final norm to the pooled vector (MAE's fine-tuning); else pool the
            normalised tokens.
        head_batch_norm: the classifier standardises its input by a BatchNorm without scale and shift (MAE's linear
            probe).

    Raises:
        ValueError: sizes that do not divide, or a value outside its range; in one line that names the field.
        StrictDataclassFieldValidationError: a value of the wrong type.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["metrics"]  # they are of a batch, and Trainer joins batches
    initialization: ClassVar[str] = "xavier"
    mask_token_std: ClassVar[float] = 0.02
    rescaled_positions: ClassVar[bool] = False

    size: Literal["tiny", "small", "base", "large", "huge", "giant"] = "base"
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    layer_norm_eps: float | int = 1e-6
    hidden_act: str = "gelu"
    drop_path_rate: float | int = 0.0
    use_cls_token: bool = True
    num_register_tokens: int = 0
    pooling: Literal["mean", "cls"] = "mean"
    pool_before_norm: bool = False
    head_batch_norm: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        width, depth, heads, mlp = SIZES.get(self.size, SIZES["base"])  # a wrong size fails at its type check later
        if self.intermediate_size is None:
            self.intermediate_size = mlp if self.hidden_size in (None, width) else 4 * self.hidden_size
        self.hidden_size = width if self.hidden_size is None else self.hidden_size
        self.num_hidden_layers = depth if self.num_hidden_layers is None else self.num_hidden_layers
        self.num_attention_heads = heads if self.num_attention_heads is None else self.num_attention_heads
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    def check_fields(self) -> None:
        """Raise ValueError for values that do not fit. Each method extends it and calls it when all fields are filled.

        The `validate_` hooks of `@strict` are not used, because they wrap the error into one of two lines.
        """
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if len(pair(value)) != 2 or min(pair(value)) < 1:
                raise ValueError(f"{name} must be a positive int or (height, width), got {value}")
        for side, patch in zip(self.image_height_width, self.patch_height_width, strict=True):
            if side % patch:
                raise ValueError(
                    f"image_size must be divisible by patch_size, got image_size={self.image_size} with "
                    f"patch_size={self.patch_size}; {max(side // patch, 1) * patch} would be right for {side}"
                )
        check_at_least_1(self, "num_channels", "num_hidden_layers", "intermediate_size")
        check_width(self, "hidden_size", "num_attention_heads")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}")
        if not 0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"layer_norm_eps must be above 0 and finite, got {self.layer_norm_eps}")
        if self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens must be 0 or more, not {self.num_register_tokens}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}")
        if self.pooling == "cls" and not self.use_cls_token:
            raise ValueError("pooling='cls' needs use_cls_token=True; without a CLS token use pooling='mean'")

    def check_batch(self, images: int) -> None:
        """Raise ValueError if the method learns nothing from so many images, which are all that go through at once."""

    @property
    def image_height_width(self) -> tuple[int, int]:
        return pair(self.image_size)

    @property
    def patch_height_width(self) -> tuple[int, int]:
        return pair(self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        (height, width), (patch_height, patch_width) = self.image_height_width, self.patch_height_width
        return height // patch_height, width // patch_width

    @property
    def training_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the pretraining model takes."""
        return self.image_height_width

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens stand before those of the patches: CLS and registers."""
        return int(self.use_cls_token) + self.num_register_tokens

    @property
    def learned_positions(self) -> bool:
        return False
