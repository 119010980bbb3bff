"""Crops, in the worker: choose a box, decode the image and resize the box, once, to uint8 [C, h, w].

The resize is bicubic with antialiasing, as PIL's. There are two ways:
- At full resolution the box has whole pixels. It is sliced, then resized by torch's uint8 kernel. This equals PIL's
  result up to rounding, and is three times as fast on a machine with AVX2.
- A JPEG whose crop is at least three times the target is decoded at 1/2, 1/4 or 1/8 (`draft`). Then the box may lie
  between pixels, so PIL resizes it: `resize(box=..., reducing_gap=2)`.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, JpegImagePlugin

from hf_mim.checks import share

from .decode import exif_orientation, open_image, to_channels

# The decoder's shrinking filters less well than the resize. With a margin of 1, some crops differ by 6 grey levels on
# average; with 1.5, the worst of 1000 differs by 3.6.
DRAFT_MARGIN = 1.5

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, as in PIL


def crop_rng(seed: int, epoch: int, key: int) -> random.Random:
    """The randomness of one image in one epoch: the same in a resumed run, and with any number of workers."""
    return random.Random(f"{seed}/{epoch}/{key}")  # seeding by a string is the same in every process and version


@dataclass(frozen=True)
class RandomCrop:
    """A random part of the image, for training: torchvision's `RandomResizedCrop`, to any target size.

    scale: range of the crop's share of the image's area.
    ratio: range of the crop's width / height *divided by the target's*, drawn log-uniformly: how much a crop may be
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
        """A box for a target of `size` (h, w). If ten draws do not fit: the largest centred one within `ratio`."""
        aspect = size[1] / size[0]
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = aspect * math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
                return left, top, left + w, top + h
        nearest = min(max(width / height, aspect * self.ratio[0]), aspect * self.ratio[1])
        return _centred(width, height, nearest)


@dataclass(frozen=True)
class CenterCrop:
    """The central part with the target's aspect, for evaluation. `fraction` .875 is "resize to 256, crop 224"."""

    fraction: float = 1.0
    exact = True

    def __post_init__(self):
        share("(0, 1]", fraction=self.fraction)

    def box(self, width: int, height: int, size: tuple[int, int], rng: random.Random) -> Box:
        return _centred(width, height, size[1] / size[0], self.fraction)


@dataclass(frozen=True)
class WholeImage:
    """The whole image, stretched to the target, as the saved `ViTImageProcessor` does."""

    exact = True
    fraction = 1.0

    def box(self, width: int, height: int, size: tuple[int, int], rng: random.Random) -> Box:
        return 0, 0, width, height


def _centred(width: int, height: int, aspect: float, fraction: float = 1.0) -> Box:
    """The largest centred box of this aspect, with its sides multiplied by `fraction`."""
    w = max(1, round(min(width, height * aspect) * fraction))
    h = max(1, round(min(height, width / aspect) * fraction))
    left, top = round((width - w) / 2), round((height - h) / 2)
    return left, top, left + w, top + h


def load_crop(value, crop, size: tuple[int, int], num_channels: int, rng: random.Random) -> torch.Tensor:
    """Decode one value of an image column, upright, and crop it: uint8 [num_channels, h, w].

    crop: `RandomCrop`, `CenterCrop` or `WholeImage`, or anything with their `box` and `exact`.
    """
    image = open_image(value)
    if isinstance(image, np.ndarray):
        pixels = to_channels(image, num_channels)
        left, top, right, bottom = crop.box(pixels.shape[1], pixels.shape[0], size, rng)
        return _resize_pixels(pixels[top:bottom, left:right], size)
    flip_x, flip_y, swap = exif_orientation(image)
    width, height = image.size
    # The box is chosen on the upright picture and moved to the stored one, because turning the small crop is cheap.
    left, top, right, bottom = crop.box(*((height, width) if swap else (width, height)), size, rng)
    if swap:
        left, top, right, bottom, size = top, left, bottom, right, size[::-1]
    if flip_x:
        left, right = width - right, width - left
    if flip_y:
        top, bottom = height - bottom, height - top
    pixels = _crop_stored(image, (left, top, right, bottom), size, num_channels, exact=crop.exact)
    pixels = pixels.flip([axis for axis, flip in ((2, flip_x), (1, flip_y)) if flip]) if flip_x or flip_y else pixels
    return (pixels.transpose(1, 2) if swap else pixels).contiguous()


def draft_reduction(box: Box, size: tuple[int, int]) -> int:
    """The factor (8, 4, 2, 1) by which the decoder may shrink a JPEG so that the crop keeps `DRAFT_MARGIN` × `size`."""
    room = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) / DRAFT_MARGIN
    return next((reduction for reduction in (8, 4, 2) if room >= reduction), 1)


def _crop_stored(image: Image.Image, box: Box, size: tuple[int, int], num_channels: int, exact: bool) -> torch.Tensor:
    reduction = 1
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        reduction = 1 if exact else draft_reduction(box, size)
        # Mode L decodes the luminance alone; None keeps the mode.
        image.draft("L" if num_channels == 1 else None, (image.width // reduction, image.height // reduction))
    if image.mode.startswith(("I", "F")):  # the range of such values is that of the whole image
        image = to_channels(image, num_channels)
    if reduction == 1:
        return _resize_pixels(np.array(to_channels(image.crop(box), num_channels), copy=True), size)
    image = to_channels(image, num_channels)
    scaled_box = tuple(min(side / reduction, limit) for side, limit in zip(box, image.size * 2, strict=True))
    image = image.resize(size[::-1], Image.Resampling.BICUBIC, box=scaled_box, reducing_gap=2)
    return _to_tensor(np.array(image))


def _to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """[h, w] or [h, w, C] -> [C, h, w], a view."""
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def _resize_pixels(pixels: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    part = _to_tensor(np.require(pixels, requirements="W"))  # torch warns of read-only memory
    return F.interpolate(part[None], size, mode="bicubic", antialias=True)[0].contiguous()
