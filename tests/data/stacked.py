"""Images of two parts, RGB and infrared, for the tests of stacks."""

import numpy as np
from PIL import Image

from hf_mim.data import ImageDataset
from hf_mim.data.crop import WholeImage


def pixels(seed, channels=3, size=(12, 16), dtype=np.uint8):
    shape = size if channels == 1 else (*size, channels)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


def save_two_parts(folder):
    """Two classes of two images, each with RGB and infrared, in a folder for each."""
    for number in range(4):
        for name, channels, extension in (("rgb", 3, "png"), ("ir", 1, "tif")):
            path = folder / name / "cat dog".split()[number % 2] / f"{number}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(10 * channels + number, channels)).save(path)


def expected(number):
    return np.concatenate([pixels(30 + number), pixels(10 + number, 1)[..., None]], axis=2)


def whole(images, num_channels=4, **options):
    dataset = ImageDataset(images, (12, 16), num_channels, crop=WholeImage(), **options)
    return [sample["pixel_values"].permute(1, 2, 0).numpy() for sample in dataset]


def save_deep_parts(folder):
    """Six images of 8-bit RGB and 12-bit infrared in 16 bits."""
    for number in range(6):
        for name, array in (("rgb", pixels(number)), ("ir", pixels(60 + number, 1, dtype=np.uint16) >> 4)):
            (folder / name).mkdir(exist_ok=True)
            np.save(folder / name / f"{number}.npy", array)


def raw(folder, number):
    rgb, ir = (np.load(folder / name / f"{number}.npy") for name in ("rgb", "ir"))
    return np.concatenate([rgb, ir[..., None]], axis=2, dtype=np.float64)
