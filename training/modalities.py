"""Divides RGB images into two modalities: `python training/modalities.py SOURCE DEST luma_chroma [COUNT]`.

luma_chroma: brightness (`luma`, 1 channel) and colour (`chroma`, 2 channels), those of JPEG (YCbCr).
rgb_gradient: the image itself (`rgb`) and how steep its brightness is at each pixel (`gradient`, 1 channel).

Both are stand-ins for two sensors, such as RGB and infrared: they are made of one image. DEST gets a folder for each
modality, `train/luma/CLASS/00000.npy` and `train/chroma/CLASS/00000.npy`: at most COUNT training images, the same each
time, and all test images. `hf-mim pretrain --image_column luma,chroma` reads them.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from hf_mim.cli.errors import run_script
from hf_mim.data import load_images
from hf_mim.data.decode import open_image
from hf_mim.data.sources import SplitNotFound, fixed_sample


def luma_chroma(image: Image.Image) -> dict[str, np.ndarray]:
    pixels = np.asarray(image.convert("YCbCr"))
    return {"luma": pixels[..., :1], "chroma": pixels[..., 1:]}


def rgb_gradient(image: Image.Image) -> dict[str, np.ndarray]:
    grey = np.asarray(image.convert("L"), np.float64)
    steepness = np.hypot(*np.gradient(grey))  # at most 255 / √2
    return {"rgb": np.asarray(image), "gradient": np.rint(steepness).astype(np.uint8)[..., None]}


def write(images, folder: Path, divide: Callable[[Image.Image], dict[str, np.ndarray]]):
    """The modalities of images, in a folder for each, below it by class where there are classes."""
    names = getattr(images.features.get("label"), "names", None)
    for number, row in enumerate(images):
        label = row.get("label")
        known = label is not None and label >= 0
        below = (names[label] if names else str(label)) if known else ""
        for name, pixels in divide(open_image(row["image"]).convert("RGB")).items():
            path = folder / name / below / f"{number:05}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, pixels)


def main(source: str, dest: str, kind: str = "luma_chroma", count: str | None = None):
    ways = {"luma_chroma": luma_chroma, "rgb_gradient": rgb_gradient}
    if kind not in ways:
        raise ValueError(f"the modalities must be one of {', '.join(ways)}, not {kind}")
    divide = ways[kind]
    images = load_images(source, "train")
    write(images if count is None else fixed_sample(images, int(count)), Path(dest) / "train", divide)
    try:
        write(load_images(source, "test"), Path(dest) / "test", divide)
    except SplitNotFound:
        print(f"{source} has no test images")


if __name__ == "__main__":
    run_script(main, __doc__)
