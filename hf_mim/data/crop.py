"""Crops, in the worker: where to crop (a box) and the crop itself, decoded and resized once."""

import math
import random
from dataclasses import dataclass

from torch import Tensor

from hf_mim.models.pixels import Box, CenterCrop, ValueRange, WholeImage, centred, crop_image

from .decode import open_image

__all__ = ["CenterCrop", "RandomCrop", "WholeImage", "crop_rng", "load_crop"]


def crop_rng(seed: int, epoch: int, key: int) -> random.Random:
    """The randomness of one image in one epoch. A resumed run, or one with other workers, draws the same."""
    return random.Random(f"{seed}/{epoch}/{key}")  # seeding by a string is the same in every process and version


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


def load_crop(
    value,
    crop,
    size: tuple[int, int],
    num_channels: int,
    rng: random.Random,
    value_range: ValueRange | None = None,
    keep_empty: bool = True,
) -> Tensor:
    """Decode one value of an image column, upright, and crop it: [num_channels, h, w], in its own depth.

    The arguments are those of `crop_image`.
    """
    image = open_image(value, num_channels)
    return crop_image(image, crop, size, num_channels, rng, value_range=value_range, keep_empty=keep_empty)
