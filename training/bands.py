"""Makes images of ten bands from the RGB images of a dataset: `python training/bands.py SOURCE DEST [COUNT]`.

Each band is a fixed mixture of the three channels, as of a sensor with broad, overlapping bands. DEST gets .npy files
in class folders, `train/CLASS/00000.npy`: at most COUNT (2,000) training images, drawn at random, and all test images.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from hf_mim.data import load_images
from hf_mim.data.sources import fixed_sample

BANDS = 10


def mixtures(bands: int = BANDS) -> np.ndarray:
    """`[3, bands]`: bumps whose centres go from the first channel to the last; each column sums to 1."""
    distance = np.arange(3)[:, None] - np.linspace(0, 2, bands)
    weights = np.exp(-(distance**2))
    return weights / weights.sum(0)


def main(source: str, dest: str, count: str = "2000"):
    for split in ("train", "test"):
        images = load_images(source, split)
        images = fixed_sample(images, int(count)) if split == "train" else images
        names = images.features["label"].names
        for number, row in enumerate(images):
            pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
            path = Path(dest) / split / names[row["label"]] / f"{number:05}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.rint(pixels @ mixtures()).astype(np.uint8))


if __name__ == "__main__":
    main(*sys.argv[1:])
