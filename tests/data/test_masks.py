"""Masks are ids, whatever file they come in."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from hf_mim.data.masks import read_mask_ids

IDS = np.arange(12, dtype=np.uint8).reshape(3, 4)


def encoded(image, kind="PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def palette_image():
    image = Image.frombytes("P", (4, 3), IDS.tobytes())
    image.putpalette(np.random.RandomState(0).randint(0, 256, 768, dtype=np.uint8).tobytes())
    return image


def test_grey_and_palette_files_give_ids_not_colours():
    grey = read_mask_ids(encoded(Image.fromarray(IDS)))
    palette = read_mask_ids(encoded(palette_image()))
    assert grey.dtype == palette.dtype == np.uint8
    assert (grey == IDS).all() and (palette == IDS).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_ids_of_16_bits_are_kept(kind):
    ids = IDS.astype(np.uint16) * 1000
    found = read_mask_ids(encoded(Image.fromarray(ids), kind))
    assert found.dtype == np.int64 and (found == ids).all()


def test_one_bit_and_arrays_are_ids_too():
    assert (read_mask_ids(Image.fromarray(IDS > 5)) == (IDS > 5)).all()
    assert (read_mask_ids(IDS.astype(np.int32)[..., None]) == IDS).all()
    assert read_mask_ids(IDS > 5).dtype == np.uint8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_mask_as_pillow_does(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    value = encoded(Image.fromarray(IDS), exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(value["bytes"]))))
    assert (read_mask_ids(value) == upright).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (encoded(Image.fromarray(IDS).convert("RGB")), "cats/1.png: a mask must hold one id .* not RGB colours"),
        (encoded(Image.fromarray(IDS), "JPEG"), "cats/1.png: a mask must not be a JPEG"),
        ({"bytes": b"junk", "path": None}, "cats/1.png: not an image"),
        (IDS.astype(np.float32), r"cats/1.png: a mask must be integers \[h, w\], not float32 \[3, 4\]"),
    ],
)
def test_what_holds_no_ids_is_refused_in_one_line_that_names_it(value, message):
    with pytest.raises(ValueError, match=message) as error:
        read_mask_ids(value, "cats/1.png")
    assert "\n" not in str(error.value)
