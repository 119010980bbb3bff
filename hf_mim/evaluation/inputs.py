"""What `forward` of an encoder needs so that it encodes images whole: the arguments differ from model to model."""

import contextlib
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_mim.models.configuration_vit import pair

IMAGES, CLIPS = "pixel_values", "pixel_values_videos"
# Under these names, models of images and text hold their image encoder.
IMAGE_HALVES = ("vision_model", "image_model", "vision_tower", "vision_encoder")
# Optional by the signature, but needed: sizes of images whose patches are packed into one sequence (MiniCPM).
PACKED = {"target_sizes"}
UNKNOWN_SIZE = (224, 224)  # what most convolutional networks are trained on, whose configs have no size


def image_model(model: nn.Module) -> nn.Module:
    """The encoder in a model: without a head, and without the text half of an image-text model."""
    base = getattr(model, "base_model", model)
    halves = [getattr(base, name, None) for name in IMAGE_HALVES]
    return next(filter(takes_images, (*halves, base)), model)


def takes_images(model) -> bool:
    """Whether the first argument of its `forward` is images or clips."""
    return isinstance(model, nn.Module) and next(iter(inspect.signature(model.forward).parameters)) in (IMAGES, CLIPS)


def reads_nodata(model: nn.Module) -> bool:
    """Whether a model's encoder takes `valid_pixels`, which tell where images have data."""
    return "valid_pixels" in inspect.signature(image_model(model).forward).parameters


def channels_of(config) -> int:
    """How many channels the images of a model have, by its config; 3 if it does not say."""
    names = ("num_channels", "in_chans", "in_channels")
    return next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), 3)


def native_size(config) -> tuple[int, int] | None:
    """(height, width) of the images that a model was made for, by its config; None if it does not say."""
    if config.model_type == "siglip2_vision_model":
        side = math.isqrt(config.num_patches) * config.patch_size
        return side, side
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    return None if size is None else pair(size)


def check_forward(model: nn.Module, name: str | None):
    """Raise ValueError if the model's `forward` does not take images, or needs more than images."""
    parameters = inspect.signature(model.forward).parameters
    about = f"checkpoint {name} holds {type(model).__name__}"
    if not takes_images(model) or not hasattr(model, "config"):
        raise ValueError(f"{about}, which is no vision encoder: its forward must take {IMAGES} first")
    needed = {key for key, value in parameters.items() if value.default is value.empty and "kwargs" not in key}
    unknown = needed - {IMAGES, CLIPS, "pixel_attention_mask", "spatial_shapes"}
    unknown |= PACKED & parameters.keys()
    if unknown:
        raise ValueError(f"{about}, whose forward needs {', '.join(sorted(unknown))}, which images do not tell")
    frames = getattr(model.config, "num_frames", None)
    if isinstance(frames, int) and frames > 1:
        raise ValueError(f"{about}, an encoder of videos of {frames} frames, and these are images")


def forward_arguments(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Normalised images `[B, C, H, W]` → the arguments with which `forward` encodes all patches in raster order.

    NaN is for pixels without data, of images for a model that `reads_nodata`.

    Raises:
        ValueError: the model's positions hold for one size only, and the images have another.
    """
    config, size = model.config, tuple(images.shape[2:])
    parameters = inspect.signature(model.forward).parameters
    if config.model_type == "siglip2_vision_model":
        return siglip2_arguments(images, config.patch_size)
    if CLIPS in parameters:  # V-JEPA 2: the shortest clip, which gives each patch one token
        if size != native_size(config):
            raise ValueError(f"its rotary positions hold for images of {config.crop_size}×{config.crop_size} only")
        return {CLIPS: images[:, None].expand(-1, config.tubelet_size, -1, -1, -1), "skip_predictor": True}
    arguments: dict[str, Any] = {IMAGES: images}
    if reads_nodata(model) and (missing := images.isnan()).any():
        arguments = {IMAGES: images.nan_to_num(nan=0.0), "valid_pixels": ~missing}
    if size != native_size(config) and "interpolate_pos_encoding" in parameters:
        arguments["interpolate_pos_encoding"] = True
    if config.model_type == "vit_mae":  # it sorts the patches by the noise, even if it masks none
        patches = math.prod(side // patch for side, patch in zip(size, pair(config.patch_size), strict=True))
        arguments["noise"] = torch.arange(patches, device=images.device).float().expand(len(images), -1)
    return arguments


def siglip2_arguments(images: Tensor, patch: int) -> dict[str, Tensor]:
    """SigLIP 2 with native aspect ratio takes patches, each flattened by row, column, channel, and their grid."""
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    patches = images.unflatten(3, (columns, patch)).unflatten(2, (rows, patch)).permute(0, 2, 4, 3, 5, 1)
    return {
        IMAGES: patches.flatten(3).flatten(1, 2),
        "pixel_attention_mask": images.new_ones(len(images), rows * columns, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[rows, columns]], device=images.device).expand(len(images), -1),
    }


@contextlib.contextmanager
def unmasked(model: nn.Module):
    """transformers' ViTMAE masks patches at inference too, unless its mask ratio is 0."""
    config = model.config
    if config.model_type != "vit_mae":
        yield
        return
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        yield
    finally:
        config.mask_ratio = ratio
