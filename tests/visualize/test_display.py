"""An image of any depth and any bands is shown with its own contrast, and its reconstruction in the same way."""

import io

import numpy as np
import pytest
import torch
from pictured import images, viewer
from PIL import Image

from hf_mim.data import load_images
from hf_mim.models.pixels import ValueRange
from hf_mim.visualize.display import NO_DATA, PERCENTILES, Display
from hf_mim.visualize.viewer import View


def levels(picture) -> np.ndarray:
    return 255 * picture


def full_contrast(image: np.ndarray) -> np.ndarray:
    """8 bits, with black and white at the same percentiles as a stretch has them."""
    low, high = np.percentile(image, PERCENTILES, axis=(0, 1))
    return ((image - low) / (high - low) * 255).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize(("dtype", "factor"), [(np.uint16, 16), (np.uint16, 257), (np.float32, 1 / 255)])
def test_deep_images_have_the_contrast_of_their_8_bit_versions(shared_data, dtype, factor):
    view, scaled = viewer(image_size=(64, 96)), []
    for row in load_images(shared_data / "camvid", "val").select(range(0, 100, 25)):
        eight = full_contrast(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")))
        deep = (eight * np.float64(factor)).astype(dtype)
        shown = [levels(view.read([image]).shown()[0]) for image in (eight, deep)]
        scaled.append(np.abs(shown[0] - shown[1]).mean())
    assert max(scaled) < 3


def test_8_bit_images_are_shown_as_they_are():
    image = images(1)[0] // 4 + 60  # little contrast, which must stay
    shown = levels(viewer().read([image]).shown()[0])
    np.testing.assert_allclose(shown, image, atol=1e-3)


def test_a_hot_pixel_does_not_darken_the_image():
    image = images(1, dtype=np.uint16, top=4096, size=(64, 96))[0]
    hot = image.copy()
    hot[5, 5] = 65535
    clean, stained = (Display.of(torch.from_numpy(x.astype(np.float32)).permute(2, 0, 1)) for x in (image, hot))
    assert np.abs(clean.high - stained.high).max() < 0.02 * clean.high.max()


def test_each_band_is_stretched_by_itself_and_bands_choose_the_colours():
    pixels = torch.stack([torch.linspace(low, low + 100, 100).view(10, 10) for low in (0, 1000, 5000, 20000)])
    by_default, chosen, grey = Display.of(pixels), Display.of(pixels, (4, 1, 2)), Display.of(pixels, (2,))
    assert (by_default.bands, chosen.bands, grey.bands) == ((0, 1, 2), (3, 0, 1), (1,))
    np.testing.assert_allclose(by_default(pixels), chosen(pixels), atol=1e-3)  # each band fills the whole range
    assert by_default(pixels).min() == 0 and by_default(pixels).max() == 1
    changed = pixels.clone()
    changed[3] = changed[3].flip(0)
    assert not np.allclose(chosen(changed)[..., 0], chosen(pixels)[..., 0])
    np.testing.assert_array_equal(by_default(changed), by_default(pixels))
    assert (np.ptp(grey(pixels), axis=2) == 0).all()


@pytest.mark.parametrize("channels", [1, 2])
def test_an_image_of_one_or_two_bands_is_grey(channels):
    shown = viewer(num_channels=channels).read(images(1, channels)).shown()[0]
    assert shown.shape == (16, 24, 3) and (np.ptp(shown, axis=2) == 0).all() and np.ptp(shown) > 0.3


def test_pixels_without_data_are_violet_and_do_not_count_in_the_stretch():
    value_range = ValueRange((0.0,), (1.0,), "float32", float("nan"))
    view = viewer(num_channels=2, value_range=value_range)
    image = images(1, 2, dtype=np.float32, top=2)[0] * 0.1
    holed = image.copy()
    holed[4:8, 4:12] = np.nan
    found = view.read([holed])
    shown, whole = found.shown()[0], view.read([image]).shown()[0]
    np.testing.assert_allclose(shown[4:8, 4:12], np.broadcast_to(NO_DATA, (4, 8, 3)))
    rest = np.ones((16, 24), bool)
    rest[4:8, 4:12] = False
    assert np.abs(shown[rest] - whole[rest]).mean() < 0.05 and "no data" in found.note


def test_a_constant_band_is_grey_and_an_image_without_data_is_violet():
    assert np.allclose(Display.of(torch.full((1, 4, 4), 7.0))(torch.full((1, 4, 4), 7.0)), 0.5)
    empty = torch.full((3, 4, 4), torch.nan)
    np.testing.assert_allclose(Display.of(empty)(empty)[0, 0], NO_DATA)


def test_no_image_is_distorted():
    """A disc in an image that is twice as wide as high stays round in a square view."""
    rows, columns = np.mgrid[:64, :128]
    disc = ((rows - 32) ** 2 + (columns - 64) ** 2 < 20**2).astype(np.uint8) * 255
    shown = viewer(image_size=(32, 32), num_channels=1).read([disc]).shown()[0][..., 0] > 0.5
    height, width = shown.any(axis=1).sum(), shown.any(axis=0).sum()
    assert height == width and 18 <= height <= 22


@pytest.mark.parametrize(
    ("bands", "told"),
    [((1, 2), "bands must be one number or three"), ((0, 1, 2), "at least 1"), ((1, 2, 4), r"lie in 1\.\.3")],
)
def test_bands_that_cannot_be_shown_are_refused(bands, told):
    with pytest.raises(ValueError, match=told):
        viewer(bands=bands)


def test_only_bands_that_are_shown_are_said_to_lack_data():
    pixels = torch.rand(1, 4, 8, 8)
    pixels[0, 3] = torch.nan
    assert "Violet" not in View.of(pixels, [True], None).note
    assert View.of(pixels, [True], [4]).note == " Shown in grey: band 4 of 4. Violet: no data."


def test_the_bands_that_are_shown_are_named_where_they_are_not_all_in_their_order():
    for channels, bands, told in (
        (1, None, ""),
        (3, None, ""),
        (2, None, " Shown in grey: band 1 of 2."),
        (13, [4, 3, 2], " Red, green and blue of an image are its bands 4, 3, 2 of 13."),
        (3, [3, 2, 1], " Red, green and blue of an image are its bands 3, 2, 1 of 3."),
    ):
        pixels = torch.rand(1, channels, 8, 8)
        assert View.of(pixels, [True], bands).note == told
