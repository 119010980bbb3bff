"""Colours and depths of TIFF in every form (pages, BigTIFF, tiles): as Pillow gives the classic file of one page."""

import io
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from hf_mim.data.crop import WholeImage, crop_rng, load_crop
from hf_mim.data.decode import header_size, open_image
from hf_mim.data.masks import read_mask_ids
from hf_mim.data.nodata import tagged_nodata, unused_pages
from hf_mim.models.pixels import ImageFormatError

RANDOM = np.random.default_rng(3)
HEIGHT, WIDTH = 12, 16
COLOUR = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
# Form → the options of tifffile, the number of pages.
FORMS = {
    "one page": ({}, 1),
    "2 pages": ({}, 2),
    "3 pages": ({}, 3),
    "tiles": ({"tile": (16, 16)}, 1),
    "tiles, 2 pages": ({"tile": (16, 16)}, 2),
    "BigTIFF": ({"bigtiff": True}, 1),
    "BigTIFF, 2 pages, deflate": ({"bigtiff": True, "compression": "zlib"}, 2),
    "big-endian": ({"byteorder": ">"}, 1),
    "big-endian BigTIFF": ({"byteorder": ">", "bigtiff": True}, 1),
}


def written(page, form: str, **options) -> bytes:
    """The page in a form. The pages that follow are other images."""
    more, pages = FORMS[form]
    file = io.BytesIO()
    about = {name: more[name] for name in ("bigtiff", "byteorder") if name in more}
    with tifffile.TiffWriter(file, **about) as writer:
        for number in range(pages):
            rest = {name: value for name, value in more.items() if name not in about}
            writer.write(np.roll(page, number, axis=0), contiguous=False, metadata=None, **rest, **options)
    return file.getvalue()


def pil_tiff(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "TIFF")
    return file.getvalue()


def pixels(data: bytes, num_channels: int) -> np.ndarray:
    """[h, w, C]"""
    return load_crop(data, WholeImage(), (HEIGHT, WIDTH), num_channels, crop_rng(0, 0, 0)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_palette_gives_its_colours_in_every_form(form, num_channels):
    image = Image.fromarray(COLOUR).quantize(32)
    colours = np.zeros((256, 3), np.uint16)
    colours[: len(image.getpalette()) // 3] = np.reshape(image.getpalette(), (-1, 3))
    low_byte = RANDOM.integers(0, 256, (3, 256)).astype(np.uint16)  # is cut, as by Pillow
    data = written(np.asarray(image), form, photometric="palette", colormap=colours.T * 256 + low_byte)
    expected = np.asarray(image.convert("RGB" if num_channels == 3 else "L")).reshape(HEIGHT, WIDTH, -1)
    found = pixels(data, num_channels)
    assert found.dtype == np.uint8 and np.abs(found.astype(int) - expected).max() <= (num_channels == 1)


DEPTHS = [(form, kind) for form in FORMS for kind in ("bool", "uint8", "uint16")]
DEPTHS += [(form, "12 bits") for form in FORMS if not FORMS[form][0] or FORMS[form][0] == {"bigtiff": True}]


@pytest.mark.parametrize(("form", "kind"), DEPTHS)
def test_black_is_0_whatever_the_file_says_in_every_depth_and_form(form, kind):
    if kind == "bool":
        stored, options, expected = GREY > 99, {}, np.where(GREY > 99, 0, 255).astype(np.uint8)
    elif kind == "12 bits":
        stored, options = GREY.astype(np.uint16) * 16, {"bitspersample": 12}
        expected = 4095 - stored
    else:
        stored, options = GREY.astype(kind) * (1 if kind == "uint8" else 257), {}
        expected = np.iinfo(kind).max - stored
    data = written(stored, form, photometric="miniswhite", **options)
    num_channels = 3 if FORMS[form][1] != 3 else 1  # else the pages are its bands
    found = pixels(data, num_channels)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected[..., None].repeat(num_channels, axis=2))


def test_pages_of_a_stack_are_inverted_each_and_an_extra_band_is_not():
    data = written(GREY, "3 pages", photometric="miniswhite")
    np.testing.assert_array_equal(pixels(data, 3), np.stack([255 - np.roll(GREY, k, axis=0) for k in range(3)], axis=2))
    bands = np.dstack([GREY, GREY]).astype(np.uint16)
    about = dict(photometric="miniswhite", planarconfig="contig", extrasamples=["unspecified"])
    found = pixels(written(bands, "one page", **about), 2)
    np.testing.assert_array_equal(found, np.dstack([65535 - bands[..., 0], bands[..., 1]]))


def test_a_nodata_tag_of_a_file_with_white_as_0_follows_its_values():
    for kind, expected in (("uint8", 255), ("uint16", 65535)):
        tag = [(42113, "s", 0, "0", True)]
        data = written(GREY.astype(kind), "one page", photometric="miniswhite", extratags=tag)
        assert tagged_nodata(data) == expected
        assert tagged_nodata(written(GREY.astype(kind), "one page", photometric="minisblack", extratags=tag)) == 0


@pytest.mark.parametrize("kind", ["float32", "int16"])
def test_white_as_0_without_a_largest_value_is_refused(kind):
    with pytest.raises(ImageFormatError, match=f"a TIFF of {kind} in which white is 0; save it with black as 0"):
        open_image(written(GREY.astype(kind), "one page", photometric="miniswhite"))


def packed(bits: int, white_is_zero: bool, pages: int, nodata: bytes = b"") -> tuple[bytes, np.ndarray]:
    """A grey TIFF of less than 8 bits, by hand, perhaps with GDAL's tag; and its values."""
    values = GREY >> (8 - bits)
    per_byte = 8 // bits
    parts = values.reshape(HEIGHT, WIDTH // per_byte, per_byte)
    body = sum(parts[..., k] << (bits * (per_byte - 1 - k)) for k in range(per_byte)).astype(np.uint8).tobytes()
    tags = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: HEIGHT}
    tags[279] = len(body)
    gdal = struct.pack("<HHI4s", 42113, 2, len(nodata) + 1, nodata) if nodata else b""
    count = len(tags) + bool(gdal)
    size, start = 2 + 12 * count + 4, 8 + len(body)
    data = b"II*\0" + struct.pack("<I", start) + body
    for page in range(pages):
        data += struct.pack("<H", count) + b"".join(struct.pack("<HHII", k, 4, 1, v) for k, v in tags.items()) + gdal
        data += struct.pack("<I", start + (page + 1) * size if page + 1 < pages else 0)
    return data, values


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("pages", [1, 2])
def test_packed_grey_of_less_than_8_bits_is_scaled_as_by_pillow(bits, white_is_zero, pages):
    data, values = packed(bits, white_is_zero, pages)
    levels = 255 // (2**bits - 1) * values
    expected = 255 - levels if white_is_zero else levels
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("L")), expected)
    np.testing.assert_array_equal(pixels(data, 1)[..., 0], expected)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_a_nodata_tag_of_packed_grey_means_the_pixels_that_hold_its_value(bits, white_is_zero):
    data, values = packed(bits, white_is_zero, 1, nodata=b"1")
    np.testing.assert_array_equal(pixels(data, 1)[..., 0] == tagged_nodata(data), values == 1)
    assert tagged_nodata(packed(bits, white_is_zero, 1, nodata=b"16")[0]) is None  # no pixel can hold it


