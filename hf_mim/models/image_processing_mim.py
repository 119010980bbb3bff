"""The image processor that is saved with each checkpoint: for inference, exactly what evaluation does to an image."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .crops import CenterCrop, CenterWindow, WholeImage
from .pixels import ValueRange, crop_image, scale_and_shift, scale_pixels


class MIMImageProcessor(BaseImageProcessor):
    """Makes images a model's input: upright, cropped, resized, scaled from their value range, normalised.

    `processor(images, return_tensors="pt")["pixel_values"]` is float32 `[B, C, height, width]`. An image is a PIL image
    of any mode, or an array or tensor of any numeric type, `[h, w]`, `[h, w, C]` or `[C, h, w]`; see `pixels.py`.

    Args:
        size: {"height": ..., "width": ...} in pixels.
        image_mean, image_std: of each channel, for pixels scaled to [0, 1].
        crop_fraction: of the image's shorter side (by the size's aspect) in the central crop; None: the whole image,
            stretched.
        crop_pixels: [height, width] in pixels of the image: the central window that is taken, instead of a fraction.
        value_range: [low, high], or such a pair for each channel: the values that become 0 and 1; values beyond are
            clipped. None: the whole range of the image's type, 0..255 or 0..65535, and 0..1 for floats.
        pixel_type: the type that images must have, "uint16"; None: any.
        nodata: the value of pixels without data in the image's own depth, a number or "nan"; those that are not finite
            then have none either. They become 0, the mean of their channel. None: all pixels have data.

    Raises:
        ImageFormatError: a ValueError: an image of other channels, another type, or values without a known range.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: dict[str, int],
        image_mean: Sequence[float],
        image_std: Sequence[float],
        crop_fraction: float | None = None,
        crop_pixels: Sequence[int] | None = None,
        value_range: Sequence[float] | None = None,
        pixel_type: str | None = None,
        nodata: float | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size, self.crop_fraction = dict(size), crop_fraction
        self.crop_pixels = None if crop_pixels is None else list(crop_pixels)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.value_range, self.pixel_type = None if value_range is None else list(value_range), pixel_type
        self.nodata = "nan" if nodata is not None and float(nodata) != float(nodata) else nodata  # JSON has no NaN
        if nodata is not None and value_range is None:
            raise ValueError(f"value_range must be given with nodata {nodata}; it is 0,255 for 8-bit images")

    def preprocess(
        self, images: int, return_tensors: str | None = None, input_data_format: str | None = None
    ) -> BatchFeature:
        """One image or a list of them → `pixel_values`.

        input_data_format: "channels_first" or "channels_last", where the shape of an array does not tell.
        """
        if input_data_format not in (None, "channels_first", "channels_last"):
            raise ValueError(f"input_data_format must be channels_first or channels_last, not {input_data_format!r}")
        images = images if isinstance(images, list | tuple) else [images]
        images = [image if isinstance(image, Image.Image) else np.asarray(image) for image in images]
        if input_data_format == "channels_first":
            images = [np.moveaxis(image, 0, -1) if isinstance(image, np.ndarray) else image for image in images]
        pixels = torch.stack([self._pixels(image, input_data_format is not None) for image in images])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def crop(self) -> CenterCrop | CenterWindow | WholeImage:
        """Which part of an image is taken."""
        if self.crop_pixels is not None:
            return CenterWindow(cast(tuple[int, int], tuple(self.crop_pixels)))
        return WholeImage() if self.crop_fraction is None else CenterCrop(self.crop_fraction)

    def _pixels(self, image: Image.Image | np.ndarray, channels_last: bool) -> torch.Tensor:
        num_channels = len(self.image_mean)
        value_range = self.value_range
        if value_range is not None:
            nodata = None if self.nodata is None else float(self.nodata)
            value_range = ValueRange.from_list(value_range, num_channels, self.pixel_type, nodata)
        size = self.size["height"], self.size["width"]
        pixels = crop_image(image, self.crop(), size, num_channels, None, channels_last, value_range)
        factor, shift = scale_and_shift(self.image_mean, self.image_std)
        pixels = scale_pixels(pixels, value_range).float() * factor + shift
        return pixels if self.nodata is None else pixels.nan_to_num(nan=0.0)
