"""Which part of an image is taken: a crop gives a box for the size of an image and of a model's input.

`exact` says that a JPEG must be decoded at full size.
"""

import random
from dataclasses import dataclass

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, as in PIL


@dataclass(frozen=True)
class CenterCrop:
    """The central part with the target's aspect, for evaluation. `fraction` .875 is "resize to 256, crop 224"."""

    fraction: float = 1.0
    exact = True  # a JPEG is decoded at full size

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], not {self.fraction}")

    def box(self, width: int, height: int, size: tuple[int, int], rng: random.Random | None = None) -> Box:
        return centred(width, height, size[1] / size[0], self.fraction)


@dataclass(frozen=True)
class WholeImage:
    """The whole image, stretched to the target, as transformers' `ViTImageProcessor` does."""

    exact = True
    fraction = 1.0

    def box(self, width: int, height: int, size: tuple[int, int], rng: random.Random | None = None) -> Box:
        return 0, 0, width, height


@dataclass(frozen=True)
class CenterWindow:
    """The central window of so many pixels of the image, for evaluation: the scale of a training on such windows.

    pixels: (height, width). A smaller image gives its largest central part of this aspect.
    """

    pixels: tuple[int, int]
    exact = True  # the pixels are those of the file, so a JPEG is decoded at full size
    fraction = None

    @classmethod
    def for_size(cls, pixels: tuple[int, int], size: tuple[int, int], known: tuple[int, int]) -> "CenterWindow":
        """The window for an input of `size` that has the scale of one of `pixels` for an input of size `known`."""
        sides = zip(pixels, size, known, strict=True)
        height, width = (max(1, round(length * new / old)) for length, new, old in sides)
        return cls((height, width))

    def box(
        self, width: int, height: int, size: tuple[int, int] | None = None, rng: random.Random | None = None
    ) -> Box:
        w, h = fitting(self.pixels, width, height)
        left, top = round((width - w) / 2), round((height - h) / 2)
        return left, top, left + w, top + h


def fitting(pixels: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """(w, h) of a window of `pixels` (height, width), or the largest of its aspect that the image holds."""
    part = min(1.0, height / pixels[0], width / pixels[1])
    return min(width, max(1, round(pixels[1] * part))), min(height, max(1, round(pixels[0] * part)))


def centred(width: int, height: int, aspect: float, fraction: float = 1.0) -> Box:
    """The largest centred box of this aspect, with its sides multiplied by `fraction`."""
    w = max(1, round(min(width, height * aspect) * fraction))
    h = max(1, round(min(height, width / aspect) * fraction))
    left, top = round((width - w) / 2), round((height - h) / 2)
    return left, top, left + w, top + h
