"""Windows of native pixels: the pixels of the file to the bit, in training, in evaluation and in the processor."""

import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from hf_mim.data import CenterWindow, ImageDataset, NativeCrop
from hf_mim.data.crop import crop_rng, image_size, load_crop, window_pixels
from hf_mim.data.processor import image_processor, read_processor
from hf_mim.models.pixels import crop_image


def encoded(array, form="PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def deep_tiff(array) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, photometric="minisblack", planarconfig="contig")
    return file.getvalue()


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def places(array, window):
    """Where in the array [h, w, C] the window [h, w, C] lies, to the bit."""
    height, width = window.shape[:2]
    views = np.lib.stride_tricks.sliding_window_view(array, (height, width), axis=(0, 1))
    return list(zip(*np.nonzero((views == np.moveaxis(window, -1, 0)[:, :, :]).all((2, 3, 4))), strict=True))


def drawn(kind, bands, seed=0):
    return np.random.RandomState(seed).randint(0, 256 if kind == "uint8" else 4096, (40, 50, bands)).astype(kind)


@pytest.mark.parametrize(
    ("write", "kind", "bands"), [(encoded, "uint8", 3), (deep_tiff, "uint16", 13), (npy, "float32", 2)]
)
def test_a_window_of_the_inputs_size_is_the_file_to_the_bit(write, kind, bands):
    array, found = drawn(kind, bands), set()
    for key in range(200):
        crop = load_crop(write(array), NativeCrop((24, 32)), (24, 32), bands, crop_rng(0, 0, key))
        assert crop.dtype == getattr(torch, kind) and crop.is_contiguous()
        (place,) = places(array, crop.permute(1, 2, 0).numpy())
        found.add(place)
    rows, columns = zip(*found, strict=True)
    assert len(found) > 100 and (min(rows), max(rows)) == (0, 16) and (min(columns), max(columns)) == (0, 18)


def test_a_window_of_a_jpeg_is_never_decoded_at_a_fraction(picture):
    """A window of 600 for an input of 32 would be drafted to an eighth by a random resized crop."""
    data = encoded(np.asarray(picture(800, 700)), "JPEG", quality=95)
    whole = np.asarray(Image.open(io.BytesIO(data)))
    left, top, right, bottom = NativeCrop(600).box(800, 700, (32, 32), crop_rng(0, 0, 5))
    assert (right - left, bottom - top) == (600, 600)
    found = load_crop(data, NativeCrop(600), (32, 32), 3, crop_rng(0, 0, 5))
    expected = crop_image(np.ascontiguousarray(whole[top:bottom, left:right]), CenterWindow((600, 600)), (32, 32), 3)
    assert torch.equal(found, expected)


def test_no_resize_at_the_same_size_is_what_the_resize_gave():
    """uint8 of the target's size went through the resize before; the pixels were those of the file then too."""
    pixels = torch.from_numpy(drawn("uint8", 3)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(pixels, (40, 50), mode="bicubic", antialias=True)
    assert torch.equal(resized, pixels)


def test_an_image_smaller_than_the_window_gives_its_largest_part_of_this_aspect():
    for width, height, sides in ((100, 30, (60, 30)), (30, 100, (30, 15)), (1, 1, (1, 1)), (80, 41, (80, 40))):
        boxes = [NativeCrop((40, 80)).box(width, height, (20, 40), crop_rng(0, 0, key)) for key in range(200)]
        boxes.append(CenterWindow((40, 80)).box(width, height))
        assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {sides}
        assert all(0 <= box[0] and 0 <= box[1] and box[2] <= width and box[3] <= height for box in boxes)
    assert NativeCrop(40).is_larger(100, 39) and not NativeCrop(40).is_larger(40, 40)


def test_the_processor_takes_the_central_window_of_the_scale_and_is_read_again(tmp_path):
    array = drawn("uint8", 3)
    image_processor((16, 20), [0.0] * 3, [1.0] * 3, None, None, (16, 20)).save_pretrained(tmp_path)
    known = read_processor(tmp_path, 3)
    assert (known.size, known.crop_pixels, known.crop_fraction) == ((16, 20), (16, 20), None)
    processor = image_processor(known.size, known.mean, known.std, None, known.crop_fraction, known.crop_pixels)
    pixels = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(255 * pixels.permute(1, 2, 0).numpy(), array[12:28, 15:35], atol=1e-3)
    evaluated = ImageDataset(rows(encoded(array)), (16, 20), 3, crop=CenterWindow((16, 20)))
    np.testing.assert_array_equal(evaluated[0]["pixel_values"].permute(1, 2, 0).numpy(), array[12:28, 15:35])


def rows(data):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    features = Features(image=ImageFeature(decode=False))
    return Dataset.from_dict({"image": [{"bytes": data, "path": None}]}, features=features)


def test_the_size_of_an_image_is_read_upright_from_any_kind(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 40)).save(tmp_path / "turned.jpg", exif=exif)
    wide = np.zeros((3, 40, 50), np.uint16)
    for value in (encoded(drawn("uint8", 3)), deep_tiff(drawn("uint16", 3)), npy(wide), wide, Image.new("L", (50, 40))):
        assert image_size(value, 3) == (50, 40)
    assert image_size(str(tmp_path / "turned.jpg"), 3) == (40, 50)


@pytest.mark.parametrize("given", [0, (0, 5), (5,), (1, 2, 3), []])
def test_impossible_windows_are_refused(given):
    with pytest.raises(ValueError, match="crop_pixels must be a side, or height,width, of at least 1 pixel"):
        window_pixels(given)
