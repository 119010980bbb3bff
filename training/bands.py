"""Makes images of several bands from the RGB images of a dataset: `python training/bands.py SOURCE DEST [COUNT BANDS]`.

Each of the BANDS (10) is a fixed mixture of the three channels, as of a sensor with broad, overlapping bands; a single
one is a grey in which green counts most. DEST gets .npy files in class folders, `train/CLASS/00000.npy`: at most COUNT
(2,000) training images, the same each time, and all test images.
"""

from pathlib import Path

import numpy as np

from hf_mim.cli.errors import run_script
from hf_mim.data import load_images
from hf_mim.data.decode import open_image
from hf_mim.data.sources import fixed_sample


def mixtures(bands: int) -> np.ndarray:
    """`[3, bands]`: bumps whose centres go from the first channel to the last; each column sums to 1."""
    centres = np.linspace(0, 2, bands) if bands > 1 else np.ones(1)
    distance = np.arange(3)[:, None] - centres
    weights = np.exp(-(distance**2))
    return weights / weights.sum(0)


def main(source: str, dest: str, count: str = "2000", bands: str = "10"):
    matrix = mixtures(int(bands))
    for split in ("train", "test"):
        images = load_images(source, split)
        images = fixed_sample(images, int(count)) if split == "train" else images
        names = images.features["label"].names
        for number, row in enumerate(images):
            pixels = np.asarray(open_image(row["image"]).convert("RGB"))
            path = Path(dest) / split / names[row["label"]] / f"{number:05}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.rint(pixels @ matrix).astype(np.uint8))


if __name__ == "__main__":
    run_script(main, __doc__)
