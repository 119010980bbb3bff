"""The embedded data: scikit-learn's handwritten digits, upscaled to 32x32, so that everything can be tried offline."""

import functools
import io

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

SIZE = 32
NUM_TEST = 360


def digits() -> tuple[Dataset, Dataset]:
    """(train, test): 1,437 and 360 grey images of 32x32 with columns `image` (undecoded PNG) and `label` (0 to 9).

    The pictures are the 8x8 ones of the UCI set, 17 grey levels, resized bicubic. The split is always the same.
    """
    rows = _rows()
    return _dataset(rows[NUM_TEST:]), _dataset(rows[:NUM_TEST])


@functools.cache  # a run reads them several times
def _rows() -> list[tuple[bytes, int]]:
    """(PNG, label) of each digit in the order of the split, test images first."""
    from sklearn.datasets import load_digits  # slow to import, so only when asked for

    source = load_digits()
    pictures = (source.images * (255 / 16)).round().astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(pictures))  # numpy promises never to change RandomState's numbers
    resized = (Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures[order])
    return [(png(image), int(label)) for image, label in zip(resized, source.target[order], strict=True)]


def _dataset(rows: list[tuple[bytes, int]]) -> Dataset:
    features = Features(image=ImageFeature(decode=False), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    images = [{"bytes": png, "path": None} for png, _ in rows]
    return Dataset.from_dict({"image": images, "label": [label for _, label in rows]}, features=features)


def png(image: Image.Image, **options) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()
