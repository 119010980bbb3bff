"""Which values become black and white: given, or measured so that no single pixel decides."""

import io

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_mim.data import ImageDataset, WholeImage
from hf_mim.data.value_range import find_value_range
from hf_mim.models.pixels import ImageFormatError


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 199)).save(file, "PNG")
    return file.getvalue()


def images(arrays, num_channels: int) -> ImageDataset:
    rows = [{"bytes": a if isinstance(a, bytes) else npy(a), "path": f"{i}.npy"} for i, a in enumerate(arrays)]
    features = Features(image=ImageFeature(decode=False))
    about = dict(own_depth=True) if not isinstance(arrays[0], bytes) else {}
    return ImageDataset(Dataset.from_dict({"image": rows}, features=features), 16, num_channels, WholeImage(), **about)


def draw(low, high, kind, bands=1, count=8):
    random = np.random.default_rng(0)
    return [random.uniform(low, high, (16, 16, bands)).astype(kind) for _ in range(count)]


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        (draw(55, 2494, "uint16"), [0, 4095]),
        (draw(55, 60000, "uint16"), [0, 65535]),
        (draw(0, 0.98, "float32"), [0, 1]),
        (draw(0, 255, "int64"), [0, 255]),
    ],
)
def test_types_that_tell_a_range_get_it(arrays, expected):
    value_range, line, _ = find_value_range(images(arrays, 1), None, 1)
    assert value_range.as_list() == expected and value_range.pixel_type in line
    assert (
        f"scaled from {expected[0]:,}..{expected[1]:,}; change it with --value_range {expected[0]},{expected[1]}"
        in line
    )


def test_one_hot_pixel_decides_nothing():
    for kind, low, high in (("uint16", 55, 2494), ("float32", -30, 5)):
        arrays = draw(low, high, kind)
        expected, _, _ = find_value_range(images(arrays, 1), None, 1)
        arrays[3][2, 2] = 65535
        found, line, _ = find_value_range(images(arrays, 1), None, 1)
        np.testing.assert_allclose(found.as_list(), expected.as_list(), atol=0.2)
        assert "% of the values lie outside and are clipped" in line


def test_bands_of_other_ranges_are_scaled_each_by_its_own():
    arrays = [
        np.concatenate([a, 1000 * b], axis=2)
        for a, b in zip(draw(-30, 5, "float32"), draw(1, 2, "float32"), strict=True)
    ]
    value_range, _, _ = find_value_range(images(arrays, 2), None, 2)
    np.testing.assert_allclose(value_range.as_list(), [-30, 5, 1000, 2000], rtol=0.02)


def test_8_bit_images_need_none():
    assert find_value_range(images([png(), png()], 3), None, 3) == (None, None, None)


def test_a_given_range_is_taken_and_said_with_what_it_clips():
    value_range, line, _ = find_value_range(images(draw(0, 4000, "uint16"), 1), [0.0, 2000.0], 1)
    assert value_range.as_list() == [0, 2000] and value_range.pixel_type == "uint16"
    assert "as given; " in line and float(line.split("; ")[1].split("%")[0]) == pytest.approx(50, abs=3)


def test_several_depths_need_a_range_and_two_files_are_named():
    mixed = [npy(draw(0, 255, "uint8")[0]), npy(draw(0, 4000, "uint16")[0])] * 4
    with pytest.raises(
        ImageFormatError, match=r"several depths, (uint8|uint16) \(\d.npy\) and (uint8|uint16) \(\d.npy\)"
    ):
        find_value_range(images(mixed, 1), None, 1)
    value_range, _, _ = find_value_range(images(mixed, 1), [0.0, 4095.0], 1)
    assert value_range.pixel_type is None


def test_few_levels_are_said():
    arrays = [(a > 0.5).astype("uint16") for a in draw(0, 1, "float32")]
    _, line, _ = find_value_range(images(arrays, 1), None, 1)
    assert "WARNING: only 2 levels of the data are used" in line


@pytest.mark.parametrize("given", [[1.0], [5.0, 5.0], [9.0, 1.0], [0.0, 1.0, 0.0]])
def test_a_wrong_range_is_one_line(given):
    with pytest.raises(ValueError, match="^value_range must be "):
        find_value_range(images(draw(0, 1, "float32"), 1), given, 1)
