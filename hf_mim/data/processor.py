"""The image processor of a checkpoint: make ours, and read what another checkpoint's says about its input."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from transformers import BaseImageProcessor
from transformers.utils import cached_file

from hf_mim.files import one_line, quiet
from hf_mim.models.image_processing_mim import MIMImageProcessor
from hf_mim.models.pixels import ValueRange

logger = logging.getLogger(__name__)

FILES = ("preprocessor_config.json", "processor_config.json")


def image_processor(
    image_size: tuple[int, int], mean, std, value_range: ValueRange | None = None, crop_fraction=1.0, crop_pixels=None
):
    """A `MIMImageProcessor` that does to an image what evaluation does: see there."""
    return MIMImageProcessor(
        size={"height": image_size[0], "width": image_size[1]},
        image_mean=mean,
        image_std=std,
        crop_fraction=crop_fraction,
        crop_pixels=crop_pixels,
        value_range=None if value_range is None else value_range.as_list(),
        pixel_type=None if value_range is None else value_range.pixel_type,
        nodata=None if value_range is None else value_range.nodata,
    )


def transformers_processor(processor: MIMImageProcessor):
    """The image processor of transformers that does the same to 8-bit images, up to rounding.

    - The whole image: `ViTImageProcessor`.
    - The central crop, for a square size: `CLIPImageProcessor`. It resizes first and crops then, so that its crop may
      lie half a pixel aside where the image is no square.
    - The central crop, for another size: there is none, so a `ViTImageProcessor`, and a warning that it stretches.
    - A central window of native pixels: there is none, so the central crop, and a warning that it has another scale.

    Raises:
        ValueError: images of another depth, which those of transformers take for 8-bit ones.
    """
    if processor.nodata is not None:
        raise ValueError(
            f"to must be remote-code or onnx: image processors of transformers know no pixels without data, and those "
            f"of this checkpoint have nodata {processor.nodata}"
        )
    if processor.value_range is not None:
        raise ValueError(
            f"to must be remote-code: image processors of transformers take 8-bit images, and those of this checkpoint "
            f"have values in {processor.value_range}"
        )
    height, width = processor.size["height"], processor.size["width"]
    num_channels, fraction = len(processor.image_mean), processor.crop_fraction
    if processor.crop_pixels is not None:
        warn_of_scale(processor.crop_pixels)
        fraction = 1.0
    about = dict(image_mean=processor.image_mean, image_std=processor.image_std, resample=3)  # bicubic
    about |= dict(do_convert_rgb=num_channels == 3, do_resize=num_channels <= 4)  # PIL resizes no more channels
    with quiet():  # importing them warns that torchvision is missing; they then work with PIL
        from transformers import CLIPImageProcessor, ViTImageProcessor

        if fraction is not None and height == width:
            edge, crop = {"shortest_edge": round(height / fraction)}, {"height": height, "width": width}
            return CLIPImageProcessor(size=edge, crop_size=crop, **about)
        if fraction is not None:
            logger.warning("images whose sides are not as %s to %s are stretched, not cropped, there", height, width)
        return ViTImageProcessor(size=processor.size, **about)


def warn_of_scale(crop_pixels):
    """Say that another library's processor shrinks an image of which this checkpoint takes a window."""
    logger.warning(
        "the checkpoint takes windows of %s x %s pixels, and images are shrunk there: cut them", *crop_pixels
    )


@dataclass
class InputSpec:
    """Mean and std of each channel for pixels in [0, 1]; what else is known: (height, width), value range, crop.

    crop_pixels: (height, width) of the central window that belongs to `size`.
    """

    mean: list[float]
    std: list[float]
    size: tuple[int, int] | None
    value_range: ValueRange | None = None
    crop_fraction: float | None = None
    crop_pixels: tuple[int, int] | None = None


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
    value_range = settings.get("value_range")
    if value_range is not None:
        nodata = settings.get("nodata")
        if not (nodata in (None, "nan") or isinstance(nodata, int | float)):
            raise ValueError(f"the image processor of {checkpoint} must have a number or nan as nodata, not {nodata!r}")
        nodata = None if nodata is None else float(nodata)
        value_range = ValueRange.from_list(value_range, num_channels, settings.get("pixel_type"), nodata)
    mean, std = ([x / (255 * factor) for x in values] for values in (mean, std))
    window = settings.get("crop_pixels")
    size, window = _size(settings, checkpoint), None if window is None else _pair(window, checkpoint, "crop_pixels")
    return InputSpec(mean, std, size, value_range, settings.get("crop_fraction"), window)


def _size(settings: dict, checkpoint: str) -> tuple[int, int] | None:
    size = (settings.get("do_center_crop") and settings.get("crop_size")) or settings.get("size")
    if isinstance(size, dict) and "shortest_edge" in size:
        size = size["shortest_edge"]
    elif isinstance(size, dict):
        size = (size.get("height"), size.get("width")) if "height" in size else None
    if size is None:
        return None
    return _pair(size, checkpoint, "size")


def _pair(size, checkpoint: str, name: str) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"the image processor of {checkpoint} must have whole numbers above 0 as {name}, not {size!r}")
    return pair
