"""RandAugment (Cubuk et al., arXiv 1909.13719), in the worker, on PIL images of mode L or RGB.

The paper draws a few operations uniformly from a list, and applies them one after the other with one magnitude.
Fine-tuning recipes since DeiT, including MAE's, use the variant that is known as "rand-m9-mstd0.5-inc1". It is this:
- 2 operations are drawn with replacement from the 15 below; each is applied with probability .5.
- Each has its own magnitude: drawn from normal(9, .5) and clipped to 0..10.
- "Increasing": a larger magnitude always changes the image more. (The paper's Solarize and Posterize do the opposite.)
  Auto_contrast, equalize and invert have no magnitude. Posterize keeps 4 bits at 0 and 1 bit at 10. At 0, all others
  leave the image as it is.
- Geometric operations resample bicubically, and fill what they uncover with the mean colour.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from hf_mim.checks import least, share
from hf_mim.models.pixels import ImageFormatError

from .crop import crop_rng
from .dataset import ImageDataset

LARGEST_MAGNITUDE = 10.0


def _affine(image: Image.Image, matrix: tuple, fill) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


def _solarize_add(image: Image.Image, addend: int) -> Image.Image:
    return image.point([min(255, x + addend) if x < 128 else x for x in range(256)] * len(image.getbands()))


# name -> operation(image, strength, fill). The strength is magnitude / 10, in 0..1; for those in SIGNED in -1..1.
OPERATIONS: dict[str, Callable[[Image.Image, float, tuple | int], Image.Image]] = {
    "auto_contrast": lambda image, strength, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, fill: ImageOps.equalize(image),
    "invert": lambda image, strength, fill: ImageOps.invert(image),
    "posterize": lambda image, strength, fill: ImageOps.posterize(image, max(1, 4 - int(4 * strength))),
    "solarize": lambda image, strength, fill: ImageOps.solarize(image, 256 - int(256 * strength)),
    "solarize_add": lambda image, strength, fill: _solarize_add(image, int(110 * strength)),
    "color": lambda image, strength, fill: ImageEnhance.Color(image).enhance(1 + 0.9 * strength),
    "contrast": lambda image, strength, fill: ImageEnhance.Contrast(image).enhance(1 + 0.9 * strength),
    "brightness": lambda image, strength, fill: ImageEnhance.Brightness(image).enhance(1 + 0.9 * strength),
    "sharpness": lambda image, strength, fill: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * strength),
    "rotate": lambda image, strength, fill: image.rotate(30 * strength, Image.Resampling.BICUBIC, fillcolor=fill),
    "shear_x": lambda image, strength, fill: _affine(image, (1, 0.3 * strength, 0, 0, 1, 0), fill),
    "shear_y": lambda image, strength, fill: _affine(image, (1, 0, 0, 0.3 * strength, 1, 0), fill),
    "translate_x": lambda image, strength, fill: _affine(image, (1, 0, 0.45 * strength * image.width, 0, 1, 0), fill),
    "translate_y": lambda image, strength, fill: _affine(image, (1, 0, 0, 0, 1, 0.45 * strength * image.height), fill),
}
# The strength of these is positive or negative with equal probability.
SIGNED = frozenset("color contrast brightness sharpness rotate shear_x shear_y translate_x translate_y".split())


@dataclass(frozen=True)
class RandAugment:
    """`augment(image, rng)` → image. All its randomness comes from `rng`.

    magnitude: mean of the magnitudes, 0..10.
    std: their standard deviation.
    num_operations: how many are drawn for each image.
    probability: of applying an operation that was drawn.
    fill: the colour that fills uncovered parts, one value in 0..255 for each channel.
    """

    magnitude: float = 9.0
    std: float = 0.5
    num_operations: int = 2
    probability: float = 0.5
    fill: tuple[int, ...] = (124, 116, 104)

    def __post_init__(self):
        share(f"[0, {LARGEST_MAGNITUDE:g}]", magnitude=self.magnitude)
        least(0, std=self.std, num_operations=self.num_operations)
        share(probability=self.probability)
        if len(self.fill) not in (1, 3):
            raise ValueError(f"RandAugment takes 1 or 3 channels, not {len(self.fill)}; give --randaugment_magnitude 0")

    def draw(self, rng: random.Random) -> list[tuple[str, float]]:
        """The operations for one image, in order, each with its strength."""
        names, drawn = list(OPERATIONS), []
        for _ in range(self.num_operations):
            name = names[int(rng.random() * len(names))]
            magnitude = min(max(rng.gauss(self.magnitude, self.std), 0.0), LARGEST_MAGNITUDE)
            sign = -1 if name in SIGNED and rng.random() < 0.5 else 1
            if rng.random() < self.probability:
                drawn.append((name, sign * magnitude / LARGEST_MAGNITUDE))
        return drawn

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        fill = self.fill if image.mode == "RGB" else self.fill[0]
        for name, strength in self.draw(rng):
            image = OPERATIONS[name](image, strength, fill)
        return image


class RandAugmentedImages(ImageDataset):
    """An `ImageDataset` whose crops go through RandAugment. Like the crop, it depends on (seed, epoch, index) alone.

    Recipes flip before RandAugment; here the device flips after it. The order makes no difference, because both signs
    of each geometric operation are equally likely.
    """

    def __init__(self, images, size, num_channels=3, *args, randaugment: RandAugment | None = None, **kwargs):
        self.randaugment = RandAugment() if randaugment is None else randaugment
        fill = self.randaugment.fill
        if len(fill) != num_channels:
            raise ValueError(f"RandAugment's fill must have {num_channels} values (channels), not {fill}")
        super().__init__(images, size, num_channels, *args, **kwargs)

    def _sample(self, value, label, epoch: int, key: int, name: str) -> dict:
        sample = super()._sample(value, label, epoch, key, name)
        if sample["pixel_values"].dtype != torch.uint8:
            raise ImageFormatError(
                f"{name}: RandAugment takes 8-bit images without nodata; give --randaugment_magnitude 0"
            )
        pixels = sample["pixel_values"].permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels[..., 0] if self.num_channels == 1 else pixels)
        # It has its own random numbers: with those of the crop, the operation would depend on the crop's size.
        image = self.randaugment(image, crop_rng(self.seed, epoch, f"{key}/randaugment"))
        pixels = np.array(image).reshape(*self.size, self.num_channels)
        sample["pixel_values"] = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return sample
