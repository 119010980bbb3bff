"""Crops, in the worker: where to crop (a box) and the crop itself, decoded and resized once."""

import math
import random
from dataclasses import dataclass

from torch import Tensor

from hf_mim.models.crops import Box, CenterCrop, CenterWindow, WholeImage, centred, fitting
from hf_mim.models.pixels import ValueRange, crop_image

from .decode import header_size, open_image

__all__ = [
    "CenterCrop",
    "CenterWindow",
    "NativeCrop",
    "RandomCrop",
    "WholeImage",
    "crop_rng",
    "image_size",
    "load_crop",
    "window_pixels",
]


def crop_rng(seed: int, epoch: int, key: int, rng: random.Random | None = None) -> random.Random:
    """The randomness of one image in one epoch. A resumed run, or one with other workers, draws the same.

    rng: this one is seeded again and returned, which takes less than half the time of making one.
    """
    words = f"{seed}/{epoch}/{key}"  # seeding by a string is the same in every process and version
    if rng is None:
        return random.Random(words)
    rng.seed(words)
    return rng


@dataclass(frozen=True)
class RandomCrop:
    """A random part of the image, for training: torchvision's `RandomResizedCrop`, to any target size.

    scale: range of the crop's share of the image's area.
    ratio: range of the crop's width / height *relative to the target's*, drawn log-uniformly: how far a crop may be
        stretched. For square targets this is torchvision's `ratio`.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    exact = False  # a JPEG may be decoded at a fraction of its size

    def __post_init__(self):
        for name in ("scale", "ratio"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
                raise ValueError(f"{name} must be two positive numbers, the smaller first, not {bounds!r}")
        if self.scale[1] > 1:
            raise ValueError(f"scale is a share of the image's area, at most 1, not {self.scale!r}")

    def box(self, width: int, height: int, size: tuple[int, int], rng: random.Random) -> Box:
        """A box for a target of `size` (h, w): ten tries, then the largest centred one within `ratio`."""
        aspect = size[1] / size[0]
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = aspect * math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
                return left, top, left + w, top + h
        nearest = min(max(width / height, aspect * self.ratio[0]), aspect * self.ratio[1])
        return centred(width, height, nearest)


@dataclass(frozen=True)
class NativeCrop:
    """A window of so many pixels at a random place, for training: objects keep the size that they have in the file.

    pixels: side, or (height, width). The window is resized only if the target has another size. An image that is
        smaller in a side gives the largest window of this aspect that it holds, which is then enlarged.
    """

    pixels: int | tuple[int, int]
    exact = True  # the pixels are those of the file, so a JPEG is decoded at full size

    def __post_init__(self):
        object.__setattr__(self, "pixels", window_pixels(self.pixels))

    def box(self, width: int, height: int, size: tuple[int, int], rng: random.Random) -> Box:
        w, h = fitting(self.pixels, width, height)
        left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
        return left, top, left + w, top + h

    def is_larger(self, width: int, height: int) -> bool:
        """Whether the image is smaller than the window in a side."""
        return height < self.pixels[0] or width < self.pixels[1]


def window_pixels(crop_pixels: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """A side, or height and width, as (height, width). Raises ValueError, in one line, for anything else."""
    pair = (crop_pixels, crop_pixels) if isinstance(crop_pixels, int) else tuple(crop_pixels)
    if len(pair) != 2 or min(pair) < 1:
        given = crop_pixels if isinstance(crop_pixels, int) else ",".join(map(str, pair))
        raise ValueError(f"crop_pixels must be a side, or height,width, of at least 1 pixel, not {given}")
    return pair


class _Probe:
    """Takes one pixel, and notes the size of the image."""

    exact = True

    def box(self, width: int, height: int, size: tuple[int, int], rng=None) -> Box:
        self.size = width, height
        return 0, 0, 1, 1


def image_size(value, num_channels: int, value_range: ValueRange | None = None) -> tuple[int, int]:
    """(width, height) of one value of an image column, upright. Where the header tells it, nothing is decoded.

    value_range: as of `load_crop`; images that lack a part need it."""
    if (size := header_size(value)) is not None:
        return size
    load_crop(value, probe := _Probe(), (1, 1), num_channels, None, value_range)
    return probe.size


def load_crop(
    value,
    crop,
    size: tuple[int, int],
    num_channels: int,
    rng: random.Random | None,
    value_range: ValueRange | None = None,
    keep_empty: bool = True,
) -> Tensor:
    """Decode one value of an image column, upright, and crop it: [num_channels, h, w], in its own depth.

    The arguments are those of `crop_image`; rng is for crops at random.
    """
    image = open_image(value, num_channels, pixel_type=value_range and value_range.pixel_type)
    return crop_image(image, crop, size, num_channels, rng, value_range=value_range, keep_empty=keep_empty)
