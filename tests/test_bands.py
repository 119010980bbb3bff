"""`training/bands.py`."""

import importlib
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_comparison import TRAINING


@pytest.mark.parametrize("bands", [1, 10])
def test_bands_of_a_grey_image_are_all_that_grey_and_other_images_are_mixed(tmp_path, monkeypatch, bands):
    monkeypatch.syspath_prepend(str(TRAINING))
    script = importlib.import_module("bands")
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (6, 4), (90, 90, 90) if name == "a" else (0, 200, 0)).save(folder / "0.png")
    script.main(str(tmp_path / "images"), str(tmp_path / "bands"), "2", str(bands))
    sys.modules.pop("bands")
    for split in ("train", "test"):
        (grey,), (green,) = (
            [np.load(path) for path in (tmp_path / "bands" / split / name).glob("*.npy")] for name in ("a", "b")
        )
        assert grey.shape == (4, 6, bands) and (grey == 90).all()
        middle = green[0, 0, bands // 2]
        assert 0 < green.min() and middle == green.max() < 200
