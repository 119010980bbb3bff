"""The embedded default: scikit-learn's handwritten digits, upscaled to 32x32, so that anything can be tried offline."""

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
    from sklearn.datasets import load_digits  # slow to import, so only when asked for

    source = load_digits()
    pictures = (source.images * (255 / 16)).round().astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(pictures))  # RandomState's stream is frozen by numpy
    test, train = order[:NUM_TEST], order[NUM_TEST:]
    return _dataset(pictures[train], source.target[train]), _dataset(pictures[test], source.target[test])


def _dataset(pictures: np.ndarray, labels: np.ndarray) -> Dataset:
    features = Features(image=ImageFeature(decode=False), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    rows = [{"bytes": _upscaled_png(picture), "path": None} for picture in pictures]
    return Dataset.from_dict({"image": rows, "label": labels.tolist()}, features=features)


def _upscaled_png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()
