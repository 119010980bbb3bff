"""What a checkpoint's image processor says of its encoder's input."""

from dataclasses import dataclass
from pathlib import Path

from transformers import BaseImageProcessor
from transformers.utils import cached_file

FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass
class InputSpec:
    """Mean and std of each channel for pixels in [0, 1], and the (height, width) where it is told."""

    mean: list[float]
    std: list[float]
    size: tuple[int, int] | None


def read_processor(checkpoint: str | Path, num_channels: int) -> InputSpec | None:
    """As the image processor that came with a folder or Hub name has them; None where none did.

    Raises:
        ValueError: it is damaged, or of another number of channels.
    """
    checkpoint = str(checkpoint)
    if not any(cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False) for name in FILES):
        return None
    try:
        settings = BaseImageProcessor.get_image_processor_dict(checkpoint)[0]
    except OSError as error:
        raise ValueError(
            f"the image processor of {checkpoint} cannot be read: {' '.join(str(error).split())}"
        ) from error
    mean, std = (
        value if isinstance(value, list | tuple) else [value] * num_channels
        for value in (settings.get("image_mean") or 0.0, settings.get("image_std") or 1.0)
    )
    if not settings.get("do_normalize", True):
        mean, std = [0.0] * num_channels, [1.0] * num_channels
    if len(mean) != num_channels or len(std) != num_channels:
        raise ValueError(f"the image processor of {checkpoint} has {len(mean)} channels, its encoder {num_channels}")
    # Pixels are multiplied by `rescale_factor` first; 1 / 255 is the usual one, and makes this 1.
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
    return InputSpec([x / scale for x in mean], [x / scale for x in std], _size(settings))


def _size(settings: dict) -> tuple[int, int] | None:
    size = (settings.get("do_center_crop") and settings.get("crop_size")) or settings.get("size")
    if isinstance(size, int):
        return size, size
    if not size:
        return None
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return (size["height"], size["width"]) if "height" in size else None