def test_a_nodata_tag_of_a_palette_is_ignored_because_an_index_is_no_colour():
    colours = RANDOM.integers(0, 65536, (3, 256)).astype(np.uint16)
    tag = [(42113, "s", 0, "3", True)]
    assert tagged_nodata(written(GREY, "one page", photometric="palette", colormap=colours, extratags=tag)) is None


def test_masks_keep_what_images_scale_or_colour():
    data, values = packed(4, False, 1)
    np.testing.assert_array_equal(read_mask_ids(data), values)
    colours = RANDOM.integers(0, 65536, (3, 256)).astype(np.uint16)
    for form in ("one page", "2 pages", "BigTIFF"):
        np.testing.assert_array_equal(read_mask_ids(written(GREY, form, photometric="palette", colormap=colours)), GREY)


@pytest.mark.parametrize("form", [form for form in FORMS if "big-endian Big" not in form])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_cmyk_becomes_what_pillow_makes_of_it(form, num_channels):
    image = Image.fromarray(COLOUR).convert("CMYK")
    image = Image.merge("CMYK", [*image.split()[:3], Image.fromarray(GREY // 3)])
    expected = np.asarray(image.convert("RGB" if num_channels == 3 else "L")).reshape(*GREY.shape, num_channels)
    data = written(np.asarray(image), form, photometric="separated")
    np.testing.assert_array_equal(pixels(data, num_channels), expected)


def test_colours_of_a_form_that_nothing_converts_are_refused():
    ink = np.dstack([COLOUR, GREY])
    for data in (
        written(ink, "big-endian BigTIFF", photometric="separated"),
        written(ink.astype(np.uint16) * 257, "one page", photometric="separated"),
        written(COLOUR.astype(np.uint16) * 257, "one page", photometric="cielab"),
    ):
        with pytest.raises(ImageFormatError, match="a (CMYK|LAB) TIFF of this depth, .* save it as RGB"):
            open_image(data, 4)


@pytest.mark.parametrize("mode", ["YCbCr", "LAB"])
@pytest.mark.parametrize("form", ["one page", "2 pages", "BigTIFF"])
def test_ycbcr_and_lab_become_what_pillow_makes_of_them(mode, form):
    image = Image.merge(mode, Image.fromarray(COLOUR).split())
    about = {"photometric": "ycbcr" if mode == "YCbCr" else "cielab"}
    about |= {"subsampling": (1, 1)} if mode == "YCbCr" else {}
    expected = np.asarray(Image.open(io.BytesIO(pil_tiff(image))).convert("RGB"))
    np.testing.assert_array_equal(pixels(written(np.asarray(image), form, **about), 3), expected)


def test_jpegs_in_a_bigtiff_stay_rgb():
    wave = np.stack([np.add.outer(np.arange(64), np.arange(64)) + k * 40 for k in range(3)], -1).astype(np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, wave, photometric="rgb", compression="jpeg", bigtiff=True)
    assert np.abs(np.asarray(open_image(file.getvalue(), 3)).astype(int) - wave).mean() < 3


@pytest.mark.parametrize("form", FORMS)
def test_pages_that_are_not_used_are_counted(form):
    data, pages = written(GREY, form, photometric="minisblack"), FORMS[form][1]
    assert unused_pages(io.BytesIO(data), 2) == (1 if pages == 2 else pages)
    colour = written(COLOUR, form, photometric="rgb")
    assert unused_pages(io.BytesIO(colour), 2) == pages


def test_smaller_copies_of_the_image_are_no_pages():
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(COLOUR, photometric="rgb", metadata=None)
        writer.write(COLOUR[::2, ::2].copy(), photometric="rgb", subfiletype=1, metadata=None)
    file.seek(0)
    assert unused_pages(file, 3) == 1


def test_a_file_of_many_bands_leaves_no_line_of_the_decoder_on_stderr(capfd):
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((4, 6, 13), np.uint16), photometric="minisblack", planarconfig="contig")
    assert header_size({"bytes": file.getvalue(), "path": None}) is None
    assert capfd.readouterr().err == ""
