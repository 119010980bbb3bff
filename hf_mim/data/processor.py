"""The image processor of a checkpoint: make ours, and read what another checkpoint's says about its input."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import BaseImageProcessor
from transformers.utils import cached_file

from hf_mim.files import one_line, quiet

FILES = ("preprocessor_config.json", "processor_config.json")


def image_processor(image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]):
    """A `ViTImageProcessor` that resizes the whole image to (height, width) and normalises it, for the encoder.

    For 3 channels it takes pictures of any mode, for 1 channel grey ones. PIL resizes images of up to 4 channels. With
    more channels, arrays must already have the right size, and `input_data_format` must be given.
    """
    with quiet():  # importing it warns that torchvision is missing; it then works with PIL
        from transformers import ViTImageProcessor

        return ViTImageProcessor(
            size={"height": image_size[0], "width": image_size[1]},
            resample=3,  # bicubic
            do_resize=len(mean) <= 4,
            do_convert_rgb=len(mean) == 3,
            image_mean=list(mean),
            image_std=list(std),
        )


@dataclass
class InputSpec:
    """Mean and std of each channel for pixels in [0, 1], and the (height, width) if the processor has one."""

    mean: list[float]
    std: list[float]
    size: tuple[int, int] | None


def read_processor(checkpoint: str | Path, num_channels: int) -> InputSpec | None:
    """The settings of the image processor in a folder or under a Hub name; None if there is none.

    Raises:
        ValueError: it is damaged, has something else than numbers, or another number of channels.
    """
    checkpoint = str(checkpoint)
    if not any(cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False) for name in FILES):
        return None
    try:
        settings = BaseImageProcessor.get_image_processor_dict(checkpoint)[0]
    except OSError as error:
        raise ValueError(f"the image processor of {checkpoint} cannot be read: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"the image processor of {checkpoint} must be a mapping, not {settings!r}")
    if not settings.get("do_normalize", True):
        settings = settings | {"image_mean": 0.0, "image_std": 1.0}
    mean, std = settings.get("image_mean"), settings.get("image_std")
    mean, std = (
        value if isinstance(value, list | tuple) else [value] * num_channels
        for value in (0.0 if mean is None else mean, 1.0 if std is None else std)
    )
    # The processor first multiplies pixels by `rescale_factor`, usually 1 / 255; mean and std are for its result.
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    for name, values, low in (("image_mean", mean, -math.inf), ("image_std", std, 0), ("rescale_factor", [factor], 0)):
        if not all(isinstance(value, int | float) and low < value < math.inf for value in values):
            what = "finite numbers above 0" if low == 0 else "finite numbers"
            raise ValueError(f"the image processor of {checkpoint} must have {what} as {name}, not {values}")
    if len(mean) != num_channels or len(std) != num_channels:
        raise ValueError(f"the image processor of {checkpoint} has {len(mean)} channels, its encoder {num_channels}")
    return InputSpec([x / (255 * factor) for x in mean], [x / (255 * factor) for x in std], _size(settings, checkpoint))


def _size(settings: dict, checkpoint: str) -> tuple[int, int] | None:
    size = (settings.get("do_center_crop") and settings.get("crop_size")) or settings.get("size")
    if isinstance(size, dict) and "shortest_edge" in size:
        size = size["shortest_edge"]
    elif isinstance(size, dict):
        size = (size.get("height"), size.get("width")) if "height" in size else None
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"the image processor of {checkpoint} must have whole numbers above 0 as size, not {size!r}")
    return pair
