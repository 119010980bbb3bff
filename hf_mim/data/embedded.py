"""Data that come with the package, so that everything can be tried offline: drawn textures, and handwritten digits.

Two textures of a class differ in phase, period, angle, contrast, light and noise. So their pixels differ at every
place, and only what describes a pattern wherever it lies can tell the classes apart. On the digits, raw pixels are good
features already, because all of them are centred.
"""

import functools
import io
import math

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

SIZE = 32
NUM_TEST_DIGITS, NUM_TEST_TEXTURES, NUM_TRAIN_TEXTURES = 360, 400, 2000
_DIRECTIONS = {"vertical": 0, "falling": 45, "horizontal": 90, "rising": 135}  # of stripes → degrees of their wave
_TURNS = {"straight": 0, "diagonal": 45}  # of checks
_TEXTURES = [  # (name, degrees, period in pixels)
    *((f"{scale} {name} stripes", angle, period)
      for scale, period in (("fine", 6), ("coarse", 11)) for name, angle in _DIRECTIONS.items()),
    *((f"{scale} {name} checks", angle, period)
      for scale, period in (("fine", 7), ("coarse", 12)) for name, angle in _TURNS.items()),
]  # fmt: skip
_ANGLE, _PERIOD = 12, 0.15  # by how much they vary: degrees, and a share
_CONTRAST, _LIGHT, _SHADE, _NOISE = (20, 50), 30, 30, 35  # grey levels


def textures() -> tuple[Dataset, Dataset]:
    """(train, test): 2,000 and 400 grey images of 32×32 with columns `image` (undecoded PNG) and `label` (of 12).

    The waves are triangles, drawn without a library's sine, so that the pixels are the same on every machine.
    """
    return _split(_textures(), NUM_TEST_TEXTURES, [name for name, *_ in _TEXTURES])


def digits() -> tuple[Dataset, Dataset]:
    """(train, test): 1,437 and 360 grey images of 32x32 with columns `image` (undecoded PNG) and `label` (0 to 9).

    The pictures are the 8x8 ones of the UCI set, 17 grey levels, resized bicubic. The split is always the same.
    """
    return _split(_digits(), NUM_TEST_DIGITS, [str(digit) for digit in range(10)])


EMBEDDED = {"textures": textures, "digits": digits}


@functools.cache  # a run reads them several times
def _textures() -> list[tuple[bytes, int]]:
    """(PNG, label) of each texture, test images first."""
    rng = np.random.RandomState(0)  # numpy promises never to change RandomState's numbers
    labels = [index % len(_TEXTURES) for index in range(NUM_TEST_TEXTURES + NUM_TRAIN_TEXTURES)]
    return [(png(Image.fromarray(_texture(label, rng))), label) for label in labels]


def _texture(label: int, rng: np.random.RandomState) -> np.ndarray:
    """uint8 [32, 32]"""
    name, degrees, period = _TEXTURES[label]
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    angle = math.radians(degrees + rng.uniform(-_ANGLE, _ANGLE))
    cos, sin = round(math.cos(angle), 9), round(math.sin(angle), 9)
    waves = SIZE / period / rng.uniform(1 - _PERIOD, 1 + _PERIOD)  # in the side of the image
    pattern = _wave((columns * cos + rows * sin) * waves + rng.uniform())
    if name.endswith("checks"):
        pattern *= 1.4 * _wave((rows * cos - columns * sin) * waves + rng.uniform())
    light = 128 + rng.uniform(-_LIGHT, _LIGHT)
    shade = 2 * _SHADE * (columns * rng.uniform(-1, 1) + rows * rng.uniform(-1, 1))
    noise = rng.uniform(-_NOISE, _NOISE, (SIZE, SIZE))
    return (light + shade + rng.uniform(*_CONTRAST) * pattern + noise).clip(0, 255).round().astype(np.uint8)


def _wave(phase: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1, between -1 and 1."""
    return 4 * np.abs(phase - np.floor(phase) - 0.5) - 1


@functools.cache
def _digits() -> list[tuple[bytes, int]]:
    """(PNG, label) of each digit in the order of the split, test images first."""
    from sklearn.datasets import load_digits  # slow to import, so only when asked for

    source = load_digits()
    pictures = (source.images * (255 / 16)).round().astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(pictures))
    resized = (Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures[order])
    return [(png(image), int(label)) for image, label in zip(resized, source.target[order], strict=True)]


def _split(rows: list[tuple[bytes, int]], num_test: int, names: list[str]) -> tuple[Dataset, Dataset]:
    """(train, test) of (PNG, label), test images first."""
    features = Features(image=ImageFeature(decode=False), label=ClassLabel(names=names))
    return tuple(
        Dataset.from_dict(
            {"image": [{"bytes": png, "path": None} for png, _ in part], "label": [label for _, label in part]},
            features=features,
        )
        for part in (rows[num_test:], rows[:num_test])
    )


def png(image: Image.Image, **options) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()
